"""How the boards look: one kind of panel a function, and the frame that all boards have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import heatmap as heatmap_builder
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.builders import stat as stat_builder
from grafana_foundation_sdk.builders import table as table_builder
from grafana_foundation_sdk.builders import timeseries as timeseries_builder
from grafana_foundation_sdk.models import common, dashboard, heatmap
from grafana_foundation_sdk.models import prometheus as prometheus_model

HEIGHT, STAT_HEIGHT = 8, 4
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "pagoda"

Panel = Any  # a builder of the SDK; they have no common type


@dataclass(frozen=True)
class Query:
    """One question of a panel, and what its answers are called; {{label}} stands for a label's value."""

    expr: str
    legend: str


def stat(
    title: str, text: str, query: Query, unit: str, limits: Sequence[tuple[float, str]] = (), width: int = 4
) -> Panel:
    """One number, with what it was behind it. `limits`: from which value on it has which colour."""
    steps = [dashboard.Threshold(value=None, color="green" if limits else "text")]
    steps += [dashboard.Threshold(value=value, color=color) for value, color in limits]
    panel = stat_builder.Panel().color_mode(common.BigValueColorMode.VALUE)
    panel.graph_mode(common.BigValueGraphMode.AREA)
    panel.reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.thresholds(
        dashboard_builder.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
    )
    panel.color_scheme(dashboard_builder.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
    return _framed(panel, title, text, [query], unit, width, STAT_HEIGHT)


def lines(
    title: str,
    text: str,
    queries: Sequence[Query],
    unit: str,
    *,
    width: int = 8,
    stacked: bool = False,
    highest: float | None = None,
) -> Panel:
    """Values over time. `highest` fixes the upper end of the axis, whose lower end is 0."""
    panel = timeseries_builder.Panel().line_width(1.5).min(0)
    panel.fill_opacity(40 if stacked else 8).show_points(common.VisibilityMode.NEVER)
    panel.legend(
        common_builder.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel.tooltip(common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if highest is not None:
        panel.max(highest)
    return _framed(panel, title, text, queries, unit, width, HEIGHT)


def heat(title: str, text: str, query: Query, unit: str, width: int = 8) -> Panel:
    """How observations spread over the buckets of a histogram, over time."""
    panel = heatmap_builder.Panel().calculate(False)
    panel.color(
        heatmap_builder.HeatmapColorOptions()
        .mode(heatmap.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(heatmap.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
    )
    panel.y_axis(heatmap_builder.YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
    panel.hide_legend()
    framed = _framed(panel, title, text, [], unit, width, HEIGHT)
    return framed.with_target(_target(query, "A").format(prometheus_model.PromQueryFormat.HEATMAP))


def table(title: str, text: str, query: Query, columns: Sequence[str], width: int = 8) -> Panel:
    """The labels of what is there now."""
    panel = table_builder.Panel().with_transformation(
        dashboard.DataTransformerConfig(
            id_val="filterFieldsByName", options={"include": {"names": list(columns)}}
        )
    )
    framed = _framed(panel, title, text, [], "", width, HEIGHT)
    return framed.with_target(_target(query, "A").format(prometheus_model.PromQueryFormat.TABLE).instant())


def row(title: str) -> dashboard_builder.Row:
    """A heading over the panels that follow."""
    return dashboard_builder.Row(title)


def variable(name: str, label: str, metric: str, of: str, text: str) -> Any:
    """A choice among the values of the label `of` of a metric; at first all of them."""
    choice = dashboard_builder.QueryVariable(name).label(label).description(text).datasource(SOURCE)
    everything = dashboard.VariableOption(selected=True, text="All", value="$__all")
    choice.query(f"label_values({metric}, {of})").refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
    choice.sort(dashboard.VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True)
    return choice.all_value(".*").current(everything)


def frame(name: str, title: str, text: str, variables: Sequence[Any] = ()) -> dashboard_builder.Dashboard:
    """A board without panels: its variables, its refresh, and links to the other boards."""
    board = dashboard_builder.Dashboard(f"Pagoda / {title}").uid(f"pagoda-{name}").description(text)
    board.tags([TAG]).time("now-30m", "now").refresh("10s").timezone("browser").editable()
    board.tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    board.link(
        dashboard_builder.DashboardLink("Boards")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
    )
    source = dashboard_builder.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    source.current(dashboard.VariableOption(selected=True, text="Pagoda", value="pagoda"))
    board.with_variable(source)
    models = ("model", "Model", "pagoda:num_requests_running", "model_name", "Models that are served.")
    for made in (variable(*models), *variables):
        board.with_variable(made)
    return board


def add(board: dashboard_builder.Dashboard, *parts: Panel) -> dashboard_builder.Dashboard:
    """Append rows and panels; they flow from left to right."""
    for part in parts:
        if isinstance(part, dashboard_builder.Row):
            board.with_row(part)
        else:
            board.with_panel(part)
    return board


def _framed(
    panel: Panel, title: str, text: str, queries: Sequence[Query], unit: str, width: int, height: int
) -> Panel:
    panel.title(title).description(text).datasource(SOURCE).span(width).height(height)
    if unit:
        panel.unit(unit)
    for i, query in enumerate(queries):
        panel.with_target(_target(query, chr(ord("A") + i)))
    return panel


def _target(query: Query, ref_id: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id)
    return target.datasource(SOURCE).editor_mode(prometheus_model.QueryEditorMode.CODE)
