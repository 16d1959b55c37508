"""Tokenizers of folders against transformers' own: ids, special tokens and chat templates."""

import pytest
import tokenizer_folders
from transformers import AutoTokenizer

from sol_jax.models.chat_template import render
from sol_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity
USER = [{"role": "user", "content": "Hi <b>"}]
TEMPLATES = [
    "{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "{% for m in messages %}{{ m | tojson(indent=2, sort_keys=True) }}{% endfor %}",
    "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True) }}",
    "{{ additional_special_tokens | join(' ') }}{{ messages[0].content }}",
]


@pytest.mark.parametrize("name", tokenizer_folders.CASES)
def test_ids(name, tmp_path):
    case = tokenizer_folders.CASES[name]
    theirs = AutoTokenizer.from_pretrained(tokenizer_folders.write(tmp_path / "t", case))
    ours = load_tokenizer(tmp_path / "t")
    for text in (case.text, tokenizer_folders.TEXT, "a b.c <|start|>é"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert case.ids == theirs.encode(case.text, add_special_tokens=False)
    assert case.framed == theirs.encode(case.text)
    # Tokens that a class assumes and no file names are left out by us.
    files = "".join(path.read_text() for path in (tmp_path / "t").glob("*.json"))
    named = theirs.special_tokens_map.items()
    assert ours.special == {name: token for name, token in named if isinstance(token, list) or token in files}
    assert ours.eos_id == theirs.eos_token_id
    for template in TEMPLATES:
        text = theirs.apply_chat_template(USER, chat_template=template, tokenize=False)
        assert render(template, USER, ours.special) == text
