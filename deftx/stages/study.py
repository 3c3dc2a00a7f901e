"""A whole study: inputs, language SFTs, task SFTs, compositions, scores; and what a run leaves behind.

Each run writes ``result.json`` and ``metrics.csv`` (also when it fails), ``predictions.parquet`` and
``diagnostics.parquet`` into its folder, and prints one table: targets × conditions.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import tracking
from deftx.cache import StageCache
from deftx.data.corpora import MissingTextError
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.data.tasks import fingerprint_rows, load_test
from deftx.errors import DeftxError
from deftx.stages.diagnostics import diagnostics
from deftx.stages.evaluate import SFT, Cell, Evaluator, Outcome, plan_cells
from deftx.stages.inputs import Base, base_model, corpus, data_settings, task_rows
from deftx.stages.knobs import SFT_KNOBS, flat_knobs, given_knobs
from deftx.stages.preflight import refuse_used
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.stages.sft import Trainer

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass
class Products:
    """What a study made, filled in as it goes so that a failed run can say how far it got."""

    base: Base | None = None
    sfts: list[SFT] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    drawn: bool = False


@dataclass
class Bench:
    """A study under way: its settings, its cache, and the base and data that were found or made."""

    study: StudySettings
    cache: StageCache
    loggers: Callable[[str], list[Any]]
    products: Products = field(default_factory=Products)

    def open(self) -> tuple[DataSettings, Trainer]:
        """Find or make the data and θ⁰."""
        data = data_settings(self.study, self.cache)
        base = base_model(self.study, data, self.cache)
        self.products.base = base
        return data, Trainer(self.study, base, self.cache, self.loggers)

    def target_sft(
        self, trainer: Trainer, language: LanguageSettings, data: DataSettings, sft: SFTSettings
    ) -> SFT | None:
        """φ_L, or ``None`` for a target without text under ``missing_text=skip``."""
        try:
            return self.language_sft(trainer, language, data, sft)
        except MissingTextError as error:
            if self.study.missing_text != "skip":
                raise
            log.warning("%s: no unlabelled text, evaluated without a language SFT (%s)", language.code, error)
            if language.code not in self.products.skipped:
                self.products.skipped.append(language.code)
            return None

    def source_sfts(self, trainer: Trainer, data: DataSettings) -> dict[str, SFT]:
        """φ_S by source language; none under ``source=none``."""
        sft = self.study.source_sft
        if sft is None:
            return {}
        return {code: self.language_sft(trainer, language, data, sft) for code, language in self.study.sources.items()}

    def language_sft(self, trainer: Trainer, language: LanguageSettings, data: DataSettings, sft: SFTSettings) -> SFT:
        """The SFT of one language."""
        text = corpus(self.study, language, data, self.cache)
        self.products.reports[f"text {language.code}"] = text.report
        made = trainer.language_sft(language, text, sft)
        self.products.sfts.append(made)
        self.products.drawn |= bool(made.facts["head_drawn"])
        return made

    def task_sft(self, trainer: Trainer, data: DataSettings, sft: SFTSettings, on: dict[str, SFT]) -> SFT:
        """φ_T on θ⁰ + φ_S, or on θ⁰."""
        rows = {}
        for code, language in self.study.sources.items():
            rows[code] = task_rows(self.study, language, data, self.cache)
            self.products.reports[f"rows {self.study.train} {code}"] = rows[code].report
        made = trainer.task_sft(rows, sft, on)
        self.products.sfts.append(made)
        return made


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
        data, trainer = bench.open()
        source_sfts = bench.source_sfts(trainer, data)
        languages: dict[tuple[str, str], SFT] = {}
        for code, language in study.targets.items():
            for method in study.methods:
                made = bench.target_sft(trainer, language, data, study.sft_for(method, study.language_sft))
                if made is not None:
                    languages[code, method] = made
        tasks = {
            method: bench.task_sft(trainer, data, study.sft_for(method, study.task_sft), source_sfts)
            for method in study.methods
        }
        main = study.methods[0]
        without = None
        if "no_language_sft" in study.controls:
            without = bench.task_sft(trainer, data, study.sft_for(main, study.task_sft), {})
        cells = plan_cells(
            list(study.targets),
            main,
            tasks,
            languages,
            without_language=without,
            source_sft=source_sfts.get(study.source.code),
            controls=study.controls,
        )
        _evaluate(bench, cells, data, study.task_sft.training.max_length)

    return _run(study, run_dir, "run", flat_knobs(study), body)


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
        data, trainer = bench.open()
        method = study.methods[0]
        if kind == "language":
            made = {
                code: bench.target_sft(trainer, language, data, study.sft_for(method, study.language_sft))
                for code, language in study.targets.items()
            }
        else:
            settings = study.sft_for(method, study.task_sft)
            made = {study.task: bench.task_sft(trainer, data, settings, bench.source_sfts(trainer, data))}
        for name, sft in made.items():
            if sft is not None:
                place = destination if out is not None and len(made) == 1 else destination / name
                _copy_sft(sft, place)
                print(f"{sft.name}: {place}")

    return _run(study, run_dir, f"sft-{kind}", flat_knobs(study), body)


def run_eval(study: StudySettings, task_sft: str, language_sfts: dict[str, str], run_dir: Path) -> tracking.RunRecord:
    """Compose given SFTs and evaluate them.

    Args:
        study: Resolved settings: model, task, targets, split.
        task_sft: Folder or hub id of φ_T.
        language_sfts: Folder or hub id of φ_L by target; a target without one is evaluated on θ⁰ + φ_T.
        run_dir: Folder of this run.
    """
    from deftx.stages.sources import open_sft

    given = open_sft(task_sft, "task")
    about = given.facts
    needed = list(study.task_spec.labels)
    if about.get("labels") != needed:
        raise DeftxError(
            f"{task_sft} predicts {about.get('labels')}, {study.task} needs {needed}: give another task SFT"
        )
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
        data, _ = bench.open()
        bench.products.sfts += [given, *languages.values()]
        cells = [Cell(code, "composed", given, languages[code]) for code in study.targets if code in languages]
        cells += [Cell(code, alone, given, None) for code in study.targets]
        _evaluate(bench, cells, data, int(about["training"]["max_length"]))

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
    data = study.data if text else data_settings(study, cache)
    base = base_model(study, data, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base.folder, out, dirs_exist_ok=True)
    print(f"model: {out}\nuse it with: model=local model.path={out}")


def _evaluate(bench: Bench, cells: Sequence[Cell], data: DataSettings, max_length: int) -> None:
    study = bench.study
    base = bench.products.base
    if base is None:
        raise RuntimeError("the bench is not open")
    tests: dict[str, pd.DataFrame] = {
        code: load_test(study.task, language, data, split=study.split) for code, language in study.targets.items()
    }
    bench.products.tests = {f"{study.split} {code}": fingerprint_rows(rows) for code, rows in tests.items()}
    evaluator = Evaluator(study, base, bench.cache, max_length)
    # Cells that share a composition's terms follow each other, so that the model changes least.
    for cell in sorted(cells, key=lambda item: (item.task.key, item.language_sft.key if item.language_sft else "")):
        bench.products.outcomes.append(evaluator.evaluate(cell, tests[cell.language]))


def _open_cache(study: StudySettings) -> StageCache:
    return StageCache(study.cache_root, provenance=tracking.provenance())


def _copy_sft(sft: SFT, place: Path) -> None:
    """Copy an SFT out of the cache; an existing folder is never overwritten."""
    refuse_used(place)
    try:
        shutil.copytree(sft.folder, place, dirs_exist_ok=True)
    except OSError as error:
        raise DeftxError(f"cannot write {place}: {error.strerror or error}; choose another out=FOLDER") from error


def _run(
    study: StudySettings, run_dir: Path, job: str, knobs: dict[str, Any], body: Callable[[Bench], None]
) -> tracking.RunRecord:
    """Run ``body`` around everything a run leaves behind, whether it succeeds or not."""
    import torch

    if study.trainer.threads is not None:
        torch.set_num_threads(study.trainer.threads)
    cache = _open_cache(study)
    record = tracking.RunRecord(
        study=study.name,
        job=f"{job}-{run_dir.name}",
        settings=knobs,
        seed=study.seed,
        provenance=cache.provenance,
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
            _fill(record, bench)
            _write_tables(run_dir, bench)
        tracker.record(record.metrics, extra={"cache/hits": cache.hits, "cache/computed": cache.computed})
        for sft in dict.fromkeys(bench.products.sfts):
            tracker.artifact(sft.folder, name=sft.name, about={"sha256": sft.key, "role": sft.role})
    if bench.products.outcomes:
        _show(study, record, run_dir, cache)
    return record


def _fill(record: tracking.RunRecord, bench: Bench) -> None:
    """What a run has to say so far, also when it is about to fail."""
    study, products = bench.study, bench.products
    record.metrics = scores(products.outcomes, list(study.targets), study.task_spec.metric, study.split)
    record.stages = [event._asdict() for event in bench.cache.events]
    record.sfts = [
        {"name": sft.name, "sha256": sft.key, "metrics": {k: v for k, v in sft.metrics.items() if k != "history"}}
        for sft in dict.fromkeys(products.sfts)
    ]
    record.data = dict(products.reports)
    record.fingerprints = dict(products.tests)
    if products.base is not None:
        record.fingerprints["base"] = products.base.key
    if study.split != "test":
        record.notes.append(f"evaluated on the {study.split} split, not on test")
    record.notes += [f"{code}: no unlabelled text, so no language SFT in its row" for code in products.skipped]
    record.notes += [
        f"{code}: labelled rows of this language were trained on, so its row is not zero-shot"
        for code in study.targets
        if code in study.sources
    ]
    if products.drawn:
        record.notes.append(
            "the base has no trained MLM head: language SFTs started from a drawn one, which weakens them"
        )
    for event in bench.cache.events:
        record.times[event.kind] = round(record.times.get(event.kind, 0.0) + event.seconds, 3)
    record.peak_memory["gpu"] = _peak_gpu_memory()


def _peak_gpu_memory() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def scores(outcomes: Sequence[Outcome], targets: Sequence[str], metric: str, split: str) -> list[tracking.Metric]:
    """One score for each language, condition and metric: the task's own metric first, targets in the order given.

    A condition with several cells for one language (each other target's φ_L in turn) gives their mean.
    """
    found: list[tracking.Metric] = []
    for name in dict.fromkeys((metric, "macro_f1", "accuracy")):
        groups: dict[tuple[str, str], list[dict[str, float]]] = {}
        for outcome in outcomes:
            groups.setdefault((outcome.cell.language, outcome.cell.condition), []).append(outcome.metrics)
        known = list(tracking.CONDITIONS)
        for (language, condition), items in sorted(
            groups.items(), key=lambda item: (targets.index(item[0][0]), known.index(item[0][1]))
        ):
            value = sum(item[name] for item in items) / len(items)
            found.append(tracking.Metric(language, condition, name, value, int(items[0]["n"]), split))
    return found


def _write_tables(run_dir: Path, bench: Bench) -> None:
    import pandas as pd

    outcomes = bench.products.outcomes
    if outcomes:
        frames = [
            outcome.predictions.assign(
                language=outcome.cell.language, condition=outcome.cell.condition, variant=outcome.cell.variant
            )
            for outcome in outcomes
        ]
        tracking.write_predictions(run_dir, pd.concat(frames, ignore_index=True))
    if bench.products.sfts:
        tracking.write_diagnostics(run_dir, diagnostics(bench.products.sfts, outcomes))


def _show(study: StudySettings, record: tracking.RunRecord, run_dir: Path, cache: StageCache) -> None:
    metric = study.task_spec.metric
    files = {"result": tracking.RESULT, "predictions": tracking.PREDICTIONS, "diagnostics": tracking.DIAGNOSTICS}
    where = {what: _short(run_dir / name) for what, name in files.items()} | {"stage cache": _short(cache.root)}
    work = f"{cache.computed} stages computed, {cache.hits} from the cache, {record.seconds or 0:.0f} s"
    tracking.print_results(
        [item for item in record.metrics if item.metric == metric],
        title=f"{study.name}, {study.task} from {'+'.join(study.sources)}",
        where=where,
        notes=[*record.notes, work],
    )


def _short(path: Path) -> Path:
    """Relative to where the command was given, or to ``~``, where it lies below one of them."""
    for start, shown in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_relative_to(start):
            return shown / path.relative_to(start)
    return path
