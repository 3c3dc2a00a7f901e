"""From composed settings to those of a study, with every problem of them found.

Precedence of the mask size: the SFT's own knob, then the top knob, then the sparsity group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from deftx.config.session import group_options, language_settings, typed, unknown
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.data.settings import PROTECTED, SPLITS, LanguageSettings
from deftx.errors import DeftxError, collected, did_you_mean
from deftx.knobs import declared, problems
from deftx.methods import METHODS
from deftx.methods.settings import SFTKnobs, SizeKnobs
from deftx.settings import RunConfig
from deftx.stages.settings import SFTSettings, StudySettings, relatives

if TYPE_CHECKING:
    from deftx.data.labelled import TaskSpec


def study_settings(config: RunConfig | DictConfig, command: str = "run") -> StudySettings:
    """Return the study that a composed configuration asks for.

    Raises:
        DeftxError: One message with every problem found.
    """
    settings, messages = resolve(config if isinstance(config, RunConfig) else typed(config), command)
    if messages or settings is None:
        raise DeftxError("\n".join(messages))
    return settings


def resolve(config: RunConfig, command: str = "run") -> tuple[StudySettings | None, list[str]]:
    """Resolve composed settings to those of a study, or to the list of everything that is wrong with them."""
    from deftx.data.labelled import SETS, TASKS, task_spec
    from deftx.stages.graph import check_parts

    methods = [config.method.name, *(name for name in config.compare if name != config.method.name)]
    messages = [unknown("method", name, list(METHODS)) for name in methods if name not in METHODS]
    for name in ("", "corpus", "data", "synthetic", "compose", "trainer", "logger", "launcher"):
        messages += problems(getattr(config, name), f"{name}.") if name else problems(config)
    with collected(messages):
        task_spec(config.task.name, config.data)
    task = TASKS.get(config.task.name)
    splits = _splits(config.split, task, messages)
    for name in ("cache", "output"):
        if not getattr(config.paths, name).strip():
            what = "; or DEFTX_CACHE=FOLDER: there is no home folder to put it in" if name == "cache" else ""
            messages.append(f"paths.{name} is empty: give paths.{name}=FOLDER{what}")
    if not config.language:
        messages.append("no target language: language=ace or language=[ace,ban]")
    messages += [
        f"language/{code}.yaml says code: {language.code}; file name, `# @package language.{code}` and code must agree"
        for code, language in config.language.items()
        if language.code != code
    ]
    if task is not None and (command in ("run", "eval") or task.generated):
        messages += _targets_without_rows(task, config)
    source = None
    if not config.task.source:
        messages.append(f"task={config.task.name} needs task.source=CODE: the language its labelled rows are in")
    else:
        source = _language(config.task.source, messages)
        messages += _source_problems(SETS.get(config.task.train), config)
    more = {code: _language(code, messages) for code in config.task.more_sources}
    pretrained_on = [*config.model.languages, *config.model.vocabulary] if config.model.pretrain else []
    pretrain = {code: _language(code, messages) for code in pretrained_on}

    used = {*config.language, config.task.source, *more, *pretrain}
    messages += [
        f"data.text.{code}: no language of this study{did_you_mean(code, used)}; they are {', '.join(sorted(used))}"
        for code in config.data.text
        if code not in used
    ]

    language_sft = _sft("lang", config.lang, config, config.sparsity.language, messages)
    task_sft = _sft("task", config.task, config, config.sparsity.task, messages)
    source_sft = None
    if config.source.enabled:
        source_sft = _sft("source", config.source, config, config.sparsity.language, messages)
        if source_sft is not None and config.source.shared:
            source_sft = source_sft.by(source_sft.method)
    if language_sft is not None and task_sft is not None and not set(methods) - set(METHODS):
        methods = _called(methods, language_sft, task_sft)
    messages += _ablation_problems(config) + _compose_problems(config)
    if task is not None and task.generated and config.data.root is not None and command != "pretrain":
        messages.append(
            f"data.root={config.data.root}: task={task.name} reads generated files only; choose task=nusax, ..."
        )
    if not (config.model.path or config.model.hub or config.model.pretrain):
        messages.append("the model needs model.path=FOLDER, model.hub=ID or model=tiny")
    messages = list(dict.fromkeys(messages))
    if messages or language_sft is None or task_sft is None or source is None:
        return None, messages
    codes = group_options("language") if set(config.protect) & set(PROTECTED) else []
    study = StudySettings(
        name=config.study,
        seed=config.seed,
        methods=tuple(methods),
        model=config.model,
        task=config.task.name,
        train=config.task.train,
        splits=splits,
        source=source,
        more_sources={code: item for code, item in more.items() if item is not None},
        targets=config.language,
        pretrain_languages={code: item for code, item in pretrain.items() if item is not None},
        language_sft=language_sft,
        source_sft=source_sft,
        source_shared=config.source.enabled and config.source.shared,
        task_sft=task_sft,
        corpus=config.corpus,
        data=config.data,
        synthetic=config.synthetic,
        controls=tuple(dict.fromkeys(config.controls)),
        compose=config.compose,
        missing_text=config.missing_text,
        trainer=config.trainer,
        logger=config.logger,
        cache_root=str(Path(config.paths.cache).expanduser()),
        only=tuple(config.only),
        protect=tuple(config.protect),
        protect_languages=tuple(map(language_settings, codes)),
    )
    with collected(messages):
        check_parts(study)
    return (None if messages else study), messages


def _sft(name: str, own: SFTKnobs, config: RunConfig, default: SizeKnobs, messages: list[str]) -> SFTSettings | None:
    """Resolve one kind of SFT, appending what is wrong with it to ``messages``."""
    before = len(messages)
    # What language and task SFTs have from the top is checked there. A shared φ_S stands apart from it.
    top = config if name != "source" or not config.source.shared else None
    messages += problems(own, f"{name}.", follows=top) + problems(own.training, f"{name}.training.")
    rank = residual = None
    with collected(messages):
        rank = RankPolicy.parse(own.rank)
    with collected(messages):
        residual = ResidualPolicy.parse(own.residual)
    sizes = [size for size in (own, top) if size is not None and (size.k, size.density) != (None, None)]
    # Of the sparsity group's two, where both are set, K.
    size = sizes[0] if sizes else SizeKnobs(default.k, default.density if default.k is None else None)
    if not sizes:
        messages += problems(size, f"sparsity.{'task' if name == 'task' else 'language'}.")
        if (size.k, size.density) == (None, None):
            messages.append(f"no mask size for {name}: set k, density or the sparsity group")
    if len(messages) > before or rank is None or residual is None:
        return None
    knobs = {item: getattr(own, item) for item in declared(SFTKnobs)}
    knobs |= {"rank": None if rank.kind == "none" else rank, "residual": residual, "exclude": sorted(own.exclude)}
    return SFTSettings(**knobs | {"k": size.k, "density": size.density})


def _called(methods: Sequence[str], *sfts: SFTSettings) -> list[str]:
    """Return what the methods that are asked for are by their choices, each once.

    Where nothing is denoised, whatever the method is called, that is LT-SFT, and tables have to say so. What no
    method makes of these settings (Δ on a random mask, where they have a rank) keeps the name that it was asked for by.
    """
    names = []
    for name in methods:
        variants = [sft.by(name) for sft in sfts]
        same = [other for other in {sft.method for sft in variants} if [sft.by(other) for sft in sfts] == variants]
        names.append(same[0] if len(same) == 1 else name)
    return list(dict.fromkeys(names))


def _ablation_problems(config: RunConfig) -> list[str]:
    """Return a message for an ablation whose own knob was set to something else: it would ablate nothing."""
    parts = {
        "denoising": ("rank=none", str(config.rank) == "none"),
        "sparsity": ("density=1.0", config.density == 1.0 and config.k is None),
        "second_phase": ("second_phase=false", config.second_phase is False),
        "selection": ("mask=random", config.mask == "random"),
    }
    knob, whole = parts.get(config.ablate, ("", True))
    return (
        [] if whole else [f"ablate={config.ablate} is {knob}, and the command sets it to something else: leave out one"]
    )


def _compose_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with a composition: its rank, and proxies of languages that are not there."""
    compose, messages = config.compose, list[str]()
    with collected(messages):
        RankPolicy.parse(compose.rank)
    for code, weights in compose.proxy.items():
        if code not in config.language:
            messages.append(f"compose.proxy.{code}: no such target; add it with language=[{code}]")
        named = weights if isinstance(weights, Mapping) else {}
        messages += [
            f"compose.proxy.{code}.{other}: only other targets have a φ_L to lend; add it with language=[{other}]"
            for other in named
            if other not in config.language or other in compose.proxy
        ]
        if weights == "family" and not relatives(code, config.language, compose.proxy):
            family = config.language[code].family if code in config.language else ""
            messages.append(
                f"compose.proxy.{code}=family: no other target is {family or 'of its family'}; name weights"
            )
    return messages


def _splits(asked: str | list[str], task: TaskSpec | None, messages: list[str]) -> tuple[str, ...]:
    """Return the splits that are evaluated; adds a message for each that the task lacks or that is named twice."""
    splits = [asked] if isinstance(asked, str) else list(asked or [])
    if not splits or len(set(splits)) < len(splits):
        messages.append(f"split={asked!r}: name one split or both: split=test, split=dev or split=[{','.join(SPLITS)}]")
    messages += [
        f"split={split}: task={task.name} has {' and '.join(task.evaluated)} sets only"
        for split in splits
        if task is not None and split in SPLITS and split not in task.evaluated
    ]
    return tuple(split for split in SPLITS if split in splits)


def _source_problems(train: TaskSpec | None, config: RunConfig) -> list[str]:
    task, codes = config.task, [config.task.source, *config.task.more_sources]
    messages = []
    if len(set(codes)) < len(codes):
        messages.append(f"task.source={task.source} and task.more_sources={task.more_sources}: a language twice")
    if train is not None and not train.several and task.more_sources:
        messages.append(f"task.more_sources: {train.name} has labelled rows in {task.source} only{train.rows.hint}")
    return messages


def _targets_without_rows(task: TaskSpec, config: RunConfig) -> list[str]:
    """Return one message for each target the task has no test set for; own files go by the language's code."""
    if task.generated:
        members = config.synthetic.members
        return [
            f"language {code!r} is not in the generated family ({', '.join(members)}); choose its task: task=nusax, ..."
            for code in config.language
            if code not in members
        ]
    return [
        f"language {code!r} has no {task.name} test set: its file names no code for it"
        for code, language in config.language.items()
        if not task.rows.has(language)
    ]


def _language(code: str, messages: list[str]) -> LanguageSettings | None:
    with collected(messages):
        return language_settings(code)
    return None


def resolve_command(name: str, config: RunConfig) -> tuple[StudySettings | None, list[str]]:
    """Resolve the settings of any command; see :func:`resolve`."""
    study, messages = resolve(config, name)
    if name == "sft" and config.kind not in ("language", "task"):
        messages.append(f"kind={config.kind!r}: must be language or task")
    if name == "eval" and not config.task_sft:
        messages.append("task_sft=FOLDER is needed: the task SFT to compose with; `deftx sft kind=task` trains one")
    if name == "eval":
        messages += [
            f"language_sft.{code}: no such target; add it with language=[{code}]"
            for code in config.language_sft
            if code not in config.language
        ]
    if name == "pretrain" and not config.out:
        messages.append("out=FOLDER is needed: where the model goes")
    if name == "pretrain" and not config.model.pretrain:
        messages.append("model.pretrain is needed: use model=tiny and override its shape")
    return (None if messages else study), messages


def written_folders(config: RunConfig) -> dict[str, Path]:
    """Return folders a command will write, by the knob that names them."""
    folders = {"paths.cache": config.paths.cache, "paths.output": config.paths.output, "out": config.out}
    return {knob: Path(folder) for knob, folder in folders.items() if folder}
