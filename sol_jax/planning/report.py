"""A plan as text, and as a row of a table."""

from typing import Any

from sol_jax.planning.chips import GIB
from sol_jax.planning.plan import FILLED, Plan, gib, remedies

# Of the table that experiments write.
COLUMNS = (
    "config", "topology", "mesh", "chunk", "dtype", "weights_gib", "caches_gib", "played_gib", "state_gib",
    "play_temporaries_gib", "learn_temporaries_gib", "needs_gib", "has_gib", "fits", "compiled",
    "collectives", "collective_gib", "compile_seconds", "least_seconds", "learn_seconds",
    "network_seconds", "would_fit",
)  # fmt: skip


def mesh_of(plan: Plan) -> str:
    return f"{plan.shares.rows}x{plan.shares.model}"


def row(name: str, plan: Plan) -> dict[str, Any]:
    """One row of the table; `name` is the config's."""
    found, times = plan.sizes, plan.seconds
    changed = [] if plan.fits else remedies(plan)
    values: dict[str, Any] = {
        "config": name,
        "topology": str(plan.topology),
        "mesh": mesh_of(plan),
        "chunk": plan.shares.chunk,
        "dtype": plan.config.model.dtype,
        "fits": "yes" if plan.fits else "no",
        "compiled": "yes" if plan.compiled else "refused" if plan.refused else "no",
        "collectives": sum(count for count, _ in plan.collectives.values()) if plan.compiled else "",
        "compile_seconds": f"{plan.compile_seconds:.0f}" if plan.compile_seconds is not None else "",
        "least_seconds": f"{times.total:.3g}",
        "learn_seconds": f"{times.learn:.3g}",
        "network_seconds": f"{times.network:.3g}",
        "would_fit": changed[0][0] if changed else "",
    }
    sizes = {
        "weights": found.weights,
        "caches": found.caches,
        "played": found.played,
        "state": found.state,
        "play_temporaries": found.play_temporaries,
        "learn_temporaries": found.learn_temporaries,
        "needs": plan.needs,
        "has": plan.topology.chip.memory,
    }
    values |= {f"{part}_gib": gib(size) for part, size in sizes.items()}
    values["collective_gib"] = (
        gib(sum(size for _, size in plan.collectives.values())) if plan.compiled else ""
    )
    return values


def text(plan: Plan) -> str:
    """What the program prints."""
    shares, times, chip = plan.shares, plan.seconds, plan.topology.chip
    batch = shares.setup.grpo.batch_size
    lines = [
        f"{plan.config.model.path} in {plan.config.model.dtype} on {plan.topology}: "
        f"{plan.topology.num_devices} devices, mesh data {shares.rows} x model {shares.model}, "
        f"{batch} blocks an update, {shares.chunk} at a time in a row",
        "",
        f"GiB on the fullest device, {_source(plan)}:",
        *(f"  {name:<42}{gib(size):>9}" for name, size in _parts(plan)),
        f"  {'at once, at most':<42}{gib(plan.needs):>9}  of {gib(chip.memory)}: {_verdict(plan)}",
        "",
        f"Least seconds of an update, at the published peak rates ({chip.source}):",
        f"  prefill {times.prefill:.3g}, decode steps {times.rollout:.3g}, logits {times.head:.3g}, "
        f"learning (one device) {times.learn:.3g}, links within a row {times.links:.3g}, "
        f"what was played to all {times.network:.3g}: {times.total:.3g}",
    ]
    if plan.compiled:
        lines += ["", f"Compiled in {plan.compile_seconds:.0f} s. {_traffic(plan)}"]
    if shares.busy_rows < shares.rows:
        idle = shares.rows - shares.busy_rows
        lines += [
            "",
            f"{idle} of {shares.rows} rows play copies: {batch} blocks fill {shares.busy_rows}; "
            f"--config.grpo.batch_size={shares.rows * shares.chunk} would fill all, and is another run; "
            "a larger config.mesh.model shares a block among devices.",
        ]
    if not plan.fits:
        lines += ["", *_what_would_fit(plan)]
    return "\n".join(lines)


def _source(plan: Plan) -> str:
    if plan.compiled:
        return "temporaries as compiled"
    return "by arithmetic" + (f"; {plan.refused}" if plan.refused else "")


def _parts(plan: Plan) -> list[tuple[str, float]]:
    found = plan.sizes
    return [
        ("weights", found.weights),
        ("caches of the blocks played at a time", found.caches),
        ("what was played (experience of the batch)", found.played),
        ("policy, optimizer, tokens", found.state),
        ("temporaries while playing", found.play_temporaries),
        ("temporaries while learning", found.learn_temporaries),
    ]


def _verdict(plan: Plan) -> str:
    if not plan.fits and not plan.refused and plan.needs <= plan.topology.chip.memory:
        return f"too near for arithmetic, which leaves {1 - FILLED:.0%}; it may not fit"
    return "it fits" if plan.fits else "it does not fit"


def _traffic(plan: Plan) -> str:
    if not plan.collectives:
        return "Nothing passes between devices while blocks are played."
    said = ", ".join(
        f"{count} {kind} ({size / GIB:.3g} GiB)" for kind, (count, size) in plan.collectives.items()
    )
    return f"Between the devices of a row, in an update: {said}."


def _what_would_fit(plan: Plan) -> list[str]:
    found = remedies(plan)
    if not found:
        return [
            "Nothing that this program tries makes it fit: take more or larger devices, or a shorter prefix."
        ]
    lines = ["It would fit, by arithmetic, with any of these (the least change first):"]
    for flags, other in found[:4]:
        needs, took = gib(other.needs), f"{other.seconds.total:.3g}"
        lines.append(f"  {flags}: {needs} GiB, at least {took} s, mesh {mesh_of(other)}")
    return lines
