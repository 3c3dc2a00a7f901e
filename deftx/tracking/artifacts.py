"""SFTs and results as W&B artifacts, with lineage: language and task SFT -> result.

A job that composes SFTs declares each as an input and its result as an output; a job that trains them declares them as
outputs. W&B tells versions apart by the digest of their files, so that however many jobs declare one SFT, and in
whatever order their offline runs are synced, it stays one version. An SFT's ``sft.json`` says everything that
identifies it, the sha256 of its tensors too, so lineage needs no large file: tensors, predictions and diagnostics
travel only with ``logger.artifacts=true``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deftx.methods.settings import LABELLED
from deftx.tracking.facts import SFTFacts
from deftx.tracking.results import METRICS, RESULT, RUN_FILES, RunRecord, plain

__all__ = ["artifact_name", "declare", "is_input", "result_artifact", "result_name", "sft_artifact", "sft_name"]

SFT_FACTS = "sft.json"
_LONGEST = 128


def sft_name(kind: str, facts: Mapping[str, Any]) -> str:
    """Return the name of an SFT's artifact: ``sft-language-ace-deftx-rank-16-k-100-seed-0-tiny``.

    Args:
        kind: ``language`` or ``task``.
        facts: The metadata of its ``sft.json``.
    """
    languages = "+".join(facts.get("languages") or [])
    parts = ["sft", kind, facts.get("task") if kind == "task" else None, languages, facts.get("method")]
    if facts.get("trained_on"):
        parts.append("on-" + "+".join(facts["trained_on"]))
    # K says what a density came to.
    for knob in (*(name for name in LABELLED if name != "density"), "seed"):
        if facts.get(knob) is not None:
            parts += [knob, facts[knob]]
    return artifact_name([*parts, facts.get("base_model")])


def result_name(record: RunRecord) -> str:
    """Return the name of a result's artifact; the same settings again are another version of it."""
    knobs = record.settings
    languages = "+".join(knobs.get("language") or [])
    kind = None if record.job_type == "run" else record.job_type
    parts = ["result", kind, record.study, knobs.get("task"), languages, knobs.get("method")]
    for knob in LABELLED:
        if knobs.get(knob) is not None:
            parts += [knob, knobs[knob]]
    return artifact_name([*parts, "seed", record.seed])


def artifact_name(parts: Sequence[Any]) -> str:
    """Join parts with ``-``; what W&B does not take becomes ``-``, and a long name ends in a hash of the whole."""
    whole = "-".join(str(part) for part in parts if part is not None and part != "")
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", whole).strip("-")
    if len(clean) > _LONGEST:
        clean = f"{clean[: _LONGEST - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return clean


def is_input(record: RunRecord, sft: SFTFacts) -> bool:
    """Return whether a job reads an SFT rather than makes it.

    A composing job reads all of them. One that trains a task SFT reads those that it is trained on.
    """
    return bool(record.cells) or any(sft.key in other.on for other in record.sfts)


def sft_artifact(sft: SFTFacts, folder: Path, *, whole: bool) -> Any:
    """Return an SFT's ``wandb.Artifact``: its facts, or all of its files.

    Args:
        sft: Its entry in ``result.json``.
        folder: Holds ``sft.json`` and ``sft.safetensors``.
        whole: Add every file of the folder.
    """
    import wandb

    facts = json.loads((folder / SFT_FACTS).read_text(encoding="utf-8"))["metadata"]
    identity = {
        name: facts.get(name) for name in ("base_model", "base_fingerprint", "task", "rank", "residual", "seed")
    }
    identity |= {name: getattr(sft, name) for name in ("method", "languages", "k", "bytes", "sha256")} | {
        "role": sft.kind
    }
    artifact = wandb.Artifact(sft_name(sft.kind, facts), type="sft", metadata=plain(identity))
    for path in sorted(folder.rglob("*")) if whole else [folder / SFT_FACTS]:
        if path.is_file():
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
    return artifact


def result_artifact(record: RunRecord, run_dir: Path, inputs: Sequence[str], *, whole: bool) -> Any:
    """Return a result's ``wandb.Artifact``: the record and its scores, or also predictions and diagnostics.

    Args:
        record: The run's record.
        run_dir: Where its files are.
        inputs: Names of the SFTs' artifacts, kept in the metadata as well.
        whole: Add predictions and diagnostics.
    """
    import wandb

    identity = {"study": record.study, "job": record.job, "seed": record.seed, "sfts": list(inputs)}
    artifact = wandb.Artifact(result_name(record), type="result", metadata=plain(identity))
    for name in RUN_FILES.values() if whole else (RESULT, METRICS):
        if (run_dir / name).is_file():
            artifact.add_file(str(run_dir / name), name=name)
    return artifact


def declare(run: Any, artifact: Any, *, used: bool) -> None:
    """Tell W&B that a run made an artifact, or that it uses one which may not be on the server yet.

    Args:
        run: The ``wandb.Run``.
        artifact: A new one, with its files.
        used: It is an input.
    """
    if used:
        # run.use_artifact refuses to work offline, and online it waits for the upload. What it does with a new artifact
        # is this record: create the version unless its digest is known, then mark it as used.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.log_artifact(artifact)
