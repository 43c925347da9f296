"""A layout in the form of `wandb-workspaces`: a saved workspace for each stage, and a report of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from ldm_lab.runs.record import AXIS
from ldm_lab.tools.dashboard.layout import Panel, Section

MOST_RUNS = 20  # in a frame


@dataclass(frozen=True)
class Page:
    """What is shown of one stage.

    Attributes:
        stage: "autoencoder" or "diffusion": runs of other stages are left out, as their losses are another thing.
        sections: of panels.
        columns: settings of the parallel coordinates.
        result: metric at their end, as the summary has it.
        groups: names of runs; none: all there are.
        baseline: id of the W&B run that others are compared with; None: none.
    """

    stage: str
    sections: Sequence[Section]
    columns: Sequence[str]
    result: str
    groups: Sequence[str] = ()
    baseline: str | None = None

    @property
    def filters(self) -> list[expr.FilterExpr]:
        """Which runs."""
        groups = [expr.Metric("Group").isin(list(self.groups))] if self.groups else []
        return [expr.Metric("JobType") == self.stage, *groups]


def panel(found: Panel) -> Any:  # noqa: ANN401
    """One panel of a layout."""
    if found.is_picture:
        return wr.MediaBrowser(title=found.title, media_keys=list(found.keys), grid_x_axis="step", grid_y_axis="run")
    return wr.LinePlot(
        title=found.title, x=found.x, y=list(found.keys), log_y=found.logarithmic or None, max_runs_to_show=MOST_RUNS
    )


def comparison(page: Page) -> list[Any]:
    """Settings that differ, run by run, and where they lead."""
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key) for key in page.columns]
    result = wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(page.result), display_name=page.result)
    return [
        wr.RunComparer(diff_only="split"),
        wr.ParallelCoordinatesPlot(title="Settings and what comes of them", columns=[*columns, result]),
    ]


def workspace(page: Page, entity: str, project: str) -> ws.Workspace:
    """A saved view of one stage."""
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
    """All of it on one page, each stage with its own runs."""
    blocks: list[Any] = []
    for page in pages:
        runs = wr.Runset(name=page.stage, filters=page.filters)  # of the report's own project
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
    """All that would be saved, as plain data."""
    return {
        "format": 1,
        "workspaces": [view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) for view in views],
        "report": written._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
    }
