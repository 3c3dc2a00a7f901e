"""Look at every job of a command before any of them starts, and report all that is wrong in one message."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deftx.config.compose import Composer, is_group, is_hydra
from deftx.config.resolve import resolve_command
from deftx.config.session import group_options, language_settings, typed, unknown
from deftx.errors import DeftxError, collected, did_you_mean
from deftx.knobs import Knob, declared, problems
from deftx.settings import KNOBS, OPEN_MAPPINGS, RunConfig
from deftx.stages.settings import StudySettings

# OmegaConf asserts where an override goes below a null (model.pretrain.steps=9 with model=local).
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, AssertionError, ValueError, YAMLError)
# Keys that take several values in one run.
LISTS = ("language", "compare", "controls")
# Groups of which a run has one.
ONE = ("method", "model", "task")
# Groups without a node of their own in the configuration.
GROUPS = ("experiment", "ablate")
# Hydra's own ways to run a sweep, and its settings that concern the sweep rather than a job.
_NOT_OURS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep.subdir")
_OF_SWEEPS = ("hydra.sweep", "hydra.mode")


@dataclass(frozen=True)
class CheckedJob:
    """A job that passed.

    Attributes:
        overrides: All of its overrides.
        config: What they compose.
        study: What that resolves to.
    """

    overrides: list[str]
    config: RunConfig
    study: StudySettings


@dataclass(frozen=True)
class CheckedCommand:
    """A command that passed: what Hydra is asked to run.

    Attributes:
        multirun: Whether it is a sweep.
        jobs: One unless it is a sweep.
        folder: Where a sweep lands.
    """

    multirun: bool
    jobs: list[CheckedJob]
    folder: str = ""


JobCheck = Callable[[CheckedJob, bool], list[str]]
"""Gives what else is wrong with a job whose values are right, and is told whether it is one of a sweep."""


def check_command(
    name: str, overrides: Sequence[str], *, multirun: bool, look: JobCheck = lambda job, multirun: []
) -> CheckedCommand:
    """Compose, resolve and check every job of a command, or say everything that is wrong with it.

    Call it inside :func:`deftx.config.session.hydra_session`.

    Args:
        name: The command, which is its primary configuration's name, too.
        overrides: As on the command line.
        multirun: Whether a sweep was asked for; an experiment may ask for one itself.
        look: Looks at what the settings of each job name: folders, files, shapes.

    Raises:
        DeftxError: One message with every problem: unknown groups, options and keys, values of the wrong type or out of
            their range, a sweep without ``-m``, and whatever ``look`` finds.
    """
    passed: list[CheckedJob] = []

    def check(config: DictConfig, overrides: list[str], multirun: bool) -> list[str]:
        settings = typed(config)
        added = [] if not any(text.startswith("+") for text in overrides) else _added(settings, name)
        study, more = resolve_command(name, settings)
        if study is None or added:
            return added + more
        passed.append(CheckedJob(overrides, settings, study))
        return look(passed[-1], multirun)

    multirun, folder = _each_job(name, overrides, multirun, check)
    return CheckedCommand(multirun, passed, folder)


def first_configuration(name: str, overrides: Sequence[str], *, multirun: bool) -> DictConfig:
    """Return the configuration of a command's first job, composed but not resolved.

    Raises:
        DeftxError: One message with everything that does not compose.
    """
    configs: list[DictConfig] = []

    def keep(config: DictConfig, *_: object) -> list[str]:
        configs.append(config)
        return []

    _each_job(name, overrides, multirun, keep)
    return configs[0]


def check_search(name: str, overrides: Sequence[str], command: CheckedCommand, look: JobCheck) -> None:
    """Check every value that a search may propose, before its first trial.

    Args:
        name: The command.
        overrides: As on the command line.
        command: What they gave, a search.
        look: As for :func:`check_command`.

    Raises:
        DeftxError: One message with every problem.
    """
    settings, top = command.jobs[0].config.search, declared(RunConfig)
    messages = problems(settings, "search.") + [
        f"search.space.{knob}: it says what is studied or how it runs: no knob of the method"
        for knob in settings.space
        if knob in ("task", "experiment") or knob.startswith("hydra") or top.get(knob.split(".")[0], Knob()).fixed
    ]
    if len(command.jobs) > 1:
        messages.append("a search proposes its own values: it cannot be swept; give search.space.KNOB=[...] instead")
    for proposal in settings.examples() if not messages else []:
        try:
            check_command(name, [*overrides, *proposal], multirun=True, look=look)
        except DeftxError as error:
            messages += str(error).splitlines()
    if messages:
        raise DeftxError("\n".join(dict.fromkeys(messages)))


# ------------------------------------------------------------------------------------------------------ composing

ConfigCheck = Callable[[DictConfig, list[str], bool], list[str]]
"""Gives what is wrong with a composed job, from its configuration, its overrides and whether it is one of a sweep."""


def _each_job(name: str, overrides: Sequence[str], multirun: bool, check: ConfigCheck) -> tuple[bool, str]:
    """Compose each job of a command and check it; whether they are a sweep, and where that lands.

    Raises:
        DeftxError: One message with every problem.
    """
    composer = Composer(name)
    messages: list[str] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(composer.parse(text))
        except (OverrideParseException, HydraException):
            quoted = (
                ", values with spaces, commas or other letters in inner quotes: key='\"value\"'" if "=" in text else ""
            )
            messages.append(f"{text!r} is no override; write key=value{quoted}")
    messages += [
        f"{item.input_line}: deftx starts the jobs of a sweep itself; choose launcher=basic, joblib, slurm, ..."
        for item in parsed
        if item.key_or_group.startswith(_NOT_OURS)
    ]
    messages += [text for item in parsed for text in _group_problems(item)]
    swept = [item.key_or_group for item in parsed if item.is_sweep_override()]
    messages += [f"{key} is swept twice: give all of its values at once" for key in swept if swept.count(key) > 1]
    messages += _unread(name, [item.key_or_group for item in parsed])
    if not messages:
        try:
            sweep, jobs, folder = _jobs(parsed, composer, multirun)
            messages = [text for config, texts in jobs for text in check(config, texts, sweep)]
            if not messages:
                return sweep, folder
        except COMPOSE_ERRORS as error:
            messages = _override_problems(parsed, composer, check, multirun) or [_first_line(error)]
    else:
        messages += _override_problems(parsed, composer, check, multirun)
    raise DeftxError("\n".join(dict.fromkeys(messages)))


def _unread(name: str, keys: Sequence[str]) -> list[str]:
    """Return one message for each key of overrides that a command would ignore."""
    messages, top = [], declared(RunConfig)
    for key in keys:
        facts = top.get(key.split(".")[0].split("@")[0])
        if facts is not None and name not in facts.commands:
            messages.append(f"{key} is not read by deftx {name}; it belongs to deftx {', '.join(facts.commands)}")
    return messages


def _jobs(
    items: Sequence[Override], composer: Composer, multirun: bool
) -> tuple[bool, Iterator[tuple[DictConfig, list[str]]], str]:
    """Return whether Hydra's sweeper runs the jobs, configuration and overrides of each, and where a sweep lands.

    Raises:
        DeftxError: Values to sweep over without a sweep.
    """
    single = [item for item in items if not item.is_sweep_override()]
    base = compose(composer.name, overrides=_lines(single), return_hydra_config=True)
    if base.hydra.job.chdir:
        raise DeftxError(
            "hydra.job.chdir=true: relative paths would be looked for in each run's own folder; leave it out (results "
            "land there anyway)"
        )
    # A search is many jobs, too, though it has one set of overrides to begin with.
    multirun = multirun or base.hydra.mode == RunMode.MULTIRUN or bool(base.search.space)
    if not multirun:
        sweeps = [item for item in items if item.is_sweep_override()]
        if sweeps:
            raise DeftxError(
                "\n".join(
                    f"{item.input_line} is a sweep: add -m"
                    + (f", or write {item.key_or_group}=[...]" if item.key_or_group in LISTS else "")
                    for item in sweeps
                )
            )
        with open_dict(base):
            del base["hydra"]
        return False, iter([(base, _lines(single))]), ""
    # What is given on the command line stands in place of the experiment's own grid, key by key.
    overridden = {item.key_or_group for item in items}
    params = {key: value for key, value in (base.hydra.sweeper.get("params") or {}).items() if key not in overridden}
    every = [composer.parse(f"{key}={value}") for key, value in params.items()] + list(items)
    wrong = [text for item in every for text in _group_problems(item)]
    if wrong:
        raise DeftxError("\n".join(wrong))
    jobs = BasicSweeper.split_arguments([item for item in every if not is_hydra(item)], None)[0]
    jobs = [list(job) for job in dict.fromkeys(map(tuple, jobs))]  # rank=2,2 is one job
    if not jobs:
        swept = [item.input_line or "" for item in every if item.is_sweep_override()]
        raise DeftxError(f"{', '.join(swept)}: no value, so the sweep has no jobs; write key=a,b,c")
    of_hydra = [
        item.input_line or "" for item in items if is_hydra(item) and not item.key_or_group.startswith(_OF_SWEEPS)
    ]
    return True, ((composer(job), [*job, *of_hydra]) for job in jobs), str(base.hydra.sweep.dir)


def _added(settings: Any, name: str, prefix: str = "") -> list[str]:
    """Return one message for each key that was added where nothing reads it; Hydra takes ``+key=value`` anywhere."""
    messages = []
    names = {item.name for item in fields(settings)}
    for key, value in vars(settings).items():
        if key not in names:
            full = prefix + key
            messages.append(f"unknown key {full!r}{did_you_mean(full, KNOBS)}; `deftx {name} --help` lists the knobs")
        elif is_dataclass(value):
            messages += _added(value, name, f"{prefix}{key}.")
    return messages


def _lines(items: Sequence[Override]) -> list[str]:
    return [item.input_line or "" for item in items]


def _values(item: Override) -> list[str]:
    """Return every option an override of a group names, sweeps and lists included."""
    if item.is_sweep_override():
        texts = list(item.sweep_string_iterator()) if item.is_discrete_sweep() else []
    else:
        value = item.value()
        texts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return [part.strip(" '\"") for text in texts for part in text.strip("[]").split(",")]


def _group_problems(item: Override) -> list[str]:
    if not is_group(item):
        return []
    options = group_options(item.key_or_group)
    group, values = item.key_or_group, _values(item)
    if message := _misread(item):
        return [message]
    if group in ONE and len(values) > 1 and not item.is_sweep_override():
        beside = f", compare=[{','.join(values[1:])}] evaluates it beside {values[0]}" if group == "method" else ""
        return [f"{item.input_line}: a run has one {group}; -m {group}={','.join(values)} runs each{beside}"]
    messages = [
        unknown(group, value, options) for value in values if value not in options and value not in ("null", "None", "")
    ]
    for value in values if group == "language" else ():
        if value in options:
            with collected(messages):
                language_settings(value)
    return messages


def _misread(item: Override) -> str:
    """Return what to write where Hydra's grammar takes a name for a number or a truth value; else an empty text."""
    parser = OverridesParser.create()
    chosen = (item.input_line or "").partition("=")[2]

    def quoted(match: re.Match[str]) -> str:
        text = match[0].strip()
        try:
            value = parser.parse_rule(text, "primitive")
        except HydraException:  # a function, a quoted text with a comma: no name that was misread
            return match[0]
        return f'"{text}"' if isinstance(value, bool | int | float) else match[0]

    again = re.sub(r"[^\[\],]+", quoted, chosen)
    if again == chosen:
        return ""
    return f"{item.input_line}: some of it is read as a value, not as a name; quote it: '{item.key_or_group}={again}'"


def _override_problems(items: Sequence[Override], composer: Composer, check: ConfigCheck, multirun: bool) -> list[str]:
    """Try each override by itself on top of the valid groups, to name every one that does not fit.

    Those that fit are then checked together, so that a misspelt key does not hide a rank of 0.
    """
    chosen = [_each(item)[0] for item in items if is_group(item) and not _group_problems(item)]
    try:
        config = composer(chosen)
    except COMPOSE_ERRORS as error:
        return [_first_line(error)]
    keys = set(_keys(OmegaConf.to_container(config)))
    messages: list[str] = []
    for item in items:
        key = item.key_or_group
        if is_group(item) or key.startswith("hydra"):
            continue
        ordinary = not item.is_add() and not item.is_force_add() and not item.is_delete()
        if ordinary and key not in keys:
            close = did_you_mean(key, [*sorted(keys), *GROUPS])
            messages.append(f"unknown key {key!r}{close}; `deftx {composer.name} --help` lists the knobs")
            continue
        for text in _each(item):
            try:
                if ordinary:
                    OmegaConf.update(config, key, composer.parse(text).value(), merge=True)
                else:
                    composer([*chosen, text])
            except COMPOSE_ERRORS as error:
                reason = _first_line(error.__cause__ or error)
                if "is not a ListConfig" in reason:
                    reason = f"a list is needed: {key}=[{text.partition('=')[2]}]"
                elif key in OPEN_MAPPINGS:
                    reason = f"it has keys of your own: {key}.NAME=VALUE"
                messages.append(f"{text.lstrip('+')}: {reason}")
    try:
        messages += check(config, [], multirun)
    except COMPOSE_ERRORS as error:
        messages.append(_first_line(error))
    return messages


def _each(item: Override) -> list[str]:
    if item.is_sweep_override() and item.is_discrete_sweep():
        return [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
    return [item.input_line or ""]


def _keys(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _first_line(error: BaseException) -> str:
    if isinstance(error, AssertionError):
        return "there is nothing to set below a null of this configuration"
    lines = str(error).strip().splitlines()
    if "Cannot merge DictConfig with ListConfig" in str(error):
        return "a list and a {low, high} range cannot take each other's place here; set both in a file of your own"
    if isinstance(error, YAMLError):
        return "; ".join(line.strip() for line in lines)
    # Hydra says where, its cause says what.
    cause = error.__cause__
    texts = [lines[0], *(str(cause).strip().splitlines()[:1] if cause is not None else [])]
    return " ".join(dict.fromkeys(text for text in texts if text))
