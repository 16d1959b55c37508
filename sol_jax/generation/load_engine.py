"""An engine from names: model, policy, controller.  What the entry points that decode freely share."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import logging

from pallas_kernels.dispatch import choose
from pallas_kernels.errors import UnavailableError
from sol_jax.axes.base import ActionSpace, AxisContext, held_full
from sol_jax.axes.config import full_levels
from sol_jax.errors import UserError
from sol_jax.generation.engine import Engine, Request, check_request
from sol_jax.generation.episodes import Decoder, usual_prefill_batch
from sol_jax.generation.lean_policy import with_dtype
from sol_jax.generation.options import GenerateOptions
from sol_jax.models.llama import LlamaConfig
from sol_jax.models.model import Model, open_model
from sol_jax.models.sharding import check_divides, make_mesh
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup
from sol_jax.runs import policy_files
from sol_jax.runs.config import RunConfig
from sol_jax.runs.trained_policy import find_policy


def show_log() -> None:
    """Shows what the library logs, such as shapes that compile; for programs without `app.run`."""
    logging.set_verbosity(logging.INFO)


def open_policy(name: str, model: Model, cfg: LlamaConfig) -> tuple[Any, Setup]:
    """A policy's parameters, and the setup of its training with `model`, run as `cfg`, in place of its own.

    Raises `UserError` if there is none, or if it was trained for another model or other actions.
    """

    def here(config: RunConfig) -> RunConfig:
        return config.with_fields({"model.path": model.name})

    found, about = find_policy(name, model.identity, lambda config: here(config).setup(cfg))
    run = here(found.config)
    setup = run.setup(cfg)
    policy_files.check_fits(name, found.params, found.config, about, run, setup, model.identity)
    return found.params, setup


def open_engine(
    model: str | Model,
    policy: str | None = None,
    controller: str | None = None,
    dtype: str = "float32",
    kernels: str = "auto",
    check: Callable[[Engine], Any] = lambda engine: None,
    restate: bool | None = None,
    policy_dtype: str = "float32",
    mesh_model: int = 1,
    **options: Any,
) -> Engine:
    """The engine of a model and a controller, over the levels of a policy or, without one, of SOL-J-FL.

    Args:
      model: a model, or the name of one (see `open_model`), which is then opened in `dtype`.
      policy: a policy's name or folder, or the workdir of a training run.
      controller: default: the policy, if there is one, else dense.
      check: called with the engine before its weights are loaded, to refuse what cannot be done with it.
      restate: whether the policy is asked for what is left of the budget; default: as it was trained.
      policy_dtype: of the policy's matrices; bfloat16 ones are read twice as fast, and rounded.
      mesh_model: devices that share one copy of the weights; texts of a batch are shared out among all
      others.
      options: fields of the decoder.

    Raises `UserError` for whatever is wrong with these.
    """
    controller = controller or ("policy" if policy else "dense")
    if controller == "policy" and not policy:
        raise UserError("the controller policy needs a --policy")
    if restate is not None and controller != "policy":
        raise UserError(
            f"--restate says how a policy is asked, and the controller is {controller}; leave it out"
        )
    mesh = make_mesh(-1, mesh_model)
    opened = model if isinstance(model, Model) else open_model(model, dtype, mesh)
    if mesh_model > 1:
        check_divides(opened.config, mesh)
        if kernels not in ("auto", "xla"):
            raise UserError(f"--kernels is {kernels}; it must be auto or xla where --mesh_model is above 1")
        kernels = "xla"  # XLA cannot cut kernels
    try:
        choose("attend", kernels)
    except UnavailableError as error:
        raise UserError(f"--kernels: {error}") from None
    cfg = dataclasses.replace(opened.config, kernels=kernels)
    params, network = None, None
    if policy:
        params, setup = open_policy(policy, opened, cfg)
        params = with_dtype(params, policy_dtype)
        space, episode, network = setup.space, setup.episode, setup.policy
        network = dataclasses.replace(network, config=network.config.asked(restate))
    else:
        space, episode = ActionSpace(full_levels().build(AxisContext(kernels))), EpisodeConfig()
    space = ActionSpace(tuple(dataclasses.replace(axis, kernels=kernels) for axis in space.axes))
    if controller == "dense":
        space = ActionSpace(held_full(space.axes))
    if controller != "policy":
        params, network = None, None
    if controller == "dense" and not options.get("lossless"):
        options["refresh"] = False  # without compression there is nothing to refresh
    options.setdefault("prefill_batch", usual_prefill_batch())
    try:
        shows_logit = network is not None and network.config.logit_input
        decoder = Decoder(EpisodeRules(cfg, space, episode, shows_logit), network, **options)
        engine = Engine({}, opened.tokenizer, decoder, controller, params, opened.identity)
        check(engine)
    except ValueError as error:
        raise UserError(str(error)) from None
    return dataclasses.replace(engine, weights=opened.weights)


def engine_for(options: GenerateOptions) -> tuple[Engine, Request]:
    """The engine and the request of a command line, checked before the weights are loaded."""
    options.check_complete()  # a slip there is told before anything is opened
    found: list[Request] = []

    def check(engine: Engine) -> None:
        found.append(options.request(engine.tokenizer))
        check_request(found[0], engine.cfg, engine.controller)

    engine = open_engine(
        options.model,
        options.policy,
        options.chosen_controller,
        options.dtype,
        options.kernels,
        check,
        options.restate,
        options.policy_dtype,
        options.mesh_model,
        sampling=options.sampling,
        refresh=options.refresh,
        refresh_every=options.refresh_every,
        lossless=options.lossless,
    )
    return engine, found[0]
