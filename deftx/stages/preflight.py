"""Checks a study before any weight is loaded: model folder, mask sizes and ranks, data files, output folders.

Shapes come from the model's configuration alone. Every problem is reported, not only the first.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from deftx.core.settings import part_of
from deftx.data.corpora import resolve_text
from deftx.data.labelled import SETS
from deftx.data.tasks import load_test, train_places
from deftx.errors import DeftxError, collected, did_you_mean, listed
from deftx.knobs import refuse
from deftx.stages.base import described
from deftx.stages.inputs import NEEDS, Needs
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.stages.sources import open_given
from deftx.training.model_folder import longest_input
from deftx.training.shapes import shapes_of


def preflight(
    study: StudySettings,
    job: str,
    folders: Mapping[str, Path],
    out: Path | None = None,
    *,
    on_this_machine: bool = True,
    checked: dict[str, list[str]] | None = None,
) -> list[str]:
    """List every problem of a study that its configuration, model folder and data files show.

    Args:
        study: Resolved settings.
        job: A key of :data:`~deftx.stages.inputs.NEEDS`.
        folders: Folders that will be written, by the knob that names them.
        out: Folder of the SFTs or the model, if the command writes one; must be new or empty.
        on_this_machine: Whether the job runs on this machine, not on a launcher's worker.
        checked: Problems of data files by check, shared by the jobs of one command so that each file is read once.
    """
    checked = {} if checked is None else checked
    needs = NEEDS[job]
    problems: list[str] = []
    for knob, folder in folders.items():
        with collected(problems):
            _check_writable(knob, folder)
    if out is not None:
        new_folders = [out / code for code in study.targets] if needs.lang and len(study.targets) > 1 else [out]
        for folder in new_folders:
            with collected(problems):
                refuse_used(folder)
    with collected(problems):
        if on_this_machine:
            _check_accelerator(study)
    with collected(problems):
        if needs.base:
            problems += _size_problems(study, needs)
        elif study.model.pretrain is not None:
            refuse(study.model.pretrain, "model.pretrain.")
    if needs.text and not (study.generated if needs.base else study.pretrains_on_family):
        with collected(problems):
            _check_pretraining_text(study)
    if needs.base and not study.generated:
        problems += _data_problems(study, needs, checked)
    return problems


def given_problems(study: StudySettings, task_sft: str, language_sfts: Mapping[str, str]) -> list[str]:
    """List the problems of given SFTs, without loading their base."""
    problems: list[str] = []
    with collected(problems):
        open_given(task_sft, "task", study)
    for source in language_sfts.values():
        with collected(problems):
            open_given(source, "language")
    return problems


def refuse_used(folder: Path) -> None:
    """Refuse an output folder that is not empty.

    Raises:
        DeftxError: The folder holds something or cannot be read.
    """
    try:
        used = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise DeftxError(f"out={folder}: {error.strerror}; give a new folder") from error
    if used:
        raise DeftxError(f"out={folder} exists and is not empty; give a new folder")


def _check_writable(knob: str, folder: Path) -> None:
    """Refuse a folder whose nearest existing parent is no folder or cannot be written."""
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


def _size_problems(study: StudySettings, needs: Needs) -> list[str]:
    """Check ranks, mask sizes and lengths against the shapes of the model."""
    trained = {
        "lang": study.language_sft if needs.lang else None,
        "task": study.task_sft if needs.task else None,
        "source": study.source_sft if needs.task else None,
    }
    problems: list[str] = []
    model = described(study.model)
    limit = longest_input(model)
    for name, sft in trained.items():
        if sft is None:
            continue
        shapes = shapes_of(model, kind="task" if name == "task" else "language")
        shared = name == "source" and study.source_shared
        for trained_sft in [sft] if shared else [sft.by(method) for method in study.methods]:
            problems += _check_size(name, trained_sft, shapes)
        if sft.training.max_length > limit:
            problems.append(
                f"{name}.training.max_length={sft.training.max_length} exceeds {limit}, the longest input of this model"
            )
    parts = list(dict.fromkeys(map(part_of, shapes_of(model, kind="task"))))
    for scope in ("task_layers", "language_layers"):
        problems += [
            f"compose.{scope}.{part}: this model has no such part{did_you_mean(part, parts)}; it has {', '.join(parts)}"
            for part in getattr(study.compose, scope)
            if part not in parts
        ]
    return list(dict.fromkeys(problems))


def _check_size(name: str, sft: SFTSettings, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    maskable = sum(math.prod(shape) for shape in shapes.values())
    largest = max(min(shape) for shape in shapes.values() if len(shape) == 2)
    problems = []
    if sft.k is not None and sft.k > maskable:
        problems.append(f"{name}: k={sft.k} exceeds the {maskable} maskable parameters of this model")
    if sft.rank is not None:
        if sft.rank.kind == "fixed" and sft.rank.value is not None and sft.rank.value > largest:
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


def _check_pretraining_text(study: StudySettings) -> None:
    """Check that the text of a base that is pretrained here exists, wherever the study's own data comes from."""
    if study.model.pretrained_here is None:
        return
    for code, language in study.pretrain_languages.items():
        try:
            resolve_text(language, study.data)
        except DeftxError as error:
            others = [name for name in (*study.sources, *study.targets) if name not in study.synthetic.members]
            mixed = code in study.synthetic.members and others
            why = (
                f" (the family is generated only for studies of it alone, and {listed(others)} is not in it)"
                if mixed
                else ""
            )
            raise DeftxError(
                f"model={study.model.name} is pretrained here on text of {code!r}: {error}{why}; choose a pretrained "
                "model (model=minilm model.path=FOLDER, model=xlmr_base, ...) or other model.languages=[...]"
            ) from error


def _data_problems(study: StudySettings, needs: Needs, checked: dict[str, list[str]]) -> list[str]:
    """Read the test files; find training files and text, which the run reads before it trains."""
    data = study.data
    public = [name for name, spec in SETS.items() if not (spec.own or spec.generated)]
    # Hub data sets are downloaded by the stages themselves.
    local = any((data.root, data.train, data.test, *(getattr(data, name) for name in public)))
    checks: list[Callable[[], object]] = []
    if needs.task:
        for source in study.sources.values():
            if local:
                checks.append(partial(train_places, study.train, source, data, study.evaluation))
            if study.source_sft is not None:
                checks.append(partial(resolve_text, source, data))
    for language in study.targets.values():
        if needs.tests and local:
            checks += [partial(load_test, study.task, language, data, split=split) for split in study.splits]
        if needs.lang and study.missing_text == "error" and language.code not in study.compose.proxy:
            checks.append(partial(resolve_text, language, data))
    for check in checks:
        key = repr(check)  # the function and its arguments
        if key not in checked:
            checked[key] = []
            with collected(checked[key]):
                check()
    return list(dict.fromkeys(problem for check in checks for problem in checked[repr(check)]))
