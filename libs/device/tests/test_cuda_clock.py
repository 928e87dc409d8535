"""The layer clock, on a device whose time is moved by hand."""

from __future__ import annotations

from hasgpu_device.backends.cuda.layer_clock import LayerClock

MS = 1_000_000


class Device:
    """Work is queued; it is done when somebody waits for a mark behind it."""

    def __init__(self) -> None:
        self.queued_ns = 0
        self.done_ns = 0
        self.marks = 0

    def work(self, ns: int) -> None:
        self.queued_ns += ns

    def record(self) -> int:
        self.marks += 1
        return self.queued_ns

    def wait(self, mark: int) -> None:
        self.done_ns = max(self.done_ns, mark)

    def between_ns(self, first: int, last: int) -> int:
        assert last <= self.done_ns, "the device has not come to this mark"
        return last - first


def run(device: Device, clock: LayerClock, layers: list[int], *, limit_ns: int = 10**12, complete: bool = True) -> int:
    """Runs a batch as the segment runner does; returns how many segments it took."""

    def begin() -> int:
        mark = device.record()
        device.wait(mark)
        clock.begin_segment(mark)
        return mark

    def end(begun: int) -> None:
        device.wait(mark := device.record())
        clock.end_segment(device.between_ns(begun, mark))

    segments = 1
    begun = begin()
    clock.begin_batch("kind")
    for index, layer in enumerate(layers):
        if index and clock.boundary() >= limit_ns:
            end(begun)
            begun = begin()
            segments += 1
        device.work(layer)
    clock.end_batch(complete=complete)
    end(begun)
    return segments


def test_measuring_lets_the_host_run_ahead_but_not_far() -> None:
    device = Device()
    clock = LayerClock(device, run_ahead=2)
    mark = device.record()
    clock.begin_segment(mark)
    clock.begin_batch("kind")
    seen = []
    for _ in range(6):
        device.work(MS)
        seen.append(clock.boundary())
        assert device.queued_ns - device.done_ns <= 2 * MS
    # What is known, and the last layer once more for the one to come.
    assert seen == [0, 0, 2 * MS, 3 * MS, 4 * MS, 5 * MS]


def test_two_runs_teach_and_then_the_device_is_not_asked() -> None:
    device = Device()
    clock = LayerClock(device)
    run(device, clock, [9 * MS, 9 * MS, 9 * MS])
    run(device, clock, [1 * MS, 2 * MS, 3 * MS])
    assert clock.stretches_ns("kind") == (1 * MS, 2 * MS, 3 * MS)
    before = device.marks
    clock.begin_segment(0)
    clock.begin_batch("kind")
    assert [clock.boundary(), clock.boundary()] == [3 * MS, 6 * MS]
    clock.end_batch()
    assert device.marks == before
    clock.forget("kind")
    assert clock.stretches_ns("kind") == ()


def test_a_segment_ends_before_it_gets_too_long() -> None:
    device = Device()
    clock = LayerClock(device)
    layers = [2 * MS] * 8
    for _ in range(2):
        run(device, clock, layers, limit_ns=5 * MS)
    assert run(device, clock, layers, limit_ns=5 * MS) == 4
    # A layer longer than the limit does not make segments of nothing.
    other = LayerClock(device)
    for _ in range(3):
        assert run(device, other, [20 * MS], limit_ns=5 * MS) == 1


def test_what_was_learnt_follows_the_device() -> None:
    device = Device()
    clock = LayerClock(device)
    for _ in range(2):
        run(device, clock, [MS, MS, MS])
    for _ in range(40):
        run(device, clock, [2 * MS, 2 * MS, 2 * MS])
    clock.begin_segment(0)
    clock.begin_batch("kind")
    assert abs(clock.boundary() - 4 * MS) < MS // 10


def test_a_batch_that_goes_on_longer_than_learnt_is_measured() -> None:
    device = Device()
    clock = LayerClock(device, run_ahead=1)
    for _ in range(2):
        run(device, clock, [MS, MS])
    assert run(device, clock, [MS] * 12, limit_ns=4 * MS) >= 3
    assert clock.stretches_ns("kind") == (MS, MS)


def test_a_batch_that_broke_off_teaches_nothing() -> None:
    device = Device()
    clock = LayerClock(device)
    run(device, clock, [MS, MS], complete=False)
    assert clock.stretches_ns("kind") == ()
    assert clock.boundary() == 0


def test_other_segments_in_between_do_no_harm() -> None:
    device = Device()
    clock = LayerClock(device)
    clock.begin_segment(0)
    assert clock.boundary() == 0
    clock.end_segment(5)
    clock.end_batch()
