"""Whether arrivals keep their distance, or come at random: a sequential test of neighbouring counts.

Of n items in two neighbouring bins of T0 and T1 seconds, a Poisson process puts Binomial(n, T1 / (T0 + T1)) into the
second; one that keeps its distance puts about n T1 / (T0 + T1) there, save where its rate steps. Each bin adds the
logarithm of how much likelier what it shows is under the second than under the first (Wald's sequential test), bounded
on both sides so that a change of the load shows within a few bins. Where two bins did not agree, the next is not
compared: the step fell into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

_ITEMS_A_BIN = 2.0
_SHORTEST_BIN_S, _LONGEST_BIN_S = 0.25, 5.0
_FEWEST_COMPARED = 4
"""Items of two bins that tell anything of their distances."""
_AGREES_IF_SPACED = 0.9
"""Part of the bins that agree with the one before, if arrivals keep their distance (real clients jitter)."""
_NEAR = 0.75
"""Bins of even arrivals differ by one item at most: each is half an item from the mean. Bins are not equally long."""
_EVIDENCE_BEYOND = 3.0
"""So much beyond what is enough evidence is remembered."""


@dataclass(frozen=True, slots=True)
class Spacing:
    """What is known of the distances of one function's arrivals."""

    start_s: float | None = None
    """Of the bin that is being filled; None: it begins with the next count."""
    total: int = 0
    """Of arrivals at its start."""
    bin_s: float = _SHORTEST_BIN_S
    """Its length."""
    before: tuple[float, float] | None = None
    """(items, seconds) of the bin before it; None: it is not compared."""
    evidence: float = 0.0
    """Logarithm of how much likelier the bins are if arrivals keep their distance than if they are Poisson, bounded."""
    regular: bool = False
    """Whether that was enough, and has not turned into its opposite since."""

    def restarted(self) -> Spacing:
        """Returns it for totals that begin anew."""
        return replace(self, start_s=None, before=None)

    def counted(self, total: int, now_s: float, enough: float) -> Spacing:
        """Returns it with a newer total of arrivals; `enough` is the evidence asked for."""
        if self.start_s is None:
            return replace(self, start_s=now_s, total=total)
        seconds = now_s - self.start_s
        if seconds < self.bin_s - 1e-6:
            return self
        items = float(total - self.total)
        bin_s = min(max(_ITEMS_A_BIN * seconds / max(items, 1e-6), _SHORTEST_BIN_S), _LONGEST_BIN_S)
        before, evidence, regular = self._judged(items, seconds, enough)
        return Spacing(now_s, total, bin_s, before, evidence, regular)

    def _judged(self, items: float, seconds: float, enough: float) -> tuple[tuple[float, float] | None, float, bool]:
        """Returns `before`, `evidence` and `regular` as they are after a bin."""
        if self.before is None:
            return (items, seconds), self.evidence, self.regular
        count, part = round(items + self.before[0]), seconds / (seconds + self.before[1])
        if count < _FEWEST_COMPARED:
            return (items, seconds), self.evidence, self.regular
        by_chance = _near_by_chance(count, round(part, 3))
        agrees = abs(items - count * part) <= _NEAR + 1e-9
        if agrees:
            weight = math.log(_AGREES_IF_SPACED / by_chance)
        else:
            weight = math.log((1 - _AGREES_IF_SPACED) / max(1e-3, 1 - by_chance))
        most = enough + _EVIDENCE_BEYOND
        evidence = min(most, max(-most, self.evidence + weight))
        regular = evidence >= (0.0 if self.regular else enough)
        return (items, seconds) if agrees else None, evidence, regular


@lru_cache(maxsize=4096)
def _near_by_chance(count: int, part: float) -> float:
    """P(Binomial(count, part) lies within _NEAR of its mean)."""
    mean, total = count * part, 0.0
    for k in range(max(0, math.ceil(mean - _NEAR - 1e-9)), min(count, math.floor(mean + _NEAR + 1e-9)) + 1):
        log = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        total += math.exp(log + k * math.log(part) + (count - k) * math.log(1 - part))
    return max(1e-3, total)
