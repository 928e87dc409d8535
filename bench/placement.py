"""How many GPUs placement uses, against the fewest that could do; what spreading and moves are worth; its times.

    python bench/placement.py --json bench/results/placement.json

Instances are drawn from named distributions of (SM share, request, memory); GPUs have 80 GiB, any SM share, and stand 8
to a node. `online`: placed one by one as they come. `batch`: all wait, and one pass places them in its own order. Both
are `hasgpu_core.policy.placement.Room`, which the scheduler uses. The bound is `fewest_gpus`; `volume` is the part of
it that sums alone give. Times are of this process's processor, on whatever machine this runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from hasgpu_core.events import DesiredInstance, HorizontalScaleEvent, NodeEvent, PlannedInstance
from hasgpu_core.policy.placement import NO_TIES, Placement, Room, Ties, placing_order
from hasgpu_core.policy.placement.bounds import fewest_gpus
from hasgpu_core.policy.placement.migration import Bound, free_gpu
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState
from hasgpu_scheduler.core import SchedulerCore

OUT = pathlib.Path(__file__).parent / "results" / "placement.json"
GIB = 1 << 30
GPU_BYTES = 80 * GIB
RUNGS = tuple(range(1, 101))
PER_NODE = 8
Draw = Callable[[random.Random], tuple[int, int, float]]
"""SM share in per cent, request in per mille, memory in GiB."""

DISTRIBUTIONS: dict[str, tuple[str, Draw]] = {
    "any": (
        "SM 1..100 %, request 10..1000 per mille, 0.5..4 GiB, all uniform",
        lambda r: (r.randint(1, 100), r.randint(10, 1000), r.uniform(0.5, 4)),
    ),
    "steps": (
        "SM in steps of 5 %, request in steps of 100 per mille, 0.5..4 GiB",
        lambda r: (5 * r.randint(1, 20), 100 * r.randint(1, 10), r.uniform(0.5, 4)),
    ),
    "small": (
        "SM 5..30 % in steps of 5, request 10..600 in steps of 10, 0.5..2 GiB",
        lambda r: (5 * r.randint(1, 6), 10 * r.randint(1, 60), r.uniform(0.5, 2)),
    ),
    "serving": (
        "what the hybrid policy plans: few SM shares, many small requests and a few whole ones, 0.5..4 GiB",
        lambda r: (
            r.choice((5, 10, 15, 20, 25, 30, 40, 50)),
            r.choice((11, 20, 50, 100, 200, 300, 400, 500, 600, 800, 1000)),
            r.choice((0.5, 1, 2, 4)),
        ),
    ),
    "memory": (
        "SM 5..40 % in steps of 5, request 100..600, 4..40 GiB: memory decides",
        lambda r: (5 * r.randint(1, 8), 100 * r.randint(1, 6), r.uniform(4, 40)),
    ),
    "wide": (
        "SM 20..80 %, request 100..900, 0.5..8 GiB: few rows fit on a GPU",
        lambda r: (r.randint(20, 80), r.randint(100, 900), r.uniform(0.5, 8)),
    ),
}


def gpus(count: int) -> list[DeviceState]:
    """Empty GPUs, 8 to a node."""
    return [
        DeviceState(DeviceInfo(f"n{i // PER_NODE:04}", f"g{i % PER_NODE}", "m", "emulated", GPU_BYTES, RUNGS))
        for i in range(count)
    ]


def drawn(name: str, count: int, rng: random.Random) -> list[Allocation]:
    """Random allocations."""
    draw = DISTRIBUTIONS[name][1]
    return [Allocation(sm, request, 1000, round(gib * GIB)) for sm, request, gib in (draw(rng) for _ in range(count))]


def place_all(wanted: Iterable[Allocation], devices: Sequence[DeviceState]) -> tuple[Room, list[Placement]]:
    """Places one after the other; every one has to fit."""
    room, places = Room(devices), []
    for allocation in wanted:
        found = room.place(allocation)
        if not isinstance(found, Placement):
            raise SystemExit(f"the bench has too few GPUs: {found.reason}")
        room.occupy(found.node, found.gpu, found.row, allocation)
        places.append(found)
    return room, places


def density(name: str, count: int, seeds: Sequence[int]) -> dict[str, object]:
    """GPUs used over the bound, online and as a batch; the worst of the seeds and the mean."""
    runs = []
    for seed in seeds:
        wanted = drawn(name, count, random.Random(f"{name}-{seed}"))
        bound = fewest_gpus(wanted, GPU_BYTES)
        devices = gpus(bound.gpus * 5 // 4 + 8)
        order = sorted(wanted, key=lambda a: placing_order(a, "", standby=False, memory_bytes=GPU_BYTES))
        used = {"online": place_all(wanted, devices)[0].gpus_used, "batch": place_all(order, devices)[0].gpus_used}
        sums = max(bound.volume, -(-sum(a.memory_bytes for a in wanted) // GPU_BYTES))
        runs.append({"seed": seed, **used, "bound": bound.gpus, "volume": sums, "bound_over_volume": bound.gpus / sums})
    ratios = {
        f"{order}_over_{against}": {
            "mean": round(statistics.fmean(run[order] / run[against] for run in runs), 4),
            "worst": round(max(run[order] / run[against] for run in runs), 4),
        }
        for order in ("online", "batch")
        for against in ("bound", "volume")
    }
    return {"of": DISTRIBUTIONS[name][0], "instances": count, **ratios, "runs": runs}


def spreading(count: int, each: int, seed: int) -> dict[str, object]:
    """Functions of several instances, with and without the rule: GPUs used, functions that a node's loss interrupts."""
    out: dict[str, object] = {"functions": count, "instances_each": each}
    for rule in (False, True):
        rng = random.Random(seed)
        shares = {f"f{i}": drawn("serving", 1, rng)[0] for i in range(count)}
        room, nodes = Room(gpus(1000)), dict[str, dict[str, int]]()
        for name in (name for name in shares for _ in range(each)):
            others = nodes.setdefault(name, {})
            found = room.place(shares[name], Ties(others) if rule else NO_TIES)
            assert isinstance(found, Placement), found
            room.occupy(found.node, found.gpu, found.row, shares[name])
            others[found.node] = others.get(found.node, 0) + 1
        on_one = sum(1 for others in nodes.values() if len(others) == 1)
        out["spread" if rule else "tightest"] = {
            "gpus": room.gpus_used,
            "functions_on_one_node": on_one,
            "functions_on_one_node_part": round(on_one / count, 4),
        }
    return out


def defragmenting(name: str, count: int, leave_part: float, seed: int) -> dict[str, object]:
    """Places, lets a part go at random, then frees GPU after GPU as the scheduler would, until no plan is found."""
    rng = random.Random(seed)
    wanted = drawn(name, count, rng)
    devices = gpus(fewest_gpus(wanted, GPU_BYTES).gpus * 5 // 4 + 8)
    room, places = place_all(wanted, devices)
    bound: list[Bound] = []
    before = room.gpus_used
    for number, (allocation, place) in enumerate(zip(wanted, places, strict=True)):
        if rng.random() < leave_part:
            room.release(place.node, place.gpu, place.row, allocation)
        else:
            planned = PlannedInstance("f", f"f-{number}", place.gpu, place.row, allocation, 1)
            bound.append(Bound(place.node, planned, "m"))
    left, moves_count = room.gpus_used, 0
    by_id = {b.planned.instance: b for b in bound}
    while plan := free_gpu(
        room.states(),
        by_id.values(),
        pinned=(),
        headroom_permille=100,
        most_moves=16,
        ties_of=lambda _: NO_TIES,
    ):
        for move in plan.moves:
            old, share = move.bound, move.bound.planned.allocation
            room.occupy(move.to.node, move.to.gpu, move.to.row, share)
            room.release(old.node, old.planned.gpu, old.planned.row, share)
            entry = PlannedInstance("f", old.planned.instance, move.to.gpu, move.to.row, share, 1)
            by_id[entry.instance] = Bound(move.to.node, entry, "m")
            moves_count += 1
    kept = fewest_gpus([b.planned.allocation for b in bound], GPU_BYTES).gpus
    return {
        "of": DISTRIBUTIONS[name][0],
        "instances": count,
        "left_part": leave_part,
        "gpus_full": before,
        "gpus_after_leaving": left,
        "gpus_after_moves": room.gpus_used,
        "bound": kept,
        "moves": moves_count,
        "over_bound_before": round(left / kept, 4),
        "over_bound_after": round(room.gpus_used / kept, 4),
    }


def times(functions: int, gpu_count: int) -> dict[str, object]:
    """Processor time of a pass of the scheduler: all new; nothing to do, twice; after the loss of a node."""
    rng = random.Random(7)
    wanted = drawn("serving", functions, rng)
    started_s = time.process_time()
    place_all(
        sorted(wanted, key=lambda a: placing_order(a, "", standby=False, memory_bytes=GPU_BYTES)), gpus(gpu_count)
    )
    out: dict[str, object] = {"functions": functions, "gpus": gpu_count}
    out["place_s"] = round(time.process_time() - started_s, 3)
    core = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
    core.load((), (), 0.0)
    core.heard(0.0)
    infos: dict[str, list[DeviceInfo]] = {}
    for state in gpus(gpu_count):
        infos.setdefault(state.info.node, []).append(state.info)
    for node, devices in infos.items():
        core.on_node(NodeEvent(node, f"{node}:1", tuple(devices), 0, 0), 0.0)
    for number, share in enumerate(wanted):
        core.accept(
            HorizontalScaleEvent(f"f{number}", 1, (DesiredInstance(f"f{number}-0", share),), "bench", 0, 1), 0.0
        )
    for name, now_s in (
        ("pass_all_new_s", 1.0),
        ("pass_nothing_to_do_s", 2.0),
        ("pass_nothing_new_s", 2.2),
        ("pass_node_lost_s", 2.5),
    ):
        if name == "pass_node_lost_s":
            core.on_node_gone("n0000")
        core.heard(now_s)
        started_s = time.process_time()
        result = core.decide(now_s, fencing_token=1)
        out[name] = round(time.process_time() - started_s, 3)
        for plan in result.plans:
            core.commit(plan)
    out["unplaced"] = len(core.unplaced)
    return out


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=OUT, help="where to write [%(default)s]")
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, object] = {"density": {}, "defragmenting": []}
    table: dict[str, object] = {}
    for name in DISTRIBUTIONS:
        table[name] = row = density(name, arguments.instances, range(arguments.seeds))
        print(
            f"{name:>8}: " + ", ".join(f"{k} {v['worst']}" for k, v in row.items() if isinstance(v, dict)), flush=True
        )
    found["density"] = table
    found["spreading"] = spreading(1000, 3, 1)
    print("spreading:", found["spreading"], flush=True)
    found["defragmenting"] = [defragmenting(name, 600, 0.5, 1) for name in ("serving", "steps", "wide")]
    for item in found["defragmenting"]:  # type: ignore[attr-defined]  # a list, made in the line before
        print("defragmenting:", item, flush=True)
    found["times"] = [times(10_000, 1_000), times(10_000, 1_200)]
    print("times:", found["times"])
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
