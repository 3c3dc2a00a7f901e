"""A whole study: inputs, language SFTs, task SFTs, compositions, scores; and what a run leaves behind.

Each run writes ``result.json`` and ``metrics.csv`` (also when it fails), ``predictions.parquet`` and
``diagnostics.parquet`` into its folder, and prints one table: targets × conditions.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deftx import tracking
from deftx.cache import StageCache
from deftx.data.settings import LanguageSettings
from deftx.errors import DeftxError
from deftx.stages.bench import Bench
from deftx.stages.evaluate import SFT, Cell, Evaluator, study_cells
from deftx.stages.inputs import base_model, family
from deftx.stages.knobs import SFT_KNOBS, flat_knobs, given_knobs
from deftx.stages.outputs import fill, keep, short, show, write_tables
from deftx.stages.preflight import NEEDS, refuse_used
from deftx.stages.settings import StudySettings
from deftx.stages.sources import open_sft, open_task_sft

log = logging.getLogger(__name__)


def run_study(study: StudySettings, run_dir: Path) -> tracking.RunRecord:
    """Run a study and write its results into ``run_dir``.

    Args:
        study: Resolved settings.
        run_dir: Folder of this run; made if needed.

    Returns:
        What ``result.json`` holds.

    Raises:
        DeftxError: Something the user can mend; ``result.json`` then says ``failed`` and why.
    """

    def body(bench: Bench) -> None:
        trainer = bench.open(NEEDS["run"])
        cells = study_cells(
            study,
            bench.texts,
            lambda whose, language, sft, method: bench.language_sft(trainer, language, sft),
            lambda whose, method, on: bench.task_sft(trainer, method, on),
        )
        _evaluate(bench, cells, study.task_sft.training.max_length)

    return _run(study, run_dir, "run", flat_knobs(study), body, kept=True)


def run_parts(study: StudySettings, run_dir: Path) -> tracking.RunRecord:
    """Make parts of a study that other runs will find in the cache (``only=[...]``); nothing is evaluated.

    Args:
        study: Resolved settings; ``only`` names the parts (:mod:`deftx.stages.parts`).
        run_dir: Folder of this run.

    Raises:
        DeftxError: A part names a language or method that the study has not.
    """

    def body(bench: Bench) -> None:
        trainer = bench.open(NEEDS["run"])
        for name in study.only:
            bench.make(trainer, name)

    return _run(study, run_dir, "stage", flat_knobs(study) | {"only": list(study.only)}, body)


def run_sft(study: StudySettings, kind: str, out: Path | None, run_dir: Path) -> tracking.RunRecord:
    """Train one kind of SFT and copy it to ``out``.

    Args:
        study: Resolved settings; its first method decides.
        kind: ``language`` (one SFT a target) or ``task``.
        out: Folder for the SFT; several languages become sub-folders. ``None``: a folder in ``run_dir``.
        run_dir: Folder of this run.
    """
    destination = out or run_dir / "sfts"

    def body(bench: Bench) -> None:
        trainer = bench.open(NEEDS[f"sft {kind}"])
        method = study.methods[0]
        if kind == "language":
            made = bench.target_sfts(trainer, method)
        else:
            made = {study.task: bench.task_sft(trainer, method, bench.source_sfts(trainer))}
        single = out is not None and (kind == "task" or len(study.targets) == 1)
        for name, sft in made.items():
            place = destination if single else destination / name
            _copy(sft.folder, place)
            print(f"{sft.name}: {short(place)}")

    return _run(study, run_dir, f"sft-{kind}", flat_knobs(study), body)


def run_eval(study: StudySettings, task_sft: str, language_sfts: dict[str, str], run_dir: Path) -> tracking.RunRecord:
    """Compose given SFTs and evaluate them.

    Args:
        study: Resolved settings: model, task, targets, split.
        task_sft: Folder or hub id of φ_T.
        language_sfts: Folder or hub id of φ_L by target; a target without one is evaluated on θ⁰ + φ_T.
        run_dir: Folder of this run.
    """
    given = open_task_sft(study, task_sft)
    about = given.facts
    languages: dict[str, SFT] = {}
    knobs = given_knobs(study, about)
    for code, place in language_sfts.items():
        languages[code] = open_sft(place, "language")
        said = languages[code].facts
        if said.get("languages") != [code]:
            log.warning("language_sft.%s=%s was trained on %s", code, place, said.get("languages"))
        knobs |= {f"language_sft.{code}.{name}": said.get(name) for name in SFT_KNOBS}
    alone = "source_language_only" if about.get("trained_on") else "no_language_sft"

    def body(bench: Bench) -> None:
        bench.open(NEEDS["eval"])
        bench.products.sfts += [given, *languages.values()]
        cells = [Cell(code, "composed", given, languages[code]) for code in study.targets if code in languages]
        cells += [Cell(code, alone, given, None) for code in study.targets]
        _evaluate(bench, cells, int(about["training"]["max_length"]))

    return _run(study, run_dir, "eval", knobs, body)


def run_pretrain(study: StudySettings, text: Sequence[str], out: Path) -> None:
    """Pretrain a small encoder and copy its model folder to ``out``.

    Args:
        study: Resolved settings; ``model.pretrain`` and ``model.languages`` decide.
        text: Files, folders or globs used in place of the languages' own text.
        out: Folder of the model; must not exist or be empty.
    """
    from dataclasses import replace

    refuse_used(out)
    if text:
        # The files are the user's: relative to where the command was given, whatever data the study would use.
        places = [str(Path(place).expanduser().absolute()) for place in text]
        language = LanguageSettings(code="text", name="text", text=places)
        model = replace(study.model, languages=["text"], vocabulary=[])
        study = replace(study, model=model, pretrain_languages={"text": language})
    cache = _open_cache(study)
    data = study.data if text or not study.pretrains_on_family else family(study, cache)
    base = base_model(study, data, cache)
    _copy(base.folder, out)
    print(f"model: {short(out.absolute())}\nuse it with: model=local model.path={short(out.absolute())}")


def _evaluate(bench: Bench, cells: Sequence[Cell], max_length: int) -> None:
    if bench.products.base is None:
        raise RuntimeError("the bench is not open")
    evaluator = Evaluator(bench.study, bench.products.base, bench.cache, max_length)
    # Cells that share a composition's terms follow each other, so that the model changes least.
    for cell in sorted(cells, key=lambda item: (item.task.key, item.language_sft.key if item.language_sft else "")):
        bench.products.outcomes.append(evaluator.evaluate(cell, bench.tests[cell.language]))


def _open_cache(study: StudySettings) -> StageCache:
    return StageCache(study.cache_root, provenance=partial(_ready, study))


def _ready(study: StudySettings) -> dict[str, Any]:
    """Make torch ready for the first stage that computes, and say what it computes on."""
    import torch

    if study.trainer.threads is not None:
        torch.set_num_threads(study.trainer.threads)
    gpu = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of this job, not of the sweep's earlier ones
        gpu = torch.cuda.get_device_name() if study.trainer.accelerator != "cpu" else None
    return tracking.provenance(gpu=gpu)


def _copy(folder: Path, place: Path) -> None:
    """Copy a result out of the cache, whole or not at all; an existing folder is never overwritten."""
    refuse_used(place)
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if place.exists():
            place.rmdir()  # empty
        partial.replace(place)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        # copytree's own error lists one (source, target, reason) for each file.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        raise DeftxError(f"cannot write {place}: {reason}; free space or choose another out=FOLDER") from error


def _run(
    study: StudySettings,
    run_dir: Path,
    job: str,
    knobs: dict[str, Any],
    body: Callable[[Bench], None],
    *,
    kept: bool = False,
) -> tracking.RunRecord:
    """Run ``body`` around everything a run leaves behind, whether it succeeds or not.

    With ``kept``, a finished run goes into the cache: the same job of another sweep is then a copy of its files.
    """
    cache = _open_cache(study)
    record = tracking.RunRecord(
        study=study.name,
        job=f"{job}-{run_dir.name}",
        job_type=job,
        settings=knobs,
        seed=study.seed,
    )
    tracker = tracking.Tracker(
        study.logger,
        run_dir,
        study=study.name,
        job_type=job,
        name=record.job,
        config=record.settings,
        tags=[*study.methods, study.task, *study.targets],
    )
    with tracker, tracking.recording(run_dir, record):
        bench = Bench(study, cache, tracker.lightning_loggers)
        try:
            body(bench)
        finally:
            fill(record, bench)
            tables = write_tables(run_dir, bench)
            tracker.finish_run(record, tables, {sft.key: sft.folder for sft in bench.products.sfts})
    if kept:
        keep(study, bench, run_dir)
    if study.trainer.profile:
        tracking.print_steps(record.sfts)
    if bench.products.outcomes:
        show(study, record, run_dir, cache)
    return record
