"""The whole configuration as dataclasses, and from it the one table of knobs: what a person may set, by full name.

The rooms declare their own settings (``deftx/*/settings.py``); here they become groups, and the groups of the
configuration alone are added. The table's readers: ``deftx.config`` (schema, checks, what each command reads),
``deftx.help``, ``deftx.report`` (which settings make two scores comparable, and how tables name them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deftx.data.settings import SPLITS, CorpusSettings, DataSettings, LanguageSettings, SyntheticSettings
from deftx.knobs import SEED, Knob, declared, knob, matching, one_of, table
from deftx.launch.settings import LauncherSettings
from deftx.methods.settings import ComposeSettings, DenoiseKnobs, SFTKnobs, ShortKnobs, SizeKnobs
from deftx.methods.table import BY_PROXY, METHODS, UNDENOISED, WITHOUT_LANGUAGE_SFT
from deftx.search import SearchSettings
from deftx.tracking.settings import LoggerSettings
from deftx.training.settings import ModelSettings, TrainerSettings, TrainingSettings

MISSING: Any = "???"
"""What has to be set: OmegaConf's word for it, without importing OmegaConf."""

COMMANDS = ("run", "sft", "eval", "pretrain")
_STUDY = ("run", "sft", "eval")


@dataclass
class SparsityConfig:
    """The sparsity group: mask sizes of language and task SFTs."""

    language: SizeKnobs = knob(SizeKnobs)
    task: SizeKnobs = knob(SizeKnobs)


@dataclass
class MethodConfig:
    """The method group."""

    name: str = knob("deftx")


@dataclass
class BudgetConfig:
    """The budget group: training settings for each kind of SFT, and how much text is used."""

    language: TrainingSettings = knob(TrainingSettings)
    sentiment: TrainingSettings = knob(TrainingSettings)
    nli: TrainingSettings = knob(TrainingSettings)
    max_lines: int | None = knob(None)


@dataclass
class TaskConfig(SFTKnobs):
    """The task group: the data sets and the knobs of the task SFT."""

    name: str = knob(MISSING)
    train: str = knob(MISSING)
    source: str = knob(MISSING)
    more_sources: list[str] = knob([], since=2)
    family: str = knob("sentiment")


@dataclass
class SourceConfig(SFTKnobs):
    """The source group: settings of φ_S, the source language's own SFT. ``enabled: false`` trains on θ⁰.

    Attributes:
        enabled: Whether there is a φ_S.
        shared: Whether one φ_S, of the settings that are given here, stands under every task SFT. Else each method has
            a φ_S of its own, as its language SFTs are.
    """

    enabled: bool = knob(True, since=3)
    shared: bool = knob(True)


@dataclass
class PathsConfig:
    """Where results go."""

    cache: str = knob(MISSING)
    output: str = knob("outputs")


@dataclass
class RunConfig(ShortKnobs):
    """Schema of ``conf/run.yaml``; its values, resolved, are what a command was asked for."""

    seed: int = knob(0, SEED, fixed=True, bookkeeping=True)
    compare: list[str] = knob([], commands=("run",), fixed=True, bookkeeping=True)
    controls: list[str] = knob(
        [],
        one_of("no_language_sft", "source_sft", "other_language_sft"),
        commands=("run",),
        fixed=True,
        bookkeeping=True,
    )
    split: Any = knob("test", one_of(*SPLITS), commands=("run", "eval"), fixed=True, bookkeeping=True)
    missing_text: str = knob("error", one_of("error", "skip"), fixed=True, bookkeeping=True)
    study: str = knob(
        "study",
        matching(r"[\w.-]*\w[\w.-]*", "use letters, digits, '.', '_' and '-'"),
        commands=_STUDY,
        fixed=True,
        bookkeeping=True,
    )
    only: list[str] = knob([], commands=("run",), fixed=True, bookkeeping=True)
    model: ModelSettings = knob(ModelSettings, commands=COMMANDS, fixed=True, bookkeeping=True)
    # A method's own scores stand under its name; a control's are those of the main method's SFTs.
    method: MethodConfig = knob(
        MethodConfig, ignored_by={*METHODS, *WITHOUT_LANGUAGE_SFT, *BY_PROXY, "composed", "source_language_only"}
    )
    denoise: DenoiseKnobs = knob(DenoiseKnobs)
    sparsity: SparsityConfig = knob(SparsityConfig)
    ablate: str = knob("nothing", fixed=True)
    task: TaskConfig = knob(TaskConfig, commands=_STUDY, bookkeeping=True)
    language: dict[str, LanguageSettings] = knob({}, commands=_STUDY, fixed=True, bookkeeping=True)
    # φ_S has a method of its own, whatever the run's is.
    source: SourceConfig = knob(SourceConfig, ignored_by={"no_language_sft"}, read_by=UNDENOISED)
    lang: SFTKnobs = knob(SFTKnobs, ignored_by={"no_language_sft", "source_sft", *WITHOUT_LANGUAGE_SFT})
    compose: ComposeSettings = knob(
        ComposeSettings,
        commands=("run", "eval"),
        ignored_by={"no_language_sft", "source_language_only", *WITHOUT_LANGUAGE_SFT},
    )
    budget: BudgetConfig = knob(BudgetConfig)
    corpus: CorpusSettings = knob(CorpusSettings, commands=COMMANDS, ignored_by={"no_language_sft"}, fixed=True)
    data: DataSettings = knob(DataSettings, commands=COMMANDS, fixed=True)
    synthetic: SyntheticSettings = knob(SyntheticSettings, commands=COMMANDS, fixed=True)
    trainer: TrainerSettings = knob(TrainerSettings, commands=COMMANDS, fixed=True)
    logger: LoggerSettings = knob(LoggerSettings, commands=_STUDY, fixed=True)
    launcher: LauncherSettings = knob(LauncherSettings, commands=COMMANDS, fixed=True)
    search: SearchSettings = knob(SearchSettings, commands=("run",), fixed=True)
    paths: PathsConfig = knob(PathsConfig, commands=COMMANDS, fixed=True)
    # Knobs of single commands; empty elsewhere.
    kind: str | None = knob(None, commands=("sft",), fixed=True)
    out: str | None = knob(None, commands=("sft", "pretrain"), fixed=True)
    task_sft: str | None = knob(None, commands=("eval",), fixed=True)
    language_sft: dict[str, str] = knob({}, commands=("eval",), fixed=True)
    text: list[str] = knob([], commands=("pretrain",), fixed=True)
    protect: list[str] = knob([], commands=("pretrain",), fixed=True)


KNOBS: dict[str, Knob] = table(RunConfig)
"""Every knob and every group by full name."""

OPEN_MAPPINGS = tuple(name for name, facts in KNOBS.items() if facts.default == {} and name != "language")
"""Knobs that take keys of the user's own; a language has a file of its own for that."""

READS = {
    command: tuple(name for name, facts in declared(RunConfig).items() if command in facts.commands)
    for command in COMMANDS
}
"""Top-level knobs and groups by command: what it is asked to read beyond these is refused."""
