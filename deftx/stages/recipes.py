"""How an SFT is made, before anything of it is: what it learns from, what it starts from, what its files will say.

A recipe reads nothing until it is asked for its module or its data: a dry run can follow it to the stages' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deftx.cache import StageCache
from deftx.data.settings import LanguageSettings
from deftx.stages.evaluate import SFT
from deftx.stages.inputs import Base, Corpus, TaskRows, stage_seed
from deftx.stages.settings import SFTSettings, StudySettings

if TYPE_CHECKING:
    from deftx.training.modules import Encoder


@dataclass(frozen=True)
class Recipe:
    """What the stages of one SFT share.

    Attributes:
        kind: ``language`` or ``task``.
        language: Language the text or the rows are in.
        sft: Settings of the SFT.
        inputs: Keys of base, data and, for a task SFT, of the φ_S it is trained on; several sources by language.
        load: Gives a freshly loaded module holding θ⁰ (+ φ_S), h⁰; the fingerprint of θ⁰; and
            the names of head tensors that were drawn, not read.
        data: Gives the data module.
        metadata: Gives what the SFT's ``sft.json`` says beside the settings.
    """

    kind: str
    language: str
    sft: SFTSettings
    inputs: Mapping[str, str]
    load: Callable[[], tuple[Encoder, str, list[str]]]
    data: Callable[[], Any]
    metadata: Callable[[], Mapping[str, Any]]

    @property
    def label(self) -> str:
        """How logs name it: ``language qba``, ``task on θ⁰+qaa``, ``task on θ⁰``; with several sources all of them."""
        if self.kind == "language":
            return f"language {self.language}"
        if self.on_source_sfts:
            return f"task on θ⁰+{self.language}"
        return "task on θ⁰" if "data" in self.inputs else f"task {self.language} on θ⁰"

    @property
    def slug(self) -> str:
        """A stable name for training curves: ``language-qba``, ``task-on-qaa``, ``task``."""
        if self.kind == "language":
            return f"language-{self.language}"
        return f"task-on-{self.language}" if self.on_source_sfts else "task"

    @property
    def on_source_sfts(self) -> bool:
        """Whether φ_S of the source languages lie under it."""
        return any(name.startswith("source_sft") for name in self.inputs)


def language_recipe(
    study: StudySettings, base: Base, cache: StageCache, language: LanguageSettings, corpus: Corpus, sft: SFTSettings
) -> Recipe:
    """φ_L: masked language modelling on unlabelled text of one language."""
    head_seed = stage_seed(study.seed, "head", "mlm")

    def load() -> tuple[Encoder, str, list[str]]:
        from deftx.training.encoder import base_fingerprint_of, load_masked_lm
        from deftx.training.modules import MaskedLM

        model, report = load_masked_lm(base.folder, seed=head_seed)
        return MaskedLM(model, sft.training), base_fingerprint_of(model), report.drawn

    def data() -> Any:
        from deftx.data.module import TextDataModule
        from deftx.training.encoder import load_tokenizer

        return TextDataModule.for_language(
            corpus.lines("train"),
            corpus.lines("valid"),
            load_tokenizer(base.folder),
            block_length=sft.training.max_length,
            seed=stage_seed(study.seed, "validation masks", language.code),
            mlm_probability=sft.training.mlm_probability,
            cache_dir=cache.root / "scratch" / "tokens",
        )

    return Recipe(
        kind="language",
        language=language.code,
        sft=sft,
        inputs={"base": base.key, "data": corpus.key},
        load=load,
        data=data,
        metadata=lambda: {"languages": [language.code], "task": None, "text": corpus.report},
    )


def task_recipe(
    study: StudySettings, base: Base, rows: Mapping[str, TaskRows], sft: SFTSettings, on: Mapping[str, SFT]
) -> Recipe:
    """φ_T: classification on labels of one or several source languages.

    Args:
        study: Resolved settings.
        base: θ⁰.
        rows: Labelled rows by source language.
        sft: Settings of the SFT.
        on: φ_S by source language; empty trains on θ⁰. With one source language the model holds θ⁰ + φ_S. With
            several it holds θ⁰, and each batch is computed on θ⁰ + its own φ_S (method.md, multi-source).
    """
    # What it learns from decides it, not what it is evaluated on: AmericasNLI and XNLI share one.
    task = study.task_spec
    head_seed = stage_seed(study.seed, "head", study.train)
    several = len(rows) > 1

    def load() -> tuple[Encoder, str, list[str]]:
        from deftx.core.delta import Composition
        from deftx.training.encoder import base_fingerprint_of, base_parameters, load_classifier
        from deftx.training.modules import SequenceClassifier

        model, report = load_classifier(base.folder, labels=task.labels, seed=head_seed)
        fingerprint = base_fingerprint_of(model)
        deltas = [on[code].load() for code in rows if on]
        if not several:
            parameters = {name: parameter.data for name, parameter in base_parameters(model).items()}
            composition = Composition(parameters, base_fingerprint=fingerprint)
            for delta in deltas:
                composition.add("source", delta)
        shifts = deltas if several else []
        module = SequenceClassifier(model, sft.training, metric=task.metric, source_sfts=shifts)
        return module, fingerprint, report.drawn

    def data() -> Any:
        import pandas as pd

        from deftx.data.module import TextDataModule
        from deftx.training.encoder import load_tokenizer

        def split(name: str) -> pd.DataFrame:
            if not several:
                return next(iter(rows.values())).rows(name)
            frames = [item.rows(name).assign(source=number) for number, item in enumerate(rows.values())]
            return pd.concat(frames, ignore_index=True)

        tokenizer = load_tokenizer(base.folder)
        return TextDataModule.for_task(split("train"), split("valid"), tokenizer, max_length=sft.training.max_length)

    inputs = {"base": base.key}
    for code, item in rows.items():
        where = f".{code}" if several else ""
        inputs[f"data{where}"] = item.key
        if on:
            inputs[f"source_sft{where}"] = on[code].key
    return Recipe(
        kind="task",
        language="+".join(rows),
        sft=sft,
        inputs=inputs,
        load=load,
        data=data,
        metadata=lambda: {
            "languages": list(rows),
            "task": study.train,
            "labels": list(task.labels),
            "trained_on": {code: item.key for code, item in on.items()} or None,
            "rows": {code: item.report for code, item in rows.items()},
        },
    )
