"""Dashboards, alerts and documents name only metrics that the catalogue has, with the labels that it gives them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hasgpu_runtime.metric_catalogue import CATALOGUE, EXTRA_SERIES, PROCESS_SERIES, Kind, series_names
from promql import named

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy/compose/observability"
DASHBOARDS = sorted((OBSERVABILITY / "grafana/dashboards").glob("*.json"))
RULES = yaml.safe_load((OBSERVABILITY / "prometheus/rules/hasgpu.yml").read_text())
RULE_LIST = [rule for group in RULES["groups"] for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULE_LIST if "record" in rule}
TARGET_LABELS = {"job", "instance"}
DOC = (ROOT / "docs/observability.md").read_text()


def run(*words: str) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def labels_of(series: str) -> set[str]:
    if series in (*EXTRA_SERIES, *PROCESS_SERIES):
        return TARGET_LABELS
    if series in RECORDED:
        return {"function"}
    spec = next(spec for spec in CATALOGUE.values() if series in spec.series)
    return {*spec.attributes, *TARGET_LABELS, *({"le"} if series.endswith("_bucket") else ())}


def faults(expression: str) -> list[str]:
    """What an expression names that is not there."""
    found = named(expression)
    assert found.metrics, f"no metric is named in {expression!r}: the check can't see anything"
    known = series_names() | RECORDED
    wrong = [f"no metric {metric}" for metric in sorted(found.metrics - known)]
    if not wrong:
        have = set().union(*(labels_of(metric) for metric in found.metrics))
        wrong += [f"no label {label}" for label in sorted(found.labels - have)]
        wrong += [
            f"{metric} has no {label}" for metric, label in sorted(found.matched) if label not in labels_of(metric)
        ]
    return wrong


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("sum by (function) (rate(hasgpu_requests_total[5m]))", []),
        ("hasgpu_request_total", ["no metric hasgpu_request_total"]),
        ("sum by (functoin) (hasgpu_requests_total)", ["no label functoin"]),
        ('hasgpu_requests_total{state="late"}', ["hasgpu_requests_total has no state"]),
        ('up{job=~"hasgpu-.*"} == 0 and on (instance) hasgpu_loop_waiting > 1e6', []),
        ("histogram_quantile(0.5, sum by (le) (hasgpu_request_duration_seconds))", None),
    ],
)
def test_the_check_sees_what_is_wrong(expression: str, wrong: list[str] | None) -> None:
    assert faults(expression) == wrong if wrong is not None else faults(expression)


def test_there_are_dashboards() -> None:
    assert [path.name for path in DASHBOARDS] == ["function.json", "gpu.json", "loops.json", "overview.json"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_name_what_there_is(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"].startswith("hasgpu-")
    assert [fault for query in queries(dashboard) for fault in faults(query)] == []
    for variable in dashboard["templating"]["list"]:
        metric, _, label = variable["definition"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
        assert label in labels_of(metric.partition("{")[0])
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)


PANEL_TYPES = {"row", "timeseries", "stat", "heatmap", "barchart", "bargauge", "piechart", "table"}
"""Those that are part of Grafana itself."""


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_what_grafanas_loader_takes(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard.get("id") is None  # a fixed one would collide with others of the same database
    assert dashboard["schemaVersion"] >= 36  # since then a datasource is named by type and uid
    assert len(dashboard["uid"]) <= 40
    assert dashboard["title"]
    for panel in dashboard["panels"]:
        assert panel["type"] in PANEL_TYPES
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)
        assert bool(references) == (panel["type"] != "row")


def test_no_two_dashboards_are_the_same_to_grafana() -> None:
    names = [(d["uid"], d["title"]) for d in (json.loads(path.read_text()) for path in DASHBOARDS)]
    assert len({uid for uid, _ in names}) == len({title for _, title in names}) == len(DASHBOARDS)


def test_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken: dict[tuple[int, int], str] = {}
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert 0 <= x < 24
                    assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_dashboards_use_the_datasource_that_is_provisioned() -> None:
    sources = yaml.safe_load((OBSERVABILITY / "grafana/provisioning/datasources/hasgpu.yml").read_text())["datasources"]
    by_uid = {source["uid"]: source["type"] for source in sources}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                assert by_uid[panel["datasource"]["uid"]] == panel["datasource"]["type"]


def test_dashboards_are_as_generated() -> None:
    run(sys.executable, "-m", "tools.dashboards", "--check")


@pytest.mark.parametrize("rule", RULE_LIST, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_name_what_there_is(rule: dict[str, Any]) -> None:
    assert faults(rule["expr"]) == []


@pytest.mark.parametrize("rule", [rule for rule in RULE_LIST if "alert" in rule], ids=lambda rule: rule["alert"])
def test_alerts_say_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/observability.md"
    assert anchor == rule["alert"].lower()
    text = DOC.partition(f"### {rule['alert']}\n")[2].partition("\n#")[0]
    assert len(text.split()) >= 15, f"docs/observability.md says nothing about {rule['alert']}"


def test_every_documented_alert_exists() -> None:
    documented = set(re.findall(r"^### (Hasgpu\w+)$", DOC, re.MULTILINE))
    assert documented == {rule["alert"] for rule in RULE_LIST if "alert" in rule}


def test_every_service_is_scraped() -> None:
    config = yaml.safe_load((OBSERVABILITY / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {f"hasgpu-{service}" for spec in CATALOGUE.values() for service in spec.services}
    assert all(job["dns_sd_configs"][0]["port"] == 9464 for job in config["scrape_configs"])


def test_names_follow_the_conventions() -> None:
    for spec in CATALOGUE.values():
        assert re.fullmatch(r"hasgpu(\.[a-z]+)+", spec.name)
        assert (spec.unit == "1") == spec.name.endswith(".ratio"), spec.name
        assert bool(spec.buckets) == (spec.kind is Kind.HISTOGRAM)
        assert list(spec.buckets) == sorted(spec.buckets)
        assert not TARGET_LABELS & set(spec.attributes), f"{spec.name}: Prometheus gives these labels itself"


def test_the_documents_are_as_generated() -> None:
    for tool in ("observability_reference", "settings_reference"):
        run(sys.executable, f"tools/{tool}.py", "--check")


def test_promtool_accepts_them() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH")
    config = OBSERVABILITY / "prometheus/prometheus.yml"
    run(promtool, "check", "config", str(config))
    run(promtool, "test", "rules", "tests/support/rules_test.yml")
