"""A study under way: what it reads, opened before anything trains, and what it made, so that a failed run can say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deftx.cache import StageCache
from deftx.data.corpora import MissingTextError
from deftx.data.settings import LanguageSettings
from deftx.data.tasks import fingerprint_rows, load_test, own_test_rows
from deftx.errors import DeftxError
from deftx.stages.evaluate import SFT, Outcome
from deftx.stages.inputs import Base, Corpus, TaskRows, base_model, corpus, data_settings, task_rows
from deftx.stages.parts import split
from deftx.stages.preflight import Needs
from deftx.stages.profile import profile, profile_stage
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
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile_keys: dict[str, str] = field(default_factory=dict)


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
        for code, text in self.texts.items():
            if code in study.targets:
                products.profiles[code] = profile(code, text, products.base, self.cache)
                products.profile_keys[code] = profile_stage(code, text, products.base).key
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
