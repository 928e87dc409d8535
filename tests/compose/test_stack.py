"""The life of an installation, in order: up, serve, trace, scale, crash, restart, down and up, refuse, down.

The tests are steps: each goes on from where the one before has left the stack.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import secrets
import time
from typing import Any

import grpc
import pytest
from compose_stack import FOLDER, SERVICES, ComposeStack, Usage, image_sizes, taken_port
from hasgpu_runtime.trace_catalogue import (
    HORIZONTAL_CHAIN,
    REQUEST_CHAIN,
    VERTICAL_CHAIN,
    Link,
    SeenSpan,
    chain_faults,
)
from hasgpu_system import EXAMPLES, FUNCTIONS, SteadyLoad, eventually, text_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRACED_REQUESTS = 1_000
COMPLETE_PERMILLE = 999
IN_FLIGHT = 16
IDLE_S = 60.0
SETTLE_S = 20.0
WITHIN_S = 120.0


def settings() -> dict[str, str]:
    lines = (FOLDER / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def answers(stack: ComposeStack, model: str = "minilm", timeout_s: float = 30) -> bool:
    """Whether a request is answered now."""
    try:
        response = stack.system.infer_text(model, "A man plays the guitar", timeout_s=timeout_s)
    except grpc.RpcError:
        return False
    return response.outputs[0].shape[0] == 1


def answers_again(stack: ComposeStack, *models: str) -> None:
    for model in models or ("minilm",):

        def answered(model: str = model) -> bool:
            return answers(stack, model)

        eventually(answered, within_s=WITHIN_S)


def nodes(stack: ComposeStack) -> dict[str, str]:
    """Addresses of the live nodes by name."""
    cluster = stack.tool_json("status")["cluster"]
    return {node["name"]: node["address"] for node in cluster["nodes"] if node["alive"]}


def test_from_nothing_to_an_answer(stack: ComposeStack, figures: dict[str, Any]) -> None:
    began_s = time.monotonic()
    stack.up()
    up_s = time.monotonic() - began_s

    def deployed() -> bool:
        return stack.hasgpu("deploy", str(EXAMPLES / "minilm"), "--no-wait", check=False).returncode == 0

    eventually(deployed, within_s=WITHIN_S)
    deployed_s = time.monotonic() - began_s

    def answered() -> str:
        done = stack.hasgpu("infer", "minilm", "--text", "A man plays the guitar", "--json", check=False)
        return done.stdout if done.returncode == 0 else ""

    answer = json.loads(eventually(answered, within_s=WITHIN_S))
    figures["start"] = {
        "compose_up_returned_s": round(up_s, 1),
        "deployed_s": round(deployed_s, 1),
        "first_answer_s": round(time.monotonic() - began_s, 1),
        "asked_first_answer_s": 40,
        "cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 1),
        "engine": stack.docker("version", "--format", "{{.Server.Version}}").strip(),
        "compose": stack.version,
        "machine": platform.machine(),
    }
    (output,) = answer["outputs"]
    assert output["shape"] == [1, 384]
    eventually(stack.all_healthy, within_s=WITHIN_S, every_s=1.0)


def test_a_second_function_is_deployed_and_measured(stack: ComposeStack) -> None:
    done = stack.hasgpu("deploy", str(FUNCTIONS / "tricky"))
    assert "tricky: ready, revision" in done.stdout
    assert set(stack.functions()) == {"minilm", "tricky"}


def test_images_are_small_and_run_without_privileges(stack: ComposeStack, figures: dict[str, Any]) -> None:
    version = settings()["HASGPU_VERSION"]
    images = [f"hasgpu/{service}:{version}" for service in (*SERVICES, "cli")]
    figures["images"] = image_sizes(images, settings()["PYTHON_IMAGE"])
    small = {size["image"].split("/")[1].split(":")[0]: size["beyond_base_mb"] for size in figures["images"]}
    assert max(small["gateway"], small["scaler"], small["scheduler"]) <= 250
    containers = stack.by_service()
    for service in (*SERVICES, "nats", "redis", "jaeger", "init", "brokers-ready"):
        for container in containers[service]:
            assert container["HostConfig"]["ReadonlyRootfs"], service
            assert container["HostConfig"]["CapDrop"] == ["ALL"], service
            assert container["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
    for service in SERVICES:
        (container,) = containers[service]
        assert container["Config"]["Labels"]["org.opencontainers.image.title"] == f"hasgpu-{service}"
        assert container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
        assert container["HostConfig"]["Memory"] > 0
        assert container["HostConfig"]["PidsLimit"] > 0


def test_only_the_front_door_and_jaeger_are_published(stack: ComposeStack) -> None:
    published = {
        (service, inside): bindings[0]["HostPort"]
        for service, (container, *_) in stack.by_service().items()
        for inside, bindings in (container["NetworkSettings"]["Ports"] or {}).items()
        if bindings
    }
    assert published == {
        ("gateway", "8001/tcp"): str(stack.gateway_port),
        ("jaeger", "16686/tcp"): str(stack.jaeger_port),
    }


def test_brokers_want_the_generated_passwords(stack: ComposeStack) -> None:
    for name in ("NATS", "REDIS"):
        done = stack.run(
            "run", "--rm", "-T", "-e", f"HASGPU_{name}_PASSWORD_FILE=/etc/hostname", "brokers-ready", check=False
        )
        assert done.returncode == 1
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("hasgpu: ")]
        assert len(lines) == 1, done.stdout + done.stderr
        assert "refuses the user or the password" in lines[0]
        assert f"HASGPU_{name}_PASSWORD_FILE" in lines[0]


def test_a_request_is_one_complete_trace(stack: ComposeStack, figures: dict[str, Any]) -> None:
    sent, failed_count = send_traced(stack, "tricky", TRACED_REQUESTS)
    assert failed_count == 0
    faults = wait_for_chains(stack, sent, REQUEST_CHAIN)
    complete_count = sum(not found for found in faults.values())
    figures["traces"] = {
        "requests_count": len(sent),
        "complete_count": complete_count,
        "complete_pct": round(100 * complete_count / len(sent), 3),
        "asked_pct": 99.9,
        "chain": [link.name for link in REQUEST_CHAIN],
        "faults": sorted({fault for found in faults.values() for fault in found}),
    }
    assert complete_count * 1_000 >= COMPLETE_PERMILLE * len(sent), figures["traces"]["faults"]
    assert {"hasgpu-gateway", "hasgpu-worker"} <= stack.traced_services()


def send_traced(stack: ComposeStack, model: str, count: int) -> tuple[set[str], int]:
    """Sends requests that are to be traced; returns their trace ids and how many failed."""
    sent: set[str] = set()
    failed_count = 0
    with stack.system.stub() as stub:
        waiting: list[Any] = []
        for number in range(count):
            trace_id = secrets.token_hex(16)
            sent.add(trace_id)
            traceparent = ("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01")
            request = text_request(model, f"n{number}")
            waiting.append(stub.ModelInfer.future(request, timeout=60, metadata=(traceparent,)))
            if len(waiting) == IN_FLIGHT:
                failed_count += waiting.pop(0).exception() is not None
        failed_count += sum(call.exception() is not None for call in waiting)
    return sent, failed_count


def wait_for_chains(stack: ComposeStack, sent: set[str], chain: tuple[Link, ...]) -> dict[str, tuple[str, ...]]:
    """Returns what each trace lacks, once none lacks anything or a minute has passed."""
    end_s = time.monotonic() + 60
    while True:
        traces = stack.traces("hasgpu-gateway", 2 * TRACED_REQUESTS)
        faults = {trace: chain_faults(traces.get(trace, ()), chain) for trace in sent}
        if not any(faults.values()) or time.monotonic() > end_s:
            return faults
        time.sleep(1)


def test_a_scaling_decision_is_one_complete_trace(stack: ComposeStack, figures: dict[str, Any]) -> None:
    for change, chain in (
        (("--quota", "35"), VERTICAL_CHAIN),
        (("--instances", "2", "--quota", "20"), HORIZONTAL_CHAIN),
    ):
        stack.tool("scale", "tricky", *change, "--hold", "30")

        def complete(chain: tuple[Link, ...] = chain) -> list[SeenSpan]:
            traces = stack.traces("hasgpu-scaler", 200).values()
            return next((spans for spans in traces if not chain_faults(spans, chain)), [])

        spans = eventually(complete, within_s=WITHIN_S)
        assert {"hasgpu-scaler", "hasgpu-node-agent"} <= {span.service for span in spans}
        figures.setdefault("decisions", []).append([link.name for link in chain])


def test_a_short_load_is_served(stack: ComposeStack, figures: dict[str, Any]) -> None:
    done = stack.hasgpu("replay", "minilm", "--rates", "2 4 2", "--stage-seconds", "5", "--json")
    report = json.loads(done.stdout)
    figures["replay"] = {k: round(v, 2) if isinstance(v, float) else v for k, v in report.items()}
    assert report["requests"] > 0
    assert (report["ok"], report["failures"]) == (report["requests"], {})


def test_node_agents_are_scaled(stack: ComposeStack) -> None:
    stack.up("--no-recreate", "--scale", "node-agent=3")

    def three() -> bool:
        return len(nodes(stack)) == 3

    eventually(three, within_s=WITHIN_S, every_s=2.0)
    found = nodes(stack)
    assert set(found) == {"node1", "node2", "node3"}
    assert len(set(found.values())) == 3
    stack.up("--no-recreate", "--scale", "node-agent=1")
    answers_again(stack)


def test_crashes_of_services_are_survived(stack: ComposeStack) -> None:
    for service in SERVICES:
        before = stack.inspect(service)[0]["RestartCount"]
        stack.crash(service)

        def restarted(service: str = service, before: int = before) -> bool:
            container = stack.inspect(service)[0]
            return bool(container["State"]["Running"]) and container["RestartCount"] > before

        eventually(restarted, within_s=WITHIN_S)
        answers_again(stack)


def test_brokers_are_killed_and_started_again(stack: ComposeStack) -> None:
    for broker in ("nats", "redis"):
        (container,) = stack.container_ids(broker)
        with SteadyLoad(stack.system, "minilm", period_s=0.5) as load:
            stack.docker("kill", container)
            time.sleep(3)  # serving goes on meanwhile
            stack.docker("start", container)
        assert load.ok_count > 0
        assert load.errors == []
        answers_again(stack)


def test_down_and_up_finds_everything_again(stack: ComposeStack, figures: dict[str, Any]) -> None:
    before = {name: (f["spec"], f["revision"]) for name, f in stack.functions().items()}
    assert set(before) == {"minilm", "tricky"}
    stack.down()
    assert stack.container_ids() == []
    began_s = time.monotonic()
    stack.up()
    answers_again(stack, "minilm", "tricky")
    figures["down_and_up_to_answer_s"] = round(time.monotonic() - began_s, 1)
    assert {name: (f["spec"], f["revision"]) for name, f in stack.functions().items()} == before
    eventually(stack.all_healthy, within_s=WITHIN_S, every_s=1.0)


def test_a_whole_restart_finds_everything_again(stack: ComposeStack) -> None:
    stack.run("restart")
    answers_again(stack, "minilm", "tricky")


def test_passwords_are_changed_without_losing_anything(stack: ComposeStack) -> None:
    before = revisions(stack)
    old = secret(stack, "nats-password"), secret(stack, "redis-password"), secret(stack, "grafana-password")
    done = stack.run("run", "--rm", "-T", "--no-deps", "init", "--new-passwords")
    assert "have new passwords" in done.stdout + done.stderr
    new = secret(stack, "nats-password"), secret(stack, "redis-password"), secret(stack, "grafana-password")
    assert [a == b for a, b in zip(old, new, strict=True)] == [False, False, True]
    stack.run("restart")
    answers_again(stack, "minilm", "tricky")
    assert revisions(stack) == before
    eventually(stack.all_healthy, within_s=WITHIN_S, every_s=1.0)
    stack.tool("scale", "tricky", "--quota", "40", "--hold", "1")  # both brokers are written to


def secret(stack: ComposeStack, name: str) -> str:
    file = f"/var/lib/hasgpu/secrets/{name}"
    return stack.run("run", "--rm", "-T", "--no-deps", "--entrypoint", "cat", "init", file).stdout


def revisions(stack: ComposeStack) -> dict[str, tuple[Any, Any]]:
    return {name: (f["spec"], f["revision"]) for name, f in stack.functions().items()}


def test_a_backup_under_load_is_restored_into_new_volumes(
    stack: ComposeStack, figures: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    before, file = revisions(stack), tmp_path / "state.tar.gz"
    with SteadyLoad(stack.system, "minilm", period_s=0.5) as load:
        done = stack.script("backup.sh", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert load.ok_count > 0
    assert load.errors == []
    assert file.stat().st_mode & 0o077 == 0
    figures["backup"] = {"bytes": file.stat().st_size, "said": done.stdout.rpartition("; ")[2].strip()}
    refused = stack.script("restore.sh", str(file))
    assert refused.returncode == 1
    assert "expected nothing in it" in refused.stderr
    answers_again(stack)

    stack.down(volumes=True)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(file.read_bytes()[:-100])
    refused = stack.script("restore.sh", str(cut))
    assert refused.returncode == 1
    assert "cut short" in refused.stderr
    done = stack.script("restore.sh", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    began_s = time.monotonic()
    stack.up()
    answers_again(stack, "minilm", "tricky")
    figures["restored_to_answer_s"] = round(time.monotonic() - began_s, 1)
    assert revisions(stack) == before
    eventually(stack.all_healthy, within_s=WITHIN_S, every_s=1.0)


def test_a_taken_port_and_a_missing_gpu_are_told(stack: ComposeStack) -> None:
    with taken_port() as port:
        stack.env["GATEWAY_PORT"], kept = str(port), stack.env["GATEWAY_PORT"]
        done = stack.run("up", "--detach", "--no-deps", "gateway", check=False)
        stack.env["GATEWAY_PORT"] = kept
    assert done.returncode != 0
    assert str(port) in done.stdout + done.stderr
    stack.up()
    code, log = stack.run_once("node-agent", HASGPU_DEVICES="cuda", HASGPU_NODE="gpuless")
    assert code == 1
    lines = [line for line in log.splitlines() if "CRITICAL" in line]
    assert len(lines) == 1, log
    assert "HASGPU_DEVICES=cuda" in lines[0]
    answers_again(stack)


def test_it_costs_little_when_idle(stack: ComposeStack, figures: dict[str, Any]) -> None:
    for name in stack.functions():
        stack.hasgpu("delete", name)
    time.sleep(SETTLE_S)
    began_s, before = time.monotonic(), stack.usage()
    time.sleep(IDLE_S)
    after, took_s = stack.usage(), time.monotonic() - began_s
    figures["idle"] = idle(before, after, took_s)
    assert set(before.cpu_ns) == set(after.cpu_ns)


def idle(before: Usage, after: Usage, took_s: float) -> dict[str, Any]:
    cpu_pct = {name: round((after.cpu_ns[name] - before.cpu_ns[name]) / took_s / 1e7, 2) for name in before.cpu_ns}
    return {
        "seconds": round(took_s),
        "cpu_pct_of_a_core": round(sum(cpu_pct.values()), 1),
        "asked_cpu_pct_of_a_core": 15,
        "memory_mb": round(sum(after.memory_bytes.values()) / 1e6),
        "cpu_pct_by_container": cpu_pct,
        "memory_mb_by_container": {name: round(used / 1e6) for name, used in after.memory_bytes.items()},
    }


def test_state_of_another_version_is_refused_before_anything_runs(stack: ComposeStack) -> None:
    stack.down()
    mark = "/var/lib/hasgpu/rapp/hasgpu-layout.json"
    write = "import sys; open(sys.argv[1], 'w').write('{\"layout\": %s}' % sys.argv[2])"
    stack.run("run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "init", "-c", write, mark, "99")
    done = stack.run("up", "--detach", check=False)
    assert done.returncode != 0
    log = stack.run("logs", "init").stdout
    assert "rapp has state of layout 99" in log
    assert "run the version that wrote it" in log
    assert not any(c["State"]["Running"] for service in SERVICES for c in stack.by_service().get(service, []))
    stack.run("run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "init", "-c", write, mark, "1")
    stack.up()
    eventually(stack.all_healthy, within_s=WITHIN_S, every_s=1.0)
