"""Draws what really ran when, for `docs/sharing.md`: tenants of one row, segment by segment.

    python bench/timeline.py [--device cpu] [--out docs]

Writes `sharing-window.svg` (three tenants with requests of 50, 30 and 20 %, all busy), `sharing-lending.svg` (a tenant
with a request of 10 % and a limit of 100 %, and another that comes and goes) and `sharing-resize.svg` (a quota of 20 %
becomes 60 % while another goes from 70 to 30 %), each from a run of its own, and prints the shares it saw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hasgpu_device.control import DEFAULT_WINDOW_NS, Shares
from tenants import DEVICES, House, Tenant

COLOURS = ("#2a78d6", "#1f9e76", "#c9752b")
LENT = "0.45"
WIDTH, LANE, LEFT, TOP = 960, 34, 150, 34
SEGMENT_NS = 3_000_000


@dataclass(frozen=True, slots=True)
class Lane:
    """What one tenant did."""

    label: str
    log: Sequence[tuple[int, int, int, bool]]


def draw(lanes: Sequence[Lane], *, from_ns: int, windows: int, title: str, mark: tuple[int, str] | None) -> str:
    """Returns a drawing of `windows` windows; times are the host's, `mark` a moment and what happened then."""
    span_ns = windows * DEFAULT_WINDOW_NS
    height = TOP + LANE * len(lanes) + 44

    def x(at_ns: int) -> float:
        return LEFT + (WIDTH - LEFT - 16) * min(max(0, at_ns - from_ns), span_ns) / span_ns

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13" role="img"><title>{title}</title>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    bottom = TOP + LANE * len(lanes)
    for index in range(windows + 1):
        at = x(from_ns + index * DEFAULT_WINDOW_NS)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{bottom + 4}" stroke="#c8c8c8"/>')
        label = f"{index * DEFAULT_WINDOW_NS // 1_000_000} ms"
        anchor = "end" if index == windows else "middle"
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="{anchor}" fill="#555">{label}</text>')
    for index, lane in enumerate(lanes):
        y = TOP + LANE * index
        parts.append(f'<text x="{LEFT - 10}" y="{y + 21}" text-anchor="end" fill="#222">{lane.label}</text>')
        for start_ns, end_ns, _, borrowed in lane.log:
            if end_ns <= from_ns or start_ns >= from_ns + span_ns:
                continue
            opacity = f' fill-opacity="{LENT}"' if borrowed else ""
            parts.append(
                f'<rect x="{x(start_ns):.1f}" y="{y + 4}" width="{max(0.6, x(end_ns) - x(start_ns) - 0.4):.1f}" '
                f'height="{LANE - 10}" fill="{COLOURS[index % len(COLOURS)]}"{opacity}/>'
            )
    if mark is not None:
        at = x(mark[0])
        parts.append(
            f'<line x1="{at:.1f}" y1="{TOP - 10}" x2="{at:.1f}" y2="{bottom + 4}" stroke="#b02a2a" '
            f'stroke-width="2" stroke-dasharray="4 3"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{TOP - 14}" text-anchor="middle" fill="#b02a2a">{mark[1]}</text>')
    parts.append(
        f'<text x="{LEFT}" y="{bottom + 38}" fill="#555">each bar is a segment that ran; pale: borrowed; '
        f"lines: windows of {DEFAULT_WINDOW_NS // 1_000_000} ms</text></svg>\n"
    )
    return "\n".join(parts)


def collect(tenants: Sequence[Tenant], labels: Sequence[str]) -> list[Lane]:
    """Stops the tenants and returns what they did."""
    for tenant in tenants:
        tenant.say("idle")
    time.sleep(0.3)
    return [Lane(label, tenant.report()["log"]) for tenant, label in zip(tenants, labels, strict=False)]


def shares(lanes: Sequence[Lane], from_ns: int, to_ns: int) -> str:
    """Returns what each tenant had of a stretch of time, in words."""
    parts = []
    for lane in lanes:
        used = sum(device for start, end, device, _ in lane.log if from_ns <= start and end <= to_ns)
        parts.append(f"{lane.label}: {100 * used / (to_ns - from_ns):.1f} %")
    return ", ".join(parts)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Draws segments that really ran.")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    options = parser.parse_args()
    with House(options.device, [3]) as house:
        row, pct = house.rows[0], house.whole_pct
        for tenant, quota in zip(row, (500, 300, 200), strict=True):
            tenant.set_shares(Shares(quota, quota, pct))
            tenant.say("run", segment_ns=SEGMENT_NS)
        time.sleep(1.5)
        lanes = collect(row, ["50 %", "30 %", "20 %"])
        end = max(end for _, end, *_ in lanes[0].log)
        start = end - 700_000_000
        print("window:", shares(lanes, start, start + 400_000_000))
        picture = draw(lanes, from_ns=start, windows=4, title="Three busy tenants of one row", mark=None)
        (options.out / "sharing-window.svg").write_text(picture)

        row[0].set_shares(Shares(100, 1_000, pct))
        row[1].set_shares(Shares(900, 900, pct))
        row[0].say("run", segment_ns=SEGMENT_NS)
        time.sleep(1.0)
        came = time.time_ns()
        row[1].say("run", segment_ns=SEGMENT_NS)
        time.sleep(0.12)
        row[1].say("idle")
        time.sleep(0.3)
        lanes = collect(row[:2], ["10 %, limit 100 %", "90 %"])
        print("lending:", shares(lanes, came, came + 120_000_000))
        picture = draw(
            lanes, from_ns=came - 60_000_000, windows=6, title="Idle time is lent", mark=(came, "the other comes")
        )
        (options.out / "sharing-lending.svg").write_text(picture)

        row[0].set_shares(Shares(200, 200, pct))
        row[1].set_shares(Shares(700, 700, pct))
        for tenant in row[:2]:
            tenant.say("run", segment_ns=SEGMENT_NS)
        time.sleep(1.0)
        changed = time.time_ns()
        row[1].set_shares(Shares(300, 300, pct))
        row[0].set_shares(Shares(600, 600, pct))
        done = time.time_ns()
        time.sleep(0.4)
        lanes = collect(row[:2], ["20 % → 60 %", "70 % → 30 %"])
        print(
            "resize:", shares(lanes, changed - 200_000_000, changed), "; then", shares(lanes, done, done + 300_000_000)
        )
        print(f"resize: shrunk, confirmed and grown after {(done - changed) / 1e6:.1f} ms")
        picture = draw(
            lanes, from_ns=changed - 120_000_000, windows=7, title="A resize", mark=(changed, "shares are written")
        )
        (options.out / "sharing-resize.svg").write_text(picture)


if __name__ == "__main__":
    main()
