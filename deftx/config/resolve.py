"""From a composed configuration to plain settings, with every problem of it found.

Precedence of the mask size: the SFT's own knob, then the top knob, then the sparsity group. Knobs that the method
ignores become ``None``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from deftx.config.schema import RunConfig, SFTConfig, SizeConfig
from deftx.config.search import SearchSettings
from deftx.config.session import language_settings, plain, unknown
from deftx.core.settings import VALUE_DTYPES, RankPolicy, ResidualPolicy
from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings
from deftx.data.synthetic import SyntheticSettings
from deftx.errors import DeftxError, collected
from deftx.launch.settings import LauncherSettings
from deftx.stages.parts import check_parts
from deftx.stages.settings import CONTROLS, MASKS, METHODS, ModelSettings, SFTSettings, StudySettings
from deftx.tracking import LoggerSettings
from deftx.training.settings import TrainerSettings, TrainingSettings


def _size(own: SFTConfig, cfg: RunConfig, default: SizeConfig, *, moved: bool) -> tuple[int | None, float | None]:
    """K or density by precedence: the SFT's own, then the top knob, then the sparsity group."""
    levels = [(own.k, own.density)]
    if moved:
        levels.append((cfg.k, cfg.density))
    levels.append((default.k, default.density))
    return next((pair for pair in levels if pair != (None, None)), (None, None))


def _sft(name: str, own: SFTConfig, cfg: RunConfig, default: SizeConfig, problems: list[str]) -> SFTSettings | None:
    """Resolve one kind of SFT, appending what is wrong with it to ``problems``."""
    before = len(problems)
    rank = residual = None
    with collected(problems):
        policy = RankPolicy.parse(own.rank)
        rank = None if policy.kind == "none" else str(policy)
    with collected(problems):
        residual = str(ResidualPolicy.parse(own.residual))
    for level, pair in ((name, (own.k, own.density)), ("", (cfg.k, cfg.density))):
        prefix = f"{level}." if level else ""
        if None not in pair:
            problems.append(f"{prefix}k={pair[0]} and {prefix}density={pair[1]}: give one of the two, the other null")
    k, density = _size(own, cfg, default, moved=name != "source")
    if k is None and density is None:
        problems.append(f"no mask size for {name}: set k, density or the sparsity group")
    if k is not None and k < 1:
        problems.append(f"{name}: k={k}: K must be at least 1")
    if density is not None and not 0 < density <= 1:
        problems.append(f"{name}: density={density}: must lie in (0, 1]")
    if own.value_dtype not in VALUE_DTYPES:
        problems.append(f"{name}: {unknown('value_dtype', own.value_dtype, VALUE_DTYPES)}")
    mask, second_phase = (cfg.mask, cfg.second_phase) if name != "source" else (MASKS[0], True)
    if mask not in MASKS:
        problems.append(f"{name}: {unknown('mask', mask, MASKS)}")
    if mask == "random" and second_phase:
        rank = None  # nothing of the full phase is looked at
    training = plain(own.training, TrainingSettings)
    problems.extend(f"{name}.training.{text}" for text in training.problems())
    if len(problems) > before:
        return None
    return SFTSettings(
        rank=rank,
        residual=None if rank is None else residual,
        k=k,
        density=density,
        exclude=() if rank is None else tuple(sorted(own.exclude)),
        value_dtype=own.value_dtype,
        training=training,
        mask=mask,
        second_phase=second_phase,
    )


def study_settings(cfg: DictConfig, command: str = "run") -> StudySettings:
    """Resolve a composed configuration.

    Raises:
        DeftxError: One message with every problem found.
    """
    settings, problems = resolve(cfg, command)
    if problems or settings is None:
        raise DeftxError("\n".join(problems))
    return settings


def resolve(cfg: DictConfig, command: str = "run") -> tuple[StudySettings | None, list[str]]:
    """Resolve a composed configuration to settings, or to the list of everything that is wrong with it."""
    from deftx.data.tasks import TASKS, task_spec

    problems: list[str] = []
    config: RunConfig = cfg  # type: ignore[assignment]  # duck-typed: a DictConfig with RunConfig's fields

    methods = [config.method.name, *(name for name in config.compare if name != config.method.name)]
    problems += [unknown("method", name, METHODS) for name in methods if name not in METHODS]
    problems += [unknown("control", name, CONTROLS) for name in config.controls if name not in CONTROLS]
    if config.task.name not in TASKS:
        problems.append(unknown("task", config.task.name, sorted(TASKS)))
    elif config.task.name == "tsv":
        with collected(problems):
            task_spec("tsv", plain(config.data, DataSettings))
    if config.split not in ("test", "dev"):
        problems.append(f"split={config.split!r}: must be test or dev")
    if config.split == "dev" and config.task.name == "synthetic":
        problems.append("split=dev: the generated family has test sets only")
    if config.missing_text not in ("error", "skip"):
        problems.append(f"missing_text={config.missing_text!r}: must be error or skip")
    with collected(problems):
        plain(config.launcher, LauncherSettings).check()
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed}: must lie in [0, 2**32)")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", config.study):
        problems.append(f"study={config.study!r}: use letters, digits, '.', '_' and '-'")
    if not config.language:
        problems.append("no target language: language=ace or language=[ace,ban]")

    targets = {code: plain(node, LanguageSettings) for code, node in config.language.items()}
    problems += [
        f"language/{code}.yaml says code: {language.code}; file name, `# @package language.{code}` and code must agree"
        for code, language in targets.items()
        if language.code != code
    ]
    if command in ("run", "eval") or config.task.name == "synthetic":
        problems += _targets_without_rows(config, targets)
    source = None
    if OmegaConf.is_missing(cfg.task, "source"):
        problems.append(f"task={config.task.name} needs task.source=CODE: the language its labelled rows are in")
    else:
        source = _language(config.task.source, problems)
        problems += _source_problems(config)
    more = {code: _language(code, problems) for code in config.task.more_sources}
    pretrain = (
        {code: _language(code, problems) for code in [*config.model.languages, *config.model.vocabulary]}
        if config.model.pretrain
        else {}
    )

    language_sft = _sft("lang", config.lang, config, config.sparsity.language, problems)
    task_sft = _sft("task", config.task, config, config.sparsity.task, problems)
    source_sft = None
    if config.source.enabled:
        source_sft = _sft("source", config.source, config, config.sparsity.language, problems)
    if language_sft is not None and task_sft is not None and language_sft.rank is None and task_sft.rank is None:
        # Nothing is denoised, whatever the method is called: that is LT-SFT, and tables have to say so.
        methods = list(dict.fromkeys("ltsft" if name == "deftx" else name for name in methods))
        if language_sft.method == "random_mask":
            methods = ["random_mask"]
    with collected(problems):
        sources = [config.task.source, *config.task.more_sources] if source is not None and source_sft else []
        check_parts(config.only, sources, list(targets), methods)
    problems += _ablation_problems(config)
    corpus, data = plain(config.corpus, CorpusSettings), plain(config.data, DataSettings)
    synthetic, trainer = plain(config.synthetic, SyntheticSettings), plain(config.trainer, TrainerSettings)
    logger = plain(config.logger, LoggerSettings)
    for name, group in (("corpus", corpus), ("data", data), ("synthetic", synthetic), ("trainer", trainer)):
        problems += [f"{name}.{text}" for text in group.problems()]
    with collected(problems):
        logger.validate()
    if config.task.name == "synthetic" and data.root is not None and command != "pretrain":
        problems.append(f"data.root={data.root}: task=synthetic reads generated files only; choose task=nusax, ...")
    model = plain(config.model, ModelSettings)
    if not (model.path or model.hub or model.pretrain):
        problems.append("the model needs model.path=FOLDER, model.hub=ID or model=tiny")
    problems = list(dict.fromkeys(problems))
    if problems or language_sft is None or task_sft is None or source is None:
        return None, problems
    return (
        StudySettings(
            name=config.study,
            seed=config.seed,
            methods=tuple(methods),
            model=model,
            task=config.task.name,
            train=config.task.train,
            split=config.split,
            source=source,
            more_sources={code: item for code, item in more.items() if item is not None},
            targets=targets,
            pretrain_languages={code: item for code, item in pretrain.items() if item is not None},
            language_sft=language_sft,
            source_sft=source_sft,
            task_sft=task_sft,
            corpus=corpus,
            data=data,
            synthetic=synthetic,
            controls=tuple(dict.fromkeys(config.controls)),
            missing_text=config.missing_text,
            trainer=trainer,
            logger=logger,
            cache_root=str(Path(config.paths.cache).expanduser()),
            only=tuple(config.only),
        ),
        problems,
    )


def _ablation_problems(config: RunConfig) -> list[str]:
    """An ablation whose own knob was set to something else is none."""
    kept = {
        "denoising": ("rank=none", str(config.rank) == "none"),
        "sparsity": ("density=1.0", config.density == 1.0 and config.k is None),
        "second_phase": ("second_phase=false", config.second_phase is False),
        "selection": ("mask=random", config.mask == "random"),
    }
    knob, whole = kept.get(config.ablate, ("", True))
    return (
        [] if whole else [f"ablate={config.ablate} is {knob}, and the command sets it to something else: leave out one"]
    )


def _source_problems(config: RunConfig) -> list[str]:
    task, codes = config.task, [config.task.source, *config.task.more_sources]
    problems = []
    if len(set(codes)) < len(codes):
        problems.append(f"task.source={task.source} and task.more_sources={list(task.more_sources)}: a language twice")
    if task.train == "synthetic" and task.more_sources:
        problems.append(f"task.more_sources: the generated family has labelled rows in {task.source} only")
    if task.train == "smsa" and task.more_sources:
        problems.append("task.more_sources: SMSA is Indonesian only; task.train=nusax has rows in twelve languages")
    return problems


def _targets_without_rows(config: RunConfig, targets: Mapping[str, LanguageSettings]) -> list[str]:
    """One message for each target the task has no test set for; own files go by the language's code."""
    task = config.task.name
    if task == "synthetic":
        members = plain(config.synthetic, SyntheticSettings).members
        return [
            f"language {code!r} is not in the generated family ({', '.join(members)}); choose its task: task=nusax, ..."
            for code in targets
            if code not in members
        ]
    if task not in ("nusax", "americasnli", "xnli"):
        return []
    return [
        f"language {code!r} has no {task} test set: its file names no code for it"
        for code, language in targets.items()
        if not getattr(language, task)
    ]


def _language(code: str, problems: list[str]) -> LanguageSettings | None:
    with collected(problems):
        return language_settings(code)
    return None


def resolve_command(name: str, cfg: DictConfig) -> tuple[StudySettings | None, list[str]]:
    """Resolve the configuration of any command; see :func:`resolve`."""
    settings, problems = resolve(cfg, name)
    if name == "sft" and cfg.kind not in ("language", "task"):
        problems.append(f"kind={cfg.kind!r}: must be language or task")
    if name == "eval" and not cfg.task_sft:
        problems.append("task_sft=FOLDER is needed: the task SFT to compose with; `deftx sft kind=task` trains one")
    if name == "eval":
        problems += [
            f"language_sft.{code}: no such target; add it with language=[{code}]"
            for code in cfg.language_sft
            if code not in cfg.language
        ]
    if name == "pretrain" and not cfg.out:
        problems.append("out=FOLDER is needed: where the model goes")
    if name == "pretrain" and not cfg.model.pretrain:
        problems.append("model.pretrain is needed: use model=tiny and override its shape")
    return (None if problems else settings), problems


def launcher_settings(cfg: DictConfig) -> LauncherSettings:
    """Where the jobs of a sweep run."""
    return plain(cfg.launcher, LauncherSettings)


def search_settings(cfg: DictConfig) -> SearchSettings:
    """What is searched for; an empty space is no search."""
    return plain(cfg.search, SearchSettings)


def written_folders(cfg: DictConfig) -> dict[str, Path]:
    """Folders a command will write, by the knob that names them."""
    folders = {"paths.cache": cfg.paths.cache, "paths.output": cfg.paths.output, "out": cfg.out}
    return {knob: Path(folder) for knob, folder in folders.items() if folder}


def sft_settings(cfg: DictConfig) -> tuple[StudySettings, str, Path | None]:
    """Settings of ``deftx sft``: the study, the kind, and where the SFT goes."""
    return study_settings(cfg, "sft"), cfg.kind, Path(cfg.out).expanduser() if cfg.out else None


def eval_settings(cfg: DictConfig) -> tuple[StudySettings, str, dict[str, str]]:
    """Settings of ``deftx eval``: the study, φ_T, and φ_L by target."""
    return study_settings(cfg, "eval"), cfg.task_sft, dict(cfg.language_sft)


def pretrain_settings(cfg: DictConfig) -> tuple[StudySettings, list[str], Path]:
    """Settings of ``deftx pretrain``: the study, text files (empty: the languages' own), and where the model goes."""
    return study_settings(cfg, "pretrain"), list(cfg.text), Path(cfg.out).expanduser()
