"""Kinds of files that readers get: how a good one is made, and what reads it."""

import contextlib
import csv
import gzip
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
import tiny


class Subject(NamedTuple):
    """A kind of file: how a good one is made in a folder, and what reads it."""

    file: str  # in the folder
    make: Callable[[pathlib.Path], Any]
    read: Callable[[pathlib.Path], Any]


def make_model(folder: pathlib.Path) -> None:
    tiny.save_model(folder / "model")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [256]}))
    fields = {"eos_token": tiny.END, "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    fields |= {"added_tokens_decoder": {"257": {"content": "<pad>", "special": True, "lstrip": False}}}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(fields))


def make_shards(folder: pathlib.Path) -> None:
    make_model(folder)
    names = dict.fromkeys(tiny.tensors(tiny.MODEL), "shard.safetensors")
    (folder / "model" / "model.safetensors").rename(folder / "model" / "shard.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def make_gguf(folder: pathlib.Path) -> None:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "ab", "12", "yz"]
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    sizes = {"block_count": 1, "context_length": 32, "embedding_length": 8, "feed_forward_length": 32}
    for name, value in {**sizes, "attention.head_count": 2, "attention.head_count_kv": 1}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    shapes = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_norm": (8,), "ffn_gate": (32, 8), "ffn_up": (32, 8), "ffn_down": (8, 32)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {**tensors, "token_embd.weight": (260, 8), "output_norm.weight": (8,)}.items():
        writer.add_tensor(name, np.full(shape, 0.25, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_lines(folder: pathlib.Path) -> None:
    tiny.save_corpus(folder / "text.jsonl", documents=5, words=8)


def make_gzip(folder: pathlib.Path) -> None:
    (folder / "text.txt.gz").write_bytes(gzip.compress(b" = One = \nmany words\n = Two = \n" * 20))


def make_results(folder: pathlib.Path) -> None:
    names = [*IDENTITY, "controller", "nats", "updates", "blocks", "draw", "requested_kappa", "held", "along"]
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows([dict.fromkeys(names, "1") | {"controller": name} for name in ("policy", "fixed")])


IDENTITY = (
    "config", "text", "prefix", "protect", "restate", "one_budget", "stale_prefill", "weights", "tokenizer",
    "text_digest",
)  # fmt: skip


def make_policy(folder: pathlib.Path) -> None:
    import jax.numpy as jnp

    from sol_jax.runs.config import RunConfig
    from sol_jax.runs.policy_files import save_policy

    about = {
        "title": "a",
        "model": "b",
        "command": "c",
        "updates": 3,
        "seed": 0,
        "commit": "",
        "documents": ["d"],
    }
    save_policy(folder / "policy", {"params": {"a": jnp.ones((3, 2))}}, RunConfig(), about)


def make_tasks(folder: pathlib.Path) -> None:
    (folder / "arc_easy").mkdir()
    item = {"id": "1", "question": "What?", "choices": ["a", "b"], "answer": 1}
    lines = [json.dumps(item | {"id": str(n)}) for n in range(3)]
    (folder / "arc_easy" / "test.jsonl").write_text("\n".join(lines) + "\n")


def make_records(folder: pathlib.Path) -> None:
    from experiments.tasks.item_records import ItemRecord, append_records

    record = ItemRecord("1", True, False, (1.0, 2.0), 3, 0, (1.0,), 2, (1.0, 2.0), (3.0, 4.0))
    append_records(folder / "items.jsonl", [record, record])


def make_metrics(folder: pathlib.Path) -> None:
    lines = [json.dumps({"step": n, "time": 1.0, "reward": 0.5}) for n in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def make_run(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny.config_for(folder).flat()))


def make_prices(folder: pathlib.Path) -> None:
    from pallas_kernels.cost_model import CostModel

    CostModel("cpu", 1e-9, 1e-12, 1e-6, 3.0).save(folder / "prices.json")


def make_scores(folder: pathlib.Path) -> None:
    from sol_jax.evaluation.score_cache import ScoreCache
    from sol_jax.evaluation.scoring import EntryScores

    cache = ScoreCache(folder / "x.scores", {"blocks": ["a"]}, {"model": "m"})
    cache.keep_blocks(np.zeros((1, 4), np.int32), np.zeros(1, np.int32))
    cache.describe("fixed", {"controller": "fixed", "held": "", "requested": [[0.5]]})
    part = np.zeros((1, 1, 1, 4), np.float32)
    cache.write("fixed", "batch-0000-entry-00000", EntryScores(part, part[..., :0], part.astype(np.int32)))
    assert cache.folder is not None
    shutil.move(cache.folder, folder / "scores")


def make_digests(folder: pathlib.Path) -> None:
    from sol_jax import digests

    make_lines(folder)
    digests.CACHE_DIR = str(folder)
    digests.file_digest(folder / "text.jsonl")


def read_tokenizer(folder: pathlib.Path) -> None:
    from sol_jax.models import chat_template
    from sol_jax.models.tokenizer import check_vocabulary, load_tokenizer
    from sol_jax.models.weights import load_config

    chat_template.SECONDS = 3.0
    tokenizer = load_tokenizer(folder / "model")
    check_vocabulary(tokenizer, load_config(folder / "model"))
    assert tokenizer.decode(tokenizer.encode("a bé <|end|>🙂", add_special_tokens=True)) is not None
    tokenizer.fingerprint.encode()
    if tokenizer.chat_template:
        chat_template.chat_prompt(tokenizer, "How?", "Be brief.")


def read_model(path: pathlib.Path) -> None:
    from sol_jax.models.model import open_model

    assert open_model(str(path)).weights is not None


def read_results(folder: pathlib.Path) -> None:
    from sol_jax.evaluation import results_csv

    file = folder / "results.csv"
    with contextlib.suppress(results_csv.UserError):
        results_csv.check_same(file, dict.fromkeys(IDENTITY, "1"))
    results_csv.merge(file, results_csv.read(file)[:1])


def read_policy(folder: pathlib.Path) -> None:
    from sol_jax.runs.policy_files import load_policy

    _, config, about = load_policy(folder / "policy")
    assert config.flat()
    assert about["documents"] is not None


def read_tasks(folder: pathlib.Path) -> None:
    from experiments.tasks import prompts

    prompts._read(folder / "arc_easy" / "test.jsonl", prompts.TASKS["arc_easy"])


def read_records(folder: pathlib.Path) -> None:
    from experiments.tasks import item_records

    item_records.read(folder / "items.jsonl")


def read_text(name: str, start: str = "") -> Callable[[pathlib.Path], Any]:
    def read(folder: pathlib.Path) -> None:
        from sol_jax.text.documents import read_documents, source_fingerprint

        read_documents(str(folder / name), start)
        source_fingerprint(str(folder / name))

    return read


def read_metrics(folder: pathlib.Path) -> None:
    from sol_jax.runs.metrics import Writer

    with Writer(folder, 2) as writer:
        writer.scalars(3, {"reward": 1.0})


def read_run(folder: pathlib.Path) -> None:
    from sol_jax.runs.config import read_config

    read_config(folder).check_here()


def read_prices(folder: pathlib.Path) -> None:
    fields = {"axes.budget_unit": "time", "axes.prices": str(folder / "prices.json")}
    tiny.config_for(folder, **fields).check_here()


def read_scores(folder: pathlib.Path) -> None:
    from sol_jax.evaluation.score_cache import read_folder

    read_folder(folder / "scores")


def read_digests(folder: pathlib.Path) -> None:
    from sol_jax import digests

    digests.CACHE_DIR = str(folder)
    digests.file_digest(folder / "text.jsonl")


MODEL = {name: Subject(f"model/{name}", make_model, lambda f: read_model(f / "model")) for name in (
    "config.json", "model.safetensors",
)}  # fmt: skip
TOKENIZER = {name: Subject(f"model/{name}", make_model, read_tokenizer) for name in (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)}  # fmt: skip
SUBJECTS = {
    **MODEL,
    **TOKENIZER,
    "index": Subject("model/model.safetensors.index.json", make_shards, lambda f: read_model(f / "model")),
    "gguf": Subject("m.gguf", make_gguf, lambda f: read_model(f / "m.gguf")),
    "jsonl": Subject("text.jsonl", make_lines, read_text("text.jsonl")),
    "gz": Subject("text.txt.gz", make_gzip, read_text("text.txt.gz", "^ = ")),
    "results": Subject("results.csv", make_results, read_results),
    "policy config": Subject("policy/config.json", make_policy, read_policy),
    "policy weights": Subject("policy/policy.safetensors", make_policy, read_policy),
    "tasks": Subject("arc_easy/test.jsonl", make_tasks, read_tasks),
    "records": Subject("items.jsonl", make_records, read_records),
    "metrics": Subject("metrics.jsonl", make_metrics, read_metrics),
    "run config": Subject("config.json", make_run, read_run),
    "prices": Subject("prices.json", make_prices, read_prices),
    "scores about": Subject("scores/about.json", make_scores, read_scores),
    "scores entries": Subject("scores/fixed/entries.json", make_scores, read_scores),
    "scores blocks": Subject("scores/blocks.npz", make_scores, read_scores),
    "scores": Subject("scores/fixed/batch-0000-entry-00000.npz", make_scores, read_scores),
    "digests": Subject("digests.json", make_digests, read_digests),
}
