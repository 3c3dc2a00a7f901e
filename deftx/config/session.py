"""Hydra itself: where the configuration lies, composing it, and launching jobs.

``hydra.main`` would do the last, but it reads ``sys.argv``, prints its own tracebacks and hides what the jobs returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deftx.config.schema import register
from deftx.data.settings import LANGUAGE_ALIASES, LanguageSettings
from deftx.errors import DeftxError, did_you_mean
from deftx.settings import RunConfig

VERSION_BASE = "1.3"
T = TypeVar("T")


def conf_dir() -> Path:
    """Return the configuration folder: the one packaged in the wheel, else the checkout's (editable installs)."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "run.yaml").is_file():
            return folder
    raise DeftxError(f"no configuration folder at {package / 'conf'} or {package.parent / 'conf'}; reinstall deftx")


def _hydra(config_dir: str | None) -> Hydra:
    """Return a Hydra instance on deftx's configuration, with the user's own folder in front when there is one."""
    register()
    GlobalHydra.instance().clear()
    for remembered in (group_options, group_exists, _language):
        remembered.cache_clear()
    setbase(VERSION_BASE)
    search_path = create_automatic_config_search_path(None, None, str(conf_dir()))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise DeftxError(f"--config-dir {config_dir}: no such folder")
        search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve()}")
    return Hydra.create_main_hydra2(task_name="deftx", config_search_path=search_path)


@contextmanager
def hydra_session(config_dir: str | None = None) -> Iterator[None]:
    """Keep a Hydra instance open, so that configurations can be composed."""
    _hydra(config_dir)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def run_job(
    name: str,
    job: Callable[[RunConfig], T],
    overrides: Sequence[str],
    *,
    config_dir: str | None,
    folder: str | None = None,
) -> T:
    """Run one job.

    Args:
        name: Primary configuration.
        job: What is run; its settings are its argument.
        overrides: All of the job's.
        config_dir: The user's own configuration folder.
        folder: Where the job's files go; None: as the configuration says.

    Raises:
        DeftxError: Its folder cannot be made.
    """
    hydra = _hydra(config_dir)
    hydra_overrides = ["hydra.mode=RUN"] if folder is None else ["hydra.mode=RUN", f"hydra.run.dir={quoted(folder)}"]
    try:
        ended = hydra.run(name, lambda config: job(typed(config)), [*overrides, *hydra_overrides])
        return cast(T, ended.return_value)
    except OSError as error:
        raise DeftxError(
            f"the run's folder cannot be made: {error.filename or 'no path'}: {error.strerror}; choose another "
            + ("paths.output=FOLDER" if folder is None else "hydra.sweep.dir=FOLDER")
        ) from error
    finally:
        GlobalHydra.instance().clear()


def quoted(text: str) -> str:
    """Return a value as Hydra's grammar takes it, whatever letters it has."""
    return "'" + text.replace("'", "\\'") + "'"


def run_directory() -> Path:
    """Return the folder Hydra made for this job; absolute."""
    return Path(HydraConfig.get().runtime.output_dir)


def _repository() -> Any:
    """Return the files on the search path; the loader's own methods copy all of it before they look at one."""
    return GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]


@cache
def group_options(group: str) -> list[str]:
    """Return names in a config group, from every folder on the search path."""
    return sorted(_repository().get_group_options(group, ObjectType.CONFIG))


@cache
def group_exists(group: str) -> bool:
    """Return whether a name is that of a config group."""
    return bool(_repository().group_exists(group))


def defaults_of(name: str) -> Callable[[str], Any]:
    """Return a command's configuration without overrides, as a function from key to value."""
    config = compose(name)
    return lambda key: OmegaConf.select(config, key)


def unknown(kind: str, value: str, options: Sequence[str]) -> str:
    """Return one message for an unknown name."""
    if kind == "language" and value in LANGUAGE_ALIASES:
        return f"unknown language {value!r}; it is called {LANGUAGE_ALIASES[value]!r} here"
    own = "; one of your own: a folder with language/CODE.yaml, and --config-dir FOLDER" if kind == "language" else ""
    return f"unknown {kind} {value!r}{did_you_mean(value, options)}; available: {', '.join(options)}{own}"


def language_settings(code: str) -> LanguageSettings:
    """Return the settings of one language, from ``conf/language/<code>.yaml`` on Hydra's search path.

    Raises:
        DeftxError: No such file, or something in it that is no setting of a language.
    """
    options = group_options("language")
    if code not in options:
        raise DeftxError(unknown("language", code, options))
    try:
        return deepcopy(_language(code))
    except (OmegaConfBaseException, YAMLError) as error:
        raise DeftxError(f"language/{code}.yaml: {' '.join(str(error).split())}") from error


@cache
def _language(code: str) -> LanguageSettings:
    # Read alone: composing a whole configuration around it takes fifty times as long.
    result = _repository().load_config(f"language/{code}")
    problems = list(_file_problems(code, result))
    if problems:
        raise DeftxError("\n".join(f"language/{code}.yaml: {problem}" for problem in problems))
    return cast(LanguageSettings, OmegaConf.to_object(OmegaConf.merge(LanguageSettings, result.config)))


def _file_problems(code: str, result: Any) -> Iterator[str]:
    """Yield what a first file of one's own gets wrong, in words that say what to write."""
    if result.header.get("package") != f"language.{code}":
        yield f"its first line must be `# @package language.{code}`"
    if not OmegaConf.is_dict(result.config):
        yield "it must hold lines `key: value`, such as `text: [FILE]`"
        return
    lists = {item.name: "list" in str(item.type) for item in fields(LanguageSettings)}
    for key, value in result.config.items():
        if key not in lists:
            yield f"unknown key {key!r}{did_you_mean(str(key), lists)}; available: {', '.join(lists)}"
        elif lists[key] and isinstance(value, str):
            yield f"{key}: {value} is no list; write {key}: [{value}]"
        else:
            words = value if OmegaConf.is_list(value) else [value]
            for read in (word for word in words if isinstance(word, bool | int | float)):
                yield f'{key}: YAML reads this as {read}, not as a word; write it in quotes: "..."'


def typed(config: DictConfig) -> RunConfig:
    """Return a composed configuration as the dataclasses that declare it, interpolations resolved, containers plain."""
    if OmegaConf.is_missing(config.task, "source"):  # said in words of ours when it is resolved
        config = deepcopy(config)
        config.task.source = ""
    return cast(RunConfig, OmegaConf.to_object(config))
