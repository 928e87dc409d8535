"""The run: asks an agent for what is missing, writes every point as it comes, hands the points to rapp."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from hasgpu_core.function import workload_digest
from hasgpu_core.profile import Basis, ProfileHeader, ProfileModel, ProfileRow

from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.profiling.axes import Axes, Cell
from hasgpu_cli.profiling.file import ProfileFile
from hasgpu_cli.profiling.place import Place

if TYPE_CHECKING:
    from hasgpu.common.v1 import common_pb2
    from hasgpu.node_agent.v1 import node_agent_pb2

PATIENCE_S = 900.0
"""Beyond the budget: waiting for another run on the device, fetching the artifact, loading."""
PLAN_SLACK = 4.0
"""So many times the budget is planned: the first estimate of the costs may be that much too high."""
_DRIVER = "driver: "
"""How an agent's capabilities begin that tell the driver's version."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the sweep is."""

    text: str
    """In words: "loading", a configuration and its latency, ..."""
    done_count: int
    total_count: int
    left_s: float | None
    """Of the budget, or until all is measured if that is sooner; None before measuring begins."""


@dataclass(slots=True)
class Sweep:
    """One function's sweep on one device."""

    place: Place
    spec: common_pb2.FunctionSpec
    axes: Axes
    budget_s: float
    file: ProfileFile
    on_progress: Callable[[Progress], None]
    missing: set[Cell] = field(init=False)
    measured: list[ProfileRow] = field(default_factory=list)
    """In this run."""
    total_count: int = field(init=False)
    operators: node_agent_pb2.OperatorTable | None = None
    """Of the function's model, or why there are none; None: not told."""
    _began_s: float | None = None

    def __post_init__(self) -> None:
        wanted = set(self.axes.cells())
        self.missing = wanted - self.file.cells()
        self.total_count = len(wanted)

    @property
    def done_count(self) -> int:
        """Of the sweep, with what the file had already."""
        return self.total_count - len(self.missing)

    def order(self) -> list[Cell]:
        """Returns what is missing, first what makes the error fall fastest for the seconds spent.

        The costs are guessed from the artifact's size until the file has points of the function.
        """
        from hasgpu_predictor import ProfilePoint, fit_physical, plan_probes, static_physical
        from hasgpu_predictor.probe_plan import CANDIDATES_MAX

        cells = sorted(self.missing, key=lambda cell: (-cell[2], cell))
        if len(cells) > CANDIDATES_MAX:
            return cells
        known = [
            ProfilePoint(*row.cell[1:], row.latency_us / 1e6, row.device_time_us / 1e6, row.longest_segment_us / 1e6)
            for row in self.file.rows()
        ]
        guess = static_physical(
            artifact_bytes=self.spec.artifact.size_bytes,
            backend=self.place.device.backend,
            slo_s=max(1, self.spec.slo_ms) / 1e3,
        )
        physical = fit_physical(known) if known else guess
        plan = plan_probes(physical, cells, budget_s=self.budget_s, known=known, slack=PLAN_SLACK)
        planned = [probe.cell for probe in plan]
        return planned + [cell for cell in cells if cell not in set(planned)]

    async def run(self, target: Target) -> None:
        """Measures what is missing, as far as the budget reaches.

        Raises:
            HasgpuError: What the agent said, or that it is away; what was measured before is in the file.
        """
        from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc

        if not self.missing:
            self.file.settle(self.missing)
            return
        request = node_agent_pb2.ProfileRequest(
            spec=self.spec,
            gpu=self.place.device.gpu,
            budget_ms=round(self.budget_s * 1e3),
            configurations=[
                node_agent_pb2.ProfileConfiguration(batch=batch, sm_pct=sm_pct, quota_permille=quota)
                for batch, sm_pct, quota in self.order()
            ],
            in_order=True,
            operators=True,
        )
        name = f"agent of {self.place.node}"
        async with Target(target.home, {name: self.place.address}).channel(name) as channel:
            stub = node_agent_pb2_grpc.NodeAgentServiceStub(channel)
            async for answer in stub.Profile(request, timeout=self.budget_s + PATIENCE_S):
                if answer.WhichOneof("event") == "point":
                    self._take(answer.point)
                elif answer.WhichOneof("event") == "operators":
                    self.operators = answer.operators
                else:
                    self._tell(answer.progress)
        self.file.settle(self.missing)

    def _take(self, point: node_agent_pb2.ProfilePoint) -> None:
        row = ProfileRow(
            self.spec.name,
            point.batch,
            point.sm_pct,
            point.quota_permille,
            latency_us=_us(point.latency_ns),
            device_time_us=_us(point.device_time_ns),
            longest_segment_us=_us(point.longest_segment_ns),
            repetitions=max(1, point.repetitions_count),
        )
        self.missing.discard(row.cell[1:])
        self.measured.append(row)
        self.file.add(row, missing=self.missing)
        self._tell(
            f"{words(row.cell[1:])}: {row.latency_us / 1e3:.2f} ms, on the device {row.device_time_us / 1e3:.2f} ms"
        )

    def _tell(self, text: str) -> None:
        now_s = time.monotonic()
        if self._began_s is None and text.startswith("batch "):
            # The agent names the first configuration when the model is loaded: from here on its budget runs.
            self._began_s = now_s
        left_s = None
        if self._began_s is not None:
            left_s = max(0.0, self._began_s + self.budget_s - now_s)
            if self.measured:
                left_s = min(left_s, (now_s - self._began_s) / len(self.measured) * len(self.missing))
        self.on_progress(Progress(text, self.done_count, self.total_count, left_s))


def _us(time_ns: int) -> float:
    return max(1, time_ns) / 1e3


def words(cell: Cell) -> str:
    """A configuration in words."""
    batch, sm_pct, quota_permille = cell
    return f"batch {batch}, SM {sm_pct} %, quota {quota_permille / 10:g} %"


def make_header(place: Place, spec: common_pb2.FunctionSpec) -> ProfileHeader:
    """Returns the header of a profile of one function on a device, as it begins."""
    from hasgpu_runtime.wire import spec_from_proto

    device = place.device
    emulated = device.backend == "emulated"
    drivers = [text.removeprefix(_DRIVER) for text in device.capabilities if text.startswith(_DRIVER)]
    how = "the device is emulated: its times come from a profile" if emulated else "measured on the device"
    function = spec_from_proto(spec)
    return ProfileHeader(
        device_model=device.model,
        backend=device.backend,
        basis=Basis.MODELLED if emulated else Basis.MEASURED,
        memory_bytes=max(1, device.memory_bytes),
        sm_rungs_pct=device.sm_rungs_pct or (100,),
        driver=drivers[0] if drivers else "",
        versions={"hasgpu": version("hasgpu-cli"), "python": platform.python_version()},
        created_unix_s=int(time.time()),
        source=f"hasgpu profile on {place.node}/{device.gpu}; {how}",
        models={function.name: ProfileModel(workload_digest(function), function.memory_bytes, function.max_batch)},
        complete=False,
    )


async def ingest(
    target: Target, place: Place, rows: list[ProfileRow], operators: node_agent_pb2.OperatorTable | None = None
) -> int:
    """Hands rows of one function, and what was told of its operators, to rapp; returns how many rows it took.

    Raises:
        HasgpuError: It is away or refuses them.
    """
    from hasgpu.node_agent.v1 import node_agent_pb2
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    request = rapp_pb2.IngestRequest(
        function=rows[0].model,
        device_model=place.device.model,
        points=[
            node_agent_pb2.ProfilePoint(
                batch=row.batch,
                sm_pct=row.sm_pct,
                quota_permille=row.quota_permille,
                latency_ns=round(row.latency_us * 1e3),
                device_time_ns=round(row.device_time_us * 1e3),
                longest_segment_ns=round(row.longest_segment_us * 1e3),
                repetitions_count=row.repetitions,
            )
            for row in rows
        ],
        operators=operators,
    )
    async with target.channel("rapp") as channel:
        answer = await rapp_pb2_grpc.RappServiceStub(channel).Ingest(request, timeout=CALL_TIMEOUT_S)
    return int(answer.accepted_count)
