"""The ``deftx`` command: subcommand -> ``conf/<name>.yaml`` -> stages; errors a person can read.

Nothing heavy is imported before it is needed: ``deftx --help`` is text, ``deftx run --help`` reads configuration, and
only a command whose configuration passed imports torch. ``sys.argv`` is never changed (Lightning relaunches it).
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deftx import __version__
from deftx.errors import DeftxError, did_you_mean
from deftx.streams import lasting_streams

if TYPE_CHECKING:
    import argparse

    from deftx.config import CheckedCommand, CheckedJob

COMMANDS = {
    "run": "everything a study needs, stage by stage, from the cache where it can; -m sweeps",
    "sft": "train one language or task SFT",
    "eval": "compose given SFTs and evaluate them on target languages",
    "pretrain": "train a small multilingual encoder from raw text, for work without a hub",
    "report": "tables, plots and one page from the results of many runs: deftx report DIR...",
    "status": "what sweeps and runs have done, what runs now, what is left: deftx status [DIR...]",
    "dashboard": "a W&B workspace over the runs of a study, as a specification or published",
    "cache": "list, explain, verify and prune the results of stages: ls | info KEY | verify | prune",
}
_FILES = ("run", "sft", "eval", "pretrain", "report")  # commands whose result is files
_PRINTED = ("-h", "--help", "--cfg", "--dry-run")  # what makes them print alone

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
    with lasting_streams() as lost:
        status = _status(arguments)
        reason = lost()
        # What leaves files is done when they are there. Others have nothing but what they print.
        leaves_files = set(arguments[:1]) & set(_FILES) and not set(arguments) & set(_PRINTED)
        if reason is not None and not status and not leaves_files:
            status = 141 if isinstance(reason, BrokenPipeError) else 1
            if status == 1:
                print(f"deftx: error: not all of it could be printed: {reason}", file=sys.stderr)
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Run a command; returns its exit status, with a message where it is not 0."""
    try:
        return _dispatch(arguments)
    except DeftxError as error:
        print(_message(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "deftx: interrupted; finished stages and the last state of a phase are in the cache. "
            f"To go on, run the command again: deftx {_again(arguments)}",
            file=sys.stderr,
        )
        return 130


def _again(arguments: Sequence[str]) -> str:
    """Return what goes on with an interrupted command: the same, but for a folder that is not new any more."""
    return shlex.join(item for item in arguments if not item.startswith(("hydra.sweep.dir=", "hydra.run.dir=")))


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
    if name == "status":
        from deftx.status import main as status

        return status(rest)
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

    from deftx.tracking import clock_imports

    clock_imports()
    options, overrides = _parse(arguments)
    from deftx.config import check_command, check_search, first_configuration, hydra_session

    with hydra_session(options.config_dir):
        if options.cfg:
            from omegaconf import OmegaConf

            config = first_configuration(name, overrides, multirun=options.multirun)
            print(OmegaConf.to_yaml(config, resolve=options.resolve), end="")
            return 0
        look = partial(_job_problems, name, {})
        command = check_command(name, overrides, multirun=options.multirun, look=look)
        if command.jobs[0].config.search.space:
            check_search(name, overrides, command, look)
    configs = [job.config for job in command.jobs]
    if command.multirun and any(config.trainer.devices > 1 for config in configs):
        raise DeftxError("trainer.devices: a job of a sweep has one device; several would each repeat the sweep")
    if (command.multirun or options.dry_run) and any(config.only for config in configs):
        raise DeftxError(
            "only=[...] makes parts of one study; it is neither swept nor planned: leave out only= (a sweep makes what "
            "its jobs share by itself), or -m and --dry-run"
        )
    if command.multirun or options.dry_run:
        return _sweep(name, command, options)
    return _single(name, command.jobs[0].overrides, options.config_dir)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split off the few options that are no overrides; an unknown one is an error of ours, not a usage dump."""
    import argparse

    from deftx.settings import OPEN_MAPPINGS

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
    options = parser.parse_intermixed_args(arguments)
    # The shell leaves the ~ of key=~/folder alone, and Hydra's grammar has no word for it.
    texts = [
        re.sub(r"^([\w.]+=)~(?=/|$)", lambda found: found[1] + str(Path.home()), text) for text in options.overrides
    ]
    # Hydra wants ++ for a new key of an open mapping, which is all that these are.
    opened = tuple(f"{name}." for name in OPEN_MAPPINGS)
    return options, [f"++{text}" if text.startswith(opened) else text for text in texts]


def _device(job: CheckedJob, multirun: bool) -> str:
    """Return the kind of device that a job trains on, where its launcher takes it elsewhere; a single run runs here."""
    return job.config.launcher.device(job.config.trainer.accelerator) if multirun else ""


def _job_problems(name: str, checked: dict[str, list[str]], job: CheckedJob, multirun: bool) -> list[str]:
    """Return what is wrong with a job's folders and files; ``checked`` holds what other jobs found in equal ones."""
    from deftx.config import written_folders
    from deftx.stages.preflight import given_problems, preflight

    config = job.config
    command = {"sft": f"sft {config.kind}", "pretrain": "pretrain text" if config.text else name}.get(name, name)
    out = Path(config.out).expanduser() if config.out else None
    on_this_machine = not _device(job, multirun)
    problems = preflight(
        job.study, command, written_folders(config), out, on_this_machine=on_this_machine, checked=checked
    )
    if name == "eval":
        problems += given_problems(job.study, str(config.task_sft), config.language_sft)
    return problems


def _single(name: str, overrides: Sequence[str], config_dir: str | None) -> int:
    from deftx.config import run_job
    from deftx.jobs import JOBS

    end = run_job(name, JOBS[name], overrides, config_dir=config_dir)
    if end.error:
        print(_message(DeftxError(end.error)), file=sys.stderr)
    return 1 if end.error else 0


def _sweep(name: str, command: CheckedCommand, options: argparse.Namespace) -> int:
    """Run a sweep or a search, or say what a sweep or a single run would compute."""
    from deftx.launch import check
    from deftx.sweeps.run import Sweep, dry_run, run_search, run_sweep

    if options.dry_run and name != "run":
        raise DeftxError(f"--dry-run belongs to deftx run, not to deftx {name}")
    devices = [_device(job, command.multirun) for job in command.jobs]
    studies = [replace(job.study, device=device) for job, device in zip(command.jobs, devices, strict=True)]
    config = command.jobs[0].config
    sweep = Sweep(
        name,
        [job.overrides for job in command.jobs],
        Path(command.folder).absolute(),
        config.launcher,
        options.config_dir,
        studies if name == "run" else [],
        devices,
    )
    if options.dry_run:
        if config.search.space:
            print("a search: its trials are not known yet; this is the plan of one run at the base settings")
        dry_run(sweep)
        return 0
    check(sweep.launcher)
    return run_search(sweep, config.search) if config.search.space else run_sweep(sweep)
