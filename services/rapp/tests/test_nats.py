"""The same on a real nats-server."""

from __future__ import annotations

from hasgpu_core.events import capacity_subject, function_subject
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.testing import nats_bus, nats_server  # noqa: F401  fixtures

from .conftest import DEVICE_MODEL, Rig, profiled, spec


async def test_from_function_to_table_to_deletion(rig: Rig, nats_bus: NatsBus) -> None:  # noqa: F811  the fixture
    rig.bus = nats_bus  # type: ignore[assignment]
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        table = await rig.table(profiled)
        assert table.version == 1
        await rig.deploy(spec(slo_ms=20), revision=2)
        assert (await rig.table(lambda t: t.slo_ms == 20)).infeasible_reason == ""
    async with rig.rapp():
        await nats_bus.delete(function_subject("fn"))
        await rig.gone(capacity_subject("fn", DEVICE_MODEL))
    assert rig.agent.runs_count == 1
