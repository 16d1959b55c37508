"""How libtpu, which has a TPU's driver and compiler, is started."""

import importlib.metadata
import os

# On TPU7x the compiler wants bfloat16 weights that a loop reads in tiles of 16 rows, and JAX keeps them in
# tiles of 8, as on all other chips: without this a decode step holds all of its model's layers twice.
LAYERS_ONCE = "--xla_tpu_control_large_2nd_minor_layout_for_x16=0"
TRIED = "0.0.42"  # any other libtpu may not know the flag, and one that it does not know ends it


def set_flags() -> None:
    """Adds to LIBTPU_INIT_ARGS what programs need here; before JAX looks for devices, or it has no effect.

    Does nothing without libtpu, with another one than was tried, or where the flag is given already.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return
    name = LAYERS_ONCE.partition("=")[0]
    if f"{version}.".startswith(f"{TRIED}.") and name not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {LAYERS_ONCE}".strip()
