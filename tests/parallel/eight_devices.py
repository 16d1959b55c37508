"""What updates, evaluations and texts are on meshes of eight virtual devices, as JSON: run by `test_mesh`.

JAX_NUM_CPU_DEVICES=8 python tests/parallel/eight_devices.py
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import tempfile

import jax
import numpy as np
import tiny

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.downstream.continuations import Continuation, score
from sol_jax.evaluation.scoring import POLICY, REPLAY, BatchScorer, ControllerSpec
from sol_jax.generation.engine import Engine, Request, generate
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.sampling import Sampling
from sol_jax.models import llama, sharding
from sol_jax.models import weights as weight_files
from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, OptimConfig, PolicyConfig
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup
from sol_jax.rl.sharded_update import draw_batch, play_chunk, sharded_update
from sol_jax.rl.train_step import init_state, jit_train_step
from sol_jax.runs.config import policy_spec

MODEL = LlamaConfig(64, 32, 64, 2, 8, 4, 8, 256, 1e4, 1e-5, tie_embeddings=False)
SPACE = ActionSpace(
    (
        Quest((0.1, 1.0), (0.1, 1.0), 100.0),
        ChannelPruning((0.4, 1.0), (0.4, 1.0), 100.0),
        OutputQuantization((5, 16), (0.3125, 1.0), 200.0),
    )
)
BATCH = 5  # which no mesh divides


def setup_of(learner: str, jitter: int = 0, kernels: str = "auto", sampling: str = "independent") -> Setup:
    model = dataclasses.replace(MODEL, kernels=kernels)
    rules = EpisodeRules(model, SPACE, EpisodeConfig(24, 4, episodes_per_prefix=2, jitter=jitter))
    config = PolicyConfig(d_model=32, num_heads=2, predict_losses=learner == "counterfactual")
    policy = policy_spec(config, rules, page_size=8)
    grpo = GrpoConfig(batch_size=BATCH, num_schedules=4, sampling=sampling)
    optim = OptimConfig(learning_rate=1e-3, minibatch_steps=32, accumulate=2)
    return Setup(rules, policy, grpo, optim, learner=learner)


SETUPS = {
    "grpo": setup_of("grpo", jitter=3),
    "counterfactual": setup_of("counterfactual"),
    "stratified": setup_of("grpo", sampling="stratified"),
}
# Rows, by chunk.
MESHES = {"grpo": {1: (1, 2, 3, 8)}, "counterfactual": {1: (1, 3)}, "stratified": {2: (1, 3)}}
TOKENS_BxN = np.random.default_rng(0).integers(0, 64, (BATCH, SETUPS["grpo"].episode.block_length), np.int32)
WEIGHTS = llama.init_weights(jax.random.key(7), MODEL)


def on_mesh(data: int, model: int = 1):
    mesh = sharding.make_mesh(data, model)
    return mesh, jax.device_put(WEIGHTS, sharding.weight_shardings(MODEL, mesh))


def flat(state) -> np.ndarray:
    return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(state.params)])


def name_of(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def updated(setup: Setup, data: int, model: int = 1, chunk: int = 1, updates: int = 2) -> np.ndarray:
    """Parameters after some updates, in which a row plays no more blocks than its share, filled up."""
    (mesh, weights), state = on_mesh(data, model), init_state(jax.random.key(0), setup)
    asked = []

    def read(places):
        asked.extend(places.tolist())
        return TOKENS_BxN[places]

    for _ in range(updates):
        state, _ = sharded_update(state, weights, read, setup, mesh, chunk)
    assert set(asked) == set(range(BATCH))
    assert len(asked) == updates * data * chunk * -(-BATCH // (data * chunk))
    return flat(state)


def compiled(model: int = 1, chunk: int = 1):
    """The program that a row runs for a chunk."""
    mesh, weights = on_mesh(8 // model, model)
    setup = setup_of("grpo", kernels="xla")
    state = init_state(jax.random.key(0), setup)
    drawn = draw_batch(state.key, state.step, setup=setup)
    drawn = drawn._replace(key_BxWxK=jax.random.key_data(drawn.key_BxWxK))
    row = sharding.rows_here(mesh)[-1]
    places = np.arange(chunk)
    given = row.put(((state.params, drawn), TOKENS_BxN[places], places))
    return play_chunk.lower(given[0], row.of(weights), *given[1:], setup=setup).compile()


def flops(program) -> float:
    analysis = program.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def collectives(program) -> list[str]:
    found = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return sorted(re.findall(found, program.as_text()))


def scores(data: int, model: int, tokens_BxN: np.ndarray) -> dict[str, np.ndarray]:
    """Of a policy and of given schedules, on blocks that no mesh divides."""
    setup = setup_of("grpo", kernels="xla") if model > 1 else SETUPS["grpo"]
    weights = WEIGHTS if data == 0 else on_mesh(data, model)[1]
    params = init_state(jax.random.key(0), setup).params
    scorer = BatchScorer(weights, params, tokens_BxN, setup, len(tokens_BxN), 3)
    budget = np.broadcast_to(np.float32([0.5, 0.7, 0.6]), (len(tokens_BxN), 2, 1, 3))
    given = np.random.default_rng(1).integers(0, SPACE.num_actions, (len(tokens_BxN), 2, 4, 4))
    by_policy = scorer.play(budget, ControllerSpec(POLICY, with_entropy=True))
    replayed = scorer.play(given, ControllerSpec(REPLAY))
    return {
        "policy": by_policy.logp_NxWxJxT,
        "entropy": by_policy.entropy_NxWxJxT,
        "action": by_policy.action_NxWxJxT,
        "replayed": replayed.logp_NxWxJxT,
    }


def texts() -> dict[str, dict]:
    """Three texts as they are drawn, and given ones as they are scored: alone, and shared out."""
    found = {}
    requests = [Request([3, 5, 7 + n], (0.5, 0.7, 0.6), max_tokens=6, seed=n) for n in range(3)]
    given = [Continuation(tuple(range(4, 12 + n)), tuple(range(20, 25 + n))) for n in range(3)]
    setup = setup_of("grpo", kernels="xla")
    params = init_state(jax.random.key(0), setup).params
    for name, weights in {"alone": WEIGHTS, "3x1": on_mesh(3)[1], "2x4": on_mesh(2, 4)[1]}.items():
        decoder = Decoder(setup.rules, setup.policy, Sampling(temperature=1.0))
        engine = Engine(weights, Bytes(), decoder, "policy", params)
        outputs = generate(engine, requests)
        scores = score(engine, given, (0.5, 0.7, 0.6), batch_size=2)
        logp = np.concatenate([score.logp_N for score in scores]).tolist()
        found[name] = {"tokens": [output.transcript.ids for output in outputs], "logp": logp}
    return found


def loaded() -> dict[str, float]:
    """A model's files read onto four rows of two devices: how far from reading them whole, and how often."""
    read = []
    part = weight_files._Leaf.part

    def counted(leaf, index):
        values = part(leaf, index)
        read.append(values.size)
        return values

    with tempfile.TemporaryDirectory() as folder:
        path = tiny.save_model(pathlib.Path(folder) / "model")
        cfg = weight_files.load_config(path)
        whole = weight_files.load_weights(path, cfg)
        mesh = sharding.make_mesh(4, 2)
        weight_files._Leaf.part = counted
        cut = weight_files.load_weights(path, cfg, sharding.weight_shardings(cfg, mesh))
    pairs = list(zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True))
    held = {leaf.addressable_shards[0].data.size / leaf.size for _, leaf in pairs if leaf.ndim > 2}
    return {
        "off": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs),
        "read": sum(read) / sum(leaf.size for leaf, _ in pairs),
        "held": max(held),
    }


class Bytes:
    """A tokenizer of numbers."""

    end_ids = frozenset({63})
    eos_id = 63

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def told(learner: str) -> dict:
    setup = SETUPS[learner]
    state = init_state(jax.random.key(0), setup)
    start = name_of(flat(state))
    for _ in range(2):
        state, _ = jit_train_step(state, WEIGHTS, TOKENS_BxN, setup=setup)
    ((chunk, meshes),) = MESHES[learner].items()
    of_mesh = {data: updated(setup, data, chunk=chunk) for data in meshes}
    return {
        "start": start,
        "names": {data: name_of(values) for data, values in of_mesh.items()},
        "from one program": float(np.abs(of_mesh[1] - flat(state)).max()),
        "size": float(np.abs(of_mesh[1]).max()),
    }


def main() -> None:
    found = {learner: told(learner) for learner in SETUPS}
    by_xla = setup_of("grpo", kernels="xla")
    one = updated(by_xla, 1)
    by_model = {(data, model): updated(by_xla, data, model) for data, model in ((1, 2), (3, 2), (2, 4))}
    found["model"] = {
        "names": {f"{data}x{model}": name_of(values) for (data, model), values in by_model.items()},
        "off": {
            f"{data}x{model}": float(np.abs(values - one).max()) for (data, model), values in by_model.items()
        },
    }
    programs = {model: compiled(model) for model in (1, 2, 4)}
    found["flops"] = {model: flops(program) for model, program in programs.items()}
    found["collectives"] = {model: collectives(program) for model, program in programs.items()}
    alone = scores(0, 1, TOKENS_BxN)
    found["evaluation"] = {
        f"{data}x{model}": {
            name: float(np.abs(values - alone[name]).max())
            for name, values in scores(data, model, TOKENS_BxN).items()
        }
        for data, model in ((3, 1), (2, 4))
    }
    found["texts"] = texts()
    found["weights"] = loaded()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
