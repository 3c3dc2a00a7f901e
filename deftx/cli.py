"""The ``deftx`` command: subcommand -> ``conf/<name>.yaml`` -> stages; errors a person can read.

Nothing heavy is imported before it is needed: ``deftx --help`` is text, ``deftx run --help`` reads configuration, and
only a command whose configuration passed imports torch. ``sys.argv`` is never changed (Lightning relaunches it).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import __version__
from deftx.errors import DeftxError, did_you_mean

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

COMMANDS = {
    "run": "everything a study needs, stage by stage, from the cache where it can; -m sweeps",
    "sft": "train one language or task SFT",
    "eval": "compose given SFTs and evaluate them on target languages",
    "pretrain": "train a small multilingual encoder from raw text, for work without a hub",
}

OPEN_MAPPINGS = ("language_sft.", "data.revisions.")

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

options
  -h, --help     this page; after a command, its knobs
  --version      print the version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``deftx``; exits with 0, 1 (a mistake or a failed run), 2 (usage) or 130 (interrupted)."""
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
    return _command(name, rest)


def _command(name: str, arguments: list[str]) -> int:
    """Parse Hydra's own options, check every job, then hand over to Hydra."""
    if any(item in ("-h", "--help") for item in arguments):
        from deftx.config import hydra_session
        from deftx.help import command_help

        with hydra_session():
            print(command_help(name, COMMANDS[name]), end="")
        return 0

    from hydra._internal.utils import get_args_parser

    known, overrides = _parse(get_args_parser(), arguments)

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
    return _launch(name, overrides, command.multirun, known.config_dir)


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's options (-m, --cfg, --config-dir, --resolve); an unknown one is an error of ours, not a usage dump."""

    def refuse(text: str) -> None:
        raise DeftxError(f"{text}; `deftx COMMAND --help` lists the knobs")

    parser.error = refuse  # type: ignore[assignment,method-assign]
    # Intermixed, so that options may stand anywhere among the overrides.
    known = parser.parse_intermixed_args(arguments)
    # Hydra wants ++ for a new key of an open mapping, which is all that these are.
    return known, [f"++{text}" if text.startswith(OPEN_MAPPINGS) else text for text in known.overrides]


def _job_problems(name: str, config: DictConfig) -> list[str]:
    """What is wrong with one job: its values first, then the folders and files it names."""
    from deftx.config import resolve_command, written_folders

    settings, problems = resolve_command(name, config)
    if settings is None:
        return problems
    from deftx.stages.preflight import preflight

    job = f"sft {config.kind}" if name == "sft" else name
    return preflight(settings, job, written_folders(config), Path(config.out).expanduser() if config.out else None)


def _launch(name: str, overrides: list[str], multirun: bool, config_dir: str | None) -> int:
    """Let Hydra run the job or the sweep; 0 when every job finished."""
    from deftx.config import launch

    statuses = launch(name, TASKS[name], overrides, multirun=multirun, config_dir=config_dir)
    failed = [text for text in statuses if text]
    if multirun:
        print(f"sweep: {len(statuses) - len(failed)} of {len(statuses)} jobs finished", file=sys.stderr)
    for text in failed:
        print(_message(DeftxError(text)), file=sys.stderr)
    return 1 if failed else 0


def _job(body: Callable[[DictConfig], None]) -> Callable[[DictConfig], str | None]:
    """Wrap a job so that a user's mistake becomes its returned message and never stops the other jobs of a sweep."""

    def run(config: DictConfig) -> str | None:
        logging.captureWarnings(True)
        try:
            body(config)
        except DeftxError as error:
            return str(error)
        return None

    return run


def _run(config: DictConfig) -> None:
    from deftx.config import run_directory, study_settings
    from deftx.stages.study import run_study

    run_study(study_settings(config), run_directory())


def _sft(config: DictConfig) -> None:
    from deftx.config import run_directory, sft_settings
    from deftx.stages.study import run_sft

    run_sft(*sft_settings(config), run_directory())


def _eval(config: DictConfig) -> None:
    from deftx.config import eval_settings, run_directory
    from deftx.stages.study import run_eval

    run_eval(*eval_settings(config), run_directory())


def _pretrain(config: DictConfig) -> None:
    from deftx.config import pretrain_settings
    from deftx.stages.study import run_pretrain

    run_pretrain(*pretrain_settings(config))


TASKS: dict[str, Callable[..., Any]] = {
    "run": _job(_run),
    "sft": _job(_sft),
    "eval": _job(_eval),
    "pretrain": _job(_pretrain),
}
