"""Downstream tasks as contexts and continuations, rendered as the lm-evaluation-harness does (0.4.13).

    prompts.load(folder, "arc_easy")

reads `arc_easy/test.jsonl` and the like (`TASKS` names the file of each task).  An item is
`{"id", "question", "choices", "answer"}`; of MMLU it also has `subject`; of GSM8K it is
`{"id", "question", "answer_text", "answer_number"}`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from sol_jax.downstream.continuations import Continuation, truncated
from sol_jax.errors import UserError
from sol_jax.files import parse_json
from sol_jax.models.tokenizer import Tokenizer

SUBJECTS = ("conceptual_physics", "high_school_chemistry", "international_law")
STOPS = ("Q:", "</s>", "<|im_end|>")  # of a GSM8K answer


@dataclasses.dataclass(frozen=True)
class Example:
    """One item: pairs of context and continuation of which `answer` is the right one; or a prompt."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    answer: int = 0
    # By which log-likelihoods are divided in length-normalised accuracy: characters of the choices.
    lengths: tuple[int, ...] = ()
    number: str = ""  # to be found at the end of a free answer to the only pair's context


def _question(item: dict[str, Any]) -> Example:
    context = f"Question: {item['question']}\nAnswer:"
    pairs = tuple((context, f" {choice}") for choice in item["choices"])
    return Example(item["id"], pairs, item["answer"], tuple(map(len, item["choices"])))


def _mmlu(item: dict[str, Any]) -> Example:
    """MMLU in continuation format: the answers themselves instead of letters, no examples."""
    topic = item["subject"].replace("_", " ")
    plain = _question(item | {"question": item["question"].strip()})
    said = f"The following are questions (with answers) about {topic}.\n\n"
    return dataclasses.replace(plain, pairs=tuple((said + context, end) for context, end in plain.pairs))


def _winogrande(item: dict[str, Any]) -> Example:
    """Partial scoring: how likely the rest of the sentence is after each of the fillers."""
    before, after = item["question"].split("_")
    pairs = tuple((before + choice, f" {after.strip()}") for choice in item["choices"])
    return Example(item["id"], pairs, item["answer"])


def _solution(item: dict[str, Any]) -> str:
    """A reference solution in the words of the examples before it: no calculator marks, one line."""
    text = re.sub(r"<<.*?>>", "", item["answer_text"].split("####")[0])
    return f"{' '.join(text.split())} The answer is {item['answer_number']}."


def _gsm8k(item: dict[str, Any]) -> Example:
    pairs = ((f"Q: {item['question']}\nA:", f" {_solution(item)}"),)
    return Example(item["id"], pairs, number=_plain(str(item["answer_number"])))


def _plain(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)


def is_right(text: str, example: Example) -> bool:
    """Whether a free answer ends as the examples do, with the right number (`strict-match`)."""
    found = re.search(r"The answer is (\-?[0-9\.\,]+).", text)
    return found is not None and _plain(found[1]) == example.number


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's items lie and how they are rendered."""

    file: str
    render: Callable[[dict[str, Any]], Example]
    subject: str = ""
    shots: str = ""  # a file of examples that come first
    free: bool = False  # answers are generated instead of scored


TASKS = {
    "arc_easy": Task("arc_easy/test.jsonl", _question),
    "piqa": Task("piqa/valid.jsonl", _question),
    "winogrande": Task("winogrande/dev.jsonl", _winogrande),
    **{f"mmlu_{subject}": Task("mmlu/test.jsonl", _mmlu, subject) for subject in SUBJECTS},
    "gsm8k": Task("gsm8k/test.jsonl", _gsm8k, shots="gsm8k/cot8.jsonl"),
    "gsm8k_answers": Task("gsm8k/test.jsonl", _gsm8k, shots="gsm8k/cot8.jsonl", free=True),
}


def named(names: Sequence[str]) -> list[str]:
    """Names of tasks, with `mmlu` for its three subjects; `UserError` for one that is unknown."""
    found = []
    for name in names:
        found += [f"mmlu_{subject}" for subject in SUBJECTS] if name == "mmlu" else [name]
    unknown = [name for name in found if name not in TASKS]
    if unknown:
        raise UserError(
            f"there is no task {unknown[0]!r}; tasks are {', '.join(TASKS)}, and mmlu for its three"
        )
    return found


def load(folder: pathlib.Path, name: str) -> list[Example]:
    """All items of a task, in order; `UserError` if its file is missing or an item is malformed."""
    task = TASKS[name]
    items = _read(folder / task.file, task)
    if task.subject:
        items = [item for item in items if item["subject"] == task.subject]
    if not items:
        raise UserError(f"{folder / task.file} has no items of {name}")
    examples = [task.render(item) for item in items]
    if task.shots:
        shots = _read(folder / task.shots, task)
        said = "".join(f"Q: {shot['question']}\nA: {shot['answer_text']}\n\n" for shot in shots)
        examples = [
            dataclasses.replace(e, pairs=tuple((said + context, end) for context, end in e.pairs))
            for e in examples
        ]
    return examples


def _read(path: pathlib.Path, task: Task) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # and not at other ends of lines, in texts
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8"
        raise UserError(
            f"{path} cannot be read ({why.lower()}); --data must be a folder of task folders"
        ) from None
    items, ids = [], set()
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                item = parse_json(line)
                _check(item, task)
                if item["id"] in ids:
                    raise ValueError(f"the id {item['id']!r} is that of an earlier item")
            except ValueError as error:
                raise UserError(f"{path}, line {n}: {error}") from None
            items.append(item)
            ids.add(item["id"])
    return items


def _check(item: Any, task: Task) -> None:
    """Raises `ValueError` saying what is wrong with an item."""
    fields: dict[str, Any] = {"id": str, "question": str}
    if task.shots:
        fields |= {"answer_text": str, "answer_number": (int, float, str)}
    else:
        fields |= {"choices": list, "answer": int}
    fields |= {"subject": str} if task.subject else {}
    if not isinstance(item, dict):
        raise ValueError("an item must be a JSON object")
    for name, kind in fields.items():
        if not isinstance(item.get(name), kind) or isinstance(item[name], bool):
            raise ValueError(f"the item's {name!r} is {item.get(name)!r}, not of its kind")
    if task.shots:
        return
    choices = item["choices"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("the item's 'choices' must be two texts or more")
    if not 0 <= item["answer"] < len(choices):
        raise ValueError(
            f"the item's 'answer' is {item['answer']}, and its choices are 0 to {len(choices) - 1}"
        )
    if task.render is _winogrande and item["question"].count("_") != 1:
        raise ValueError("the item's 'question' must have one _ to be filled in")


def encode(tokenizer: Tokenizer, context: str, continuation: str, max_position: int) -> Continuation:
    """Tokens of a pair: split as one text, spaces at the context's end counted to the continuation.

    With the special tokens that the tokenizer begins texts with, as the lm-evaluation-harness has it.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation, add_special_tokens=True)
    before = tokenizer.encode(kept, add_special_tokens=True)
    return truncated(before, whole[len(before) :], max_position)
