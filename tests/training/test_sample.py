"""The sample episode that TensorBoard and Weights & Biases show: the right tokens, the right costs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from sol_jax.evaluation import scoring
from sol_jax.generation.html_page import SHADES, shade
from sol_jax.rl.train_step import init_state
from sol_jax.text.blocks import evaluation_batches
from sol_jax.training import sample
from sol_jax.training.loop import validate

ROOT = pathlib.Path(__file__).parents[2]
with_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow (extra `tensorboard`)"
)


@pytest.fixture(scope="module")
def taken(tiny_session):
    state = init_state(jax.random.key(3), tiny_session.setup)
    validate(tiny_session, state)
    before = scoring._play._cache_size()
    found = sample.sample_episode(tiny_session, state)
    return found, scoring._play._cache_size() - before


def test_it_is_the_text_of_the_block(taken, tiny_session):
    """The steps predict the tokens after the prefix's last and its next: T of them, read from the block
    itself.
    """
    found, _ = taken
    setup, cfg = tiny_session.setup, tiny_session.config.eval
    batch = next(iter(evaluation_batches(tiny_session.split("validation"), cfg.batch_size, cfg.num_blocks)))
    first, T = setup.episode.prefix_len + 1, setup.episode.horizon
    decode = tiny_session.tokenizer.decode
    assert "".join(found.pieces) == decode(batch.tokens_BxN[0, first : first + T].tolist())
    assert decode(batch.tokens_BxN[0, :first].tolist()).endswith(found.before)
    assert found.cost_TxX.shape == (T, 3)
    assert set(np.unique(found.cost_TxX)) <= set(np.unique(setup.space.costs_AxX))
    budgets = tiny_session.config.requested(setup.space)
    np.testing.assert_allclose(found.budget, budgets[len(budgets) // 2])


def test_nothing_new_is_compiled_for_it(taken):
    assert taken[1] == 0


def test_the_picture_shows_each_tokens_shade(taken):
    found, _ = taken
    image = found.image()
    assert image.dtype == np.uint8
    colours = {tuple(row) for row in image.reshape(-1, 3)}
    for net in found.cost_TxX.mean(-1):
        assert tuple(bytes.fromhex(SHADES[shade(float(net))][1:])) in colours


def test_the_text_is_no_markup():
    """Indented by four it is code to Markdown, whatever it holds."""
    hostile = sample.Sample("# a\n<b>", ["<script>", "\n- x"], np.array([[0.5, 1.0]] * 2), (0.5, 1.0))
    head, _, text = hostile.text.partition("\n\n")
    assert head == "asked for 0.500 / 1.000, spent 0.500 / 1.000 on the text in brackets"
    assert text.splitlines() == ["    ...# a", "    <b>[<script>", "    - x]"]


def test_characters_of_several_tokens_belong_to_the_last(tiny_session):
    """One token a byte: é has two, and a torn one at the end is left out."""
    ids = tiny_session.tokenizer.encode("abécd€")
    before, pieces = sample.split_text(tiny_session.tokenizer, np.array(ids), 2, len(ids) - 3)
    assert before == "ab"
    assert pieces == ["", "é", "c", "d", "", ""]


TENSORBOARD_RUN = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import tiny
from sol_jax.training.loop import train
folder = pathlib.Path(sys.argv[3])
fields = {"train.num_updates": 1, "eval.every": 1, "eval.num_test_blocks": 0}
train(tiny.config_for(folder, **fields), pathlib.Path(sys.argv[1]))
"""


@with_tensorflow
def test_tensorboard_shows_the_sample(tiny_folder, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TENSORBOARD_RUN, str(tmp_path), str(ROOT / "tests"), str(tiny_folder)]
    subprocess.run(command, env=environment, check=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("sample/text")
    assert "asked for" in make_ndarray(text.tensor_proto).item().decode()
    (image,) = events.Tensors("sample/shaded")
    assert make_ndarray(image.tensor_proto)[2].startswith(b"\x89PNG")
