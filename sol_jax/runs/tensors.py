"""Arrays and what is said about them as the bytes of a safetensors file, for files that are not here."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save

from sol_jax.files import parse_json

# The library's own reader for NumPy has no bfloat16.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64",
}  # fmt: skip


def pack(arrays: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file with `arrays` by name, and with `about` in its head."""
    # The library takes the memory as it lies.
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    return save(contiguous, dict(about or {}))


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What `pack` was given; raises an exception of any kind if the bytes are damaged."""
    arrays = {
        name: np.frombuffer(tensor["data"], jnp.dtype(_DTYPES[tensor["dtype"]])).reshape(tensor["shape"])
        for name, tensor in deserialize(content)
    }
    length = int.from_bytes(content[:8], "little")
    return arrays, parse_json(content[8 : 8 + length]).get("__metadata__", {})
