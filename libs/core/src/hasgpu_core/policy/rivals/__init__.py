"""Peers' and published policies, as ours to be compared with: each faithful to its source, tuned to be at its best."""

from hasgpu_core.policy.rivals.fastgshare import FastGSharePolicy, FastGShareSettings
from hasgpu_core.policy.rivals.kserve import KServePolicy, KServeSettings
from hasgpu_core.policy.rivals.released import ReleasedPolicy
from hasgpu_core.policy.rivals.static_peak import StaticPeakPolicy

__all__ = [
    "FastGSharePolicy",
    "FastGShareSettings",
    "KServePolicy",
    "KServeSettings",
    "ReleasedPolicy",
    "StaticPeakPolicy",
]
