"""The ``deftx`` command: subcommand -> ``conf/<name>.yaml`` -> stages; errors a person can read.

Nothing heavy is imported before it is needed: ``deftx --help`` is text, ``deftx run --help`` reads configuration, and
only a command whose configuration passed imports torch. ``sys.argv`` is never changed (Lightning relaunches it).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deftx import __version__
from deftx.errors import DeftxError, did_you_mean

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

    from deftx.config import Command

COMMANDS = {
    "run": "everything a study needs, stage by stage, from the cache where it can; -m sweeps",
    "sft": "train one language or task SFT",
    "eval": "compose given SFTs and evaluate them on target languages",
    "pretrain": "train a small multilingual encoder from raw text, for work without a hub",
    "report": "tables, plots and one page from the results of many runs: deftx report DIR...",
    "dashboard": "a W&B workspace over the runs of a study, as a specification or published",
    "cache": "list, explain, verify and prune the results of stages: ls | info KEY | verify | prune",
}

OPEN_MAPPINGS = ("language_sft.", "data.revisions.", "search.space.", "launcher.additional.")

HELP = """\
deftx {version}: composable sparse fine-tuning with SVD denoising, for cross-lingual transfer

usage: deftx COMMAND [key=value ...] [-m]

commands
{commands}

first steps
  deftx run experiment=demo                      a result in minutes, no download
  deftx run --help                               the knobs, groups and experiments
  deftx run --cfg job                            the whole configuration, printed
  deftx run -m experiment=demo rank=8,16,none    a sweep
  deftx run experiment=rank_x_sparsity --dry-run what it would compute, and about how long

options
  -h, --help     this page; after a command, its knobs
  --version      print the version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``deftx``; exits with 0, 1 (a mistake or a failed run), 130 (interrupted) or 141 (the reader has gone)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
    except DeftxError as error:
        print(_message(error), file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(
            "deftx: interrupted; finished stages are in the cache, run the command again to go on",
            file=sys.stderr,
        )
        status = 130
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def _message(error: DeftxError) -> str:
    lines = str(error).splitlines() or ["unknown error"]
    if len(lines) == 1:
        return f"deftx: error: {lines[0]}"
    return "\n".join(["deftx: error:", *(f"  - {line}" if not line.startswith(" ") else f"  {line}" for line in lines)])


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        print(HELP.format(version=__version__, commands=listing), end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"deftx {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise DeftxError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; available: {', '.join(COMMANDS)}")
    if name == "cache":
        from deftx.cache.commands import run as cache_command

        return cache_command(rest)
    if name == "dashboard":
        from deftx.dashboard import main as dashboard

        return dashboard(rest)
    if name == "report":
        from deftx.report.command import main as report

        return report(rest)
    return _command(name, rest)


def _command(name: str, arguments: list[str]) -> int:
    """Parse Hydra's own options, check every job, then hand over to Hydra."""
    if any(item in ("-h", "--help") for item in arguments):
        from deftx.config import hydra_session
        from deftx.help import command_help

        with hydra_session():
            print(command_help(name, COMMANDS[name]), end="")
        return 0

    known, overrides = _parse(arguments)

    from deftx.tracking import clock_imports

    clock_imports()
    from deftx.config import check_command, hydra_session

    with hydra_session(known.config_dir):
        if known.cfg:
            from omegaconf import OmegaConf

            command = check_command(name, overrides, multirun=known.multirun, validate=lambda _: [])
            print(OmegaConf.to_yaml(command.configs[0], resolve=known.resolve), end="")
            return 0
        command = check_command(
            name, overrides, multirun=known.multirun, validate=lambda config: _job_problems(name, config)
        )
        if command.configs[0].search.space:
            _check_search(overrides, command)
    if command.multirun and any(config.trainer.devices > 1 for config in command.configs):
        raise DeftxError("trainer.devices: a job of a sweep has one device; several would each repeat the sweep")
    if (command.multirun or known.dry_run) and any(config.only for config in command.configs):
        raise DeftxError(
            "only=[...] makes parts of one study; it is neither swept nor planned: leave out only= (a sweep makes what "
            "its jobs share by itself), or -m and --dry-run"
        )
    if command.multirun or known.dry_run:
        return _sweep(name, command, known)
    return _single(name, command.overrides[0], known.config_dir)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The few options that are no overrides; an unknown one is an error of ours, not a usage dump."""
    import argparse

    def refuse(text: str) -> None:
        raise DeftxError(f"{text}; the options are -m, --dry-run, --cfg job, --resolve and --config-dir FOLDER")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("overrides", nargs="*")
    # Intermixed, so that options may stand anywhere among the overrides.
    known = parser.parse_intermixed_args(arguments)
    # The shell leaves the ~ of key=~/folder alone, and Hydra's grammar has no word for it.
    texts = [re.sub(r"^([\w.]+=)~(?=/|$)", lambda found: found[1] + str(Path.home()), text) for text in known.overrides]
    # Hydra wants ++ for a new key of an open mapping, which is all that these are.
    return known, [f"++{text}" if text.startswith(OPEN_MAPPINGS) else text for text in texts]


def _job_problems(name: str, config: DictConfig) -> list[str]:
    """What is wrong with one job: its values first, then the folders and files it names."""
    from deftx.config import resolve_command, written_folders

    settings, problems = resolve_command(name, config)
    if settings is None:
        return problems
    from deftx.stages.preflight import given_problems, preflight

    job = {"sft": f"sft {config.kind}", "pretrain": "pretrain text" if config.text else name}.get(name, name)
    problems = preflight(settings, job, written_folders(config), Path(config.out).expanduser() if config.out else None)
    if name == "eval":
        problems += given_problems(settings, config.task_sft, dict(config.language_sft))
    return problems


def _single(name: str, overrides: Sequence[str], config_dir: str | None) -> int:
    from deftx.config import launch
    from deftx.jobs import JOBS

    end = launch(name, JOBS[name], overrides, config_dir=config_dir)
    if end.error:
        print(_message(DeftxError(end.error)), file=sys.stderr)
    return 1 if end.error else 0


def _sweep(name: str, command: Command, known: argparse.Namespace) -> int:
    """Run a sweep or a search, or say what a sweep or a single run would compute."""
    from deftx.config import launcher_settings, search_settings, study_settings
    from deftx.launch import check
    from deftx.sweeps import Sweep, dry_run, run_search, run_sweep

    if known.dry_run and name != "run":
        raise DeftxError(f"--dry-run belongs to deftx run, not to deftx {name}")
    sweep = Sweep(
        name,
        command.overrides,
        Path(command.folder).absolute(),
        launcher_settings(command.configs[0]),
        known.config_dir,
        [study_settings(config) for config in command.configs] if name == "run" else [],
    )
    check(sweep.launcher)
    searched = command.configs[0].search.space
    if known.dry_run:
        if searched:
            print("a search: its trials are not known yet; this is the plan of one run at the base settings")
        dry_run(sweep)
        return 0
    if searched:
        return run_search(sweep, search_settings(command.configs[0]))
    return run_sweep(sweep)


def _check_search(overrides: list[str], command: Command) -> None:
    """Validate every value a search may propose, before its first trial.

    Raises:
        DeftxError: One message with every problem.
    """
    from deftx.config import check_command, search_settings

    settings = search_settings(command.configs[0])
    problems = settings.problems()
    if len(command.configs) > 1:
        problems.append("a search proposes its own values: it cannot be swept; give search.space.KNOB=[...] instead")
    for proposal in settings.examples() if not problems else []:
        try:
            check_command("run", [*overrides, *proposal], multirun=True, validate=lambda c: _job_problems("run", c))
        except DeftxError as error:
            problems += str(error).splitlines()
    if problems:
        raise DeftxError("\n".join(dict.fromkeys(problems)))
