"""The option `kernels` of every entry point: it reaches the model and the axes, or is refused at once."""

import jax
import numpy as np
import pytest
import tiny

from pallas_kernels.dispatch import choose
from sol_jax import evaluate, train
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluate import Options
from sol_jax.evaluation import provenance as subject
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.config import flatten

REFUSAL = (
    "kernels: attend: 'triton' cannot run on this platform (cpu) because jax-triton has no interpreter; "
    "use 'pallas' (interpreted) or 'xla' instead"
)
pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="may run there")


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A run that was trained where there was a GPU; nothing gets as far as reading its parameters."""
    config = tiny.config_for(tiny_folder, kernels="triton")
    checkpoints = Checkpoints(tmp_path / "run", flatten(config), keep=1)
    checkpoints.save(1, {"params": np.zeros(1)}, {"position": 0}, 0.0)
    checkpoints.close()
    return tmp_path / "run"


def test_training_says_why_not(tiny_folder, tmp_path):
    with pytest.raises(UserError) as mistake:
        train.train(tiny.config_for(tiny_folder, kernels="triton"), tmp_path / "new")
    assert str(mistake.value) == f"config.{REFUSAL}"
    assert not (tmp_path / "new").exists()


def test_evaluation_says_why_not_and_can_be_told_otherwise(run):
    for options in (Options(str(run)), Options(str(run), kernels="triton")):
        with pytest.raises(UserError) as mistake:
            evaluate.evaluate(options)
        assert str(mistake.value) == f"config.{REFUSAL}"
    config, _ = subject.open_run(run)
    for name in ("auto", "xla", "pallas"):
        setup = subject.open_text(config, kernels=name).setup
        assert {setup.model.kernels, *(axis.kernels for axis in setup.space.axes)} == {name}
    assert config.kernels == "triton"  # the run's own, which rows are labelled with


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
