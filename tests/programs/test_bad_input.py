"""What a user can get wrong: each mistake is one sentence that names it, before anything heavy starts."""

import errno
import functools
import gzip
import json
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
import tiny
from in_process import run_program

from sol_jax import digests, hosts
from sol_jax.errors import UserError
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.report import evaluate_policy
from sol_jax.evaluation.score_cache import read_folder
from sol_jax.files import is_remote, local_path
from sol_jax.generation.options import GenerateOptions
from sol_jax.models.model import open_model
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_config
from sol_jax.runs.config import RunConfig, read_config
from sol_jax.runs.policy_files import load_policy
from sol_jax.runs.session import open_session
from sol_jax.text.documents import read_documents
from sol_jax.training.from_config import train_policy
from sol_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
NAN, INF = float("nan"), float("inf")


def told(mistake: pytest.ExceptionInfo) -> str:
    """The message, which must be one line of readable length."""
    message = str(mistake.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# --- values, in the process ------------------------------------------------------------------------

IMPOSSIBLE = {
    "seed": (-1, 2**32, 10**400),
    "model.dtype": ("float16", ""),
    "data.validation_fraction": (-0.1, 1.5, NAN),
    "data.test_fraction": (-0.1, 1.5, NAN),
    "episode.prefix_len": (0, -5),
    "episode.horizon": (0,),
    "episode.episodes_per_prefix": (0,),
    "episode.jitter": (-1,),
    "episode.sinks": (-1,),
    "episode.window": (-1,),
    "axes.kappa.rule": ("oracle", ""),
    "axes.kappa.heads": ("all", ""),
    "axes.kappa.page_size": (0, -8),
    "axes.kappa.dense_layers": (-1,),
    "axes.kappa.least_pages": (0,),
    "axes.kappa.penalty": (-1.0, NAN, INF),
    "axes.rho.penalty": (-1.0, NAN),
    "axes.eta.penalty": (-1.0, NAN),
    "axes.kappa.levels": ((), (0.0, 1.0), (0.5, 1.5), (1.0, 0.1), (0.5, 0.5), (-0.1, 1.0), (NAN,), ("a",)),
    "axes.rho.levels": ((), (0.0, 1.0), (0.4, 1.2), (1.0, 0.4), (NAN,), (0.4, "b")),
    "axes.eta.levels": ((), (1, 16), (5, 17), (16, 5), (4.5, 16), (NAN, 16), (2, INF)),
    "axes.kappa.budget": ((0.05, 1.0), (0.1, 1.1), (0.8, 0.3), (NAN, 1.0), (0.5,), (), (0.1, 0.5, 1.0)),
    "axes.rho.budget": ((0.3, 1.0), (0.9, 0.5), (0.5, NAN)),
    "axes.eta.budget": ((0.1, 1.0), (5.0, 16.0)),
    "axes.kappa.budget_choices": ((0.05,), (0.5, 2.0), (NAN,), ("a",)),
    "axes.rho.budget_choices": ((0.1,),),
    "axes.eta.budget_choices": ((8.0,),),
    "policy.d_model": (0, 33),
    "policy.num_heads": (0, 3),
    "policy.num_layers": (0,),
    "policy.restate_steps": (0, 2),
    "policy.one_budget": ("euro", "net"),  # the latter without predicted losses
    "policy.mlp_ratio": (0.0, -1.0, NAN, INF),
    "learner": ("ppo", "", "counterfactual"),  # the last without predicted losses
    "counterfactual.target": ("labels",),
    "counterfactual.floor": (0.0, -1.0, NAN),
    "counterfactual.count_after": (-1,),
    "counterfactual.price_memory": (0,),
    "kernels": ("fast", "triton"),  # the latter on a CPU
    "axes.budget_unit": ("euro",),
    "grpo.batch_size": (0,),
    "grpo.num_schedules": (1, 0, -2),
    "grpo.gamma": (-0.1, 1.1, NAN),
    "grpo.returns": ("mean",),
    "grpo.sampling": ("greedy",),
    "grpo.credit": ("token", "axis"),  # the latter where axes are not drawn independently
    "grpo.level": ("token",),
    "grpo.reward": ("accuracy",),
    "grpo.penalty_gradient": ("exact",),
    "grpo.max_price": (0.0, -1.0, NAN),
    "grpo.norm": ("none",),
    "grpo.temperature": (0.0, -1.0, NAN, INF),
    "grpo.clip": (0.0, NAN),
    "grpo.entropy_coef": (-0.1, NAN),
    "grpo.dead_zone": (-0.1, NAN),
    "grpo.quality_weight": (-0.1, NAN),
    "grpo.divergence_weight": (-0.1, 1.1, NAN),
    "grpo.reference_kl_coef": (-0.1, NAN),
    "optim.learning_rate": (0.0, -1e-4, NAN, INF),
    "optim.weight_decay": (-0.1, NAN),
    "optim.clip_norm": (0.0, NAN),
    "optim.warmup": (-1,),
    "optim.decay_steps": (-1,),
    "optim.minibatch_steps": (0,),
    "optim.passes": (0,),
    "optim.accumulate": (0,),
    "train.num_updates": (-1,),
    "train.log_every": (0,),
    "train.checkpoint_every": (0,),
    "train.keep": (0,),
    "train.wandb": ("me/sol", "sol:1", "s" * 129),
    "eval.every": (-1,),
    "eval.num_blocks": (0,),
    "eval.num_test_blocks": (-1,),
    "eval.batch_size": (0,),
    "eval.num_random": (-1,),
    "eval.budgets": (
        (), (0.5, 0.5, 0.5), ((0.5,) * 4,), ((),), ((0.05, 0.5, 0.5),), ((0.5, 0.5, NAN),),
    ),
    "memory.prefill_batch": (0,),
    "memory.head_rows": (0,),
    "mesh.data": (0, -2),
    "mesh.model": (0,),
    "mesh.chunk": (-1, 1000),
}  # fmt: skip
CASES = [(field, value) for field, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}={v}" for f, v in CASES])
def test_impossible_values_are_named(field, value, tmp_path):
    values = tiny.config_for(tmp_path).to_dict()  # no model or corpus is there: nothing may look for them
    *groups, leaf = field.split(".")
    functools.reduce(operator.getitem, groups, values)[leaf] = value
    with pytest.raises(UserError) as mistake:
        RunConfig.from_dict(values).check_here()
    assert re.search("must be|cannot be met|cannot run", told(mistake))
    name = "policy.d_model" if field == "policy.num_heads" and value == 3 else field
    name = "policy.predict_losses" if value == "counterfactual" else name
    assert f"config.{name}" in told(mistake)


def test_every_number_has_bounds():
    """A field without any must be added to the table above, or to this list with its reason."""
    unbounded = {"model.path", "data.source", "data.document_start", "data.cache_dir"}  # names: see below
    unbounded |= {"axes.prices"}
    unbounded |= {"axes.kappa.protect", "axes.kappa.read_newest", "grpo.whiten"}  # switches
    unbounded |= {"policy.factored_head", "policy.normalize_inputs", "policy.page_input"}
    unbounded |= {"policy.logit_input", "policy.restate", "policy.predict_losses", "start_from"}
    assert set(tiny.config_for(ROOT).flat()) - set(IMPOSSIBLE) == unbounded


@pytest.mark.parametrize("prices", ["", "none.json"])
def test_time_needs_prices(prices, tmp_path):
    config = tiny.config_for(tmp_path, **{"axes.budget_unit": "time", "axes.prices": prices})
    with pytest.raises(UserError) as mistake:
        config.check_here()
    assert "config.axes.prices" in told(mistake)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"learner": "counterfactual", "grpo.gamma": 0.5}, "grpo.gamma is 0.5; it must be 0.85"),
        ({"learner": "counterfactual", "grpo.reward": "acceptance"}, "grpo.reward is 'acceptance'"),
        ({"counterfactual.target": "label"}, "counterfactual.target is 'label'; it must be divergence"),
    ],
)
def test_what_a_learner_does_not_look_at_is_refused(fields, named, tmp_path):
    with pytest.raises(UserError) as mistake:
        tiny.config_for(tmp_path, **{"policy.predict_losses": True}, **fields)
    assert f"config.{named}" in told(mistake)
    assert "has no use for it" in told(mistake)


def test_more_steps_than_arrays_count_to(tmp_path):
    with pytest.raises(UserError) as mistake:
        tiny.config_for(tmp_path, **{"grpo.num_schedules": 2**28})
    assert f"config.grpo.num_schedules is {2**28}; it must be less" in told(mistake)


def test_decay_must_end_after_the_warmup(tmp_path):
    with pytest.raises(UserError) as mistake:
        tiny.config_for(tmp_path, **{"optim.warmup": 20, "optim.decay_steps": 10})
    assert "config.optim.decay_steps is 10; it must be 0, or above optim.warmup = 20" in told(mistake)


def test_recency_levels_must_suit_its_arithmetic(tmp_path):
    fields = {"axes.kappa.rule": "recency", "axes.kappa.levels": (0.01, 1.0)}
    with pytest.raises(UserError, match=r"config.axes.kappa.levels .* 1/64 under the recency rule"):
        tiny.config_for(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"episode.prefix_len": 253}, 257),
        ({"episode.horizon": 225}, 257),
        ({"episode.episodes_per_prefix": 57}, 260),
    ],
)
def test_episodes_beyond_the_context(fields, tokens, tiny_folder):
    with pytest.raises(UserError) as mistake:
        open_session(tiny.config_for(tiny_folder, **fields))
    assert f"{tokens} tokens exceed the model's context of 256" in told(mistake)
    assert "config.episode" in told(mistake)


# --- models, text and folders ------------------------------------------------------------------------


def refused(config: RunConfig, workdir: pathlib.Path) -> str:
    with pytest.raises(UserError) as mistake:
        train(config, workdir)
    return told(mistake)


def test_a_missing_model(tiny_folder, tmp_path):
    message = refused(
        tiny.config_for(tiny_folder, **{"model.path": str(tmp_path / "none")}), tmp_path / "run"
    )
    assert "none" in message
    assert "give a folder, a .gguf file" in message


def test_a_truncated_model(tiny_folder, tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    message = refused(tiny.config_for(tiny_folder, **{"model.path": str(folder)}), tmp_path / "run")
    assert str(file) in message


def test_the_tokenizer_of_another_model(tiny_folder, tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    tiny.save_tokenizer(folder, extra=50)
    message = refused(tiny.config_for(tiny_folder, **{"model.path": str(folder)}), tmp_path / "run")
    assert "the tokenizer has 307 ids but the model embeds 260" in message


CORPORA = ["missing", "empty", "blank", "broken", "fieldless", "binary", "torn", "short", "single", "suffix"]


def corpora(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Name -> source, and a part of what must be said about it."""
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text('{"text": "  "}\n')
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "fieldless.jsonl").write_text('{"body": "one"}\n')
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"many words " * 1000)[:20])
    (folder / "short.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("one", "two", "three"))
    )
    (folder / "single.txt").write_text("word " * 1000)
    (folder / "table.csv").write_text("a,b")
    return {
        "missing": (f"{folder}/none*.txt", "no file matches"),
        "empty": (f"{folder}/empty.txt", "holds no text"),
        "blank": (f"{folder}/blank.jsonl", "holds no text"),
        "broken": (f"{folder}/broken.jsonl", "line 2 is not JSON"),
        "fieldless": (f"{folder}/fieldless.jsonl", "line 1 has no text"),
        "binary": (f"{folder}/binary.txt", "is not UTF-8"),
        "torn": (f"{folder}/torn.txt.gz", "not a whole gzip file"),
        "short": (f"{folder}/short.jsonl", "less than one block of 37"),
        "single": (f"{folder}/single.txt", "cannot fill every split"),
        "suffix": (f"{folder}/table.csv", "neither .txt nor .jsonl"),
    }  # fmt: skip


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_that_cannot_be_used(name, tiny_folder, tmp_path):
    source, expected = corpora(tmp_path)[name]
    config = tiny.config_for(
        tiny_folder, **{"data.source": source, "data.cache_dir": str(tmp_path / "blocks")}
    )
    assert expected in refused(config, tmp_path / "run")


def test_a_corpus_that_nobody_may_read(tiny_folder, tmp_path, monkeypatch):
    """Made up, for root may read everything."""
    file, read_bytes = tmp_path / "secret.txt", pathlib.Path.read_bytes
    file.write_text("word " * 1000)

    def denied(path):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)
    fields = {"data.source": str(file), "data.cache_dir": str(tmp_path / "blocks")}
    message = refused(tiny.config_for(tiny_folder, **fields), tmp_path / "run")
    assert message == f"cannot read {file}: Permission denied; check its permissions"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_is_needed_later_is_missed_at_once(split, tiny_folder, tmp_path):
    """Not after the training, when the evaluation starts."""
    config = tiny.config_for(tiny_folder, **{f"data.{split}_fraction": 0.0})
    message = refused(config, tmp_path / "run")
    assert f"there is no {split} text; config.data.{split}_fraction must be above 0" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_splits_that_leave_nothing_to_train_on(tiny_folder, tmp_path):
    fields = {"data.validation_fraction": 0.5, "data.test_fraction": 0.5}
    message = refused(tiny.config_for(tiny_folder, **fields), tmp_path / "run")
    assert "validation_fraction and test_fraction leave no train text" in message


def test_a_batch_that_the_text_cannot_fill(tiny_folder, tmp_path):
    fields = {"grpo.batch_size": 1000, "train.num_updates": 0}
    message = refused(tiny.config_for(tiny_folder, **fields), tmp_path / "run")
    assert "blocks, fewer than config.grpo.batch_size" in message


def test_a_workdir_that_is_a_file(tiny_folder, tmp_path):
    workdir = tmp_path / "run"
    workdir.write_text("mine")
    assert str(workdir) in refused(tiny.config_for(tiny_folder), workdir)
    assert workdir.read_text() == "mine"


def test_an_impossible_value_leaves_the_workdir_alone(tiny_folder, tmp_path):
    with pytest.raises(UserError) as mistake:
        train(tiny.config_for(tiny_folder, **{"grpo.gamma": 2.0}), tmp_path / "run")
    assert told(mistake) == "config.grpo.gamma is 2.0; it must be between 0 and 1"
    assert not (tmp_path / "run").exists()


def test_more_processes_than_blocks(tiny_folder, tmp_path, monkeypatch):
    """As each of them sees it; `gathered` would wait for the others."""
    config = tiny.config_for(tiny_folder)
    count = config.grpo.batch_size + 1
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(hosts, "gathered", lambda value: [value] * count)
    message = refused(config, tmp_path / "run")
    assert message.startswith(f"there are {count} processes and config.grpo.batch_size is {count - 1}; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, "{", '["a"]'])
def test_an_evaluation_of_no_run(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as mistake:
        read_config(tmp_path)
    assert "--workdir must be the folder of a training run" in told(mistake)


# --- the command line ----------------------------------------------------------------------------------

SMOKE = ("--config", "configs/default.py:smoke")
RUN = (*SMOKE, "--workdir", "{run}")
SLIPS = {
    "no flags": ((), "give --config configs/X.py and --workdir DIR"),
    "no workdir": (SMOKE, "give --config configs/X.py and --workdir DIR"),
    "no such file": (("--config", "configs/none.py", "--workdir", "{run}"), "configs/none.py"),
    "no such variant": (("--config", "configs/demo.py:huge", "--workdir", "{run}"), "unknown config variant"),
    "no such axis": (("--config", "configs/single_axis.py:tau", "--workdir", "{run}"), "'tau' is no single"),
    "unknown key": ((*RUN, "--config.grpo.nope=1"), "--config.grpo.nope=1: the config has no field 'nope'"),
    "misspelt key": ((*RUN, "--config.grpo.gama=1"), "did you mean 'gamma'?"),
    "unknown group": ((*RUN, "--config.nope.gamma=1"), "the config has no field 'nope'"),
    "no number": ((*RUN, "--config.grpo.num_schedules=abc"), "--config.grpo.num_schedules=abc"),
    "one schedule": (
        (*RUN, "--config.grpo.num_schedules=1"),
        "config.grpo.num_schedules is 1; it must be at least 2",
    ),
    "no whole number": ((*RUN, "--config.grpo.num_schedules=1.5"), "--config.grpo.num_schedules=1.5"),
    "no dashes": ((*RUN, "config.grpo.gamma=0.5"), "'config.grpo.gamma=0.5' is not expected"),
    "unknown flag": ((*RUN, "--wordkir=x"), "wordkir"),
    "no tuple of tuples": ((*RUN, "--config.eval.budgets=(0.5,0.5,0.5)"), "config.eval.budgets"),
    "words for levels": ((*RUN, "--config.axes.rho.levels=(a,b)"), "config.axes.rho.levels"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_slips_on_the_command_line(name, tmp_path):
    args, expected = SLIPS[name]
    ended = run_program("sol_jax.train", *(arg.format(run=tmp_path / "run") for arg in args))
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def start_program(module: str, *args: str) -> subprocess.CompletedProcess:
    """In a process of its own, whose libraries may print too."""
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_training_a_missing_model(tmp_path):
    model = tmp_path / "none"
    ended = start_program(
        "sol_jax.train", *SMOKE, "--workdir", str(tmp_path / "run"), f"--config.model.path={model}"
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: no model at '{model}'; give a folder, a .gguf")
    assert "Traceback" not in ended.stderr


def test_evaluating_a_folder_that_is_no_run(tmp_path):
    ended = start_program("sol_jax.evaluate", "--workdir", str(tmp_path))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/config.json cannot be read")
    assert list(tmp_path.iterdir()) == []


# --- paths of other machines, and odd ones of this one ---------------------------------------------------

REMOTE = (
    "https://host/run",
    "hdfs://host/run",
    "foo://bucket/run",
    "file:///run",
    "gs:/bucket",  # as `pathlib` writes a URL
    "gs:///run",  # without a bucket
)


@pytest.mark.parametrize("path", REMOTE)
def test_a_url_that_nothing_opens_is_no_folder_wherever_a_path_is_taken(
    path, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    right = "it must be a path on this machine"
    for field in ("model.path", "data.source", "data.cache_dir", "axes.prices"):
        with pytest.raises(UserError, match=f"config.{field} is .*; {right}"):
            tiny.config_for(tiny_folder, **{field: path})
    for options in (EvaluateOptions, GenerateOptions):
        for field in {"workdir", "policy", "source", "output", "model", "html"} & options().to_dict().keys():
            with pytest.raises(UserError, match=f"--{field} is .*; {right}"):
                options.from_dict({field: path})
    calls = (
        lambda: train(tiny.config_for(tiny_folder), pathlib.Path(path)),
        lambda: train_policy(tiny.config_for(tiny_folder), path),
        lambda: open_model(path),
        lambda: load_policy(path),
        lambda: evaluate_policy(path),
        lambda: read_documents(path),
        lambda: read_documents(f"{tiny_folder}/corpus.jsonl, {path}"),
    )
    for call in calls:
        with pytest.raises(UserError, match=right) as mistake:
            call()
        told(mistake)
    assert list(tmp_path.iterdir()) == []  # no folder called gs:


@pytest.mark.parametrize(
    "path", ["hub:owner/name", "tfds:lm1b/en:train", "C:/run", "a:b", "runs/a:/b", "~/x", "/a//b"]
)
def test_paths_that_only_look_like_urls(path):
    assert not is_remote(path)


def test_without_a_home_folder(tiny_folder, tmp_path, monkeypatch):
    """Not a folder called ~ in the current one, and no traceback of pathlib."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(
        UserError, match=r"data.cache_dir is '~/.cache/sol_jax', but there is no home folder; set HOME"
    ):
        open_session(tiny.config_for(tiny_folder, **{"data.cache_dir": ""}))
    with pytest.raises(UserError, match="there is no home folder"):
        open_model("~/model")
    with monkeypatch.context() as patched:
        patched.setattr(digests, "CACHE_DIR", "~/digests")
        assert digests.file_digest(tiny_folder / "corpus.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_home_is_none(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match="there is no home folder"):
        local_path("~/x", "--workdir")


DEEP = "[" * 100_000 + "]" * 100_000
ODD_JSON = {
    "digits": '{"text": "a", "n": ' + "9" * 5000 + "}",
    "depth": '{"text": "a", "n": ' + DEEP + "}",
    "bytes": b"\xff",
}


@pytest.mark.parametrize("name", ODD_JSON)
def test_json_that_python_cannot_hold(name, tiny_folder, tmp_path):
    """Numbers of thousands of digits and deep nesting are no JSONDecodeError."""
    content = ODD_JSON[name]
    content = content.encode() if isinstance(content, str) else content
    model = shutil.copytree(tiny_folder / "model", tmp_path / "model")
    scores, policy, run = (tmp_path / part for part in ("scores", "policy", "run"))
    for folder in (scores, policy, run):
        folder.mkdir()
    shutil.copy(model / "model.safetensors", policy / "policy.safetensors")
    readers = {
        tmp_path / "text.jsonl": lambda: read_documents(str(tmp_path / "text.jsonl")),
        model / "config.json": lambda: load_config(model),
        model / "tokenizer_config.json": lambda: load_tokenizer(model),
        model / "tokenizer.json": lambda: load_tokenizer(model),
        policy / "config.json": lambda: load_policy(policy),
        run / "config.json": lambda: read_config(run),
        scores / "about.json": lambda: read_folder(scores),
        tmp_path / "prices.json": lambda: tiny.config_for(
            tiny_folder, **{"axes.budget_unit": "time", "axes.prices": str(tmp_path / "prices.json")}
        ).check_here(),
    }
    for file, read in readers.items():
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(content)
        with pytest.raises(UserError) as mistake:
            read()
        assert str(file.parent) in told(mistake)
        file.write_bytes(before)
