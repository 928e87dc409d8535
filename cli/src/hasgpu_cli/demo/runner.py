"""The demo from the first process to the last."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import HasgpuError, ModelError, UnavailableError

from hasgpu_cli import functions, up
from hasgpu_cli.client import Target
from hasgpu_cli.commands.replay import progress_display
from hasgpu_cli.demo.plan import FirstInstance, FunctionPlan, choose_slo_ms, plan_functions
from hasgpu_cli.demo.references import FUNCTIONS, References, compute_references, find_examples
from hasgpu_cli.demo.report import write_report
from hasgpu_cli.demo.report_data import DemoRun, FunctionRun, report_json
from hasgpu_cli.demo.tracker import Tracker
from hasgpu_cli.home import Home
from hasgpu_cli.load import Replay, run_open_loop
from hasgpu_cli.options import make_console
from hasgpu_cli.sender import LARGEST_ERROR, FunctionSender, largest_difference
from hasgpu_cli.spec import read_deployment
from hasgpu_cli.stack import Stack
from hasgpu_cli.tensors import infer_request, response_tensors

if TYPE_CHECKING:
    import grpc.aio
    from rich.console import Console

DEPLOY_WITHIN_S = 150.0
TABLE_WITHIN_S = 15.0
CALM_WITHIN_S = 150.0
"""How long the shares are watched after the last request at most: until they have come down and an instance went, and
nothing grew after that. The policy waits for a minute of less load, and for half a minute that nobody needed a parked
instance."""
REQUEST_TIMEOUT_S = 30.0
STATUS_PERIOD_S = 0.25
SETTINGS = {"HASGPU_SCALER_RETIRE_S": "30"}
"""Parked instances that nobody needs go after half a minute, not a quarter of an hour, so that it is seen."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line says."""

    out: Path
    replay_s: float
    devices: str
    examples: Path | None
    keep: bool
    home: Home | None
    """None: a temporary one."""


def run_demo(options: DemoOptions) -> None:
    """Runs the demo; raises HasgpuError when an answer is wrong or something does not work. Stops what it started."""
    console = make_console()
    examples = find_examples(options.examples)
    home = options.home or Home(Path(tempfile.mkdtemp(prefix="hasgpu-demo-")))
    if up.running(home) is not None:
        raise UnavailableError(f"a system runs in {home.path} already; the demo wants one of its own")
    done = False
    try:
        run = asyncio.run(_demo(options, home, examples, console))
        done = True
    finally:
        _clean_up(options, home, console, done=done)
    _show(run, options.out, console)


def _clean_up(options: DemoOptions, home: Home, console: Console, *, done: bool) -> None:
    if options.keep:
        console.print(f"kept up in {home.path}: `hasgpu --home {home.path} status`, then `... down`")
        return
    with _step(console, "stopping everything"):
        up.stop(home)
    if options.home is None and done:
        shutil.rmtree(home.path, ignore_errors=True)
    elif not done:
        console.print(f"the logs are in {home.logs}")


async def _demo(options: DemoOptions, home: Home, examples: Path, console: Console) -> DemoRun:
    target = Target(home, {})
    references, device = await _start(options, home, examples, console)
    async with target.session(), target.channel("gateway") as channel:
        plans = await _deploy(target, examples, options.replay_s, console)
        with _step(console, "checking answers against the models called directly in torch"):
            differences = {name: await _check(channel, name, references[name]) for name in FUNCTIONS}
            ranking = await _rank(channel, references["minilm"])
        worst = ", ".join(f"{name} off by at most {difference:.1e}" for name, difference in differences.items())
        console.print(
            f"  {worst}; a paraphrase ranks at {ranking['paraphrase']:.2f}, "
            f"an unrelated sentence at {ranking['unrelated']:.2f}"
        )
        tracker, replays, replay_s = await _replay(target, channel, plans, references, console)
        predictions = await tracker.predictions()
    runs = [
        FunctionRun(
            plan.name,
            plan.due_s,
            tuple(replays[plan.name].outcomes),
            replays[plan.name].summary(plan.slo_ms),
            tracker.decisions(plan.name),
            plan.factor,
            differences[plan.name],
            plan.notes,
            predictions.get(plan.name),
        )
        for plan in plans
    ]
    duration_s = tracker.samples[-1].at_s if tracker.samples else replay_s
    return DemoRun(device, tracker.began_unix_ns, duration_s, replay_s, runs, tuple(tracker.samples), ranking)


async def _start(
    options: DemoOptions, home: Home, examples: Path, console: Console
) -> tuple[Mapping[str, References], str]:
    """Starts the system, and meanwhile computes what the functions must answer; returns it and the device's model."""
    from hasgpu_cli.status import fetch_cluster

    with _step(console, "starting brokers and services; computing reference answers in torch"):
        supervisor = up.start(home, Stack(devices=options.devices, env=SETTINGS))
        folder = home.path / "references"
        folder.mkdir(exist_ok=True)
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(compute_references(examples, name, folder)) for name in FUNCTIONS}
            record = await up.wait_until_ready(home, supervisor)
        devices = [
            status["device"] for node in (await fetch_cluster(Target(home, {})))["nodes"] for status in node["devices"]
        ]
    if not devices:
        raise UnavailableError("the node agent reports no device")
    console.print(f"  gateway {record.address('gateway')}, device {devices[0]['model']} ({devices[0]['backend']})")
    return {name: task.result() for name, task in tasks.items()}, str(devices[0]["model"])


async def _deploy(target: Target, examples: Path, replay_s: float, console: Console) -> list[FunctionPlan]:
    """Deploys both functions, waits for their profiles, sets the objectives and plans the loads."""
    progress = dict.fromkeys(FUNCTIONS, "sending")
    with _step(console, "deploying and profiling") as say:

        def on_progress(name: str, text: str) -> None:
            progress[name] = text
            say("; ".join(f"{key}: {value}" for key, value in progress.items()))

        async def one(name: str) -> Mapping[str, Any]:
            await functions.deploy(target, read_deployment(examples / name / "function.yaml"), replace=True)
            function = await functions.wait_until_ready(
                target,
                name,
                within_s=DEPLOY_WITHIN_S,
                profiled=True,
                on_progress=lambda text: on_progress(name, text),
            )
            return function

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(name)) for name in FUNCTIONS]
        plans = await _plan(target, [task.result() for task in tasks], replay_s)
    for plan in plans:
        console.print(
            f"  {plan.name}: objective {plan.slo_ms} ms, {len(plan.due_s)} requests (the rates times {plan.factor:.3f})"
        )
    return plans


async def _plan(target: Target, deployed: Sequence[Mapping[str, Any]], replay_s: float) -> list[FunctionPlan]:
    """Sets the objectives from the profiles, waits for the capacity tables made for them, and plans the loads."""
    slos_ms, surfaces, first = {}, {}, {}
    for function in deployed:
        name, model = function["spec"]["name"], function["capacity"]["device_model"]
        slos_ms[name] = choose_slo_ms(await functions.surface(target, name, model))
        await functions.update_function(target, name, slo_ms=slos_ms[name])
    until_s = time.monotonic() + TABLE_WITHIN_S
    for function in deployed:
        name, model = function["spec"]["name"], function["capacity"]["device_model"]
        while (surface := await functions.surface(target, name, model))["slo_ms"] != slos_ms[name]:
            if time.monotonic() > until_s:
                raise UnavailableError(f"{name}: no table for {slos_ms[name]} ms after {TABLE_WITHIN_S:.0f} s")
            await asyncio.sleep(STATUS_PERIOD_S)
        surfaces[name] = surface
        instances = (await functions.get_function(target, name))["instances"]
        if instances:
            instance = instances[0]
            row = (instance["node"], instance["gpu"], instance["row"])
            first[name] = FirstInstance(row, instance["allocation"]["sm_pct"])
    return plan_functions(surfaces, slos_ms=slos_ms, replay_s=replay_s, first=first)


async def _check(channel: grpc.aio.Channel, name: str, references: References) -> float:
    """Asks for every sample once; returns the largest difference. Raises ModelError when it is too large."""
    from hasgpu.inference.v2 import inference_pb2_grpc

    stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    worst = 0.0
    for sample in references.samples:
        response = await stub.ModelInfer(infer_request(name, sample.inputs), timeout=REQUEST_TIMEOUT_S)
        assert sample.expected is not None
        worst = max(worst, largest_difference(response_tensors(response)[0], sample.expected))
    if not worst <= LARGEST_ERROR:
        raise ModelError(f"{name} answers {worst:.2g} off the model called directly; {LARGEST_ERROR:g} is allowed")
    return worst


async def _rank(channel: grpc.aio.Channel, references: References) -> dict[str, float]:
    """Similarities, as served, of the first sentence to its paraphrase (the second) and to the unrelated third."""
    import numpy as np
    from hasgpu.inference.v2 import inference_pb2_grpc

    from hasgpu_cli.tensors import to_array

    stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    vectors = []
    for sample in references.samples[:3]:
        response = await stub.ModelInfer(infer_request("minilm", sample.inputs), timeout=REQUEST_TIMEOUT_S)
        vectors.append(to_array(response_tensors(response)[0]).reshape(-1))
    paraphrase, unrelated = (float(np.dot(vectors[0], vector)) for vector in vectors[1:])
    if paraphrase <= unrelated:
        raise ModelError(f"minilm ranks an unrelated sentence ({unrelated:.2f}) above a paraphrase ({paraphrase:.2f})")
    return {"paraphrase": paraphrase, "unrelated": unrelated}


async def _replay(
    target: Target,
    channel: grpc.aio.Channel,
    plans: Sequence[FunctionPlan],
    references: Mapping[str, References],
    console: Console,
) -> tuple[Tracker, dict[str, Replay], float]:
    """Sends both loads at once, then watches the shares come down."""
    replays = {plan.name: Replay(plan.due_s) for plan in plans}
    senders = {
        plan.name: FunctionSender(channel, plan.name, references[plan.name].samples, timeout_s=REQUEST_TIMEOUT_S)
        for plan in plans
    }
    slos_ms = {plan.name: plan.slo_ms for plan in plans}
    console.print("replaying HAS-GPU's 50 stages on both functions at once")
    began_s = time.monotonic()
    tracker = Tracker(target, [plan.name for plan in plans], began_s=began_s, began_unix_ns=time.time_ns())
    async with _watching(tracker):
        with progress_display(replays, slos_ms, quiet=False) as watchers:
            async with asyncio.TaskGroup() as group:
                for name, replay in replays.items():
                    group.create_task(
                        run_open_loop(replay, senders[name].send, began_s=began_s, on_outcome=watchers[name])
                    )
        replay_s = time.monotonic() - began_s
        with _step(console, f"watching the shares come down, at most {CALM_WITHIN_S:.0f} s") as say:
            until_s = time.monotonic() + CALM_WITHIN_S
            while time.monotonic() < until_s and not tracker.shrank():
                await asyncio.sleep(STATUS_PERIOD_S)
                say(", ".join(f"{plan.name} up to {100 * tracker.share(plan.name):.0f} %" for plan in plans))
    await tracker.collect_decisions()
    return tracker, replays, replay_s


@contextlib.asynccontextmanager
async def _watching(tracker: Tracker) -> AsyncIterator[None]:
    task = asyncio.create_task(tracker.run(), name="tracker")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def _step(console: Console, title: str) -> Iterator[Any]:
    """Shows a step while it runs, then how long it took; gives what to call with its progress."""
    began_s = time.monotonic()
    if not console.is_terminal:
        console.print(title)
    with console.status(title) as spinner:
        yield lambda text: spinner.update(f"{title}: {text}")
    console.print(f"[green]✓[/] {title} ({time.monotonic() - began_s:.0f} s)")


def _show(run: DemoRun, out: Path, console: Console) -> None:
    """Writes the report, prints the table, and raises ModelError when an answer was wrong."""
    from rich.table import Table

    data, page = write_report(run, out)
    report = report_json(run)
    table = Table("function", "ok", "wrong", "p50 p95 p99 ms", "SLO", "in time", "device-s", "quota", "instances")
    for name, f in report["functions"].items():
        actions = f["actions"]
        table.add_row(
            name,
            f"{f['ok']} of {f['requests']}",
            str(f["wrong_outputs"]),
            " ".join("-" if f[key] is None else f"{f[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            str(f["slo_ms"]),
            f"{100 * (f['slo_attainment'] or 0):.1f} %",
            f"{f['device_seconds']:.1f} of {f['whole_device_seconds']:.0f}",
            f"↑{actions['vertical_up']} ↓{actions['vertical_down']}",
            f"+{actions['horizontal_up']} -{actions['horizontal_down']}",
        )
    console.print(table)
    for name, f in report["functions"].items():
        if (seen := f["prediction"]) is not None:
            console.print(
                f"{name}: a batch ran {seen['observed_ms']:.1f} ms (median of the last {seen['batches_count']}), "
                f"predicted {seen['predicted_ms']:.1f}, with the correction {seen['corrected_ms']:.1f} ms; "
                f"median error {seen['error_pct']:.1f} % before it, {seen['corrected_error_pct']:.1f} % after",
                soft_wrap=True,
            )
    console.print(f"{data}\n{page}", soft_wrap=True)
    for name, f in report["functions"].items():
        if f["wrong_outputs"]:
            raise ModelError(f"{name}: {f['wrong_outputs']} of {f['ok']} answers are wrong")
        if not f["ok"]:
            raise HasgpuError(f"{name}: no request was answered; the first: {f['first_failure']}")
