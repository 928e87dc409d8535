"""How few GPUs could hold a set of instances at all, whatever places them.

For equal, empty GPUs with memory M; instance i has SM share s_i per cent (as the device gives it), request q_i per
mille and memory m_i. Three things are never more than a GPU has, each gives a bound, and the largest counts:

    volume   sum(s_i q_i) / (100 * 1000)    SM-time
    memory   sum(m_i) / M
    widths   rows of one SM share hold 1000 per mille each, and the rows of a GPU 100 per cent: instances of share s
             need at least B(q; 1000) rows of width s, and all these rows at least B(widths; 100) GPUs

B is the bound of Martello and Toth for bin packing (L2 in "Knapsack Problems", 1990, section 8.3). For a threshold t,
items larger than C - t share a bin with none of those of at least t, nor do two items larger than C / 2; what the
latter leave free is all that smaller ones of at least t find beside new bins. It is never below the sum, and counts
what the sum can't see: three items of 60 % need three bins. Memory is bounded so too.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation


@dataclass(frozen=True, slots=True)
class GpuBound:
    """The least number of GPUs, by what makes it so."""

    volume: int
    """By SM-time alone."""
    memory: int
    widths: int
    """By rows of whole width."""

    @property
    def gpus(self) -> int:
        """The largest of them."""
        return max(self.volume, self.memory, self.widths)


def fewest_gpus(allocations: Iterable[Allocation], memory_bytes: int) -> GpuBound:
    """Returns bounds on the GPUs that hold the allocations.

    Args:
        allocations: With SM shares as the device gives them.
        memory_bytes: Of one GPU; what needs more than that is counted as if it filled one.
    """
    wanted = list(allocations)
    requests: dict[int, list[int]] = {}
    for allocation in wanted:
        requests.setdefault(allocation.sm_pct, []).append(allocation.request_permille)
    widths = [s for s, of_share in requests.items() for _ in range(fewest_bins(of_share, WHOLE_PERMILLE))]
    sm_time = sum(allocation.sm_pct * allocation.request_permille for allocation in wanted)
    return GpuBound(
        volume=math.ceil(sm_time / (WHOLE_PCT * WHOLE_PERMILLE)),
        memory=fewest_bins([min(a.memory_bytes, memory_bytes) for a in wanted], memory_bytes),
        widths=fewest_bins(widths, WHOLE_PCT),
    )


def fewest_bins(sizes: Sequence[int], capacity: int) -> int:
    """Returns the bound L2 of Martello and Toth; `sizes` are 0..capacity. The bound of no items is 0."""
    items = sorted(sizes)
    sums = [0, *accumulate(items)]
    half = bisect_right(items, capacity // 2)  # those from here on are larger than half a bin
    best = -(-sums[-1] // capacity)
    for threshold in {0, *items[:half]}:
        too_large = bisect_right(items, capacity - threshold)
        first = bisect_left(items, threshold)
        large = max(half, min(too_large, len(items)))
        # Those in (half, too_large] have room left, those in [first, half) want it.
        left = (large - half) * capacity - (sums[large] - sums[half])
        small = sums[half] - sums[first] if first < half else 0
        best = max(best, len(items) - half + max(0, -(-(small - left) // capacity)))
    return best
