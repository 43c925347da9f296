"""Translates a layout for `wandb-workspaces`: a saved workspace for each stage, and a report of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from ldm_lab.runs.record import AXIS
from ldm_lab.tools.dashboard.layout import Panel, Section

MOST_RUNS = 20  # in a plot


@dataclass(frozen=True)
class Page:
    """The dashboard content of one stage.

    Attributes:
        stage: "autoencoder" or "diffusion"; runs of the other stage are filtered out, as their losses differ.
        sections: sections of panels.
        columns: settings of the parallel coordinates.
        result: summary metric at the end of the parallel coordinates.
        groups: names of runs; empty: all runs.
        baseline: id of the W&B run to compare with; None: no baseline.
    """

    stage: str
    sections: Sequence[Section]
    columns: Sequence[str]
    result: str
    groups: Sequence[str] = ()
    baseline: str | None = None

    @property
    def filters(self) -> list[expr.FilterExpr]:
        """Filters that select the runs."""
        groups = [expr.Metric("Group").isin(list(self.groups))] if self.groups else []
        return [expr.Metric("JobType") == self.stage, *groups]


def panel(found: Panel) -> Any:  # noqa: ANN401
    """The W&B panel of a layout's panel."""
    if found.is_picture:
        return wr.MediaBrowser(title=found.title, media_keys=list(found.keys), grid_x_axis="step", grid_y_axis="run")
    return wr.LinePlot(
        title=found.title, x=found.x, y=list(found.keys), log_y=found.logarithmic or None, max_runs_to_show=MOST_RUNS
    )


def comparison(page: Page) -> list[Any]:
    """Panels that compare the differing settings of runs with their results."""
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key) for key in page.columns]
    result = wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(page.result), display_name=page.result)
    return [
        wr.RunComparer(diff_only="split"),
        wr.ParallelCoordinatesPlot(title="Settings and what comes of them", columns=[*columns, result]),
    ]


def workspace(page: Page, entity: str, project: str) -> ws.Workspace:
    """The saved workspace of one stage."""
    sections = [
        ws.Section(name=section.name, panels=[panel(one) for one in section.panels], is_open=True)
        for section in page.sections
    ]
    compared = ws.Section(name="Runs compared", panels=comparison(page), is_open=True)
    runs = ws.RunsetSettings(filters=page.filters, baseline_run=page.baseline)
    settings = ws.WorkspaceSettings(x_axis=AXIS, max_runs=MOST_RUNS)
    return ws.Workspace(
        entity=entity, project=project, name=f"ldm_lab: {page.stage}", sections=[*sections, compared],
        settings=settings, runset_settings=runs,
    )  # fmt: skip


def report(pages: Sequence[Page], entity: str, project: str) -> wr.Report:
    """A report of all stages, each with its own runs."""
    blocks: list[Any] = []
    for page in pages:
        runs = wr.Runset(name=page.stage, filters=page.filters)  # in the report's project
        blocks.append(wr.H1(text=page.stage.capitalize()))
        for section in page.sections:
            panels = [panel(one) for one in section.panels]
            blocks += [wr.H2(text=section.name), wr.PanelGrid(runsets=[runs], panels=panels)]
        blocks += [wr.H2(text="Runs compared"), wr.PanelGrid(runsets=[runs], panels=comparison(page))]
    return wr.Report(
        project=project, entity=entity, title=f"{project}: runs compared", blocks=blocks, width="fluid",
        description="Curves over images seen and over device hours; pictures are of the same seeds.",
    )  # fmt: skip


def specification(views: Sequence[ws.Workspace], written: wr.Report) -> dict[str, Any]:
    """The specification of all views, as plain data; publicly the library only sends views to W&B."""
    return {
        "format": 1,
        "workspaces": [view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) for view in views],
        "report": written._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
    }
