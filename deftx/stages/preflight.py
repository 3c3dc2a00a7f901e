"""What can be found wrong before any weight is loaded: model folder, mask sizes and ranks, data files, output folders.

Shapes come from the model's configuration on the meta device. Everything wrong is reported, not the first thing.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from deftx.core.settings import RankPolicy
from deftx.errors import DeftxError
from deftx.stages.inputs import resolve_model
from deftx.stages.settings import SFTSettings, StudySettings


def preflight(study: StudySettings, folders: Mapping[str, Path]) -> list[str]:
    """Every problem of a study that its configuration, model folder and data files show; empty when there is none.

    Args:
        study: Resolved settings.
        folders: Folders that will be written, by the knob that names them.
    """
    problems: list[str] = []
    for knob, folder in folders.items():
        with _collected(problems):
            _check_writable(knob, folder)
    with _collected(problems):
        _check_accelerator(study)
    with _collected(problems):
        problems += _size_problems(study)
    if study.task != "synthetic":
        problems += _data_problems(study)
    return problems


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except DeftxError as error:
        problems += str(error).splitlines()


def _check_writable(knob: str, folder: Path) -> None:
    """The nearest existing parent must be a folder that can be written."""
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
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


def _size_problems(study: StudySettings) -> list[str]:
    """Ranks and mask sizes against the shapes of the model."""
    problems = []
    for kind, sfts in (
        ("language", {"lang": study.language_sft, "source": study.source_sft}),
        ("task", {"task": study.task_sft}),
    ):
        shapes = _shapes(study, kind)
        for name, sft in sfts.items():
            if sft is not None:
                problems += _check_size(name, sft, shapes)
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
    return problems


def _shapes(study: StudySettings, kind: str) -> dict[str, tuple[int, ...]]:
    from deftx.training.encoder import check_model_folder, shapes_of

    model = study.model
    if model.path is None and model.pretrain is not None:
        from transformers import BertConfig

        problems = model.pretrain.problems()
        if problems:
            raise DeftxError("\n".join(f"model.pretrain.{text}" for text in problems))
        with tempfile.TemporaryDirectory() as scratch:
            shape = model.pretrain
            BertConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.intermediate,
                max_position_embeddings=shape.positions,
            ).save_pretrained(scratch)
            # Pretrained here by MLM alone, it has no pooler: that belongs to the classifier's head.
            found = shapes_of(Path(scratch), kind=kind)
            return {name: size for name, size in found.items() if not name.startswith("pooler.")}
    if model.path is not None:
        folder = resolve_model(model)
        check_model_folder(folder)
        return shapes_of(folder, kind=kind)
    return shapes_of(resolve_model(model, weights=False), kind=kind)


def _data_problems(study: StudySettings) -> list[str]:
    """Read the labelled files and find the text: small, and far cheaper than to fail after hours of training."""
    from deftx.data.corpora import resolve_text
    from deftx.data.tasks import load_test, task_files

    if study.data.root is None and _from_hub(study):
        # Hub data sets are downloaded by the stages themselves.
        return []
    checks: list[Callable[[], object]] = [partial(task_files, study.train, study.source, study.data)]
    for language in study.targets.values():
        checks.append(partial(load_test, study.task, language, study.data, split=study.split))
        if study.missing_text == "error":
            checks.append(partial(resolve_text, language, study.data))
    if study.source_sft is not None:
        checks.append(partial(resolve_text, study.source, study.data))
    problems: list[str] = []
    for check in checks:
        with _collected(problems):
            check()
    return list(dict.fromkeys(problems))


def _from_hub(study: StudySettings) -> bool:
    settings = study.data
    return not any((settings.nusax, settings.smsa, settings.americasnli, settings.multinli, settings.xnli))
