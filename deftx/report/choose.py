"""Chooses a setting without looking at target labels, and says the score of what was chosen.

The best test score of a sweep is no estimate of anything: it was picked. What may choose is known before a target label
is read: the source's validation score of the task SFTs, or the loss of the targets' language SFTs on their own held-out
text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deftx.errors import DeftxError
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Summary
from deftx.tracking import SFTFacts


@dataclass(frozen=True)
class Rule:
    """What chooses.

    Attributes:
        title: What it is, for people.
        kind: Kind of the SFTs whose own best validation value counts.
        best: ``max`` of a score or ``min`` of a loss.
    """

    title: str
    kind: str
    best: Callable[[list[float]], float]


RULES = {
    "source_validation": Rule("the source's validation score", "task", max),
    "target_mlm_loss": Rule("the targets' masked-language-model loss on their own held-out text", "language", min),
}
"""What ``--choose`` takes. Neither has seen a target label."""


@dataclass(frozen=True)
class Choice:
    """The setting that was chosen of one condition.

    Attributes:
        column: The chosen column.
        values: What the rule saw, by column.
        left_out: Columns of which that is not known.
    """

    column: Column
    values: dict[Column, float]
    left_out: tuple[Column, ...]


def choose(summary: Summary, name: str) -> list[Choice]:
    """Choose a column of each method that has several.

    Args:
        summary: A section's summary.
        name: A key of :data:`RULES`.

    Raises:
        DeftxError: No run of the section says what the rule needs.
    """
    rule, section, choices = RULES[name], summary.section, []
    several = False
    for condition in section.methods:
        columns = section.named([condition])
        if len(columns) < 2:
            continue
        several = True
        values = {column: value for column in columns if (value := _value(summary, column, rule)) is not None}
        if values:
            best = rule.best(list(values.values()))
            chosen = next(column for column in columns if values.get(column) == best)
            choices.append(Choice(chosen, values, tuple(column for column in columns if column not in values)))
    if several and not choices:
        raise DeftxError(f"--choose {name}: no run of {section.title} says {rule.title}")
    return choices


def describe(summary: Summary, name: str) -> list[str]:
    """Return one line for each method: what was chosen by what, and its score."""
    rule, lines = RULES[name], []
    scale = 100 if rule.kind == "task" else 1
    row = MEAN if len(summary.section.languages) > 1 else summary.section.languages[0]
    for choice in choose(summary, name):
        score = summary.scores.get((choice.column, row))
        shown = "no score" if score is None else f"{summary.section.metric_name} {100 * score.mean:.1f}"
        spread = f" ± {100 * score.std:.1f} over {len(score.values)} seeds" if score is not None and score.std else ""
        of = f"of {len(choice.values)} settings by {rule.title} ({scale * choice.values[choice.column]:.2f})"
        rest = f"; unknown for {', '.join(column.label for column in choice.left_out)}" if choice.left_out else ""
        lines.append(f"chosen {of}: {choice.column.label}: {shown}{spread}{rest}")
    if not lines:
        lines.append("nothing to choose: no method has several settings")
    return lines


def _value(summary: Summary, column: Column, rule: Rule) -> float | None:
    """Return the mean of what a rule sees over the runs of a column; None where a run does not say it."""
    values: list[float] = []
    for run in summary.section.runs_of(column):
        facts = {sft.key: sft for sft in run.record.sfts}
        cells = [cell for cell in run.record.cells if cell.condition == column.condition]
        keys = dict.fromkeys(term.key for cell in cells for term in cell.terms if term.kind == rule.kind)
        seen = [_best(facts[key]) for key in keys if key in facts]
        if not seen or None in seen:
            return None
        values.append(float(np.mean([value for value in seen if value is not None])))
    return float(np.mean(values)) if values else None


def _best(sft: SFTFacts) -> float | None:
    value = sft.metrics.get("best_score")
    return None if value is None else float(value)
