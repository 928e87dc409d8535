"""What a function's arrivals have been, and the rate to plan for: a quantile, the uncertainty of counting in it."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace

from hasgpu_core.policy.hybrid.settings import HybridSettings
from hasgpu_core.policy.hybrid.spacing import Spacing

_FORGET, _FORGET_SLOWLY = 0.97, 0.995
"""By how much older counts weigh less, a bin: the last 33 and the last 200 bins."""
_KNOWN, _LONG_KNOWN = 16.0, 80.0
"""So many items count as Poisson beforehand."""
_BURSTY_ABOVE, _BURSTY_BELOW = 0.35, 0.2
"""Of what is remembered for long, beyond Poisson: 3 and 2 standard deviations of its estimate."""
_ITEMS_A_BIN = 4.0
_SHORTEST_BIN_S, _LONGEST_BIN_S = 0.25, 5.0
_MOST_OF_ITEMS = 2.0
_KEPT_FINE_S = 5.5


@dataclass(slots=True)
class History:
    """Arrivals of one function: totals at the last looks, and the peaks of a longer time.

    A value that nobody changes, save `observe` the new one before it returns it: thousands are made in a pass.
    """

    fine: tuple[tuple[float, int], ...] = ()
    """(time, total so far), oldest first, of the last seconds."""
    peaks: tuple[tuple[float, float], ...] = ()
    """(time, rate in rps): those rates that no later one exceeded, oldest (and largest) first."""
    bursts: tuple[tuple[float, float], ...] = ()
    """The same of rates over a short window, for longer."""
    bin_start_s: float = 0.0
    bin_total: int = 0
    bin_s: float = 0.25
    """Length of the bin that is being filled."""
    bin_rate_rps: float | None = None
    """Of the last whole bin."""
    spread: float = 0.0
    """Discounted sum of squared differences of neighbouring bins, halved."""
    counted: float = 0.0
    """Discounted sum of the items of these bins."""
    long_spread: float = 0.0
    long_counted: float = 0.0
    """The same, discounted less."""
    bursty: bool = False
    """Whether arrivals come in bursts: the counts of the last bins vary so much more than Poisson ones that it can't be
    chance, or those of many bins vary somewhat more; until neither looks like it."""
    spacing: Spacing = field(default_factory=Spacing)
    """Whether arrivals keep their distance."""

    @property
    def dispersion(self) -> float:
        """Variance of counts over their mean: 1 for Poisson arrivals, near 0 for regular ones; 1 while unknown."""
        return self.spread / self.counted if self.counted > 0 else 1.0

    def count(self, now_s: float, window_s: float) -> tuple[float, float]:
        """Returns (items, seconds) of the last stretch of at least so long; (0, window) when little is known."""
        return _count(self.fine, now_s, window_s)

    def peak_rps(self) -> float:
        """Returns the largest rate of the lookback."""
        return self.peaks[0][1] if self.peaks else 0.0

    def burst_rps(self, settings: HybridSettings) -> float:
        """Returns the largest rate of short windows where arrivals come in bursts; 0 where they don't."""
        return self.bursts[0][1] if self.bursts and self.bursty else 0.0


def observe(history: History, total: int | None, now_s: float, settings: HybridSettings) -> History:
    """Returns the history with the newest total in it; unchanged without data."""
    if total is None:
        return history
    fine = history.fine
    if fine and total < fine[-1][1]:
        fine = ()  # a gateway left the sum: totals start anew
        history = replace(history, bin_total=total, bin_start_s=now_s, bin_rate_rps=None)
        history = replace(history, spacing=history.spacing.restarted())
    if fine and now_s <= fine[-1][0]:
        return history
    if not fine:
        history = replace(history, bin_total=total, bin_start_s=now_s)
    drop = 0
    while drop + 2 < len(fine) and fine[drop + 1][0] <= now_s - _KEPT_FINE_S:
        drop += 1
    fine = (*fine[drop:], (now_s, total))
    items, seconds = _count(fine, now_s, settings.rate_window_s)
    # The window is that long even while less of it was seen: a rate of few moments is no peak.
    span_s = max(seconds, settings.rate_window_s)
    rate = (items + settings.quantile_sigmas * math.sqrt(items) * _spread_factor(history)) / span_s
    short_items, short_s = _count(fine, now_s, settings.burst_window_s)
    short_rate = short_items / max(short_s, settings.burst_window_s)
    history = replace(
        history,
        fine=fine,
        spacing=history.spacing.counted(total, now_s, settings.regular_evidence),
        peaks=_peaks(history.peaks, rate, now_s, settings.lookback_s),
        bursts=_peaks(history.bursts, short_rate, now_s, settings.burst_lookback_s),
    )
    _fill_bin(history, total, now_s, settings)
    return history


def _count(fine: tuple[tuple[float, int], ...], now_s: float, window_s: float) -> tuple[float, float]:
    """Returns (items, seconds) of the last stretch of at least so long; (0, window) when little is known."""
    if len(fine) < 2:
        return 0.0, window_s
    at = bisect_right(fine, (now_s - window_s + 1e-9, math.inf)) - 1
    start_s, total = fine[max(at, 0)]
    return float(fine[-1][1] - total), max(fine[-1][0] - start_s, 1e-3)


def _peaks(
    peaks: tuple[tuple[float, float], ...], rate: float, now_s: float, lookback_s: float
) -> tuple[tuple[float, float], ...]:
    """Adds a rate and drops those that it exceeds, and those that are too old."""
    keep = len(peaks)
    while keep and peaks[keep - 1][1] <= rate:
        keep -= 1
    first = 0
    while first < keep and peaks[first][0] < now_s - lookback_s:
        first += 1
    return (*peaks[first:keep], (now_s, rate))


def _spread_factor(history: History) -> float:
    return math.sqrt(min(2.0, max(0.1, history.dispersion)))


def _fill_bin(history: History, total: int, now_s: float, settings: HybridSettings) -> None:
    """Counts by bins that hold a few items each, whose differences tell regular from random arrivals."""
    elapsed_s = now_s - history.bin_start_s
    if elapsed_s < history.bin_s - 1e-6:
        return
    items = float(total - history.bin_total)
    rate = items / elapsed_s
    before = history.bin_rate_rps
    history.bin_start_s = now_s
    history.bin_total = total
    history.bin_s = min(max(_ITEMS_A_BIN / max(rate, 1e-6), _SHORTEST_BIN_S), _LONGEST_BIN_S)
    history.bin_rate_rps = rate
    if before is None:
        return
    # The difference of two counts has twice the variance of one. A step of the rate is no dispersion: it is bounded.
    squared = min((items - before * elapsed_s) ** 2 / 2, _MOST_OF_ITEMS * items)
    history.spread = spread = _FORGET * history.spread + squared
    history.counted = counted = _FORGET * history.counted + items
    history.long_spread = long_spread = _FORGET_SLOWLY * history.long_spread + squared
    history.long_counted = long_counted = _FORGET_SLOWLY * history.long_counted + items
    beyond = 1 + (spread - counted) / (counted + _KNOWN)
    long_beyond = (long_spread - long_counted) / (long_counted + _LONG_KNOWN)
    long_limit = _BURSTY_BELOW if history.bursty else _BURSTY_ABOVE
    limit = settings.bursty_above if settings.lend else settings.bursty_reserved_above
    history.bursty = beyond > limit or long_beyond > long_limit
