"""What can be found wrong before any weight is loaded: model folder, mask sizes and ranks, data files, output folders.

Shapes come from the model's configuration alone. Everything wrong is reported, not the first thing.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deftx.core.settings import RankPolicy
from deftx.data.corpora import resolve_text
from deftx.data.tasks import load_test, task_files
from deftx.errors import DeftxError, collected
from deftx.stages.inputs import resolve_model
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.stages.sources import open_sft, open_task_sft
from deftx.training.model_folder import bert_facts, check_model_folder, longest_input, shapes_of


@dataclass(frozen=True)
class Needs:
    """What a command reads, and so what can be missing.

    Attributes:
        lang: Language SFTs of the targets are trained.
        task: A task SFT is trained, and φ_S under it.
        tests: Targets are evaluated.
        base: A model folder is read, or its shape checked.
        text: A base that is pretrained here learns from its languages' text.
    """

    lang: bool = False
    task: bool = False
    tests: bool = False
    base: bool = True
    text: bool = True


NEEDS = {
    "run": Needs(lang=True, task=True, tests=True),
    "sft language": Needs(lang=True),
    "sft task": Needs(task=True),
    "eval": Needs(tests=True),
    "pretrain": Needs(base=False),
    "pretrain text": Needs(base=False, text=False),
}


def preflight(study: StudySettings, job: str, folders: Mapping[str, Path], out: Path | None = None) -> list[str]:
    """Every problem of a study that its configuration, model folder and data files show; empty when there is none.

    Args:
        study: Resolved settings.
        job: A key of :data:`NEEDS`.
        folders: Folders that will be written, by the knob that names them.
        out: Folder of the SFTs or the model, if the command writes one; must be new or empty.
    """
    needs = NEEDS[job]
    problems: list[str] = []
    for knob, folder in folders.items():
        with collected(problems):
            _check_writable(knob, folder)
    if out is not None:
        places = [out / code for code in study.targets] if needs.lang and len(study.targets) > 1 else [out]
        for place in places:
            with collected(problems):
                refuse_used(place)
    with collected(problems):
        _check_accelerator(study)
    with collected(problems):
        problems += _size_problems(study, needs) if needs.base else _shape_problems(study)
    if needs.text and not (study.generated if needs.base else study.pretrains_on_family):
        with collected(problems):
            _check_pretraining_text(study)
    if needs.base and not study.generated:
        problems += _data_problems(study, needs)
    return problems


def given_problems(study: StudySettings, task_sft: str, language_sfts: Mapping[str, str]) -> list[str]:
    """What is wrong with given SFTs, without loading the base they were made for."""
    problems: list[str] = []
    with collected(problems):
        open_task_sft(study, task_sft)
    for place in language_sfts.values():
        with collected(problems):
            open_sft(place, "language")
    return problems


def refuse_used(place: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        DeftxError: It does.
    """
    try:
        used = place.is_dir() and any(place.iterdir())
    except OSError as error:
        raise DeftxError(f"out={place}: {error.strerror}; give a new folder") from error
    if used:
        raise DeftxError(f"out={place} exists and is not empty; give a new folder")


def _check_writable(knob: str, folder: Path) -> None:
    """The nearest existing parent must be a folder that can be written."""
    folder = folder.expanduser().absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise DeftxError(f"{knob}={folder}: {error.strerror}; choose another {knob}=FOLDER") from error
    if not existing.is_dir():
        raise DeftxError(f"{knob}={folder} cannot be made: {existing} is a file; choose another {knob}=FOLDER")
    if not os.access(existing, os.W_OK):
        raise DeftxError(
            f"{knob}={folder} cannot be written: no permission in {existing}; choose another {knob}=FOLDER"
        )


def _check_accelerator(study: StudySettings) -> None:
    if study.trainer.accelerator == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise DeftxError("trainer.accelerator=gpu: torch sees no GPU; use trainer=cpu or trainer=auto")


def _shape_problems(study: StudySettings) -> list[str]:
    pretrain = study.model.pretrain
    return [] if pretrain is None else [f"model.pretrain.{text}" for text in pretrain.problems()]


def _size_problems(study: StudySettings, needs: Needs) -> list[str]:
    """Ranks, mask sizes and lengths against the shapes of the model."""
    trained = {
        "lang": study.language_sft if needs.lang else None,
        "task": study.task_sft if needs.task else None,
        "source": study.source_sft if needs.task else None,
    }
    problems: list[str] = []
    with described(study) as folder:
        limit = longest_input(folder)
        for name, sft in trained.items():
            if sft is not None:
                denoised = name == "source" or "deftx" in study.methods
                shapes = expected_shapes(study, folder, "task" if name == "task" else "language")
                problems += _check_size(name, sft if denoised else sft.as_ltsft(), shapes)
                if sft.training.max_length > limit:
                    problems.append(
                        f"{name}.training.max_length={sft.training.max_length} exceeds {limit}, the longest input of "
                        "this model"
                    )
    return list(dict.fromkeys(problems))


def _check_size(name: str, sft: SFTSettings, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    maskable = sum(math.prod(shape) for shape in shapes.values())
    largest = max(min(shape) for shape in shapes.values() if len(shape) == 2)
    problems = []
    if sft.k is not None and sft.k > maskable:
        problems.append(f"{name}: k={sft.k} exceeds the {maskable} maskable parameters of this model")
    if sft.rank is not None:
        policy = RankPolicy.parse(sft.rank)
        if policy.kind == "fixed" and policy.value is not None and policy.value > largest:
            problems.append(
                f"{name}: rank={sft.rank} exceeds {largest}, the largest min(m, n) of this model's matrices; "
                "rank=none trains without denoising"
            )
        problems += [
            f"{name}: exclude pattern {pattern!r} matches no parameter, such as {next(iter(shapes))}"
            for pattern in sft.exclude
            if not fnmatch.filter(shapes, pattern)
        ]
    return problems


def expected_shapes(study: StudySettings, folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of M, before a base that is pretrained here is there.

    Args:
        study: Resolved settings.
        folder: From :func:`described`.
        kind: ``language`` or ``task``.
    """
    found = shapes_of(folder, kind=kind)
    if study.model.path is None and study.model.pretrain is not None:
        # Pretrained here by MLM alone, it has no pooler: that belongs to the classifier's head.
        return {name: size for name, size in found.items() if not name.startswith("pooler.")}
    return found


@contextmanager
def described(study: StudySettings) -> Iterator[Path]:
    """A folder with the model's ``config.json``; of a model still to be pretrained, one written for it."""
    model = study.model
    if model.path is None and model.pretrain is not None:
        problems = _shape_problems(study)
        if problems:
            raise DeftxError("\n".join(problems))
        with tempfile.TemporaryDirectory() as scratch:
            facts = bert_facts(model.pretrain, model.pretrain.vocab_size)
            (Path(scratch) / "config.json").write_text(json.dumps(facts), encoding="utf-8")
            yield Path(scratch)
        return
    folder = resolve_model(model, weights=model.path is not None)
    if model.path is not None:
        check_model_folder(folder)
    yield folder


def _check_pretraining_text(study: StudySettings) -> None:
    """A base that is pretrained here needs its languages' text, wherever the study's own data comes from."""
    if study.model.path is not None or study.model.pretrain is None:
        return
    for code, language in study.pretrain_languages.items():
        try:
            resolve_text(language, study.data)
        except DeftxError as error:
            raise DeftxError(
                f"model={study.model.name} is pretrained here on text of {code!r}: {error}; choose a pretrained model "
                "(model=minilm model.path=FOLDER, model=xlmr_base, ...) or other model.languages=[...]"
            ) from error


def _data_problems(study: StudySettings, needs: Needs) -> list[str]:
    """Read the test files, find training files and text. What is in those two is read before anything trains, too."""
    local = study.data.root is not None or not _from_hub(study)  # hub data sets are downloaded by the stages themselves
    checks: list[Callable[[], object]] = []
    if needs.task:
        for source in study.sources.values():
            if local:
                checks.append(partial(task_files, study.train, source, study.data))
            if study.source_sft is not None:
                checks.append(partial(resolve_text, source, study.data))
    for language in study.targets.values():
        if needs.tests and local:
            checks.append(partial(load_test, study.task, language, study.data, split=study.split))
        if needs.lang and study.missing_text == "error":
            checks.append(partial(resolve_text, language, study.data))
    problems: list[str] = []
    for check in checks:
        with collected(problems):
            check()
    return list(dict.fromkeys(problems))


def _from_hub(study: StudySettings) -> bool:
    settings = study.data
    places = (settings.nusax, settings.smsa, settings.americasnli, settings.multinli, settings.xnli)
    return not any((*places, settings.train, settings.test))
