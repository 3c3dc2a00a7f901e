"""Renders the HTML page of a report from the runs and their summaries; the template is ``report.html.j2``."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from deftx import __version__
from deftx.report.collect import Collection, Run
from deftx.report.knobs import BOOKKEEPING, canonical, shown_value
from deftx.report.plots import Plots
from deftx.report.remarks import counts, rerun_commands, run_notes
from deftx.report.sections import Section
from deftx.report.summary import Summary
from deftx.report.tables import Table
from deftx.tracking import DATA_READ, DataRead

if TYPE_CHECKING:
    from jinja2 import Template

Part = tuple[Summary, Sequence[Table], Plots]
Rows = list[list[str]]
TROUBLES = {"failed": "Failed", "missing": "Missing", "unreadable": "Could not be read"}


def template(name: str) -> Template:
    """Return a template that escapes every value.

    Args:
        name: Its file in ``templates``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deftx.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return environment.get_template(name)


def page(collection: Collection, parts: Sequence[Part]) -> str:
    """Return the HTML text of the page.

    Args:
        collection: Everything that was read.
        parts: Summary, tables and plots of each section.
    """
    sections = [summary.section for summary, _, _ in parts]
    return template("report.html.j2").render(
        collection=collection,
        parts=parts,
        studies=dict.fromkeys(section.key[0] for section in sections),
        tasks=dict.fromkeys(section.key[1] for section in sections),
        languages=dict.fromkeys(code for section in sections for code in section.languages),
        language_names=_language_names,
        seeds=sorted({seed for summary, _, _ in parts for seed in summary.seeds}),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        counts=counts(collection),
        lost=collection.of(*TROUBLES),
        troubles=list(_troubles(collection)),
        remarks=run_notes(collection),
        settings=_settings(collection.runs),
        data_read=sorted(
            {(piece.name, _origin(piece), piece.digest[:12]) for run in collection.runs for piece in run.data}
        ),
        provenance=_provenance(collection.runs),
        commands=rerun_commands(collection),
    )


def _language_names(section: Section) -> list[str]:
    """Return code, name, family and script of a section's languages, where a run knows them."""
    names: dict[str, str] = {}
    for run in section.runs:
        for code, facts in run.record.languages.items():
            parts = [facts.get("name"), facts.get("family"), facts.get("script")]
            shown = ", ".join(dict.fromkeys(str(part) for part in parts if part))
            if shown:
                names.setdefault(code, shown)
    return [f"{code}: {names[code]}" for code in section.languages if code in names]


def _troubles(collection: Collection) -> Iterator[tuple[str, str, list[str], Rows]]:
    """Yield title, sentence, header and rows of each table about jobs without a result, or with more than one."""
    for kind, title in TROUBLES.items():
        if items := collection.of(kind):
            yield f"{title}: {len(items)}", "", ["job", "reason"], [[trouble.name, trouble.reason] for trouble in items]
    if rows := [
        [trouble.name, trouble.kind, trouble.reason, trouble.finished_in]
        for trouble in collection.troubles
        if trouble.finished_in
    ]:
        header = ["job", "was", "reason", "finished in"]
        yield "Finished in another launch", "The tables hold the finished one.", header, rows
    if rows := [[again.shown, first.shown] for again, first in collection.repeated]:
        sentence = "Same settings, seed and predictions; each counts once."
        yield "Results found twice", sentence, ["repeated", "counted"], rows


def _settings(runs: Sequence[Run]) -> dict[str, Rows]:
    """Return the settings that all runs share, and those that vary between them."""
    hidden = BOOKKEEPING - {"task", "split", "model", "method", "compare", "controls", "language", "study"}
    hidden |= {DATA_READ}
    shared, differing = [], []
    for key in dict.fromkeys(key for run in runs for key in run.record.settings if key not in hidden):
        values = {canonical({"": run.record.settings.get(key)}): run.record.settings.get(key) for run in runs}
        texts = [shown_value(value, key) for value in values.values()]
        if len(values) > 1:
            differing.append([key, " · ".join(sorted(texts))])
        elif next(iter(values.values())) is not None:
            shared.append([key, texts[0]])
    return {"shared": shared, "differing": differing}


def _origin(piece: DataRead) -> str:
    """Return where a piece of data comes from: a path, or a hub's id, configuration and commit."""
    return ", ".join(part for part in (piece.path, piece.hub, piece.config, piece.revision) if part)


def _provenance(runs: Sequence[Run]) -> Rows:
    """Return rows of a fact of provenance, its values, and a flag where they differ or a commit had changes."""
    values: dict[str, Counter[str]] = {}
    dirty = set()
    for run in runs:
        for fact, value, changed in _facts(run):
            values.setdefault(fact, Counter())[shown_value(value) if value is not None else "not known"] += 1
            if changed:
                dirty.add(fact)
    rows = []
    for fact, runs_of in sorted(values.items(), key=lambda row: len(row[1]) == 1):
        # A target that some runs lack is no difference; two values of one thing are.
        differs = len(runs_of) > 1
        shown = [f"{value} ({count} runs)" if differs else value for value, count in runs_of.items()]
        flag = "differs" if differs else "uncommitted changes" if fact in dirty else ""
        rows.append([fact, " · ".join(shown), flag])
    return rows


def _facts(run: Run) -> Iterator[tuple[str, Any, bool]]:
    """Yield name and value of each fact of a run's provenance, and whether it is a commit with uncommitted changes."""
    facts = run.record.provenance
    git = facts.get("git")
    for name, where in (("deftx", "deftx"), ("working directory", "working_directory")):
        commit = git.get(where) if isinstance(git, Mapping) else None
        if isinstance(commit, Mapping):
            changed = bool(commit.get("dirty"))
            yield f"commit of {name}", f"{commit.get('commit')}{' with changes' if changed else ''}", changed
    versions = facts.get("versions")
    for name, version in (versions if isinstance(versions, Mapping) else {}).items():
        yield name, version, False
    for name in ("python", "platform", "cpu", "threads", "gpu"):
        yield name, facts.get(name), False
    stages = [
        {**provenance.versions, "threads": provenance.threads, "device": provenance.device}
        for provenance in run.record.provenances
    ]
    for name, value in dict.fromkeys(pair for stage in stages for pair in stage.items()):
        yield f"{name}, of its stages", value, False
    for name, value in run.record.fingerprints.items():
        yield f"{name}, fingerprint", value, False
