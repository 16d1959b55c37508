"""The time of an operation from what it reads, computes and launches, with rates fitted per device.

    seconds = bytes * seconds_per_byte + flops * seconds_per_flop + launches * seconds_per_launch

The terms add up: decode operations wait for memory, and a kernel that overlaps both shows up as a rate that
is a little better than the device's.  `fit` takes measured rows (`experiments.benchmarks.kernels` writes
them), and `save` and `load` keep the model of a device as JSON.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

# A rate that the measurements do not tell apart from infinity costs nothing, which JSON can hold.
TERMS = ("seconds_per_byte", "seconds_per_flop", "seconds_per_launch")


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Prices of one device; `launches_per_layer` is what a decoder layer of one decode step launches."""

    device: str
    seconds_per_byte: float
    seconds_per_flop: float
    seconds_per_launch: float
    launches_per_layer: float = 0.0

    def __post_init__(self):
        for name in (*TERMS, "launches_per_layer"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"cost model: {name} is {getattr(self, name)}; it must be at least 0")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError("cost model: bytes, operations and launches all cost nothing")

    def seconds(self, bytes: float, flops: float = 0.0, launches: float = 0.0) -> float:
        """Predicts the time of an operation."""
        return (
            bytes * self.seconds_per_byte + flops * self.seconds_per_flop + launches * self.seconds_per_launch
        )

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def load(path: pathlib.Path) -> CostModel:
    """Reads the model that `save` wrote; raises ValueError, in one sentence, if the file is none."""
    try:
        return CostModel(**json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); "
            "python -m experiments.benchmarks.roofline writes cost models"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:  # the latter two of numbers and nesting, too
        raise ValueError(f"{path}: not a cost model ({error})") from None


def fit(
    device: str,
    bytes_N: Sequence[float],
    flops_N: Sequence[float],
    launches_N: Sequence[float],
    seconds_N: Sequence[float],
    launches_per_layer: float = 0.0,
) -> CostModel:
    """Fits prices by least squares of the *relative* errors of N measurements, with no negative price.

    Errors are relative because the measurements span microseconds to seconds.  The best non-negative solution
    is the unconstrained one of some subset of the three terms, so all seven are tried.
    """
    work_Nx3 = np.array([bytes_N, flops_N, launches_N], np.float64).T
    seconds = np.asarray(seconds_N, np.float64)
    if len(seconds) == 0 or not (seconds > 0).all():
        raise ValueError("cost model: it takes at least one measurement, and all must be above 0 seconds")
    relative_Nx3 = work_Nx3 / seconds[:, None]
    used = [term for term in range(3) if relative_Nx3[:, term].any()]
    # Columns of like size: bytes per second and launches per second are ten orders of magnitude apart.
    scale_3 = np.where(relative_Nx3.any(0), np.abs(relative_Nx3).max(0), 1.0)
    best, least = np.zeros(3), float("inf")
    for count in range(1, len(used) + 1):
        for terms in itertools.combinations(used, count):
            columns = relative_Nx3[:, terms] / scale_3[list(terms)]
            price, *_ = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)
            miss = float(np.sum((columns @ price - 1) ** 2))
            if (price >= 0).all() and miss < least:
                best, least = np.zeros(3), miss
                best[list(terms)] = price
    per_byte, per_flop, per_launch = (float(price) for price in best / scale_3)
    return CostModel(device, per_byte, per_flop, per_launch, launches_per_layer)
