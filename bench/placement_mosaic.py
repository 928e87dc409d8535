"""Draws GPUs as mosaics of rows, before and after moves have freed some: docs/placement-mosaic.svg.

    python bench/placement_mosaic.py docs/placement-mosaic.svg

A box is a GPU: its width is the SMs, its height the time. A column is a row (an SM range), a tile in it an instance and
its request; one colour is one function.
"""

from __future__ import annotations

import argparse
import pathlib
import random
from collections.abc import Iterable

from hasgpu_core.events import PlannedInstance
from hasgpu_core.policy.placement import Placement, Room, Ties
from hasgpu_core.policy.placement.migration import Bound, free_gpu
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState

GIB = 1 << 30
NODES, PER_NODE, FUNCTIONS = 4, 2, 12
WIDTH, HEIGHT, GAP, LEFT, TOP = 104, 100, 16, 92, 46
HUES = (210, 30, 130, 0, 270, 55, 180, 320, 95, 240, 15, 160)
SEED = 17


def scenario() -> tuple[list[Bound], list[Bound]]:
    """What is bound after instances came and half of them went, and after the scheduler's moves."""
    rng = random.Random(SEED)
    devices = [
        DeviceState(DeviceInfo(f"node{n}", f"gpu{g}", "m", "emulated", 80 * GIB, tuple(range(1, 101))))
        for n in range(NODES)
        for g in range(PER_NODE)
    ]
    room, bound = Room(devices), dict[str, Bound]()
    shares = [Allocation(rng.choice((20, 25, 30, 40)), 100 * rng.randint(2, 8), 1000, GIB) for _ in range(FUNCTIONS)]
    for ordinal in range(8):
        for number, share in enumerate(shares):
            others: dict[str, int] = {}
            for item in bound.values():
                if item.planned.function == f"f{number}":
                    others[item.node] = others.get(item.node, 0) + 1
            found = room.place(share, Ties(others))
            if isinstance(found, Placement):
                room.occupy(found.node, found.gpu, found.row, share)
                entry = PlannedInstance(f"f{number}", f"f{number}-{ordinal}", found.gpu, found.row, share, 1)
                bound[entry.instance] = Bound(found.node, entry, "m")
    for instance in [name for name in bound if rng.random() < 0.6]:
        gone = bound.pop(instance)
        room.release(gone.node, gone.planned.gpu, gone.planned.row, gone.planned.allocation)
    before = list(bound.values())
    while plan := free_gpu(
        room.states(),
        bound.values(),
        pinned=(),
        headroom_permille=100,
        most_moves=16,
        ties_of=lambda item: Ties(_others(bound.values(), item)),
    ):
        for move in plan.moves:
            old = move.bound.planned
            room.occupy(move.to.node, move.to.gpu, move.to.row, old.allocation)
            room.release(move.bound.node, old.gpu, old.row, old.allocation)
            entry = PlannedInstance(old.function, old.instance, move.to.gpu, move.to.row, old.allocation, 1)
            bound[old.instance] = Bound(move.to.node, entry, "m")
    return before, list(bound.values())


def _others(bound: Iterable[Bound], item: Bound) -> dict[str, int]:
    out: dict[str, int] = {}
    for other in bound:
        if other.planned.function == item.planned.function and other.planned.instance != item.planned.instance:
            out[other.node] = out.get(other.node, 0) + 1
    return out


def svg(before: list[Bound], after: list[Bound]) -> str:
    """The picture: a line of GPUs each."""
    gpus = [(f"node{n}", f"gpu{g}") for n in range(NODES) for g in range(PER_NODE)]
    full_width = LEFT + len(gpus) * (WIDTH + GAP)
    full_height = TOP + 2 * (HEIGHT + 64)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full_width} {full_height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{full_width}" height="{full_height}" fill="#fff"/>',
    ]
    for line, (title, bound) in enumerate((("before", before), ("after moves", after))):
        top = TOP + line * (HEIGHT + 64)
        used = len({item.device for item in bound})
        parts.append(f'<text x="8" y="{top + 46}" font-weight="600">{title}</text>')
        parts.append(f'<text x="8" y="{top + 64}" fill="#555">{used} GPUs used</text>')
        for number, gpu in enumerate(gpus):
            parts += _gpu(LEFT + number * (WIDTH + GAP), top, gpu, [item for item in bound if item.device == gpu])
    parts.append(
        f'<text x="{LEFT}" y="{full_height - 14}" fill="#555">width: SMs, 0 to 100 %; height: device time, 0 to 100 %; '
        "a column is a row, a tile an instance, a colour a function</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _gpu(x: float, y: float, gpu: tuple[str, str], bound: list[Bound]) -> list[str]:
    """One GPU: its rows from the left, the instances of each from below."""
    edge = "#333" if bound else "#bbb"
    out = [
        f'<text x="{x}" y="{y - 6}" fill="{edge}">{gpu[0]}/{gpu[1]}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="#f4f4f4" stroke="{edge}"/>',
    ]
    rows: dict[int, list[PlannedInstance]] = {}
    for item in bound:
        rows.setdefault(item.planned.row, []).append(item.planned)
    at = x
    for index in sorted(rows):
        width = WIDTH * rows[index][0].allocation.sm_pct / 100
        foot = y + HEIGHT
        for planned in sorted(rows[index], key=lambda p: p.instance):
            height = HEIGHT * planned.allocation.request_permille / 1000
            foot -= height
            hue = HUES[int(planned.function[1:]) % len(HUES)]
            out.append(
                f'<rect x="{at:.1f}" y="{foot:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="hsl({hue} 55% 68%)" stroke="#fff"><title>{planned.instance}</title></rect>'
            )
            out.append(f'<text x="{at + 3:.1f}" y="{foot + 11:.1f}" font-size="9">{planned.instance}</text>')
        out.append(
            f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" fill="none" stroke="#999" '
            'stroke-dasharray="2 2"/>'
        )
        at += width
    return out


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.out.write_text(svg(*scenario()))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
