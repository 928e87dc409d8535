from __future__ import annotations

import math

import pytest
from hasgpu_core.errors import QueueFullError
from hasgpu_core.policy.batching import EdfQueue, Waiting
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class Thing:
    """A request, known by identity."""


def waiting(
    sequence: int, *, due_s: float, rows: int = 1, signature: str = "a", deadline_s: float = math.inf, **fields: bool
) -> Waiting[Thing]:
    return Waiting(Thing(), rows, signature, due_s, deadline_s, sequence, **fields)


def filled(*items: Waiting[Thing]) -> EdfQueue[Thing]:
    queue: EdfQueue[Thing] = EdfQueue(max_count=100)
    for item in items:
        queue.push(item)
    return queue


def test_batches_form_in_due_order_of_one_signature() -> None:
    items = [
        waiting(0, due_s=3.0),
        waiting(1, due_s=1.0),
        waiting(2, due_s=2.0, signature="b"),
        waiting(3, due_s=2.5),
    ]
    queue = filled(*items)
    assert queue.form_batch(0.0, max_rows=8, latency_s=lambda n: None) == [items[1], items[3], items[0]]
    assert queue.form_batch(0.0, max_rows=8, latency_s=lambda n: None) == [items[2]]
    assert queue.form_batch(0.0, max_rows=8, latency_s=lambda n: None) == []


def test_a_batch_grows_only_while_it_ends_before_the_first_is_due() -> None:
    queue = filled(*(waiting(i, due_s=1.0) for i in range(10)))
    assert len(queue.form_batch(0.0, max_rows=8, latency_s=lambda n: 0.3 * n)) == 3
    assert len(queue) == 7


def test_when_the_first_is_late_throughput_counts() -> None:
    queue = filled(*(waiting(i, due_s=0.1) for i in range(10)))
    assert len(queue.form_batch(0.0, max_rows=8, latency_s=lambda n: 0.3 * n)) == 8


def test_rows_bound_a_batch_and_nothing_overtakes() -> None:
    items = [waiting(0, due_s=1, rows=3), waiting(1, due_s=2, rows=6), waiting(2, due_s=3, rows=1)]
    queue = filled(*items)
    assert queue.form_batch(0.0, max_rows=8, latency_s=lambda n: None) == items[:1]
    assert queue.rows == 7
    assert filled(waiting(0, due_s=1, rows=20)).form_batch(0.0, max_rows=8, latency_s=lambda n: None)


def test_bound_and_retries() -> None:
    queue: EdfQueue[Thing] = EdfQueue(max_count=1)
    queue.push(waiting(0, due_s=1))
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size"):
        queue.push(waiting(1, due_s=1))
    queue.push(waiting(2, due_s=1, retried=True))
    assert len(queue) == 2


def test_discard_and_expiry() -> None:
    items = [waiting(i, due_s=i, deadline_s=10 - i) for i in range(4)]
    queue = filled(*items)
    assert queue.discard(items[0].request)
    assert not queue.discard(items[0].request)
    assert queue.oldest_due_s() == 1
    assert queue.expired(8.0) == [items[3], items[2]]
    assert queue.form_batch(0.0, max_rows=8, latency_s=lambda n: None) == [items[1]]
    assert queue.oldest_due_s() is None


def test_who_can_be_in_time_goes_before_who_is_late() -> None:
    items = [waiting(0, due_s=1.0), waiting(1, due_s=2.0), waiting(2, due_s=8.0), waiting(3, due_s=9.0)]
    queue = filled(*items)
    assert queue.form_batch(5.0, max_rows=1, latency_s=lambda n: 1.0) == [items[2]]
    assert queue.form_batch(6.0, max_rows=1, latency_s=lambda n: 1.0) == [items[3]]
    assert queue.oldest_due_s() == 1.0
    assert queue.form_batch(7.0, max_rows=1, latency_s=lambda n: 1.0) == [items[0]]
    assert queue.form_batch(8.0, max_rows=1, latency_s=lambda n: 1.0) == [items[1]]


def test_late_requests_fill_what_is_left_but_make_nobody_late() -> None:
    late = [waiting(i, due_s=0.1) for i in range(3)]
    timely = waiting(9, due_s=1.0)
    batch = filled(*late, timely).form_batch(0.5, max_rows=8, latency_s=lambda n: 0.15 * n)
    assert batch == [timely, late[0], late[1]]


def test_one_that_is_nearly_late_does_not_force_small_batches_on_all_behind_it() -> None:
    """Alone it would be in time at 1 row a 10 ms; let go late with the others, 7 rows are in time in 24 ms."""
    items = [waiting(0, due_s=0.011), *(waiting(i, due_s=0.3) for i in range(1, 20))]
    batch = filled(*items).form_batch(0.0, max_rows=8, latency_s=lambda n: 0.008 + 0.002 * n)
    assert batch == items[:8]


def test_a_slow_instance_takes_the_late_and_leaves_to_the_fast_one_who_is_in_time_there() -> None:
    late, timely = waiting(0, due_s=0.1), waiting(1, due_s=2.0)
    queue = filled(late, timely)

    def form(latency_s: float) -> list[Waiting[Thing]]:
        return queue.form_batch(1.0, max_rows=8, latency_s=lambda n: latency_s, soonest_s=lambda n: 0.5)

    assert form(5.0) == [late]
    assert form(5.0) == []
    assert len(queue) == 1
    assert form(0.5) == [timely]


def test_who_was_late_may_be_in_time_after_all_when_predictions_change() -> None:
    first, second = waiting(0, due_s=2.0), waiting(1, due_s=9.0)
    queue = filled(first, second)
    assert queue.form_batch(1.0, max_rows=1, latency_s=lambda n: 5.0) == [second]
    third = waiting(2, due_s=9.5)
    queue.push(third)
    queue.reconsider()
    assert queue.form_batch(1.0, max_rows=1, latency_s=lambda n: 0.5) == [first]
    assert queue.form_batch(1.0, max_rows=1, latency_s=lambda n: 0.5) == [third]


@given(st.integers(1, 400))
def test_heaps_do_not_keep_what_is_gone(count: int) -> None:
    queue: EdfQueue[Thing] = EdfQueue(max_count=1000)
    stays = waiting(-1, due_s=-1)
    queue.push(stays)
    for i in range(count):
        item = waiting(i, due_s=i, signature=str(i))
        queue.push(item)
        queue.discard(item.request)
    held = queue._timely.size + queue._late.size + len(queue._deadline)
    assert held <= 3 * 67
    assert queue.form_batch(0.0, max_rows=1, latency_s=lambda n: None) == [stays]


class QueueMachine(RuleBasedStateMachine):
    """The queue against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: EdfQueue[Thing] = EdfQueue(max_count=30)
        self.model: list[Waiting[Thing]] = []
        self.late: set[int] = set()
        """Those that were found to be late; kept alive by `everything`."""
        self.everything: list[Waiting[Thing]] = []
        self.sequence = 0

    @rule(due=st.integers(0, 20), late=st.integers(0, 20), rows=st.integers(1, 4), signature=st.sampled_from("abc"))
    def push(self, due: int, late: int, rows: int, signature: str) -> None:
        item = waiting(self.sequence, due_s=due, deadline_s=due + late, rows=rows, signature=signature)
        self.sequence += 1
        if len(self.model) >= 30:
            with pytest.raises(QueueFullError):
                self.queue.push(item)
        else:
            self.queue.push(item)
            self.model.append(item)
            self.everything.append(item)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.model))
        assert self.queue.discard(item.request)
        self.model.remove(item)

    @rule(now=st.integers(0, 40))
    def expire(self, now: int) -> None:
        gone = self.queue.expired(now)
        assert {id(g) for g in gone} == {id(m) for m in self.model if m.deadline_s <= now}
        self.model = [m for m in self.model if m.deadline_s > now]

    @rule(now=st.integers(0, 25), max_rows=st.integers(1, 8), per_row=st.floats(0, 3))
    def form(self, now: int, max_rows: int, per_row: float) -> None:
        batch = self.queue.form_batch(now, max_rows=max_rows, latency_s=lambda n: per_row * n)
        assert bool(batch) == bool(self.model)
        if not batch:
            return
        order = sorted(self.model, key=lambda m: (m.due_s, m.sequence))
        timely = [m for m in order if id(m) not in self.late]
        while timely and now + per_row * timely[0].rows > timely[0].due_s:
            self.late.add(id(timely.pop(0)))
        late = [m for m in order if id(m) in self.late]
        assert batch[0] is (timely or late)[0]
        rows = sum(item.rows for item in batch)
        assert rows <= max_rows or len(batch) == 1
        from_timely = [m for m in batch if id(m) not in self.late]
        from_late = [m for m in batch if id(m) in self.late]
        assert from_timely == [m for m in timely if m.signature == batch[0].signature][: len(from_timely)]
        assert from_late == [m for m in late if m.signature == batch[0].signature][: len(from_late)]
        assert batch == from_timely + from_late
        if timely:
            self.assert_most_in_time(from_timely, timely, rows, now, max_rows, per_row)
        for item in batch:
            self.model.remove(item)

    def assert_most_in_time(
        self,
        chosen: list[Waiting[Thing]],
        timely: list[Waiting[Thing]],
        all_rows: int,
        now: int,
        max_rows: int,
        per_row: float,
    ) -> None:
        """No other number of requests in due order is much better in rows in time a second; late ones harm nobody."""

        def rate(items: list[Waiting[Thing]], rows: int) -> float:
            return sum(i.rows for i in items if now + per_row * rows <= i.due_s) / max(per_row * rows, 1e-6)

        same = [m for m in timely if m.signature == chosen[0].signature]
        own_rows = sum(i.rows for i in chosen)
        for count in range(1, len(same) + 1):
            rows = sum(i.rows for i in same[:count])
            if count > 1 and rows > max_rows:
                break
            assert 0.9 * rate(same[:count], rows) <= rate(chosen, own_rows) * (1 + 1e-9)
        in_time = [i for i in chosen if now + per_row * own_rows <= i.due_s]
        assert in_time
        assert all(now + per_row * all_rows <= i.due_s for i in in_time)

    @rule()
    def reconsider(self) -> None:
        self.queue.reconsider()
        self.late.clear()

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.rows == sum(m.rows for m in self.model)
        assert self.queue.oldest_due_s() == min((m.due_s for m in self.model), default=None)


TestQueueMachine = QueueMachine.TestCase
