"""What every device backend must do: `python -m hasgpu_device.conformance --device cpu|cuda|emulated|fake`.

Each check is a function that runs instances on the device and raises AssertionError where it does not do as it must;
it returns what it saw, in words. pytest runs the same functions. Nothing is compared with the wall clock, so a busy
host does not make a check fail: device time is compared with device time, events with the order they came in.

| check | holds |
|---|---|
| charged | what `stop_segment` returned is what was charged, counted and reported |
| next_segment | a change of the quota is in force from the next segment on, and acknowledged then, not before |
| sm_between | the SM share changes between segments only, before the next one; a smaller share is not faster |
| epochs_in_order | changes are applied in order; the last one counts |
| counters_monotone | no counter ever falls; tenants of a full row share in the ratio of their requests |
| exclusive_row | tenants of a row never hold the device at once |
| side_by_side | rows run at the same time |
| borrowing | idle time is lent up to the limit |
| killed_holder | the device of a holder that was killed is free again |
| drain | what drains ends its batch and lets the device go; the engine finishes what it took and refuses the rest |
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from hasgpu_device.backends.cpu import usable_cores
from hasgpu_device.conformance_tenant import (
    BATCH_SEGMENTS,
    HANG_S,
    SEGMENT_NS,
    Instance,
    Segment,
    Tenant,
    make_config,
    wait_until,
)
from hasgpu_device.control import Counters, Shares
from hasgpu_device.gate import RowGate

DEVICES = ("cpu", "cuda", "emulated", "fake")
SHARE_DEVICE_NS = 1_000_000_000
"""Device time that the largest tenant of a row uses while shares are compared."""
TOLERANCE = 0.05
CPU_TOLERANCE = 0.15
RATIO_RUNS = 4
"""Runs of which one has to keep the ratio."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a check runs."""

    device: str
    folder: Path
    """An empty folder, best in shared memory."""
    mode: str = ""
    """Of a CUDA device."""

    @property
    def whole_pct(self) -> int:
        """SM share of a row that is alone: of a CPU one half, so that the host's other work has cores to run on."""
        return 50 if self.device == "cpu" and usable_cores() > 1 else 100

    @property
    def tolerance(self) -> float:
        """How far, relatively, a share may be off."""
        return CPU_TOLERANCE if self.device == "cpu" else TOLERANCE

    def instance(self, shares: Shares) -> Instance:
        """Makes an instance in this process."""
        return Instance(self.device, self.folder, "one", shares, mode=self.mode)

    def tenant(self, name: str, shares: Shares, *, row: int = 0) -> Tenant:
        """Starts a tenant process in a row."""
        gate = self.folder / f"row{row}.gate"
        return Tenant(self.device, self.folder, name, gate, shares, mode=self.mode)


def check_charged(bench: Bench) -> str:
    """What `stop_segment` returned is what was charged, counted and reported."""
    with bench.instance(Shares(1_000, 1_000, bench.whole_pct)) as one:

        def work() -> None:
            for index in range(5):
                if index:
                    one.runner.boundary()
                one.work(SEGMENT_NS)

        runs = [one.runner.run(work)[1] for _ in range(2)]
        stopped_ns = [value for call, value in one.backend.calls if call == "stop"]
        counters = one.control.read_counters()
        assert len(stopped_ns) == 10, f"5 segments in each of 2 batches, got {len(stopped_ns)}"
        assert min(stopped_ns) > 0, f"each segment takes device time, got {stopped_ns}"
        assert sum(stopped_ns) == counters.used_ns == sum(run.device_ns for run in runs), (
            f"stopped {sum(stopped_ns)}, counted {counters.used_ns}, reported {sum(run.device_ns for run in runs)} ns"
        )
        assert [s.device_ns for run in runs for s in run.segments] == stopped_ns
        assert (counters.segments_count, counters.batches_count) == (10, 2)
        assert counters.longest_segment_ns == max(stopped_ns)
        return f"10 segments, {counters.used_ns / 1e6:.2f} ms, equal in all three places"


def check_next_segment(bench: Bench) -> str:
    """A change of the quota is in force from the next segment on, and acknowledged then, not before."""
    with bench.instance(Shares(300, 300, bench.whole_pct)) as one:
        seen: list[tuple[int, int]] = []

        def look() -> None:
            seen.append((one.member.shares.request_permille, one.applied_epoch))

        def work() -> None:
            one.work(SEGMENT_NS)
            epoch = one.control.write_shares(Shares(1_000, 1_000, bench.whole_pct))
            look()
            one.runner.boundary()
            look()
            one.work(SEGMENT_NS)
            assert epoch == seen[1][1]

        before = one.applied_epoch
        one.runner.run(work)
        assert seen[0] == (300, before), f"within a segment nothing changes, got {seen[0]}"
        assert seen[1] == (1_000, before + 1), f"in force at the next segment, got {seen[1]}"
        return "300 ‰ to 1000 ‰ at the next boundary"


def check_sm_between(bench: Bench) -> str:
    """The SM share changes between segments only, before the next one; a smaller share is not faster."""
    whole_pct, part_pct = bench.whole_pct, 25
    with bench.instance(Shares(1_000, 1_000, whole_pct)) as one:

        def work() -> None:
            for index, sm_pct in enumerate((part_pct, whole_pct, whole_pct)):
                if index:
                    one.runner.boundary()
                one.fixed_work()
                if index < 2:
                    one.control.write_shares(Shares(1_000, 1_000, sm_pct))

        one.runner.run(work)
        order = [call for call, _ in one.backend.calls]
        assert order == ["start", "stop", "apply", "start", "stop", "apply", "start", "stop"], f"got {order}"
        assert [value for call, value in one.backend.calls if call == "apply"] == [part_pct, whole_pct]
        took_ms = [value / 1e6 for call, value in one.backend.calls if call == "stop"]
        words = f"the same work: {took_ms[0]:.2f} ms on {whole_pct} %, {took_ms[1]:.2f} ms on {part_pct} % of the SMs"
        least_ms = min(took_ms[0], took_ms[2])
        assert took_ms[1] > 0.9 * least_ms, words
        if bench.device in ("emulated", "fake"):
            assert abs(took_ms[1] - 4 * least_ms) < 0.01, words
        return words


def check_epochs_in_order(bench: Bench) -> str:
    """Changes are applied in order, the last one counts; also those of a tenant that waits or runs meanwhile."""
    base = Shares(400, 400, bench.whole_pct)
    with bench.tenant("a", base) as tenant, bench.tenant("b", base):
        wait_until("the tenant's first segment", lambda: bool(tenant.segments()))
        epoch = 0
        seen = [tenant.control.read_counters().applied_epoch]
        for step in range(30):
            request = 100 + 10 * step
            epoch = tenant.write_shares(replace(base, request_permille=request, limit_permille=request))
            if step % 3 == 0:
                wait_until(f"epoch {epoch}", lambda: tenant.control.read_counters().applied_epoch >= epoch)  # noqa: B023  waited for at once
            seen.append(tenant.control.read_counters().applied_epoch)
        wait_until(f"epoch {epoch}", lambda: tenant.control.read_counters().applied_epoch == epoch)
        ran = len(tenant.segments())
        wait_until("another segment", lambda: len(tenant.segments()) > ran + 1)
        epochs = [segment.epoch for segment in tenant.segments()]
        assert seen == sorted(seen), f"the acknowledged epoch fell: {seen}"
        assert epochs == sorted(epochs), f"segments ran under an older epoch than those before: {epochs}"
        last = tenant.segments()[-1]
        assert (last.epoch, last.request_permille) == (epoch, 390), f"the last change counts, got {last}"
        return f"30 changes, {len(set(epochs))} of them held a segment, in order"


def _run_row(bench: Bench, shares: Sequence[Shares], *, device_ns: int) -> tuple[list[int], list[list[Segment]], str]:
    """Runs tenants of one row until the first has used `device_ns` more; returns what each used, and their segments."""
    with ExitStack() as stack:
        tenants = [stack.enter_context(bench.tenant(f"t{i}", share)) for i, share in enumerate(shares)]
        wait_until("each tenant's first segments", lambda: all(len(t.segments()) > BATCH_SEGMENTS for t in tenants))
        before = [tenant.control.read_counters() for tenant in tenants]
        latest = list(before)

        def enough() -> bool:
            now = [tenant.control.read_counters() for tenant in tenants]
            for old, new in zip(latest, now, strict=True):
                _assert_monotone(old, new)
            latest[:] = now
            return now[0].used_ns - before[0].used_ns >= device_ns

        wait_until(f"{device_ns / 1e9:g} s of device time", enough)
        used_ns = [new.used_ns - old.used_ns for old, new in zip(before, latest, strict=True)]
        borrowed_ns = [new.borrowed_ns - old.borrowed_ns for old, new in zip(before, latest, strict=True)]
        words = ", ".join(
            f"{share.request_permille} ‰ got {used / 1e6:.0f} ms (borrowed {borrowed / 1e6:.0f})"
            for share, used, borrowed in zip(shares, used_ns, borrowed_ns, strict=True)
        )
        return used_ns, [tenant.segments() for tenant in tenants], words


def _assert_monotone(old: Counters, new: Counters) -> None:
    for name in (
        "applied_epoch",
        "used_ns",
        "borrowed_ns",
        "batches_count",
        "segments_count",
        "longest_segment_ns",
        "gate_wait_ns",
    ):
        assert getattr(new, name) >= getattr(old, name), (
            f"{name} fell from {getattr(old, name)} to {getattr(new, name)}"
        )


def _assert_ratio(bench: Bench, shares: Sequence[Shares], wanted: Sequence[float]) -> str:
    """Tenants of a row use device time in the ratio wanted.

    A busy host withholds time from one tenant and not from another, now and then; a gate that is wrong is wrong always.
    So one run of a few within the tolerance is proof enough.
    """
    found = []
    for _ in range(RATIO_RUNS):
        used_ns, _, words = _run_row(bench, shares, device_ns=SHARE_DEVICE_NS)
        errors = [have / used_ns[0] / (want / wanted[0]) - 1 for have, want in zip(used_ns, wanted, strict=True)]
        worst = max(errors, key=abs)
        if abs(worst) <= bench.tolerance:
            return words
        found.append(f"{100 * worst:+.1f} %: {words}")
    raise AssertionError(f"off in each of {RATIO_RUNS} runs, by " + "; ".join(found))


def check_counters_monotone(bench: Bench) -> str:
    """No counter ever falls; tenants of a full row share in the ratio of their requests."""
    requests = (500, 300, 200)
    return _assert_ratio(bench, [Shares(request, request, bench.whole_pct) for request in requests], requests)


def check_exclusive_row(bench: Bench) -> str:
    """Tenants of a row never hold the device at once; lent time is no exception."""
    shares = [Shares(200, 1_000, bench.whole_pct), Shares(300, 400, bench.whole_pct), Shares(100, 100, bench.whole_pct)]
    _, logs, _ = _run_row(bench, shares, device_ns=SHARE_DEVICE_NS // 3)
    ordered = sorted((segment for log in logs for segment in log), key=lambda segment: segment.began_ns)
    for one, other in itertools.pairwise(ordered):
        assert one.ended_ns <= other.began_ns, f"two segments of a row ran at once: {one} and {other}"
    owners = sorted((segment.began_ns, index) for index, log in enumerate(logs) for segment in log)
    changes = sum(one[1] != other[1] for one, other in itertools.pairwise(owners))
    assert changes >= 10, f"the tenants took turns, got {changes} changes among {len(ordered)} segments"
    return f"{len(ordered)} segments, {changes} changes of hands, none at once"


def check_side_by_side(bench: Bench) -> str:
    """Rows run at the same time."""
    left = Shares(1_000, 1_000, 50)
    with bench.tenant("left", left, row=0) as a, bench.tenant("right", replace(left, first_pct=50), row=1) as b:

        def both() -> bool:
            return min(len(a.segments()), len(b.segments())) >= 100

        def overlapping() -> list[tuple[Segment, Segment]]:
            others = b.segments()
            return [
                (one, other)
                for one in a.segments()
                for other in others
                if one.began_ns < other.ended_ns and other.began_ns < one.ended_ns
            ]

        wait_until("100 segments in each of two rows", both)
        wait_until("segments of two rows at one time", lambda: bool(overlapping()))
        count = len({one for one, _ in overlapping()})
        return f"{count} of {len(a.segments())} segments ran beside one of the other row"


def check_borrowing(bench: Bench) -> str:
    """Idle time is lent up to the limit, and not beyond it; the request of the other stays whole."""
    shares = [Shares(100, 300, bench.whole_pct), Shares(100, 100, bench.whole_pct)]
    return _assert_ratio(bench, shares, (300, 100))


def check_killed_holder(bench: Bench) -> str:
    """The device of a holder that was killed (`kill -9`) is free again for those that wait."""
    shares = Shares(500, 500, bench.whole_pct)
    with bench.tenant("holder", shares) as holder:
        holder.hold_path.touch()
        wait_until("the holder has the device", holder.holds)
        with bench.tenant("waiter", shares) as waiter:
            wait_until("the other waits", waiter.waits)
            assert holder.holds()
            assert not waiter.segments()
            killed_ns = time.monotonic_ns()
            holder.process.kill()
            wait_until("the other runs", lambda: len(waiter.segments()) > 1)
            assert waiter.segments()[0].began_ns > killed_ns
            after_ms = (waiter.segments()[0].began_ns - killed_ns) / 1e6
            return f"the waiter ran {after_ms:.1f} ms after the kill (window {shares.window_ns / 1e6:g} ms)"


def check_drain(bench: Bench) -> str:
    """What drains ends its batch and lets the device go; the engine finishes what it took and refuses the rest."""
    shares = Shares(500, 500, bench.whole_pct)
    with bench.tenant("leaver", shares) as leaver:
        wait_until("some batches", lambda: leaver.control.read_counters().batches_count > 2)
        leaver.write_shares(replace(shares, draining=True))
        assert leaver.process.wait(HANG_S) == 0
        counters = leaver.control.read_counters()
        assert counters.segments_count == BATCH_SEGMENTS * counters.batches_count, f"no batch is cut off: {counters}"
        assert len(leaver.segments()) == counters.segments_count
        with RowGate.open(leaver.config.gate_path) as gate:
            assert gate.members() == (), "it left the gate"
    return f"{counters.batches_count} whole batches{_engine_drains(bench)}"


def _engine_drains(bench: Bench) -> str:
    if bench.device == "fake":
        return ""
    try:
        from hasgpu_device.conformance_engine import check_engine_drains
    except ModuleNotFoundError as error:
        return f"; the engine was left out: {error}"  # a bare GPU machine has no protobuf
    config = make_config(bench.device, bench.folder, "engine", bench.folder / "engine.gate", mode=bench.mode)
    return f"; the engine finished {check_engine_drains(config, Shares(1_000, 1_000, bench.whole_pct))}"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "charged": check_charged,
    "next_segment": check_next_segment,
    "sm_between": check_sm_between,
    "epochs_in_order": check_epochs_in_order,
    "counters_monotone": check_counters_monotone,
    "exclusive_row": check_exclusive_row,
    "side_by_side": check_side_by_side,
    "borrowing": check_borrowing,
    "killed_holder": check_killed_holder,
    "drain": check_drain,
}


def run_check(name: str, device: str, *, mode: str = "") -> str:
    """Runs one check in a folder of its own. Raises AssertionError."""
    shared_memory = Path("/dev/shm")  # noqa: S108  a page there is never written to a disk
    place = shared_memory if shared_memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="hasgpu-conformance-") as folder:
        return CHECKS[name](Bench(device, Path(folder), mode))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite, prints a table and returns the number of checks that failed."""
    parser = argparse.ArgumentParser(prog="hasgpu_device.conformance", description="Check a device backend.")
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--mode", default="", help="how a CUDA device is shared")
    parser.add_argument("--check", choices=tuple(CHECKS), action="append", help="only these [all]")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.check or CHECKS:
        try:
            passed, words = True, run_check(name, options.device, mode=options.mode)
        except AssertionError as error:
            passed, words = False, str(error) or "an assertion without words failed"
        rows.append({"check": name, "passed": passed, "words": words})
        sys.stdout.write(f"{'ok  ' if passed else 'FAIL'}  {name:<18} {words}\n")
        sys.stdout.flush()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"device": options.device, "mode": options.mode, "rows": rows}, indent=1, ensure_ascii=False)
        )
    return sum(not row["passed"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
