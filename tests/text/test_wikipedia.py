# ruff: noqa: RUF001 - the dashes and signs are the content
"""Markup to prose: every kind of element by a small example, and what may never survive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sol_jax.text.wikipedia import article_text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Albedo''' is the ''reflecting'' power.", "Albedo is the reflecting power."),
        ("the [[Coosa River|Coosa]] and [[Tallapoosa]] rivers", "the Coosa and Tallapoosa rivers"),
        ("seen [[:Category:Rivers]] here", "seen Category:Rivers here"),
        ("[[File:a.jpg|thumb|A [[link]] in ''it'']]Text[[Category:X]][[de:Text]]", "Text"),
        ("[http://a.org the site] and [http://a.org] too", "the site and too"),
        ('Won.<ref name="a">{{cite web|url=x}}</ref> Lost.<ref name="a" /> Drew.', "Won. Lost. Drew."),
        ("Kept.<!-- not\n\nthis --> Kept.", "Kept. Kept."),
        ("Before\n{| class=wikitable\n|-\n! a !! b\n|-\n| 1 || 2\n|}\nAfter", "Before\n\nAfter"),
        ("{{Infobox person|name=A|born={{birth date|1809|2|12}}}}\nLincoln", "Lincoln"),
        ("'''Autism''' ({{IPAc-en|ɔː|t}}; born 1809) is", "Autism (born 1809) is"),
        ("'''Ada''' ({{IPA-de|x}}, {{respell|A}}) is", "Ada is"),
        ("At {{convert|1300|mi|km}} long", "At 1,300 miles long"),
        ("{{convert|3|to|5|km2|sqmi|abbr=on}}", "3 to 5 km²"),
        ("{{convert|60|and(-)|80|kg|lb}}", "60 and 80 kg"),
        (
            "{{lang|grc|ἀναρχία}} and {{lang-sq|Shqipëri}} and {{transl|ar|Allāh}}",
            "ἀναρχία and Shqipëri and Allāh",
        ),
        ("{{nihongo|[[bayonet]]|銃剣|jūken}}", "bayonet"),
        ("{{frac|3}} of {{frac|2|1|3}}", "1/3 of 2 1/3"),
        ("{{As of|2014}}, and {{as of|2015|3|lc=y}}", "As of 2014, and as of 2015-3"),
        ("{{chem|H|2|O}} is H<sub>2</sub>O; 10<sup>−6</sup> m<sup>2</sup>", "H2O is H2O; 10⁻⁶ m²"),
        ("{{val|6.241|e=18}}&nbsp;e&ndash;{{nowrap|a b}}", "6.241 × 10¹⁸ e–a b"),
        ("<math>\\frac{{a}}{[[b]]}</math>", "\\frac{ {a} }{[ [b] ]}"),
        ("One line\nof a paragraph.\n\nNext.", "One line of a paragraph.\n\nNext."),
        ("List:\n* one\n* two\nAfter.", "List:\n\none\n\ntwo\n\nAfter."),
        ("a<blockquote>b</blockquote>c<br />d {{quote|e|by F}}", "a\n\nb\n\nc\n\nd\n\ne"),
        ("__NOTOC__\nText {{citation needed|date=2015}}.", "Text."),
    ],
)
def test_elements(markup, text):
    assert article_text(markup) == text


def test_titles_stay_where_their_section_has_text():
    markup = (
        "Lead.\n== History ==\n=== Early ===\nOld.\n=== Late ===\n{{main|Late}}\n== Empty ==\n"
        "== See also ==\n* [[X]]\n=== More links ===\n* [[Y]]\n== Legacy ==\nNew.\n"
        "== References ==\n{{reflist}}"
    )
    assert article_text(markup) == "Lead.\n\nHistory\n\nEarly\n\nOld.\n\nLegacy\n\nNew."


def test_an_unbalanced_quote_in_a_caption_does_not_spill_it():
    assert article_text("[[File:a.svg|thumb|'''Pepe vio a Pablo''<br />caption]]\nText.") == "Text."


@given(st.text(alphabet="ab '[]{}|=<>/ref*:\n!-&;", max_size=60))
def test_never_fails_and_leaves_no_blank_lines_or_outer_space(markup):
    text = article_text(markup)
    assert all(paragraph == paragraph.strip() != "" for paragraph in text.split("\n\n") if text)
