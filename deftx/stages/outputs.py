"""What a run leaves behind: record, predictions, diagnostics, the table on the terminal, a copy in the cache."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import tracking
from deftx.cache import StageCache, Workspace
from deftx.errors import DeftxError
from deftx.stages.bench import Bench
from deftx.stages.diagnostics import diagnostics
from deftx.stages.evaluate import SFT, Outcome
from deftx.stages.plan import cell_name, run_stage
from deftx.stages.settings import StudySettings

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def keep(study: StudySettings, bench: Bench, run_dir: Path) -> None:
    """Publish what the run wrote, under the keys of what it evaluated; a cache that cannot be written loses nothing."""
    names = (tracking.RESULT, tracking.METRICS, tracking.PREDICTIONS, tracking.DIAGNOSTICS)

    def publish(work: Workspace) -> None:
        for name in names:
            shutil.copyfile(run_dir / name, work.out / name)

    try:
        products = bench.products
        evaluated = {cell_name(outcome.cell): outcome.key for outcome in products.outcomes}
        bench.cache.get_or_compute(run_stage(study, evaluated, products.profile_keys), publish)
    except (DeftxError, OSError) as error:
        log.warning("the finished run is not kept in the cache, a sweep will run it again: %s", error)


def fill(record: tracking.RunRecord, bench: Bench) -> None:
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


def write_tables(run_dir: Path, bench: Bench) -> pd.DataFrame | None:
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


def show(study: StudySettings, record: tracking.RunRecord, run_dir: Path, cache: StageCache) -> None:
    metric = study.task_spec.metric
    files = {"result": tracking.RESULT, "predictions": tracking.PREDICTIONS, "diagnostics": tracking.DIAGNOSTICS}
    where = {what: short(run_dir / name) for what, name in files.items()} | {"stage cache": short(cache.root)}
    work = f"{cache.computed} stages computed, {cache.hits} from the cache, {record.seconds or 0:.0f} s"
    if not cache.computed and "imports" in record.times:
        work += f"; imports took {record.times['imports']:.0f} s"
    tracking.print_results(
        [item for item in record.metrics if item.metric == metric],
        title=f"{study.name}, {study.task} ({study.split}) from {'+'.join(study.sources)}",
        where=where,
        notes=[*record.notes, work],
    )


def short(path: Path) -> Path:
    """A path for people: relative to where the command was given, or to ``~``, where it lies below one of them."""
    for start, shown in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_relative_to(start):
            return shown / path.relative_to(start)
    return path
