"""Scalars against kills, full disks and NaN; progress with and without a terminal."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import math
import os
import pathlib
import pty
import signal
import struct
import subprocess
import sys
import termios

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from fake_bucket import FakeBuckets, fake_buckets

from sol_jax.errors import UserError
from sol_jax.files import LineFile, path_of
from sol_jax.runs import metrics
from sol_jax.runs.metrics import Progress, Writer

ROOT = pathlib.Path(__file__).parents[2]
with_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow (extra `tensorboard`)"
)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Importing tensorflow takes seconds; most of these tests are not about it."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)


pytestmark = pytest.mark.usefixtures("no_tensorflow")


def lines_of(workdir):
    """The lines as a strict reader of JSON takes them."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def steps_of(workdir):
    return [line["step"] for line in lines_of(workdir)]


def test_a_line_holds_step_time_and_values(tmp_path):
    with Writer(tmp_path / "new" / "workdir") as writer:
        writer.scalars(np.int64(7), {"reward": jnp.float32(0.25), "loss/a": np.array(2), "n": 3})
    (line,) = lines_of(tmp_path / "new" / "workdir")
    assert line.pop("time") == pytest.approx(
        os.path.getmtime(tmp_path / "new" / "workdir" / "metrics.jsonl"), abs=60
    )
    assert line == {"step": 7, "reward": 0.25, "loss/a": 2.0, "n": 3.0}


def test_numbers_come_back_exactly_and_nan_is_not_hidden(tmp_path):
    values = {"a": 0.1, "b": 1e-320, "nan": math.nan, "up": math.inf, "down": -math.inf}
    with Writer(tmp_path) as writer:
        writer.scalars(1, values)
    (line,) = lines_of(tmp_path)
    assert (line["nan"], line["up"], line["down"]) == ("nan", "inf", "-inf")
    read = {name: float(line[name]) for name in values}
    assert read.pop("nan") != values.pop("nan")
    assert read == values


def test_each_line_is_on_its_way_to_the_disk_at_once(tmp_path):
    with Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.scalars(step, {"x": step})
            assert steps_of(tmp_path)[-1] == step


@pytest.mark.parametrize(
    ("tail", "resume_step", "kept"),
    [
        ("", 0, []),
        ("", 2, [1, 2, 2]),
        ("", 9, [1, 2, 2, 3]),
        ('{"step": 3, "ti', 3, [1, 2, 2, 3]),  # torn
        ('{"step": 3}', 3, [1, 2, 2, 3, 3]),  # whole but for its end of line
        ('{"step": 4, "x"\n{"step": 3}\n', 3, [1, 2, 2, 3, 3]),
        ("\x00\x00\n[1]\n3\n{}\nnull\n" + '{"step": "x"}\n', 3, [1, 2, 2, 3]),
    ],
)
def test_a_resumed_run_drops_what_it_will_write_again(tmp_path, tail, resume_step, kept):
    with Writer(tmp_path) as writer:
        for step in (1, 2, 2, 3):
            writer.scalars(step, {"x": step})
    before = lines_of(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    with Writer(tmp_path, resume_step) as writer:
        assert steps_of(tmp_path) == kept
        assert lines_of(tmp_path)[: len(before)] == before[: len(kept)]
        writer.scalars(10, {})
    assert steps_of(tmp_path) == [*kept, 10]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_bytes_that_are_no_text_are_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x80')
    Writer(tmp_path, 1).close()
    assert steps_of(tmp_path) == [1]


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {})
    inode = os.stat(tmp_path / "metrics.jsonl").st_ino
    Writer(tmp_path, 1).close()
    assert os.stat(tmp_path / "metrics.jsonl").st_ino == inode


def test_a_rewrite_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {})
        writer.scalars(2, {})

    def replace(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: no space left on device$"):
        Writer(tmp_path, 1)
    assert steps_of(tmp_path) == [1, 2]


def test_a_killed_run_leaves_whole_lines_and_at_most_one_torn(tmp_path):
    code = "import sys; sys.modules['tensorflow'] = None; from sol_jax.runs.metrics import Writer\n"
    code += "w = Writer(sys.argv[1]); print(flush=True)\n"
    code += "for step in range(10**9): w.scalars(step, {str(n): n for n in range(500)})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        while (tmp_path / "metrics.jsonl").stat().st_size < 500_000:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    whole = (tmp_path / "metrics.jsonl").read_text().count("\n")
    with Writer(tmp_path, 10**9) as writer:
        writer.scalars(10**9, {})
    assert steps_of(tmp_path) == [*range(whole), 10**9]


def test_on_an_object_store_no_line_before_a_checkpoint_is_lost(tmp_path):
    with fake_buckets(tmp_path / "buckets"):
        file = path_of("gs://b/run", "x") / "metrics.jsonl"
        writer = Writer("gs://b/run")
        writer.scalars(1, {"x": 1})
        writer.flush()  # and a checkpoint is saved
        writer.scalars(2, {"x": 2})  # and it is killed
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1]
        with Writer("gs://b/run", 1) as writer:
            writer.scalars(2, {"x": 2})
            writer.scalars(3, {"x": math.nan})
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
        with Writer("gs://b/run", 2):
            pass
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_a_bucket_that_is_gone_at_the_end_is_told(tmp_path, monkeypatch):
    def gone(self, path, mode="rb", **kwargs):
        raise RuntimeError("503 Service Unavailable")

    with fake_buckets(tmp_path / "buckets"):
        writer = Writer("gs://b/run")
        writer.scalars(1, {"x": 1})
        monkeypatch.setattr(FakeBuckets, "_open", gone)
        with pytest.raises(UserError, match=r"gs://b/run/metrics\.jsonl: cannot be written: .*503 service"):
            writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    writer = Writer(tmp_path)
    writer.close()
    writer._file = LineFile(pathlib.Path("/dev/full"))
    with pytest.raises(UserError) as error, writer:
        writer.scalars(1, {"x": 1})
    assert str(error.value) == f"{tmp_path}/metrics.jsonl: cannot be written: no space left on device"


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/metrics\.jsonl: cannot be written: "):
        Writer(tmp_path / "file")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with Writer(tmp_path / "workdir") as writer:
        writer.scalars(1, {"x": 1})
        writer.flush()
    assert os.listdir(tmp_path) == []


def test_scalars_are_logged_at_verbosity_info(tmp_path, caplog):
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    with contextlib.closing(Writer(tmp_path)) as writer:
        writer.scalars(3, {"reward": -0.123456789, "kl": math.nan})
    logging.set_verbosity(verbosity)
    assert caplog.messages == ["[3] reward=-0.123457, kl=nan"]


# TensorBoard.


def test_without_tensorflow_there_are_no_summaries_and_no_hooks(tmp_path):
    with Writer(tmp_path) as writer:
        assert writer.summaries is None
        assert metrics.periodic_actions(writer, 10) == []
        writer.flush()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_neither_tensorflow_nor_clu_is_imported_before_it_is_needed():
    code = "import sys, sol_jax.runs.metrics; print(sorted({'clu', 'tensorflow'} & {*sys.modules}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_broken_tensorflow_is_told_and_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "tensorflow.py").write_text("import this_is_nowhere")
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.syspath_prepend(tmp_path)
    with Writer(tmp_path / "workdir") as writer:
        writer.scalars(1, {"x": 1})
    assert steps_of(tmp_path / "workdir") == [1]
    assert "no TensorBoard files: tensorflow is installed but unusable (No module" in caplog.text


TENSORBOARD_RUN = """
import sys
from sol_jax.runs import metrics

with metrics.Writer(sys.argv[1]) as writer:
    (report,) = metrics.periodic_actions(writer, 3)
    for step in range(4):
        writer.scalars(step, {"reward": step / 4, "kl": float("nan")})
        report(step)
    writer.flush()
"""


@with_tensorflow
def test_tensorboard_gets_the_same_scalars(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TENSORBOARD_RUN, str(tmp_path)]
    subprocess.run(command, env=environment, check=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)] for tag in
            ("reward", "kl", "steps_per_sec")}  # fmt: skip
    assert read["reward"] == [(step, step / 4) for step in range(4)]
    assert [math.isnan(value) for _, value in read["kl"]] == [True] * 4
    assert [step for step, _ in read["steps_per_sec"]] == [3]
    assert steps_of(tmp_path) == [0, 1, 2, 3]


# Progress.


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


class Pipe:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return False

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch):
    clock, pipe = Clock(monkeypatch), Pipe()
    bar = Progress(total=110, start=10, label="train", stream=pipe)
    for step in range(11, 111):
        clock.now += 1.0
        bar.update(step, "reward 0.1235 a token")
    bar.close()
    lines = pipe.text.splitlines()
    assert "\r" not in pipe.text
    assert len(lines) == 5  # at 1, 31, 61 and 91 seconds, and the end
    # 31 steps in 31 seconds, 69 to go: the rate counts the steps of this process only.
    assert lines[1] == "train:  37% 41/110 [00:31<01:09,  1.00 steps/s, reward 0.1235 a token]"
    assert lines[-1].startswith("train: 100% 110/110 [01:40<00:00,")


def test_on_a_terminal_there_is_a_bar():
    try:
        reader, terminal = pty.openpty()
    except OSError:
        pytest.skip("this system has no pseudo-terminals")
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        bar = Progress(total=4, start=1, label="train", stream=stream)
        for step in range(2, 5):
            bar.update(step, f"reward {step / 4}")
        bar.close()
        stream.write("the end")
        stream.flush()
        text = ""
        while "the end" not in text:  # a terminal hands over what it has, in pieces
            text += os.read(reader, 100_000).decode()
    os.close(reader)
    assert "\r" in text
    last = text.removesuffix("the end").rstrip().split("\r")[-1]
    assert last.startswith("train: 100%")
    assert "4/4" in last
    assert "reward 1" in last


def test_lines_of_their_own_stand_beside_the_progress():
    pipe = Pipe()
    bar = Progress(total=3, start=0, label="train", stream=pipe)
    bar.say("what will be done")
    bar.update(3)
    bar.say("what came of it")
    first, progress, last = pipe.text.splitlines()
    assert (first, last) == ("what will be done", "what came of it")
    assert progress.startswith("train: 100% 3/3")
    Progress(total=3, start=0, label="train", stream=None).say("nowhere")


def test_progress_goes_to_stderr_of_the_first_process_only(monkeypatch, capsys):
    metrics.progress(5, 0, "train").update(5, "x")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train: 100% 5/5")
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    metrics.progress(5, 0, "train").update(5, "x")
    assert capsys.readouterr() == ("", "")


# In a notebook.


class Kernel:
    """IPython, as far as it tells that a notebook's kernel runs."""

    kernel = object()

    def get_ipython(self):
        return self


class Drawn:
    """Stands for tqdm's bar of a page."""

    def __init__(self, **told):
        self.told, self.n, self.shown, self.closed = told, told["initial"], "", False

    def set_postfix_str(self, text, refresh):
        self.shown = text

    def update(self, more):
        self.n += more

    def close(self):
        self.closed = True


def test_a_notebook_has_a_bar_on_its_page(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", Kernel())
    monkeypatch.setattr(metrics, "_notebook_bar", lambda: Drawn)
    bar = metrics.progress(10, 4, "train")
    bar.update(7, "reward -3")
    bar.close()
    drawn = bar._bar
    assert drawn.told == {
        "total": 10, "initial": 4, "desc": "train", "unit": " steps", "file": sys.stdout
    }  # fmt: skip
    assert (drawn.n, drawn.shown, drawn.closed) == (7, "reward -3", True)


@pytest.mark.parametrize("shell", [None, object()], ids=["no shell", "a shell on a terminal"])
def test_ipython_without_a_kernel_is_no_notebook(shell, monkeypatch, capsys):
    ipython = Kernel()
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    metrics.progress(1, 0, "train").update(1)
    assert "train: 100%" in capsys.readouterr().err


def test_without_widgets_a_notebook_s_bar_is_a_line_of_text(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", Kernel())
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    bar = metrics.progress(2, 0, "train")
    bar.update(2)
    bar.close()
    assert "train: 100%" in capsys.readouterr().out
