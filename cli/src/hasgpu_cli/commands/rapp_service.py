"""`hasgpu rapp train|predict|describe|errors`: the predictor that serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from hasgpu_core.errors import InvalidError, NotFoundError

from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.options import json_option, print_json, run, target_options
from hasgpu_cli.proto_json import to_plain

if TYPE_CHECKING:
    from hasgpu.rapp.v1 import rapp_pb2

TRAIN_TIMEOUT_S = 600.0
AT = "batch,sm_pct,quota_pct"


def parse_at(text: str) -> tuple[int, int, int]:
    """Reads a configuration as `4,50,20`: batch, SM share and quota in per cent; returns the quota in per mille."""
    parts = text.split(",")
    try:
        batch, sm_pct, quota_permille = int(parts[0]), int(parts[1]), round(10 * float(parts[2]))
    except (ValueError, IndexError):
        batch = sm_pct = quota_permille = 0
    if len(parts) != 3 or batch < 1 or not 1 <= sm_pct <= 100 or not 1 <= quota_permille <= 1_000:
        raise InvalidError("--at", expected=f"{AT}, as 4,50,20 or 1,100,12.5", got=repr(text))
    return batch, sm_pct, quota_permille


@click.command("predict")
@click.argument("function")
@click.option("--at", multiple=True, metavar=AT.upper(), help="A configuration; may be given again [the whole grid].")
@click.option("--device", "device_model", default="", help="Device model [the only one].")
@click.option("--instance", default="", help="As corrected by what this instance takes [by what all take].")
@click.option("--slo-ms", default=0, type=click.IntRange(min=0), help="For the rates [the function's objective].")
@json_option
@target_options("rapp")
def predict_command(
    target: Target, function: str, at: Sequence[str], device_model: str, instance: str, slo_ms: int, as_json: bool
) -> None:
    """Show the latency of FUNCTION at shares of a device, its 90 % interval, and the rate inside the objective."""
    cells = [parse_at(text) for text in at]
    found = run(predict(target, function, cells, device_model=device_model, instance=instance, slo_ms=slo_ms))
    if as_json:
        print_json(found)
        return
    rests_on = found["basis_reason"] or ("a guess, nothing of it was measured" if found["basis"] == "static" else "")
    told = f"{found['basis']}: {rests_on}" if rests_on else found["basis"]
    click.echo(f"{function} on {found['device_model']}, version {found['version']}, {told}")
    correction = found["correction"]
    if correction["batches_count"]:
        click.echo(f"  {_correction(correction)}")
    click.echo(f"  {'batch':>5} {'SM':>5} {'quota':>7} {'latency':>10}  {'90 % interval':<20} {'rate':>11}")
    for p in found["points"]:
        interval = f"{p['low_ms']:.1f}..{p['high_ms']:.1f} ms"
        mark = "  extrapolated: larger than any batch measured" if p["extrapolated"] else ""
        click.echo(
            f"  {p['batch']:>5} {p['sm_pct']:>3} % {p['quota_permille'] / 10:>5g} % {p['latency_ms']:>7.1f} ms"
            f"  {interval:<20} {p['capacity_rps']:>9.1f}/s{mark}"
        )
    if found["infeasible_reason"]:
        click.echo(f"  none meets the objective: {found['infeasible_reason']}")


async def predict(
    target: Target,
    function: str,
    cells: Sequence[tuple[int, int, int]],
    *,
    device_model: str,
    instance: str,
    slo_ms: int,
) -> dict[str, Any]:
    """Asks rapp for latencies and rates."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    async with target.session(), target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        device_model = device_model or await _only_device(stub, function)
        capacity_request = rapp_pb2.CapacityRequest(function=function, device_model=device_model, slo_ms=slo_ms)
        capacity_request.configurations.extend(
            rapp_pb2.Configuration(batch=b, sm_pct=s, quota_permille=q) for b, s, q in cells
        )
        capacity = await stub.Capacity(capacity_request, timeout=CALL_TIMEOUT_S)
        request = rapp_pb2.PredictRequest(function=function, device_model=device_model, instance=instance)
        request.configurations.extend(
            rapp_pb2.Configuration(batch=p.batch, sm_pct=p.sm_pct, quota_permille=p.quota_permille)
            for p in capacity.points
        )
        answer = await stub.Predict(request, timeout=CALL_TIMEOUT_S)
    points = [
        {
            "batch": point.batch,
            "sm_pct": point.sm_pct,
            "quota_permille": point.quota_permille,
            "latency_ms": latency / 1e6,
            "low_ms": low / 1e6,
            "high_ms": high / 1e6,
            "extrapolated": extrapolated,
            "capacity_rps": point.capacity_millirps / 1e3,
        }
        for point, latency, low, high, extrapolated in zip(
            capacity.points, answer.latencies_ns, answer.low_ns, answer.high_ns, answer.extrapolated, strict=True
        )
    ]
    return {
        "function": function,
        "device_model": device_model,
        "version": answer.version,
        "basis": answer.basis,
        "basis_reason": answer.basis_reason,
        "slo_ms": capacity.slo_ms,
        "infeasible_reason": capacity.infeasible_reason,
        "correction": to_plain(answer.correction),
        "points": points,
    }


async def _only_device(stub: Any, function: str) -> str:
    """The device model that a function is known on; raises InvalidError when there are several."""
    from hasgpu.rapp.v1 import rapp_pb2

    described = await stub.Describe(rapp_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)
    names: list[str] = sorted({state.device_model for state in described.functions if state.function == function})
    if not names:
        raise NotFoundError("function", function, "rapp knows none of that name on a live device")
    if len(names) > 1:
        raise InvalidError("--device", expected=f"one of {', '.join(names)}", got="none")
    return names[0]


@click.command("train")
@click.argument("device_model")
@json_option
@target_options("rapp")
def train_command(target: Target, device_model: str, as_json: bool) -> None:
    """Fit the predictor of DEVICE_MODEL to all that was measured on it, and serve it. Shows its progress."""
    card = run(train(target, device_model))
    if as_json:
        print_json(card)
        return
    click.echo(_card(card))


async def train(target: Target, device_model: str) -> dict[str, Any]:
    """Has rapp train; returns the new model's card."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    card: dict[str, Any] = {}
    async with target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        async for event in stub.Train(rapp_pb2.TrainRequest(device_model=device_model), timeout=TRAIN_TIMEOUT_S):
            if event.WhichOneof("event") == "card":
                card = to_plain(event.card)
            else:
                click.echo(event.progress, err=True)
    return card


@click.command("describe")
@click.option("--device", "device_model", default="", help="Device model [all].")
@json_option
@target_options("rapp")
def describe_command(target: Target, device_model: str, as_json: bool) -> None:
    """Show the models that serve, their versions and errors, and each function's correction and drift."""
    described = run(describe(target, device_model))
    if as_json:
        print_json(described)
        return
    for card in described["cards"]:
        click.echo(_card(card))
        for version in described["versions"]:
            if version["device_model"] == card["device_model"] and not version["served"]:
                click.echo(f"    before: {_version(version)}")
    for transfer in described["transfers"]:
        click.echo(_transfer(transfer))
    for state in described["functions"]:
        click.echo(_function(state))
    for name, progress in sorted(described["profiling"].items()):
        click.echo(f"profiling {name}: {progress}")
    for note in described["notes"]:
        click.echo(f"note: {note}")


async def describe(target: Target, device_model: str = "") -> dict[str, Any]:
    """Returns all that rapp tells of itself."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    async with target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        request = rapp_pb2.DescribeRequest(device_model=device_model)
        return to_plain(await stub.Describe(request, timeout=CALL_TIMEOUT_S))


@click.command("errors")
@click.argument("device_model")
@click.option("--function", default="", help="This one alone [all].")
@json_option
@target_options("rapp")
def errors_command(target: Target, device_model: str, function: str, as_json: bool) -> None:
    """Show how far predictions lie from what was measured on DEVICE_MODEL: each fifth of a function's points is
    predicted from the others. And how far from what its instances really take."""
    answer = run(errors(target, device_model, function))
    if as_json:
        print_json(to_plain(answer))
        return
    click.echo(f"{device_model}, version {answer.version}; errors in per cent of the measured latency")
    for error in answer.functions:
        click.echo(
            f"  {error.function}: mean {error.mape_pct:.1f}, median {error.median_ape_pct:.1f}, 95th percentile "
            f"{error.p95_ape_pct:.1f} over {error.points_count} points; {100 * error.coverage_90:.0f} % of them in "
            "the 90 % interval"
        )
        if error.HasField("observed"):
            click.echo(f"    {_observed(to_plain(error.observed))}")


async def errors(target: Target, device_model: str, function: str = "") -> rapp_pb2.EvaluateResponse:
    """Has rapp evaluate itself."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    async with target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        request = rapp_pb2.EvaluateRequest(device_model=device_model, function=function)
        return await stub.Evaluate(request, timeout=TRAIN_TIMEOUT_S)


def _version(card: dict[str, Any]) -> str:
    error = f"{card['mape_pct']:.1f} % error" if card.get("mape_pct") is not None else "error not measured"
    return (
        f"version {card['version']}: {card['rows_count']} rows of {', '.join(card['functions']) or 'nothing'}, "
        f"{error}, model {card['sha256'][:12]}, data {card['data_sha256'][:12]}"
    )


def _card(card: dict[str, Any]) -> str:
    physical = card.get("physical_mape_pct")
    alone = f"; the physical estimate alone {physical:.1f} %" if physical is not None else ""
    return f"{card['device_model']} {_version(card)}{alone}, {len(card['features'])} features, {card['train_s']:.1f} s"


def _transfer(card: dict[str, Any]) -> str:
    if not card["models"]:
        return f"{card['device_model']} functions without a profile: guessed from their size, {card['reason']}"
    failed = f"; the newest could not be learnt: {card['reason']}" if card["reason"] else ""
    return (
        f"{card['device_model']} functions without a profile: from their operators and {len(card['models'])} others, "
        f"{card['static_mape_pct']:.1f} % error on those left out, {card['probed_mape_pct']:.1f} % with five points; "
        f"{card['rows_count']} rows, model {card['sha256'][:12]}, data {card['data_sha256'][:12]}{failed}"
    )


def _function(state: dict[str, Any]) -> str:
    at_ns = state["table_computed_unix_ns"]
    age = f"table {max(0.0, time.time() - at_ns / 1e9):.0f} s old" if at_ns else "no table published"
    measured = f"{state['points_count']} points up to batch {state['profiled_max_batch']}"
    lines = [
        f"{state['function']} on {state['device_model']}: {state['basis']}, version {state['version']}, "
        f"{measured if state['points_count'] else 'nothing measured'}, {age}"
    ]
    if state["operators_count"]:
        lines[0] += f", {state['operators_count']} operators"
    if state["basis_reason"]:
        lines.append(f"    {state['basis']}: {state['basis_reason']}")
    correction = state["correction"]
    if correction["batches_count"]:
        lines.append(f"    {_correction(correction)}")
    lines += [
        f"    {source['name']}: {source['factor']:.2f} over {source['batches_count']} batches"
        for source in state["sources"]
    ]
    if state["observed"]:
        lines.append(f"    {_observed(state['observed'])}")
    return "\n".join(lines)


def _correction(correction: dict[str, Any]) -> str:
    drift = f"; DRIFT: {correction['drift']}" if correction["drift"] else ""
    return (
        f"corrected by {correction['factor']:.2f} where the quota decides, else by {correction['run_factor']:.2f}, "
        f"after {correction['batches_count']} batches{drift}"
    )


def _observed(observed: dict[str, Any]) -> str:
    predicted_ms, corrected_ms = observed["predicted_run_ns"] / 1e6, observed["corrected_run_ns"] / 1e6
    return (
        f"a run of {observed['observed_run_ns'] / 1e6:.1f} ms was predicted as {predicted_ms:.1f}, "
        f"with the correction {corrected_ms:.1f} ms; median error "
        f"{observed['median_run_error_pct']:.1f} % before, {observed['corrected_median_run_error_pct']:.1f} % after it"
    )


COMMANDS = (train_command, predict_command, describe_command, errors_command)
