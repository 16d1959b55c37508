"""The least that an update takes: operations and bytes over the chip's published peak rates.

Nothing reaches those rates.  Each stage waits for its products or for its memory, whichever takes longer, and
then for what passes between devices: nothing is taken to overlap, nothing to be late.
"""

import dataclasses

from sol_jax.costs.decode_step import dense_step
from sol_jax.costs.update import update_flops
from sol_jax.planning.chips import Chip
from sol_jax.planning.sizes import Shares, prefilled_tokens, rows_of_chunk, sizes


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one update, by stage."""

    prefill: float
    rollout: float
    head: float
    learn: float
    links: float  # within a row of the mesh (`model`)
    network: float  # what was played, to the first device of every process

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def seconds(shares: Shares, chip: Chip, slices: int, link_bytes: float, platform: str) -> Seconds:
    """The least seconds of an update.

    Args:
      link_bytes: that a device sends within its row of the mesh, all collectives of an update together.
    """
    setup, m = shares.setup, shares.model
    cfg, memory = setup.model, setup.memory
    rate, bandwidth = chip.rate(cfg.dtype), chip.bandwidth
    # What a row plays, copies that fill up a call included.
    flops = update_flops(setup, shares.calls * shares.chunk)
    step = dense_step(prefilled_tokens(setup), cfg)
    layers = (step.attention.bytes + step.gate_up.bytes + step.down.bytes) / m
    prefills = shares.calls * -(-shares.chunk // min(memory.prefill_batch, shares.chunk))
    steps = shares.calls * setup.episode.horizon
    heads = shares.calls * -(-rows_of_chunk(shares) * setup.episode.horizon // memory.head_rows)
    whole = update_flops(setup, setup.grpo.batch_size)["policy"]
    played = sizes(shares, platform).played

    def longer(operations: float, read: float) -> float:
        return max(operations / rate, read / bandwidth)

    # Of a step of the policy's four parts one is taken while playing (`update_flops`).
    return Seconds(
        prefill=longer(flops["prefill"] / m, prefills * layers),
        rollout=longer(
            flops["rollout"] / m + flops["policy"] / 4,
            steps * (layers + shares.chunk * step.cache.bytes / m),
        ),
        head=longer(flops["head"] / m, heads * step.head.bytes / m),
        learn=max(whole * 0.75 / chip.float32, 3 * played / bandwidth),
        links=link_bytes / chip.links,
        network=_network_seconds(played, shares, chip, slices),
    )


def _network_seconds(played: float, shares: Shares, chip: Chip, slices: int) -> float:
    """Every device receives what the rows beside it played, from other slices over the network."""
    if shares.rows == 1:
        return 0.0
    away = played * (1 - 1 / slices)
    return away / chip.network + (played - away) / chip.links


def row_traffic(shares: Shares) -> float:
    """Bytes that a device sends within its row: an all-reduce after attention and one after the MLP."""
    setup, m = shares.setup, shares.model
    if m == 1:
        return 0.0
    cfg = setup.model
    tokens = shares.calls * shares.chunk * prefilled_tokens(setup)
    tokens += shares.calls * rows_of_chunk(shares) * setup.episode.horizon
    return 2 * (m - 1) / m * tokens * cfg.num_layers * 2 * cfg.hidden_size * 4.0
