"""The schema of the configuration: the rooms' settings dataclasses and the groups around them, registered with Hydra.

An unknown key or a value of the wrong type is refused by this schema before anything else looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from deftx.config.search import SearchSettings
from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings
from deftx.data.synthetic import SyntheticSettings
from deftx.launch.settings import LauncherSettings
from deftx.stages.settings import ModelSettings
from deftx.tracking import LoggerSettings
from deftx.training.settings import TrainerSettings, TrainingSettings


def _training_from(budget: str) -> dict[str, str]:
    """Each field of a training budget follows the budget group, and can still be overridden by itself."""
    return {item.name: f"${{budget.{budget}.{item.name}}}" for item in fields(TrainingSettings)}


@dataclass
class SizeConfig:
    """K for one kind of SFT: a count or a share, not both."""

    k: int | None = None
    density: float | None = None


@dataclass
class SparsityConfig:
    """The sparsity group: mask sizes of language and task SFTs."""

    language: SizeConfig = field(default_factory=SizeConfig)
    task: SizeConfig = field(default_factory=SizeConfig)


@dataclass
class DenoiseConfig:
    """The denoise group: rank and residual policy, and parameters left alone."""

    rank: Any = "energy:0.9"
    residual: Any = "prune:0.05"
    exclude: list[str] = field(default_factory=list)


@dataclass
class MethodConfig:
    """The method group."""

    name: str = "deftx"


@dataclass
class BudgetConfig:
    """The budget group: training settings for each kind of SFT, and how much text is used."""

    language: TrainingSettings = field(default_factory=TrainingSettings)
    sentiment: TrainingSettings = field(default_factory=TrainingSettings)
    nli: TrainingSettings = field(default_factory=TrainingSettings)
    max_lines: int | None = None


@dataclass
class SFTConfig:
    """Knobs of one kind of SFT."""

    rank: Any = None
    residual: Any = None
    k: int | None = None
    density: float | None = None
    value_dtype: str = "float32"
    exclude: list[str] = field(default_factory=list)
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass
class TaskConfig(SFTConfig):
    """The task group: the data sets and the knobs of the task SFT."""

    name: str = MISSING
    train: str = MISSING
    source: str = MISSING
    more_sources: list[str] = field(default_factory=list)
    family: str = "sentiment"


@dataclass
class SourceConfig(SFTConfig):
    """The source group: settings of φ_S, the source language's own SFT. ``enabled: false`` trains on θ⁰."""

    enabled: bool = True


@dataclass
class PathsConfig:
    """Where results go."""

    cache: str = MISSING
    output: str = "outputs"


@dataclass
class RunConfig:
    """Schema of ``conf/run.yaml``."""

    rank: Any = None
    residual: Any = None
    k: int | None = None
    density: float | None = None
    value_dtype: str = "float32"
    mask: str = "magnitude"
    second_phase: bool = True
    seed: int = 0
    compare: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    split: str = "test"
    missing_text: str = "error"
    study: str = "study"
    only: list[str] = field(default_factory=list)
    ablate: str = "nothing"
    model: ModelSettings = field(default_factory=ModelSettings)
    method: MethodConfig = field(default_factory=MethodConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    language: dict[str, LanguageSettings] = field(default_factory=dict)
    source: SourceConfig = field(default_factory=SourceConfig)
    lang: SFTConfig = field(default_factory=SFTConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    data: DataSettings = field(default_factory=DataSettings)
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    launcher: LauncherSettings = field(default_factory=LauncherSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    paths: PathsConfig = field(default_factory=PathsConfig)
    # Knobs of single commands; empty elsewhere (resolve_command refuses them there).
    kind: str | None = None
    out: str | None = None
    task_sft: str | None = None
    language_sft: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)


@cache
def register() -> None:
    """Register the schemas with Hydra; a second call changes nothing."""
    schema = OmegaConf.structured(RunConfig)
    for node, budget in (("lang", "language"), ("source", "language"), ("task", "${task.family}")):
        for key, source in _training_from(budget).items():
            schema[node].training[key] = source
    for node in ("lang", "task"):
        schema[node].rank, schema[node].residual = "${rank}", "${residual}"
        schema[node].exclude, schema[node].value_dtype = "${denoise.exclude}", "${value_dtype}"
    schema.corpus.max_lines = "${budget.max_lines}"
    # Hydra makes these folders itself, and the shell leaves the ~ of key=~/x alone.
    OmegaConf.register_new_resolver("home", lambda path: str(Path(path).expanduser()), replace=True)
    ConfigStore.instance().store(name="run_schema", node=schema)
