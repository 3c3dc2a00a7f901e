"""Writes what a run leaves behind: record, predictions, diagnostics, the table on the terminal, a copy in the cache."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deftx import tracking
from deftx.cache import StageCache, Workspace
from deftx.core.folder import FACTS, TENSORS
from deftx.data.settings import SPLITS
from deftx.errors import DeftxError
from deftx.methods import BY_PROXY, WITHOUT_LANGUAGE_SFT
from deftx.stages.base import PRETRAINING_TEXT
from deftx.stages.diagnostics import diagnostics
from deftx.stages.evaluate import Outcome
from deftx.stages.execute import UNKNOWN, Results, StudyProgress
from deftx.stages.graph import StudyGraph
from deftx.stages.inputs import MEASURES, REPORT, read_json, read_rows
from deftx.stages.learn import METRICS
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings
from deftx.tracking import CellFacts, Remark, SFTFacts
from deftx.units import time_text

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

OF_METHOD = {**WITHOUT_LANGUAGE_SFT, **BY_PROXY}


def keep(progress: StudyProgress, run_dir: Path) -> None:
    """Copy the run's files into the cache, under the keys of what it evaluated; only warns if that fails."""
    graph, results = progress.graph, progress.results
    if graph is None:
        return

    def publish(work: Workspace) -> None:
        # The copy then becomes stale once an evaluation is computed again with other bits.
        work.inputs.update({node.key: results.of(node) for node in graph.results})
        for name in tracking.RUN_FILES.values():
            shutil.copyfile(run_dir / name, work.out / name)

    try:
        results.cache.get_or_compute(graph.finished, publish)
    except (DeftxError, OSError) as error:
        log.warning("the finished run is not kept in the cache, a sweep will run it again: %s", error)


def fill(record: tracking.RunRecord, progress: StudyProgress) -> None:
    """Fill the record with the results so far; a failing run calls it, too."""
    study, cache = progress.study, progress.results.cache
    if "torch" in sys.modules:
        record.provenance, record.peak_memory["gpu"] = cache.provenance, _peak_gpu_memory()
    else:  # nothing was computed, and no device used
        record.provenance = tracking.provenance(threads=study.trainer.threads)
        record.peak_memory["gpu"] = None
    record.metrics = scores(progress.outcomes, list(study.targets), study.task_spec.metric)
    record.stages = [event._asdict() for event in cache.events]
    for event in cache.events:
        record.times[event.kind] = round(record.times.get(event.kind, 0.0) + event.seconds, 3)
    # Every stage that the results so far depend on, each once.
    lineage = {stage.key: stage for entry in progress.results.entries.values() for stage in entry.lineage}
    record.provenances = tracking.gather_provenances((stage.kind, stage.provenance) for stage in lineage.values())
    record.languages = {
        code: {"name": language.name, "family": language.family, "script": language.script}
        for code, language in study.targets.items()
    }
    if progress.graph is not None:
        _fill_from_graph(record, progress, progress.graph)
    record.notes = [*record.notes, *_remarks(record, progress)]


def _fill_from_graph(record: tracking.RunRecord, progress: StudyProgress, graph: StudyGraph) -> None:
    """Fill in SFTs, cells, text measures, and the data that was read: location, fingerprints, dropped rows."""
    from deftx.data.tasks import fingerprint_rows

    study, entries, inputs = progress.study, progress.results.entries, graph.inputs
    facts = {sft.key: _sft_facts(sft, progress.results) for sft in progress.sfts}
    record.sfts = list(facts.values())
    order = [cell.name for cell, _ in graph.cells]
    shown = sorted(progress.outcomes, key=lambda outcome: order.index(outcome.cell.name))
    record.cells = [_cell_facts(outcome, study.methods, facts) for outcome in shown]
    for code, node in graph.measures.items():
        if node.key in entries:
            record.languages[code] = {**record.languages[code], **read_json(entries[node.key].file(MEASURES))}
    reports = {("train", code): (f"rows {study.train} {code}", node) for code, node in inputs.rows.items()}
    reports |= {("text", code): (f"text {code}", node) for code, node in inputs.texts.items()}
    record.data = {
        name: read_json(entries[node.key].file(REPORT)) for name, node in reports.values() if node.key in entries
    }
    if graph.base.node is not None and graph.base.key in entries:
        texts = read_json(entries[graph.base.key].file(PRETRAINING_TEXT))
        record.data |= {f"base text {code}": report for code, report in texts.items()}
    digests = {role: record.data.get(name, {}).get("digest") for role, (name, _) in reports.items()}
    read = [replace(source, kept=digests.get((source.what, source.language))) for source in inputs.read]
    record.settings = {**record.settings, tracking.DATA_READ: tracking.data_setting(read)}
    record.fingerprints = {f"{split} {code}": fingerprint_rows(rows) for (code, split), rows in progress.tests.items()}
    record.fingerprints["base files"] = graph.base.key
    if graph.base.revision is not None:
        record.fingerprints["base commit"] = graph.base.revision
    for sft in record.sfts[:1]:
        record.fingerprints["base"] = str(sft.base)


def _sft_facts(sft: SFT, results: Results) -> SFTFacts:
    """Return an SFT's facts for ``result.json``; its training curve is in ``curves/``."""
    folder = results.folder(sft)
    stated = read_json(folder / FACTS)
    facts = stated["metadata"]
    trained = facts.get("metrics") or {} if sft.node is None else read_json(results.of(sft.node).file(METRICS))
    return SFTFacts(
        kind=sft.kind,
        key=sft.key,
        **{name: facts.get(name) for name in ("method", "rank", "residual", "k", "density", "task", "seed")},
        exclude=facts.get("exclude") or (),
        mask=facts.get("mask", "magnitude"),
        second_phase=facts.get("second_phase", True),
        value_dtype=stated.get("value_dtype", "float32"),
        languages=facts.get("languages") or (),
        base=facts.get("base_fingerprint"),
        on=sft.on,
        name=sft.name,
        bytes=(folder / TENSORS).stat().st_size,
        sha256=stated["sha256"][TENSORS],
        metrics={name: value for name, value in trained.items() if name != "history"},
    )


def _cell_facts(outcome: Outcome, methods: Sequence[str], facts: Mapping[str, SFTFacts]) -> CellFacts:
    cell = outcome.cell
    # A control composes the main method's SFTs; given SFTs name their own method.
    main = methods[0] if cell.task.node is not None else facts[cell.task.key].method
    method = cell.condition if cell.condition in methods else OF_METHOD.get(cell.condition, main)
    terms = tuple(facts[sft.key].term for sft in cell.sfts)
    return CellFacts(cell.language, cell.condition, cell.variant, method, outcome.key, terms, cell.split)


def _remarks(record: tracking.RunRecord, progress: StudyProgress) -> Iterator[Remark]:
    """Yield remarks that a reader should see beside the numbers."""
    study = progress.study
    yield from progress.remarks
    if study.splits == ("dev",):
        yield Remark("split", "evaluated on the dev split, not on test")
    skipped = progress.graph.inputs.skipped if progress.graph is not None else {}
    if skipped:
        yield Remark(
            "no_text", "no unlabelled text, so these rows are φ_T alone and no part of a method's mean", tuple(skipped)
        )
    if learnt := tuple(code for code in study.targets if code in study.sources):
        text = "labelled rows of the language were trained on, so its row is not zero-shot"
        yield Remark("not_zero_shot", text, learnt)
    if "source_sft" in study.controls and study.source_sft is None:
        yield Remark("no_source_sft", "source=none: there is no source SFT to leave in")
    if "other_language_sft" in study.controls and len(study.targets) == 1:
        yield Remark("one_target", "one target: there is no other target's language SFT to compose with")
    words = study.task_spec.labels
    tests = {
        " ".join((code, *([] if split == "test" else [split]))): rows for (code, split), rows in progress.tests.items()
    }
    if absent := _absent_labels(words, tests):
        yield Remark("absent_labels", "no test row has this label; macro-F1 is the mean over the others", absent)
    if progress.graph is not None:
        rows = {code: progress.results.entries.get(node.key) for code, node in progress.graph.inputs.rows.items()}
        frames = {code: read_rows(entry, "train") for code, entry in rows.items() if entry is not None}
        if untrained := _absent_labels(words, frames):
            yield Remark(
                "untrained_labels", "no training row has this label, so nothing learns to predict it", untrained
            )
    constant = tuple(
        outcome.cell.name for outcome in progress.outcomes if outcome.predictions["prediction"].nunique() == 1
    )
    if constant:
        text = "one class is predicted throughout, nothing was learnt or transferred"
        yield Remark("constant_predictions", text, constant)
    trained = [sft for sft in progress.sfts if sft.kind == "language" and sft.node is not None]
    if any(read_json(progress.results.folder(sft) / FACTS)["metadata"].get("head_drawn") for sft in trained):
        text = "the base has no trained MLM head: language SFTs started from a drawn one, which weakens them"
        yield Remark("drawn_head", text)
    if unread := tuple(
        f"{code} {kind} {facts['unknown']:.1%}"
        for (code, kind), facts in progress.coverage.items()
        if (facts["unknown"] or 0) > UNKNOWN
    ):
        yield Remark("unknown_pieces", "pieces of a language are unknown to the tokenizer", unread)
    if (remark := tracking.provenance_remark(record.provenances)) is not None:
        yield remark


def _absent_labels(words: Sequence[str], rows: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
    """Return language and label for each label that no row of a language has."""
    held = {code: set(frame["label"]) for code, frame in rows.items()}
    return tuple(f"{code} {word}" for code in rows for number, word in enumerate(words) if number not in held[code])


def _peak_gpu_memory() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def scores(outcomes: Sequence[Outcome], targets: Sequence[str], metric: str) -> list[tracking.Metric]:
    """Return one score for each language, condition, split and metric: the task's metric first, split by split.

    Targets stand in the order of ``targets``. A condition with several cells for one language (each other target's φ_L
    in turn) gives their mean.
    """
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        groups.setdefault((cell.split, cell.language, cell.condition), []).append(outcome.metrics)
    conditions = list(tracking.CONDITIONS)
    shown = sorted(
        groups, key=lambda group: (SPLITS.index(group[0]), targets.index(group[1]), conditions.index(group[2]))
    )
    computed = sorted({name for outcome in outcomes for name in outcome.metrics} - {"n", metric})
    metrics: list[tracking.Metric] = []
    for name in (metric, *computed):
        for split, language, condition in shown:
            values = groups[split, language, condition]
            value = sum(each[name] for each in values) / len(values)
            metrics.append(tracking.Metric(language, condition, name, value, int(values[0]["n"]), split))
    return metrics


def write_tables(run_dir: Path, progress: StudyProgress) -> pd.DataFrame | None:
    """Write the predictions and diagnostics that exist, and return the diagnostics."""
    import pandas as pd

    outcomes = progress.outcomes
    if outcomes:
        words = dict(enumerate(progress.study.task_spec.labels))
        frames = [
            outcome.predictions.assign(
                label=outcome.predictions["label"].map(words),
                prediction=outcome.predictions["prediction"].map(words),
                language=outcome.cell.language,
                condition=outcome.cell.condition,
                split=outcome.cell.split,
                variant=outcome.cell.variant,
            )
            for outcome in outcomes
        ]
        tracking.write_predictions(run_dir, pd.concat(frames, ignore_index=True))
    if not progress.sfts or progress.graph is None:
        return None
    folders = {sft: progress.results.folder(sft) for sft in progress.sfts}
    pairs = [(cell.task, cell.language_sft) for outcome in outcomes if (cell := outcome.cell).language_sft is not None]
    table = diagnostics(folders, pairs, progress.results.folder(progress.graph.base))
    tracking.write_diagnostics(run_dir, table)
    return table


def show(study: StudySettings, record: tracking.RunRecord, run_dir: Path, cache: StageCache) -> None:
    """Print the scores of the task's own metric, remarks, and the paths of the files."""
    metric = study.task_spec.metric
    # the scores are the table itself
    where = {name: short(run_dir / file) for name, file in tracking.RUN_FILES.items() if name != tracking.METRICS}
    where["stage cache"] = short(cache.root)
    work = f"{cache.computed} stages computed, {cache.hits} from the cache, {time_text(record.seconds or 0)}"
    if not cache.computed and "imports" in record.times:
        work += f"; imports took {time_text(record.times['imports'])}"
    tracking.print_results(
        [score for score in record.metrics if score.metric == metric],
        shared_source=study.source_shared,
        title=f"{study.name}, {study.task} ({'+'.join(study.splits)}) from {'+'.join(study.sources)}",
        where=where,
        notes=[*(note.line for note in record.notes), work],
    )


def short(path: Path) -> Path:
    """Shorten a path for display: relative to the working directory or to ``~`` if it lies below one of them."""
    for folder, name in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_relative_to(folder):
            return name / path.relative_to(folder)
    return path
