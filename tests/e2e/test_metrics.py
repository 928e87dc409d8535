"""What a running system's metrics say of requests that were really made."""

from __future__ import annotations

import json
import urllib.request

import pytest
from hasgpu_runtime.metric_catalogue import CATALOGUE, series_names
from hasgpu_system import System, eventually
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(address: str) -> Samples:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return sum(number for has, number in samples.get(name, []) if labels.items() <= has.items())


def test_every_service_tells_what_it_should(system: System) -> None:
    system.infer_text("tricky", "one")
    units = [unit for unit in system.units() if unit["kind"] == "service"]
    targets = json.loads((system.home / "prometheus-targets.json").read_text())
    assert sorted(target["targets"][0] for target in targets) == sorted(unit["metrics"] for unit in units)
    told: dict[str, set[str]] = {}
    for unit in units:
        service = "node-agent" if unit["name"].startswith("node-agent") else unit["name"]
        samples = scrape(unit["metrics"])
        assert samples.keys() <= series_names()
        ((info, _),) = samples["target_info"]
        assert info["service_name"] == f"hasgpu-{service}"
        told[service] = {name for name, spec in CATALOGUE.items() if spec.series[-1] in samples}
    strangers = {
        (service, name) for service, names in told.items() for name in names if service not in CATALOGUE[name].services
    }
    assert strangers == set(), "the catalogue says which services tell of a metric"
    assert "hasgpu.node.alive" in told["scheduler"]
    assert "hasgpu.gpu.health" in told["node-agent"]


def test_requests_shares_and_gpu_seconds_are_those_that_were(system: System) -> None:
    ports = {unit["name"]: unit["metrics"] for unit in system.units()}
    before = scrape(ports["gateway"])
    for _ in range(5):
        system.infer_text("tricky", "one", "two")
    after = scrape(ports["gateway"])
    answered = sum(
        value(after, "hasgpu_requests_total", function="tricky", outcome=outcome)
        - value(before, "hasgpu_requests_total", function="tricky", outcome=outcome)
        for outcome in ("in_time", "late")
    )
    assert answered == 5
    for name, more in (("hasgpu_request_duration_seconds_count", 5), ("hasgpu_request_items_total", 10)):
        assert value(after, name, function="tricky") - value(before, name, function="tricky") == more
    agent = next(address for name, address in ports.items() if name.startswith("node-agent"))

    def told_as_status_says() -> bool:
        samples = scrape(agent)
        instances = [i for i in system.instances("tricky") if i["state"] == "ready"]
        return bool(instances) and all(
            value(samples, "hasgpu_allocation_request_ratio", instance_id=i["instance"])
            == i["allocation"]["request_permille"] / 1000
            for i in instances
        )

    eventually(told_as_status_says, within_s=60)
    first = value(scrape(agent), "hasgpu_function_gpu_time_seconds_total", function="tricky")
    eventually(
        lambda: value(scrape(agent), "hasgpu_function_gpu_time_seconds_total", function="tricky") > first, within_s=60
    )
