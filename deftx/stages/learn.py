"""One sparse fine-tuning as nodes: full phase -> decomposition -> selection -> sparse phase.

What each key holds is what changes its result and no more. The full phase knows neither rank nor K, so a sweep over
both trains it once for each language (or task) and seed; the decomposition knows neither, so five ranks cost one. Which
of the four nodes an SFT has follows from its method (:mod:`deftx.methods`).

Shapes: M is the maskable parameters, a mapping from the base model's own names to float32 tensors of any shape; a mask
gives for each name the sorted flat indices that are selected, int64 [count], K over all names.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Workspace
from deftx.knobs import read_settings
from deftx.methods import SCORED
from deftx.methods.sparse import BUDGETS
from deftx.stages.base import check_device
from deftx.stages.evidence import DECOMPOSITIONS, FULL, StageEvidence, at_start
from deftx.stages.node import Loggers, Node, node, stage_seed
from deftx.stages.objectives import SFT, SFT_FOLDER, Objective
from deftx.stages.settings import SFTSettings

if TYPE_CHECKING:
    from torch import Tensor

    from deftx.core.denoise import MatrixReport
    from deftx.training.fit import PhaseResult
    from deftx.training.modules import Encoder

FULL_METRICS = "full.json"
MASK = "mask.safetensors"
DENOISING = "denoising.parquet"
METRICS = "metrics.json"
BYTES_PER_COORDINATE = 5.03  # of an SFT's file, measured (benchmarks/RESULTS.md)


@dataclass(frozen=True)
class SFTNodes:
    """The nodes of one SFT. The full phase's key holds neither rank nor K nor the sparse phase's λ.

    Attributes:
        full: θ¹; None where nothing of it is read.
        decompose: Singular values and vectors of Δ; None without denoising.
        select: The mask.
        final: The SFT: the sparse phase, or without a second phase Δ̂ on the mask.
        sft: What others need of it.
    """

    full: Node | None
    decompose: Node | None
    select: Node
    final: Node
    sft: SFT

    @property
    def shared(self) -> list[Node]:
        """What does not depend on rank or K."""
        return [item for item in (self.full, self.decompose) if item is not None]


def sft_nodes(objective: Objective, sft: SFTSettings) -> SFTNodes:
    """Return the nodes of one SFT, their keys known before anything runs.

    Args:
        objective: What it is trained for.
        sft: How.
    """
    study, base = objective.study, objective.base
    phases = _Phases(objective, sft)
    start = {**objective.start}
    content = dict(base.content)
    trained: dict[str, Any] = {"needs": {**start, **objective.data}, "content": content, "seed": study.seed}
    label = f"{objective.label} {sft.description} K={phases.expected_k}"
    full = decompose = None
    if "full" in sft.reads:
        full = node(
            "full",
            2,
            phases.settings("full"),
            phases.full,
            **trained,
            label=objective.label,
            product=(FULL,),
            size=4 * phases.maskable,
        )
    if "decompose" in sft.reads and full is not None:
        decompose = node(
            "decompose",
            2,
            {"exclude": sft.exclude},
            phases.decompose,
            needs={"full": full, **start},
            content=content,
            label=objective.label,
            size=sum(8 * min(shape) ** 2 for shape in phases.shapes.values() if len(shape) == 2),
        )
    scored = SCORED[sft.scored]
    evidence = {name: item for name, item in (("full", full), ("decompose", decompose)) if item is not None}
    read = {name: item for name, item in evidence.items() if name in scored.reads}
    settings: dict[str, Any] = {"scored": sft.scored, "budget": sft.choices.budget, **sft.asked_size()}
    if "decompose" in read:
        settings |= sft.policies()
    if not read:
        settings |= {"objective": objective.kind}
    if scored.drawn:
        settings |= {"language": objective.language}
    select = node(
        "select",
        2,
        settings,
        phases.select,
        # Of a mask that does not look at it, what lies under the SFT is no input: several SFTs may have one mask.
        needs={**read, **(start if read or "start" in scored.reads else base.needs)},
        content=content,
        seed=study.seed if scored.drawn else None,
        label=label,
        product=(MASK,),
        size=8 * phases.expected_k,
    )
    # Absent where nothing is lost: what was trained before there was a choice is the same result.
    stored = {} if sft.value_dtype == "float32" else {"value_dtype": sft.value_dtype}
    size = round(BYTES_PER_COORDINATE * phases.expected_k)
    options: dict[str, Any] = {"label": label, "product": (f"{SFT_FOLDER}/sft.safetensors",), "size": size}
    if sft.second_phase:
        settings = {**phases.settings("sparse"), **stored}
        trained["needs"] = {**trained["needs"], "select": select}
        final = node("sparse", 2, settings, phases.sparse, **trained, **options)
    else:
        final = node(
            "direct",
            2,
            {**sft.policies(), **stored},
            phases.direct,
            needs={**evidence, "select": select, **start, **objective.data},
            content=content,
            **options,
        )
    on = tuple(item.key for item in objective.source_sfts.values())
    name = f"{objective.label} {sft.description}"
    made_sft = SFT(objective.kind, name, final.key, node=final, on=on, composition=sft.choices.composition)
    return SFTNodes(full, decompose, select, final, made_sft)


class _Phases:
    """How the nodes of one SFT are computed."""

    def __init__(self, objective: Objective, sft: SFTSettings) -> None:
        self.objective = objective
        self.sft = sft
        self.study = objective.study

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of M, as the base's configuration says; a base's own vocabulary may turn out smaller."""
        return self.objective.base.shapes(self.objective.kind)

    @property
    def maskable(self) -> int:
        """Parameters of M."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def expected_k(self) -> int:
        """K, as far as it is known before the base is there."""
        return self.sft.size(self.maskable)

    def settings(self, phase: str) -> dict[str, Any]:
        """Return what of a training stage's settings changes its result."""
        return {
            **self.objective.key_settings(),
            "training": read_settings(self.sft.training, self.objective.kind, phase),
            "precision": self.study.trainer.precision,
            **self.objective.base.random_numbers(self.study),
        }

    # Computing. Each method writes one node's result.

    def full(self, work: Workspace, loggers: Loggers) -> None:
        """θ¹ and its head: everything in M and the head trains."""
        from safetensors.torch import save_file

        callback = self.sft.callback()
        with at_start(self.objective, self.sft, work) as (module, _, _):
            result = self._fit(module, callback, "full", self.objective.slug, work, loggers)
            save_file(callback.full_state(), work.out / FULL)
            callback.rewind()
        _write_json(work.out / METRICS, result)

    def decompose(self, work: Workspace, loggers: Loggers) -> None:
        """Decompose each matrix of Δ: singular values and vectors."""
        from safetensors.torch import save_file

        from deftx.core.denoise import pack_decompositions

        change = StageEvidence(self.objective, self.sft, work).change()
        with self._progress(change) as advance:
            decompositions = self.sft.callback().decompose(change, progress=advance)
        save_file(pack_decompositions(decompositions), work.out / DECOMPOSITIONS)

    def select(self, work: Workspace, loggers: Loggers) -> None:
        """Select the mask: K coordinates of the largest scores."""
        from safetensors.torch import save_file

        evidence = StageEvidence(self.objective, self.sft, work)
        scores = SCORED[self.sft.scored].scores(evidence)
        k = self.sft.size(sum(math.prod(shape) for shape in evidence.shapes().values()))
        save_file(BUDGETS[self.sft.choices.budget](scores, k), work.out / MASK)
        _write_denoising(work, evidence.reports)
        if "full" in work.inputs:  # a finished SFT tells of its full phase, also when that was pruned
            metrics = _read_json(work.inputs["full"].file(METRICS))
            _write_json(work.out / FULL_METRICS, {name: value for name, value in metrics.items() if name != "history"})

    def sparse(self, work: Workspace, loggers: Loggers) -> None:
        """φ: the selected coordinates and the head train again from the start."""
        from safetensors.torch import load_file

        selection = work.inputs["select"]
        mask = load_file(selection.file(MASK))
        callback = self.sft.callback()
        callback.begin_sparse(mask)
        slug = f"{self.objective.slug}-{self.sft.method}"
        with at_start(self.objective, self.sft, work) as (module, fingerprint, drawn):
            result = self._fit(module, callback, "sparse", slug, work, loggers)
            scores = {module.monitor: result["best_score"], "best_step": result["best_step"]}
            facts = self._facts(work, module, fingerprint, drawn, mask, scores)
            callback.delta(facts).save(work.out / SFT_FOLDER, value_dtype=self.sft.value_dtype)
            callback.rewind()
        shutil.copyfile(selection.file(DENOISING), work.out / DENOISING)
        full = _read_json(selection.file(FULL_METRICS)) if FULL_METRICS in selection.manifest["files"] else None
        _write_json(work.out / METRICS, result | ({"full": full} if full else {}))

    def direct(self, work: Workspace, loggers: Loggers) -> None:
        """φ = Δ̂ on the mask and the head of the full phase: what remains without a second phase."""
        from safetensors.torch import load_file

        from deftx.core.delta import SparseDelta
        from deftx.training.fit import PhaseResult

        evidence = StageEvidence(self.objective, self.sft, work)
        module, fingerprint, drawn = evidence.loaded()
        values = evidence.denoised_change()
        mask = load_file(work.inputs["select"].file(MASK))
        selected = {name: index for name, index in mask.items() if index.numel()}
        delta = SparseDelta(
            indices=selected,
            values={name: values[name].flatten()[index] for name, index in selected.items()},
            shapes={name: tuple(values[name].shape) for name in selected},
            head={
                name.removeprefix("head."): tensor
                for name, tensor in evidence.full().items()
                if name.startswith("head.")
            },
            metadata=self._facts(work, module, fingerprint, drawn, mask, {}),
        )
        delta.save(work.out / SFT_FOLDER, value_dtype=self.sft.value_dtype)
        _write_denoising(work, evidence.reports)
        full = _read_json(work.inputs["full"].file(METRICS))
        untrained = PhaseResult(peak_memory=full["peak_memory"], train_examples=full["train_examples"])
        full_facts = {name: value for name, value in full.items() if name != "history"}
        _write_json(work.out / METRICS, _values(untrained, full["monitor"]) | {"full": full_facts})

    def _fit(
        self, module: Encoder, callback: Any, phase: str, slug: str, work: Workspace, loggers: Loggers
    ) -> dict[str, Any]:
        """Train one phase; what it reports, and by what metric the checkpoint was chosen."""
        from deftx.training.fit import fit_phase

        check_device(self.study)
        result = fit_phase(
            module,
            self.objective.data_module(self.sft, work),
            callback,
            self.sft.training,
            self.study.trainer,
            work.scratch / "checkpoints",
            seed=stage_seed(self.study.seed, phase, self.objective.language),
            loggers=loggers(f"{phase}/{slug}"),
            label=f"{self.objective.label} · {phase} phase",
        )
        return _values(result, module.monitor)

    @contextlib.contextmanager
    def _progress(self, change: Mapping[str, Tensor]) -> Iterator[Callable[[str], None] | None]:
        """Show a progress bar over the matrices that are decomposed, on a terminal."""
        from deftx.core.denoise import denoised_names

        if not (self.study.trainer.progress and sys.stderr.isatty()):
            yield None
            return
        from rich.console import Console
        from rich.progress import Progress

        total = len(denoised_names(change, self.sft.exclude))
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{self.objective.label} · singular values", total=total)
            yield lambda name: bar.advance(task)

    def _facts(
        self,
        work: Workspace,
        module: Encoder,
        fingerprint: str,
        drawn: list[str],
        mask: Mapping[str, Tensor],
        metrics: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return what ``sft.json`` says of an SFT."""
        from deftx.data.encode import tokenizer_identity
        from deftx.training.encoder import load_tokenizer

        sft = self.sft
        facts: dict[str, Any] = {
            "kind": self.objective.kind,
            "method": sft.method,
            "base_model": self.objective.base.name,
            "base_fingerprint": fingerprint,
            **sft.policies(),
            "k": sum(index.numel() for index in mask.values()),
            "density": sft.density,
            "maskable": sum(parameter.numel() for parameter in module.maskable.values()),
            "head_drawn": drawn,
            "seed": self.study.seed,
            "training": asdict(sft.training),
            "precision": self.study.trainer.precision,
            "tokenizer": tokenizer_identity(load_tokenizer(self.objective.base.found_in(work))),
            "metrics": dict(metrics),
            **self.objective.facts(work),
        }
        if sft.mask != "magnitude":
            facts["mask"] = sft.mask
        if not sft.second_phase:
            facts["second_phase"] = False
        return facts


def _values(result: PhaseResult, monitor: str) -> dict[str, Any]:
    """Return what a phase reports, and the metric that chose its checkpoint; the file of the weights is no result."""
    values = {"monitor": monitor, **asdict(result)}
    del values["checkpoint"]
    return values


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
