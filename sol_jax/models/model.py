"""A frozen language model by name: architecture and tokenizer at once, weights when they are needed."""

import dataclasses
import functools
import pathlib

from jax.sharding import Mesh

from sol_jax.models.identity import model_identity
from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.models.sharding import weight_shardings
from sol_jax.models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sol_jax.models.weights import EMBEDDED, load_config, load_weights, resolve


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What everything that decodes needs of a model."""

    name: str  # as it was asked for
    path: pathlib.Path  # of its folder or file
    config: LlamaConfig
    tokenizer: Tokenizer
    identity: dict[str, str]  # see `models.identity`
    mesh: Mesh | None = None

    @functools.cached_property
    def weights(self) -> Weights:
        """Loaded at the first use, onto the mesh or, without one, the default device."""
        shardings = None if self.mesh is None else weight_shardings(self.config, self.mesh)
        return load_weights(self.path, self.config, shardings)


def open_model(name: str = EMBEDDED, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """Opens a model: `smollm2-135m`, a Hugging Face folder, a `.gguf` file or `hub:OWNER/NAME`.

    Args:
      dtype: of weights, caches and matmul operands; sums are float32.
      mesh: of devices, which the weights go to; see `models.sharding`.

    Raises `UserError` if there is no such model, or if it has something that would not be honoured.
    """
    path = resolve(name)
    config = load_config(path, dtype)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config)
    return Model(name, path, config, tokenizer, model_identity(path, config, tokenizer), mesh)
