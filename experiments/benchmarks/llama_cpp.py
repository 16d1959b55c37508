"""Dense decoding beside llama.cpp's, on the same cores with the same weights: what a user would pick.

    npm install --prefix build/llama node-llama-cpp && pip install gguf
    python -m experiments.benchmarks.llama_cpp --modules build/llama/node_modules

Ours and llama.cpp's (the binaries of node-llama-cpp, flash attention, two threads) write 16 tokens in turns
after the same context, at batch 1.  llama.cpp has the embedded model's weights as they are in its file, of 4
bits (q4_1), and as we have them, in float32 and bfloat16.  Ours goes on with given text, as `clock` does,
and llama.cpp with its likeliest token.  Ratios are medians over turns, of ours over
llama.cpp's tokens a second in the same turn.
"""

import argparse
import csv
import json
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import RESULTS
from experiments.benchmarks import clock
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.models import llama
from sol_jax.models.model import Model, open_model
from sol_jax.models.weights import EMBEDDED, resolve

SERVER = pathlib.Path(__file__).with_suffix(".mjs")
# Of llama.cpp's file, the type of our weights that it is the same as, if any.
TYPES = {"f32": "float32", "bf16": "bfloat16", "q4_1": None}


def write_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The embedded model as GGUF files of each type; those that are there already are taken as they are."""
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf writes llama.cpp's files: pip install gguf") from None
    source = resolve(EMBEDDED)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"q4_1": source}
    for name, kind, number in (
        ("f32", gguf.GGMLQuantizationType.F32, 0),
        ("bf16", gguf.GGMLQuantizationType.BF16, 32),
    ):
        files[name] = folder / f"{name}.gguf"
        if not files[name].exists():
            _convert(gguf, source, files[name], kind, number)
    return {name: files[name] for name in TYPES}


def _convert(gguf: Any, source: Any, path: pathlib.Path, kind: Any, number: int) -> None:
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.quantization_version"):
            continue
        value = number if name == "general.file_type" else field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if wide.ndim == 1:  # gains of norms stay float32 in every such file
            writer.add_tensor(tensor.name, wide)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)


class Server:
    """llama.cpp with a text in its cache, in a process of its own."""

    def __init__(self, modules: pathlib.Path, file: pathlib.Path, ids: Sequence[int]):
        command = ["node", str(SERVER), str(modules), str(file), str(len(ids))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(list(ids))

    def _ask(self, what: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise UserError(f"llama.cpp ended with {self._process.wait()}; see above")
        return answer

    def seconds(self, tokens: int) -> float:
        return float(self._ask(tokens)) / 1e3

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def ours(model: Model, ids: np.ndarray, context: int) -> Callable[[], clock.Text]:
    """Makes the dense text of `clock` after `context` of the tokens, as often as it is called."""
    given = argparse.Namespace(kernels="auto", rule="kept", refreshes=[], fixed=None, policies=[], budgets=[])
    dense = next(clock.players(model, given))
    _, cache = jax.jit(llama.prefill, static_argnums=2)(model.weights, ids[:context], model.config)
    room = ((0, 0), (0, 0), (0, -(-len(ids) // 64) * 64 - context), (0, 0))
    cache = llama.KVCache(*(jnp.pad(part, room) for part in cache))
    return lambda: clock.Text(dense, model.weights, cache, ids, context)


def measure(args: argparse.Namespace, files: dict[str, pathlib.Path], context: int) -> list[dict[str, Any]]:
    """A row per file, of `args.turns` turns; the types of a context take turns, too."""
    models = {dtype: open_model(EMBEDDED, dtype) for dtype in filter(None, TYPES.values())}
    ids = next(clock.articles(next(iter(models.values())), context + (args.turns + 1) * clock.HORIZON + 1, 1))
    makers = {dtype: ours(model, ids, context) for dtype, model in models.items()}
    rows = []
    for name, file in files.items():
        texts = {dtype: make() for dtype, make in makers.items()}
        taken: dict[str, list[float]] = {"llama.cpp": [], **{dtype: [] for dtype in texts}}
        with Server(args.modules, file, ids[:context].tolist()) as server:
            for text in texts.values():
                text.play()  # compiles, and warms
            for _ in range(args.turns):
                taken["llama.cpp"].append(server.seconds(clock.HORIZON))
                for dtype, text in texts.items():
                    taken[dtype].append(text.play()[0])
        rates = {who: clock.HORIZON / np.array(seconds) for who, seconds in taken.items()}
        row: dict[str, Any] = {"context": context, "llama.cpp": name}
        row["tokens_per_second"] = float(np.median(rates["llama.cpp"]))
        for dtype in texts:
            row[dtype] = float(np.median(rates[dtype]))
            row[f"{dtype}_over"] = float(np.median(rates[dtype] / rates["llama.cpp"]))
        rows.append(row)
    return rows


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--modules", type=pathlib.Path, required=True, help="the node_modules of npm")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("build/llama"), help="of GGUF files"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 7680])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--csv", type=pathlib.Path, default=RESULTS / "llama_cpp_cpu.csv")
    return parser.parse_args(argv)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if not (args.modules / "node-llama-cpp").is_dir():
        raise UserError(
            f"--modules: {args.modules} has no node-llama-cpp; npm install node-llama-cpp brings it"
        )
    if shutil.which("node") is None:
        raise UserError("node is not on the PATH, and runs llama.cpp's binaries")
    files, rows = write_files(args.folder), []
    for context in args.contexts:
        for row in measure(args, files, context):
            rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
            print("  ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
