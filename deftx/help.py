"""The ``--help`` page of a command, made from the configuration itself so that the two cannot drift apart.

Knobs are the lines between ``# --- knobs`` and ``# --- end of knobs`` of ``conf/<command>.yaml``; experiments are shown
with the first comment after the command that uses them.
"""

from __future__ import annotations

import re
import textwrap

from deftx.config import conf_dir, defaults_of, group_options
from deftx.settings import READS

EXAMPLES = {
    "run": (
        "deftx run experiment=demo",
        "deftx run experiment=nusax model=minilm model.path=FOLDER data.root=FOLDER budget=small sparsity=share",
        "deftx run -m experiment=demo rank=8,energy:0.9,gavish_donoho,none",
        "deftx run experiment=rank_x_sparsity --dry-run",
    ),
    "sft": (
        "deftx sft kind=language language=qba out=sfts/qba",
        "deftx sft kind=task out=sfts/task",
    ),
    "eval": ("deftx eval task_sft=sfts/task language_sft.qba=sfts/qba language=qba",),
    "pretrain": (
        "deftx pretrain text=[a.txt,b.txt] protect=[test.tsv,nusax] out=models/mine model.pretrain.steps=2000",
    ),
}


def command_help(name: str, purpose: str) -> str:
    """Return the help page of one command.

    Args:
        name: ``run``, ``sft``, ``eval`` or ``pretrain``.
        purpose: One line on what it does.
    """
    lines = [
        f"deftx {name}: {purpose}",
        "",
        f"usage: deftx {name} [GROUP=OPTION ...] [key=value ...] [-m]{' [--dry-run]' if name == 'run' else ''}",
        "",
    ]
    shared = [text for text in _knobs("run") if name == "run" or text.split(":")[0] in READS[name]]
    lines += ["knobs"]
    lines += [f"  {text}" for text in [*(_knobs(name) if name != "run" else []), *shared]]
    if name == "pretrain":
        shape = defaults_of(name)("model.pretrain")
        lines += ["", "size and budget: model.pretrain.*"]
        lines += [f"  {_wrapped([f'{key}={value}' for key, value in shape.items()]).replace(' ' * 12, '  ')}"]
        lines += ["  and model.languages (what it learns from without text=), model.vocabulary, model.seed"]
    lines += ["", "groups"]
    groups = {group: options for group in READS[name] if (options := group_options(group))}
    lines += [f"  {group:<10}{_wrapped(options)}" for group, options in groups.items()]
    if name == "run":
        lines += ["", "experiments"]
        lines += [f"  {option:<20}{_purpose('experiment', option)}" for option in group_options("experiment")]
    if name in ("run", "sft"):
        lines += [
            "",
            "budgets: lang.training.*, task.training.* and source.training.* (learning_rate, batch_size, epochs, ...)",
        ]
    if name == "run":
        lines += [
            "",
            "sweeps: -m runs every combination of key=a,b,c: stages that jobs share first, finished jobs not again;",
            "--dry-run only says what would run, launcher=joblib launcher.workers=4 runs four jobs at a time",
        ]
    lines += [
        "",
        f"the whole configuration: deftx {name} --cfg job",
        "",
        "examples",
        *(f"  {text}" for text in EXAMPLES[name]),
        "",
    ]
    return "\n".join(lines)


def _knobs(name: str) -> list[str]:
    """Return the knob lines of a primary configuration as they stand there, with the values that defaults refer to."""
    text = (conf_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    section = re.search(r"^# --- knobs\n(.*?)^# --- end of knobs", text, re.DOTALL | re.MULTILINE)
    if section is None:
        return []
    defaults = defaults_of(name)

    def value(reference: re.Match[str]) -> str:
        return str(defaults(reference.group(1))).ljust(len(reference.group(0)))

    return [re.sub(r"\$\{([\w.]+)\}", value, line) for line in section.group(1).splitlines()]


def _purpose(group: str, option: str) -> str:
    """Return the second comment line of an option's file: the first is the command that uses it."""
    path = conf_dir() / group / f"{option}.yaml"
    if not path.is_file():
        return ""
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    comments = [line for line in comments if not line.startswith("@package") and not line.startswith("deftx ")]
    return comments[0] if comments else ""


def _wrapped(options: list[str], width: int = 96) -> str:
    """Return options on lines no longer than ``width``, aligned under the first."""
    lines = textwrap.wrap(", ".join(options), width, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * 12).join(lines)
