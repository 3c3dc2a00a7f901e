"""SFTs given by the user: a folder, or a hub id that is downloaded."""

from __future__ import annotations

from pathlib import Path

from deftx.cache import file_sha256
from deftx.errors import DeftxError
from deftx.stages.evaluate import SFT
from deftx.stages.settings import StudySettings

SFT_FILES = ("sft.json", "sft.safetensors")


def open_sft(place: str, role: str) -> SFT:
    """Find and verify an SFT.

    Args:
        place: Folder with ``sft.safetensors`` and ``sft.json``, or a hub id ``owner/name``.
        role: ``task`` or ``language``; what the SFT has to be.

    Raises:
        DeftxError: Not there, not intact, or of the other kind.
    """
    from deftx.core.delta import SparseDelta

    folder = Path(place).expanduser()
    if not folder.exists() and place.count("/") == 1 and not place.startswith((".", "/", "~")):
        folder = _download(place)
    delta = SparseDelta.load(folder)
    kind = delta.metadata.get("kind")
    if kind != role:
        raise DeftxError(
            f"{place} is a {kind} SFT, a {role} SFT is needed: give task_sft=... and language_sft.CODE=..."
        )
    name = (
        f"{role} {'+'.join(map(str, delta.metadata.get('languages', [])))} {delta.metadata.get('method', '')}".strip()
    )
    metrics = dict(delta.metadata.get("metrics") or {})
    return SFT(role, name, folder, file_sha256(folder / "sft.safetensors"), metrics)


def open_task_sft(study: StudySettings, place: str) -> SFT:
    """Find and verify a task SFT that predicts the study's labels.

    Raises:
        DeftxError: As :func:`open_sft`; or its labels are another task's.
    """
    sft = open_sft(place, "task")
    found, needed = sft.facts.get("labels"), list(study.task_spec.labels)
    if found != needed:
        raise DeftxError(f"{place} predicts {found}; {study.task} needs {needed}: give another task_sft")
    return sft


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(SFT_FILES)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeftxError(
            f"no SFT at {repo!r}: no such folder, and the hub does not give it ({reason}); give a folder with "
            f"{' and '.join(SFT_FILES)}"
        ) from error
