"""SchedulerService: what the cluster looks like, and where something would go."""

from __future__ import annotations

from typing import Any

from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import PlannedInstance
from hasgpu_core.policy.placement import NoRoom
from hasgpu_core.resources import DeviceInfo
from hasgpu_runtime import wire

from hasgpu_scheduler.app import SchedulerApp
from hasgpu_scheduler.binding import Unplaced, rows_of
from hasgpu_scheduler.whatif import Added, Hypothesis


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Answers from the core's state; changes nothing."""

    def __init__(self, app: SchedulerApp) -> None:
        self._app = app

    async def GetCluster(
        self, request: scheduler_pb2.GetClusterRequest, context: Any
    ) -> scheduler_pb2.GetClusterResponse:
        """Returns every node known with its devices, rows and planned instances, and what is placed nowhere."""
        return scheduler_pb2.GetClusterResponse(
            nodes=[self._node(name) for name in sorted(self._app.core.nodes)],
            unplaced=[_unplaced(item) for item in self._app.core.unplaced],
            leader=self._app.leading,
        )

    async def WhatIf(self, request: scheduler_pb2.WhatIfRequest, context: Any) -> scheduler_pb2.WhatIfResponse:
        """Returns where the allocation would go now; raises InvalidError for an allocation that can't be."""
        if not request.HasField("allocation"):
            raise InvalidError("allocation", expected="an allocation", got="nothing")
        allocation = wire.allocation_from_proto(request.allocation)
        allocation.validate()
        found = self._app.core.what_if(allocation, self._app.clock.now_s())
        if isinstance(found, NoRoom):
            return scheduler_pb2.WhatIfResponse(fits=False, reason=found.reason)
        return scheduler_pb2.WhatIfResponse(
            fits=True, node=found.node, gpu=found.gpu, row=found.row, reason=found.reason
        )

    async def WhatIfMany(
        self, request: scheduler_pb2.WhatIfManyRequest, context: Any
    ) -> scheduler_pb2.WhatIfManyResponse:
        """Returns what a pass would do if things were so; raises InvalidError and NotFoundError."""
        outcome = self._app.core.suppose(_hypothesis(request), self._app.clock.now_s())
        return scheduler_pb2.WhatIfManyResponse(
            placed=[
                scheduler_pb2.WouldGo(
                    function=item.planned.function,
                    instance=item.planned.instance,
                    node=item.node,
                    gpu=item.planned.gpu,
                    row=item.planned.row,
                    reason=item.reason,
                    **{"from": item.source},
                )
                for item in outcome.placed
            ],
            unplaced=[_unplaced(item) for item in outcome.unplaced],
            gpus_total=outcome.gpus_total,
            gpus_used_before=outcome.gpus_used_before,
            gpus_used_after=outcome.gpus_used_after,
            gpus_needed_at_least=outcome.gpus_needed_at_least,
            interrupted_functions=outcome.interrupted,
        )

    async def GetSchedulingEvents(
        self, request: scheduler_pb2.GetSchedulingEventsRequest, context: Any
    ) -> scheduler_pb2.GetSchedulingEventsResponse:
        """Returns what this process placed and moved lately while it led, and the moves under way."""
        events = list(self._app.core.happenings)
        return scheduler_pb2.GetSchedulingEventsResponse(
            events=[
                scheduler_pb2.SchedulingEvent(
                    unix_ns=unix_ns,
                    kind=item.kind,
                    function=item.function,
                    instance=item.instance,
                    node=item.node,
                    reason=item.reason,
                )
                for unix_ns, item in (events[-request.limit :] if request.limit else events)
            ],
            moves=[
                scheduler_pb2.MoveUnderWay(
                    function=move.function,
                    instance=move.instance,
                    to=move.target,
                    reason=move.reason,
                    **{"from": move.source},
                )
                for move in self._app.core.moves
            ],
            leader=self._app.leading,
        )

    def _node(self, name: str) -> scheduler_pb2.Node:
        record = self._app.core.nodes[name]
        plan = self._app.core.shown_plans.get(name)
        planned = plan.instances if plan else ()
        event = record.event
        return scheduler_pb2.Node(
            name=name,
            address=event.address if event else "",
            alive=record.alive and event is not None,
            heartbeat_age_ms=max(0, round((self._app.clock.now_s() - record.received_s) * 1e3)),
            devices=[_device(device, planned) for device in (event.devices if event else ())],
            plan_revision=plan.revision if plan else 0,
            draining=event.draining if event else False,
        )


def _hypothesis(request: scheduler_pb2.WhatIfManyRequest) -> Hypothesis:
    add = []
    for item in request.add:
        if not item.HasField("allocation"):
            raise InvalidError("allocation", expected=f"an allocation of {item.function!r}", got="nothing")
        allocation = wire.allocation_from_proto(item.allocation)
        add.append(Added(item.function, allocation, item.count or 1, item.standby))
    gpus = []
    for name in request.lose_gpus:
        node, slash, gpu = name.rpartition("/")
        if not slash or not node or not gpu:
            raise InvalidError("lose_gpus", expected="node/gpu", got=repr(name))
        gpus.append((node, gpu))
    return Hypothesis(tuple(add), tuple(request.lose_nodes), tuple(gpus), tuple(request.drop_functions))


def _unplaced(item: Unplaced) -> scheduler_pb2.Unplaced:
    return scheduler_pb2.Unplaced(
        function=item.function, instance=wire.desired_instance_to_proto(item.desired), reason=item.reason
    )


def _device(device: DeviceInfo, planned: tuple[PlannedInstance, ...]) -> scheduler_pb2.DeviceStatus:
    mine = [item for item in planned if item.gpu == device.gpu]
    return scheduler_pb2.DeviceStatus(
        device=wire.device_info_to_proto(device),
        rows=[wire.row_to_proto(row) for row in rows_of(mine, device)],
        instances=[wire.planned_instance_to_proto(item) for item in mine],
    )
