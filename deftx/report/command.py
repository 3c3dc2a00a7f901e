"""``deftx report DIR... [--out OUT]``: prints tables of the runs below some folders, and writes the report's folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deftx import __version__
from deftx.errors import DeftxError, did_you_mean
from deftx.report.collect import MARKER, Collection, collect
from deftx.report.publish import publish, refuse_foreign
from deftx.report.remarks import counts, run_notes, trouble_text
from deftx.report.summary import Options
from deftx.tracking.names import BASELINE

if TYPE_CHECKING:
    from deftx.report.choose import Rule
    from deftx.report.sections import Section
    from deftx.report.summary import Summary
    from deftx.report.tables import Table

HELP = """\
deftx report: tables, plots and one page from the results of many runs

usage: deftx report DIR... [--out FOLDER] [--baseline NAME] [--metric NAME] [options]

  DIR                  folder of a run, a sweep, or many of them; results may have been copied from elsewhere
  --out FOLDER         where the report goes; default: report/ in the first DIR. An older report is replaced,
                       anything else stays and is an error
  --baseline NAME      what differences are taken to: a condition (ltsft, no_language_sft, source_sft, ...) or a
                       column's title ("DeFT-X rank=16"); default: ltsft where there is one; none: no differences
  --metric NAME        macro_f1 or accuracy; default: each task's own
  --choose RULE        says which setting RULE chooses, and its score: source_validation (the task SFTs' score on the
                       source's validation rows) or target_mlm_loss (the language SFTs' loss on their own held-out
                       text). Neither looks at target labels; the best test score of a sweep would
  --choose-on dev      chooses by the targets' labelled dev rows instead, of runs with split=[test,dev]. The table's
                       title says so: chosen on target labels, not zero-shot
  --controls           prints the table of all conditions, too: controls (without φ_L, with φ_S, another language's φ_L)
                       beside the methods. The page and the files have it anyway
  --samples N          resamples of the bootstrap (2000)
  --confidence P       of the intervals (0.95)
  --seed N             of the resamples (0)

It writes report.html (self-contained: send it as it is), scores.csv (one row a score and seed), tables/*.md, *.tex and
*.csv (*-main is the table to send), plots/*.svg and *.png.
"""


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    folders: tuple[Path, ...]
    out: Path
    baseline: str | None
    metric: str | None
    options: Options
    rule: Rule | None = None
    controls: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``deftx report``.

    Returns:
        0.

    Raises:
        DeftxError: A bad option, no usable result, or a folder that cannot be written.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
        return 0
    request = parse(arguments)
    refuse_foreign(request.out)
    collection = collect(request.folders)
    return report(request, collection)


def parse(arguments: Sequence[str]) -> Request:
    """Read the command's options.

    Raises:
        DeftxError: An unknown option, no folder, or a value out of its range.
    """

    def refuse(text: str) -> None:
        raise DeftxError(f"{text}; `deftx report --help` lists the options")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--out")
    parser.add_argument("--baseline")
    parser.add_argument("--metric")
    parser.add_argument("--choose")
    parser.add_argument("--choose-on")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(list(arguments))
    from deftx.report.choose import ON_LABELS, RULES

    problems = []
    if not options.folders:
        problems.append("no folder: deftx report DIR... (such as outputs/demo or multirun/rank_ablation)")
    asked = {"--choose": (options.choose, RULES), "--choose-on": (options.choose_on, ON_LABELS)}
    problems += [
        f"{option} {name}: must be {' or '.join(rules)}{did_you_mean(name, rules)}"
        for option, (name, rules) in asked.items()
        if name not in (None, *rules)
    ]
    rules = [rules[name] for name, rules in asked.values() if name in rules]
    if len(rules) > 1:
        problems.append("--choose and --choose-on: one of them chooses; leave the other out")
    if not 100 <= options.samples <= 1_000_000:
        problems.append(f"--samples {options.samples}: must lie in [100, 1000000]")
    if not 0.5 <= options.confidence < 1:
        problems.append(f"--confidence {options.confidence:g}: must lie in [0.5, 1)")
    if options.seed < 0:
        problems.append(f"--seed {options.seed}: must be 0 or more")
    if problems:
        raise DeftxError("\n".join(problems))
    folders = tuple(Path(text).expanduser() for text in options.folders)
    out = Path(options.out).expanduser() if options.out else folders[0] / "report"
    return Request(
        folders,
        out,
        options.baseline,
        options.metric,
        Options(options.samples, options.confidence, options.seed),
        next(iter(rules), None),
        options.controls,
    )


def report(request: Request, collection: Collection) -> int:
    """Write the report of a collection, and print its tables."""
    if not collection.runs:
        _refuse_empty(collection)
    from deftx.report.choose import choose, chosen_table, describe
    from deftx.report.masks import mask_table
    from deftx.report.page import page
    from deftx.report.plots import make_plots
    from deftx.report.sections import make_sections
    from deftx.report.summary import summarise
    from deftx.report.tables import difference_table, lead_table, score_table, scores_csv, summary_csv

    sections = make_sections(collection.runs, request.metric)
    baseline = choose_baseline(sections, request.baseline)
    summaries = [summarise(section, baseline, request.options) for section in sections]
    tables: list[tuple[Summary, list[Table]]] = []
    for summary in summaries:
        lead, scores = lead_table(summary), score_table(summary, title="All conditions")
        scores.behind = lead is not None
        shown = [lead, difference_table(summary), scores, mask_table(summary)]
        rule = request.rule
        if rule is not None and summary.section.split != rule.split:  # rows that chose would score what they chose
            choices = choose(summary, rule, summaries)
            summary.notes[:0] = describe(summary, rule, choices)
            shown[:0] = [chosen_table(summary, rule, choices)] if choices else []
        tables.append((summary, [table for table in shown if table is not None]))

    def fill(folder: Path) -> None:
        (folder / "tables").mkdir()
        (folder / "plots").mkdir()
        for _, section_tables in tables:
            for table in section_tables:
                for kind, text in (("md", table.markdown()), ("tex", table.latex())):
                    (folder / "tables" / f"{table.name}.{kind}").write_text(text, encoding="utf-8")
        (folder / "tables" / "summary.csv").write_text(summary_csv(summaries), encoding="utf-8")
        (folder / "scores.csv").write_text(scores_csv(summaries), encoding="utf-8")
        plots_by_section = [make_plots(summary, folder / "plots") for summary in summaries]
        text = page(
            collection,
            [
                (summary, section_tables, plots)
                for (summary, section_tables), plots in zip(tables, plots_by_section, strict=True)
            ],
        )
        (folder / "report.html").write_text(text, encoding="utf-8")
        about = {
            "kind": "deftx report",
            "deftx": __version__,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "baseline": baseline,
            "metric": request.metric,
            **asdict(request.options),
            "runs": [run.name for run in collection.runs],
        }
        (folder / MARKER).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    publish(request.out, fill)
    _show(request, collection, tables)
    return 0


def choose_baseline(sections: Sequence[Section], name: str | None) -> str | None:
    """Return the baseline's name: the one that the user named, else LT-SFT where any section has it.

    Raises:
        DeftxError: No section has a column of this name.
    """
    if name == "none":
        return None
    names = dict.fromkeys(column.condition for section in sections for column in section.columns)
    labels = dict.fromkeys(column.label for section in sections for column in section.columns)
    if name is None:
        return BASELINE if BASELINE in names else None
    if name not in names and name not in labels:
        available = [*names, *(label for label in labels if label not in names)]
        raise DeftxError(
            f"--baseline {name!r}: no result has it{did_you_mean(name, available)}; "
            f"available: {', '.join(available)}, none"
        )
    return name


def _refuse_empty(collection: Collection) -> NoReturn:
    """Raise an error that says why there is nothing to average."""
    lines = ["no finished run with scores, so there is no report"]
    lines += [f"{trouble.kind}: {trouble.name}: {trouble.reason}" for trouble in collection.troubles]
    if collection.without_scores:
        lines.append(
            f"{len(collection.without_scores)} finished without scores (stages, SFTs), which a report leaves out"
        )
    raise DeftxError("\n".join(lines))


def _show(request: Request, collection: Collection, tables: Sequence[tuple[Summary, Sequence[Table]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    for summary, section_tables in tables:
        for table in section_tables:
            if table.behind and not request.controls:
                continue
            line(table.title, "bold")
            # Wider than the terminal: its lines wrap, but no number is cut off.
            Console(width=max(console.width, table.width)).print(table.rich())
            line(table.caption)
        for text in [*summary.section.warnings, *summary.notes]:
            line(f"note: {text}")
        line("")
    for note, names in run_notes(collection).items():
        line(f"note: {note} ({names})")
    for text in counts(collection):
        line(text)
    for trouble in collection.troubles:
        line(trouble_text(trouble))
    for name, file in (("page", "report.html"), ("tables", "tables"), ("plots", "plots"), ("scores", "scores.csv")):
        line(f"{name:<7} {request.out / file}")
