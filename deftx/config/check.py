"""Look at every job of a command before any of them starts, and report all that is wrong in one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deftx.config.commands import unread
from deftx.config.session import group_options, unknown
from deftx.errors import DeftxError, did_you_mean

# OmegaConf asserts where an override goes below a null (model.pretrain.steps=9 with model=local).
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, AssertionError, ValueError, YAMLError)
# Keys that take several values in one run.
LISTS = ("language", "compare", "controls")
# Groups without a node of their own in the configuration.
GROUPS = ("experiment", "ablate")
# Hydra's own ways to run a sweep, and its settings that concern the sweep rather than a job.
_NOT_OURS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep.subdir")
_OF_SWEEPS = ("hydra.sweep", "hydra.mode")


@dataclass
class Command:
    """A command that passed: what Hydra is asked to run.

    Attributes:
        multirun: Whether it is a sweep.
        configs: The composed configuration of each job; one unless it is a sweep.
        overrides: The overrides of each job.
        folder: Where a sweep lands.
    """

    multirun: bool
    configs: list[DictConfig]
    overrides: list[list[str]]
    folder: str = ""


def check_command(
    name: str, overrides: Sequence[str], *, multirun: bool, validate: Callable[[DictConfig], list[str]]
) -> Command:
    """Compose and validate every job of a command, or say everything that is wrong with it.

    Call it inside :func:`deftx.config.session.hydra_session`.

    Args:
        name: Primary configuration.
        overrides: As on the command line.
        multirun: Whether a sweep was asked for; an experiment may ask for one itself.
        validate: Gives what is wrong with one composed job; empty when nothing is.

    Raises:
        DeftxError: One message with every problem: unknown groups, options and keys, values of the wrong type, a sweep
            without ``-m``, and whatever ``validate`` finds.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    problems: list[str] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except (OverrideParseException, HydraException):
            quoted = (
                ", values with spaces, commas or other letters in inner quotes: key='\"value\"'" if "=" in text else ""
            )
            problems.append(f"{text!r} is no override; write key=value{quoted}")
    problems += [
        f"{item.input_line}: deftx starts the jobs of a sweep itself; choose launcher=basic, joblib, slurm, ..."
        for item in parsed
        if item.key_or_group.startswith(_NOT_OURS)
    ]
    problems += [text for item in parsed for text in _group_problems(item)]
    swept = [item.key_or_group for item in parsed if item.is_sweep_override()]
    problems += [f"{key} is swept twice: give all of its values at once" for key in swept if swept.count(key) > 1]
    problems += unread(name, [item.key_or_group for item in parsed])
    if not problems:
        try:
            command = _composed(name, parsed, parser, multirun)
            problems = [text for config in command.configs for text in validate(config)]
            if not problems:
                return command
        except COMPOSE_ERRORS as error:
            problems = _override_problems(name, parsed, parser, validate) or [_first_line(error)]
    else:
        problems += _override_problems(name, parsed, parser, validate)
    raise DeftxError("\n".join(dict.fromkeys(problems)))


def _composed(name: str, items: Sequence[Override], parser: OverridesParser, multirun: bool) -> Command:
    """The configuration of each job, and whether Hydra's sweeper runs them.

    Raises:
        DeftxError: Values to sweep over without a sweep.
    """
    single = [item for item in items if not item.is_sweep_override()]
    base = compose(name, overrides=_lines(single), return_hydra_config=True)
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
        return Command(False, [base], [_lines(single)])
    # What is given on the command line stands in place of the experiment's own grid, key by key.
    given = {item.key_or_group for item in items}
    params = {key: value for key, value in (base.hydra.sweeper.get("params") or {}).items() if key not in given}
    every = parser.parse_overrides([f"{key}={value}" for key, value in params.items()]) + list(items)
    wrong = [text for item in every for text in _group_problems(item)]
    if wrong:
        raise DeftxError("\n".join(wrong))
    jobs = BasicSweeper.split_arguments([item for item in every if not _is_hydra(item)], None)[0]
    jobs = [list(job) for job in dict.fromkeys(map(tuple, jobs))]  # rank=2,2 is one job
    if not jobs:
        swept = [item.input_line or "" for item in every if item.is_sweep_override()]
        raise DeftxError(f"{', '.join(swept)}: no value, so the sweep has no jobs; write key=a,b,c")
    kept = [item.input_line or "" for item in items if _is_hydra(item) and not item.key_or_group.startswith(_OF_SWEEPS)]
    return Command(
        True,
        [compose(name, overrides=job) for job in jobs],
        [[*job, *kept] for job in jobs],
        str(base.hydra.sweep.dir),
    )


def _lines(items: Sequence[Override]) -> list[str]:
    return [item.input_line or "" for item in items]


def _values(item: Override) -> list[str]:
    """Every option an override of a group names, sweeps and lists included."""
    if item.is_sweep_override():
        texts = list(item.sweep_string_iterator()) if item.is_discrete_sweep() else []
    else:
        value = item.value()
        texts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return [part.strip() for text in texts for part in text.strip("[]").split(",")]


def _is_group(item: Override) -> bool:
    return bool(group_options(item.key_or_group)) and not item.key_or_group.startswith("hydra")


def _is_hydra(item: Override) -> bool:
    return item.key_or_group.split(".")[0].split("/")[0] == "hydra"


def _group_problems(item: Override) -> list[str]:
    if not _is_group(item):
        return []
    options = group_options(item.key_or_group)
    return [
        unknown(item.key_or_group, value, options)
        for value in _values(item)
        if value not in options and value not in ("null", "None", "")
    ]


def _override_problems(
    name: str, items: Sequence[Override], parser: OverridesParser, validate: Callable[[DictConfig], list[str]]
) -> list[str]:
    """Try each override by itself on top of the valid groups, to name every one that does not fit.

    Those that fit are then validated together, so that a misspelt key does not hide a rank of 0.
    """
    chosen = [_each(item)[0] for item in items if _is_group(item) and not _group_problems(item)]
    try:
        config = compose(name, overrides=chosen)
    except COMPOSE_ERRORS as error:
        return [_first_line(error)]
    keys = set(_keys(OmegaConf.to_container(config)))
    problems: list[str] = []
    for item in items:
        key = item.key_or_group
        if _is_group(item) or key.startswith("hydra"):
            continue
        ordinary = not item.is_add() and not item.is_force_add() and not item.is_delete()
        if ordinary and key not in keys:
            close = did_you_mean(key, [*sorted(keys), *GROUPS])
            problems.append(f"unknown key {key!r}{close}; `deftx {name} --help` lists the knobs")
            continue
        for text in _each(item):
            try:
                if ordinary:  # as Hydra merges it, without composing everything again
                    OmegaConf.update(config, key, parser.parse_override(text).value(), merge=True)
                else:
                    compose(name, overrides=[*chosen, text])
            except COMPOSE_ERRORS as error:
                problems.append(f"{text}: {_first_line(error.__cause__ or error)}")
    try:
        problems += validate(config)
    except COMPOSE_ERRORS as error:
        problems.append(_first_line(error))
    return problems


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
    said = [lines[0], *(str(cause).strip().splitlines()[:1] if cause is not None else [])]
    return " ".join(dict.fromkeys(text for text in said if text))
