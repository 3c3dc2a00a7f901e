"""The ``deftx`` command: subcommand -> ``conf/<name>.yaml`` -> stages; errors a person can read.

Nothing heavy is imported before it is needed: ``deftx --help`` is text, ``deftx run --help`` reads configuration, and
only a command whose configuration passed imports torch. ``sys.argv`` is never changed (Lightning relaunches it).
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    "report": "tables, plots and one page from the results of many runs: deftx report DIR...",
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
    if command.multirun and any(config.trainer.devices > 1 for config in command.configs):
        raise DeftxError("trainer.devices: a job of a sweep has one device; several would each repeat the sweep")
    return _launch(name, overrides, command.multirun, known.config_dir)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The few options that are no overrides; an unknown one is an error of ours, not a usage dump."""
    import argparse

    def refuse(text: str) -> None:
        raise DeftxError(f"{text}; the options are -m, --cfg job, --resolve and --config-dir FOLDER")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.add_argument("-m", "--multirun", action="store_true")
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


def _launch(name: str, overrides: list[str], multirun: bool, config_dir: str | None) -> int:
    """Let Hydra run the job or the sweep; 0 when every job finished."""
    from deftx.config import launch

    ends = launch(name, JOBS[name], overrides, multirun=multirun, config_dir=config_dir)
    failed = [end.error for _, end in ends if end.error]
    if multirun:
        _print_sweep(ends)
    for text in failed:
        print(_message(DeftxError(text)), file=sys.stderr)
    return 1 if failed else 0


def _print_sweep(ends: Sequence[tuple[Sequence[str], End]]) -> None:
    """One line a job: what was swept and the mean score of each condition."""
    from deftx.tracking import print_sweep

    every = {text for overrides, _ in ends for text in overrides}
    swept = {text for text in every if not all(text in overrides for overrides, _ in ends)}
    rows = [
        # Hydra escapes what its grammar would read otherwise: rank=energy\:0.9.
        (" ".join(text for text in overrides if text in swept).replace("\\", "") or "-", end.scores, end.error)
        for overrides, end in ends
    ]
    finished = sum(end.error is None for _, end in ends)
    print_sweep(rows, title=f"sweep: {finished} of {len(ends)} jobs finished")


@dataclass(frozen=True)
class End:
    """How a job ended: the message of a failure, or the mean over targets of each condition's score."""

    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def _job(body: Callable[[DictConfig], Mapping[str, float] | None]) -> Callable[[DictConfig], End]:
    """Wrap a job so that a user's mistake becomes its message and never stops the other jobs of a sweep."""

    def run(config: DictConfig) -> End:
        logging.captureWarnings(True)
        try:
            return End(scores=body(config) or {})
        except DeftxError as error:
            return End(error=str(error))

    return run


def _run(config: DictConfig) -> Mapping[str, float]:
    from deftx.config import run_directory, study_settings
    from deftx.stages.study import run_study
    from deftx.tracking import mean_scores

    return mean_scores(run_study(study_settings(config), run_directory()))


def _sft(config: DictConfig) -> None:
    from deftx.config import run_directory, sft_settings
    from deftx.stages.study import run_sft

    run_sft(*sft_settings(config), run_directory())


def _eval(config: DictConfig) -> Mapping[str, float]:
    from deftx.config import eval_settings, run_directory
    from deftx.stages.study import run_eval
    from deftx.tracking import mean_scores

    return mean_scores(run_eval(*eval_settings(config), run_directory()))


def _pretrain(config: DictConfig) -> None:
    from deftx.config import pretrain_settings
    from deftx.stages.study import run_pretrain

    run_pretrain(*pretrain_settings(config))


JOBS: dict[str, Callable[..., Any]] = {
    "run": _job(_run),
    "sft": _job(_sft),
    "eval": _job(_eval),
    "pretrain": _job(_pretrain),
}
