"""Cutting, padding and static tensors of graphs on the CPU: the recorder runs the work again where CUDA replays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hasgpu_device.backends.cuda import graphs, programs, staging
from hasgpu_device.backends.cuda.graphs import GraphedProgram, capture_sizes, padded_size, partition
from hasgpu_device.backends.cuda.layer_clock import LayerClock
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Steps:
    """Each mark is a step of 1 ms after the one before."""

    def __init__(self) -> None:
        self.now = 0

    def record(self) -> int:
        self.now += 1_000_000
        return self.now

    def wait(self, mark: int) -> None:
        assert mark <= self.now

    def between_ns(self, first: int, last: int) -> int:
        return last - first


class Recorder:
    """Runs the work when it is captured, as CUDA does not, and again for each replay."""

    def __init__(self) -> None:
        self.replays: list[tuple[int, int]] = []
        self.refuses = ""

    def record(self, rung: tuple[int, int], work: Callable[[], None]) -> Callable[[], None]:
        if self.refuses:
            raise RuntimeError(self.refuses)

        def replay() -> None:
            self.replays.append(rung)
            work()

        return replay


class Rig:
    def __init__(self, program: programs.Program, max_batch: int) -> None:
        self.rung = (0, 100)
        self.boundaries = 0
        self.at_boundary: Callable[[], None] = lambda: None
        self.steps = Steps()
        self.clock = LayerClock(self.steps)
        self.clock.begin_segment(self.steps.record())
        self.recorder = Recorder()
        self.graphed = GraphedProgram(
            program,
            device="cpu",
            boundary=self.boundary,
            clock=self.clock,
            rung=lambda: self.rung,
            sizes=capture_sizes(max_batch),
        )

    def boundary(self) -> None:
        self.boundaries += 1
        self.clock.boundary()
        self.at_boundary()

    def prepare(self, make: Callable[[int], Sequence[torch.Tensor]], limit_ns: int, rungs: Sequence[Any] = ()) -> None:
        for size in self.graphed.sizes:
            for _ in range(2):
                self.clock.begin_segment(self.steps.record())
                self.graphed(*make(size))
            self.graphed.plan(size, limit_ns)
        for rung in rungs or [self.rung]:
            for size in self.graphed.planned():
                self.graphed.capture(rung, size, self.recorder)


def export(module: torch.nn.Module, example: torch.Tensor, most: int) -> Any:
    with torch.inference_mode(False):
        dynamic = ({0: torch.export.Dim("batch", min=1, max=most)},)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module.eval(), (example.clone(),), dynamic_shapes=dynamic).module()


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return torch.nn.Sequential(
            *(layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.ReLU())), torch.nn.Linear(8, 3)
        ).eval()


def small_resnet() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", hidden_sizes=[8, 16], depths=[2, 2], embedding_size=8, num_labels=5)
    with torch.inference_mode(False):
        return ResNetForImageClassification(config).eval()


def test_sizes_and_padding() -> None:
    assert capture_sizes(1) == (1,)
    assert capture_sizes(8) == (1, 2, 4, 8)
    assert capture_sizes(12) == (1, 2, 4, 8, 12)
    assert [padded_size(rows, (1, 2, 4, 12)) for rows in (1, 2, 3, 5, 12, 13)] == [1, 2, 4, 12, 12, None]


@given(st.data())
def test_parts_keep_the_limit_where_they_can(data: st.DataObject) -> None:
    times = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=40))
    may_cut = data.draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times)))
    limit = data.draw(st.integers(1, 120))
    cuts = partition(times, limit, may_cut)
    assert cuts[0] == 0
    assert list(cuts) == sorted(set(cuts))
    assert all(may_cut[cut] for cut in cuts[1:])
    for start, end in zip(cuts, [*cuts[1:], len(times)], strict=True):
        if sum(times[start:end]) > limit:
            # Only what can't be cut is longer: nothing in it may be cut off that takes time on both sides.
            assert not any(
                may_cut[at] and sum(times[start:at]) and sum(times[at:end]) for at in range(start + 1, end)
            ) or sum(times[start:end]) <= max(
                sum(times[one:other])
                for one, other in zip(
                    [0, *(i for i in range(1, len(times)) if may_cut[i])],
                    [*(i for i in range(1, len(times)) if may_cut[i]), len(times)],
                    strict=True,
                )
            )


def test_parts_are_few_and_even() -> None:
    assert partition([], 5, []) == ()
    assert partition([1] * 12, 5, [True] * 12) == (0, 4, 8)
    assert partition([1] * 12, 100, [True] * 12) == (0,)
    assert partition([9, 1, 1], 5, [True] * 3) == (0, 1)
    assert partition([1] * 6, 2, [False, False, True, False, False, True]) == (0, 2, 5)


@pytest.mark.parametrize("limit_ns", [10**12, 3_500_000, 1])
def test_parts_in_sequence_equal_the_whole(limit_ns: int) -> None:
    module = mlp()
    rig = Rig(programs.FxProgram(export(module, torch.zeros(2, 8), 8)), 8)
    rig.prepare(lambda size: [torch.randn(size, 8)], limit_ns)
    parts = len(rig.graphed._plans[8].cuts)
    assert (parts == 1) == (limit_ns == 10**12)
    for rows in range(1, 9):
        batch = torch.randn(rows, 8)
        before = len(rig.recorder.replays)
        answer = rig.graphed(batch)
        torch.testing.assert_close(answer[0] if isinstance(answer, tuple) else answer, module(batch))
        assert len(rig.recorder.replays) - before == len(rig.graphed._plans[padded_size(rows, (1, 2, 4, 8)) or 0].cuts)


def test_a_resnet_is_cut_and_answers_as_before() -> None:
    module = small_resnet()
    rig = Rig(programs.FxProgram(export(module, torch.zeros(2, 3, 32, 32), 4)), 4)
    rig.prepare(lambda size: [torch.randn(size, 3, 32, 32)], 8_000_000)
    assert len(rig.graphed._plans[4].cuts) >= 4
    for size in (1, 2, 4):
        assert rig.graphed.check(size) == ""
    batch = torch.randn(3, 3, 32, 32)
    got = torch.utils._pytree.tree_leaves(rig.graphed(batch))[0]
    torch.testing.assert_close(got, module(batch).logits, rtol=1e-4, atol=1e-4)
    assert got.shape[0] == 3


def test_a_batch_changes_its_rung_between_parts() -> None:
    module = mlp()
    rig = Rig(programs.FxProgram(export(module, torch.zeros(2, 8), 4)), 4)
    rig.prepare(lambda size: [torch.randn(size, 8)], 3_500_000, [(0, 100), (0, 50)])
    batch = torch.randn(4, 8)

    def shrink() -> None:
        rig.rung = (0, 50)

    rig.at_boundary = shrink
    rig.recorder.replays.clear()
    torch.testing.assert_close(rig.graphed(batch), module(batch))
    assert rig.recorder.replays[0] == (0, 100)
    assert set(rig.recorder.replays[1:]) == {(0, 50)}
    # A rung without graphs runs the same parts eagerly.
    rig.rung = (50, 25)
    rig.at_boundary = lambda: None
    rig.recorder.replays.clear()
    torch.testing.assert_close(rig.graphed(batch), module(batch))
    assert rig.recorder.replays == []


def test_views_and_tuples_do_not_cross_a_cut() -> None:
    class Split(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = torch.split(x * 2, 4, dim=1)
            y = x + 1
            same = y.view(-1, 2, 4)
            return left + right + same.sum(1) + y[:, :4]

    module = Split()
    rig = Rig(programs.FxProgram(export(module, torch.zeros(2, 8), 4)), 4)
    rig.prepare(lambda size: [torch.randn(size, 8)], 1)
    batch = torch.randn(3, 8)
    torch.testing.assert_close(rig.graphed(batch), module(batch))
    plan = rig.graphed._plans[4]
    assert 1 < len(plan.cuts) < rig.graphed.program.steps_count
    for seam in plan.seams:
        assert all(isinstance(value, (torch.Tensor, int)) for value in seam.values())


def test_what_can_not_be_captured_runs_eagerly_and_says_why() -> None:
    module = mlp()
    rig = Rig(programs.CallProgram(module), 2)
    with pytest.raises(ValueError, match="no batch of 2 has been run"):
        rig.graphed.plan(2, 10**9)
    rig.prepare(lambda size: [torch.randn(size, 8)], 10**9)
    rig.recorder.refuses = "operation not permitted when stream is capturing"
    with pytest.raises(graphs.CAPTURE_ERRORS):
        rig.graphed.capture((0, 50), 2, rig.recorder)
    rig.graphed.drop(2, rig.recorder.refuses)
    assert rig.graphed.notes == ["batches of 2 run eagerly: operation not permitted when stream is capturing"]
    assert rig.graphed.planned() == (1,)
    assert not rig.graphed.is_captured((0, 100), 2)
    batch = torch.randn(2, 8)
    torch.testing.assert_close(rig.graphed(batch), module(batch))
    # Another shape than the one captured, or more rows than any: eagerly too.
    torch.testing.assert_close(rig.graphed(torch.randn(5, 8)).shape, torch.Size([5, 3]))
    whole = Rig(programs.CallProgram(lambda x: x.sum()), 2)
    whole.graphed(torch.randn(2, 8))
    with pytest.raises(ValueError, match="has not one row for each of 2"):
        whole.graphed.plan(2, 10**9)


def test_a_graph_that_answers_otherwise_is_found_out() -> None:
    calls = []

    def odd(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return x + len(calls)

    rig = Rig(programs.CallProgram(odd), 1)
    rig.prepare(lambda size: [torch.zeros(size, 2)], 10**9)
    assert rig.graphed.check(1) == "the graph's answer differs from the eager one"
    rig.graphed.end_warm_up()
    assert not rig.graphed._examples


def test_a_part_of_a_handler_is_timed_when_it_is_planned() -> None:
    module = mlp()
    rig = Rig(programs.FxProgram(programs.traced_chain(module)), 2)
    rig.graphed._owns_batches = False
    rig.graphed(torch.randn(2, 8))
    plan = rig.graphed.plan(2, 3_500_000)
    assert len(plan.cuts) == 3
    assert rig.clock.stretches_ns(("eager", (0, 100), 2)) == (1_000_000,) * 9


def test_devices_in_a_program_are_replaced() -> None:
    class Shift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(4))
            self.constant = torch.arange(4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.zeros(4, device="cpu")) * self.scale + self.constant

    with torch.inference_mode(False):
        module = export(Shift(), torch.zeros(2, 4), 4)
        programs.retarget(module, "meta")
        staging.Staging("meta").move_module(module)
    program = programs.FxProgram(module)
    answer = programs.run(program, [torch.zeros(3, 4, device="meta")])
    assert answer.device.type == "meta"
    with pytest.raises(TypeError, match="takes 1 inputs, got 0"):
        program.start([])


def test_only_chains_of_torchs_own_layers_are_traced() -> None:
    chain = mlp()
    traced = programs.traced_chain(chain)
    batch = torch.randn(2, 8)
    torch.testing.assert_close(programs.run(programs.FxProgram(traced), [batch]), chain(batch))

    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert programs.traced_chain(torch.nn.Sequential(Own())) is None
    assert programs.traced_chain(torch.nn.Linear(2, 2)) is None
    assert programs.traced_chain(torch.nn.Sequential(torch.nn.Linear(2, 2)).train()) is None


def test_weights_are_moved_once_and_in_pieces() -> None:
    assert list(staging.pieces(10, 4)) == [(0, 4), (4, 8), (8, 10)]
    with torch.inference_mode(False):
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        module[1].weight = module[0].weight
        mover = staging.Staging("meta")
        mover.move_module(module)
    assert all(tensor.device.type == "meta" for tensor in module.state_dict().values())
    # Two linear layers with one weight, and a norm's two parameters, two buffers and its counter.
    assert mover.copied_bytes == 4 * (16 + 4 + 4 + 4 * 4) + 8
    assert staging.staging_for("cpu") is staging.staging_for("cpu")
    tensor = torch.ones(3)
    assert staging.staging_for("cpu").move(tensor) is tensor
