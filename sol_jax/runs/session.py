"""Everything a run's configuration stands for, loaded: what entry points share.

Cheap checks come before heavy loading, so that a mistake is reported in seconds.
"""

import dataclasses
import pathlib
import subprocess

from jax.sharding import Mesh

from sol_jax import hosts
from sol_jax.errors import UserError
from sol_jax.models.llama import Weights
from sol_jax.models.model import Model, open_model
from sol_jax.models.sharding import check_divides, make_mesh
from sol_jax.models.tokenizer import Tokenizer
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig
from sol_jax.text import blocks as data


@dataclasses.dataclass(frozen=True)
class Session:
    """A checked config with its model, tokenizer and blocks of text by split."""

    config: RunConfig
    setup: Setup
    weights: Weights
    tokenizer: Tokenizer
    blocks: dict[str, data.Blocks]
    identity: dict[str, str]  # of the model, see `models.identity`
    mesh: Mesh  # that the weights lie on

    def split(self, name: str) -> data.Blocks:
        """The blocks of one split; `UserError` if the corpus was cut without it."""
        if name not in self.blocks and name == "train":
            raise UserError("config.data: validation_fraction and test_fraction leave no train text")
        if name not in self.blocks:
            raise UserError(f"there is no {name} text; config.data.{name}_fraction must be above 0")
        return self.blocks[name]


def open_session(config: RunConfig) -> Session:
    """Loads what a config names; raises `UserError` for whatever is wrong with it.

    With several processes all of them call this: the first prepares the text, and each loads the weights that
    its devices hold.
    """
    mesh, model, setup = hosts.together(lambda: _opened(config))
    blocks = hosts.first_then_others(
        lambda: data.prepare(
            config.data.source,
            model.tokenizer,
            block_length=setup.episode.block_length,
            validation_fraction=config.data.validation_fraction,
            test_fraction=config.data.test_fraction,
            document_start=config.data.document_start,
            cache_dir=config.data.cache_dir or None,
        )
    )
    seen = model.identity | {name: part.fingerprint for name, part in blocks.items()}
    hosts.check_same("the content of the ", seen)
    weights = hosts.together(lambda: model.weights)
    return Session(config, setup, weights, model.tokenizer, blocks, model.identity, mesh)


def _opened(config: RunConfig) -> tuple[Mesh, Model, Setup]:
    """The mesh, the model without its weights, and what a run with it has."""
    config.check_here()
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    model = open_model(config.model.path, config.model.dtype, mesh)
    check_divides(model.config, mesh)
    return mesh, model, config.setup(model.config)


def commit() -> str:
    """The commit of the code that runs, with a `+` if it was changed since; empty outside a checkout."""
    folder = pathlib.Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
