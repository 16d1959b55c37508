"""What both readers of model configurations share: fields taken one by one, and none left over.

A setting that a file carries and the model does not honour would change its outputs silently, so whatever
nobody took is refused by name.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from sol_jax.errors import UserError
from sol_jax.files import shown
from sol_jax.models.llama import LlamaConfig

_REQUIRED: Any = object()
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_KINDS = {
    int: "a positive integer",
    float: "a positive number that float32 holds",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}


class Fields:
    """The fields of one configuration, to be taken one by one; `close` refuses those left over."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where = where
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Value of `name`, positive if `kind` is int or float; an absent or null one gives `default`.

        Raises UserError if it is absent without a default, or of another kind.
        """
        value: Any = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where} has no field {name!r}")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if value < _MOST else float("inf")
        # A model computes in float32, in which 1e300 is an infinity and 1e-60 is nothing.
        low, high = (_LEAST, _MOST) if kind is float else (0, float("inf"))
        # `type` and not isinstance: true is no number of layers.
        positive = not isinstance(value, int | float) or (value > 0 and low <= value <= high)
        if type(value) is not kind or (kind in (int, float) and not positive):
            raise UserError(f"{self.where}: {name} is {shown(value)}, not {_KINDS[kind]}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Take a field that is honoured at some values only; absent or null counts as one of them."""
        value: Any = self._left.pop(name, None)
        if value is not None and not any(_equal(value, right) for right in allowed):
            names = " or ".join(map(repr, allowed))
            raise UserError(f"{self.where}: {name} is {shown(value)}, but only {names} is supported")

    def each(self, name: str, allowed: str) -> None:
        """Take a list, absent or null, of which every value must be one."""
        values = self.take(name, list, [])
        if any(value != allowed for value in values):
            raise UserError(f"{self.where}: {name} is {shown(values)}, but only {allowed!r} is supported")

    def close(self, harmless: Collection[str] = ()) -> None:
        """Refuse what is left, except `harmless` names and nulls, which say nothing."""
        left = sorted(
            name for name, value in self._left.items() if value is not None and name not in harmless
        )
        if left:
            raise UserError(f"{self.where}: unknown field {shown(left[0])}; this model would not honour it")


def _equal(value: Any, right: Any) -> bool:
    """Equality, but that neither true is 1 nor false 0."""
    return value == right and isinstance(value, bool) == isinstance(right, bool)


def head_size_of(where: str, hidden: int, heads: int) -> int:
    """The size of a head where a file does not say; `UserError` if heads do not divide the hidden size."""
    if hidden % heads:
        raise UserError(f"{where}: the hidden size {hidden} is not a multiple of {heads} heads")
    return hidden // heads


def checked(where: str, cfg: LlamaConfig) -> LlamaConfig:
    """`cfg`, or UserError if its sizes contradict each other."""
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {cfg.dtype!r}, but only 'float32' or 'bfloat16' is supported")
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(f"{where}: {cfg.num_heads} heads cannot share {cfg.num_kv_heads} key/value heads")
    if cfg.head_size % 2:
        raise UserError(f"{where}: the head size {cfg.head_size} is odd; rotary embeddings need pairs")
    return cfg
