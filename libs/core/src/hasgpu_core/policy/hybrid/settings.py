"""The constants of the hybrid policy."""

from __future__ import annotations

from dataclasses import dataclass

from hasgpu_core.errors import InvalidError


@dataclass(frozen=True, slots=True)
class HybridSettings:
    """Each with what it is for; `designs/2026-11-24-policy.md` has what was tried."""

    lend: bool = True
    """Whether the devices lend idle time between request and limit. If so, instances ask for little and borrow."""
    request_permille: int = 11
    """What an instance asks for where time is lent; more than a parked one, which gets no requests."""
    late_share: float = 0.0025
    """Part of the requests that a steady load may make late. Below the objective of 0.5 %: steps take the rest."""
    fill: float = 0.8
    """Part of the largest throughput that a Poisson load may fill, whatever the wait."""
    regular_fill: float = 0.93
    """The same for a regular load."""
    regular_evidence: float = 4.5
    """A load is taken for regular when its counts are e to this times likelier so than Poisson; no longer when less
    likely."""
    regular_least_rps: float = 20.0
    """A plan for a regular load is made for so much at least: it costs little more than one for less, and at a step of
    the rate the first requests come before it can be seen."""
    regular_settle_s: float = 3.0
    """So long after it was found regular, or random again, a cheaper plan for that is taken up at once."""
    clump_late: float = 1.5
    """So many late requests more than late_share raise by a tenth the part of the requests that are taken to bring
    another one with them ..."""
    clump_most: int = 6
    """... up to so many tenths."""
    clump_forget_s: float = 3600.0
    """That is forgotten in so long, or when so many more requests were in time."""
    latency_margin: float = 0.97
    """A configuration is only chosen where a batch of one takes at most this part of the SLO."""
    lookback_s: float = 60.0
    """The plan covers the largest rate of this long: what came once comes again (the HAS-GPU and Azure loads return to
    their peaks within it), and parked shares cost next to nothing while a cold start costs seconds."""
    bursty_above: float = 1.4
    """Arrivals whose counts vary by more than this part of their mean come in bursts (or, where it has long been so,
    by somewhat less: see `forecast`) where time is lent: room for what was chance costs next to nothing then ..."""
    bursty_reserved_above: float = 2.0
    """... and this where it is not. Then the plan also covers ..."""
    burst_window_s: float = 0.3
    """... the largest rate over so long ..."""
    burst_lookback_s: float = 1800.0
    """... of this long."""
    rate_window_s: float = 5.0
    """Over which that rate is taken."""
    burst_windows_s: tuple[float, ...] = (0.3, 0.6, 1.2, 2.4, 5.0)
    """Over which a rise is looked for."""
    burst_sigmas: float = 3.5
    """A count above what the plan covers by so many standard deviations is a rise."""
    quantile_sigmas: float = 0.5
    """The rate planned for is the observed one plus so many standard deviations of its estimate."""
    headroom: float = 1.05
    """A new plan is made for so many times that."""
    least_rps: float = 10.0
    """And at least for this where time is lent: room for a burst then costs next to nothing ..."""
    least_reserved_rps: float = 1.0
    """... and for this where it is not."""
    gain: float = 0.12
    """A cheaper plan is taken up only when it saves at least this part."""
    settle_s: float = 20.0
    """Shortest time between growing and shrinking."""
    regret_s: float = 300.0
    """Growing so soon after shrinking was a mistake: the next time it waits twice as long ..."""
    most_patience: float = 32.0
    """... up to so many times settle_s ..."""
    forgive_s: float = 900.0
    """... and half as long again after a time without change."""
    most_instances: int = 12
    """Of one function in a plan, if its own maximum is not less."""
    spare: float = 2.5
    """Parked instances are kept for so many times the rate planned for (where time is lent, they borrow instead)."""
    spare_least_rps: float = 8.0
    """And at least for this."""
    most_parked: int = 4
    retire_s: float = 900.0
    """A parked instance beyond those goes after so long: held for that long it costs what a cold start does."""
    strain_s: float = 20.0
    """Since a request was late, or about to be, instances may use all that is idle for so long."""
    feedback_after_s: float = 8.0
    """Lateness counts against a plan that has been in force for so long: percentiles look back over 5 s ..."""
    feedback_hold_s: float = 6.0
    """... and when it has lasted for so long: one late request of few is no reason."""
    feedback_factor: float = 1.25
    """By how much more is planned for then, each time ..."""
    feedback_most: float = 3.0
    """... up to so many times the rate: a prediction that is further off is to be corrected, not outbid."""
    feedback_ease_s: float = 60.0
    """So long nothing must have been late before a step is taken back."""
    roomy: float = 0.25
    """Only while so much of the SMs is in no row."""
    idle_to_zero_s: float = 60.0
    """With min_instances = 0."""
    start_timeout_s: float = 60.0
    reclaim_wait_s: float = 10.0
    """Instances of lower classes were given up for a function: so long no more are."""
    reference_rps: tuple[float, ...] = (1.0, 3.0, 8.0, 15.0, 25.0)
    """Rates over which the SM share of a function is chosen before its own is known."""
    calm: float = 2.0
    """A function whose plan sustains so many times its rate is looked at less often; a queue wakes the scaler."""
    look_again_s: float = 0.1
    look_again_calm_s: float = 4.0
    look_again_idle_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("late_share", "fill", "regular_fill", "latency_margin"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidError(name, expected="more than 0, at most 1", got=str(getattr(self, name)))
        if self.lookback_s < self.rate_window_s:
            raise InvalidError("lookback_s", expected=f"at least {self.rate_window_s}", got=str(self.lookback_s))
