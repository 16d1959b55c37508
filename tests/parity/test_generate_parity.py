"""Generation against `transformers`: greedy texts of SmolLM2, chat prompts, and the sampling rules."""

import jax
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.generation.engine import Engine, Request, generate
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.sampling import Sampling, token_logp
from sol_jax.models.chat_template import render
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model, resolve
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import EpisodeRules

torch = pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SPACE = ActionSpace(
    (
        Quest((0.1, 1.0), (0.1, 1.0), 100.0),
        ChannelPruning((0.4, 1.0), (0.4, 1.0), 100.0),
        OutputQuantization((5.0, 16.0), (0.3125, 1.0), 200.0),
    )
)
TEXTS = (
    "The",
    "Once upon a time, in a village by the sea,",
    "Question: Why is the sky blue, and why do sunsets look red instead? Answer in two sentences.\nAnswer:",
)


@pytest.mark.parametrize("options", [{}, {"lossless": True}], ids=["refreshed", "lossless"])
def test_smollm2_writes_what_transformers_writes(options):
    """Dense actions, and compressed ones that the dense model checks; three lengths in one batch."""
    path = resolve("smollm2-135m")
    original = transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer, (model, weights) = load_tokenizer(path), load_model(path)
    decoder = Decoder(EpisodeRules(model, SPACE, EpisodeConfig(horizon=8)), **options)
    engine = Engine(weights, tokenizer, decoder, "fixed" if options else "dense")
    requests = [Request(tokenizer.encode(text), (0.6, 0.8, 0.7), max_tokens=30) for text in TEXTS]
    for output, request in zip(generate(engine, requests), requests, strict=True):
        with torch.no_grad():
            ids = torch.tensor([request.prompt])
            theirs = original.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0,
                eos_token_id=tokenizer.eos_id,
            )  # fmt: skip
        assert output.transcript.ids == theirs[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize(
    "template",
    [
        None,  # SmolLM2's own
        "{{ bos_token }}\n{% for m in messages %}\n  {%- if m.role == 'user' %}\n[{{ m.content | trim }}]\n"
        "  {% endif %}\n{% endfor %}{{ messages | tojson }}{% if add_generation_prompt %}>{% endif %}",
    ],
)
def test_chat_templates(template):
    tokenizer = load_tokenizer("smollm2-135m")
    template = template or tokenizer.chat_template
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend,
        chat_template=template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    messages = [{"role": "user", "content": "  Is 1 < 2 & é?\n"}, {"role": "assistant", "content": "Yes"}]
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(template, messages, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}) == wanted


@pytest.mark.parametrize("rule", [Sampling(0.7, 5), Sampling(1.3, 0, 0.8), Sampling(0.9, 20, 0.6)])
def test_sampling_rules(rule):
    logits_V = np.array(3 * jax.random.normal(jax.random.key(0), (200,)))
    scores = torch.from_numpy(logits_V)[None]
    steps = [transformers.TemperatureLogitsWarper(rule.temperature)]
    steps += [transformers.TopKLogitsWarper(rule.top_k)] if rule.top_k else []
    steps += [transformers.TopPLogitsWarper(rule.top_p)] if rule.top_p < 1 else []
    for step in steps:
        scores = step(None, scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    np.testing.assert_allclose(np.exp(token_logp(logits_V, rule)), wanted, atol=1e-6)
