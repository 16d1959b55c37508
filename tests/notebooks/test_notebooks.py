"""Every notebook from its first cell to its last, at another size: `make notebooks` has what runs them.

What the cells show is held to what they must show; mistakes end in one sentence.
"""

import base64
import csv
import html
import io
import pathlib
import re

import numpy as np
import pytest
import tiny
from nbclient.exceptions import CellExecutionError
from PIL import Image

from experiments.colab import form, run
from sol_jax.errors import UserError
from sol_jax.training.from_config import train_policy

# A model goes on with what repeats, so that its own text has markup in it.
HOSTILE = 3 * "<script>alert('a')</script></style>&lt;\u202egnp\u2069\n"


class Shown:
    """What the cells of a notebook showed."""

    def __init__(self, notebook):
        self.outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        data = [output["data"] for output in self.outputs if "data" in output]
        self.html = ["".join(found["text/html"]) for found in data if "text/html" in found]
        self.png = [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]
        self.printed = "".join(output["text"] for output in self.outputs if output["output_type"] == "stream")
        self.widgets = [found for found in data if "application/vnd.jupyter.widget-view+json" in found]
        self.errors = [output for output in self.outputs if output["output_type"] == "error"]


def shown(name: str, folder: pathlib.Path = form.ROOT, **values) -> Shown:
    notebook = run.with_parameters(form.read(form.FOLDER / f"{name}.ipynb"), values)
    return Shown(run.execute(notebook, folder, timeout=900))


def sentence(name: str, **values) -> str:
    """The one line that a mistake ends in."""
    notebook = run.with_parameters(form.read(form.FOLDER / f"{name}.ipynb"), values)
    with pytest.raises(CellExecutionError) as stopped:
        run.execute(notebook, form.ROOT, timeout=600)
    lines = [line for line in str(stopped.value).split("\n") if "error: " in line]
    assert "Traceback (most recent call last)" not in str(stopped.value)
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def small(tiny_folder) -> dict:
    """Fields that put a tiny model and corpus into the smoke config."""
    config = tiny.config_for(tiny_folder)
    return {
        "model.path": config.model.path,
        "data.source": config.data.source,
        "data.cache_dir": config.data.cache_dir,
        "policy.num_heads": 2,
        "train.num_updates": 2,
        "eval.num_test_blocks": 2,
    }


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> pathlib.Path:
    """A tiny `model` with room for prefixes of 256 tokens, and a `corpus.jsonl` with many of them."""
    folder = tmp_path_factory.mktemp("roomy")
    tiny.save_model(folder / "model", max_position_embeddings=1024)
    tiny.save_corpus(folder / "corpus.jsonl", documents=200, words=100)
    return folder


@pytest.fixture(scope="module")
def policy(roomy, tiny_folder) -> pathlib.Path:
    """A run for that model, on other text."""
    fields = {"model.path": str(roomy / "model"), "train.num_updates": 1}
    fields |= {"eval.every": 0, "eval.num_test_blocks": 0}
    return train_policy(tiny.config_for(tiny_folder, **fields), roomy / "policy")


def rows(path: pathlib.Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_quickstart(small, tmp_path):
    """With the published policy, on a prompt that makes the model write what a page would run."""
    found = shown(
        "quickstart",
        PROMPT=HOSTILE,
        MAX_TOKENS=40,
        BUDGET=(0.7, 0.8, 0.8),
        CONFIG="default:smoke",
        WORKDIR=str(tmp_path / "run"),
        FIELDS=small,
        OWN_BUDGET=(0.5, 0.8, 0.6),
    )
    published, own = (part for part in found.html if "net keep rate up to" in part)
    assert published.count("<span") >= 20 + 10
    assert published != own
    written = html.unescape(re.sub(r"<[^>]*>", "", published))
    assert re.search(r"</?\w+>", written), "the prompt no longer makes the model write markup"
    assert {*re.findall(r"<(/?\w+)", published)} == {"div", "/div", "span", "/span"}
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", published)
    assert re.search(r"requested +kappa 0.700, rho 0.800, eta 0.800", found.printed)
    assert "ended by" in found.printed
    table = rows(tmp_path / "run" / "results.csv")
    assert {row["controller"] for row in table} >= {"policy", "fixed", "random", "dense"}
    assert {row["run_updates"] for row in table} == {"2"}
    assert len(found.png) == 1
    assert found.widgets  # the bar of the training


def test_where_does_compute_go(roomy, policy, tmp_path):
    budgets = [(0.3, 0.65, 0.4), (0.5, 0.7, 0.6), (1.0, 1.0, 1.0)]
    found = shown(
        "where_does_compute_go",
        MODEL=str(roomy / "model"),
        POLICY=str(policy),
        PROMPT="the cat sat",
        MAX_TOKENS=24,
        BUDGETS=budgets,
        SOURCE=str(roomy / "corpus.jsonl"),
        BLOCKS=2,
        CEILING_AXIS="eta",
        CEILING_BLOCKS=2,
        FOLDER=str(tmp_path),
    )
    (shaded,) = (html for html in found.html if "net keep rate up to" in html)
    assert shaded.count('title="all ') == 24
    assert "smollm2-135m/sol-j-fl" in found.printed
    spent = re.findall(r"^([\d., ]{24}) ([\d., ]{24}) (\d\.\d\d)  +[\d.]+ MB a token", found.printed, re.M)
    assert [tuple(map(float, asked.split(","))) for asked, _, _ in spent] == budgets
    for asked, took, missed in spent:
        pairs = zip(asked.split(","), took.split(","), strict=True)
        assert max(abs(float(a) - float(b)) for a, b in pairs) == pytest.approx(float(missed), abs=0.011)
    table = rows(tmp_path / "controllers.csv")
    assert {row["controller"] for row in table} == {"policy", "fixed", "clock", "swapped", "dense"}
    assert {row["requested_kappa"] for row in table if row["controller"] == "policy"} == {"0.5"}
    ceiling = rows(tmp_path / "ceiling" / "ceiling.csv")
    assert [row["axis"] for row in ceiling] == ["eta"] * 8
    assert all(float(row["oracle"]) > -0.05 for row in ceiling)
    assert found.widgets
    assert len(found.png) == 2


def test_your_own_axis(small, roomy, tmp_path):
    omega = {"axes.omega.levels": (0.5, 1.0), "axes.omega.budget": (0.5, 1.0)}
    found = shown(
        "your_own_axis",
        PLACE=str(tmp_path / "own"),
        LEVELS=(0.2, 0.6, 1.0),
        CEILING_BLOCKS=2,
        MODEL=str(roomy / "model"),
        SOURCE=str(roomy / "corpus.jsonl"),
        CONFIG="default:smoke",
        FIELDS=small | omega | {"eval.budgets": ((0.6, 0.75, 0.7, 0.8),)},
        WORKDIR=str(tmp_path / "omega"),
        PROMPT="the cat",
        BUDGET=(0.6, 0.75, 0.7, 0.75),
        MAX_TOKENS=8,
    )
    assert (tmp_path / "own" / "sol_jax" / "axes" / "omega.py").is_file()
    assert not (form.ROOT / "sol_jax" / "axes" / "omega.py").exists()
    assert "omega after 256 at 0.28: fixed loses" in found.printed
    assert not any("fixed loses" in output.get("data", {}).get("text/plain", "") for output in found.outputs)
    levels = [float(row["level"]) for row in rows(tmp_path / "own" / "ceiling" / "levels.csv")]
    assert levels == [0.2, 0.6, 1.0]
    table = rows(tmp_path / "omega" / "results.csv")
    (policy,) = (row for row in table if row["controller"] == "policy")
    assert policy["requested_omega"] == "0.8"
    assert 0.5 <= float(policy["cost_omega"]) <= 1
    (shaded,) = (html for html in found.html if "net keep rate up to" in html)
    assert re.search(r'title="all [^"]*, omega 1\.00"', shaded)
    assert len(found.png) == 1


def test_your_own_model(small, tiny_folder, tmp_path):
    """Stopped in the middle and started again."""
    fields = small | {"train.num_updates": 150, "train.checkpoint_every": 5, "eval.every": 0}
    del fields["model.path"]
    found = shown(
        "your_own_model",
        MODEL=str(tiny_folder / "model"),
        DTYPE="float32",
        CONFIG="default:smoke",
        FIELDS=fields,
        FOLDER=str(tmp_path / "run"),
        REHEARSAL=5,
        PROMPT="the cat",
        BUDGET=(0.6, 0.75, 0.7),
        MAX_TOKENS=8,
    )
    stopped = int(re.search(r"stopped by SIGTERM after update (\d+); start again", found.printed)[1])
    assert 5 <= stopped < 150
    assert f"goes on after update {stopped}; {150 - stopped} updates" in found.printed
    assert re.search("^controller +cost .*gain of the policy", found.printed, re.M)
    assert not re.search(r"^policy, .*steps/s", found.printed, re.M)
    assert re.search(r"caches of the blocks played at a time +\d", found.printed)
    assert re.search(r"at once, at most [\d.]+ GiB, of [\d.]+ GiB that are free", found.printed)
    table = rows(tmp_path / "run" / "results.csv")
    assert {row["run_updates"] for row in table} == {"150"}
    assert len(found.png) == 1
    assert any("net keep rate up to" in html for html in found.html)


def test_paper_figures(small, tmp_path):
    found = shown(
        "paper_figures",
        CONFIG="default:smoke",
        FIELDS=small | {"eval.every": 0, "eval.num_test_blocks": 0},
        BLOCKS=2,
        NUM_RANDOM=2,
        FOLDER=str(tmp_path),
    )
    mine = rows(tmp_path / "mine" / "smollm2-135m" / "sol-j-2l-s0.csv")
    committed = rows(tmp_path / "committed" / "smollm2-135m" / "sol-j-2l-s0.csv")
    asked = {(row["requested_kappa"], row["requested_rho"]) for row in mine if row["controller"] == "policy"}
    # The same budgets as the committed run's, so that the panels can be compared.
    assert asked <= {(row["requested_kappa"], row["requested_rho"]) for row in committed}
    assert len(asked) == 5
    assert {row["controller"] for row in mine} >= {"policy", "fixed", "random", "random_best", "dense"}
    assert found.printed.count("drew ") == 2
    assert len(found.png) == 1


def test_a_policy_of_another_model_is_refused_in_a_sentence(roomy):
    said = sentence("quickstart", MODEL=str(roomy / "model"))
    assert "the policy smollm2-135m/sol-j-fl is for another model" in said


def test_a_model_that_cannot_be_fetched_is_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    said = sentence("your_own_model", MODEL="hub:nobody/nothing", FOLDER=str(tmp_path / "run"))
    assert re.search("hub:nobody/nothing (could not be fetched|needs its package)", said)


def test_what_does_not_fit_is_told_before_anything_is_trained(tiny_folder, tmp_path):
    folder = tmp_path / "run"
    fields = {"grpo.num_schedules": 1 << 22, "episode.prefix_len": 32}
    said = sentence("your_own_model", MODEL=str(tiny_folder / "model"), FIELDS=fields, FOLDER=str(folder))
    assert re.search(r"needs [\d.]+ GiB, and [\d.]+ GiB are free; lower grpo", said)
    assert not (folder / "log.txt").exists()


def test_a_training_that_fails_is_told_by_its_own_sentence(tiny_folder, tmp_path):
    fields = {"data.source": str(tmp_path / "nothing.txt"), "episode.prefix_len": 32, "policy.num_heads": 2}
    values = {"CONFIG": "default:smoke", "REHEARSAL": 0, "FOLDER": str(tmp_path / "run"), "FIELDS": fields}
    said = sentence("your_own_model", MODEL=str(tiny_folder / "model"), DTYPE="float32", **values)
    assert "nothing.txt" in said


def test_a_committed_picture_keeps_its_colours():
    """Three points are few pixels among lines and letters, whose edges have all greys."""
    colours = [(179, 48, 28), (31, 95, 139), (46, 125, 79)]
    greys = np.tile(np.arange(1500) % 256, (660, 1)).astype(np.uint8)
    drawn = np.stack([greys] * 3, -1)
    for n, colour in enumerate(colours):
        drawn[100:120, 200 * n : 200 * n + 20] = colour
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "PNG")
    output = {"output_type": "display_data", "data": {"image/png": base64.b64encode(file.getvalue())}}
    cell = {"cell_type": "code", "metadata": {"tags": ["picture"]}, "outputs": [output]}
    kept = np.asarray(Image.open(io.BytesIO(run.picture({"cells": [cell]}))).convert("RGB")).astype(int)
    assert kept.shape[1] == run.WIDEST
    for colour in colours:
        assert np.abs(kept - colour).sum(-1).min() < 12


def test_a_parameter_that_is_not_there_is_named():
    with pytest.raises(UserError, match="has no parameter SEED; it has PROMPT, "):
        shown("quickstart", SEED=1)


def test_a_repository_that_cannot_be_fetched_is_told_in_a_sentence(tmp_path):
    """As without network: the first cell of code, in a folder that is no checkout."""
    notebook = form.read(form.FOLDER / "quickstart.ipynb")
    (cell,) = form.tagged(notebook, "install")
    gone = f'REPOSITORY = "{tmp_path / "gone"}"'
    cell["source"] = re.sub('REPOSITORY = ".*"', gone, form.source(cell))
    with pytest.raises(CellExecutionError) as stopped:
        run.execute(notebook | {"cells": [cell]}, tmp_path, install=True, timeout=600)
    assert str(stopped.value).rstrip().endswith("check the runtime's network and the address above")
    assert "Traceback (most recent call last)" not in str(stopped.value)


def test_a_runtime_that_is_too_small_is_told_in_a_sentence(tmp_path):
    """The same cell in a checkout, which asks for more memory than there is."""
    notebook = form.read(form.FOLDER / "quickstart.ipynb")
    (cell,) = form.tagged(notebook, "install")
    cell["source"] = form.source(cell).replace('"--gigabytes", "4"', '"--gigabytes", "1e9"')
    with pytest.raises(CellExecutionError) as stopped:
        run.execute(notebook | {"cells": [cell]}, form.FOLDER, install=True, timeout=600)
    assert re.search(
        r"the runtime has [\d.]+ GB of free memory, and this notebook needs 1e\+09 GB; restart it",
        str(stopped.value),
    )
