"""The comparison with llama.cpp, with a stand-in for node: what is asked of it, and what goes wrong."""

import stat
import sys

import numpy as np
import pytest

from experiments.benchmarks import llama_cpp
from sol_jax.errors import UserError

# Answers as the server does: "ready" once it has the context, then ten milliseconds a token.
NODE = """#!{python}
import json, sys
ids = json.loads(sys.stdin.readline())
assert len(ids) == int(sys.argv[4]), sys.argv
print("ready", flush=True)
for line in sys.stdin:
    if "broken" in sys.argv[3]:
        sys.exit(3)
    print(10.0 * json.loads(line), flush=True)
"""


@pytest.fixture
def node(tmp_path, monkeypatch):
    path = tmp_path / "node"
    path.write_text(NODE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_server_is_given_the_context_and_asked_for_tokens(node):
    with llama_cpp.Server(node, node / "model.gguf", [1, 2, 3]) as server:
        assert [server.seconds(16), server.seconds(2)] == [0.16, 0.02]


def test_a_server_that_ends_is_told(node):
    with (
        llama_cpp.Server(node, node / "broken.gguf", [1]) as server,
        pytest.raises(UserError, match=r"llama.cpp ended with 3; see above"),
    ):
        server.seconds(1)


def test_ratios_are_of_the_same_turn(node, monkeypatch):
    """Ours took 20 ms a token in float32 and 5 in bfloat16, theirs 10."""

    class Text:
        def __init__(self, seconds):
            self.seconds = seconds

        def play(self):
            return 16 * self.seconds, np.zeros(16)

    monkeypatch.setattr(llama_cpp, "open_model", lambda name, dtype: dtype)
    monkeypatch.setattr(llama_cpp.clock, "articles", lambda model, length, count: iter([np.arange(length)]))
    took = {"float32": 0.02, "bfloat16": 0.005}
    monkeypatch.setattr(llama_cpp, "ours", lambda model, ids, context: lambda: Text(took[model]))
    files = {name: node / f"{name}.gguf" for name in llama_cpp.TYPES}
    rows = llama_cpp.measure(llama_cpp.parsed(["--modules", str(node), "--turns", "3"]), files, 40)
    assert [row["llama.cpp"] for row in rows] == ["f32", "bf16", "q4_1"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(100)
        assert (row["float32_over"], row["bfloat16_over"]) == pytest.approx((0.5, 2.0))


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        llama_cpp.main(["--modules", str(tmp_path)])
    assert "npm install node-llama-cpp" in f"{ended.value} {capsys.readouterr().err}"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        llama_cpp.write_files(tmp_path)
