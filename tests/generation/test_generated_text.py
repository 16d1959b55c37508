"""A text for notebooks: what it says of itself is what its episodes did."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import sol_jax
from sol_jax.errors import UserError, telling_of_memory
from sol_jax.generation import generated_text


@pytest.fixture(scope="module")
def text(tiny_folder):
    return sol_jax.generate_text(
        "the cat sat on a mat",
        str(tiny_folder / "model"),
        controller="fixed",
        budget=(0.5, 0.7, 0.6),
        max_tokens=37,
    )


def test_steps_count_from_the_start_of_each_episode(text):
    """Sixteen steps an episode, after the one token of the prefill."""
    n = len(text.pieces)
    assert text.steps.tolist() == [-1, *(i % 16 for i in range(n - 1))]
    assert text.costs.shape == (n, len(text.axes))


def test_realised_costs_are_means_over_the_controller_s_steps(text):
    """All steps but the prefill's, for the prompt is longer than sinks and window."""
    np.testing.assert_allclose(text.realised, text.costs[1:].mean(0), atol=1e-6)
    assert (text.realised < 1).all()


def test_a_device_without_enough_memory_is_told_in_a_sentence():
    with (
        pytest.raises(UserError, match="memory has run out; take bfloat16"),
        telling_of_memory(),
    ):
        jnp.zeros(1 << 50, jnp.uint8).block_until_ready()


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="INTERNAL: else"), telling_of_memory():
        raise RuntimeError("INTERNAL: else")


def test_what_waits_for_a_computation_that_ran_out_tells_of_memory():
    """JAX says INTERNAL of that one, and quotes the first."""
    said = "INTERNAL: Error dispatching computation: Out of memory allocating 5 bytes."
    with pytest.raises(UserError, match="memory has run out"), telling_of_memory():
        raise JaxRuntimeError(said)


def test_generation_tells_of_memory(tiny_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(generated_text, "write_out", fail)
    with pytest.raises(UserError, match=r"memory has run out; .*allocating 5 bytes"):
        sol_jax.generate_text("the cat", str(tiny_folder / "model"), max_tokens=4)
