"""A node follows its plan, whatever its workers do."""

from __future__ import annotations

from typing import Any

import pytest
from hasgpu_core.errors import FencedError, NotFoundError
from hasgpu_core.resources import InstanceState
from hasgpu_node_agent.plan import load_digest
from hasgpu_node_agent.ports import Adopted, WorkerRecord
from hasgpu_node_agent.pulse import allowed_silence_s
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.row_layout import Lease


async def running(world: Any, make: Any, *planned: Any) -> None:
    """Brings a plan up to READY."""
    world.reconciler.set_function(make.function())
    world.plan(1, *planned)
    await world.step(2)
    for process in world.launcher.live:
        process.ready()
    await world.step()


async def test_a_planned_instance_is_fetched_started_loaded_and_shown(world: Any, make: Any) -> None:
    world.plan(1, make.planned())
    await world.step()
    assert world.event("f-0").state is InstanceState.PENDING
    assert "function 'f' is not known" in world.event("f-0").reason
    world.reconciler.set_function(make.function())
    await world.step(2)
    assert world.event("f-0").state is InstanceState.LOADING
    assert world.event("f-0").address == ""
    world.process("f-0").ready("h:1")
    await world.step()
    event = world.event("f-0")
    assert (event.state, event.address, event.reason) == (InstanceState.READY, "h:1", "")
    assert (event.allocation, event.allocation_revision) == (make.share(), 1)
    assert (event.plan_revision, event.function_revision) == (1, 1)
    assert len(world.launcher.started) == 1


async def test_older_plans_are_fenced_off(world: Any, make: Any) -> None:
    world.plan(5, make.planned(), token=3)
    with pytest.raises(FencedError):
        world.plan(4, token=3)
    with pytest.raises(FencedError):
        world.plan(6, token=2)
    world.plan(6, token=3)
    assert world.reconciler.plan_revision == 6


async def test_a_launch_that_over_fills_a_row_is_refused_with_what_is_free_and_tried_again(
    world: Any, make: Any
) -> None:
    big, second = make.planned("f-0", make.share(800)), make.planned("f-1", make.share(300))
    await running(world, make, big, second)
    event = world.event("f-1")
    assert event.state is InstanceState.PENDING
    assert event.reason == "row 0 of cpu0 has 200 ‰ free, 300 ‰ were asked for"
    world.plan(2, second)
    await world.step(3)
    assert "f-0" not in world.reconciler.instances
    assert world.event("f-1").state is InstanceState.LOADING


async def test_a_device_that_the_node_does_not_have_is_refused(world: Any, make: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned(gpu="gpu7"))
    await world.step(2)
    assert world.event("f-0").reason == "device 'gpu7' is not found; this node has cpu0"


async def test_a_retired_instance_is_shown_draining_before_it_is_drained_and_stopped(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    process = world.process("f-0")
    world.plan(2)
    await world.step()
    assert world.publisher.told == [("f-0", InstanceState.DRAINING)]
    assert world.client.drained == [f"worker:{process.pid}"]
    assert process.signals == ["TERM"]
    assert process.removed
    await world.step()
    assert world.publisher.deleted == ["f-0"]
    assert world.launcher.forgotten == ["f-0"]
    assert world.guard.rows("cpu0") == ()


async def test_a_worker_that_does_not_heed_sigterm_is_killed(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.process("f-0").heeds_terminate = False
    world.plan(2)
    await world.step(2)
    assert world.process("f-0").signals == ["TERM", "KILL"]
    assert world.reconciler.instances == {}


async def test_a_worker_that_dies_is_shown_failed_and_started_again_after_the_back_off(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.process("f-0").end("was killed by SIGKILL")
    await world.step()
    event = world.event("f-0")
    assert (event.state, event.reason, event.address) == (
        InstanceState.FAILED,
        "its worker was killed by SIGKILL",
        "",
    )
    assert event.restarts_count == 1
    assert len(world.launcher.started) == 1
    assert world.reconciler.next_try_s(world.clock.now_s()) == pytest.approx(0.2)
    world.clock.advance(0.25)
    await world.step()
    assert len(world.launcher.started) == 2
    world.process("f-0").ready()
    await world.step()
    assert world.event("f-0").reason == ""
    assert world.event("f-0").state is InstanceState.READY


async def test_a_worker_that_cannot_load_says_why(world: Any, make: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    world.process("f-0").fail("handler.py, line 3: no module named 'x'")
    await world.step()
    assert world.event("f-0").reason == "handler.py, line 3: no module named 'x'"
    assert world.guard.rows("cpu0") == ()


async def test_a_worker_that_never_becomes_ready_is_killed(world: Any, make: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    world.clock.advance(1_000)
    await world.step(2)
    assert world.process("f-0").signals == ["KILL"]
    assert "was not ready within" in world.event("f-0").reason


async def test_a_worker_that_falls_silent_is_killed_and_started_again(world: Any, make: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    process = world.process("f-0")
    process.ready()
    process.heartbeat_ns = 1
    await world.step(2)
    allowed_s = allowed_silence_s(make.function().spec.execution_timeout_ms)
    for second in range(2 * round(allowed_s)):
        process.heartbeat_ns += second % 9 == 0
        world.clock.advance(1)
        await world.step()
    assert process.signals == []
    process.heartbeat_ns += 1
    await world.step()
    for _ in range(round(allowed_s)):
        world.clock.advance(1)
        await world.step()
    assert process.signals == []
    world.clock.advance(1)
    await world.step(2)
    assert process.signals == ["KILL"]
    event = world.event("f-0")
    assert event.state is InstanceState.FAILED
    assert "no sign of life" in event.reason
    world.clock.advance(1)
    await world.step()
    assert world.process("f-0") is not process


async def test_silence_counts_only_while_it_is_watched_and_after_a_first_beat(world: Any, make: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    process = world.process("f-0")
    process.ready()
    await world.step(2)
    for _ in range(100):
        world.clock.advance(1)
        await world.step()
    process.heartbeat_ns = 5
    await world.step()
    # The agent itself was stopped meanwhile.
    world.clock.advance(10_000)
    await world.step(2)
    assert process.signals == []


@pytest.mark.parametrize(("execution_timeout_ms", "allowed_s"), [(200, 10.0), (5_000, 10.0), (30_000, 35.0)])
def test_a_worker_may_be_silent_for_as_long_as_a_batch_may_take(execution_timeout_ms: int, allowed_s: float) -> None:
    assert allowed_silence_s(execution_timeout_ms) == allowed_s


async def test_artifacts_are_in_use_while_a_function_or_a_worker_needs_them(world: Any, make: Any) -> None:
    old, new = make.function(content=1), make.function(revision=2, content=2)
    world.reconciler.set_function(old)
    world.plan(1, make.planned())
    await world.step(2)
    world.process("f-0").ready()
    await world.step(2)
    assert world.reconciler.artifacts_in_use() == {old.spec.artifact.sha256}
    world.reconciler.set_function(new)
    await world.step(2)
    assert world.reconciler.artifacts_in_use() == {old.spec.artifact.sha256, new.spec.artifact.sha256}
    world.process("f-0").ready()
    await world.step(4)
    assert world.reconciler.artifacts_in_use() == {new.spec.artifact.sha256}
    world.reconciler.forget_function("f")
    assert world.reconciler.artifacts_in_use() == {new.spec.artifact.sha256}
    world.plan(2)
    await world.step(4)
    assert world.reconciler.artifacts_in_use() == frozenset()


async def test_an_artifact_that_is_missing_fails_the_instance_with_back_off(world: Any, make: Any) -> None:
    world.artifacts.error = NotFoundError("artifact", "abc")
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    event = world.event("f-0")
    assert event.state is InstanceState.FAILED
    assert event.reason == "its artifact can't be had: artifact 'abc' is not found"
    world.artifacts.error = None
    world.clock.advance(0.3)
    await world.step(2)
    assert world.event("f-0").state is InstanceState.LOADING


async def test_a_process_that_cannot_be_started_fails_the_instance(world: Any, make: Any) -> None:
    world.launcher.error = OSError("no more processes")
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned())
    await world.step(2)
    assert "no more processes" in world.event("f-0").reason
    assert world.guard.rows("cpu0") == ()


async def test_another_artifact_is_rolled_out_without_a_gap_where_there_is_room(world: Any, make: Any) -> None:
    await running(world, make, make.planned(allocation=make.share(400)))
    old = world.process("f-0")
    world.reconciler.set_function(make.function(revision=2, content=7))
    await world.step(2)
    assert world.event("f-0").state is InstanceState.READY
    assert old.signals == []
    world.process("f-0").ready("new:1")
    await world.step(2)
    event = world.event("f-0")
    assert (event.state, event.address, event.function_revision) == (InstanceState.READY, "new:1", 2)
    assert world.publisher.told[-1] == ("f-0", InstanceState.READY), "gateways learn of the new before the old drains"
    assert world.client.drained == [f"worker:{old.pid}"]
    assert old.removed


async def test_another_artifact_without_room_drains_first(world: Any, make: Any) -> None:
    await running(world, make, make.planned(allocation=make.share(700)))
    old = world.process("f-0")
    world.reconciler.set_function(make.function(revision=2, content=7))
    await world.step(4)
    assert old.removed
    assert world.publisher.told == [("f-0", InstanceState.DRAINING)]
    assert len(world.launcher.started) == 2
    assert world.event("f-0").state is InstanceState.LOADING


async def test_a_successor_that_fails_leaves_the_old_one_serving(world: Any, make: Any) -> None:
    await running(world, make, make.planned(allocation=make.share(400)))
    world.reconciler.set_function(make.function(revision=2, content=7))
    await world.step(2)
    world.process("f-0").fail("bad weights")
    await world.step()
    event = world.event("f-0")
    assert event.state is InstanceState.READY
    assert event.reason == "its successor failed: bad weights"
    assert len(world.launcher.live) == 1


async def test_changed_objectives_do_not_restart_a_worker(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.reconciler.set_function(make.function(revision=2, slo_ms=55))
    await world.step(2)
    assert len(world.launcher.started) == 1
    assert world.event("f-0").function_revision == 2


async def test_a_moved_instance_is_replaced_in_its_new_row(world: Any, make: Any) -> None:
    await running(world, make, make.planned(allocation=make.share(900, sm=50)))
    world.plan(2, make.planned(allocation=make.share(900, sm=50), row=1))
    await world.step()
    assert len(world.launcher.live) == 2
    world.process("f-0").ready()
    await world.step(2)
    assert len(world.launcher.live) == 1
    assert world.event("f-0").row == 1


async def test_an_sm_change_replaces_the_worker_where_the_device_cannot_make_it_alive(make: Any) -> None:
    world = make.world([make.device("gpu0", backend="cuda")])
    await running(world, make, make.planned(allocation=make.share(400, sm=50), gpu="gpu0"))
    world.plan(2, make.planned(allocation=make.share(400, sm=25), gpu="gpu0", revision=2))
    await world.step()
    assert len(world.launcher.live) == 2
    world.process("f-0").ready()
    await world.step(2)
    assert world.event("f-0").allocation == make.share(400, sm=25)
    assert len(world.launcher.live) == 1


async def test_a_draining_node_starts_nothing_new_and_keeps_what_it_has(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.reconciler.draining = True
    world.plan(2, make.planned(), make.planned("f-1"))
    await world.step(2)
    assert world.event("f-0").state is InstanceState.READY
    assert world.event("f-1").reason == "the node is draining and takes no new worker"
    world.reconciler.draining = False
    await world.step()
    assert world.event("f-1").state is InstanceState.LOADING


async def test_stop_all_drains_every_worker(world: Any, make: Any) -> None:
    await running(world, make, make.planned(), make.planned("f-1"))
    world.spawn(world.reconciler.stop_all())
    await world.step(4)
    assert world.reconciler.instances == {}
    assert len(world.client.drained) == 2
    assert sorted(world.publisher.deleted) == ["f-0", "f-1"]


def adopted(world: Any, make: Any, key: WorkerKey, *, request: int = 300, ready: bool = True) -> Any:
    """A worker that another agent started."""
    process = make.process(_Request(key, make.share(request)), 99 + key.generation, world.poke)
    if ready:
        process.ready()
    world.launcher.started.append(process)
    record = WorkerRecord(
        key=key,
        function="f",
        function_revision=1,
        artifact_sha256=make.function().spec.artifact.sha256,
        execution_timeout_ms=30_000,
        load_digest=load_digest(make.function().spec),
        gpu="cpu0",
        row=0,
        allocation=make.share(request),
        allocation_revision=4,
    )
    return Adopted(record, process)


class _Request:
    def __init__(self, key: WorkerKey, allocation: Any) -> None:
        self.key, self.allocation, self.lease = key, allocation, Lease(0, allocation.sm_pct)


async def test_an_adopted_worker_keeps_serving_with_its_share(world: Any, make: Any) -> None:
    assert world.reconciler.adopt(adopted(world, make, WorkerKey("f-0", 3)))
    await world.step()
    assert world.event("f-0").state is InstanceState.READY, "no plan is known yet: nothing is taken down"
    world.reconciler.set_function(make.function())
    world.plan(1, make.planned(allocation=make.share(700), revision=2))
    await world.step(2)
    assert len(world.launcher.started) == 1
    assert world.event("f-0").allocation_revision == 4, "the plan's share is older than the one in force"
    world.process("f-0").end("was killed by SIGKILL")
    await world.step()
    world.clock.advance(1)
    await world.step(2)
    assert world.process("f-0").request.key == WorkerKey("f-0", 4), "folders are never used twice"
    assert world.event("f-0").allocation_revision == 4, "a restart does not bring an older share back"


async def test_an_adopted_worker_that_the_plan_does_not_have_is_retired(world: Any, make: Any) -> None:
    world.reconciler.adopt(adopted(world, make, WorkerKey("f-0", 1)))
    world.plan(1)
    await world.step(2)
    assert world.reconciler.instances == {}
    assert world.publisher.deleted == ["f-0"]


async def test_of_two_adopted_workers_of_an_instance_the_ready_one_stays(world: Any, make: Any) -> None:
    old = adopted(world, make, WorkerKey("f-0", 1))
    new = adopted(world, make, WorkerKey("f-0", 2), ready=False)
    world.reconciler.adopt(old)
    world.reconciler.adopt(new)
    await world.step()
    assert old.process.exit_reason is None
    assert new.process.exit_reason is not None
    assert world.event("f-0").state is InstanceState.READY


async def test_an_adopted_worker_that_over_fills_its_row_is_sent_off(world: Any, make: Any) -> None:
    assert world.reconciler.adopt(adopted(world, make, WorkerKey("f-0", 1), request=800))
    assert not world.reconciler.adopt(adopted(world, make, WorkerKey("f-1", 1), request=800))
    await world.step(2)
    assert world.process("f-1").exit_reason is not None
    assert world.process("f-0").exit_reason is None
