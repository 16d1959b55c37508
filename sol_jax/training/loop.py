"""The training loop: updates, logs, evaluations and checkpoints, until the last update or SIGTERM.

Starting again in the same workdir resumes; a run killed at any moment and resumed ends with exactly the
parameters of an uninterrupted one, because an update is a function of (state, tokens) alone and a
checkpoint holds the state and the position of the data iterator.
"""

import contextlib
import functools
import math
import pathlib
import signal
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sol_jax import hosts
from sol_jax.costs.update import matmul_rate, update_flops
from sol_jax.errors import UserError
from sol_jax.evaluation.comparison import summary
from sol_jax.evaluation.provenance import remember_documents
from sol_jax.evaluation.report import compare_quietly, is_reported, report_run
from sol_jax.files import path_of
from sol_jax.hosts import AgreedError
from sol_jax.models.sharding import DATA, MODEL, make_mesh
from sol_jax.rl.learn import TrainState
from sol_jax.rl.sharded_update import sharded_update
from sol_jax.rl.train_step import init_state
from sol_jax.runs import metrics
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.config import RunConfig, read_config
from sol_jax.runs.policy_files import check_fits
from sol_jax.runs.session import Session, commit, open_session
from sol_jax.runs.trained_policy import find_policy
from sol_jax.runs.wandb_writer import check_installed
from sol_jax.runs.workdir_lock import only_run
from sol_jax.text.blocks import BlockIterator, evaluation_batches
from sol_jax.training.estimate import clock, estimated_seconds, updates_of
from sol_jax.training.sample import sample_episode


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop)
    """SIGTERM asked the run to stop; all that it has learned by `step` is on disk."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM after update {step}; start again to resume")


class StopRequest:
    """Turns SIGTERM (a pod's or scheduler's notice) into a flag, which is read where stopping loses nothing.

    A context manager: outside it the signal means what it meant before.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def anywhere(self) -> bool:
        """Whether the signal has come to any of the processes; all of them must ask at the same moment."""
        return hosts.any_of(self.requested)

    def check(self, step: int) -> None:
        """Raises `Interrupted` if the signal has come; `step` is the last update, which is on disk."""
        if self.anywhere():
            raise Interrupted(step)

    def _set(self, signum: int, frame: Any) -> None:
        self.requested = True


def train(config: RunConfig, workdir: pathlib.Path) -> TrainState:
    """Runs `config.train.num_updates` updates, resuming from `workdir`; returns the final state.

    Raises:
      UserError: anything wrong with config, model, text or workdir; a second run in one workdir; a NaN or
        Inf; a full disk; too little memory.
      Interrupted: after SIGTERM, once the checkpoint is written.
    """
    hosts.together(config.check_here)
    # Here alone: an evaluation elsewhere needs no wandb.
    hosts.together(lambda: check_installed(config.train.wandb))
    workdir = hosts.together(lambda: path_of(workdir, "--workdir"))
    processes = jax.process_count()
    if processes > config.grpo.batch_size:
        raise AgreedError(
            f"there are {processes} processes and config.grpo.batch_size is {config.grpo.batch_size}; it "
            "must be at least as many, or some have nothing to play"
        )
    hosts.check_same("--", {"workdir": str(workdir)})
    hosts.check_same("config.", config.flat())
    if config.policy.one_budget and config.learner == "grpo":
        # Not in the config's own check: what GRPO went on from counterfactuals with can be asked so later.
        wrong = "empty where config.learner is grpo, whose penalties are of each axis"
        raise AgreedError(str(config.policy.wrong("one_budget", wrong)))
    with contextlib.ExitStack() as stack:
        hosts.together(lambda: stack.enter_context(only_run(workdir)) if hosts.first() else None)
        hosts.same_folder(workdir, "--workdir")
        return _train(_with_chunk(config, workdir), workdir)


def _with_chunk(config: RunConfig, workdir: pathlib.Path) -> RunConfig:
    """The config with `mesh.chunk` as the run began, which decides how its results are rounded."""
    if config.mesh.chunk:
        return config
    chunk = 0
    if hosts.first() and (workdir / "config.json").exists():
        with contextlib.suppress(UserError):  # told when the checkpoints are opened
            chunk = min(read_config(workdir).mesh.chunk, config.grpo.batch_size)
    mesh = hosts.together(lambda: make_mesh(config.mesh.data, config.mesh.model))
    usual = config.grpo.batch_size if mesh.shape[DATA] == 1 else 1
    return config.with_fields({"mesh.chunk": hosts.tell(chunk) or usual})


def _train(config: RunConfig, workdir: pathlib.Path) -> TrainState:
    checkpoints = Checkpoints(workdir, config.flat(), config.train.keep, commit=commit())
    session = open_session(config)
    setup, blocks = session.setup, hosts.together(lambda: session.split("train"))
    checkpoints.bind(session.identity | config.identity() | {"documents": blocks.fingerprint})
    for split in ("validation", "test") if config.eval.num_test_blocks else ("validation",):
        hosts.together(functools.partial(session.split, split))  # before the training, not after it
    batches = BlockIterator(blocks, batch_size=config.grpo.batch_size, seed=config.seed)
    num_updates = updates_of(config, blocks)
    if not num_updates:
        raise AgreedError(f"the training text has {len(blocks)} blocks, fewer than config.grpo.batch_size")
    state, start = hosts.together(lambda: _first_state(session)), 0
    restored = hosts.together(lambda: checkpoints.restore(state))
    if restored is not None:
        start, state, position = restored
        batches.restore(position)
    # Once it is clear that the run is of this text.
    hosts.together(lambda: remember_documents(workdir, blocks.documents) if hosts.first() else None)

    rate = Rates(session, config.grpo.batch_size)
    bar = metrics.progress(num_updates, start, "training")
    for line in announcement(session, workdir, start, num_updates):
        bar.say(line)
    with StopRequest() as stop:
        with (
            contextlib.closing(checkpoints),
            metrics.Writer(workdir, start, config.train.wandb, config.flat()) as writer,
            contextlib.closing(bar),
        ):
            hooks = metrics.periodic_actions(writer, num_updates)
            for step in range(start + 1, num_updates + 1):
                indices_B = batches.take()

                def read(places: np.ndarray, indices_B: np.ndarray = indices_B) -> np.ndarray:
                    return blocks.read(indices_B[places]).tokens_BxN

                state, on_device = sharded_update(
                    state, session.weights, read, setup, session.mesh, config.mesh.chunk
                )
                scalars = {name: float(value) for name, value in on_device.items()}
                require_finite(scalars, step, checkpoints)
                # Read once: a signal that comes later stops the next update, which then is saved.
                stopping = stop.anywhere()
                last = step == num_updates or stopping
                due = step == num_updates or (config.eval.every > 0 and step % config.eval.every == 0)
                log = last or due or step % config.train.log_every == 0
                if log:
                    scalars |= rate.since_last(step)
                if due:
                    scalars |= validate(session, state)
                    if hosts.any_of(bool(writer.others)):  # of which somebody looks at pictures
                        sample = sample_episode(session, state)
                        writer.sample(step, sample.text, sample.image())
                    rate.restart(step)
                    bar.say(f"update {step}: {in_words(scalars, validated=True)}")
                if log:
                    writer.scalars(step, scalars)
                if last or due or step % config.train.checkpoint_every == 0:
                    writer.flush()  # or a resumed run would lack what came before its checkpoint
                    checkpoints.save(step, state, batches.state(), scalars.get("eval/score"))
                for hook in hooks:
                    hook(step)
                bar.update(step, in_words(scalars))
                if stopping:
                    checkpoints.wait()
                    raise Interrupted(step)
        updates = int(state.step)
        # Where nothing was learned since the last results, what `sol_jax.evaluate` has added to them stays.
        known = start == updates and is_reported(workdir, updates)
        if config.eval.num_test_blocks and not known:
            report_run(session, state, workdir, pause=lambda: stop.check(updates))
    return state


def _first_state(session: Session) -> TrainState:
    """A fresh state, with the parameters of the policy that the config says to start from."""
    config, setup = session.config, session.setup
    state = init_state(jax.random.key(config.seed), setup)
    if not config.start_from:
        return state
    found, about = find_policy(
        config.start_from, session.identity, lambda own: own.setup(session.setup.model)
    )
    check_fits(config.start_from, found.params, found.config, about, config, setup, session.identity)
    reference = found.params if state.reference is not None else None
    return state._replace(params=found.params, reference=jax.tree.map(jnp.copy, reference))


def announcement(session: Session, workdir: pathlib.Path, start: int, num_updates: int) -> list[str]:
    """What the run will do, how long it will take and where things go."""
    if start >= num_updates:
        return [f"all {num_updates} updates of {workdir} are done"]
    config, setup, cfg = session.config, session.setup, session.config.grpo
    blocks, episode = session.split("train"), setup.episode
    mesh, chunk = session.mesh, config.mesh.chunk
    where = f"{hosts.summary()}; mesh: data {mesh.shape[DATA]} x model {mesh.shape[MODEL]}"
    busy = -(-cfg.batch_size // chunk)
    if busy < mesh.shape[DATA]:
        where += (
            f", of which {busy} have work: a batch is {busy} chunks of {chunk} blocks (config.mesh.chunk)"
        )
    levels = ", ".join(f"{len(axis.levels)} of {axis.name}" for axis in setup.space.axes)
    does = "plays" if setup.learner == "counterfactual" else "compares"
    lines = [
        where,
        f"training a policy over {setup.space.num_actions} actions (levels: {levels}) for "
        f"{config.model.path}, {config.model.dtype}, on {len(blocks)} blocks of {config.data.source}",
        f"an update {does} {cfg.num_schedules} schedules of {episode.horizon} steps in each of "
        f"{cfg.batch_size * episode.episodes_per_prefix} episodes after {episode.prefix_len} tokens",
    ]
    seconds = estimated_seconds(config, setup, num_updates - start)
    resumed = f"goes on after update {start}; " if start else ""
    tested = f", then {clock(seconds['evaluation'])} of evaluation" if config.eval.num_test_blocks else ""
    lines += [
        f"{resumed}{num_updates - start} updates take about {clock(seconds['training'])} here{tested}, "
        "at half the rate of a large matrix product; compilation comes first",
        f"checkpoints, metrics.jsonl and results.csv go to {workdir}; "
        "stop it at any time, the same command goes on",
    ]
    return lines


def in_words(scalars: Mapping[str, float], validated: bool = False) -> str:
    """The handful of numbers to watch; all of them are in metrics.jsonl."""
    if validated:
        missed = [value for name, value in scalars.items() if name.startswith("eval/budget_gap/")]
        gain = scalars.get("eval/gain_over_fixed")
        over = f"{gain:+.3f} nats a token over the fixed schedule of its cost, " if gain is not None else ""
        return f"on held-out text {over}budgets missed by {max(missed):.3f} at most"
    if "policy/predicted" in scalars:
        lost, predicted = scalars["policy/lost"], scalars["policy/predicted"]
        return f"{lost:.3f} nats a token lost at random levels, {predicted:.3f} predicted"
    missed = [value for name, value in scalars.items() if name.startswith("budget_gap/")]
    told = f"reward {scalars['reward']:.3f} a token, budgets missed by {max(missed):.2f}"
    return f"{told}, entropy {scalars['policy/entropy']:.2f} nats"


class Rates:
    """Speed of the updates since the last log, also as a share of the machine's measured matmul rate."""

    def __init__(self, session: Session, batch_size: int):
        shape, K = session.setup.episode, session.setup.grpo.num_schedules
        self._tokens = batch_size * shape.episodes_per_prefix * K * shape.horizon
        self._flops = sum(update_flops(session.setup, batch_size).values())
        self._peak = matmul_rate(session.setup.model.dtype)
        self._last: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Counts from here: what came since the last log was no update."""
        self._last = (step, time.monotonic())

    def since_last(self, step: int) -> dict[str, float]:
        """Empty at the first call: the first update compiles."""
        last = self._last
        self.restart(step)
        if last is None:
            return {}
        seconds = (time.monotonic() - last[1]) / (step - last[0])
        return {
            "speed/seconds_per_update": seconds,
            "speed/schedule_tokens_per_second": self._tokens / seconds,
            "speed/share_of_matmul_rate": self._flops / seconds / self._peak,
        }


def validate(session: Session, state: TrainState) -> dict[str, float]:
    """The policy against the schedules on a few blocks of validation text."""
    cfg = session.config.eval
    batches = list(evaluation_batches(session.split("validation"), cfg.batch_size, cfg.num_blocks))
    asked = session.config.requested(session.setup.space)
    rows = compare_quietly(
        session.weights, state.params, batches, asked, cfg.num_random, session.setup, session.config.seed
    )
    return summary(rows, session.setup)


def require_finite(scalars: Mapping[str, float], step: int, checkpoints: Checkpoints) -> None:
    """Raises `UserError`, naming the last good checkpoint, if a metric of this update is NaN or infinite."""
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    if not bad:
        return
    checkpoints.wait()  # for the one that is still being written: it is good
    good = checkpoints.latest_step()
    kept = "no checkpoint was written yet" if good is None else f"the last good checkpoint is {good}"
    raise AgreedError(f"update {step} gave a NaN or Inf in {', '.join(bad)}; {kept}")
