"""What a study would compute: its stages in order, which of them are in the cache, and what the others may take.

The study is followed as a run follows it, with a cache that never computes. Keys of stages whose inputs are still to be
made cannot be known; they are built from the keys of those inputs' stages instead, so that two jobs of a sweep which
would make the same thing still agree on it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deftx.cache import FINGERPRINTS, Entry, Stage, StageCache, Workspace, fingerprint_files
from deftx.data.corpora import MissingTextError
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.data.tasks import load_test, own_test_rows
from deftx.stages.evaluate import SFT, Cell, Evaluator, study_cells
from deftx.stages.inputs import Base, Corpus, TaskRows, base_model, corpus, data_settings, task_rows
from deftx.stages.knobs import flat_knobs
from deftx.stages.parts import part
from deftx.stages.preflight import described, expected_shapes
from deftx.stages.profile import profile_stage
from deftx.stages.recipes import Recipe
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.stages.sft import SFT_FOLDER, Plan, Trainer, sft_sha
from deftx.tracking import SCHEMA_VERSION

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
PENDING = "pending:"
"""Stands before the key of the stage that will make an input, where the input's own fingerprint is not known yet."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a study.

    Attributes:
        part: The part of the study it belongs to (:mod:`deftx.stages.parts`); empty for evaluations and small data.
        stage: Its kind, label and key.
        cached: Whether its result is there.
        size: Bytes its result takes, as its shapes say; 0 for small ones.
        base: Key of the base encoder.
    """

    part: str
    stage: Stage
    cached: bool
    size: int = 0
    base: str = ""


@dataclass
class StudyPlan:
    """What one run consists of.

    Attributes:
        stages: In the order they run.
        result: The stage of the finished run; None where its key is not known yet.
        done: Its entry, if the very same run was finished before.
    """

    stages: list[PlannedStage] = field(default_factory=list)
    result: Stage | None = None
    done: Entry | None = None

    @property
    def missing(self) -> list[PlannedStage]:
        """Stages that would be computed."""
        return [item for item in self.stages if not item.cached]


def run_stage(study: StudySettings, evaluated: Mapping[str, str], profiles: Mapping[str, str]) -> Stage:
    """The finished run as a stage: all that its files are made from.

    Args:
        study: Resolved settings.
        evaluated: Key of each evaluation, by :func:`cell_name`.
        profiles: Key of each target's text measures, by language.
    """
    about = {code: [item.name, item.family, item.script] for code, item in study.targets.items()}
    return Stage(
        kind="run",
        version=1,
        settings={"knobs": flat_knobs(study), "languages": about, "schema": SCHEMA_VERSION},
        inputs={**evaluated, **{f"profile {code}": key for code, key in profiles.items()}},
        seed=study.seed,
        label=study.name,
    )


def cell_name(cell: Cell) -> str:
    """Language, condition and variant of an evaluation."""
    return " ".join(filter(None, (cell.language, cell.condition, cell.variant)))


class _MissingError(Exception):
    """A stage was asked for whose result is not there."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(str(stage))
        self.stage = stage


class _LookingCache(StageCache):
    """The cache as a dry run sees it: reads manifests, computes nothing, notes what it was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[Stage, bool]] = []

    def get_or_compute(
        self,
        stage: Stage,
        compute: Callable[[Workspace], None],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> Entry:
        entry = self.peek(stage)
        self.asked.append((stage, entry is not None))
        if entry is None:
            raise _MissingError(stage)
        return entry

    def fingerprint(self, paths: Sequence[Any], root: Any = None) -> str:
        return fingerprint_files(paths, root, memo=self.root / FINGERPRINTS, remember=False)


@dataclass
class _Inputs:
    """What a study reads, as far as it is there."""

    stages: list[PlannedStage]
    data: DataSettings | None
    base: Base
    texts: dict[str, Corpus]
    rows: dict[str, TaskRows]
    tests: dict[str, pd.DataFrame]
    shapes: dict[str, Mapping[str, tuple[int, ...]]]


class Planner:
    """Plans the runs of a sweep against one cache; what several of them read is looked at once."""

    def __init__(self, cache_root: str | Path) -> None:
        self.cache = _LookingCache(Path(cache_root))
        self._inputs: dict[str, _Inputs] = {}

    def plan(self, study: StudySettings) -> StudyPlan:
        """Follow one study.

        Args:
            study: Resolved settings, checked by :func:`~deftx.stages.preflight.preflight`.

        Raises:
            DeftxError: Data that cannot be read.
        """
        inputs = self._read(study)
        trainer = Trainer(study, inputs.base, self.cache, lambda _: [], shapes=inputs.shapes)
        walk = _Walk(study, trainer, inputs, list(inputs.stages))
        evaluated, profiles = walk.evaluations(), walk.profiles()
        known = not any(item.stage.version == 0 or _pending(item.stage) for item in walk.stages)
        plan = StudyPlan(walk.stages)
        # Parts of a study are no result: they are made, whatever was finished before.
        if known and not study.only and all(i.cached for i in walk.stages if i.stage.kind in ("evaluate", "profile")):
            plan.result = run_stage(study, evaluated, profiles)
            plan.done = self.cache.peek(plan.result)
        return plan

    def _read(self, study: StudySettings) -> _Inputs:
        # fmt: off
        read = (
            study.seed, study.model, study.task, study.train, study.split, study.source, study.more_sources,
            study.targets, study.pretrain_languages, study.source_sft is None, study.corpus, study.data,
            study.synthetic, study.missing_text, study.trainer.precision,
        )
        # fmt: on
        key = repr(read)
        if key not in self._inputs:
            self._inputs[key] = self._look(study)
        return self._inputs[key]

    def _ask(self, make: Callable[[], T]) -> T | Stage:
        try:
            return make()
        except _MissingError as missing:
            return missing.stage

    def _look(self, study: StudySettings) -> _Inputs:
        self.cache.asked.clear()
        unknown: list[Stage] = []

        def later(kind: str, label: str, on: Stage | None, **settings: Any) -> Stage:
            inputs = {} if on is None else {"on": PENDING + on.key}
            stage = Stage(kind, 0, settings, inputs, study.seed, label)
            unknown.append(stage)
            return stage

        found = self._ask(lambda: data_settings(study, self.cache))
        data = None if isinstance(found, Stage) else found
        made = found if isinstance(found, Stage) else None  # the generated family, still to be written
        languages = {**study.sources, **study.targets}
        own = own_test_rows(study.task, list(languages.values()), data) if data is not None else {}
        tests = {}
        if data is not None:
            tests = {
                code: load_test(study.task, language, data, split=study.split)
                for code, language in study.targets.items()
            }
        rows: dict[str, TaskRows] = {}
        for code, language in study.sources.items():
            if made is not None or data is None:
                stage: Any = later("task", f"rows {study.train} {code}", made, code=code)
                rows[code] = TaskRows(stage.key, None)
                continue
            entry = self._ask(lambda language=language: task_rows(study, language, data, self.cache, own))  # type: ignore[misc]
            rows[code] = TaskRows(entry.key, None) if isinstance(entry, Stage) else entry
        texts: dict[str, Corpus] = {}
        read = study.sources if study.source_sft is not None else {}
        for code, language in {**read, **study.targets}.items():
            if made is not None or data is None:
                stage = later("corpus", f"text {code}", made, code=code, corpus=repr(study.corpus))
                texts[code] = Corpus(stage.key, None)
                continue
            try:
                text = self._ask(lambda language=language: corpus(study, language, data, self.cache, own))  # type: ignore[misc]
            except MissingTextError:
                if study.missing_text != "skip" or code in read:
                    raise
                continue
            texts[code] = Corpus(text.key, None) if isinstance(text, Stage) else text
        base: Base | Stage
        if data is None and study.model.pretrain is not None and study.model.path is None:
            base = later("pretrain", f"base {study.model.name}", made, model=repr(study.model))
        else:
            base = self._ask(lambda: base_model(study, data or study.data, self.cache))
        shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
        if isinstance(base, Stage):
            with described(study) as folder:
                shapes = {kind: expected_shapes(study, folder, kind) for kind in ("language", "task")}
            base = Base(study.model.name, Path(), PENDING + base.key)
        stages = [
            PlannedStage("base" if stage.kind == "pretrain" else "", stage, cached)
            for stage, cached in [*self.cache.asked, *((stage, False) for stage in unknown)]
        ]
        return _Inputs(stages, data, base, texts, rows, tests, shapes)


class _Walk:
    """One study, from its inputs to its evaluations."""

    def __init__(self, study: StudySettings, trainer: Trainer, inputs: _Inputs, stages: list[PlannedStage]) -> None:
        self.study, self.trainer, self.inputs, self.stages = study, trainer, inputs, stages

    def profiles(self) -> dict[str, str]:
        """Note the stages of the targets' text measures; their keys by language."""
        keys = {}
        for code in self.study.targets:
            if code in self.inputs.texts:
                stage = profile_stage(code, self.inputs.texts[code], self.inputs.base)
                self._note("", stage, not _pending(stage) and self.trainer.cache.peek(stage) is not None)
                keys[code] = stage.key
        return keys

    def evaluations(self) -> dict[str, str]:
        """Note every stage of SFTs and evaluations; the keys of the latter by :func:`cell_name`."""
        study = self.study
        cells = study_cells(study, self.inputs.texts, self._language, self._task)
        evaluator = Evaluator(study, self.inputs.base, self.trainer.cache, study.task_sft.training.max_length)
        keys = {}
        for cell in cells:
            stage = self._evaluation(evaluator, cell)
            keys[cell_name(cell)] = stage.key
            cached = not _pending(stage) and self.trainer.cache.peek(stage) is not None
            self._note("", stage, cached, 80 * len(self.inputs.tests.get(cell.language, ())))
        return keys

    def _evaluation(self, evaluator: Evaluator, cell: Cell) -> Stage:
        rows = self.inputs.tests.get(cell.language)
        if rows is not None:
            return evaluator.stage(cell, rows)
        inputs = {"task": cell.task.key, "language": cell.language_sft.key if cell.language_sft else ""}
        return Stage("evaluate", 0, {"language": cell.language}, inputs, None, cell_name(cell))

    def _language(self, whose: str, language: LanguageSettings, sft: SFTSettings, method: str | None) -> SFT:
        return self._sft(whose, self.trainer.language_recipe(language, self.inputs.texts[language.code], sft), method)

    def _task(self, whose: str, method: str, on: Mapping[str, SFT]) -> SFT:
        sft = self.study.sft_for(method, self.study.task_sft)
        return self._sft(whose, self.trainer.task_recipe(self.inputs.rows, sft, on), method)

    def _sft(self, whose: str, recipe: Recipe, method: str | None) -> SFT:
        """Note the stages of one SFT, from its end: what made a finished one is not asked for."""
        plan, cache = self.trainer.plan(recipe), self.trainer.cache
        name = part("sft", whose, method)
        made = cache.peek(plan.made)
        if made is not None:
            self._note(name, plan.made, True)
            return SFT(recipe.kind, plan.made.label, made.path / SFT_FOLDER, sft_sha(made))
        selected = cache.peek(plan.select) is not None
        size = _sizes(self.trainer, recipe, plan)
        if recipe.sft.needs_full and not (selected and recipe.sft.second_phase):
            for stage in filter(None, (plan.full, plan.decompose)):
                self._note(part("full", whose), stage, cache.peek(stage) is not None, size[stage.kind])
        for stage, cached in ((plan.select, selected), (plan.made, False)):
            self._note(name, stage, cached, size[stage.kind])
        return SFT(recipe.kind, plan.made.label, Path(), PENDING + plan.made.key)

    def _note(self, name: str, stage: Stage, cached: bool, size: int = 0) -> None:
        if all(item.stage.key != stage.key for item in self.stages):
            self.stages.append(PlannedStage(name, stage, cached, size, self.inputs.base.key))


def _pending(stage: Stage) -> bool:
    return any(value.startswith(PENDING) for value in stage.inputs.values())


def _sizes(trainer: Trainer, recipe: Recipe, plan: Plan) -> dict[str, int]:
    """Bytes of each stage's result; docs/scaling.md has the formulas."""
    matrices = [shape for shape in trainer.shapes(recipe.kind).values() if len(shape) == 2]
    sft = round(5.03 * plan.k)
    return {
        "full": 4 * plan.maskable,
        "decompose": sum(8 * min(shape) ** 2 for shape in matrices),
        "select": 8 * plan.k,
        "sparse": sft,
        "direct": sft,
    }


class History:
    """How long stages took that are in the cache, as a guess at those that are not."""

    def __init__(self, cache_root: str | Path) -> None:
        self._seconds: dict[str, list[float]] = {}
        manifests = [entry.manifest for entry in StageCache(cache_root).entries()]
        bases = {str(item["key"]): str(item["inputs"].get("base", "")) for item in manifests if item["kind"] == "full"}
        for item in manifests:
            inputs = item["inputs"]
            base = str(inputs.get("base") or bases.get(str(inputs.get("full")), ""))
            likeness = _likeness(str(item["kind"]), item["settings"], base)
            self._seconds.setdefault(likeness, []).append(float(item["seconds"]))

    def seconds(self, item: PlannedStage) -> float | None:
        """The median of stages of the same kind, budget and base, whatever their language; None where none ran."""
        found = self._seconds.get(_likeness(item.stage.kind, item.stage.settings, item.base))
        return statistics.median(found) if found else None


def _likeness(kind: str, settings: Mapping[str, Any], base: str) -> str:
    """What stages that take about as long have in common."""
    training = settings.get("training") or {}
    told = {name: value for name, value in training.items() if not name.startswith("l1_")}
    own = base if kind in ("full", "decompose", "select", "sparse", "direct", "evaluate") else ""
    return repr((kind, settings.get("objective"), sorted(told.items(), key=str), own))


def totals(stages: Sequence[PlannedStage], history: History) -> tuple[float, int, int]:
    """Seconds, bytes, and how many of the stages have no seconds to go by."""
    guesses = [history.seconds(item) for item in stages]
    known = [value for value in guesses if value is not None]
    return math.fsum(known), sum(item.size for item in stages), len(guesses) - len(known)
