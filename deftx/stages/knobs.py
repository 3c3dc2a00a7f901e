"""A run's settings as ``result.json`` and W&B show them: flat, by knob; ``None`` if none of its methods reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from deftx.core.settings import MERGE_OPTIONS, RankPolicy, ResidualPolicy
from deftx.knobs import declared, values
from deftx.methods import UNDENOISED
from deftx.methods.settings import DENOISING, ShortKnobs
from deftx.stages.settings import SFTSettings, StudySettings

SFT_KNOBS = ("method", *DENOISING, "k", "seed")
"""Knobs that an SFT's ``sft.json`` states."""


def flat_knobs(study: StudySettings) -> dict[str, Any]:
    """Return a run's settings under the knobs' names, flat; ``None`` for knobs that all of its methods ignore.

    A short knob (:class:`~deftx.methods.settings.ShortKnobs`) is the common value of language and task SFTs,
    and ``None`` if ``lang.*`` and ``task.*`` differ.
    """
    knobs = _shared_knobs(study) | {
        "method": study.methods[0],
        "compare": list(study.methods[1:]),
        "controls": list(study.controls),
        "missing_text": study.missing_text,
        "train": study.train,
        "task.source": study.source.code,
        "task.more_sources": list(study.more_sources),
    }
    knobs |= _sft_knobs("lang", _read(study.language_sft, study.methods))
    knobs |= _sft_knobs("task", _read(study.task_sft, study.methods), "task")
    knobs["source.enabled"] = study.source_sft is not None
    if study.source_sft is not None:
        knobs["source.shared"] = study.source_shared
        own = study.source_sft if study.source_shared else _read(study.source_sft, study.methods)
        knobs |= _sft_knobs("source", own)
    for name in declared(ShortKnobs):
        knobs[name] = knobs[f"lang.{name}"] if knobs[f"lang.{name}"] == knobs[f"task.{name}"] else None
    return knobs | values(study.corpus, "corpus.") | compose_knobs(study)


def compose_knobs(study: StudySettings) -> dict[str, Any]:
    """Return how SFTs are composed; ``None`` for what the rule does not read."""
    compose = study.compose
    read = {*MERGE_OPTIONS[compose.rule], *(name for name in declared(compose) if name not in _OPTIONS)}
    return {f"compose.{name}": getattr(compose, name) if name in read else None for name in declared(compose)}


_OPTIONS = {option for options in MERGE_OPTIONS.values() for option in options}


def _read(sft: SFTSettings, methods: Sequence[str]) -> SFTSettings:
    """Return an SFT's settings of the main method, with the denoising of the first method that denoises."""
    main, *more = [sft.by(method) for method in methods]
    denoised = next((other for other in (main, *more) if other.rank is not None), main)
    return replace(main, **{name: getattr(denoised, name) for name in DENOISING})


def _sft_knobs(scope: str, sft: SFTSettings, *readers: str) -> dict[str, Any]:
    """Return the knobs of one kind of SFT, policies as texts."""
    knobs = values(sft, f"{scope}.", *readers, *([] if sft.rank is not None else UNDENOISED))
    return {
        name: str(value) if isinstance(value, RankPolicy | ResidualPolicy) else value for name, value in knobs.items()
    }


def given_knobs(
    study: StudySettings, task: Mapping[str, Any], languages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the settings of an evaluation of given SFTs; their training is taken from their own metadata.

    Args:
        study: Resolved settings.
        task: Metadata of φ_T.
        languages: Metadata of φ_L by target.
    """
    knobs = _shared_knobs(study) | {name: task.get(name) for name in SFT_KNOBS if name != "seed"}
    knobs |= {f"task_sft.{name}": task.get(name) for name in SFT_KNOBS}
    for code, facts in languages.items():
        knobs |= {f"language_sft.{code}.{name}": facts.get(name) for name in SFT_KNOBS}
    knobs |= compose_knobs(study)
    length = (task.get("training") or {}).get("max_length")  # that of φ_T, whatever this command's budget says
    return knobs | {"train": task.get("task"), "sources": task.get("languages"), "max_length": length}


def _shared_knobs(study: StudySettings) -> dict[str, Any]:
    """Return the settings of a run that do not concern the training of its SFTs."""
    model = asdict(study.model)
    if study.model.path is not None:
        model |= {"hub": None, "revision": None}
    shape = model.pop("pretrain") if study.model.pretrained_here is not None else None
    if shape is None:
        model |= {"pretrain": None, "languages": None, "vocabulary": None, "seed": None}
    knobs = {
        "study": study.name,
        "seed": study.seed,
        "task": study.task,
        "split": study.splits[0] if len(study.splits) == 1 else list(study.splits),
        "language": list(study.targets),
        "model": study.model.name,
        "precision": study.trainer.precision,
    }
    # The path of a file is no setting: its content is under fingerprints.
    knobs |= {f"model.{key}": value for key, value in model.items() if key not in ("name", "path")}
    if shape is not None:
        knobs |= {f"model.pretrain.{key}": value for key, value in shape.items()}
    knobs |= {f"data.{key}": value for key, value in study.data.result_settings().items()}
    knobs["data.labels"] = list(study.task_spec.labels)
    synthetic = asdict(study.synthetic) if study.generated else {}
    return knobs | {f"synthetic.{key}": value for key, value in synthetic.items()}
