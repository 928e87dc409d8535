"""Whatever comes in whatever order: no row is over-filled, no device over-committed, no instance planned twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, InstanceState
from hasgpu_scheduler.binding import bind, rows_of
from hasgpu_scheduler.core import SchedulerCore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

_spec = importlib.util.spec_from_file_location("scheduler_builders", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

NODES = ("a", "b", "c")
FUNCTIONS = ("f", "g")
requests = st.integers(1, 10).map(lambda tenths: tenths * 100)
small_requests = st.integers(1, 4).map(lambda tenths: tenths * 100)
sms = st.sampled_from((50, 100, 100, 25, 75))
READY = st.just(InstanceState.READY)
shares = st.builds(make.allocation, st.one_of(small_requests, requests), sms, st.sampled_from((100, 1500)))


class Scheduling(RuleBasedStateMachine):
    """Nodes come, go and drain; functions grow, shrink and go; agents report what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.beat_count = 0
        self.revision = 0
        self.core = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
        self.core.load((), (), 0.0)
        self.core.heard(0.0)
        self.heartbeat("a", False, ("cpu0",))

    @rule(name=st.sampled_from(NODES), draining=st.booleans(), gpus=st.sampled_from((("cpu0",), ("cpu0", "cpu1"))))
    def heartbeat(self, name: str, draining: bool, gpus: tuple[str, ...]) -> None:
        self.beat_count += 1
        self.core.heard(self.now_s)
        self.core.on_node(make.node(name, beat=self.beat_count, draining=draining, gpus=gpus), self.now_s)

    @rule(name=st.sampled_from(NODES))
    def withdraw(self, name: str) -> None:
        self.core.on_node_gone(name)

    @rule(
        function=st.sampled_from(FUNCTIONS),
        instances=st.dictionaries(st.integers(0, 11), shares, max_size=5),
        standby=st.sets(st.integers(0, 11)),
    )
    def command(self, function, instances, standby) -> None:
        self.revision += 1
        self.core.accept(
            make.wanted(function, self.revision, *sorted(instances.items()), standby=tuple(standby)), self.now_s
        )
        self.decide()

    @rule(
        data=st.data(),
        said=st.lists(
            st.tuples(requests, st.sampled_from((1, 2, 0, -2)), st.sampled_from(list(InstanceState)) | READY),
            min_size=1,
            max_size=3,
        ),
    )
    def report(self, data, said) -> None:
        """Agents report shares of their own, mostly newer than planned: vertical changes that the plan knows not of."""
        planned = [(node, p) for node, plan in sorted(self.core.plans.items()) for p in plan.instances]
        if not planned:
            return
        for request_permille, ahead, state in said:
            node, entry = data.draw(st.sampled_from(planned))
            share = make.allocation(request_permille, entry.allocation.sm_pct, entry.allocation.memory_bytes >> 20)
            revision = max(0, entry.allocation_revision + ahead)
            self.core.on_instance(
                make.status(entry.instance, node, share, revision, row=entry.row, gpu=entry.gpu, state=state)
            )
        self.decide()

    @rule(delay_s=st.floats(0.0, 8.0))
    def wait(self, delay_s: float) -> None:
        self.now_s += delay_s
        self.core.heard(self.now_s)

    @rule()
    def decide(self) -> None:
        result = self.core.decide(self.now_s, fencing_token=1)
        for plan in result.plans:
            assert plan.revision > (self.core.plans[plan.node].revision if plan.node in self.core.plans else 0)
            self.core.commit(plan)
        wanted = {d.instance for event in self.core.wanted.values() for d in event.instances}
        planned = {p.instance for plan in self.core.plans.values() for p in plan.instances}
        assert planned <= wanted
        assert wanted - planned <= {item.desired.instance for item in result.unplaced}

    @rule()
    def settles(self) -> None:
        """Binding what was bound changes nothing."""
        self.decide()
        again = bind(self.core.views(self.now_s), self.core.wanted, self.core.planned(), self.core._reported)
        assert (
            bind(self.core.views(self.now_s), self.core.wanted, again.plans, self.core._reported).plans == again.plans
        )

    @invariant()
    def rows_hold(self) -> None:
        seen: set[tuple[str, bool]] = set()
        for name, plan in self.core.plans.items():
            for entry in plan.instances:
                assert (entry.instance, bool(entry.moving_from)) not in seen
                seen.add((entry.instance, bool(entry.moving_from)))
                for other, mark in ((entry.moving_from, "moving_to"), (entry.moving_to, "moving_from")):
                    there = self.core.plans[other].instances if other else ()
                    assert not other or [getattr(p, mark) for p in there if p.instance == entry.instance] == [name]
            for gpu in {entry.gpu for entry in plan.instances}:
                mine = [entry for entry in plan.instances if entry.gpu == gpu]
                rows = rows_of(mine, make.device(name))
                assert all(row.used_permille <= WHOLE_PERMILLE for row in rows)
                assert sum(row.sm_pct for row in rows) <= WHOLE_PCT
                assert len({(entry.row, entry.allocation.sm_pct) for entry in mine}) == len(rows)
                used_bytes = sum(entry.allocation.memory_bytes for entry in mine)
                assert used_bytes <= make.device(name).memory_bytes


Scheduling.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestScheduling = Scheduling.TestCase
