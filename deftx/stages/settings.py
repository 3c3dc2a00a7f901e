"""What a study consists of, as plain values.

``deftx.config`` turns a Hydra configuration into these dataclasses; the stages read nothing else. A knob that the
method ignores is ``None`` here (LT-SFT has no residual), so that it can enter neither a key nor a published setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings
from deftx.data.synthetic import SyntheticSettings
from deftx.tracking import LoggerSettings
from deftx.training.settings import PretrainSettings, TrainerSettings, TrainingSettings

if TYPE_CHECKING:
    from deftx.data.tasks import TaskSpec

METHODS = ("deftx", "ltsft")
MASKS = ("magnitude", "random")
CONTROLS = ("no_language_sft", "source_sft", "other_language_sft")


@dataclass
class ModelSettings:
    """Where the base encoder comes from: a local folder, a hub id, or a pretraining of our own.

    Attributes:
        name: Short name, for tables and W&B.
        path: Local folder with ``config.json``, ``model.safetensors`` and tokenizer files; wins over ``hub``.
        hub: Model id on the hub.
        revision: Commit or branch on the hub.
        pretrain: Shape and budget of a small encoder trained here on ``languages``; null for a pretrained one.
        languages: Languages the encoder is pretrained on.
        vocabulary: Further languages whose text the tokenizer sees; the encoder does not. Multilingual vocabularies
            cover languages that their encoder has hardly met, too.
        seed: Seed of that pretraining. A base is given, like a download: it does not move with the run's seed.
    """

    name: str = "local"
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    pretrain: PretrainSettings | None = None
    languages: list[str] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass(frozen=True)
class SFTSettings:
    """One sparse fine-tuning, resolved: canonical policies, and exactly one of ``k`` and ``density``.

    Attributes:
        rank: Canonical rank policy, ``None`` for LT-SFT.
        residual: Canonical residual policy, ``None`` for LT-SFT.
        k: Coordinates that may change.
        density: The same as a share of the maskable parameters, in (0, 1].
        exclude: ``fnmatch`` patterns of parameters that are not denoised.
        value_dtype: Dtype of the values in the SFT's file; the result is the SFT as it is read back.
        training: Budget and optimisation of both phases.
        mask: ``magnitude`` (the largest of Δ̂) or ``random`` (drawn evenly; an ablation).
        second_phase: Whether the selected coordinates train again from the start; without it φ is Δ̂ on the mask.
    """

    rank: str | None
    residual: str | None
    k: int | None
    density: float | None
    exclude: tuple[str, ...]
    value_dtype: str
    training: TrainingSettings
    mask: str = "magnitude"
    second_phase: bool = True

    def as_ltsft(self) -> SFTSettings:
        """The same SFT without denoising."""
        return replace(self, rank=None, residual=None, exclude=())

    @property
    def method(self) -> str:
        """``ltsft`` without denoising, else ``deftx``; ``random_mask`` where only a random mask is left of either."""
        if self.mask == "random" and self.rank is None:
            return "random_mask"
        return "ltsft" if self.rank is None else "deftx"

    @property
    def description(self) -> str:
        """Method and policies, for names and logs."""
        text = self.method if self.rank is None else f"{self.method} rank={self.rank} residual={self.residual}"
        if self.mask == "random" and self.rank is not None:
            text += " random mask"
        return text if self.second_phase else f"{text} without second phase"

    @property
    def needs_full(self) -> bool:
        """Whether anything of the full phase is used: a random mask with a second phase uses nothing."""
        return self.mask != "random" or not self.second_phase

    def size(self, maskable: int) -> int:
        """K for a model with ``maskable`` maskable parameters."""
        return self.k if self.k is not None else max(1, round(float(self.density or 0) * maskable))

    def selection_settings(self) -> dict[str, Any]:
        """What decides the mask, apart from K."""
        return {"rank": self.rank, "residual": self.residual, "exclude": list(self.exclude)}


@dataclass(frozen=True)
class StudySettings:
    """One run: everything that decides its result, and where it goes.

    Attributes:
        name: Name of the study.
        seed: Seed of heads, data order, masking and dropout.
        methods: The main method first, then those trained beside it.
        task: Task name (``deftx.data.tasks.TASKS``).
        train: Data set the task SFT learns from.
        split: Split of the targets that is evaluated.
        source: Source language of the task.
        more_sources: Further source languages by code (multi-source task SFT).
        targets: Target languages by code.
        language_sft: Settings of the targets' language SFTs.
        source_sft: Settings of φ_S; ``None`` trains the task SFT on θ⁰.
        task_sft: Settings of the task SFT.
        controls: Conditions evaluated beside the composed model.
        missing_text: ``error`` or ``skip``.
        only: Parts of the study to make, for later runs, in place of a result (:mod:`deftx.stages.parts`).
    """

    name: str
    seed: int
    methods: tuple[str, ...]
    model: ModelSettings
    task: str
    train: str
    split: str
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
    only: tuple[str, ...] = ()

    @property
    def task_spec(self) -> TaskSpec:
        """Labels and metric of the task."""
        from deftx.data.tasks import task_spec

        return task_spec(self.task, self.data)

    @property
    def sources(self) -> dict[str, LanguageSettings]:
        """All source languages by code, the first one first."""
        return {self.source.code: self.source, **self.more_sources}

    @property
    def generated(self) -> bool:
        """Whether text and rows are the generated family's."""
        codes = {*self.sources, *self.targets, *self.pretrain_languages}
        return self.task == "synthetic" or (self.data.root is None and codes <= set(self.synthetic.members))

    @property
    def pretrains_on_family(self) -> bool:
        """Whether the base is pretrained on the generated family's text, whatever the task is."""
        return self.data.root is None and set(self.pretrain_languages) <= set(self.synthetic.members)

    def sft_for(self, method: str, sft: SFTSettings) -> SFTSettings:
        """``sft`` as ``method`` trains it."""
        return sft.as_ltsft() if method == "ltsft" else sft
