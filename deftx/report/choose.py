"""Chooses a setting, by default without looking at target labels, and shows the score of what was chosen.

The best test score of a sweep is no estimate of anything: it was picked. What may choose is known before a target label
is read: the source's validation score of the task SFTs, or the loss of the targets' language SFTs on their own held-out
text. Whoever chooses on labelled dev rows of the targets can, and the table's title says that this is not zero-shot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deftx.errors import DeftxError
from deftx.report.sections import Column
from deftx.report.summary import Summary
from deftx.report.tables import Table, score_table
from deftx.tracking import SFTFacts


@dataclass(frozen=True)
class Rule:
    """What chooses.

    Attributes:
        title: What it is, for people.
        table: What the title of a table of chosen settings begins with.
        best: ``max`` of a score or ``min`` of a loss.
        scale: Factor from a value to how people read it.
        kind: Kind of the SFTs whose own best validation value counts; empty: the score on ``split`` does.
        split: Labelled rows of the targets that choose.
    """

    title: str
    table: str
    best: Callable[[list[float]], float]
    scale: float
    kind: str = ""
    split: str = ""


RULES = {
    "source_validation": Rule("the source's validation score", "Chosen by source validation", max, 100, kind="task"),
    "target_mlm_loss": Rule(
        "the targets' masked-language-model loss on their own held-out text",
        "Chosen by masked-language-model loss",
        min,
        1,
        kind="language",
    ),
}
"""What ``--choose`` takes. Neither has seen a target label."""

ON_LABELS = {
    "dev": Rule(
        "the score on the targets' labelled dev rows", "Chosen on target labels, not zero-shot", max, 100, split="dev"
    )
}
"""What ``--choose-on`` takes."""


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


def choose(summary: Summary, rule: Rule, summaries: Sequence[Summary] = ()) -> list[Choice]:
    """Choose a column of each method that has several.

    Args:
        summary: A section's summary.
        rule: What chooses.
        summaries: Where the scores are that a rule on labels reads.

    Raises:
        DeftxError: No run of the section says what the rule needs.
    """
    section, choices, several = summary.section, [], False
    judge = next((other for other in summaries if _beside(other, summary, rule.split)), None)
    for condition in section.methods:
        columns = section.named([condition])
        if len(columns) < 2:
            continue
        several = True
        found = {
            column: _scored(judge, column) if rule.split else _learnt(summary, column, rule.kind) for column in columns
        }
        values = {column: value for column, value in found.items() if value is not None}
        if values:
            best = rule.best(list(values.values()))
            chosen = next(column for column in columns if values.get(column) == best)
            choices.append(Choice(chosen, values, tuple(column for column in columns if column not in values)))
    if several and not choices:
        way = f": split=[{section.split},{rule.split}] evaluates both in one run" if rule.split else ""
        raise DeftxError(f"nothing chooses: no run of {section.title} says {rule.title}{way}")
    return choices


def describe(summary: Summary, rule: Rule, choices: Sequence[Choice]) -> list[str]:
    """Return one line for each method: what was chosen by what, and its score."""
    lines, row = [], summary.rows[-1]
    for choice in choices:
        score = summary.scores.get((choice.column, row))
        shown = "no score" if score is None else f"{summary.section.metric_name} {100 * score.mean:.1f}"
        spread = f" ± {100 * score.std:.1f} over {len(score.values)} seeds" if score is not None and score.std else ""
        of = f"of {len(choice.values)} settings by {rule.title} ({rule.scale * choice.values[choice.column]:.2f})"
        rest = f"; unknown for {', '.join(column.label for column in choice.left_out)}" if choice.left_out else ""
        lines.append(f"chosen {of}: {choice.column.label}: {shown}{spread}{rest}")
    return lines or ["nothing to choose: no method has several settings"]


def chosen_table(summary: Summary, rule: Rule, choices: Sequence[Choice]) -> Table:
    """Lay out the chosen setting of each method beside whatever had no choice."""
    section = summary.section
    open_to_choice = {choice.column.condition: choice.column for choice in choices}
    columns = [column for column in section.columns if open_to_choice.get(column.condition, column) is column]
    return score_table(summary, columns, name="chosen", title=rule.table)


def _beside(other: Summary, summary: Summary, split: str) -> bool:
    """Return whether another summary is of the same study, task, model and metric, on a split."""
    first, second = other.section.key, summary.section.key
    return bool(split) and other.section.split == split and (*first[:2], *first[3:]) == (*second[:2], *second[3:])


def _scored(judge: Summary | None, column: Column) -> float | None:
    """Return the mean score of the same setting on the split that judges; None where there is none."""
    if judge is None:
        return None
    same = [
        other for other in judge.section.named([column.condition]) if other.settings == column.settings
    ]  # of several data sets none is the same for sure
    score = judge.scores.get((same[0], judge.rows[-1])) if len(same) == 1 else None
    return None if score is None or score.missing else score.mean


def _learnt(summary: Summary, column: Column, kind: str) -> float | None:
    """Return the mean best validation value of a column's SFTs of a kind; None where a run does not say it."""
    values: list[float] = []
    for run in summary.section.runs_of(column):
        facts = {sft.key: sft for sft in run.record.sfts}
        cells = [cell for cell in run.record.cells if cell.condition == column.condition]
        keys = dict.fromkeys(term.key for cell in cells for term in cell.terms if term.kind == kind)
        seen = [_best(facts[key]) for key in keys if key in facts]
        if not seen or None in seen:
            return None
        values.append(float(np.mean([value for value in seen if value is not None])))
    return float(np.mean(values)) if values else None


def _best(sft: SFTFacts) -> float | None:
    value = sft.metrics.get("best_score")
    return None if value is None else float(value)
