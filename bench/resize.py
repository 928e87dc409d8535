"""How long a change of shares takes until it is in force, while tenants saturate the row.

    python bench/resize.py [--device cpu|emulated|cuda] [--seconds 10] [--json bench/results/<device>/resize.json]

The tested tenant's quota (or SM share) changes at random moments, up and down, as the agent changes it: the control
block is written and a waiter poked. A change is in force when the tenant's next segment runs under it, or, while it
waits at the gate, when the gate accounts by it: `effective_*_ms` is from the write until then. Over the whole run the
device time delivered is compared with the quotas asked, each for as long as it was asked (`got_permille`,
`error_pct`). `lost` counts changes that never came into force; nothing is restarted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasgpu_device.control import Shares
from tenants import DEVICES, House, as_row, describe, write

SEGMENTS_MS = (1.0, 5.0, 15.0)
TENANTS = (1, 4)
QUOTAS_PERMILLE = (50, 100, 300, 550)
OTHERS_PERMILLE = 150
SMS_PCT = (25, 50)
PAUSE_S = (0.03, 0.15)
SETTLE_S = 1.0
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Result:
    """One line."""

    what: str
    """"quota" or "sm": what changed."""
    tenants: int
    rows: int
    segment_ms: float
    quota_permille: float
    """Asked, the mean over the run."""
    limit_permille: float
    got_permille: float
    error_pct: float
    spread_points: float
    """Of the time until a change is in force, its standard deviation in milliseconds."""
    longest_wait_ms: float
    """Of the tested tenant at the gate while it was entitled."""
    overhead_pct: float
    changes: int
    lost: int
    effective_median_ms: float
    effective_p99_ms: float
    effective_longest_ms: float


def measure(house: House, *, what: str, count: int, segment_ms: float, seconds: float, seed: int) -> Result:
    """Runs one case."""
    rng = random.Random(seed)
    tested, *others = house.rows[0][:count]
    for other in others:
        other.set_shares(Shares(OTHERS_PERMILLE, OTHERS_PERMILLE, house.whole_pct))
    tested.set_shares(Shares(300, 300, house.whole_pct))
    for one in (tested, *others):
        one.say("run", segment_ns=round(segment_ms * 1e6))
    time.sleep(SETTLE_S)
    for one in (tested, *others):
        one.report()
    written: dict[int, int] = {}
    asked = 0.0
    quota, sm_pct = 300, house.whole_pct
    began_ns = at_ns = time.monotonic_ns()
    from_ns = tested.used_ns()
    while time.monotonic_ns() - began_ns < seconds * 1e9:
        if what == "quota":
            quota_next = rng.choice([other for other in QUOTAS_PERMILLE if other != quota])
        else:
            quota_next = quota
            sm_pct = SMS_PCT[0] if sm_pct != SMS_PCT[0] else min(SMS_PCT[1], house.whole_pct)
        now_ns = time.monotonic_ns()
        epoch = tested.write_shares(Shares(quota_next, quota_next, sm_pct))
        written[epoch] = now_ns
        asked += quota * (now_ns - at_ns)
        at_ns, quota = now_ns, quota_next
        time.sleep(rng.uniform(*PAUSE_S))
    ended_ns, to_ns = time.monotonic_ns(), tested.used_ns()
    asked += quota * (ended_ns - at_ns)
    time.sleep(0.5)
    report = tested.report()
    for one in (tested, *others):
        one.say("idle")
    applied = dict(report["changes"])
    # A change that was overtaken by the next came into force with it.
    late = [(min((at for e, at in applied.items() if e >= epoch), default=0) - at) for epoch, at in written.items()]
    in_force = sorted(ns / 1e6 for ns in late if ns > 0)
    asked_permille = asked / (ended_ns - began_ns)
    got = 1_000 * (to_ns - from_ns) / (ended_ns - began_ns)
    return Result(
        what=what,
        tenants=count,
        rows=1,
        segment_ms=segment_ms,
        quota_permille=asked_permille,
        limit_permille=asked_permille,
        got_permille=got,
        error_pct=100 * (got / asked_permille - 1),
        spread_points=statistics.stdev(in_force),
        longest_wait_ms=report["longest_entitled_ns"] / 1e6,
        overhead_pct=100 * report["overhead"],
        changes=len(written),
        lost=len(written) - len(in_force),
        effective_median_ms=statistics.median(in_force),
        effective_p99_ms=in_force[min(len(in_force) - 1, round(0.99 * len(in_force)))],
        effective_longest_ms=in_force[-1],
    )


COLUMNS = (
    "what",
    "tenants",
    "segment_ms",
    "quota_permille",
    "got_permille",
    "changes",
    "lost",
    "effective_median_ms",
    "effective_p99_ms",
    "effective_longest_ms",
)


def run(device: str, seconds: float, mode: str, *, quick: bool) -> dict[str, Any]:
    """Runs all cases; returns the document to be written."""
    lengths = SEGMENTS_MS[1:2] if quick else SEGMENTS_MS
    cases = [(what, count, ms) for what in ("quota", "sm") for count in TENANTS for ms in lengths]
    if device == "cuda" and mode != "mps+green":
        cases = [case for case in cases if case[0] == "quota"]
        print(f"SM changes are left out: in mode {mode or '(not given)'} a worker is replaced for them", flush=True)
    results = []
    print("  ".join(COLUMNS), flush=True)
    with House(device, [max(TENANTS)], mode=mode) as house:
        for seed, (what, count, segment_ms) in enumerate(cases):
            result = measure(house, what=what, count=count, segment_ms=segment_ms, seconds=seconds, seed=seed)
            results.append(result)
            values = as_row(result)
            print("  ".join(f"{values[key]:>{len(key)}}" for key in COLUMNS), flush=True)
    return {"device": describe(device), "seconds": seconds, "rows": [as_row(result) for result in results]}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Time until a change of shares is in force.")
    parser.add_argument("--device", default="cpu", choices=DEVICES, help="kind of device (cpu)")
    parser.add_argument("--mode", default="", help="of a cuda device: as its probe found it")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each line (10)")
    parser.add_argument("--quick", action="store_true", help="a few of the cases")
    parser.add_argument("--json", type=Path, help="where the figures go (bench/results/<device>/resize.json)")
    options = parser.parse_args()
    if options.seconds < 1:
        parser.error(f"--seconds: expected at least 1, got {options.seconds:g}")
    document = run(options.device, options.seconds, options.mode, quick=options.quick)
    folder = document["device"] if options.device == "cuda" else options.device
    write(options.json or RESULTS / folder / "resize.json", document)


if __name__ == "__main__":
    main()
