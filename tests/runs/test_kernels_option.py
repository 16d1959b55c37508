"""The option `kernels` of every entry point: it reaches the model and the axes, or is refused at once."""

import jax
import numpy as np
import pytest
import tiny

from pallas_kernels.dispatch import choose
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.provenance import open_text
from sol_jax.evaluation.report import evaluate
from sol_jax.generation.load_engine import open_engine
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.trained_policy import open_run
from sol_jax.training.loop import train

REFUSAL = (
    "kernels: attend: 'triton' cannot run on this platform (cpu) because jax-triton has no interpreter; "
    "use 'pallas' (interpreted) or 'xla' instead"
)
pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="may run there")


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A run that was trained where there was a GPU; nothing gets as far as reading its parameters."""
    config = tiny.config_for(tiny_folder, kernels="triton")
    checkpoints = Checkpoints(tmp_path / "run", config.flat(), keep=1)
    checkpoints.save(1, {"params": np.zeros(1)}, {"position": 0}, 0.0)
    checkpoints.close()
    return tmp_path / "run"


def test_training_says_why_not(tiny_folder, tmp_path):
    with pytest.raises(UserError) as mistake:
        train(tiny.config_for(tiny_folder, kernels="triton"), tmp_path / "new")
    assert str(mistake.value) == f"config.{REFUSAL}"
    assert not (tmp_path / "new").exists()


def test_evaluation_says_why_not_and_can_be_told_otherwise(run):
    for options in (EvaluateOptions(str(run)), EvaluateOptions(str(run), kernels="triton")):
        with pytest.raises(UserError) as mistake:
            evaluate(options)
        assert str(mistake.value) == f"config.{REFUSAL}"
    config, _ = open_run(run)
    for name in ("auto", "xla", "pallas"):
        setup = open_text(config, kernels=name).setup
        assert {setup.model.kernels, *(axis.kernels for axis in setup.space.axes)} == {name}
    assert config.kernels == "triton"  # the run's own, which rows are labelled with


def test_a_policy_that_was_trained_with_other_kernels_can_be_read(tiny_folder, tiny_session, tmp_path):
    config = tiny.config_for(tiny_folder, kernels="triton")
    params = init_state(jax.random.key(0), tiny_session.setup).params
    about = {"title": "t", "model": "tiny", "documents": [], "updates": 0, "seed": 0}
    about |= {"command": "", "commit": ""}
    policy_files.save_policy(tmp_path, params, config, about)
    assert policy_files.load_policy(tmp_path)[1] == config
    engine = open_engine(str(tiny_folder / "model"), policy=str(tmp_path), kernels="auto")
    assert {engine.cfg.model.kernels, *(axis.kernels for axis in engine.cfg.space.axes)} == {"auto"}


def test_a_shape_that_no_kernel_takes_ends_a_program_with_one_sentence(capsys):
    """Known only once a step is traced; `generate` is refused in `test_generate_program`."""

    @exits_on_user_error
    def program():
        choose("keep_channels", "pallas", platform="gpu", hidden=20000)

    with pytest.raises(SystemExit, match="2"):
        program()
    assert capsys.readouterr().err == (
        "error: keep_channels: 'pallas' cannot take this shape because hidden is 20000 "
        "and must be 1 to 16384; use 'xla' instead\n"
    )
