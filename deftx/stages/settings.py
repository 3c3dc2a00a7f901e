"""What a study consists of, as plain values.

``deftx.config`` turns a Hydra configuration into these dataclasses; the stages read nothing else. A knob that a method
ignores is ``None`` in its SFTs (LT-SFT has no residual), so that it can enter no key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.data.settings import PROTECTED, CorpusSettings, DataSettings, LanguageSettings, SyntheticSettings
from deftx.errors import DeftxError
from deftx.methods import METHODS, SCORED, SECOND_PHASES, SparseMethod
from deftx.methods.settings import DENOISING, ComposeSettings, SFTKnobs
from deftx.tracking.settings import LoggerSettings
from deftx.training.settings import ModelSettings, TrainerSettings

if TYPE_CHECKING:
    from deftx.data.labelled import TaskSpec
    from deftx.data.tasks import Evaluation
    from deftx.training.callback import SparseFineTuning


@dataclass
class SFTSettings(SFTKnobs):
    """One sparse fine-tuning: policies as values, and exactly one of ``k`` and ``density``.

    :meth:`by` gives the settings as one method reads them; without denoising its policies are None.

    Attributes:
        method: The method that trains it, a key of :data:`deftx.methods.METHODS`.
    """

    method: str = "deftx"

    def by(self, method: str) -> SFTSettings:
        """Return the settings as ``method`` trains them; knobs that it ignores are None.

        The result names the method it amounts to: one that does not denoise Δ before scoring it is LT-SFT.
        """
        entry = METHODS[method]
        rank = self.rank if entry.denoised else None
        sft = replace(
            self,
            method=method,
            rank=rank,
            mask="random" if SCORED[entry.scored].drawn else self.mask,
            second_phase=self.second_phase and entry.second_phase == "sparse",
        )
        if rank is None or "decompose" not in sft.reads:
            sft = replace(sft, rank=None, residual=None, exclude=[])
        if sft.scored == entry.scored:
            return sft
        choices = replace(entry, scored=sft.scored)
        return replace(sft, method=next((name for name, other in METHODS.items() if other.chooses(choices)), method))

    @property
    def choices(self) -> SparseMethod:
        """The method's choices; mask and second phase are also knobs of the SFT."""
        return METHODS[self.method]

    @property
    def scored(self) -> str:
        """The score that selects the mask, a key of :data:`deftx.methods.SCORED`; without denoising Δ̂ is Δ."""
        scored = "random" if self.mask == "random" else self.choices.scored
        return scored if self.rank is not None else SCORED[scored].undenoised or scored

    @property
    def final(self) -> tuple[str, ...]:
        """Results of earlier stages that the SFT's values are taken from."""
        return SECOND_PHASES["sparse" if self.second_phase else "direct"]

    @property
    def description(self) -> str:
        """Method and policies, for names and logs."""
        text = self.method if self.rank is None else f"{self.method} rank={self.rank} residual={self.residual}"
        return text if self.second_phase else f"{text} without second phase"

    @property
    def reads(self) -> set[str]:
        """Results of earlier stages that the SFT's stages read: a subset of ``full`` and ``decompose``."""
        available = {"full"} if self.rank is None else {"full", "decompose"}
        return {*SCORED[self.scored].reads, *self.final} & available

    def size(self, maskable: int) -> int:
        """K for a model with ``maskable`` maskable parameters."""
        return self.k if self.k is not None else max(1, round(float(self.density or 0) * maskable))

    def asked_size(self) -> dict[str, Any]:
        """``k`` or ``density``, as it enters a key: the model's size may not be known yet."""
        return {"k": self.k} if self.k is not None else {"density": self.density}

    def callback(self) -> SparseFineTuning:
        """Return the callback that trains it, phase by phase."""
        from deftx.training.callback import SparseFineTuning

        return SparseFineTuning(
            rank=self.rank,
            residual="drop" if self.residual is None else self.residual,
            exclude=self.exclude,
            l1_full=self.training.l1_full,
            l1_sparse=self.training.l1_sparse,
        )

    def policies(self) -> dict[str, Any]:
        """Return the denoising policies as plain values, as they enter a key."""
        policies = {name: getattr(self, name) for name in DENOISING}
        return {
            name: value if value is None or isinstance(value, list) else str(value) for name, value in policies.items()
        }


def relatives(code: str, targets: Mapping[str, LanguageSettings], without: Iterable[str]) -> list[str]:
    """Return the targets of a language's own family that are not in ``without``."""
    family = targets[code].family if code in targets else ""
    return [
        other for other, item in targets.items() if family and item.family == family and other not in {code, *without}
    ]


@dataclass(frozen=True)
class StudySettings:
    """Settings of one run: everything that decides its result, and its folders.

    Attributes:
        name: Name of the study.
        seed: Seed of heads, data order, masking and dropout.
        methods: The main method first, then those trained beside it.
        task: Task name (``deftx.data.labelled.TASKS``).
        train: Data set the task SFT learns from.
        splits: Splits of the targets that are evaluated, in the order of :data:`~deftx.data.settings.SPLITS`.
        source: Source language of the task.
        more_sources: Further source languages by code (multi-source task SFT).
        targets: Target languages by code.
        language_sft: Settings of the targets' language SFTs, whatever the method.
        source_sft: Settings of φ_S, whatever the method; ``None`` trains the task SFT on θ⁰.
        source_shared: Whether one φ_S stands under the task SFTs of all methods: ``source_sft`` as it is trained.
        task_sft: Settings of the task SFT, whatever the method.
        controls: Conditions evaluated beside the composed model.
        missing_text: ``error`` or ``skip``.
        compose: How φ_T and φ_L are put on the base together.
        only: Parts of the study to compute for later runs, instead of a result (:class:`deftx.stages.graph.Part`).
        protect: What the text of a base must not hold, beside what is evaluated: files, folders or globs of sentences,
            and names of public sets.
        protect_languages: The languages in which those sets are protected.
        device: Kind of device that trains, ``cpu`` or ``cuda``, if a sweep's launcher decides it; empty: the device
            that ``trainer.accelerator`` means on this machine.
    """

    name: str
    seed: int
    methods: tuple[str, ...]
    model: ModelSettings
    task: str
    train: str
    splits: tuple[str, ...]
    source: LanguageSettings
    more_sources: dict[str, LanguageSettings]
    targets: dict[str, LanguageSettings]
    pretrain_languages: dict[str, LanguageSettings]
    language_sft: SFTSettings
    source_sft: SFTSettings | None
    task_sft: SFTSettings
    corpus: CorpusSettings
    data: DataSettings
    synthetic: SyntheticSettings
    controls: tuple[str, ...]
    missing_text: str
    trainer: TrainerSettings
    logger: LoggerSettings
    cache_root: str
    source_shared: bool = False
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    only: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    protect_languages: tuple[LanguageSettings, ...] = ()
    device: str = ""

    @property
    def task_spec(self) -> TaskSpec:
        """Labels and metric of the task."""
        from deftx.data.labelled import task_spec

        return task_spec(self.task, self.data)

    @property
    def proxies(self) -> dict[str, dict[str, float]]:
        """Weights of other targets' φ_L, by the target without text for which they stand in."""
        given, weights = self.compose.proxy, {}
        for code, how in given.items():
            same = relatives(code, self.targets, given)
            weights[code] = {other: 1 / len(same) for other in same} if how == "family" else dict(how)
        return weights

    @property
    def sources(self) -> dict[str, LanguageSettings]:
        """All source languages by code, the first one first."""
        return {self.source.code: self.source, **self.more_sources}

    @property
    def languages(self) -> dict[str, LanguageSettings]:
        """All source and target languages by code."""
        return {**self.sources, **self.targets}

    @property
    def evaluation(self) -> Evaluation:
        """What is evaluated, which nothing that trains may have seen.

        Raises:
            DeftxError: A pattern of ``protect`` matches no file.
        """
        from deftx.data.reading import expand
        from deftx.data.tasks import Evaluation

        languages = {
            **self.languages,
            **self.pretrain_languages,
            **{item.code: item for item in self.protect_languages},
        }
        files = expand([name for name in self.protect if name not in PROTECTED], Path.cwd())
        for pattern, paths in files.items():
            if not paths:
                raise DeftxError(f"protect={pattern}: no such file, and none of {', '.join(PROTECTED)}")
        return Evaluation(
            self.task,
            self.splits,
            tuple(languages.values()),
            sets=tuple(name for name in self.protect if name in PROTECTED),
            files=tuple(path for paths in files.values() for path in paths),
        )

    @property
    def generated(self) -> bool:
        """Whether text and rows are the generated family's."""
        from deftx.data.labelled import TASKS

        codes = {*self.sources, *self.targets, *self.pretrain_languages}
        return TASKS[self.task].generated or (self.data.root is None and codes <= set(self.synthetic.members))

    @property
    def pretrains_on_family(self) -> bool:
        """Whether the base is pretrained on the generated family's text, whatever the task is."""
        return self.data.root is None and set(self.pretrain_languages) <= set(self.synthetic.members)
