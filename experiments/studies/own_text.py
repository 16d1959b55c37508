"""Text that the model writes itself, to train a policy on (`--config.data.source=FILE`).

    python -m experiments.studies.own_text --source data/train_books/books.jsonl.gz --num_prompts 512 \\
        --output runs/dense.jsonl
    python -m experiments.studies.own_text --source data/train_books/books.jsonl.gz --num_prompts 512 \\
        --policy smollm2-135m/sol-j-fl --budget 0.4,0.6,0.5 --output runs/compressed.jsonl

Reads documents and writes lines of JSON.  Each line is a passage's beginning and its continuation, drawn at
`--temperature` from the dense model, or from the model under a policy.  Passages lie `--stride` tokens apart
in their documents.  A line that is there already stays, so that a killed run goes on where it stopped.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence

from experiments.tasks.item_records import append_lines
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_argument
from sol_jax.generation.engine import Engine, Request, generate
from sol_jax.generation.load_engine import open_engine, show_log
from sol_jax.generation.sampling import Sampling
from sol_jax.models.weights import EMBEDDED
from sol_jax.runs.metrics import progress
from sol_jax.text.documents import read_documents


def passages(engine: Engine, source: str, length: int, stride: int) -> Iterator[list[int]]:
    """Beginnings of `length` tokens, taken in turn from all documents, `stride` tokens apart in each."""
    documents = [document.text for document in read_documents(source)]
    offset = 0
    while documents:
        left = []
        for text in documents:
            # A token has several characters, and what is left over is not needed.
            tokens = engine.tokenizer.encode(text[offset : offset + 20 * length])[:length]
            if len(tokens) == length:
                yield list(tokens)
                left.append(text)
        documents, offset = left, offset + 4 * stride


def lines(engine: Engine, requests: Sequence[Request]) -> list[str]:
    """A line of JSON per request: its prompt and what the engine made of it, as one text."""
    texts = [
        engine.tokenizer.decode([*request.prompt, *output.transcript.ids])
        for request, output in zip(requests, generate(engine, requests), strict=True)
    ]
    return [
        json.dumps({"id": f"own-{request.seed}", "text": text})
        for request, text in zip(requests, texts, strict=True)
    ]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--policy", help="a name, a folder or a workdir; default: the dense model writes")
    parser.add_argument("--budget", default="", help="of the policy: a cost per axis")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--source", required=True, help="text whose passages are continued")
    parser.add_argument("--temperature", type=float, default=1.0)
    sizes = {"num_prompts": 512, "prompt_length": 64, "max_tokens": 320, "stride": 4096, "batch_size": 32}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--output", type=path_argument, required=True)
    args = parser.parse_args(argv)
    show_log()
    try:
        budget = tuple(float(part) for part in args.budget.split(",") if part)
        sampling = Sampling(args.temperature)
    except ValueError as error:
        raise UserError(f"--budget={args.budget} or --temperature: {error}") from None
    engine = open_engine(args.model, args.policy, dtype=args.dtype, sampling=sampling)
    try:
        done = args.output.read_text().count("\n") if args.output.exists() else 0
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--output={args.output} cannot be used ({error})") from None
    found = passages(engine, args.source, args.prompt_length, args.stride)
    prompts = list(itertools.islice(found, args.num_prompts))
    if len(prompts) < args.num_prompts:
        raise UserError(
            f"{args.source} has {len(prompts)} passages {args.stride} tokens apart; lower --stride"
        )
    requests = [Request(prompt, budget, args.max_tokens, seed=p) for p, prompt in enumerate(prompts)]
    bar = progress(len(requests), done, args.output.name)
    for start in range(done, len(requests), args.batch_size):
        batch = requests[start : start + args.batch_size]
        append_lines(args.output, lines(engine, batch))
        bar.update(start + len(batch))
    bar.close()


if __name__ == "__main__":
    main()
