"""One sparse fine-tuning as four cached stages: full phase -> decomposition -> selection -> sparse phase.

What each key holds is what changes its result and no more. The full phase knows neither rank nor K, so a sweep over
both trains it once for each language (or task) and seed; the decomposition knows neither, so five ranks cost one.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from deftx.cache import Entry, Stage, StageCache, Workspace, file_sha256
from deftx.data.settings import LanguageSettings
from deftx.stages.evaluate import SFT
from deftx.stages.inputs import Base, Corpus, TaskRows, stage_seed
from deftx.stages.settings import SFTSettings, StudySettings

if TYPE_CHECKING:
    from deftx.training.modules import Encoder

SFT_FOLDER = "sft"


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
        metadata: What the SFT's ``sft.json`` says beside the settings.
    """

    kind: str
    language: str
    sft: SFTSettings
    inputs: Mapping[str, str]
    load: Callable[[], tuple[Encoder, str, list[str]]]
    data: Callable[[], Any]
    metadata: Mapping[str, Any]

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


class Plan(NamedTuple):
    """The stages of one SFT.

    The full phase's key holds neither rank nor K nor the sparse phase's λ; without denoising there is no decomposition.
    """

    full: Stage
    decompose: Stage | None
    select: Stage
    sparse: Stage
    k: int
    maskable: int


class Trainer:
    """Trains the SFTs of one study on one base model, from the cache where it can."""

    def __init__(
        self, study: StudySettings, base: Base, cache: StageCache, loggers: Callable[[str], list[Any]]
    ) -> None:
        self.study = study
        self.base = base
        self.cache = cache
        self.loggers = loggers

    def language_sft(self, language: LanguageSettings, corpus: Corpus, sft: SFTSettings) -> SFT:
        """φ_L: masked language modelling on unlabelled text of one language."""
        head_seed = stage_seed(self.study.seed, "head", "mlm")

        def load() -> tuple[Encoder, str, list[str]]:
            from deftx.training.encoder import base_fingerprint_of, load_masked_lm
            from deftx.training.modules import MaskedLM

            model, report = load_masked_lm(self.base.folder, seed=head_seed)
            return MaskedLM(model, sft.training), base_fingerprint_of(model), report.drawn

        def data() -> Any:
            from deftx.data.module import TextDataModule
            from deftx.training.encoder import load_tokenizer

            return TextDataModule.for_language(
                corpus.lines("train"),
                corpus.lines("valid"),
                load_tokenizer(self.base.folder),
                block_length=sft.training.max_length,
                seed=stage_seed(self.study.seed, "validation masks", language.code),
                mlm_probability=sft.training.mlm_probability,
                cache_dir=self.cache.root / "scratch" / "tokens",
            )

        recipe = Recipe(
            kind="language",
            language=language.code,
            sft=sft,
            inputs={"base": self.base.key, "data": corpus.key},
            load=load,
            data=data,
            metadata={"languages": [language.code], "task": None, "text": corpus.report},
        )
        return self._train(recipe)

    def task_sft(self, rows: Mapping[str, TaskRows], sft: SFTSettings, on: Mapping[str, SFT]) -> SFT:
        """φ_T: classification on labels of one or several source languages.

        Args:
            rows: Labelled rows by source language.
            sft: Settings of the SFT.
            on: φ_S by source language; empty trains on θ⁰. With one source language the model holds θ⁰ + φ_S. With
                several it holds θ⁰, and each batch is computed on θ⁰ + its own φ_S (method.md, multi-source).
        """
        # What it learns from decides it, not what it is evaluated on: AmericasNLI and XNLI share one.
        task = self.study.task_spec
        head_seed = stage_seed(self.study.seed, "head", self.study.train)
        several = len(rows) > 1

        def load() -> tuple[Encoder, str, list[str]]:
            from deftx.core.delta import Composition
            from deftx.training.encoder import base_fingerprint_of, base_parameters, load_classifier
            from deftx.training.modules import SequenceClassifier

            model, report = load_classifier(self.base.folder, labels=task.labels, seed=head_seed)
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

            tokenizer = load_tokenizer(self.base.folder)
            return TextDataModule.for_task(
                split("train"), split("valid"), tokenizer, max_length=sft.training.max_length
            )

        inputs = {"base": self.base.key}
        for code, item in rows.items():
            where = f".{code}" if several else ""
            inputs[f"data{where}"] = item.key
            if on:
                inputs[f"source_sft{where}"] = on[code].key
        recipe = Recipe(
            kind="task",
            language="+".join(rows),
            sft=sft,
            inputs=inputs,
            load=load,
            data=data,
            metadata={
                "languages": list(rows),
                "task": self.study.train,
                "labels": list(task.labels),
                "trained_on": {code: item.key for code, item in on.items()} or None,
                "rows": {code: item.report for code, item in rows.items()},
            },
        )
        return self._train(recipe)

    def _phase_settings(self, recipe: Recipe, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        training = {key: value for key, value in asdict(recipe.sft.training).items() if key not in ignored}
        if not training["length_buckets"] or recipe.kind == "language":
            training.pop("length_buckets")  # off is what there was before the setting: the same results, the same keys
        if recipe.kind == "task":
            training.pop("mlm_probability")
            training |= {"labels": list(self.study.task_spec.labels), "metric": self.study.task_spec.metric}
        return {
            "objective": recipe.kind,
            "language": recipe.language,
            "training": training,
            "precision": self.study.trainer.precision,
        }

    def plan(self, recipe: Recipe) -> Plan:
        """The stages of one SFT, their keys known before anything runs."""
        from deftx.training.model_folder import shapes_of

        sft = recipe.sft
        maskable = sum(math.prod(shape) for shape in shapes_of(self.base.folder, kind=recipe.kind).values())
        k = sft.size(maskable)
        full = Stage(
            kind="full",
            version=2 if recipe.kind == "language" else 1,  # 1 chose by a mean over batches, not over tokens
            settings=self._phase_settings(recipe, ignored=("l1_sparse", "log_every")),
            inputs=recipe.inputs,
            seed=self.study.seed,
            label=recipe.label,
        )
        inputs = {"full": full.key}
        decompose = None
        if sft.rank is not None:
            decompose = Stage(
                kind="decompose",
                version=1,
                settings={"exclude": list(sft.exclude)},
                inputs=dict(inputs),
                label=recipe.label,
            )
            inputs["decompose"] = decompose.key
        label = f"{recipe.label} {sft.description} K={k}"
        select = Stage(
            kind="select", version=1, settings={**sft.selection_settings(), "k": k}, inputs=inputs, label=label
        )
        # Absent where nothing is lost: what was trained before there was a choice is the same result.
        stored = {} if sft.value_dtype == "float32" else {"value_dtype": sft.value_dtype}
        sparse = Stage(
            kind="sparse",
            version=1,
            settings={**self._phase_settings(recipe, ignored=("l1_full", "log_every")), **stored},
            inputs={**recipe.inputs, "select": select.key},
            seed=self.study.seed,
            label=label,
        )
        return Plan(full, decompose, select, sparse, k, maskable)

    def _train(self, recipe: Recipe) -> SFT:
        plan = self.plan(recipe)

        # Asked for from the end: a finished SFT needs none of its earlier stages, which may have been pruned.
        def sparse(work: Workspace) -> None:
            selection = self.cache.get_or_compute(plan.select, select)
            done = self.cache.find(plan.full)  # None: pruned, and the selection was still there
            full = {} if done is None else json.loads(done.file("metrics.json").read_text(encoding="utf-8"))
            self._sparse_phase(recipe, selection, full, plan.maskable, work)

        def select(work: Workspace) -> None:
            full = self.cache.get_or_compute(plan.full, lambda inner: self._full_phase(recipe, inner))
            spectra = None
            if plan.decompose is not None:
                spectra = self.cache.get_or_compute(plan.decompose, lambda inner: self._decompose(recipe, full, inner))
            self._select(recipe, full, spectra, plan.k, work)

        entry = self.cache.get_or_compute(plan.sparse, sparse)
        metrics = json.loads(entry.file("metrics.json").read_text(encoding="utf-8"))
        folder = entry.path / SFT_FOLDER
        return SFT(recipe.kind, f"{recipe.label} {recipe.sft.description}", folder, _sft_sha(entry), metrics)

    def _full_phase(self, recipe: Recipe, work: Workspace) -> None:
        from safetensors.torch import save_file

        from deftx.training.callback import SparseFineTuning, full_state
        from deftx.training.fit import fit_phase

        module, _, _ = recipe.load()
        result = fit_phase(
            module,
            recipe.data(),
            SparseFineTuning("full", l1=recipe.sft.training.l1_full),
            recipe.sft.training,
            self.study.trainer,
            work.scratch / "checkpoints",
            seed=stage_seed(self.study.seed, "full", recipe.language),
            loggers=self.loggers(f"full/{recipe.slug}"),
            label=f"{recipe.label} · full phase",
        )
        save_file(full_state(module), work.out / "full.safetensors")
        _write_metrics(work, result, module.monitor)

    def _change(self, recipe: Recipe, full: Entry) -> dict[str, Any]:
        from safetensors.torch import load_file

        from deftx.training.callback import change_of

        module, _, _ = recipe.load()
        return change_of(load_file(full.file("full.safetensors")), module)

    def _decompose(self, recipe: Recipe, full: Entry, work: Workspace) -> None:
        from safetensors.torch import save_file

        from deftx.core.denoise import decompose_all, pack_decompositions

        change = self._change(recipe, full)
        with self._matrices(recipe, change) as done:
            found = decompose_all(change, exclude=recipe.sft.exclude, progress=done)
        save_file(pack_decompositions(found), work.out / "decompositions.safetensors")

    @contextlib.contextmanager
    def _matrices(self, recipe: Recipe, change: Mapping[str, Any]) -> Iterator[Callable[[str], None] | None]:
        """A progress bar over the matrices that are denoised, on a terminal."""
        from deftx.core.denoise import denoised_names

        if not (self.study.trainer.progress and sys.stderr.isatty()):
            yield None
            return
        from rich.console import Console
        from rich.progress import Progress

        total = len(denoised_names(change, recipe.sft.exclude))
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{recipe.label} · singular values", total=total)
            yield lambda name: bar.advance(task)

    def _select(self, recipe: Recipe, full: Entry, spectra: Entry | None, k: int, work: Workspace) -> None:
        import pandas as pd
        from safetensors.torch import load_file, save_file

        from deftx.core.denoise import unpack_decompositions
        from deftx.core.settings import RankPolicy, ResidualPolicy
        from deftx.training.callback import select

        sft = recipe.sft
        selection = select(
            self._change(recipe, full),
            rank=RankPolicy.parse(sft.rank or "none"),
            residual=ResidualPolicy.parse(sft.residual or "drop"),
            k=k,
            exclude=sft.exclude,
            decompositions=None
            if spectra is None
            else unpack_decompositions(load_file(spectra.file("decompositions.safetensors"))),
        )
        save_file(selection.indices, work.out / "mask.safetensors")
        rows = [
            {
                "parameter": report.name,
                "rank": report.rank,
                "energy": report.energy,
                "singular_values": report.singular_values.tolist(),
            }
            for report in selection.reports
        ]
        frame = pd.DataFrame(rows, columns=["parameter", "rank", "energy", "singular_values"])
        frame.to_parquet(work.out / "denoising.parquet")

    def _sparse_phase(
        self, recipe: Recipe, selection: Entry, full: Mapping[str, Any], maskable: int, work: Workspace
    ) -> None:
        import shutil

        from safetensors.torch import load_file

        from deftx.training.callback import SparseFineTuning
        from deftx.training.fit import fit_phase

        sft = recipe.sft
        module, fingerprint, drawn = recipe.load()
        mask = load_file(selection.file("mask.safetensors"))
        callback = SparseFineTuning("sparse", l1=sft.training.l1_sparse, selection=mask)
        result = fit_phase(
            module,
            recipe.data(),
            callback,
            sft.training,
            self.study.trainer,
            work.scratch / "checkpoints",
            seed=stage_seed(self.study.seed, "sparse", recipe.language),
            loggers=self.loggers(f"sparse/{recipe.slug}-{sft.method}"),
            label=f"{recipe.label} · sparse phase",
        )
        metadata = {
            "kind": recipe.kind,
            "method": sft.method,
            "base_model": self.base.name,
            "base_fingerprint": fingerprint,
            "rank": sft.rank,
            "residual": sft.residual,
            "exclude": list(sft.exclude),
            "k": sum(index.numel() for index in mask.values()),
            "maskable": maskable,
            "head_drawn": drawn,
            "seed": self.study.seed,
            "training": asdict(sft.training),
            "precision": self.study.trainer.precision,
            "metrics": {module.monitor: result.best_score, "best_step": result.best_step},
            **recipe.metadata,
        }
        callback.delta(metadata).save(work.out / SFT_FOLDER, value_dtype=sft.value_dtype)
        shutil.copyfile(selection.file("denoising.parquet"), work.out / "denoising.parquet")
        _write_metrics(work, result, module.monitor, full=full)


def _sft_sha(entry: Entry) -> str:
    """SHA-256 of the SFT's tensors, from the verified manifest."""
    record = entry.manifest["files"].get(f"{SFT_FOLDER}/sft.safetensors")
    return str(record["sha256"]) if record else file_sha256(entry.path / SFT_FOLDER / "sft.safetensors")


def _write_metrics(work: Workspace, result: Any, monitor: str, full: Mapping[str, Any] | None = None) -> None:
    """What a phase gave; beside a sparse phase's, its full phase's without the curve."""
    values = {"monitor": monitor, **asdict(result)}
    values.pop("checkpoint")
    if full:
        values["full"] = {key: value for key, value in full.items() if key != "history"}
    text = json.dumps(values, indent=1, sort_keys=True)
    (work.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
