"""Scalars of a run as `metrics.jsonl`, for TensorBoard and for Weights & Biases; console progress.

A line of `metrics.jsonl` is `{"step": 7, "time": 1767225600.0, "reward": 0.25, ...}`.  JSON has no number for
NaN and the infinities, and leaving them out would hide them: they are the strings "nan", "inf" and "-inf",
so that `float(value)` reads every value.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from sol_jax.errors import UserError
from sol_jax.files import LineFile, is_remote, parse_json, path_of, write_whole
from sol_jax.notices import in_notebook
from sol_jax.runs.wandb_writer import WandbWriter

PLAIN_SECONDS = 30.0  # between lines of progress where the console is a file or a pipe


class Writer:
    """Writes scalars, each line at once: after a kill at most the last line is torn.  A context manager.

    A run that resumes writes the steps after its checkpoint again.  So the lines of those steps, and torn
    lines, are dropped here; write a step's scalars and `flush` before its checkpoint, and no line is lost or
    doubled.  On an object store, where lines are held for some seconds (see `LineFile`), that is what `flush`
    is for.  TensorBoard files, under `workdir/tensorboard`, keep what was written twice.

    Args:
      workdir: made if missing.
      resume_step: the step of the checkpoint that the run resumes from; 0 for a new run.
      wandb_project: of Weights & Biases; empty: none.
      config: dotted path -> value, for Weights & Biases.

    Raises `UserError` if `metrics.jsonl` cannot be written, or wandb cannot start.  Only the first of several
    processes writes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int = 0,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._path = path_of(workdir, "the workdir") / "metrics.jsonl"
        self._file: LineFile | None = None
        self.summaries: Any = None  # clu.metric_writers.SummaryWriter, or None without tensorflow
        self.others: list[Any] = []  # what has the interface of clu's writers: `summaries`, and wandb
        if jax.process_index() != 0:
            return
        try:
            _cut(self._path, resume_step)
            self._file = LineFile(self._path)
        except OSError as error:
            raise self._failed(error) from error
        self.summaries = _summary_writer(self._path.parent / "tensorboard")
        self.others = [] if self.summaries is None else [self.summaries]
        if wandb_project:
            self.others.append(WandbWriter(self._path.parent, wandb_project, config or {}))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of numbers, or arrays without axes; also logged, at verbosity info.

        Raises `UserError` if the disk is full.
        """
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        shown = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
        line = json.dumps({"step": int(step), "time": round(time.time(), 3), **shown}, allow_nan=False)
        try:
            self._file.add(line)
        except OSError as error:
            raise self._failed(error) from error
        logging.info("[%d] %s", step, ", ".join(f"{name}={x:.6g}" for name, x in numbers.items()))
        for writer in self.others:
            writer.write_scalars(step, numbers)

    def sample(self, step: int, text: str, image_HxWxC: np.ndarray) -> None:
        """A sample episode: its text, and a picture in which each token is shaded.

        Not for `metrics.jsonl`.
        """
        for writer in self.others:
            writer.write_texts(step, {"sample/text": text})
            writer.write_images(step, {"sample/shaded": image_HxWxC[None]})

    def flush(self) -> None:
        """Until everything is with the operating system, or the object store.

        Raises `UserError` if that cannot be.
        """
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._failed(error) from error
        for writer in self.others:
            writer.flush()

    def close(self) -> None:
        """Ends the files.  Raises `UserError` if lines that were held cannot be written."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # of lines whose loss has been told
                    self._file.close()
            for writer in self.others:
                writer.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written: {(error.strerror or str(error)).lower()}")


def _cut(path: pathlib.Path, last_step: int) -> None:
    """Drops later and torn lines, all at once or not at all."""
    if not path.exists():
        return
    text = path.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    kept = "".join(f"{line}\n" for line in text.split("\n") if line and _step(line) <= last_step)
    if kept != text:
        write_whole(path, kept)


def _step(line: str) -> float:
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def _summary_writer(directory: pathlib.Path) -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        return None
    if is_remote(directory) and not str(directory).startswith("gs://"):  # tensorflow itself opens no others
        return None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        from clu import metric_writers
    except ImportError as error:
        logging.warning("no TensorBoard files: tensorflow is installed but unusable (%s)", error)
        return None
    with contextlib.suppress(RuntimeError):  # tensorflow is in use already, and keeps what it has
        tf.config.set_visible_devices([], "GPU")  # or it takes the memory that JAX needs
    return metric_writers.SummaryWriter(str(directory))


def periodic_actions(writer: Writer, num_steps: int) -> list[Any]:
    """Hooks to call with the step after every update: steps per second to TensorBoard, if there is one."""
    if writer.summaries is None:
        return []
    from clu import periodic_actions as clu_actions

    return [clu_actions.ReportProgress(num_train_steps=num_steps, writer=writer.summaries)]


class Progress:
    """How far a loop is and how long it will take: a bar where one can be drawn, else a line now and then.

    Args:
      total: steps of the whole run.
      start: steps done before this process.
      label: what is being done.
      stream: where to; None for nowhere.
      bar: makes the bar, with tqdm's arguments; None: only a terminal has one.
    """

    def __init__(
        self, total: int, start: int, label: str, stream: TextIO | None, bar: Callable[..., Any] | None = None
    ):
        self._total, self._start, self._label, self._stream = total, start, label, stream
        self._started = time.monotonic()
        self._printed = -math.inf
        self._bar = None
        if bar is None and stream is not None and stream.isatty():
            bar = functools.partial(tqdm, dynamic_ncols=True)
        if bar is not None:
            self._bar = bar(total=total, initial=start, desc=label, unit=" steps", file=stream)

    def update(self, step: int, shown: str = "") -> None:
        """Sets the number of steps done, and what to say beside it."""
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._stream is not None:
            now = time.monotonic()
            if now - self._printed >= PLAIN_SECONDS or step >= self._total:
                self._printed = now
                print(self._line(step, now - self._started, shown), file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._stream is not None:
            print(line, file=self._stream, flush=True)

    def _line(self, step: int, seconds: float, postfix: str) -> str:
        return tqdm.format_meter(
            step, self._total, seconds, ncols=0, prefix=self._label, unit=" steps", postfix=postfix,
            initial=self._start,
        )  # fmt: skip

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def progress(total: int, start: int, label: str) -> Progress:
    """Progress of the first process only: on stderr, or under a notebook's cell."""
    if jax.process_index() != 0:
        return Progress(total, start, label, None)
    if in_notebook():
        return Progress(total, start, label, sys.stdout, _notebook_bar())
    return Progress(total, start, label, sys.stderr)


def _notebook_bar() -> Callable[..., Any]:
    """tqdm's bar for pages, where ipywidgets is there to draw it, else a line of text that is renewed."""
    if importlib.util.find_spec("ipywidgets") is None:
        return functools.partial(tqdm, ncols=100)
    from tqdm.notebook import tqdm as drawn

    return drawn
