"""Opens SFTs that the user gives: a folder, or a hub id that is downloaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deftx.cache import file_sha256
from deftx.core.folder import FACTS, TENSORS
from deftx.data.hub import reason, resolve_commit
from deftx.errors import DeftxError
from deftx.methods import METHODS
from deftx.stages.node import ExternalInput
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings


def open_given(source: str, kind: str, study: StudySettings | None = None) -> tuple[SFT, dict[str, Any]]:
    """Find and verify an SFT.

    Args:
        source: Folder with ``sft.safetensors`` and ``sft.json``, or a hub id ``owner/name``.
        kind: ``task`` or ``language``: the kind the SFT has to be.
        study: For a task SFT: the study whose labels it has to predict.

    Returns:
        The SFT, and what its ``sft.json`` says.

    Raises:
        DeftxError: The SFT is missing, not intact, of the other kind, or has another task's labels.
    """
    from deftx.core.delta import SparseDelta

    folder = Path(source).expanduser()
    if not folder.exists() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        folder = _download(source)
    facts = dict(SparseDelta.load(folder).metadata)
    if facts.get("kind") != kind:
        raise DeftxError(
            f"{source} is a {facts.get('kind')} SFT, a {kind} SFT is needed: "
            "give task_sft=... and language_sft.CODE=..."
        )
    if study is not None and facts.get("labels") != (needed := list(study.task_spec.labels)):
        raise DeftxError(f"{source} predicts {facts.get('labels')}; {study.task} needs {needed}: give another task_sft")
    if kind == "task" and "max_length" not in (facts.get("training") or {}):
        raise DeftxError(
            f"{source}: its sft.json does not say training.max_length, the length at which texts are cut; save it with "
            'metadata={"kind": "task", "labels": [...], "training": {"max_length": 128}, ...}'
        )
    languages = "+".join(map(str, facts.get("languages", [])))
    name = f"{kind} {languages} {facts.get('method', '')}".strip()
    on = tuple(map(str, (facts.get("trained_on") or {}).values()))
    method = METHODS.get(str(facts.get("method")))
    composition = "sum" if method is None else method.composition
    content = ExternalInput.of(f"the SFT in {folder}", partial(file_sha256, folder / TENSORS))
    return SFT(kind, name, content.fingerprint, external=content, folder=folder, on=on, composition=composition), facts


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        commit = resolve_commit(repo, None, "model")
        return Path(snapshot_download(repo, revision=commit, allow_patterns=[FACTS, TENSORS]))
    except Exception as error:
        raise DeftxError(
            f"no SFT at {repo!r}: no such folder, and the hub does not give it ({reason(error)}); give a folder with "
            f"{FACTS} and {TENSORS}"
        ) from error
