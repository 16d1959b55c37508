"""docs/configs.md and docs/flags.md are what the dataclasses say today."""

import importlib.util
import pathlib

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_configs", DOCS / "generate_configs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "make"), [("configs.md", "configs_page"), ("flags.md", "flags_page")])
def test_the_page_is_up_to_date(generator, page, make):
    made = getattr(generator, make)()
    assert (DOCS / page).read_text() == made, f"run: python docs/generate_configs.py (docs/{page} is old)"


def test_every_field_has_a_meaning():
    from sol_jax.evaluation.options import EvaluateOptions
    from sol_jax.generation.options import GenerateOptions
    from sol_jax.options import described
    from sol_jax.runs.config import RunConfig

    for options in (RunConfig(), EvaluateOptions(), GenerateOptions()):
        silent = [field.name for field in described(options) if not field.meaning]
        assert not silent
