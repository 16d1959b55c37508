"""What an evaluation is about: a policy, of a run or by name, and a text that it was not trained on."""

import pathlib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sol_jax.digests import array_digest, digest
from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, write_whole
from sol_jax.rl.config import PolicyConfig
from sol_jax.runs import policy_files
from sol_jax.runs.checkpoints import FREE_FIELDS
from sol_jax.runs.config import RunConfig
from sol_jax.runs.policy_files import HASH_LENGTH
from sol_jax.runs.session import Session, commit, open_session
from sol_jax.runs.trained_policy import TrainedPolicy
from sol_jax.text import blocks as data
from sol_jax.text.blocks import Batch
from sol_jax.text.documents import document_hashes, read_documents

TRAINING_DOCUMENTS = "training-documents.txt"  # in a workdir


def open_text(
    config: RunConfig,
    source: str = "",
    document_start: str = "",
    protect: bool | None = None,
    kernels: str | None = None,
    mesh_model: int = 1,
    restate: bool | None = None,
    restate_steps: int | None = None,
    prefix_len: int | None = None,
    one_budget: str | None = None,
) -> Session:
    """The session of a run's model on another text, all of it test text; on its own without a `source`.

    The weights go to all devices, `mesh_model` of which share a copy.
    `protect` overrides the run's protection of sinks and window, `kernels` how its decode steps run,
    `restate`, `restate_steps` and `one_budget` how its policy is asked, and `prefix_len` what precedes its
    episodes.
    """
    asked = config.policy.asked(restate, restate_steps, one_budget)
    fields: dict[str, Any] = {
        "axes.kappa.protect": protect,
        "kernels": kernels,
        "mesh.data": -1,  # whatever the run had: the devices of now
        "mesh.model": mesh_model,
        "policy.restate": asked.restate,
        "policy.restate_steps": asked.restate_steps,
        "policy.one_budget": asked.one_budget,
        "episode.prefix_len": prefix_len,
    }
    if source:
        fields |= {"data.source": source, "data.document_start": document_start}
        fields |= {"data.validation_fraction": 0.0, "data.test_fraction": 1.0}
    return open_session(config.with_fields({name: x for name, x in fields.items() if x is not None}))


def training_documents(
    config: RunConfig, session: Session, workdir: pathlib.Path | None = None
) -> Collection[str]:
    """Shortened hashes of the training documents of the run of `config`.

    As its workdir remembers them, or from its text: a run that was copied elsewhere need not have that.
    """
    if workdir is not None and (known := recall_documents(workdir)):
        return known
    block_length = config.episode.block_length
    same_blocks = session.setup.episode.block_length == block_length and "train" in session.blocks
    if session.config.data.source == config.data.source and same_blocks:
        blocks = session.blocks
    else:
        blocks = data.prepare(
            config.data.source,
            session.tokenizer,
            block_length=block_length,
            validation_fraction=config.data.validation_fraction,
            test_fraction=config.data.test_fraction,
            document_start=config.data.document_start,
            cache_dir=config.data.cache_dir or None,
        )
    return policy_files.document_names(blocks["train"].documents)


def remember_documents(workdir: pathlib.Path, hashes: Iterable[str]) -> None:
    """Writes down which documents a run learns from, for evaluations where its text is not at hand.

    Raises `UserError` if the workdir cannot be written.
    """
    file = workdir / TRAINING_DOCUMENTS
    try:
        names = policy_files.document_names(hashes)
        write_whole(file, f"{len(names)} documents: {' '.join(names)}\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {(error.strerror or str(error)).lower()}") from error


def recall_documents(workdir: pathlib.Path) -> list[str]:
    """What `remember_documents` wrote; nothing for a run from before it, or for a damaged file."""
    try:
        with as_os_errors():
            text = (workdir / TRAINING_DOCUMENTS).read_text()
        count, _, *names = text.split()
    except (OSError, ValueError):  # the latter of bytes that are no text, and of too few words
        return []
    whole = all(re.fullmatch(f"[0-9a-f]{{{HASH_LENGTH}}}", name) for name in names)
    return names if whole and count == str(len(names)) else []


def refuse_training_text(session: Session, split: str, trained_on: Collection[str]) -> None:
    """Raises `UserError`, naming documents, if the text to be scored is part of the training text."""
    trained = set(trained_on)
    leaked = {digest for digest in session.split(split).documents if digest[:HASH_LENGTH] in trained}
    if not leaked:
        return
    source = session.config.data
    titles = [
        f"{document.title!r} (sha256 {document_hashes([document])[0][:HASH_LENGTH]})"
        for document in read_documents(source.source, source.document_start)
        if document_hashes([document])[0] in leaked
    ]
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    raise UserError(
        f"the {split} text of {source.source} holds documents that the policy was trained on: "
        f"{', '.join(titles[:3])}{more}; evaluate on another text"
    )


def describe(policy: TrainedPolicy, session: Session, split: str, batches: Sequence[Batch]) -> dict[str, Any]:
    """What every row of results says of where it comes from."""
    episode, flat = session.setup.episode, policy.config.flat()
    # Defaults are left out: a field that is added later, and a run that knew nothing of it, change no digest.
    usual = RunConfig().flat()
    trained = {
        name: value
        for name, value in flat.items()
        if not name.startswith(FREE_FIELDS) and value != usual.get(name)
    }
    if priced := session.config.identity():  # by what the file holds, wherever it is
        trained = trained | priced | {"axes.prices": ""}
    return {
        "run": policy.name,
        "updates": policy.updates,
        "model": policy_files.model_name(policy.config),
        "prefix": episode.prefix_len,
        "horizon": episode.horizon,
        "text": text_name(session.config.data.source, split),
        "protect": session.config.axes.kappa.protect,
        "restate": how_asked(session.config.policy),
        "one_budget": session.config.policy.one_budget,
        "blocks": sum(len(batch.tokens_BxN) for batch in batches),
        "seed": policy.config.seed,
        "config": digest(trained),
        "text_digest": session.split(split).fingerprint,
        **session.identity,
        "commit": commit(),
    }


def how_asked(policy: PolicyConfig) -> str:
    """The column `restate`: False, True, or the steps over which misses are made up."""
    return str(policy.restate_steps if policy.restate_steps > 1 else policy.restate)


def text_name(source: str, split: str) -> str:
    """A source without its folders, and the split of it."""
    files = ",".join(pathlib.PurePath(part).name for part in source.split(","))
    return f"{files}:{split}"


def found_at(session: Session) -> dict[str, str]:
    """Where model and text are: what stored scores are read with, but not known by."""
    return {"model": session.config.model.path, "text": session.config.data.source}


def decides(session: Session, batches: Sequence[Batch], stale: bool) -> dict[str, Any]:
    """All that decides scores besides the controllers; it names the folder in which they are kept.

    Whoever adds something that decides scores adds it here or to `EpisodeRules.identity`; if old scores stay
    right its default must leave no trace.
    """
    episode = session.setup.episode
    return {
        "model": session.identity,
        "rules": session.setup.rules.identity(),
        "prefix_len": episode.prefix_len,
        "episodes_per_prefix": episode.episodes_per_prefix,
        "blocks": [array_digest([batch.tokens_BxN, batch.document_B]) for batch in batches],
        "stale_prefill": stale,
    }
