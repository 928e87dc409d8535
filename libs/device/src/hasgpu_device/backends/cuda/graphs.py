"""CUDA graphs of a program: one for each rung, batch size and part.

A kernel inside a graph runs on the SMs of the context it was captured in, wherever the graph is launched: hence one
graph a rung. Graphs read and write memory at fixed places, so a batch size has static tensors for its inputs, its
outputs and, where the program is cut into parts, for the values that cross a cut (a *seam*). They are the same for all
rungs, and lie outside the graphs' memory pool. So a batch can change to another rung between two parts, and graphs can
share one pool: nothing in it has to outlive a part.

A batch is padded to the next size captured by repeating its last row; rows of a batch are independent of each other, as
everywhere in this system.

What can't be captured runs eagerly, step by step, with the reason in `GraphedProgram.notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hasgpu_device.backends.cuda import programs
from hasgpu_device.backends.cuda.layer_clock import LEARNT_RUNS, LayerClock
from hasgpu_device.backends.cuda.programs import Program

Rung = tuple[int, int]
"""`(first_pct, sm_pct)`."""
CAPTURE_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError)
"""What torch raises when something can't be captured; a fault of the device is among the first and told apart."""
_RELATIVE_TOLERANCE = 2e-2
_ABSOLUTE_TOLERANCE = 2e-3


class Recorder(Protocol):
    """Captures work into graphs."""

    def record(self, rung: Rung, work: Callable[[], None]) -> Callable[[], None]:
        """Captures the work on a rung; the function returned runs it there, on the current stream."""
        ...


def capture_sizes(max_batch: int) -> tuple[int, ...]:
    """Returns the batch sizes worth a graph: powers of two and the largest, ascending."""
    sizes = {max_batch}
    size = 1
    while size < max_batch:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def padded_size(rows: int, sizes: Sequence[int]) -> int | None:
    """Returns the smallest size that holds the rows; None when none does."""
    return min((size for size in sizes if size >= rows), default=None)


def partition(times_ns: Sequence[int], limit_ns: int, may_cut: Sequence[bool]) -> tuple[int, ...]:
    """Cuts a row of steps into parts, as few as keep each within the limit and then as even as can be.

    Args:
        times_ns: Of each step.
        limit_ns: Longest a part should take; a step, or a run of steps that can't be cut, may exceed it.
        may_cut: Whether a part may begin at each step.

    Returns:
        The first step of each part; begins with 0. Empty when there are no steps.
    """
    if not times_ns:
        return ()
    starts = [index for index in range(len(times_ns)) if index == 0 or may_cut[index]]
    ends = [*starts[1:], len(times_ns)]
    blocks = [sum(times_ns[start:end]) for start, end in zip(starts, ends, strict=True)]
    low, high = max(blocks), max(limit_ns, *blocks)
    fewest = _pack(blocks, high)
    # The smallest limit that needs no more parts makes them even.
    while low < high:
        middle = (low + high) // 2
        if len(_pack(blocks, middle)) <= len(fewest):
            high = middle
        else:
            low = middle + 1
    return tuple(starts[index] for index in _pack(blocks, high))


def _pack(blocks_ns: Sequence[int], limit_ns: int) -> list[int]:
    """Fills parts in order; returns the first block of each."""
    firsts = [0]
    used_ns = 0
    for index, block_ns in enumerate(blocks_ns):
        if used_ns and used_ns + block_ns > limit_ns:
            firsts.append(index)
            used_ns = 0
        used_ns += block_ns
    return firsts


@dataclass(slots=True)
class Plan:
    """One batch size: where it is cut, and its static tensors."""

    size: int
    cuts: tuple[int, ...]
    inputs: list[Any]
    host: list[Any]
    """Pinned host tensors as large as the inputs; empty on a CPU."""
    seams: list[Mapping[str, Any]]
    """For each part but the first, the values that it takes over: tensors that are written, or plain numbers."""
    outputs: list[Any]
    """Leaves of the answer: static tensors, or plain values."""
    structure: Any
    works: list[Callable[[], None]] = field(default_factory=list)

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether inputs differ from the static ones in the number of rows alone."""
        return len(inputs) == len(self.inputs) and all(
            given.dtype == own.dtype and given.shape[1:] == own.shape[1:]
            for given, own in zip(inputs, self.inputs, strict=True)
        )

    def fill(self, inputs: Sequence[Any]) -> None:
        """Copies a batch in and pads it."""
        for index, given in enumerate(inputs):
            own, rows = self.inputs[index], given.shape[0]
            source = given
            if self.host and given.device.type == "cpu":
                source = self.host[index][:rows]
                source.copy_(given)
            own[:rows].copy_(source, non_blocking=True)
            if rows < self.size:
                own[rows:].copy_(own[rows - 1 : rows].expand_as(own[rows:]))

    def answer(self, rows: int, *, on_host: bool) -> Any:
        """Returns a copy of the answer's rows; on the host: waits for the device."""
        import torch

        leaves = [
            (leaf[:rows].cpu() if on_host and leaf.device.type != "cpu" else leaf[:rows].clone())
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in self.outputs
        ]
        return torch.utils._pytree.tree_unflatten(leaves, self.structure)


class GraphedProgram:
    """A program that runs by graphs where it has some.

    Args:
        program: What to run.
        device: Where, as torch names it.
        boundary: Called where a batch may be interrupted.
        clock: Told of batches.
        rung: Returns the rung in force.
        sizes: Batch sizes to capture, ascending; none: always eager.
        owns_batches: False for a part of a handler, whose batches another one tells the clock of.

    Attributes:
        notes: What is not captured and why, in words.
    """

    def __init__(
        self,
        program: Program,
        *,
        device: str,
        boundary: Callable[[], None],
        clock: LayerClock,
        rung: Callable[[], Rung],
        sizes: Sequence[int],
        owns_batches: bool = True,
    ) -> None:
        self.program = program
        self.sizes = tuple(sizes)
        self.notes: list[str] = []
        self._device = device
        self._boundary = boundary
        self._clock = clock
        self._rung = rung
        self._owns_batches = owns_batches
        self._plans: dict[int, Plan] = {}
        self._graphs: dict[tuple[Rung, int], list[Callable[[], None]]] = {}
        self._examples: dict[int, list[Any]] = {}
        self.keeps_examples = True
        """Whether inputs seen are kept as examples to plan with; until the warm-up is over."""

    def __call__(self, *inputs: Any) -> Any:
        """Runs a batch; tensors in, and tensors on the host out (on the device where the inputs were there)."""
        rows = int(inputs[0].shape[0]) if inputs and inputs[0].ndim else 0
        size = padded_size(rows, self.sizes) if rows else None
        plan = self._plans.get(size) if size is not None else None
        if plan is None or not plan.fits(inputs):
            return self._run_eagerly(inputs, rows)
        rung = self._rung()
        complete = False
        if self._owns_batches:
            self._clock.begin_batch(("graph", rung, plan.size))
        try:
            plan.fill(inputs)
            for part, work in enumerate(plan.works):
                if part:
                    self._boundary()
                # Looked up for each part: at a boundary the rung may change.
                graphs = self._graphs.get((self._rung(), plan.size))
                (graphs[part] if graphs else work)()
            answer = plan.answer(rows, on_host=inputs[0].device.type == "cpu")
            complete = self._rung() == rung
        finally:
            if self._owns_batches:
                self._clock.end_batch(complete=complete)
        return answer

    def _run_eagerly(self, inputs: Sequence[Any], rows: int) -> Any:
        if self.keeps_examples and rows in self.sizes:
            self._examples[rows] = [tensor.detach().clone() for tensor in inputs]
        rung = self._rung()
        complete = False
        if self._owns_batches:
            self._clock.begin_batch(("eager", rung, rows))
        try:
            moved = [tensor.to(self._device) for tensor in inputs]
            answer = programs.run(self.program, moved, lambda step: self._boundary() if step else None)
            complete = self._rung() == rung
        finally:
            if self._owns_batches:
                self._clock.end_batch(complete=complete)
        return answer

    def plan(self, size: int, limit_ns: int) -> Plan:
        """Plans a batch size that was run at least once; runs it once more, within a segment.

        Args:
            size: One of `sizes`.
            limit_ns: Longest a part should take on the rung in force.

        Raises:
            ValueError: It can't be run with static tensors; the message says why.
        """
        import torch

        if size not in self._examples:
            raise ValueError(f"no batch of {size} has been run")
        inputs = [tensor.to(self._device).contiguous() for tensor in self._examples[size]]
        times = self._step_times_ns(size, inputs)
        shapes: dict[str, Any] = {}
        may_cut = [False] * self.program.steps_count
        self._clock.begin_batch(("eager", self._rung(), size))
        try:
            values = self.program.start(inputs)
            for step in range(self.program.steps_count):
                if step:
                    self._boundary()
                    may_cut[step] = self._may_cut(values, self.program.live(step), shapes)
                self.program.step(step, values)
        finally:
            self._clock.end_batch(complete=False)
        leaves, structure = torch.utils._pytree.tree_flatten(self.program.answer(values))
        outputs = [self._static_output(leaf, size) for leaf in leaves]
        cuts = partition(times, limit_ns, may_cut)
        seams = [self._seam(self.program.live(cut), shapes) for cut in cuts]
        on_host = self._device.startswith("cuda")
        host = [torch.empty_like(own, device="cpu", pin_memory=True) for own in inputs] if on_host else []
        plan = Plan(size, cuts, inputs, host, seams, outputs, structure)
        plan.works = [self._work(plan, part) for part in range(len(cuts))]
        self._plans[size] = plan
        return plan

    def _step_times_ns(self, size: int, inputs: Sequence[Any]) -> Sequence[int]:
        """Returns the device time of each step; runs the program for it when it is not known."""
        kind = ("eager", self._rung(), size)
        for _ in range(LEARNT_RUNS):
            times = self._clock.stretches_ns(kind)
            if len(times) == self.program.steps_count:
                return times
            self._clock.begin_batch(kind)
            try:
                programs.run(self.program, inputs, lambda step: self._boundary() if step else None)
            finally:
                self._clock.end_batch()
        return self._clock.stretches_ns(kind)

    def drop(self, size: int, reason: str) -> None:
        """Runs a size eagerly from now on."""
        self._plans.pop(size, None)
        for key in [key for key in self._graphs if key[1] == size]:
            del self._graphs[key]
        self.notes.append(f"batches of {size} run eagerly: {reason}")

    def planned(self) -> tuple[int, ...]:
        """Returns the sizes that have static tensors, the largest first: its graph makes room for the others'."""
        return tuple(sorted(self._plans, reverse=True))

    def capture(self, rung: Rung, size: int, recorder: Recorder) -> None:
        """Captures a planned size on a rung; raises one of CAPTURE_ERRORS when it can't be."""
        graphs = [recorder.record(rung, work) for work in self._plans[size].works]
        self._graphs[rung, size] = graphs
        self._clock.forget(("graph", rung, size))

    def is_captured(self, rung: Rung, size: int) -> bool:
        """Whether batches of this size run by graphs on the rung."""
        return (rung, size) in self._graphs

    def check(self, size: int) -> str:
        """Runs a planned size both ways on the rung in force; returns what differs, empty when nothing does."""
        import torch

        example = self._examples[size]
        plan = self._plans.pop(size)
        try:
            wanted = self._run_eagerly(example, size)
        finally:
            self._plans[size] = plan
        got = self(*example)
        tree = torch.utils._pytree
        pairs = zip(tree.tree_leaves(wanted), tree.tree_leaves(got), strict=True)
        if all(_alike(one.cpu(), other.cpu()) for one, other in pairs if isinstance(one, torch.Tensor)):
            return ""
        return "the graph's answer differs from the eager one"

    def end_warm_up(self) -> None:
        """Forgets the examples."""
        self.keeps_examples = False
        self._examples.clear()

    def _may_cut(self, values: Mapping[str, Any], live: Sequence[str], shapes: dict[str, Any]) -> bool:
        """A cut needs values that can be kept in static tensors, and none that is another one's view."""
        import torch

        places = set()
        for name in live:
            value = values[name]
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                places.add(value.untyped_storage().data_ptr())
                shapes[name] = torch.empty_like(value, device="meta")
            elif isinstance(value, programs.SCALARS):
                places.add(name)
                shapes[name] = value
            else:
                return False
        return len(places) == len(live)

    def _seam(self, names: Sequence[str], shapes: Mapping[str, Any]) -> Mapping[str, Any]:
        import torch

        return {
            name: torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=self._device)
            if isinstance(shape := shapes[name], torch.Tensor)
            else shape
            for name in names
        }

    def _static_output(self, leaf: Any, size: int) -> Any:
        import torch

        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.ndim or leaf.shape[0] != size:
            raise ValueError(f"an output of shape {list(leaf.shape)} has not one row for each of {size}")
        return torch.empty_like(leaf, memory_format=torch.contiguous_format)

    def _work(self, plan: Plan, part: int) -> Callable[[], None]:
        """Returns the function that runs a part between the static tensors."""
        import torch

        program = self.program
        first = plan.cuts[part]
        is_last = part + 1 == len(plan.cuts)
        end = program.steps_count if is_last else plan.cuts[part + 1]

        def work() -> None:
            values = program.start(plan.inputs)
            if part:
                values.update(plan.seams[part])
            for step in range(first, end):
                program.step(step, values)
            if is_last:
                for own, leaf in zip(
                    plan.outputs, torch.utils._pytree.tree_leaves(program.answer(values)), strict=True
                ):
                    if isinstance(own, torch.Tensor):
                        own.copy_(leaf)
                return
            for name, own in plan.seams[part + 1].items():
                if isinstance(own, torch.Tensor):
                    own.copy_(values[name])

        return work


def _alike(one: Any, other: Any) -> bool:
    import torch

    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    return bool(torch.allclose(one.float(), other.float(), _RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE, equal_nan=True))
