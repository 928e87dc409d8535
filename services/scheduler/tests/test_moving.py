"""Moves: make before break, in order, few at once, gone on with after a restart, never back and forth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hasgpu_core.events import InstanceEvent, NodeEvent, PlanEvent, PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.resources import Allocation, DeviceHealth, DeviceInfo, InstanceState
from hasgpu_scheduler.core import SchedulerCore
from hasgpu_scheduler.moving import MovingSettings
from hasgpu_scheduler.whatif import Hypothesis

RUNGS = (10, 20, 25, 30, 40, 50, 60, 75, 100)
SETTINGS = MovingSettings(at_once=2, period_s=5.0, cooldown_s=30.0, timeout_s=20.0, degraded_after_s=3.0)
START_S, DRAIN_S = 3.0, 1.0


@dataclass
class Worker:
    gpu: str
    row: int
    allocation: Allocation
    ready_s: float
    gone_s: float | None = None


class World:
    """A core, and agents that do what their plans say as the real ones do: successor first, one subject an instance."""

    def __init__(self, nodes: dict[str, tuple[str, ...]], settings: MovingSettings = SETTINGS) -> None:
        self.now_s = 0.0
        self.settings = settings
        self.nodes = {name: {gpu: self.device(name, gpu) for gpu in gpus} for name, gpus in nodes.items()}
        self.draining: set[str] = set()
        self.dead: set[str] = set()
        self.never_ready: set[str] = set()
        self.workers: dict[tuple[str, str], list[Worker]] = {}
        self.subjects: dict[str, InstanceEvent] = {}
        self.plans: dict[str, PlanEvent] = {}
        self.told: list[tuple[str, str]] = []
        self.most_moves = 0
        self.crashes = False
        """After the first of several plans is stored, whenever there are several."""
        self.restart()

    @staticmethod
    def device(node: str, gpu: str) -> DeviceInfo:
        return DeviceInfo(node, gpu, "m", "emulated", 8192 * MIB, RUNGS)

    def restart(self, wanted: tuple = ()) -> None:
        """Another scheduler process takes the lease: it knows what is stored and said."""
        old = getattr(self, "core", None)
        self.core = SchedulerCore(node_timeout_s=6.0, silence_s=3.0, moving=self.settings)
        self.core.load(self.plans.values(), old.wanted.values() if old else wanted, self.now_s)
        for event in self.subjects.values():
            self.core.on_instance(event)

    def want(self, *events) -> None:
        for event in events:
            self.core.accept(event, self.now_s)

    def run(self, seconds: float) -> None:
        """Passes of a second each; what is served is checked after each by `served`."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            self.core.heard(self.now_s)
            for name, devices in self.nodes.items():
                if name not in self.dead:
                    beat = NodeEvent(name, f"{name}:1", tuple(devices.values()), round(self.now_s * 1e9), 0)
                    self.core.on_node(replace(beat, draining=name in self.draining), self.now_s)
            self.agents()
            result = self.core.decide(self.now_s, fencing_token=1)
            for plan in result.plans:
                self.core.commit(plan)
                self.plans[plan.node] = plan
                if self.crashes and len(result.plans) > 1:
                    self.restart()
                    break
            self.told += [(h.kind, h.reason) for h in result.happenings]
            self.most_moves = max(self.most_moves, len(self.core.moves))
            self.check()

    def agents(self) -> None:
        for name in self.nodes:
            if name in self.dead:
                self.workers = {key: held for key, held in self.workers.items() if key[0] != name}
                continue
            planned = {p.instance: p for p in self.plans[name].instances} if name in self.plans else {}
            held = {instance for node, instance in self.workers if node == name}
            for instance in sorted(held | set(planned)):
                self.agent(name, instance, planned.get(instance))

    def agent(self, node: str, instance: str, planned: PlannedInstance | None) -> None:
        workers = [w for w in self.workers.get((node, instance), []) if w.gone_s is None or w.gone_s > self.now_s]
        if planned is not None:
            here = [w for w in workers if (w.gpu, w.row) == (planned.gpu, planned.row) and w.gone_s is None]
            if not here:
                late_s = float("inf") if node in self.never_ready else self.now_s + START_S
                workers.append(Worker(planned.gpu, planned.row, planned.allocation, late_s))
            elif here[0].ready_s <= self.now_s:
                here[0].allocation = planned.allocation
                for other in workers:
                    if other is not here[0] and other.gone_s is None:
                        other.gone_s = self.now_s + DRAIN_S
        else:
            for worker in workers:
                worker.gone_s = worker.gone_s or self.now_s + DRAIN_S
        self.workers[node, instance] = workers
        if not workers:
            del self.workers[node, instance]
        self.speak(node, instance, planned, workers)

    def speak(self, node: str, instance: str, planned: PlannedInstance | None, workers: list[Worker]) -> None:
        """The rule of the agent's publisher."""
        said = self.subjects.get(instance)
        staying = [w for w in workers if w.gone_s is None]
        ready = [w for w in staying if w.ready_s <= self.now_s]
        has_say = planned is not None and not planned.moving_to and bool(ready or not planned.moving_from)
        if not has_say and said is not None and said.node != node:
            return
        shown = (ready or staying or workers)[:1]
        if not shown:
            if said is not None:
                del self.subjects[instance]
                self.core.on_instance_gone(instance)
            return
        worker = shown[0]
        state = InstanceState.READY if ready else InstanceState.LOADING if staying else InstanceState.DRAINING
        function = instance.rpartition("-")[0]
        event = InstanceEvent(
            function, instance, node, worker.gpu, worker.row, state, "", "a:1", worker.allocation, 0, 1, "m", 0
        )
        self.subjects[instance] = event
        self.core.on_instance(event)

    @property
    def served(self) -> dict[str, int]:
        """Requests of what is ready, by function."""
        out: dict[str, int] = {}
        for event in self.subjects.values():
            if event.state is InstanceState.READY and event.node not in self.dead:
                out[event.function] = out.get(event.function, 0) + event.allocation.request_permille
        return out

    @property
    def used(self) -> set[tuple[str, str]]:
        return {(node, p.gpu) for node, plan in self.plans.items() for p in plan.instances}

    def check(self) -> None:
        """No device holds more than it has, workers that leave included."""
        for node, devices in self.nodes.items():
            for gpu in devices:
                rows: dict[int, list[Allocation]] = {}
                for (name, _), workers in self.workers.items():
                    for w in workers:
                        if name == node and w.gpu == gpu and (w.gone_s is None or w.gone_s > self.now_s):
                            rows.setdefault(w.row, []).append(w.allocation)
                assert all(sum(a.request_permille for a in row) <= 1000 for row in rows.values())
                assert sum(max(a.sm_pct for a in row) for row in rows.values()) <= 100
                assert sum(a.memory_bytes for row in rows.values() for a in row) <= devices[gpu].memory_bytes

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]


def settled(make, world: World, *events) -> dict[str, int]:
    world.run(1)
    world.want(*events)
    world.run(6)
    assert world.served == {
        e.function: sum(d.allocation.request_permille for d in e.instances) for e in events if e.instances
    }
    return world.served


def keep(world: World, seconds: int, at_least: dict[str, int]) -> None:
    """Runs, and after every second nothing has lost capacity."""
    for _ in range(seconds):
        world.run(1)
        served = world.served
        assert all(served.get(function, 0) >= need for function, need in at_least.items()), (world.now_s, served)


def test_a_draining_node_is_emptied_without_losing_capacity(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    share = make.allocation(300, 25)
    world.draining.add("b")
    need = settled(make, world, make.wanted("f", 1, *((n, share) for n in range(4))))
    world.draining = {"a"}
    keep(world, 25, need)
    assert world.used == {("b", "g0")}
    assert world.most_moves == SETTINGS.at_once
    assert world.kinds().count("moved") == 4
    assert any("f-0 moves from a/g0 to b/g0" in reason and "node a drains" in reason for _, reason in world.told)
    assert not any(p.moving_from or p.moving_to for plan in world.plans.values() for p in plan.instances)


def test_what_fits_nowhere_stays_on_a_draining_node_and_is_listed(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    world.draining.add("b")
    need = settled(make, world, make.wanted("f", 1, *((n, make.allocation(900, 40)) for n in range(2))))
    world.draining = {"a"}
    world.nodes["b"]["g0"] = replace(world.nodes["b"]["g0"], sm_rungs_pct=(25, 50))
    keep(world, 10, need)
    assert world.used == {("a", "g0")}
    assert {item.desired.instance for item in world.core.unplaced} == {"f-0", "f-1"}
    assert all("node a drains; no device gives SM 40 %" in item.reason for item in world.core.unplaced)


def test_a_device_degraded_for_long_is_emptied_by_moves_and_gets_nothing_new(make):
    world = World({"a": ("g0", "g1")})
    need = settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25)), (1, make.allocation(500, 50))))
    assert world.used == {("a", "g0")}
    sick = replace(world.nodes["a"]["g0"], health=DeviceHealth.DEGRADED, health_reason="ECC errors")
    world.nodes["a"]["g0"] = sick
    keep(world, 2, need)
    assert world.used == {("a", "g0")}, "it may be well again shortly"
    keep(world, 15, need)
    assert world.used == {("a", "g1")}
    assert any("a/g0 is degraded: ECC errors" in reason for _, reason in world.told)
    world.want(make.wanted("g", 1, (0, make.allocation(300, 25))))
    world.run(5)
    assert world.used == {("a", "g1")}
    world.want(make.wanted("h", 1, (0, make.allocation(300, 100))))
    world.run(2)
    assert world.used == {("a", "g0"), ("a", "g1")}, "better a degraded device than none"


def scattered(make, world: World, *, over: tuple[str, ...] = ("a", "b")) -> dict[str, int]:
    """Two functions on two devices that would fit on one: a large one between them has gone."""
    world.run(1)
    world.want(
        make.wanted("big", 1, (0, make.allocation(1000, 75))), make.wanted("f", 1, (0, make.allocation(300, 25)))
    )
    world.run(2)
    world.want(make.wanted("g", 1, (0, make.allocation(400, 50))))
    world.run(5)
    world.want(make.wanted("big", 2))
    world.run(3)
    assert len(world.used) == 2
    return world.served


@pytest.mark.parametrize("nodes", [{"a": ("g0", "g1")}, {"a": ("g0",), "b": ("g0",)}])
def test_a_gpu_is_freed_in_two_looks_and_then_nothing_moves(make, nodes):
    world = World(nodes)
    need = scattered(make, world)
    keep(world, 20, need)
    assert len(world.used) == 2, "what was placed within the cool-down stays"
    keep(world, 35, need)
    assert len(world.used) == 1
    assert world.kinds().count("moved") == 1
    ((_, why),) = [told for told in world.told if told[0] == "migration"]
    assert "2 GPUs in use become 1" in why
    before = len(world.told)
    keep(world, 60, need)
    assert world.told[before:] == []


def test_a_row_keeps_room_to_grow(make):
    """Both share a row only if a tenth of it stays free; else a second GPU is the price of being able to grow."""
    for permille, gpus in ((450, 1), (500, 2)):
        world = World({"a": ("g0", "g1")})
        world.run(1)
        world.want(make.wanted("f", 1, (0, make.allocation(permille, 100))))
        world.want(make.wanted("big", 1, (0, make.allocation(800, 100))))
        world.run(3)
        world.want(make.wanted("big", 2, (0, make.allocation(permille, 100))))
        world.run(60)
        assert len(world.used) == gpus, permille


def test_room_is_made_for_what_waits(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    need = settled(
        make,
        world,
        make.wanted("f", 1, (0, make.allocation(300, 40))),
        make.wanted("g", 1, (0, make.allocation(300, 75))),
    )
    assert len(world.used) == 2
    world.want(make.wanted("g", 2, (0, make.allocation(300, 25))))
    world.run(8)
    need = {"f": 300, "g": 300}
    world.want(make.wanted("h", 1, (0, make.allocation(900, 100))))
    world.run(2)
    assert [item.desired.instance for item in world.core.unplaced] in ([], ["h-0"])
    keep(world, 40, need)
    assert world.served["h"] == 900
    assert not world.core.unplaced


def test_a_restarted_scheduler_goes_on_with_a_move(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    world.draining.add("b")
    need = settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25))))
    world.draining = {"a"}
    keep(world, 2, need)
    assert [(m.source, m.target) for m in world.core.moves] == [("a/g0", "b/g0")]
    world.restart()
    keep(world, 6, need)
    assert world.used == {("b", "g0")}
    assert world.kinds().count("move-started") == 1
    assert world.kinds().count("moved") == 1


def test_a_scheduler_that_dies_between_any_two_writes_loses_nothing(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    world.draining.add("b")
    need = settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25)), (1, make.allocation(300, 25))))
    world.draining, world.crashes = {"a"}, True
    keep(world, 10, need)
    world.crashes = False
    keep(world, 10, need)
    assert world.used == {("b", "g0")}
    assert not any(p.moving_from or p.moving_to for plan in world.plans.values() for p in plan.instances)


def test_the_loss_of_either_node_during_a_move(make):
    for lost in ("a", "b"):
        world = World({"a": ("g0",), "b": ("g0",)})
        world.draining.add("b")
        settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25))))
        world.draining = {"a"}
        world.run(2)
        assert len(world.core.moves) == 1
        world.dead.add(lost)
        world.run(15)
        assert world.served == {"f": 300}
        ((node, entry),) = [(n, p) for n, plan in world.plans.items() if n != lost for p in plan.instances]
        assert (node, entry.moving_from, entry.moving_to) == ("b" if lost == "a" else "a", "", "")


def test_a_move_that_does_not_get_ready_is_given_up_and_rests(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    world.draining.add("b")
    need = settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25))))
    world.draining, world.never_ready = {"a"}, {"b"}
    keep(world, 40, need)
    assert world.used == {("a", "g0")}
    assert world.kinds().count("move-given-up") == 1
    assert world.kinds().count("move-started") == 1
    world.never_ready = set()
    keep(world, 60, need)
    assert world.used == {("b", "g0")}


def test_a_move_within_a_node_that_does_not_get_ready_goes_back_to_the_place_kept_for_it(make):
    world = World({"a": ("g0", "g1")})
    need = settled(make, world, make.wanted("f", 1, (0, make.allocation(600, 75))))
    world.nodes["a"]["g0"] = replace(world.nodes["a"]["g0"], health=DeviceHealth.DEGRADED, health_reason="ECC errors")
    world.never_ready = {"a"}
    keep(world, 6, need)
    assert [(m.source, m.target) for m in world.core.moves] == [("a/g0", "a/g1")]
    world.want(make.wanted("g", 1, (0, make.allocation(600, 75))))
    keep(world, 2, need)
    assert [item.desired.instance for item in world.core.unplaced] == ["g-0"], "both places are held meanwhile"
    keep(world, 20, need)
    assert {p.instance: p.gpu for p in world.plans["a"].instances} == {"f-0": "g0", "g-0": "g1"}


def test_a_share_that_changes_on_the_way_arrives_changed(make):
    world = World({"a": ("g0",), "b": ("g0",)})
    world.draining.add("b")
    settled(make, world, make.wanted("f", 1, (0, make.allocation(300, 25))))
    world.draining = {"a"}
    world.run(2)
    world.want(make.wanted("f", 2, (0, make.allocation(700, 25))))
    world.run(10)
    (entry,) = world.plans["b"].instances
    assert (entry.allocation.request_permille, entry.allocation_revision) == (700, 2)


def test_nothing_moves_when_moves_are_off(make):
    world = World({"a": ("g0", "g1")}, replace(SETTINGS, at_once=0))
    scattered(make, world)
    world.run(50)
    assert len(world.used) == 2
    assert "move-started" not in world.kinds()


def test_the_loss_of_a_node_leaves_a_spread_function_serving(make):
    """Both instances would fit on one node; the rule puts them on two, and half of the capacity outlives either."""
    world = World({"a": ("g0",), "b": ("g0",)})
    world.run(1)
    world.want(make.wanted("x", 1, (0, make.allocation(900, 50)), (1, make.allocation(900, 60))))
    world.run(2)
    world.want(make.wanted("f", 1, (0, make.allocation(600, 25))))
    world.run(4)
    world.want(make.wanted("f", 2, (0, make.allocation(600, 25)), (1, make.allocation(600, 25))))
    world.run(4)
    assert {node for node, plan in world.plans.items() for p in plan.instances if p.function == "f"} == {"a", "b"}
    for lost in ("a", "b"):
        assert world.core.suppose(Hypothesis(lose_nodes=(lost,)), world.now_s).interrupted == ()
    world.dead.add("a")
    keep(world, 3, {"f": 600})
