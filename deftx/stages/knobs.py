"""A run's settings as ``result.json`` and W&B show them: flat, by knob, ``None`` where nothing reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deftx.stages.settings import StudySettings

SFT_KNOBS = ("method", "rank", "residual", "exclude", "k", "seed")
"""What an SFT says of its own training."""
SHORT_KNOBS = ("rank", "residual", "k", "density", "value_dtype", "mask", "second_phase")
"""Knobs that move language and task SFTs alike."""


def flat_knobs(study: StudySettings) -> dict[str, Any]:
    """A run's settings under the knobs' names, flat; what the method ignores is ``None``.

    A short knob (:data:`SHORT_KNOBS`) is what language and task SFTs have in common, and ``None`` where ``lang.*`` and
    ``task.*`` differ.
    """
    sfts = {
        "lang": study.sft_for(study.methods[0], study.language_sft),
        "task": study.sft_for(study.methods[0], study.task_sft),
        "source": study.source_sft,
    }
    knobs = _shared_knobs(study) | {
        "method": study.methods[0],
        "compare": list(study.methods[1:]),
        "controls": list(study.controls),
        "missing_text": study.missing_text,
        "train": study.train,
        "task.source": study.source.code,
        "task.more_sources": list(study.more_sources),
    }
    for key in SHORT_KNOBS:
        values = [getattr(sfts[name], key) for name in ("lang", "task")]
        knobs[key] = values[0] if values[0] == values[1] else None
    for name, item in sfts.items():
        if item is None:
            knobs[f"{name}.enabled"] = False
            continue
        knobs |= {f"{name}.{key}": getattr(item, key) for key in SHORT_KNOBS}
        knobs[f"{name}.exclude"] = list(item.exclude) if item.rank is not None else None
        knobs |= {f"{name}.training.{key}": value for key, value in asdict(item.training).items()}
        if name == "task":
            knobs["task.training.mlm_probability"] = None
    knobs |= {f"corpus.{key}": value for key, value in asdict(study.corpus).items()}
    return knobs


def given_knobs(study: StudySettings, about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation of given SFTs: what trained them is what they say, not what is configured here.

    Args:
        study: Resolved settings.
        about: Metadata of φ_T.
    """
    knobs = _shared_knobs(study) | {name: about.get(name) for name in SFT_KNOBS if name != "seed"}
    knobs |= {f"task_sft.{name}": about.get(name) for name in SFT_KNOBS}
    return knobs | {"train": about.get("task"), "sources": about.get("languages")}


def _shared_knobs(study: StudySettings) -> dict[str, Any]:
    """Settings of a run that say nothing about how its SFTs were trained."""
    model = asdict(study.model)
    if study.model.path is not None:
        model |= {"hub": None, "revision": None}
    shape = model.pop("pretrain") if study.model.path is None and study.model.pretrain is not None else None
    if shape is None:
        model |= {"pretrain": None, "languages": None, "vocabulary": None, "seed": None}
    knobs = {
        "study": study.name,
        "seed": study.seed,
        "task": study.task,
        "split": study.split,
        "language": list(study.targets),
        "model": study.model.name,
        "precision": study.trainer.precision,
    }
    # Where a file lies is no setting: what is in it is under fingerprints.
    knobs |= {f"model.{key}": value for key, value in model.items() if key not in ("name", "path")}
    if shape is not None:
        knobs |= {f"model.pretrain.{key}": value for key, value in shape.items()}
    knobs |= {f"data.{key}": value for key, value in study.data.result_settings().items()}
    knobs["data.labels"] = list(study.task_spec.labels)
    synthetic = asdict(study.synthetic) if study.generated else {}
    return knobs | {f"synthetic.{key}": value for key, value in synthetic.items()}
