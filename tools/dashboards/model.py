"""What the dashboards are made of: panels and queries as data, and how Grafana reads them. The others say which."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasgpu_runtime import metric_catalogue as m

PROMETHEUS = {"type": "prometheus", "uid": "hasgpu-prometheus"}
COLUMNS = 24
SCHEMA_VERSION = 39
"""Of Grafana 11; 12 reads it too."""

LETTERS = "ABCDEFGH"
RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Query:
    """One line of a panel."""

    expr: str
    legend: str = ""
    instant: bool = False
    """The newest value only, as a table."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    queries: Sequence[Query]
    description: str
    unit: str = "short"
    """Grafana's id of a unit."""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    transformations: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: rows of panels."""

    uid: str
    title: str
    description: str
    rows: Mapping[str, Sequence[Panel]]
    variables: Sequence[Mapping[str, Any]] = ()


def name(spec: m.MetricSpec, part: str = "") -> str:
    """Returns a metric's name at Prometheus; `part` "bucket", "sum" or "count" of a histogram."""
    return f"{spec.prometheus}_{part}" if part else spec.prometheus


def braces(where: str) -> str:
    """Returns matchers in their braces; none at all without any."""
    return f"{{{where}}}" if where else ""


def rate(spec: m.MetricSpec, where: str = "", by: str = "function", part: str = "") -> str:
    """Returns a rate, added up."""
    return f"sum by ({by}) (rate({name(spec, part)}{braces(where)}[{RATE}]))"


def quantile(share: float, spec: m.MetricSpec, where: str = "", by: str = "function") -> str:
    """Returns a quantile of a histogram."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({name(spec, 'bucket')}{braces(where)}[{RATE}])))"


def total(spec: m.MetricSpec, where: str = "", by: str = "function", how: str = "sum") -> str:
    """Returns a gauge, added up."""
    return f"{how} by ({by}) ({name(spec)}{braces(where)})"


def in_time(where: str, by: str = "function") -> str:
    """Returns the share of requests answered in time; nothing while there are none."""
    good = f'sum by ({by}) (rate({name(m.REQUESTS)}{{{where + "," if where else ""}outcome="in_time"}}[{RATE}]))'
    return f"{good} / ({rate(m.REQUESTS, where, by)} > 0)"


def share(where: str, by: str) -> str:
    """Returns the part of a GPU reserved: SM share times request."""
    return f"sum by ({by}) ({name(m.ALLOCATION_SM)}{braces(where)} * {name(m.ALLOCATION_REQUEST)}{braces(where)})"


def variable(label: str, query: str, *, many: bool = False) -> dict[str, Any]:
    """Returns a variable filled from a label's values."""
    return {
        "name": label,
        "label": label,
        "type": "query",
        "datasource": PROMETHEUS,
        "definition": query,
        "query": {"query": query, "refId": "A"},
        "refresh": 2,
        "sort": 1,
        "includeAll": many,
        "multi": many,
        **({"current": {"text": "All", "value": "$__all"}} if many else {}),
    }


def panel_json(panel: Panel, identifier: int, x: int, y: int) -> dict[str, Any]:
    """Returns a panel as Grafana reads it."""
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"fillOpacity": 60 if panel.stacked else 8, "lineWidth": 1, "showPoints": "never"}
        custom["stacking"] = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    defaults = {"unit": panel.unit, **panel.defaults}
    defaults["custom"] = {**custom, **defaults.get("custom", {})}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options = dict(panel.options)
    if panel.kind == "timeseries":
        options = {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"placement": "bottom"}, **options}
    elif panel.kind in ("stat", "bargauge", "piechart"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, **options}
    return {
        "id": identifier,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": PROMETHEUS,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            target(query, letter, heatmap=panel.kind == "heatmap")
            for letter, query in zip(LETTERS, panel.queries, strict=False)
        ],
        **({"transformations": list(panel.transformations)} if panel.transformations else {}),
    }


def target(query: Query, letter: str, *, heatmap: bool) -> dict[str, Any]:
    """Returns a query as Grafana reads it."""
    return {
        "refId": letter,
        "datasource": PROMETHEUS,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "range": not query.instant,
        "instant": query.instant,
        "format": "heatmap" if heatmap else "table" if query.instant else "time_series",
    }


def panels_json(rows: Mapping[str, Iterable[Panel]]) -> list[dict[str, Any]]:
    """Returns all panels, laid out from left to right under their row's title."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
                "panels": [],
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            found.append(panel_json(panel, len(found) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return found


def render(dashboard: Dashboard) -> str:
    """Returns the file's text."""
    content = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["hasgpu"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(dashboard.variables)},
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "hasgpu",
                "tags": ["hasgpu"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "panels": panels_json(dashboard.rows),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


RATIO = {"min": 0, "max": 1}
