"""One sparse fine-tuning as four cached stages: full phase -> decomposition -> selection -> sparse phase.

What each key holds is what changes its result and no more. The full phase knows neither rank nor K, so a sweep over
both trains it once for each language (or task) and seed; the decomposition knows neither, so five ranks cost one.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from deftx.cache import Entry, Stage, StageCache, Workspace, file_sha256
from deftx.data.settings import LanguageSettings
from deftx.stages.evaluate import SFT
from deftx.stages.inputs import Base, Corpus, TaskRows, stage_seed
from deftx.stages.recipes import Recipe, language_recipe, task_recipe
from deftx.stages.settings import SFTSettings, StudySettings

if TYPE_CHECKING:
    from deftx.core.denoise import MatrixReport

SFT_FOLDER = "sft"
MASK = "mask.safetensors"
DENOISING = "denoising.parquet"


class Plan(NamedTuple):
    """The stages of one SFT.

    The full phase's key holds neither rank nor K nor the sparse phase's λ; without denoising there is no decomposition.
    ``made`` gives the SFT: the sparse phase, or without a second phase Δ̂ on the mask.
    """

    full: Stage
    decompose: Stage | None
    select: Stage
    made: Stage
    k: int
    maskable: int


class Trainer:
    """Trains the SFTs of one study on one base model, from the cache where it can."""

    def __init__(
        self,
        study: StudySettings,
        base: Base,
        cache: StageCache,
        loggers: Callable[[str], list[Any]],
        *,
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self.study = study
        self.base = base
        self.cache = cache
        self.loggers = loggers
        self._shapes = dict(shapes or {})

    def language_recipe(self, language: LanguageSettings, corpus: Corpus, sft: SFTSettings) -> Recipe:
        """How φ_L is made."""
        return language_recipe(self.study, self.base, self.cache, language, corpus, sft)

    def task_recipe(self, rows: Mapping[str, TaskRows], sft: SFTSettings, on: Mapping[str, SFT]) -> Recipe:
        """How φ_T is made; see :func:`deftx.stages.recipes.task_recipe`."""
        return task_recipe(self.study, self.base, rows, sft, on)

    def language_sft(self, language: LanguageSettings, corpus: Corpus, sft: SFTSettings) -> SFT:
        """φ_L: masked language modelling on unlabelled text of one language."""
        return self.train(self.language_recipe(language, corpus, sft))

    def task_sft(self, rows: Mapping[str, TaskRows], sft: SFTSettings, on: Mapping[str, SFT]) -> SFT:
        """φ_T: classification on labels of one or several source languages."""
        return self.train(self.task_recipe(rows, sft, on))

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
        sft = recipe.sft
        maskable = sum(math.prod(shape) for shape in self.shapes(recipe.kind).values())
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
        if sft.mask == "random":
            # Drawn from the seed alone: neither full phase nor rank has a part in it.
            select = Stage(
                kind="select",
                version=1,
                settings={"mask": "random", "k": k, "objective": recipe.kind, "language": recipe.language},
                inputs={"base": recipe.inputs["base"]},
                seed=self.study.seed,
                label=label,
            )
        # Absent where nothing is lost: what was trained before there was a choice is the same result.
        stored = {} if sft.value_dtype == "float32" else {"value_dtype": sft.value_dtype}
        if sft.second_phase:
            made = Stage(
                kind="sparse",
                version=1,
                settings={**self._phase_settings(recipe, ignored=("l1_full", "log_every")), **stored},
                inputs={**recipe.inputs, "select": select.key},
                seed=self.study.seed,
                label=label,
            )
        else:
            made = Stage(
                kind="direct",
                version=1,
                settings={**sft.selection_settings(), **stored},
                inputs={**inputs, "select": select.key},
                label=label,
            )
        return Plan(full, decompose, select, made, k, maskable)

    def shapes(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of M for a ``language`` or a ``task`` SFT."""
        from deftx.training.model_folder import shapes_of

        if kind not in self._shapes:
            self._shapes[kind] = shapes_of(self.base.folder, kind=kind)
        return self._shapes[kind]

    def prepare(self, recipe: Recipe) -> None:
        """Everything that ranks and mask sizes share: the full phase, and its decomposition where one is needed."""
        plan = self.plan(recipe)
        if recipe.sft.needs_full:
            self._spectra(recipe, plan, self._full(recipe, plan))

    def train(self, recipe: Recipe) -> SFT:
        """The SFT, its stages from the cache where they are there."""
        plan = self.plan(recipe)
        sft = recipe.sft

        # Asked for from the end: a finished SFT needs none of its earlier stages, which may have been pruned.
        def sparse(work: Workspace) -> None:
            selection = self.cache.get_or_compute(plan.select, select)
            # None: pruned, and the selection was still there; or it has no part in this SFT.
            done = self.cache.find(plan.full) if sft.needs_full else None
            full = {} if done is None else json.loads(done.file("metrics.json").read_text(encoding="utf-8"))
            self._sparse_phase(recipe, selection, full, plan.maskable, work)

        def select(work: Workspace) -> None:
            if sft.mask == "random":
                self._draw(recipe, plan.k, work)
                return
            full = self._full(recipe, plan)
            self._select(recipe, full, self._spectra(recipe, plan, full), plan.k, work)

        def direct(work: Workspace) -> None:
            selection = self.cache.get_or_compute(plan.select, select)
            full = self._full(recipe, plan)
            self._direct(recipe, full, self._spectra(recipe, plan, full), selection, plan.maskable, work)

        entry = self.cache.get_or_compute(plan.made, sparse if sft.second_phase else direct)
        metrics = json.loads(entry.file("metrics.json").read_text(encoding="utf-8"))
        folder = entry.path / SFT_FOLDER
        return SFT(recipe.kind, f"{recipe.label} {sft.description}", folder, sft_sha(entry), metrics)

    def _full(self, recipe: Recipe, plan: Plan) -> Entry:
        return self.cache.get_or_compute(plan.full, lambda work: self._full_phase(recipe, work))

    def _spectra(self, recipe: Recipe, plan: Plan, full: Entry) -> Entry | None:
        if plan.decompose is None:
            return None
        return self.cache.get_or_compute(plan.decompose, lambda work: self._decompose(recipe, full, work))

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

    def _policies(self, recipe: Recipe, spectra: Entry | None) -> dict[str, Any]:
        """How this SFT denoises, with the decomposition that all ranks share."""
        from safetensors.torch import load_file

        from deftx.core.denoise import unpack_decompositions
        from deftx.core.settings import RankPolicy, ResidualPolicy

        sft = recipe.sft
        known = None if spectra is None else load_file(spectra.file("decompositions.safetensors"))
        return {
            "rank": RankPolicy.parse(sft.rank or "none"),
            "residual": ResidualPolicy.parse(sft.residual or "drop"),
            "exclude": sft.exclude,
            "decompositions": None if known is None else unpack_decompositions(known),
        }

    def _select(self, recipe: Recipe, full: Entry, spectra: Entry | None, k: int, work: Workspace) -> None:
        from safetensors.torch import save_file

        from deftx.training.callback import select

        selection = select(self._change(recipe, full), k=k, **self._policies(recipe, spectra))
        save_file(selection.indices, work.out / MASK)
        _write_denoising(work, selection.reports)

    def _draw(self, recipe: Recipe, k: int, work: Workspace) -> None:
        """A mask of K coordinates drawn evenly from M, for the ablation of selection."""
        from safetensors.torch import save_file

        from deftx.core.selection import draw_mask

        seed = stage_seed(self.study.seed, f"mask {recipe.kind}", recipe.language)
        save_file(draw_mask(self.shapes(recipe.kind), k, seed), work.out / MASK)
        _write_denoising(work, [])

    def _direct(
        self, recipe: Recipe, full: Entry, spectra: Entry | None, selection: Entry, maskable: int, work: Workspace
    ) -> None:
        """φ = Δ̂ on the mask and the head of the full phase: what remains without a second phase."""
        from safetensors.torch import load_file

        from deftx.core.delta import SparseDelta
        from deftx.core.denoise import denoise
        from deftx.training.callback import change_of

        module, fingerprint, drawn = recipe.load()
        state = load_file(full.file("full.safetensors"))
        denoised, reports = denoise(change_of(state, module), **self._policies(recipe, spectra))
        mask = {name: index for name, index in load_file(selection.file(MASK)).items() if index.numel()}
        metrics = json.loads(full.file("metrics.json").read_text(encoding="utf-8"))
        delta = SparseDelta(
            indices=mask,
            values={name: denoised[name].flatten()[index] for name, index in mask.items()},
            shapes={name: tuple(denoised[name].shape) for name in mask},
            head={name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")},
            metadata=self._metadata(recipe, fingerprint, drawn, mask, maskable, {}),
        )
        delta.save(work.out / SFT_FOLDER, value_dtype=recipe.sft.value_dtype)
        _write_denoising(work, reports)
        kept = {name: metrics[name] for name in ("monitor", "peak_memory", "train_examples")}
        nothing: dict[str, Any] = {"best_score": None, "best_step": 0, "steps": 0, "seconds": 0.0}
        nothing |= {"tokens_per_second": 0.0, "history": [], "padding": 0.0, "profile": {}}
        _write_json(work, kept | nothing, metrics)

    def _sparse_phase(
        self, recipe: Recipe, selection: Entry, full: Mapping[str, Any], maskable: int, work: Workspace
    ) -> None:
        import shutil

        from safetensors.torch import load_file

        from deftx.training.callback import SparseFineTuning
        from deftx.training.fit import fit_phase

        sft = recipe.sft
        module, fingerprint, drawn = recipe.load()
        mask = load_file(selection.file(MASK))
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
        metadata = self._metadata(
            recipe,
            fingerprint,
            drawn,
            mask,
            maskable,
            {module.monitor: result.best_score, "best_step": result.best_step},
        )
        callback.delta(metadata).save(work.out / SFT_FOLDER, value_dtype=sft.value_dtype)
        shutil.copyfile(selection.file(DENOISING), work.out / DENOISING)
        _write_metrics(work, result, module.monitor, full=full)

    def _metadata(
        self,
        recipe: Recipe,
        fingerprint: str,
        drawn: list[str],
        mask: Mapping[str, Any],
        maskable: int,
        metrics: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What ``sft.json`` says of an SFT."""
        sft = recipe.sft
        known: dict[str, Any] = {
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
            "metrics": dict(metrics),
            **recipe.metadata(),
        }
        if sft.mask != "magnitude":
            known["mask"] = sft.mask
        if not sft.second_phase:
            known["second_phase"] = False
        return known


def sft_sha(entry: Entry) -> str:
    """SHA-256 of the SFT's tensors, from the verified manifest."""
    record = entry.manifest["files"].get(f"{SFT_FOLDER}/sft.safetensors")
    return str(record["sha256"]) if record else file_sha256(entry.path / SFT_FOLDER / "sft.safetensors")


def _write_metrics(work: Workspace, result: Any, monitor: str, full: Mapping[str, Any] | None = None) -> None:
    """What a phase gave; beside a sparse phase's, its full phase's without the curve."""
    values = {"monitor": monitor, **asdict(result)}
    values.pop("checkpoint")
    _write_json(work, values, full)


def _write_json(work: Workspace, values: dict[str, Any], full: Mapping[str, Any] | None) -> None:
    if full:
        values["full"] = {key: value for key, value in full.items() if key != "history"}
    text = json.dumps(values, indent=1, sort_keys=True)
    (work.out / "metrics.json").write_text(text + "\n", encoding="utf-8")


def _write_denoising(work: Workspace, reports: Sequence[MatrixReport]) -> None:
    """Rank, energy kept and singular values of each denoised matrix; no rows where nothing was."""
    import pandas as pd

    rows = [
        {
            "parameter": report.name,
            "rank": report.rank,
            "energy": report.energy,
            "singular_values": report.singular_values.tolist(),
        }
        for report in reports
    ]
    frame = pd.DataFrame(rows, columns=["parameter", "rank", "energy", "singular_values"])
    frame.to_parquet(work.out / DENOISING)
