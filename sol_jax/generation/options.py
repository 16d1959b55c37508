"""What a text is asked for: the flags of `sol_jax.generate`."""

import dataclasses
from typing import Literal

from pallas_kernels.dispatch import IMPLEMENTATIONS
from sol_jax.errors import UserError
from sol_jax.generation.engine import CONTROLLERS, Request
from sol_jax.generation.sampling import Sampling
from sol_jax.models.chat_template import chat_prompt
from sol_jax.models.tokenizer import Tokenizer
from sol_jax.models.weights import EMBEDDED
from sol_jax.options import MOST_SEED, Options, option


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Options):
    """A prompt, who picks the compute of each token, and how tokens are drawn."""

    where = "--"
    model: str = option(EMBEDDED, "a folder, a .gguf file, hub:OWNER/NAME or smollm2-135m", path=True)
    dtype: Literal["float32", "bfloat16"] = option("float32", "of weights, caches and matmul operands")
    kernels: str = option("auto", "how decode steps run", choices=("auto", *IMPLEMENTATIONS))
    policy: str | None = option(
        None, "a policy's name or folder, hub:OWNER/NAME, or the workdir of a training run", path=True
    )
    controller: str | None = option(
        None, "who picks the actions; default: the policy, if there is one, else dense", choices=CONTROLLERS
    )
    budget: str | None = option(None, "mean cost per axis, such as 0.5,0.7,0.5")
    prompt: str | None = option(None, "the text to continue")
    chat: bool = option(False, "the prompt is a user's message: apply the model's chat template")
    system: str = option("", "a system message before it")
    max_tokens: int = option(128, "tokens to generate at most", at_least=1)
    stop: tuple[str, ...] = option((), "a text before which to stop; can be given again", repeated=True)
    temperature: float = option(0.0, "0: always the most likely token", at_least=0)
    top_k: int = option(0, "draw from the k most likely tokens; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the most likely tokens that have this much probability")
    seed: int = option(0, "of what is drawn", at_least=0, at_most=MOST_SEED)
    restate: bool | None = option(
        None, "ask the policy for what is left of the budget; default: as it was trained"
    )
    policy_dtype: Literal["float32", "bfloat16"] = option("float32", "of the policy's matrices")
    refresh: bool = option(True, "replace compressed cache entries by dense ones after each episode")
    refresh_every: int = option(1, "do so after so many episodes, for all of them at once", at_least=1)
    lossless: bool = option(False, "keep only tokens that the dense model accepts")
    show_compute: bool = option(False, "shade each token by what was spent on it")
    mesh_model: int = option(
        1, "devices that share one copy of the weights; all others share the work", at_least=1
    )
    html: str | None = option(
        None, "a page to write: the text shaded by compute, beside the dense one", path=True
    )

    @property
    def chosen_controller(self) -> str:
        return self.controller or ("policy" if self.policy else "dense")

    @property
    def sampling(self) -> Sampling:
        """Raises `UserError` for a rule that cannot be."""
        try:
            return Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(str(error)) from None

    def costs(self) -> tuple[float, ...]:
        """The budget as numbers.  Raises `UserError` if it is none, or does not go with the controller."""
        controller = self.chosen_controller
        if controller == "policy" and not self.policy:
            raise UserError("the controller policy needs a --policy")
        if self.budget is None and controller != "dense":
            raise UserError(f"the controller {controller} needs a --budget, one number per axis: 0.5,0.7,0.5")
        if self.budget is not None and controller == "dense":
            raise UserError("--budget is for a policy or a schedule; dense decoding spends everything")
        try:
            return tuple(float(part) for part in (self.budget or "").split(",") if self.budget)
        except ValueError:
            raise UserError(
                f"--budget={self.budget}: it must be numbers with commas between, such as 0.5,0.7,0.5"
            ) from None

    def request(self, tokenizer: Tokenizer) -> Request:
        """The request for an engine.  Raises `UserError` if the prompt cannot be."""
        return Request(self._prompt(tokenizer), self.costs(), self.max_tokens, self.stop, self.seed)

    def check_complete(self) -> None:
        """Raises `UserError` for all that can be told without a model: no prompt, or no fitting budget."""
        self._text()
        self.costs()

    def _text(self) -> str:
        if self.prompt is None:
            raise UserError("give --prompt, the text to continue")
        if not self.prompt:
            raise UserError("--prompt is empty; give at least one character to continue")
        if self.system and not self.chat:
            raise UserError("--system is part of a conversation; it needs --chat")
        return self.prompt

    def _prompt(self, tokenizer: Tokenizer) -> list[int]:
        text = self._text()
        if self.chat:
            return chat_prompt(tokenizer, text, self.system)
        return tokenizer.encode(text, add_special_tokens=True)
