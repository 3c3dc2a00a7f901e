"""The command line of ``deftx dashboard``: writes the specification, and publishes it where that is asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deftx import atomic, knobs
from deftx.dashboard.specification import METRICS, specification
from deftx.errors import DeftxError, did_you_mean
from deftx.tracking import LoggerSettings

__all__ = ["main"]

EXTRA = 'pip install "deftx[dashboard]"'

HELP = """\
deftx dashboard: a W&B workspace that compares the runs of one study

usage: deftx dashboard --study NAME [options]

  --study NAME      the study, which is the W&B group of its runs
  --project NAME    W&B project (default: deftx)
  --entity TEAM     W&B user or team; needed to publish
  --metric NAME     macro_f1 (default) or accuracy
  --language CODE   a target with panels of its own; may be repeated, codes may be joined by commas
  --out FILE        where the specification is written (default: dashboard-NAME.json)
  --publish         save it as a view of the project, too; needs an account and the extra dashboard
"""


def main(arguments: Sequence[str]) -> int:
    """Run ``deftx dashboard``.

    Raises:
        DeftxError: a bad option, a file that cannot be written, or no way to publish.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
        return 0
    options = _options(arguments)
    languages = [code for text in options.language for code in text.split(",") if code]
    spec = specification(
        options.study, project=options.project, entity=options.entity, metric=options.metric, languages=languages
    )
    out = Path(options.out or f"dashboard-{_file_name(options.study)}.json").expanduser()
    try:
        atomic.write(out, (json.dumps(spec, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise DeftxError(f"cannot write {out}: {error.strerror}; choose another --out FILE") from error
    if not options.publish:
        print(f"dashboard: {out}\npublish it with: {_again(options)}")
        return 0
    print(f"dashboard: {_publish(spec, out, _again(options))}\nspecification: {out}")
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    flags = ("--study", "--project", "--entity", "--metric", "--language", "--out", "--publish")

    def refuse(text: str, guess: str = "") -> None:
        raise DeftxError(f"dashboard: {text}{guess}; the options are {', '.join(flags)} (deftx dashboard --help)")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.add_argument("--study", required=True)
    parser.add_argument("--project", default="deftx")
    parser.add_argument("--entity")
    parser.add_argument("--metric", default="macro_f1")
    parser.add_argument("--language", action="append", default=[])
    parser.add_argument("--out")
    parser.add_argument("--publish", action="store_true")
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].partition("=")[0]
        guess = did_you_mean(flag, flags) if flag.startswith("-") else ""
        refuse(f"unrecognized arguments: {' '.join(unknown)}", guess)
    if not options.study.strip():
        raise DeftxError("dashboard: --study is empty; it takes the study's name, such as rank_ablation")
    if options.metric not in METRICS:
        guess = did_you_mean(options.metric, METRICS)
        raise DeftxError(f"dashboard: --metric is {options.metric!r}; it can be {', '.join(METRICS)}{guess}")
    knobs.refuse(LoggerSettings(project=options.project), "logger.")
    if options.publish and not options.entity:
        raise DeftxError("dashboard: --publish needs --entity TEAM, the W&B user or team that the project belongs to")
    return options


def _publish(spec: dict[str, Any], out: Path, again: str) -> str:
    """Save the specification as a view of its project; its address."""
    left = f"the specification is in {out}"
    try:
        import wandb

        from deftx.dashboard.workspace import workspace_of
    except ImportError as error:
        raise DeftxError(f"dashboard: publishing needs the extra ({error}); {left}: {EXTRA}, then {again}") from error
    if not wandb.login(prompt=False, verify=False):
        raise DeftxError(f"dashboard: no W&B account on this machine; {left}: `wandb login`, then {again}")
    try:
        return str(workspace_of(spec).save().url)
    except Exception as error:  # the network, the server and the extra raise many kinds
        raise DeftxError(
            f"dashboard: W&B did not take it ({type(error).__name__}: {error}); {left}: {again}"
        ) from error


def _again(options: argparse.Namespace) -> str:
    """Return the command that publishes."""
    import shlex

    arguments: list[str] = [
        "--study",
        options.study,
        "--project",
        options.project,
        "--entity",
        options.entity or "TEAM",
    ]
    arguments += ["--metric", options.metric]
    for codes in options.language:
        arguments += ["--language", codes]
    if options.out:
        arguments += ["--out", options.out]
    return f"deftx dashboard {shlex.join(arguments)} --publish"


def _file_name(study: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in study)
