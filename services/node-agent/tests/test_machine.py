"""Random plans, shares, deaths and new functions: no row is ever over-filled, and nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
from hasgpu_node_agent.shares import CONFIRM_TIMEOUT_S
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

shares = st.tuples(st.integers(1, 10).map(lambda n: n * 100), st.sampled_from((25, 50, 100)))


def machine(make: Any) -> type[RuleBasedStateMachine]:
    class NodeMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()
            self.revisions = itertools.count(1)
            self.contents = itertools.count(0)

        @initialize()
        def begin(self) -> None:
            self.world = make.world()
            self.loop.run_until_complete(self.world.step())

        @rule()
        def a_function_is_deployed(self) -> None:
            number = next(self.contents)
            self.world.reconciler.set_function(make.function(revision=number + 1, content=number))

        @rule(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), shares), max_size=5))
        def a_plan_comes(self, rows: list[tuple[int, int, tuple[int, int]]]) -> None:
            revision = next(self.revisions)
            planned = {
                f"f-{number}": make.planned(f"f-{number}", make.share(request, sm=sm), row=row, revision=revision)
                for number, row, (request, sm) in rows
            }
            self.world.plan(revision, *planned.values())

        @rule(number=st.integers(0, 4), share=shares)
        def a_share_is_changed(self, number: int, share: tuple[int, int]) -> None:
            event = make.vertical(f"f-{number}", make.share(share[0], sm=share[1]), revision=next(self.revisions))
            self.world.reconciler.set_vertical(event, {})

        @rule(times=st.integers(1, 3))
        def passes_are_made(self, times: int) -> None:
            self.loop.run_until_complete(self.world.step(times))

        @rule(seconds=st.floats(0.01, 1.0))
        def time_passes(self, seconds: float) -> None:
            self.world.clock.advance(seconds)

        @precondition(lambda self: self.world.launcher.live)
        @rule(data=st.data())
        def a_worker_becomes_ready(self, data: st.DataObject) -> None:
            data.draw(st.sampled_from(self.world.launcher.live)).ready()

        @precondition(lambda self: self.world.launcher.live)
        @rule(data=st.data())
        def a_worker_dies(self, data: st.DataObject) -> None:
            data.draw(st.sampled_from(self.world.launcher.live)).end("was killed by SIGKILL")

        @precondition(lambda self: self.world.launcher.live)
        @rule(data=st.data(), instantly=st.booleans())
        def a_worker_confirms(self, data: st.DataObject, instantly: bool) -> None:
            process = data.draw(st.sampled_from(self.world.launcher.live))
            process.confirm()
            process.instantly = instantly

        @invariant()
        def no_row_is_over_filled(self) -> None:
            rows: dict[int, list[tuple[int, int]]] = {}
            for process in self.world.launcher.live if hasattr(self, "world") else []:
                now_s = self.world.clock.now_s()
                # Until the worker confirms (or the wait for that is over), the larger of old and new counts.
                may = [process.written, *(a for at_s, a in process.unconfirmed if now_s < at_s + CONFIRM_TIMEOUT_S)]
                largest = (max(a.request_permille for a in may), max(a.sm_pct for a in may))
                rows.setdefault(process.request.row, []).append(largest)
            assert all(sum(request for request, _ in row) <= 1_000 for row in rows.values())
            assert sum(max(sm for _, sm in row) for row in rows.values()) <= 100

        @invariant()
        def rows_overlap_only_where_all_have_confirmed_that_they_are_marked(self) -> None:
            live = self.world.launcher.live if hasattr(self, "world") else []
            for one, other in itertools.combinations(live, 2):
                if one.request.row != other.request.row:
                    for a, b in itertools.product(one.possible, other.possible):
                        assert not a.overlaps(b) or (a.exclusive and b.exclusive), (a, b)

        @invariant()
        def an_instance_has_at_most_one_worker_that_stays_and_one_to_come(self) -> None:
            if hasattr(self, "world"):
                for instance in self.world.reconciler.instances.values():
                    assert len({w.key for w in instance.workers()}) == len(list(instance.workers()))

        def teardown(self) -> None:
            if hasattr(self, "world"):
                self.world.plan(next(self.revisions))
                for process in self.world.launcher.live:
                    process.confirm()
                self.loop.run_until_complete(self.world.step(4))
                assert self.world.launcher.live == []
                assert self.world.reconciler.instances == {}
                assert self.world.guard.rows("cpu0") == ()
                assert all(p.removed for p in self.world.launcher.started)
                assert not self.world.tasks
            self.loop.close()

    return NodeMachine


@pytest.mark.timeout(90)
def test_the_node_as_a_state_machine(make: Any) -> None:
    run_state_machine_as_test(machine(make), settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
