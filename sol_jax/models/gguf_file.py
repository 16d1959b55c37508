"""GGUF files: metadata by key, and tensors that stay on disk until they are read.

Nothing that the file says is believed before it is compared with the file's size, so that a damaged one costs
neither memory nor time.  Quantised values are opened by the package `gguf`.

Source: GGUF's format description (version 2 and 3, little-endian).
"""

import functools
import importlib.metadata
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sol_jax.errors import UserError

_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}  # by type, as `struct` has them
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS, _DEEPEST = 4, 4


class GgufTensor(NamedTuple):
    """One tensor: its shape as numpy has it, its number format by GGUF's number, and its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: np.ndarray  # of bytes, mapped from the file

    def read(self) -> np.ndarray:
        """The values as float32.  Raises `UserError` for a format that cannot be opened."""
        import gguf

        kind = gguf.GGMLQuantizationType(self.kind)
        try:
            # A plain view: de-quantising slices a lot, which memmaps make slow.
            return gguf.dequantize(np.asarray(self.data), kind).reshape(self.shape)
        except NotImplementedError:  # by gguf, for formats that it knows by name alone
            raise UserError(f"tensor {self.name} is {kind.name}, which cannot be de-quantised") from None


class GgufFile(NamedTuple):
    """What a GGUF file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file.  Raises `UserError` if it is unreadable, damaged or of an unknown kind."""
    try:
        stamp = path.stat()
    except OSError as fault:
        raise UserError(f"{path} is not readable: {fault.strerror}") from None
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


# Config, weights and tokenizer each come from the same file.
@functools.lru_cache(maxsize=1)
def _read(path: Path, mtime_ns: int, size: int) -> GgufFile:
    try:
        content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        return _Reader(content).whole()
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
    except (ValueError, OSError, struct.error, IndexError) as fault:
        reason = f"not a GGUF file, or truncated at {size} bytes: {fault}"
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from None


class _Reader:
    """Reads from front to back; ValueError and the like where the bytes end or make no sense."""

    def __init__(self, content: np.ndarray):
        self._content, self._at = content, 0

    def whole(self) -> GgufFile:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            order = ", or of another byte order" if version & 0xFFFF == 0 else ""
            raise UserError(f"GGUF version {version} is not supported{order}; versions 2 and 3 are")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name, kind = self._string(), self._scalar("I")
            if name in metadata:
                raise UserError(f"the metadata have the field {name} twice")
            metadata[name] = self._value(kind, _DEEPEST)
        described = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in described:
            if name in found:
                raise UserError(f"tensor {name} is there twice")
            found[name] = self._placed(name, shape, kind, start + offset)
        return GgufFile(metadata, found)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GgufTensor:
        import gguf

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            version = importlib.metadata.version("gguf")
            raise UserError(
                f"tensor {name} has the number format {kind}, which gguf {version} does not know; "
                "pip install --upgrade gguf, or take a file of another quantisation"
            ) from None
        if shape[-1] % block:
            raise UserError(f"tensor {name} has rows of {shape[-1]}, which blocks of {block} do not fill")
        row = shape[-1] // block * size
        self._at = begin
        data = self._take(math.prod(shape[:-1]) * row)
        return GgufTensor(name, shape, kind, data.reshape(*shape[:-1], row))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int, deepest: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in (_STRING, _ARRAY):
            if kind == _ARRAY and not deepest:
                raise ValueError("arrays are nested too deeply")
            self._check_room(8 * count)  # a length each, at least
            return [self._value(kind, deepest - 1) for _ in range(count)]
        numbers = np.dtype(self._format(kind)).newbyteorder("<")
        return self._take(numbers.itemsize * count).view(numbers).tolist()

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"there is no type {kind} of metadata")
        return _SCALARS[kind]

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))
        return value

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode()

    def _bytes(self, count: int) -> bytes:
        return self._take(count).tobytes()

    def _take(self, count: int) -> np.ndarray:
        self._check_room(count)
        self._at += count
        return self._content[self._at - count : self._at]

    def _check_room(self, count: int) -> None:
        if self._at + count > len(self._content):
            raise ValueError(f"{count} bytes from byte {self._at} on are not there")
