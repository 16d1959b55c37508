"""Everything a run's configuration stands for, loaded: what entry points share.

Cheap checks come before heavy loading, so that a mistake is reported in seconds.
"""

import dataclasses
import json
import pathlib
import subprocess

from ml_collections import ConfigDict

from sol_jax.errors import UserError
from sol_jax.models import weights as load
from sol_jax.models.llama import Weights
from sol_jax.models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sol_jax.rl.train_step import Setup
from sol_jax.runs import config as config_lib
from sol_jax.text import blocks as data


@dataclasses.dataclass(frozen=True)
class Session:
    """A checked config with its model, tokenizer and blocks of text by split."""

    config: ConfigDict
    setup: Setup
    weights: Weights
    tokenizer: Tokenizer
    blocks: dict[str, data.Blocks]

    def split(self, name: str) -> data.Blocks:
        """The blocks of one split; `UserError` if the corpus was cut without it."""
        if name not in self.blocks and name == "train":
            raise UserError("config.data: validation_fraction and test_fraction leave no train text")
        if name not in self.blocks:
            raise UserError(f"there is no {name} text; config.data.{name}_fraction must be above 0")
        return self.blocks[name]


def open_session(config: ConfigDict) -> Session:
    """Checks `config` and loads what it names; raises `UserError` for whatever is wrong with it."""
    config_lib.check(config)
    path = load.resolve(config.model.path)
    model = load.load_config(path, config.model.dtype)
    setup = config_lib.build(config, model)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, model)
    blocks = data.prepare(
        config.data.source,
        tokenizer,
        block_length=setup.episode.block_length,
        validation_fraction=config.data.validation_fraction,
        test_fraction=config.data.test_fraction,
        document_start=config.data.document_start,
        cache_dir=config.data.cache_dir or None,
    )
    return Session(config, setup, load.load_weights(path, model), tokenizer, blocks)


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config a training run left in its workdir."""
    file = workdir / "config.json"
    try:
        flat = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); --workdir must be the folder of a training run"
        ) from None
    return config_lib.restored(flat)


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
