"""The plan of a node: which one counts, and which share of an instance counts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from hasgpu_core.errors import FencedError
from hasgpu_core.events import PlanEvent, PlannedInstance, VerticalScaleEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.resources import Allocation


class PlanFence:
    """Takes plans in the order of their leaders and revisions; what is older is refused."""

    def __init__(self) -> None:
        self._plan: PlanEvent | None = None

    @property
    def plan(self) -> PlanEvent | None:
        """The plan in force; None before the first."""
        return self._plan

    @property
    def revision(self) -> int:
        """Of the plan in force; 0 before the first."""
        return self._plan.revision if self._plan else 0

    def accept(self, plan: PlanEvent) -> bool:
        """Puts a plan in force; False when it is the one in force already.

        Raises:
            FencedError: an older leader wrote it, or it is an older revision.
        """
        present = self._plan
        if present is not None:
            if plan.fencing_token < present.fencing_token:
                raise FencedError("scheduler", token=plan.fencing_token, current_token=present.fencing_token)
            if plan.revision < present.revision:
                raise FencedError(f"plan.{plan.node}", token=plan.revision, current_token=present.revision)
            if plan == present:
                return False
        self._plan = plan
        return True

    def clear(self) -> None:
        """Puts an empty plan in force; what is older than the last one stays refused."""
        present = self._plan
        self._plan = PlanEvent(
            node=present.node if present else "",
            revision=present.revision if present else 0,
            fencing_token=present.fencing_token if present else 0,
            reason="the plan was deleted",
        )


@dataclass(frozen=True, slots=True)
class ShareTarget:
    """The share that an instance should have."""

    allocation: Allocation
    revision: int
    """Of the desired state that it comes from."""


def share_target(planned: PlannedInstance, vertical: VerticalScaleEvent | None) -> ShareTarget:
    """Returns the newer of the plan's share and the last vertical change.

    On equal revisions the vertical change counts: it is the same decision, told directly. The memory always is the
    plan's: placement answers for it.
    """
    if vertical is None or vertical.revision < planned.allocation_revision:
        return ShareTarget(planned.allocation, planned.allocation_revision)
    share = vertical.allocation
    return ShareTarget(
        Allocation(
            sm_pct=share.sm_pct,
            request_permille=share.request_permille,
            limit_permille=share.limit_permille,
            memory_bytes=planned.allocation.memory_bytes,
        ),
        vertical.revision,
    )


def load_digest(spec: FunctionSpec) -> str:
    """Returns a digest of what a worker loads: specs of equal digest differ in objectives and limits only."""
    loaded = [
        spec.format.value,
        spec.artifact.sha256,
        spec.entry,
        [[t.name, t.datatype, list(t.shape)] for t in spec.inputs],
        [[t.name, t.datatype, list(t.shape)] for t in spec.outputs],
        sorted(spec.parameters.items()),
        spec.max_batch,
        spec.execution_timeout_ms,
    ]
    return hashlib.sha256(json.dumps(loaded).encode()).hexdigest()
