"""From a specification to a workspace of ``wandb-workspaces`` (the extra ``dashboard``)."""

from __future__ import annotations

from typing import Any

from wandb_workspaces.reports import v2 as panels
from wandb_workspaces.workspaces import Metric, Ordering, RunsetSettings, Section, Summary, Workspace

from deftx.dashboard.specification import Axis

__all__ = ["workspace_of"]


def workspace_of(spec: dict[str, Any]) -> Workspace:
    """Build the workspace that a specification describes; nothing is sent anywhere.

    Args:
        spec: From :func:`deftx.dashboard.specification.specification`, with an entity.
    """
    runs = spec["runs"]
    shown = RunsetSettings(
        filters=[Metric("Group") == runs["group"]],
        order=[Ordering(Summary(runs["sort"]["by"]["name"]), ascending=runs["sort"]["ascending"])],
        pinned_columns=["run:displayName", *(_column(axis) for axis in runs["columns"])],
    )
    sections = [
        Section(name=section["title"], panels=[_panel(panel) for panel in section["panels"]], is_open=True)
        for section in spec["sections"]
    ]
    return Workspace(
        entity=spec["entity"],
        project=spec["project"],
        name=spec["name"],
        sections=sections,
        runset_settings=shown,
        auto_generate_panels=False,
    )


def _panel(panel: dict[str, Any]) -> Any:
    title = panel["title"]
    match panel["kind"]:
        case "scatter":
            colour = _value(panel["colour"]) if panel["colour"] else None
            return panels.ScatterPlot(title=title, x=_value(panel["x"]), y=_value(panel["y"]), z=colour)
        case "bars":
            # Bars and curves take bare names; of a name without a history they show the summary.
            metrics = [panels.Metric(axis["name"]) for axis in panel["values"]]
            return panels.BarPlot(title=title, metrics=metrics, orientation="v", aggregate=False)
        case "parallel":
            columns = [
                panels.ParallelCoordinatesPlotColumn(metric=_value(axis), display_name=axis["name"])
                for axis in panel["columns"]
            ]
            return panels.ParallelCoordinatesPlot(title=title, columns=columns)
        case "importance":
            return panels.ParameterImportancePlot(with_respect_to=panel["of"]["name"])
        case "curves":
            return panels.LinePlot(title=title, metric_regex=panel["matching"])
        case "media":
            return panels.MediaBrowser(title=title, media_keys=panel["keys"])
    raise ValueError(f"no panel of kind {panel['kind']!r}")


def _value(axis: Axis) -> Any:
    return {"config": panels.Config, "summary": panels.SummaryMetric}[axis["from"]](axis["name"])


def _column(axis: Axis) -> str:
    return f"{axis['from']}:{axis['name']}" + (".value" if axis["from"] == "config" else "")
