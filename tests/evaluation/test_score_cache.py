"""Stored scores: what names their folder, and what does not."""

import dataclasses
import json

import numpy as np
import pytest

from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning
from sol_jax.digests import digest
from sol_jax.evaluation.provenance import decides, found_at
from sol_jax.evaluation.score_cache import ScoreCache, read_folder
from sol_jax.models.llama import LlamaConfig
from sol_jax.text.blocks import evaluation_batches

COMMON = {"levels": (0.2, 1.0), "budget": (0.2, 1.0), "penalty": 100.0}
AXES = (Quest, Recency, Relevancy, ChannelPruning, OutputQuantization)


@pytest.fixture(scope="module")
def batches(tiny_session):
    return list(evaluation_batches(tiny_session.split("test"), 2, 3))


@pytest.fixture
def named(tiny_session, batches):
    """What names the folder of a session whose config has some other fields."""

    def name(fields=None, stale=False, batches=batches, **parts):
        config = tiny_session.config.with_fields(fields or {})
        model = dataclasses.replace(tiny_session.setup.model, dtype=config.model.dtype)
        session = dataclasses.replace(tiny_session, config=config, setup=config.setup(model), **parts)
        return digest(decides(session, batches, stale))

    return name


@pytest.mark.parametrize("kind", AXES)
def test_an_axis_is_the_same_under_another_class_name(kind):
    renamed = dataclasses.dataclass(frozen=True)(type("Renamed", (kind,), {}))
    assert renamed.__name__ == "Renamed"
    assert renamed(**COMMON).identity() == kind(**COMMON).identity()
    assert repr(renamed(**COMMON)) != repr(kind(**COMMON))


def test_the_identity_of_an_axis_by_hand():
    """What is written in folders that exist: to change a name here orphans them."""
    quest = Quest(**COMMON, page_size=4, sinks=3)
    assert quest.identity() == {
        "rule": "quest", "name": "kappa", "levels": (0.2, 1.0), "page_size": 4, "heads": "head",
        "protect": False, "read_newest": False, "dense_layers": 0, "least_pages": 1, "sinks": 3, "window": 2,
    }  # fmt: skip
    ends = {"name": "kappa", "levels": (0.2, 1.0), "sinks": 4, "window": 2}
    assert Recency(**COMMON).identity() == ends | {"rule": "recency"}
    assert Relevancy(**COMMON).identity() == ends | {"rule": "relevancy"}
    assert ChannelPruning(**COMMON).identity() == {"rule": "", "name": "rho", "levels": (0.2, 1.0)}
    assert OutputQuantization(**COMMON).identity() == {"rule": "", "name": "eta", "levels": (0.2, 1.0)}


def test_what_names_a_folder_names_no_class(tiny_session, batches):
    told = json.dumps(decides(tiny_session, batches, stale=False))
    for kind in (*AXES, LlamaConfig, type(tiny_session.setup), type(tiny_session.setup.episode)):
        assert kind.__name__ not in told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axes.kappa.levels", (0.1, 0.5, 1.0)),
        ("axes.rho.levels", (0.4, 0.7, 1.0)),
        ("axes.eta.levels", (5, 8, 16)),
        ("axes.kappa.page_size", 4),
        ("axes.kappa.rule", "recency"),
        ("axes.kappa.rule", "relevancy"),
        ("axes.kappa.heads", "group"),
        ("axes.kappa.protect", True),
        ("axes.kappa.read_newest", True),
        ("axes.kappa.dense_layers", 1),
        ("axes.kappa.least_pages", 3),
        ("axes.budget_unit", "bytes"),
        ("kernels", "xla"),
        ("kernels", "pallas"),
        ("model.dtype", "bfloat16"),
        ("episode.prefix_len", 28),
        ("episode.horizon", 3),
        ("episode.episodes_per_prefix", 2),
        ("episode.sinks", 3),
        ("episode.window", 5),
    ],
)
def test_what_decides_scores_names_another_folder(named, field, value):
    assert named({field: value}) != named()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("axes.kappa.budget", (0.2, 0.9)),
        ("axes.kappa.penalty", 50.0),
        ("axes.kappa.budget_choices", (0.5,)),
        ("grpo.gamma", 0.5),
        ("optim.learning_rate", 1e-2),
        ("eval.num_random", 9),
        ("memory.head_rows", 16),
        ("train.num_updates", 9),
    ],
)
def test_what_does_not_decide_scores_names_no_other_folder(named, field, value):
    """Nor does what the model or the text are called: see `test_identity`."""
    assert named({field: value}) == named()


def test_names_of_model_and_text_do_not_count_but_their_content_does(named, batches, tiny_session):
    assert named({"model.path": "elsewhere", "data.source": "another.txt"}) == named()
    for part in ("weights", "tokenizer"):
        assert named(identity=tiny_session.identity | {part: "0123"}) != named()
    assert named(batches=batches[:1]) != named()
    changed = [batches[0]._replace(tokens_BxN=np.flip(batches[0].tokens_BxN, 1)), *batches[1:]]
    assert named(batches=changed) != named()
    assert named(stale=True) != named()


def test_a_folder_is_named_by_what_decides(tiny_session, batches, tmp_path):
    about = decides(tiny_session, batches, stale=False)
    folder = ScoreCache(tmp_path, about).folder
    assert ScoreCache(tmp_path, dict(about)).folder == folder  # nor is it refused
    assert json.loads((folder / "about.json").read_text())["prefix_len"] == 32
    assert ScoreCache(tmp_path, about | {"horizon": 5}).folder != folder


def test_where_model_and_text_are_is_kept_but_names_nothing(tiny_session, batches, tmp_path):
    about = decides(tiny_session, batches, stale=False)
    store = ScoreCache(tmp_path, about, found_at(tiny_session))
    store.keep_blocks(np.zeros((3, 5), int), np.zeros(3, int))
    places = {"model": tiny_session.config.model.path, "text": tiny_session.config.data.source}
    assert read_folder(store.folder).found_at == places
    moved = ScoreCache(tmp_path, about, {"model": "elsewhere", "text": "another.txt"})
    assert moved.folder == store.folder
    assert read_folder(store.folder).found_at == {"model": "elsewhere", "text": "another.txt"}
    assert list(read_folder(store.folder).about["rules"]["costs"]) == [
        "kappa",
        "rho",
        "eta",
    ]  # in the order of actions
