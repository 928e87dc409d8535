"""What a sweep measures: its axes, from the command line and from what the function and the device allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hasgpu_core.errors import InvalidError
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, DeviceInfo

DEFAULT_QUOTAS_PERMILLE = (1_000, 500, 200)
SHORTEST_BUDGET_S = 1.0
"""A single point may well take as long."""
LONGEST_BUDGET_S = 600.0
"""Of one run of an agent; a longer sweep is resumed."""
_UNITS_S = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0}

Cell = tuple[int, int, int]
"""(batch, sm_pct, quota_permille)."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The sweep is their product; each is ascending."""

    batches: tuple[int, ...]
    sm_pcts: tuple[int, ...]
    quotas_permille: tuple[int, ...]

    def cells(self) -> list[Cell]:
        """Returns all configurations."""
        return [(b, s, q) for b in self.batches for s in self.sm_pcts for q in self.quotas_permille]


def parse_budget_s(text: str) -> float:
    """Reads a budget as `60s`, `2m`, `1500ms` or plain seconds. Raises InvalidError: no time, or out of bounds."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip())
    if match is None or match[2] not in _UNITS_S:
        raise InvalidError("--budget", expected="a time as 60s, 2m or 1500ms", got=repr(text))
    budget_s = float(match[1]) * _UNITS_S[match[2]]
    if not SHORTEST_BUDGET_S <= budget_s <= LONGEST_BUDGET_S:
        bounds = f"{SHORTEST_BUDGET_S:g}s (a point may take that long) to {LONGEST_BUDGET_S:g}s (a run can be resumed)"
        raise InvalidError("--budget", expected=bounds, got=text.strip())
    return budget_s


def parse_list(option: str, text: str, high: int) -> tuple[int, ...]:
    """Reads whole numbers separated by commas; empty text gives none. Raises InvalidError, naming the option."""
    if not text.strip():
        return ()
    values = []
    for part in text.split(","):
        word = part.strip()
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= high):
            raise InvalidError(option, expected=f"whole numbers of 1..{high}, separated by commas", got=repr(word))
        values.append(int(word))
    return tuple(sorted(set(values)))


def batch_ladder(max_batch: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and the limit itself."""
    return tuple(sorted({*(1 << power for power in range(max_batch.bit_length())), max_batch}))


def make_axes(
    device: DeviceInfo,
    *,
    max_batch: int,
    batches: Sequence[int],
    sm_pcts: Sequence[int],
    quotas_permille: Sequence[int],
) -> Axes:
    """Returns the axes; an empty one is filled with what function and device offer.

    The whole quota is always measured: the other rows of a profile tell little without it.

    Raises:
        InvalidError: A batch above the function's limit, or an SM share that the device can't give.
    """
    if batches and batches[-1] > max_batch:
        raise InvalidError("--batches", expected=f"1..{max_batch}, the function's limit", got=str(batches[-1]))
    rungs = device.sm_rungs_pct or (WHOLE_PCT,)
    if device.sm_granule_pct > 1 and (odd := sorted(set(sm_pcts) - set(rungs))):
        given = ", ".join(map(str, rungs))
        raise InvalidError("--sm", expected=f"shares that {device.gpu} can give ({given})", got=str(odd[0]))
    return Axes(
        tuple(batches) or batch_ladder(max_batch),
        tuple(sm_pcts) or rungs,
        tuple(sorted({*(quotas_permille or DEFAULT_QUOTAS_PERMILLE), WHOLE_PERMILLE})),
    )
