"""The one HTML page: readable on its own, printable, nothing loaded from anywhere, everything escaped.

Plots are data URIs in ``img`` elements: ids in them cannot meet, and nothing in them can run.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deftx import __version__
from deftx.report.collect import Collection, Run
from deftx.report.knobs import BOOKKEEPING, canonical, shown_value
from deftx.report.plots import Plots
from deftx.report.remarks import counts, rerun_commands, run_notes
from deftx.report.summary import Summary
from deftx.report.tables import Table
from deftx.tracking import DATA_READ, DataRead

Part = tuple[Summary, Sequence[Table], Plots]


def page(found: Collection, parts: Sequence[Part]) -> str:
    """The page.

    Args:
        found: What was read.
        parts: Summary, tables and plots of each section.
    """
    studies = ", ".join(dict.fromkeys(summary.section.key[0] for summary, _, _ in parts))
    body = [f"<h1>{_text(studies)}</h1>", f"<p class=lead>{_text(_lead(found, parts))}</p>"]
    troubles = found.of("failed", "missing", "unreadable")
    if troubles:
        body.append(
            f"<p class=warn>{len(troubles)} jobs have no result here, so the tables lack them: "
            '<a href="#troubles">which and why</a>.</p>'
        )
    contents = [(summary.section.slug, summary.section.title) for summary, _, _ in parts]
    contents += [("troubles", "Failed and missing runs"), ("method", "How the numbers were made")]
    contents += [("settings", "Settings"), ("provenance", "Provenance"), ("rerun", "Running it again")]
    links = "".join(f'<li><a href="#{_text(anchor)}">{_text(title)}</a></li>' for anchor, title in contents)
    body.append(f"<nav><b>Contents</b><ul>{links}</ul></nav>")
    body += [_section(*part) for part in parts]
    body += [_troubles(found), _method(found, parts), _settings(found.runs), _provenance(found.runs), _rerun(found)]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src "
        "'unsafe-inline'\">"
        f"<title>{_text(studies)}: report</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _lead(found: Collection, parts: Sequence[Part]) -> str:
    tasks = ", ".join(dict.fromkeys(summary.section.key[1] for summary, _, _ in parts))
    languages = list(dict.fromkeys(code for summary, _, _ in parts for code in summary.section.languages))
    seeds = sorted({seed for summary, _, _ in parts for seed in summary.seeds})
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{', '.join(counts(found))}. Task: {tasks}. Targets: {', '.join(languages)}. "
        f"Seeds: {', '.join(map(str, seeds))}. Made by deftx {__version__} on {made}."
    )


def _section(summary: Summary, tables: Sequence[Table], plots: Plots) -> str:
    section = summary.section
    out = [f'<section id="{_text(section.slug)}"><h2>{_text(section.title)}</h2>']
    names = _language_names(section.runs)
    known = [f"{code}: {names[code]}" for code in section.languages if code in names]
    if known:
        out.append(f"<p>{_text('; '.join(known))}.</p>")
    notes = [*section.warnings, *summary.notes]
    if notes:
        out.append(f"<ul class=notes>{_items(notes)}</ul>")
    out += [table.html() for table in tables]
    for title, caption, svg in plots.drawn:
        image = base64.b64encode(svg.encode()).decode()
        out.append(
            f'<figure><h3>{_text(title)}</h3><img alt="{_text(title)}: {_text(caption)}" '
            f'src="data:image/svg+xml;base64,{image}"><figcaption>{_text(caption)}</figcaption></figure>'
        )
    if plots.left_out:
        lines = [f"{title}: {why}" for title, why in plots.left_out.items()]
        out.append(f"<h3>Plots left out</h3><ul class=notes>{_items(lines)}</ul>")
    return "".join([*out, "</section>"])


def _language_names(runs: Sequence[Run]) -> dict[str, str]:
    names: dict[str, str] = {}
    for run in runs:
        for code, facts in run.record.languages.items():
            parts = [facts.get("name"), facts.get("family"), facts.get("script")]
            shown = ", ".join(dict.fromkeys(str(part) for part in parts if part))
            if shown:
                names.setdefault(code, shown)
    return names


def _troubles(found: Collection) -> str:
    out = ["<section id=troubles><h2>Failed and missing runs</h2>"]
    titles = {"failed": "Failed", "missing": "Missing", "unreadable": "Could not be read"}
    for kind, title in titles.items():
        items = found.of(kind)
        if items:
            rows = [[item.name, item.reason] for item in items]
            out.append(f"<h3>{title}: {len(items)}</h3>{_table(['job', 'reason'], rows)}")
    later = [item for item in found.troubles if item.finished_in]
    if later:
        rows = [[item.name, item.kind, item.reason, item.finished_in] for item in later]
        out.append(
            "<h3>Finished in another launch</h3><p>The tables hold the finished one.</p>"
            + _table(["job", "was", "reason", "finished in"], rows)
        )
    if len(out) == 1:
        out.append("<p>None: every job that was found finished.</p>")
    if found.repeated:
        rows = [[again.shown, first.shown] for again, first in found.repeated]
        out.append(
            "<h3>Results found twice</h3><p>Same settings, seed and predictions; each counts once.</p>"
            + _table(["repeated", "counted"], rows)
        )
    return "".join([*out, "</section>"])


def _method(found: Collection, parts: Sequence[Part]) -> str:
    out = ["<section id=method><h2>How the numbers were made</h2>"]
    out.append(
        "<p>Scores are means over seeds with the sample standard deviation, × 100. A mean over languages is taken for "
        "each seed first. Failed and missing runs are in no mean. A difference is taken between runs of equal seeds "
        "and equal settings, but for what the two methods read differently.</p>"
    )
    for summary, _, _ in parts:
        if summary.differences:
            out.append(f"<p><b>{_text(summary.section.title)}</b>: intervals by {_text(summary.method())}.</p>")
        else:
            out.append(f"<p><b>{_text(summary.section.title)}</b>: no baseline among the runs, so no differences.</p>")
    out.append(
        "<p>A resample draws items with replacement, the same ones for every method and for every language that shares "
        "them, and seeds with replacement; the metric is computed anew from the confusion counts of each resample. "
        "Drawing both is on the safe side: noise of single predictions is counted up to three times (Owen 2007, the "
        "pigeonhole bootstrap). The base model is one and given: the intervals say nothing about another one.</p>"
    )
    notes = run_notes(found)
    if notes:
        out.append(f"<h3>Remarks of the runs</h3><ul>{_items(f'{note} ({who})' for note, who in notes.items())}</ul>")
    return "".join([*out, "</section>"])


def _settings(runs: Sequence[Run]) -> str:
    """What all runs share, and what varies between them."""
    hidden = BOOKKEEPING - {"task", "split", "model", "method", "compare", "controls", "language", "study"}
    hidden |= {DATA_READ}
    keys = list(dict.fromkeys(key for run in runs for key in run.record.settings if key not in hidden))
    shared, differing = [], []
    for key in keys:
        values = {canonical({"": run.record.settings.get(key)}): run.record.settings.get(key) for run in runs}
        texts = [shown_value(value, key) for value in values.values()]
        if len(values) > 1:
            differing.append([key, " · ".join(sorted(texts))])
        elif next(iter(values.values())) is not None:
            shared.append([key, texts[0]])
    out = ["<section id=settings><h2>Settings</h2>"]
    if differing:
        out.append("<h3>What varies between the runs</h3>" + _table(["knob", "values"], differing))
    out.append(
        f"<details open><summary>What all {len(runs)} runs share ({len(shared)} settings; unset ones left out)"
        f"</summary>{_table(['knob', 'value'], shared)}</details>"
    )
    read = sorted({(item.name, _place(item), item.digest[:12]) for run in runs for item in run.data})
    if read:
        out.append("<h3>Data that was read</h3>" + _table(["data", "where", "digest of the content"], read))
    return "".join([*out, "</section>"])


def _place(item: DataRead) -> str:
    """Where a piece of data was found: a path, or a hub's id, configuration and commit."""
    parts = (item.path, item.hub, item.config, item.revision)
    return ", ".join(part for part in parts if part)


def _provenance(runs: Sequence[Run]) -> str:
    rows: dict[str, dict[str, int]] = {}
    dirty: set[str] = set()

    def add(what: str, value: Any) -> None:
        rows.setdefault(what, {})
        shown = shown_value(value) if value is not None else "not known"
        rows[what][shown] = rows[what].get(shown, 0) + 1

    for run in runs:
        facts = run.record.provenance
        git = facts.get("git") or {}
        for what, where in (("deftx", "deftx"), ("working directory", "working_directory")):
            commit = git.get(where) if isinstance(git, Mapping) else None
            if isinstance(commit, Mapping):
                add(f"commit of {what}", f"{commit.get('commit')}{' with changes' if commit.get('dirty') else ''}")
                if commit.get("dirty"):
                    dirty.add(f"commit of {what}")
        versions = facts.get("versions")
        for name, version in (versions if isinstance(versions, Mapping) else {}).items():
            add(name, version)
        for name in ("python", "platform", "cpu", "threads", "gpu"):
            add(name, facts.get(name))
        under = [{**it.versions, "threads": it.threads, "device": it.device} for it in run.record.provenances]
        for name, value in dict.fromkeys(pair for item in under for pair in item.items()):
            add(f"{name}, of its stages", value)
        for name, value in run.record.fingerprints.items():
            add(f"{name}, fingerprint", value)
    table, flagged = [], 0
    for what, values in sorted(rows.items(), key=lambda row: len(row[1]) == 1):
        # A target that some runs lack is no difference; two values of one thing are.
        differs = len(values) > 1
        flagged += differs or what in dirty
        shown = [f"{value} ({count} runs)" if differs else value for value, count in values.items()]
        flag = "differs" if differs else "uncommitted changes" if what in dirty else ""
        table.append([what, " · ".join(shown), flag])
    text = f"{flagged} rows are flagged." if flagged else "All runs agree, and none ran on uncommitted changes."
    return (
        f"<section id=provenance><h2>Provenance</h2><p>{text}</p>{_table(['what', 'value', 'flag'], table)}</section>"
    )


def _rerun(found: Collection) -> str:
    commands = rerun_commands(found)
    if not commands:
        text = "<p>No sweep.json was found, so the command is not known; the settings above hold every knob.</p>"
        return f"<section id=rerun><h2>Running it again</h2>{text}</section>"
    shown = "".join(f"<p>{_text(name)}</p><pre>{_text(command)}</pre>" for name, command in commands)
    return (
        "<section id=rerun><h2>Running it again</h2><p>Finished stages come from the cache, where it is still there; "
        f"paths are those of the launch.</p>{shown}</section>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{_text(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class=wide><table class=facts><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{_text(line)}</li>" for line in lines)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#fff;color:#1a1a1a;font:16px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:70rem;margin:0 auto;padding:2rem 1.5rem 4rem}
h1{font-size:1.9rem;margin:0 0 .3rem}h2{margin:2.6rem 0 .8rem;padding-bottom:.25rem;border-bottom:2px solid #1a1a1a}
h3{margin:1.6rem 0 .5rem;font-size:1.05rem}a{color:#00558b}.lead{color:#444;max-width:52rem}
nav{background:#f5f5f5;border-radius:6px;padding:.8rem 1.2rem;margin:1.2rem 0}
nav ul{margin:.3rem 0 0;padding-left:1.2rem}
.warn{border-left:4px solid #d55e00;background:#fdf3ec;padding:.6rem .9rem}
.notes{color:#444;font-size:.9rem}.note{color:#444;font-size:.85rem;max-width:60rem;margin-top:.4rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-top:.6rem;font-size:.9rem}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
thead th{border-top:2px solid #1a1a1a;border-bottom:1px solid #1a1a1a;vertical-align:bottom}
tbody tr:last-child>*{border-bottom:2px solid #1a1a1a}tr.ruled>*{border-top:1px solid #1a1a1a}
th,td{padding:.2rem .55rem;text-align:right;white-space:nowrap}
th:first-child{text-align:left;font-weight:400;white-space:normal;min-width:9rem}
thead th{font-weight:600!important}
.facts td,.facts th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.facts td:first-child{white-space:nowrap;font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.85em}
figure{margin:1.8rem 0;break-inside:avoid}figure img{max-width:100%;height:auto;display:block}
figcaption{color:#444;font-size:.9rem;max-width:60rem;margin-top:.3rem}
pre{background:#f5f5f5;padding:.7rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
summary{cursor:pointer;font-weight:600}
@media print{main{max-width:none;padding:0}nav{display:none}body{font-size:10pt}a{color:inherit;text-decoration:none}
.wide{overflow:visible}table{font-size:7.5pt}th,td{padding:.1rem .3rem}}
"""
