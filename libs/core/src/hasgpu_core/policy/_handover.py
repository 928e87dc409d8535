"""Taking instances over from another policy: who goes first where there is no room for the new beside the old."""

from __future__ import annotations

from collections.abc import Sequence

from hasgpu_core.policy._draft import Draft, Share


def one_to_spare(draft: Draft, shares: Sequence[Share], rate_rps: float) -> Share | None:
    """Returns the instance of another shape that can go to make room; None: all are needed.

    The others of that shape have to sustain the rate without it, and one always stays. The dearest goes first: it
    makes the most room.
    """
    ready = [share for share in shares if share.ready]
    for share in sorted(ready, key=lambda s: (-s.allocation.gpu_share, s.instance)):
        rest = [other for other in ready if other is not share]
        if rest and sum(draft.capacity_rps(other) for other in rest) >= rate_rps:
            return share
    return None
