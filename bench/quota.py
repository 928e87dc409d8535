"""How exactly a quota is kept: asked against effective share of the device.

Tenants are processes that run a matrix product in segments of about 5 ms, always have work, and pass the same gate with
the same control block and device backend as a worker. The tested tenant's device time is compared with the wall clock,
alone in its row, with two saturating tenants that share the rest of the row, and alone beside a second busy row.

    python bench/quota.py [--device cpu] [--seconds 5] [--json bench/results/cpu/quota.json]

On a busy host a row delivers less than the wall clock has: `delivered_permille` says how much, `of_row_permille` which
part of that the tested tenant got.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasgpu_device.backends.cpu import CpuBackend, probe
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner

QUOTAS_PERMILLE = (100, 200, 300, 500, 800)
PAIR_QUOTAS_PERMILLE = (200, 500)
SEGMENT_MS = 5.0
SETTLE_S = 0.5
SAMPLE_S = 1.0
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked."""

    tenants: int
    """In the tested tenant's row."""
    rows: int
    quota_permille: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    tenants: int
    rows: int
    segment_ms: float
    """Mean device time of a segment."""
    quota_permille: int
    limit_permille: int
    got_permille: float
    """Device time of the tested tenant by the wall clock."""
    error_pct: float
    """Of it against the quota, relative."""
    of_row_permille: float
    """Of it against what its row delivered to all."""
    delivered_permille: float
    """What its row delivered, by the wall clock."""
    spread_points: float
    """Standard deviation of the shares in samples of 1 s, in points of per cent."""
    longest_wait_ms: float
    """Of the tested tenant at the gate."""
    overhead_pct: float
    """CPU time that the tested tenant spent beside its segments (gate, counters), relative to them."""


def tenant(folder: Path, gate: Path, cores: float) -> None:
    """A tenant process: runs or idles as told on standard input; `report` prints what happened since the last one."""
    import torch

    backend = CpuBackend(cores, nice=0)
    backend.setup()
    control = ControlBlock.open(folder)
    matrix = torch.randn(192, 192)
    commands: list[str] = []
    threading.Thread(target=lambda: commands.extend(iter(sys.stdin.readline, "")), daemon=True).start()
    running = False
    longest_wait_ns = 0
    used_ns = segments = 0
    cpu_from_ns = time.thread_time_ns()

    def work() -> None:
        while backend.running_ns() < SEGMENT_MS * 1e6:
            torch.mm(matrix, matrix)

    with GateMember(gate, control.read_shares()) as member:
        runner = SegmentRunner(backend, member, control)
        print("ready", flush=True)
        while True:
            while commands:
                command = commands.pop(0).strip()
                if command == "report":
                    overhead_ns = time.thread_time_ns() - cpu_from_ns - used_ns
                    print(json.dumps([longest_wait_ns, overhead_ns / max(1, used_ns), used_ns / max(1, segments)]))
                    sys.stdout.flush()
                    longest_wait_ns = used_ns = segments = 0
                    cpu_from_ns = time.thread_time_ns()
                running = command == "run" or (running and command == "report")
            if not running:
                if runner.lingers:
                    runner.withdraw()
                runner.poll()
                time.sleep(0.005)
                continue
            _, run = runner.run(work, linger=lambda: not commands)
            longest_wait_ns = max(longest_wait_ns, run.gate_wait_ns)
            used_ns += run.device_ns
            segments += run.segments_count


class Tenant:
    """A tenant process and its control block, as the agent would hold it."""

    def __init__(self, folder: Path, name: str, gate: Path, cores: float) -> None:
        self.control = ControlBlock.create(folder / name, Shares(10, 10))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--tenant", str(folder / name), str(gate), str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, command: str) -> None:
        """Sends a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Reads an answer; SystemExit when the process has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a tenant ended with code {self.process.wait()}")
        return line.strip()

    def set_shares(self, shares: Shares) -> None:
        """Changes the shares and waits until they are in force."""
        epoch = self.control.write_shares(shares)
        while self.control.read_counters().applied_epoch < epoch:
            if self.process.poll() is not None:
                raise SystemExit(f"a tenant ended with code {self.process.returncode}")
            time.sleep(0.002)

    def used_ns(self) -> int:
        """Returns its device time so far."""
        return self.control.read_counters().used_ns

    def edge(self) -> tuple[int, int]:
        """Waits for the end of a segment; returns the time and the device time then."""
        before = self.used_ns()
        give_up_ns = time.monotonic_ns() + 2_000_000_000
        while (used_ns := self.used_ns()) == before and time.monotonic_ns() < give_up_ns:
            time.sleep(0.0005)
        return time.monotonic_ns(), used_ns

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.control.close()


def measure(case: Case, row: list[Tenant], beside: Tenant, *, sm_pct: int, seconds: float) -> Result:
    """Runs one case."""
    tested, others = row[0], row[1 : case.tenants]
    rest = 1_000 - case.quota_permille
    tested.set_shares(Shares(case.quota_permille, case.quota_permille, sm_pct))
    for index, other in enumerate(others):
        # Only the quotient matters to the others; the remainder goes to the first.
        part = rest // len(others) + (rest % len(others) if index == 0 else 0)
        other.set_shares(Shares(part, part, sm_pct))
    active = [tested, *others]
    if case.rows > 1:
        beside.set_shares(Shares(1_000, 1_000, sm_pct))
        active.append(beside)
    for one in active:
        one.say("run")
    time.sleep(SETTLE_S)
    tested.say("report")
    tested.hear()
    delivered_from_ns = sum(one.used_ns() for one in row)
    began_ns, used_from_ns = tested.edge()
    sample_at, sample_used = began_ns, used_from_ns
    samples = []
    while time.monotonic_ns() - began_ns < (seconds - SAMPLE_S / 2) * 1e9:
        time.sleep(SAMPLE_S)
        now_ns, used_ns = time.monotonic_ns(), tested.used_ns()
        samples.append(100 * (used_ns - sample_used) / (now_ns - sample_at))
        sample_at, sample_used = now_ns, used_ns
    ended_ns, used_to_ns = tested.edge()
    delivered_ns = sum(one.used_ns() for one in row) - delivered_from_ns
    tested.say("report")
    longest_wait_ns, overhead, segment_ns = json.loads(tested.hear())
    for one in active:
        one.say("idle")
    elapsed_ns = ended_ns - began_ns
    got_permille = 1_000 * (used_to_ns - used_from_ns) / elapsed_ns
    return Result(
        tenants=case.tenants,
        rows=case.rows,
        segment_ms=round(segment_ns / 1e6, 3),
        quota_permille=case.quota_permille,
        limit_permille=case.quota_permille,
        got_permille=round(got_permille, 2),
        error_pct=round(100 * (got_permille / case.quota_permille - 1), 2),
        of_row_permille=round(1_000 * (used_to_ns - used_from_ns) / max(1, delivered_ns), 1),
        delivered_permille=round(1_000 * delivered_ns / elapsed_ns, 1),
        spread_points=round(statistics.stdev(samples), 2) if len(samples) > 1 else 0.0,
        longest_wait_ms=round(longest_wait_ns / 1e6, 2),
        overhead_pct=round(100 * overhead, 2),
    )


def run(seconds: float) -> dict[str, Any]:
    """Runs all cases; returns the document to be written."""
    device = probe("bench")
    cores = float(device.model.removeprefix("cpu-").removesuffix("c"))
    sm_pct = 50 if cores >= 2 else 100
    cases = [Case(tenants, 1, quota) for tenants in (1, 3) for quota in QUOTAS_PERMILLE]
    if sm_pct == 50:
        cases += [Case(1, 2, quota) for quota in PAIR_QUOTAS_PERMILLE]
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        folder = Path(name)
        gates = [folder / f"row{index}.gate" for index in range(2)]
        for gate in gates:
            RowGate.create(gate).close()
        tenants = [Tenant(folder, f"tenant{index}", gates[index // 3], cores) for index in range(4)]
        try:
            for one in tenants:
                one.hear()
            results = []
            print_header()
            for case in cases:
                results.append(measure(case, tenants[:3], tenants[3], sm_pct=sm_pct, seconds=seconds))
                print_row(results[-1])
        finally:
            for one in tenants:
                one.close()
    return {
        "device": device.model,
        "seconds": seconds,
        "sm_pct": sm_pct,
        "window_ms": Shares(1, 1).window_ns / 1e6,
        "capabilities": list(device.capabilities),
        "rows": [asdict(result) for result in results],
    }


COLUMNS = (
    ("tenants", "tenants"),
    ("rows", "rows"),
    ("asked ‰", "quota_permille"),
    ("got ‰", "got_permille"),
    ("error %", "error_pct"),
    ("of row ‰", "of_row_permille"),
    ("row gave ‰", "delivered_permille"),
    ("spread pt", "spread_points"),
    ("longest wait ms", "longest_wait_ms"),
    ("segment ms", "segment_ms"),
    ("overhead %", "overhead_pct"),
)


def print_header() -> None:
    """Prints the table's head."""
    print("  ".join(title for title, _ in COLUMNS), flush=True)


def print_row(result: Result) -> None:
    """Prints a line of the table."""
    values = asdict(result)
    print("  ".join(f"{values[key]:>{len(title)}}" for title, key in COLUMNS), flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Asked against effective share of device time.")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="kind of device (cpu)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each line (5)")
    parser.add_argument("--json", type=Path, help="where the figures go (bench/results/<device>/quota.json)")
    parser.add_argument("--tenant", nargs=3, metavar=("CONTROL", "GATE", "CORES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tenant:
        tenant(Path(options.tenant[0]), Path(options.tenant[1]), float(options.tenant[2]))
        return
    if options.seconds < 1:
        parser.error(f"--seconds: expected at least 1, got {options.seconds:g}")
    document = run(options.seconds)
    path = options.json or RESULTS / options.device / "quota.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
