"""What a person at a terminal sees: text and nothing between, no tracebacks, logs only for whoever asks."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from configs import default

ROOT = pathlib.Path(__file__).parents[2]


def start(*args: str, **env: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", *args], cwd=ROOT, env=os.environ | env, **pipes)


@pytest.fixture(scope="module")
def generate(tiny_folder):
    model = ["--model", str(tiny_folder / "model"), "--prompt", "the cat sat"]
    asked = ["--controller", "fixed", "--budget", "0.5,0.7,0.5", "--max_tokens", "24"]
    return ["sol_jax.generate", *model, *asked]


def test_generate_prints_the_text_and_what_was_spent_and_nothing_else(generate):
    out, err = start(*generate).communicate(timeout=300)
    assert len(out.decode().strip("\n")) > 10
    names = [line.split("  ")[0] for line in err.decode().splitlines()]
    assert names[:4] == ["controller", "requested", "realised", "net keep rate"]
    assert names[-1] == "tokens per second"
    assert not [line for line in err.decode().splitlines() if line.startswith(("I", "W")) and "]" in line]


def test_verbosity_brings_the_logs_back(generate):
    _, err = start(*generate, "--verbosity=0").communicate(timeout=300)
    assert "bucket: batch 1" in err.decode()


def test_a_reader_that_goes_away_ends_the_program_without_a_traceback(generate):
    process = start(*generate, PYTHONUNBUFFERED="1")
    process.stdout.close()  # `| head` that has read enough
    err = process.stderr.read().decode()
    process.wait(timeout=300)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_characters_that_the_terminal_lacks_are_replaced(tiny_folder):
    """The tokenizer is of bytes, and a random model writes some that are no latin-1."""
    args = ["--model", str(tiny_folder / "model"), "--prompt", "“the cat” €", "--max_tokens", "40"]
    process = start("sol_jax.generate", *args, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C.UTF-8")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert out.decode("ascii")


def test_train_says_what_it_will_do_and_shows_a_handful_of_numbers(tiny_folder, tmp_path):
    told = tiny.flags_for(tiny.config_for(tiny_folder), default.get_config("smoke"))
    few = ["--config.train.num_updates=2", "--config.eval.num_test_blocks=0", "--config.eval.every=2"]
    run = ["--config", "configs/default.py:smoke", "--workdir", str(tmp_path / "run")]
    process = start("sol_jax.train", *run, *told, *few)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    lines = [line for line in err.decode().splitlines() if line]
    first = next(n for n, line in enumerate(lines) if line.startswith("training a policy over 8 actions"))
    assert "2 updates take about" in lines[first + 2]
    assert str(tmp_path / "run") in lines[first + 3]
    assert any(line.startswith("update 2: on held-out text") for line in lines)
    assert max(line.count("=") for line in lines[first:]) <= 1  # no 25 scalars in a line
    _, err = start("sol_jax.train", *run, *told, *few).communicate(timeout=300)
    assert "all 2 updates" in err.decode()
