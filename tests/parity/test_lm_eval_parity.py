"""The lm-evaluation-harness adapter against the harness' own Hugging Face backend, on local tasks."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from experiments.tasks import item_records
from experiments.tasks import sweep as task_sweep
from experiments.tasks.prompts import Example
from sol_jax.downstream import continuations
from sol_jax.generation import engine
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import resolve
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files

torch = pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.parity

ROOT = pathlib.Path(__file__).parents[2]
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", " the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ITEMS = [
    ("Which of these is a bird?", ["a wall", "a seven-year-old grey parrot ", "mat"], 1),
    ("What covers most of the Earth?", ["water", "land", "ice sheets and snow"], 0),
    (
        "Once there were seven cats. They sat on a mat and saw grey birds. What did they see?",
        ["birds", "é"],
        0,
    ),
    ("What is 2 + 2?", ["3", "4", "5", "22"], 1),
    ("The sea is", [" salty", " blue and wide"], 0),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    """A folder with the items and three tasks about them."""
    folder = tmp_path_factory.mktemp("tasks")
    names = ("question", "choices", "answer")
    lines = (json.dumps(dict(zip(names, item, strict=True))) for item in ITEMS)
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    for text in (CHOICES, ROLLING, WRITING):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(folder / "items.jsonl")))
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_hub(tmp_path_factory):
    """Nothing is fetched, and what the `datasets` package keeps is thrown away."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def evaluate(model: Any, tasks: pathlib.Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=["choices", "rolling", "writing"], task_manager=manager, bootstrap_iters=0
    )


def hf_backend(model: Any, tokenizer: Any, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    named = {"eos_token": tokenizer.token(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        named["bos_token"] = tokenizer.token(tokenizer.bos_id)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend, **named)
    return HFLM(model.eval(), tokenizer=fast, max_length=max_length, device="cpu", batch_size=4)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Requests one by one, then the numbers: at most 0.1 point apart."""
    for task in ("choices", "rolling", "writing"):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["doc"] == other["doc"]
            if task == "writing":
                assert mine["resps"] == other["resps"]
                continue
            logp = lambda sample: np.array(
                [answer[0][0] if isinstance(answer[0], tuple) else answer[0] for answer in sample["resps"]]
            )
            np.testing.assert_allclose(logp(mine), logp(other), atol=1e-3)
            if task == "choices":
                assert [x[0][1] for x in mine["resps"]] == [x[0][1] for x in other["resps"]]
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, abs=1e-3), name


def test_a_tiny_model_with_long_texts(tmp_path, tasks):
    """A context of 48 tokens, bytes: questions are cut on the left, texts are scored in windows."""
    from sol_jax.downstream.lm_eval_adapter import SolJax

    folder = tiny.save_model(tmp_path / "model")
    ours = SolJax(str(folder), max_length=48, batch_size=8)
    original = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = hf_backend(original, load_tokenizer(folder), 48)
    compare(evaluate(ours, tasks), evaluate(theirs, tasks))


def test_smollm2(tasks):
    from sol_jax.downstream.lm_eval_adapter import SolJax

    path = resolve("smollm2-135m")
    original = transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = evaluate(hf_backend(original, load_tokenizer(path), 8192), tasks)
    del original
    compare(evaluate(SolJax("smollm2-135m"), tasks), theirs)


def test_items_are_rendered_as_the_harness_renders_them(tmp_path):
    """Its own task files, with one item each in the form of the hub's data sets."""
    import yaml
    from lm_eval.tasks.winogrande import preprocess_winogrande

    from experiments.tasks import prompts

    home = pathlib.Path(lm_eval.__file__).parent / "tasks"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)

    def file(name: str) -> dict[str, Any]:
        return yaml.load((home / name).read_text(), Loader)

    rendered = lm_eval.utils.apply_template
    item = {"id": "x", "question": " Is it \u00e9?", "choices": ["a b ", "c"], "answer": 1}
    arc, piqa = prompts.TASKS["arc_easy"].render(item), prompts.TASKS["piqa"].render(item)
    text = rendered(file("arc/arc_easy.yaml")["doc_to_text"], {"question": item["question"]})
    assert arc.pairs == ((text, " a b "), (text, " c"))
    assert piqa.pairs[0][0] == rendered(file("piqa/piqa.yaml")["doc_to_text"], {"goal": item["question"]})
    subject = "high_school_chemistry"
    mmlu = prompts.TASKS[f"mmlu_{subject}"].render(item | {"subject": subject})
    said = file(f"mmlu/continuation/mmlu_{subject}.yaml")["description"]
    shared = file("mmlu/continuation/_continuation_template_yaml")["doc_to_text"]
    assert mmlu.pairs[1] == (said + rendered(shared, item), " c")
    gap = {"sentence": "It was _ who sat.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    wino = prompts.TASKS["winogrande"].render(
        {"id": "x", "question": gap["sentence"], "choices": ["Ann", "Bo"], "answer": 1}
    )
    end = f" {preprocess_winogrande.doc_to_target(gap)}"
    assert wino.pairs == tuple((begin, end) for begin in preprocess_winogrande.doc_to_choice(gap))
    assert wino.answer == preprocess_winogrande.doc_to_text(gap)
    cot = file("gsm8k/gsm8k-cot.yaml")
    question = {"question": "1+1?"}
    gsm = prompts.TASKS["gsm8k"].render(
        {"id": "x", **question, "answer_text": "It is 2.\n#### 2", "answer_number": 2}
    )
    assert gsm.pairs[0][0] == rendered(cot["doc_to_text"], question)
    assert set(prompts.STOPS) == set(cot["generation_kwargs"]["until"])


@pytest.fixture(scope="module")
def policy(tiny_session, tmp_path_factory) -> str:
    """The folder of an untrained policy."""
    folder = tmp_path_factory.mktemp("policy") / "named"
    about = {"title": "named", "model": "model", "documents": [], "updates": 0, "seed": 0}
    about |= {"command": "none", "commit": "none"}
    params = init_state(jax.random.key(0), tiny_session.setup).params
    policy_files.save_policy(folder, params, tiny_session.config, about)
    return str(folder)


@pytest.mark.parametrize("controller", ["policy", "dense"])
def test_lines_say_what_was_spent(tmp_path, tiny_folder, policy, controller):
    """Bytes and operations of a scored and a written answer, counted as `experiments.tasks.sweep` does."""
    from lm_eval.api.instance import Instance

    from sol_jax.downstream.lm_eval_adapter import SolJax

    budget, output = (0.5, 0.7, 0.6) if controller == "policy" else (), tmp_path / "costs.jsonl"
    asked = ":".join(map(str, budget)) or None
    model = SolJax(str(tiny_folder / "model"), policy, controller, asked, output=str(output))
    own, pair = model._engine, ("the cat sat", " on a mat and saw")

    def ask(kind: str, *args: Any) -> list[Any]:
        return [Instance(kind, {}, args, 0, ("task", 0, 1))]

    model.loglikelihood(ask("loglikelihood", *pair))
    for longest in (12, 1):
        model.generate_until(ask("generate_until", pair[0], {"until": ["zz"], "max_gen_toks": longest}))
    model.loglikelihood_rolling(ask("loglikelihood_rolling", pair[1]))
    scored, written, nothing, rolled = (json.loads(line) for line in output.read_text().splitlines())
    request = continuations.Continuation(*(tuple(model.tok_encode(text)) for text in pair))
    found = continuations.score(own, [request], budget)
    record = task_sweep.record_of_scores(Example("", (pair,)), [request], found, own)
    (text,) = engine.generate(own, [engine.Request(request.context, budget, 12, ("zz",))])
    spent, dense = text_cost(text, own.cfg).total, dense_text_cost(text, own.cfg.model).total
    for name, share in item_records.shares([record]).items():
        assert scored[name] == pytest.approx(share)
        assert written[name] == pytest.approx(getattr(spent, name) / getattr(dense, name))
        assert nothing[name] == 1  # the prefill gave its token
        for line in (scored, written, rolled):
            assert (line[name] == 1) == (controller == "dense")
    assert [line["tokens"] for line in (scored, written, rolled)] == [len(pair[1]), 12, len(pair[1])]
    np.testing.assert_allclose(list(written["realised"].values()), text.mean_cost(own.cfg.space.costs_AxX))


def test_repeated_requests_are_samples(tiny_folder):
    """As a task with `repeats` asks; the same again in another run, and the same where nothing is drawn."""
    from lm_eval.api.instance import Instance

    from sol_jax.downstream.lm_eval_adapter import SolJax

    model = SolJax(str(tiny_folder / "model"))

    def ask(**drawn: Any) -> list[str]:
        kwargs = {"until": [], "max_gen_toks": 12, **drawn}
        requests = [Instance("generate_until", {}, ("the cat", kwargs), n, ("task", 0, 4)) for n in range(4)]
        return model.generate_until(requests)

    sampled = ask(do_sample=True)  # at temperature 1, as transformers has it
    assert len(set(sampled)) == 4
    assert ask(do_sample=True) == sampled
    assert len(set(ask(do_sample=False))) == 1


@pytest.mark.parametrize("begun", [False, True])
def test_conversations_are_spelled_as_the_harness_spells_them(begun):
    """With an answer to come, and with one that was begun (`gen_prefix`)."""
    from lm_eval.models.huggingface import HFLM

    from sol_jax.downstream.lm_eval_adapter import SolJax

    ours = SolJax.__new__(SolJax)
    ours.tokenizer = load_tokenizer(resolve("smollm2-135m"))
    theirs = HFLM.__new__(HFLM)
    theirs.chat_template_args = {}
    theirs.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.tokenizer._backend,
        chat_template=ours.tokenizer.chat_template,
        bos_token=ours.tokenizer.token(ours.tokenizer.bos_id),
        eos_token=ours.tokenizer.token(ours.tokenizer.eos_id),
    )
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    history += [{"role": "assistant", "content": "The answer is"}] * begun
    wanted = theirs.apply_chat_template(history, add_generation_prompt=not begun)
    assert ours.apply_chat_template(history, add_generation_prompt=not begun) == wanted
    assert wanted.endswith("The answer is") == begun


def test_the_command_line_exports_realised_budgets(tmp_path, tasks):
    """A fixed schedule: a line per request, whose costs average to the budget; mistakes in one sentence."""
    folder, output = tiny.save_model(tmp_path / "model"), tmp_path / "costs.jsonl"

    def run(args: str, *more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "sol_jax.lm_eval_adapter", "--model", "sol_jax", "--batch_size", "8"]
        command += ["--tasks", "choices,writing", "--include_path", str(tasks), "--model_args", args, *more]
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        return subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)

    ended = run(f"path={folder},controller=fixed,budget=0.5:0.7:0.6,output={output}")
    assert ended.returncode == 0, ended.stderr
    assert "acc_norm" in ended.stdout
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("loglikelihood") == sum(len(choices) for _, choices, _ in ITEMS)
    assert kinds.count("generate_until") == len(ITEMS)
    scored = [line for line in lines if line["kind"] == "loglikelihood"]
    weights = [line["tokens"] for line in scored]
    for name, wanted in zip(("kappa", "rho", "eta"), (0.5, 0.7, 0.6), strict=True):
        realised = np.average([line["realised"][name] for line in scored], weights=weights)
        assert realised == pytest.approx(wanted, abs=0.01)
        assert scored[0]["requested"][name] == wanted
    assert all(line[name] > 0 for line in lines for name in ("bytes", "flops"))
    for args, told in {
        f"path={folder},controller=fixed": "budget",
        f"path={folder},controller=fixed,budget=0.5:x:0.6": "budget=0.5:x:0.6",
        f"path={folder},controller=fixed,budget=0.5:0.7:1.6": "1.6",
        f"path={folder},controller=policy": "needs a",
        f"path={folder},budget=0.5:0.7:0.6": "budget is for a policy or a schedule",
        "path=nowhere": "nowhere",
    }.items():
        ended = run(args)
        assert ended.returncode == 2, ended.stderr
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert told in line
