"""A whole study: inputs, language SFTs, task SFTs, compositions, scores; and what a run leaves behind.

Each run writes ``result.json`` and ``metrics.csv`` (also when it fails), ``predictions.parquet`` and
``diagnostics.parquet`` into its folder, and prints one table: targets × conditions.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import tracking
from deftx.cache import StageCache, Workspace
from deftx.data.corpora import MissingTextError
from deftx.data.settings import LanguageSettings
from deftx.data.tasks import fingerprint_rows, load_test, own_test_rows
from deftx.errors import DeftxError
from deftx.stages.diagnostics import diagnostics
from deftx.stages.evaluate import SFT, Cell, Evaluator, Outcome, plan_cells
from deftx.stages.inputs import Base, Corpus, TaskRows, base_model, corpus, data_settings, family, task_rows
from deftx.stages.knobs import SFT_KNOBS, flat_knobs, given_knobs
from deftx.stages.parts import split
from deftx.stages.plan import run_stage
from deftx.stages.preflight import NEEDS, Needs, refuse_used
from deftx.stages.profile import profile
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.stages.sft import Trainer
from deftx.stages.sources import open_sft, open_task_sft

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
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Bench:
    """A study under way: its settings, its cache, and what it reads."""

    study: StudySettings
    cache: StageCache
    loggers: Callable[[str], list[Any]]
    products: Products = field(default_factory=Products)
    tests: dict[str, pd.DataFrame] = field(default_factory=dict)
    rows: dict[str, TaskRows] = field(default_factory=dict)
    texts: dict[str, Corpus] = field(default_factory=dict)

    def open(self, needs: Needs) -> Trainer:
        """Find or make all that the study reads before anything trains: no bad row is found hours later."""
        study, products = self.study, self.products
        data = data_settings(study, self.cache)
        if needs.tests:
            self.tests = {
                code: load_test(study.task, language, data, split=study.split)
                for code, language in study.targets.items()
            }
            products.tests = {f"{study.split} {code}": fingerprint_rows(rows) for code, rows in self.tests.items()}
        own = own_test_rows(study.task, list({**study.sources, **study.targets}.values()), data)
        if needs.task:
            for code, language in study.sources.items():
                self.rows[code] = task_rows(study, language, data, self.cache, own)
                products.reports[f"rows {study.train} {code}"] = self.rows[code].report
        read = study.sources if needs.task and study.source_sft is not None else {}
        for code, language in {**read, **(study.targets if needs.lang else {})}.items():
            try:
                self.texts[code] = corpus(study, language, data, self.cache, own)
                products.reports[f"text {code}"] = self.texts[code].report
            except MissingTextError as error:
                if study.missing_text != "skip" or code in read:
                    raise
                log.warning("%s: no unlabelled text, evaluated without a language SFT (%s)", code, error)
                products.skipped.append(code)
        self._refuse_mixed_forms()
        products.base = base_model(study, data, self.cache)
        products.profiles = {
            code: profile(code, text, products.base, self.cache)
            for code, text in self.texts.items()
            if code in study.targets
        }
        return Trainer(study, products.base, self.cache, self.loggers)

    def _refuse_mixed_forms(self) -> None:
        """Pairs to learn from and single sentences to predict, or the reverse, are two tasks."""
        learnt = {bool(item.rows("train")["text_pair"].notna().any()) for item in self.rows.values()}
        for code, rows in self.tests.items():
            if learnt and learnt != {bool(rows["text_pair"].notna().any())}:
                form = {True: "pairs", False: "single sentences"}
                raise DeftxError(
                    f"the test rows of {code} are {form[bool(rows['text_pair'].notna().any())]}, the training rows are "
                    f"{' and '.join(form[pair] for pair in sorted(learnt))}"
                )

    def language_sft(self, trainer: Trainer, language: LanguageSettings, sft: SFTSettings) -> SFT:
        """The SFT of one language."""
        made = trainer.language_sft(language, self.texts[language.code], sft)
        self.products.sfts.append(made)
        self.products.drawn |= bool(made.facts["head_drawn"])
        return made

    def target_sfts(self, trainer: Trainer, method: str) -> dict[str, SFT]:
        """φ_L of each target that has text, as ``method`` trains it."""
        sft = self.study.sft_for(method, self.study.language_sft)
        return {
            code: self.language_sft(trainer, language, sft)
            for code, language in self.study.targets.items()
            if code in self.texts
        }

    def source_sfts(self, trainer: Trainer) -> dict[str, SFT]:
        """φ_S by source language; none under ``source=none``."""
        sft = self.study.source_sft
        if sft is None:
            return {}
        return {code: self.language_sft(trainer, language, sft) for code, language in self.study.sources.items()}

    def task_sft(self, trainer: Trainer, method: str, on: dict[str, SFT]) -> SFT:
        """φ_T on θ⁰ + φ_S, or on θ⁰."""
        made = trainer.task_sft(self.rows, self.study.sft_for(method, self.study.task_sft), on)
        self.products.sfts.append(made)
        return made

    def make(self, trainer: Trainer, name: str) -> None:
        """One part of the study (:mod:`deftx.stages.parts`)."""
        study = self.study
        phase, whose, code, method = split(name)
        method = method or study.methods[0]
        languages = study.sources if whose == "source" else study.targets
        if (whose == "source" and study.source_sft is None) or (code is not None and code not in languages):
            raise DeftxError(f"only={name!r}: this study trains no such SFT; its languages: {', '.join(languages)}")
        if method not in study.methods:
            raise DeftxError(f"only={name!r}: this study has no such method; it has {', '.join(study.methods)}")
        if phase == "base" or (code is not None and code not in self.texts):
            return  # made when the study was opened; a target without text has nothing to make
        if code is not None:
            own = study.source_sft if whose == "source" else study.sft_for(method, study.language_sft)
            if own is None:
                raise RuntimeError("checked above")
            if phase == "sft":
                self.language_sft(trainer, languages[code], own)
            else:
                trainer.prepare(trainer.language_recipe(languages[code], self.texts[code], own))
            return
        on = self.source_sfts(trainer) if whose == "task" else {}
        if phase == "sft":
            self.task_sft(trainer, method, on)
        else:
            trainer.prepare(trainer.task_recipe(self.rows, study.sft_for(method, study.task_sft), on))


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
        source_sfts = bench.source_sfts(trainer)
        languages = {
            (code, method): sft for method in study.methods for code, sft in bench.target_sfts(trainer, method).items()
        }
        tasks = {method: bench.task_sft(trainer, method, source_sfts) for method in study.methods}
        main = study.methods[0]
        without = bench.task_sft(trainer, main, {}) if "no_language_sft" in study.controls else None
        cells = plan_cells(
            list(study.targets),
            main,
            tasks,
            languages,
            without_language=without,
            source_sft=source_sfts.get(study.source.code),
            controls=study.controls,
        )
        _evaluate(bench, cells, study.task_sft.training.max_length)

    return _run(study, run_dir, "run", flat_knobs(study), body, keep=True)


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

    return _run(study, run_dir, "stage", flat_knobs(study), body)


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
            print(f"{sft.name}: {_short(place)}")

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
    print(f"model: {_short(out.absolute())}\nuse it with: model=local model.path={_short(out.absolute())}")


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
    keep: bool = False,
) -> tracking.RunRecord:
    """Run ``body`` around everything a run leaves behind, whether it succeeds or not.

    With ``keep``, a finished run goes into the cache: the same job of another sweep is then a copy of its files.
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
            _fill(record, bench)
            tables = _write_tables(run_dir, bench)
            tracker.finish_run(record, tables, {sft.key: sft.folder for sft in bench.products.sfts})
    if keep:
        _keep(study, bench, run_dir)
    if study.trainer.profile:
        tracking.print_steps(record.sfts)
    if bench.products.outcomes:
        _show(study, record, run_dir, cache)
    return record


def _keep(study: StudySettings, bench: Bench, run_dir: Path) -> None:
    """Publish what the run wrote, under the keys of what it evaluated; a cache that cannot be written loses nothing."""
    names = (tracking.RESULT, tracking.METRICS, tracking.PREDICTIONS, tracking.DIAGNOSTICS)

    def publish(work: Workspace) -> None:
        for name in names:
            shutil.copyfile(run_dir / name, work.out / name)

    try:
        bench.cache.get_or_compute(run_stage(study, [outcome.key for outcome in bench.products.outcomes]), publish)
    except (DeftxError, OSError) as error:
        log.warning("the finished run is not kept in the cache, a sweep will run it again: %s", error)


def _fill(record: tracking.RunRecord, bench: Bench) -> None:
    """What a run has to say so far, also when it is about to fail."""
    study, products = bench.study, bench.products
    loaded = "torch" in sys.modules  # else nothing was computed, and no device used
    record.provenance = bench.cache.provenance if loaded else tracking.provenance(threads=study.trainer.threads)
    record.peak_memory["gpu"] = _peak_gpu_memory() if loaded else None
    record.metrics = scores(products.outcomes, list(study.targets), study.task_spec.metric, study.split)
    record.stages = [event._asdict() for event in bench.cache.events]
    record.sfts = [_about(sft) for sft in dict.fromkeys(products.sfts)]
    record.languages = {
        code: {"name": language.name, "family": language.family, "script": language.script}
        | products.profiles.get(code, {})
        for code, language in study.targets.items()
    }
    record.data = dict(products.reports)
    record.fingerprints = dict(products.tests)
    if products.base is not None:
        record.fingerprints["base files"] = products.base.key
    for sft in products.sfts[:1]:
        record.fingerprints["base"] = str(sft.facts["base_fingerprint"])
    if study.split != "test":
        record.notes.append(f"evaluated on the {study.split} split, not on test")
    record.notes += [f"{code}: no unlabelled text, so no language SFT in its row" for code in products.skipped]
    record.notes += [
        f"{code}: labelled rows of this language were trained on, so its row is not zero-shot"
        for code in study.targets
        if code in study.sources
    ]
    if "source_sft" in study.controls and study.source_sft is None:
        record.notes.append("source=none: there is no source SFT to leave in")
    if "other_language_sft" in study.controls and len(study.targets) == 1:
        record.notes.append("one target: there is no other target's language SFT to compose with")
    constant = [
        " ".join(part for part in (cell.language, cell.condition, cell.variant) if part)
        for cell, predictions in ((outcome.cell, outcome.predictions) for outcome in products.outcomes)
        if predictions["prediction"].nunique() == 1
    ]
    if constant:
        record.notes.append(
            f"one class is predicted throughout, nothing was learnt or transferred: {', '.join(constant)}"
        )
    if products.drawn:
        record.notes.append(
            "the base has no trained MLM head: language SFTs started from a drawn one, which weakens them"
        )
    for event in bench.cache.events:
        record.times[event.kind] = round(record.times.get(event.kind, 0.0) + event.seconds, 3)


def _about(sft: SFT) -> dict[str, Any]:
    """An SFT as ``result.json`` tells of it; its curve is in ``curves/``."""
    facts = sft.facts
    return {
        "name": sft.name,
        "role": sft.role,
        "method": facts.get("method"),
        "languages": facts.get("languages"),
        "k": facts.get("k"),
        "bytes": (sft.folder / "sft.safetensors").stat().st_size,
        "sha256": sft.key,
        "metrics": {name: value for name, value in sft.metrics.items() if name != "history"},
    }


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


def _write_tables(run_dir: Path, bench: Bench) -> pd.DataFrame | None:
    """Predictions and diagnostics, so far as there are any; the diagnostics are returned."""
    import pandas as pd

    outcomes = bench.products.outcomes
    if outcomes:
        words = dict(enumerate(bench.study.task_spec.labels))
        frames = [
            outcome.predictions.assign(
                label=outcome.predictions["label"].map(words),
                prediction=outcome.predictions["prediction"].map(words),
                language=outcome.cell.language,
                condition=outcome.cell.condition,
                variant=outcome.cell.variant,
            )
            for outcome in outcomes
        ]
        tracking.write_predictions(run_dir, pd.concat(frames, ignore_index=True))
    if not bench.products.sfts or bench.products.base is None:
        return None
    found = diagnostics(bench.products.sfts, outcomes, bench.products.base.folder)
    tracking.write_diagnostics(run_dir, found)
    return found


def _show(study: StudySettings, record: tracking.RunRecord, run_dir: Path, cache: StageCache) -> None:
    metric = study.task_spec.metric
    files = {"result": tracking.RESULT, "predictions": tracking.PREDICTIONS, "diagnostics": tracking.DIAGNOSTICS}
    where = {what: _short(run_dir / name) for what, name in files.items()} | {"stage cache": _short(cache.root)}
    work = f"{cache.computed} stages computed, {cache.hits} from the cache, {record.seconds or 0:.0f} s"
    if not cache.computed and "imports" in record.times:
        work += f"; imports took {record.times['imports']:.0f} s"
    tracking.print_results(
        [item for item in record.metrics if item.metric == metric],
        title=f"{study.name}, {study.task} ({study.split}) from {'+'.join(study.sources)}",
        where=where,
        notes=[*record.notes, work],
    )


def _short(path: Path) -> Path:
    """Relative to where the command was given, or to ``~``, where it lies below one of them."""
    for start, shown in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_relative_to(start):
            return shown / path.relative_to(start)
    return path
