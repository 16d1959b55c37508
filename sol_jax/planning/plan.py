"""Whether a run fits on machines that are not here, what its parts take, and what would make it fit."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from sol_jax.costs.update import matmul_rate
from sol_jax.errors import UserError
from sol_jax.models.llama import LlamaConfig
from sol_jax.planning.chips import GIB
from sol_jax.planning.compiled import Compiled
from sol_jax.planning.known_models import architecture
from sol_jax.planning.programs import compile_update
from sol_jax.planning.seconds import Seconds, row_traffic, seconds
from sol_jax.planning.sizes import Shares, Sizes, played_bytes, sizes
from sol_jax.planning.topology import Topology
from sol_jax.runs.config import RunConfig

# Of a device's memory, what a plan by arithmetic may fill: its temporaries are right to a third or so.
FILLED = 0.95
COPY_RATE = 5e9  # bytes a second that one core of a CPU copies: of the right size, no more


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one topology.  `compiled` are the two programs, where they were compiled."""

    topology: Topology
    config: RunConfig
    shares: Shares
    sizes: Sizes
    seconds: Seconds
    compiled: tuple[Compiled, Compiled] | None = None
    refused: str = ""  # the compiler's word, where it found that a program does not fit
    refused_bytes: float = 0.0  # what it would take, if the compiler says that

    @property
    def needs(self) -> float:
        return max(self.sizes.total, self.refused_bytes)

    @property
    def room(self) -> float:
        """Bytes that may be filled: all, if that was compiled."""
        return self.topology.chip.memory * (1.0 if self.compiled else FILLED)

    @property
    def fits(self) -> bool:
        return not self.refused and self.needs <= self.room

    @property
    def compile_seconds(self) -> float | None:
        return sum(program.seconds for program in self.compiled) if self.compiled else None

    @property
    def collectives(self) -> dict[str, tuple[int, float]]:
        """Of an update, by kind: how many, and bytes of their results on a device."""
        if self.compiled is None:
            return {}
        calls = self.shares.calls
        return {kind: (calls * n, calls * size) for kind, (n, size) in self.compiled[0].collectives.items()}


def shares_of(config: RunConfig, topology: Topology, model: LlamaConfig) -> Shares:
    """How a config shares an update out on a topology.  Raises `UserError` for a mesh that cannot be."""
    devices, m = topology.num_devices, config.mesh.model
    wrong = f"config.mesh.model is {m}; it must divide "
    if m > topology.devices_of_slice or topology.devices_of_slice % m:
        raise UserError(f"{wrong}the {topology.devices_of_slice} devices of a slice of {topology}")
    sizes = {"attention heads": model.num_heads, "key/value heads": model.num_kv_heads}
    sizes |= {"MLP channels": model.ffn_size, "tokens of the vocabulary": model.vocab_size}
    for name, size in sizes.items():
        if size % m:
            raise UserError(f"{wrong}the model's {size} {name}")
    rows = devices // m if config.mesh.data == -1 else config.mesh.data
    if rows * m > devices:
        raise UserError(
            f"config.mesh.data = {rows} and config.mesh.model = {m} need {rows * m} devices, and {topology} "
            f"has {devices}"
        )
    chunk = config.mesh.chunk or (config.grpo.batch_size if rows == 1 else 1)
    return Shares(config.setup(model), rows, m, chunk)


def make_plan(config: RunConfig, topology: Topology, compiling: bool = True) -> Plan:
    """The plan of a config.

    TPUs: both programs are compiled, unless not `compiling`; all else, and other devices, is arithmetic.
    Raises `UserError` for a mesh that cannot be, or without what compiles for TPUs.
    """
    chip = topology.chip
    if chip.kind == "cpu":
        rate = matmul_rate(config.model.dtype)
        chip = dataclasses.replace(chip, bfloat16=rate, float32=rate, bandwidth=COPY_RATE, links=COPY_RATE)
        topology = dataclasses.replace(topology, chip=chip)
    shares = shares_of(config, topology, architecture(config.model.path, config.model.dtype))
    found, compiled = sizes(shares, chip.kind), None
    refused, refused_bytes = "", 0.0
    if compiling and chip.kind == "tpu":
        try:
            compiled = compile_update(topology, shares)
        except jax.errors.JaxRuntimeError as error:
            refused, refused_bytes = _out_of_memory(error)
        else:
            found = measured(found, shares, *compiled)
    traffic = row_traffic(shares)
    if compiled and shares.model > 1:
        traffic = sent(compiled[0], shares)
    times = seconds(shares, chip, topology.slices, traffic, chip.kind)
    return Plan(topology, config, shares, found, times, compiled, refused, refused_bytes)


def measured(by_arithmetic: Sizes, shares: Shares, play: Compiled, learn: Compiled) -> Sizes:
    """The sizes with the compiler's temporaries; caches are among those that it counts."""
    return dataclasses.replace(
        by_arithmetic,
        play_temporaries=max(play.temporaries - by_arithmetic.caches, 0.0),
        # What was played lies there in parts, and put together.
        learn_temporaries=learn.temporaries + learn.outputs - learn.aliased + played_bytes(shares.setup),
    )


def sent(play: Compiled, shares: Shares) -> float:
    """Bytes that a device sends in an update; an all-reduce sends its array nearly twice."""
    once = (shares.model - 1) / shares.model
    return shares.calls * sum(
        size * once * (2 if kind == "all-reduce" else 1) for kind, (_, size) in play.collectives.items()
    )


def _out_of_memory(error: Exception) -> tuple[str, float]:
    """What the compiler says of memory, and the bytes if it says them; any other error is raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    used = re.search(r"Used (([\d.]+)([KMG])) of ([\d.]+[KMG])", text)
    used = used or re.search(r"\((([\d.]+)([KMG]))\) exceeds available \w+ \(([\d.]+[KMG])\)", text)
    if used is None:
        return "the compiler ran out of memory", 0.0
    size = float(used[2]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[3]]
    return f"the compiler needs {used[1]} of {used[4]}", size


# --- what would make it fit ---------------------------------------------------------------------


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """Changes with which the run fits by arithmetic, those that cost least first; each with its flags.

    Where programs were compiled, the compiler's word about the plan corrects the arithmetic: what it found
    above the estimate is taken to be above it again.
    """
    estimate = sizes(plan.shares, plan.topology.chip.kind)
    excess = max(plan.needs - estimate.total, 0.0)
    found = []
    for flags in changes(plan):
        try:
            config = plan.config.with_fields(flags)
            other = make_plan(config, plan.topology, compiling=False)
        except UserError:  # a mesh that divides neither
            continue
        # What the estimate misses is among the temporaries, and grows with them.
        grown = other.sizes.play_temporaries / max(estimate.play_temporaries, 1.0)
        if other.needs + excess * min(grown, 1.0) <= other.room:
            named = " ".join(f"--config.{name}={value}" for name, value in flags.items())
            found.append((named, other))
    return found


def changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes of a config that take memory off a device, the cheapest first.

    What runs at once changes speed alone; more devices in a row add traffic; bfloat16 rounds otherwise.
    """
    config, shares = plan.config, plan.shares
    smaller: dict[str, Any] = {}
    if config.memory.prefill_batch > 1:
        smaller["memory.prefill_batch"] = 1
        yield dict(smaller)
    if shares.chunk > 1:
        smaller["mesh.chunk"] = 1
        yield dict(smaller)
    if config.memory.head_rows > 32:
        smaller["memory.head_rows"] = 32
        yield dict(smaller)
    # The other axis follows: with -1 rows are what devices are left for.
    models = [m for m in (2, 4, 8, 16) if m > shares.model]
    for m in models:
        yield {"mesh.model": m, "mesh.data": -1}
        if smaller:
            yield {"mesh.model": m, "mesh.data": -1, **smaller}
    if config.model.dtype != "bfloat16":
        yield {"model.dtype": "bfloat16"}
        for m in (shares.model, *models):
            yield {"model.dtype": "bfloat16", "mesh.model": m, "mesh.data": -1, **smaller}


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
