"""The scaling policies by name, with the settings that the figures are made with, for scaler and simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hasgpu_core.errors import NotFoundError
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.rivals import FastGSharePolicy, FastGShareSettings, KServePolicy, ReleasedPolicy
from hasgpu_core.policy.rivals.kserve import KServeSettings
from hasgpu_core.policy.scaling import ScalingPolicy, ScalingSettings

DEFAULT_POLICY = "hybrid"
LIVE_POLICIES = ("hybrid", "hasgpu", "hasgpu-released", "fastgshare", "kserve")
"""Those that can run live; static-peak and clairvoyant know the future."""


def make_live_policy(
    name: str, *, lend: bool = True, idle_to_zero_s: float | None = None, retire_s: float | None = None
) -> ScalingPolicy:
    """Returns a policy by its name.

    Args:
        name: One of LIVE_POLICIES.
        lend: Whether the devices lend idle time between request and limit (those of hasgpu do).
        idle_to_zero_s: Idle time after which a function with `min: 0` has no instance; None: the policy's own.
            `fastgshare` and `hasgpu-released` have none.
        retire_s: After how long `hybrid` gives up a parked instance that nobody needed; None: its own.

    Raises:
        NotFoundError: There is no such policy, or it can't run live; names those that can.
    """
    hybrid, hasgpu, kserve = HybridSettings(lend=lend), ScalingSettings(), KServeSettings()
    if idle_to_zero_s is not None:
        hybrid = replace(hybrid, idle_to_zero_s=idle_to_zero_s)
        hasgpu = replace(hasgpu, idle_to_zero_s=idle_to_zero_s)
        kserve = replace(kserve, grace_to_zero_s=idle_to_zero_s)
    if retire_s is not None:
        hybrid = replace(hybrid, retire_s=retire_s)
    makers: Mapping[str, Callable[[], ScalingPolicy]] = {
        "hybrid": lambda: HybridPolicy(hybrid),
        "hasgpu": lambda: HasGpuPolicy(hasgpu),
        "hasgpu-released": ReleasedPolicy,
        "fastgshare": lambda: FastGSharePolicy(FastGShareSettings(lend=lend)),
        "kserve": lambda: KServePolicy(kserve),
    }
    if name not in makers:
        raise NotFoundError("policy", name, f"there are {', '.join(LIVE_POLICIES)}")
    return makers[name]()
