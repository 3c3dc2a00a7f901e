"""What a dashboard shows, as plain values: panels over the stable names of :mod:`deftx.tracking.names`, nothing else.

The same options give the same specification, whatever runs there are: W&B leaves a panel empty whose values no run has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deftx.tracking import names

__all__ = ["METRICS", "config_names", "specification", "summary_names"]

VERSION = 2
Axis = dict[str, str]
"""A value of the runs: ``from`` (``config`` or ``summary``) and its ``name`` there."""
METRICS = ("macro_f1", "accuracy")


def specification(
    study: str,
    *,
    project: str = "deftx",
    entity: str | None = None,
    metric: str = "macro_f1",
    languages: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the dashboard of one study as plain values.

    Args:
        study: W&B group of the runs.
        project: W&B project.
        entity: W&B user or team; None: to be given when it is published.
        metric: Score that the panels show.
        languages: Targets that get panels of their own beside the mean over all.

    Returns:
        ``version``, ``project``, ``entity``, ``name``, ``runs`` (which are shown and how they are sorted), and
        ``sections``, each a title with its panels. A panel's axes are mappings of ``from`` (``config`` or ``summary``)
        and ``name``; of curves, a regular expression over metric names.
    """
    score = _summary(names.own_score(metric))
    knobs = [_config(name) for name in ("method", "rank", "residual", "density", "seed")]
    facts = {
        "retained energy": names.energy(),
        "overlap of language and task masks": names.jaccard(),
        "sign conflicts": names.sign_conflicts(),
        "rank kept": names.rank_kept(),
    }
    costs = {"seconds": names.seconds(), "peak memory": names.memory("cpu"), "file size": names.sft_bytes()}
    every = [names.MEAN, *dict.fromkeys(languages)]
    compared = (names.BASELINE, names.METHOD)

    def against(values: dict[str, str]) -> list[dict[str, Any]]:
        return [_scatter(f"Score by {text}", _summary(name), score) for text, name in values.items()]

    sections = [
        (
            "Rank × sparsity",
            [
                _scatter("Score by rank and density", _config("rank"), _config("density"), colour=score),
                _scatter("Score by rank", _config("rank"), score),
                _scatter("Score by density", _config("density"), score),
                _scatter("Score by directions kept", _summary(names.rank_kept()), score),
            ],
        ),
        (
            "Language × method",
            [
                *[
                    _bars(
                        f"Score by method: {code}",
                        [_summary(names.condition_score(metric, code, name)) for name in compared],
                    )
                    for code in every
                ],
                _bars("Difference to LT-SFT", [_summary(names.difference(metric, language)) for language in every]),
            ],
        ),
        (
            "Knobs",
            [
                {"kind": "parallel", "title": "Knobs and score", "columns": [*knobs, score]},
                {"kind": "importance", "title": "Which knob matters", "of": score},
            ],
        ),
        (
            "Masks against score",
            against(facts),
        ),
        (
            "Cost against score",
            against(costs),
        ),
        (
            "Learning curves",
            [
                {"kind": "curves", "title": "Training loss", "matching": ".*/train/loss$"},
                {"kind": "curves", "title": "Validation", "matching": ".*/val/.*"},
            ],
        ),
        ("Pictures", [{"kind": "media", "title": "Masks and spectra", "keys": [names.MASK_DENSITY, names.SPECTRA]}]),
    ]
    return {
        "version": VERSION,
        "name": f"deftx: {study}",
        "project": project,
        "entity": entity,
        "runs": {"group": study, "sort": {"by": score, "ascending": False}, "columns": [score, *knobs]},
        "sections": [{"title": title, "panels": panels} for title, panels in sections],
    }


def config_names(spec: dict[str, Any]) -> set[str]:
    """Return every config value that a specification asks for."""
    return _asked(spec, "config")


def summary_names(spec: dict[str, Any]) -> set[str]:
    """Return every summary value that a specification asks for."""
    media = {key for section in spec["sections"] for panel in section["panels"] for key in panel.get("keys", [])}
    return _asked(spec, "summary") | media


def _config(name: str) -> Axis:
    return {"from": "config", "name": name}


def _summary(name: str) -> Axis:
    return {"from": "summary", "name": name}


def _scatter(title: str, x: Axis, y: Axis, *, colour: Axis | None = None) -> dict[str, Any]:
    return {"kind": "scatter", "title": title, "x": x, "y": y, "colour": colour}


def _bars(title: str, values: list[Axis]) -> dict[str, Any]:
    return {"kind": "bars", "title": title, "values": values}


def _asked(value: Any, where: str) -> set[str]:
    if isinstance(value, dict) and value.get("from") == where:
        return {value["name"]}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {name for part in parts for name in _asked(part, where)}
