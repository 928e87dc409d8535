"""The hybrid policy: least cost over the whole capacity surface, by forecast quantiles, vertical before horizontal."""

from hasgpu_core.policy.hybrid.policy import HybridPolicy
from hasgpu_core.policy.hybrid.settings import HybridSettings

__all__ = ["HybridPolicy", "HybridSettings"]
