"""How exactly a quota is kept: asked against effective share of the device.

    python bench/quota.py [--device cpu|emulated|cuda] [--seconds 10] [--json bench/results/<device>/quota.json]

Tenants are processes that always have work and pass the same gate with the same control block and device backend as a
worker (`tenants.py`). Measured are: one tenant alone; 2, 4 and 8 that share a row, whose requests fill it; three full
rows side by side; a tenant whose limit is the whole device, alone and when the others come back; and what the gate
costs a tenant that has the device to itself.

The tested tenant's device time is compared with the wall clock (`got_permille`, `error_pct`). On a CPU device a busy
host withholds time from running segments: `withheld_permille` of the row's clock. `gate_error_pct` compares with what
was left of it, and only where the row's requests fill it. `longest_wait_ms` is the longest wait of the tested tenant
while it was entitled to the device by its request.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasgpu_device.control import DEFAULT_WINDOW_NS, Shares
from tenants import DEVICES, House, Tenant, as_row, describe, write

QUOTAS_PERMILLE = (50, 100, 200, 300, 500, 800)
SEGMENTS_MS = (1.0, 5.0, 15.0)
TENANTS = (2, 4, 8)
SETTLE_S = 1.0
SAMPLE_S = 1.0
ROWS_SM_PCT = 25
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Result:
    """One line."""

    tenants: int
    """In the tested tenant's row."""
    rows: int
    segment_ms: float
    quota_permille: int
    limit_permille: int
    got_permille: float
    """Device time of the tested tenant by the wall clock."""
    error_pct: float
    """Of it against the quota, relative."""
    gate_error_pct: float
    """Of it against the quota of what the host did not withhold."""
    worst_error_pct: float
    """`gate_error_pct` of the worst tenant of the row."""
    spread_points: float
    """Standard deviation of the shares in samples of 1 s, in points of per cent."""
    longest_wait_ms: float
    """Of the tested tenant at the gate while it was entitled."""
    overhead_pct: float
    """CPU time that the tested tenant spent beside its segments, relative to them."""
    row_permille: float
    """What the row delivered to all its tenants."""
    withheld_permille: float
    """What the host withheld from the row's running segments."""
    boundary_us: float
    """Median duration of a segment boundary at which the device was kept."""


def edge(tenant: Tenant) -> tuple[int, int]:
    """Waits for a change of a tenant's counters; returns the time and its device time then."""
    before = tenant.used_ns()
    give_up_ns = time.monotonic_ns() + 5_000_000_000
    while (used_ns := tenant.used_ns()) == before and time.monotonic_ns() < give_up_ns:
        time.sleep(0.0005)
    return time.monotonic_ns(), used_ns


def split_rest(rest: int, count: int) -> list[int]:
    """Returns what is left of a row, in about equal parts."""
    return [rest // count + (index < rest % count) for index in range(count)]


def measure(
    house: House, *, count: int, rows: int, segment_ms: float, quota: int, limit: int | None, seconds: float
) -> Result:
    """Runs one case: the first tenant of the first row is tested."""
    sm_pct = ROWS_SM_PCT if rows > 1 else house.whole_pct
    active: list[Tenant] = []
    requests: list[int] = []
    for index, row in enumerate(house.rows[:rows]):
        asked = [quota, *split_rest(1_000 - quota, count - 1)] if count > 1 else [quota]
        for tenant, request in zip(row, asked, strict=False):
            tenant.set_shares(Shares(request, limit or request, sm_pct, first_pct=index * sm_pct))
        active += row[:count]
        requests += asked
    for one in active:
        one.say("run", segment_ns=round(segment_ms * 1e6))
    time.sleep(SETTLE_S)
    for one in active:
        one.report()
    tested, own = active[0], active[:count]
    began_ns, used_from_ns = edge(tested)
    own_from = [one.used_ns() for one in own]
    samples = sample(tested, seconds)
    ended_ns, used_to_ns = edge(tested)
    own_got = [one.used_ns() - start for one, start in zip(own, own_from, strict=True)]
    reports = [one.report() for one in active]
    for one in active:
        one.say("idle")
    elapsed_ns = ended_ns - began_ns
    own_got[0] = used_to_ns - used_from_ns
    withheld = 1_000 * sum(report["withheld_ns"] for report in reports[:count]) / elapsed_ns
    is_full = sum(requests[:count]) >= 1_000
    part = max(1e-9, (1_000 - withheld) / 1_000) if is_full else 1.0
    got = [1_000 * ns / elapsed_ns for ns in own_got]
    errors = [100 * (have / (want * part) - 1) for have, want in zip(got, requests, strict=False)]
    return Result(
        tenants=count,
        rows=rows,
        segment_ms=segment_ms,
        quota_permille=quota,
        limit_permille=limit or quota,
        got_permille=got[0],
        error_pct=100 * (got[0] / quota - 1),
        gate_error_pct=errors[0],
        worst_error_pct=max(errors, key=abs),
        spread_points=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        longest_wait_ms=reports[0]["longest_entitled_ns"] / 1e6,
        overhead_pct=100 * reports[0]["overhead"],
        row_permille=sum(got),
        withheld_permille=withheld,
        boundary_us=reports[0]["boundary_us"],
    )


def sample(tenant: Tenant, seconds: float) -> list[float]:
    """Returns a tenant's share, in per cent, in samples of 1 s."""
    samples = []
    at_ns, used_ns = began_ns, _ = time.monotonic_ns(), 0
    used_ns = tenant.used_ns()
    while time.monotonic_ns() - began_ns < (seconds - SAMPLE_S / 2) * 1e9:
        time.sleep(SAMPLE_S)
        now_ns, now_used_ns = time.monotonic_ns(), tenant.used_ns()
        samples.append(100 * (now_used_ns - used_ns) / (now_ns - at_ns))
        at_ns, used_ns = now_ns, now_used_ns
    return samples


def lend_and_give_back(house: House, seconds: float) -> dict[str, Any]:
    """A tenant with a request of 10 % and a limit of 100 %: alone, and what it gets once three others want theirs."""
    borrower, *others = house.rows[0][:4]
    borrower.set_shares(Shares(100, 1_000, house.whole_pct))
    for other in others:
        other.set_shares(Shares(300, 300, house.whole_pct))
    borrower.say("run", segment_ns=5_000_000)
    time.sleep(SETTLE_S)
    began_ns, from_ns = edge(borrower)
    time.sleep(seconds)
    ended_ns, to_ns = edge(borrower)
    alone = 1_000 * (to_ns - from_ns) / (ended_ns - began_ns)
    firsts, waits = [], []
    for _ in range(max(3, round(seconds))):
        for other in others:
            other.report()
        borrower.report()
        came_unix_ns = time.time_ns()
        for other in others:
            other.say("run", segment_ns=5_000_000)
        time.sleep(0.4)
        log = borrower.report()["log"]
        window = [
            used for _, end, used, _ in log if 0 <= end - came_unix_ns - DEFAULT_WINDOW_NS < 5 * DEFAULT_WINDOW_NS
        ]
        firsts.append(sum(window) / (5 * DEFAULT_WINDOW_NS) * 1_000)
        waits.append(max(other.report()["longest_entitled_ns"] for other in others) / 1e6)
        for other in others:
            other.say("idle")
        time.sleep(0.2)
    borrower.say("idle")
    return {
        "request_permille": 100,
        "limit_permille": 1_000,
        "alone_permille": round(alone, 1),
        "others": len(others),
        "others_request_permille": 300,
        "windows_2_to_6_permille": round(statistics.median(firsts), 1),
        "longest_wait_of_others_ms": round(statistics.median(waits), 2),
    }


def cost(house: House, seconds: float) -> list[dict[str, Any]]:
    """What the gate costs a tenant alone with the whole device: device time delivered, with and without, in turns."""
    tenant = house.rows[0][0]
    tenant.set_shares(Shares(1_000, 1_000, house.whole_pct))
    found = []
    for segment_ms in SEGMENTS_MS[:2]:
        ratios, boundaries = [], []
        tenant.say("run", segment_ns=round(segment_ms * 1e6))
        time.sleep(SETTLE_S)
        for _ in range(max(3, round(seconds))):
            tenant.report()
            began_ns, from_ns = edge(tenant)
            time.sleep(0.5)
            ended_ns, to_ns = edge(tenant)
            gated = (to_ns - from_ns) / (ended_ns - began_ns)
            boundaries.append(tenant.report()["boundary_us"])
            tenant.say("idle", segment_ns=round(segment_ms * 1e6))
            tenant.say("plain", seconds=0.5)
            ratios.append(100 * (1 - gated / tenant.hear()))
            tenant.say("run")
            time.sleep(0.1)
        tenant.say("idle")
        found.append(
            {
                "segment_ms": segment_ms,
                "throughput_lost_pct": round(statistics.median(ratios), 2),
                "boundary_us": round(statistics.median(boundaries), 2),
            }
        )
    return found


def run(device: str, seconds: float, mode: str, *, quick: bool) -> dict[str, Any]:
    """Runs all cases; returns the document to be written."""
    quotas = QUOTAS_PERMILLE[2:5:2] if quick else QUOTAS_PERMILLE
    lengths = SEGMENTS_MS[1:2] if quick else SEGMENTS_MS
    cases = [(1, 1, ms, quota) for ms in lengths for quota in quotas]
    cases += [(count, 1, 5.0, quota) for count in TENANTS for quota in quotas]
    cases += [(count, 1, ms, 200) for count in TENANTS for ms in lengths if ms != 5.0]
    results: list[Result] = []
    print("  ".join(title for title, _ in COLUMNS), flush=True)
    with House(device, [8], mode=mode) as house:
        for count, rows, segment_ms, quota in cases:
            results.append(
                measure(house, count=count, rows=rows, segment_ms=segment_ms, quota=quota, limit=None, seconds=seconds)
            )
            print_row(results[-1])
        lent = lend_and_give_back(house, seconds)
        print(f"lent: {lent}", flush=True)
        costs = cost(house, seconds)
        print(f"cost: {costs}", flush=True)
    with House(device, [2, 2, 2], mode=mode) as house:
        for quota in quotas:
            results.append(measure(house, count=2, rows=3, segment_ms=5.0, quota=quota, limit=None, seconds=seconds))
            print_row(results[-1])
    return {
        "device": describe(device),
        "seconds": seconds,
        "window_ms": DEFAULT_WINDOW_NS / 1e6,
        "rows": [as_row(result) for result in results],
        "lent": lent,
        "cost": costs,
    }


COLUMNS = (
    ("tenants", "tenants"),
    ("rows", "rows"),
    ("segment ms", "segment_ms"),
    ("asked ‰", "quota_permille"),
    ("got ‰", "got_permille"),
    ("error %", "error_pct"),
    ("gate's error %", "gate_error_pct"),
    ("worst %", "worst_error_pct"),
    ("row gave ‰", "row_permille"),
    ("withheld ‰", "withheld_permille"),
    ("spread pt", "spread_points"),
    ("longest wait ms", "longest_wait_ms"),
    ("overhead %", "overhead_pct"),
    ("boundary us", "boundary_us"),
)


def print_row(result: Result) -> None:
    """Prints a line of the table."""
    values = as_row(result)
    cells = []
    for title, key in COLUMNS:
        value = values[key]
        cells.append(f"{value:>{len(title)}.2f}" if isinstance(value, float) else f"{value:>{len(title)}}")
    print("  ".join(cells), flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Asked against effective share of device time.")
    parser.add_argument("--device", default="cpu", choices=DEVICES, help="kind of device (cpu)")
    parser.add_argument("--mode", default="", help="of a cuda device: as its probe found it")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each line (10)")
    parser.add_argument("--quick", action="store_true", help="a few of the cases")
    parser.add_argument("--json", type=Path, help="where the figures go (bench/results/<device>/quota.json)")
    options = parser.parse_args()
    if options.seconds < 1:
        parser.error(f"--seconds: expected at least 1, got {options.seconds:g}")
    document = run(options.device, options.seconds, options.mode, quick=options.quick)
    folder = document["device"] if options.device == "cuda" else options.device
    write(options.json or RESULTS / folder / "quota.json", document)


if __name__ == "__main__":
    main()
