"""The CUDA device inside a worker.

All of a worker's work runs on the stream of the rung in force: green contexts do not reserve SMs, they only bound those
that run on them. In mode `mps+green` another share of the SMs is another stream, from the next segment on. In the other
modes a process keeps its width for life (an MPS percentage and a static partition are read when it starts), and the
agent starts a replacement instead.

**Time.** A segment is charged the time between two events around it, on its stream: the time for which the slot was
held, interference and gaps of the host included. `running_ns` only decides where a batch is cut; see `layer_clock`.

**Warm-up.** Batches of the sizes to be captured run on the rung in force, within the gate and within the instance's own
partition, which sets libraries up and teaches the clock. Then graphs are captured on every rung, which runs nothing:
no SM outside the partition is touched. Green contexts and streams of all rungs exist since the load.

**Memory.** The allocator is bounded by `limit_memory`; each rung that has graphs has memory of its own for their
intermediate results (torch keeps memory by stream), so rungs are captured while that fits, the one in force first.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hasgpu_core.errors import HasgpuError, ModelError, UnsupportedError
from hasgpu_core.function import ModelFormat

from hasgpu_device import models, tensors
from hasgpu_device.backends.cuda import faults, graphs, programs, sharing, torch_device
from hasgpu_device.backends.cuda.driver import LIBRARY, CudaDriver, find_device
from hasgpu_device.backends.cuda.graphs import GraphedProgram
from hasgpu_device.backends.cuda.layer_clock import LEARNT_RUNS, RUN_AHEAD, LayerClock
from hasgpu_device.backends.cuda.rungs import RungSet
from hasgpu_device.backends.cuda.staging import staging_for
from hasgpu_device.errors import DeviceFaultError, LoadError
from hasgpu_device.worker_config import WorkerConfig

SEGMENT_NS = 5_000_000
WARM_UP_RUNS = LEARNT_RUNS + 1
"""The first run of a size also loads kernels and lets libraries choose among theirs."""
WARM_UP_BUDGET_NS = 4_000_000_000
"""Device time; sizes that would exceed it are neither warmed up nor captured."""
CAPTURE_BUDGET_S = 20.0
IDLE_LOOKS = 5
"""So often in a row the device has to be seen idle."""
MEMORY_KEPT = 0.9
"""Captures end when this part of the memory is taken."""


class CudaBackend:
    """One GPU, or a part of it.

    Args:
        config: Of the worker: mode, identity of the GPU, widths, memory.
        environ: Of the process: what MPS was told.
        library: The driver.

    Raises:
        UnsupportedError: torch has no CUDA here, or the mode is none.
    """

    name = "cuda"

    def __init__(
        self, config: WorkerConfig, *, environ: Mapping[str, str] = os.environ, library: str = LIBRARY
    ) -> None:
        try:
            sharing.check_mode(config.mode)
        except HasgpuError as error:
            raise UnsupportedError(str(error)) from error
        torch_device.prepare_environment()
        self._config = config
        self._environ = environ
        self._library = library
        self._driver: CudaDriver | None = None
        self._ordinal = self._device = 0
        self._rungs: RungSet | None = None
        self._streams: dict[tuple[int, int], Any] = {}
        self._wanted = (0, 100)
        self._key = (0, 100)
        self._is_set_up = False
        self._fixed_pct: float | None = None
        self._boundary: Callable[[], None] = lambda: None
        self._events: torch_device.TorchEvents | None = None
        self._clock: LayerClock | None = None
        self._begin: Any = None
        self._end: Any = None
        self._fault: DeviceFaultError | None = None
        self._halted = threading.Event()
        self._graphed: list[GraphedProgram] = []
        self.notes: list[str] = []

    # --- loading -----------------------------------------------------------------------------------------------------

    def setup_loader(self) -> None:
        """Nothing yet: what can fail belongs into `load`, whose errors are told."""

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> models.Model:
        """Opens the device and loads the model onto it.

        Raises:
            LoadError: The model can't be loaded.
            DeviceFaultError: There is no such device, it is not shared as it should be, or it failed.
        """
        with self._faults("loading"):
            try:
                self._open()
                self._boundary = boundary
                model = models.load(config, boundary, self)
                self._synchronize()
            except UnsupportedError as error:
                raise LoadError(str(error)) from error
        return _TimedModel(model, self) if not self._runs_programs(config) else model

    @staticmethod
    def _runs_programs(config: WorkerConfig) -> bool:
        return config.format is not ModelFormat.PYTHON

    def _open(self) -> None:
        torch = torch_device.require_torch()
        self._driver = driver = CudaDriver(self._library)
        is_alone = self._config.mode != sharing.TIMESHARE
        self._ordinal, device = find_device(driver, self._config.gpu_uuid, is_alone=is_alone)
        self._device = device
        driver.use_primary_context(device)
        # After the context: only a process that has one has met the MPS server.
        sharing.check(self._config.mode, driver, device, self._environ)
        try:
            torch.cuda.set_device(self._ordinal)
            torch.cuda.init()
        except RuntimeError as error:
            first_line = str(error).split("\n", 1)[0]
            raise LoadError(f"no CUDA device: torch {torch.__version__} can't use it: {first_line}") from error
        if note := torch_device.limit_memory(self._config.memory_bytes, self._ordinal):
            self.notes.append(note)
        if self._config.mode == sharing.GREEN:
            self._rungs = RungSet(driver, device, self._config.sm_rungs_pct)
            self.notes += self._rungs.notes
            for key, live in self._rungs.live.items():
                self._streams[key] = torch.cuda.ExternalStream(live.stream, device=self._ordinal)
        else:
            self._streams[self._key] = torch.cuda.Stream(device=self._ordinal)
            if self._config.mode == sharing.PERCENTAGE:
                self._fixed_pct = sharing.percentage(self._environ)
        self._events = torch_device.TorchEvents(RUN_AHEAD + 4)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._clock = LayerClock(self._events)
        # What a handler computes while it loads stays within the partition as well.
        torch.cuda.set_stream(self._streams[self._stream_key(*self._wanted)])

    # --- the model's side (`models.Target`) --------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """As torch names it."""
        return f"cuda:{self._ordinal}"

    def place(self, module: Any) -> None:
        """Moves a module onto the device."""
        staging_for(self.device).move_module(module)

    def run_export(self, graph_module: Any) -> Callable[..., Any]:
        """Returns a function that runs a program that was exported, by graphs once they are captured."""
        programs.retarget(graph_module, self.device)
        self.place(graph_module)
        return self._graph(programs.FxProgram(graph_module))

    def run_script(self, module: Any) -> Callable[..., Any]:
        """Returns a function that runs a TorchScript module, as one piece."""
        return self._graph(programs.CallProgram(module))

    def replace_chain(self, module: Any) -> bool:
        """Lets a chain of torch's own layers run by graphs; False when the module is none."""
        traced = programs.traced_chain(module)
        if traced is None:
            return False
        module.forward = self._graph(programs.FxProgram(traced), owns_batches=False)
        return True

    def _graph(self, program: programs.Program, *, owns_batches: bool = True) -> GraphedProgram:
        assert self._clock is not None
        sizes: Sequence[int] = graphs.capture_sizes(self._config.max_batch)
        variable = [spec.name for spec in self._config.inputs if -1 in spec.shape[1:]]
        graphed = GraphedProgram(
            program,
            device=self.device,
            boundary=self._boundary,
            clock=self._clock,
            rung=lambda: self._key,
            sizes=() if variable and owns_batches else sizes,
            owns_batches=owns_batches,
        )
        if variable and owns_batches:
            graphed.notes.append(f"runs eagerly: input {variable[0]!r} has a variable dimension")
        self._graphed.append(graphed)
        return graphed

    # --- the executor's side -----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Puts the executor thread on the rung in force, and tries every rung's stream.

        Opens the device first when no model was loaded, as for a benchmark; it then raises what `load` does.
        """
        import torch

        with self._faults("setting up"):
            if self._clock is None:
                self._open()
            torch.cuda.set_device(self._ordinal)
            self._is_set_up = True
            self._put_in_force()
            for stream in self._streams.values():
                # An event costs no SM; it shows here, not in a request, when a stream is not to be used.
                self._begin.record(stream)
                self._end.record(stream)
                self._end.synchronize()

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Takes the rung of a range.

        Raises:
            UnsupportedError: There is no such rung, or this mode can't change the width of a running worker.
        """
        self._wanted = (first_pct, sm_pct)
        if self._is_set_up:
            with self._faults("changing the SM share"):
                self._put_in_force()

    def _stream_key(self, first_pct: int, sm_pct: int) -> tuple[int, int]:
        """Returns which stream a range has; raises UnsupportedError as `apply_sm` does."""
        if self._rungs is not None:
            return self._rungs.find(sm_pct, first_pct).rung.key
        if self._fixed_pct is not None and self._fixed_pct != sm_pct:
            raise UnsupportedError(
                f"mode {self._config.mode} can't change the SM share of a running worker from {self._fixed_pct:g} % to "
                f"{sm_pct} %; a replacement has to be started"
            )
        return next(iter(self._streams))

    def _put_in_force(self) -> None:
        import torch

        self._key = self._stream_key(*self._wanted)
        if self._fixed_pct is None and self._rungs is None:
            self._fixed_pct = self._wanted[1]
        torch.cuda.set_stream(self._streams[self._key])

    def start_segment(self) -> None:
        """Records the event at which the segment begins."""
        self._stay_if_halted()
        with self._faults("starting a segment"):
            self._begin.record()
        if self._clock is not None:
            self._clock.begin_segment(self._begin)

    def running_ns(self) -> int:
        """Returns about how much device time the segment will have used at the next boundary; see `layer_clock`."""
        self._stay_if_halted()
        assert self._clock is not None
        with self._faults("running a batch"):
            return self._clock.boundary()

    def stop_segment(self) -> int:
        """Waits for the device and returns the time between the segment's two events.

        Raises:
            DeviceFaultError: The device failed; whatever ran in the segment is lost.
        """
        assert self._events is not None
        assert self._clock is not None
        with self._faults("running a batch"):
            self._end.record()
            self._end.synchronize()
            device_ns = self._events.between_ns(self._begin, self._end)
            self._clock.end_segment(device_ns)
        return device_ns

    def begin_batch(self, rows: int) -> None:
        """A batch of a handler begins, within a segment."""
        assert self._clock is not None
        size = graphs.padded_size(rows, graphs.capture_sizes(self._config.max_batch)) or rows
        self._clock.begin_batch(("python", self._key, size))

    def end_batch(self, *, complete: bool) -> None:
        """It is over."""
        assert self._clock is not None
        with self._faults("running a batch"):
            self._clock.end_batch(complete=complete)

    @contextlib.contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        """Names the faults of the device; after one there is no other."""
        if self._fault is not None:
            raise self._fault
        try:
            yield
        except (HasgpuError, RuntimeError) as error:
            fault = faults.fault_in(error, doing)
            if fault is not None:
                self._fault = fault
            if fault is None or fault is error:
                raise
            raise fault from error

    def _synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self._ordinal)

    # --- warm-up -----------------------------------------------------------------------------------------------------

    def warm_up(
        self, model: models.Model, run: Callable[[Callable[[], object]], object], poll: Callable[[], None]
    ) -> str:
        """Gets everything ready that a request should not wait for.

        Args:
            model: As `load` gave it.
            run: Runs work as a background batch, within the gate.
            poll: Puts changed shares into force; called now and then.

        Returns:
            What went otherwise than wished, in words; not a reason not to serve.
        """
        import torch

        rng = random.Random(1)  # noqa: S311  made-up input, not a secret
        notes: list[str] = []
        spent_ns = 0
        for size in graphs.capture_sizes(self._config.max_batch):
            batch = tensors.random_inputs(self._config.inputs, size, rng)
            began_ns = time.monotonic_ns()
            failure = self._warm_size(model, batch, size, run)
            if failure:
                # Another size may still do: a program that was exported for two rows or more refuses one.
                notes = notes or [failure]
                continue
            spent_ns += time.monotonic_ns() - began_ns
            if spent_ns > WARM_UP_BUDGET_NS:
                break
        with torch.inference_mode(), self._faults("capturing graphs"):
            self._plan(run)
            self._capture(run, poll)
        for size in graphs.capture_sizes(self._config.max_batch) if self._graphed else ():
            # A handler whose layers now run by graphs passes other boundaries than it did.
            assert self._clock is not None
            self._clock.forget(("python", self._key, size))
        for graphed in self._graphed:
            graphed.end_warm_up()
            notes += graphed.notes
        return "; ".join([*self.notes, *notes])

    def _warm_size(
        self, model: models.Model, batch: dict[str, Any], size: int, run: Callable[[Callable[[], object]], object]
    ) -> str:
        def work() -> str:
            try:
                model.infer(batch, size)
            except ModelError as error:
                return str(error)
            return ""

        for _ in range(WARM_UP_RUNS):
            if failure := run(work):
                return f"warm-up with random input of {size} failed: {failure}"
        return ""

    def _plan(self, run: Callable[[Callable[[], object]], object]) -> None:
        # On the narrowest rung the same part takes longer, at worst in proportion.
        narrowest_pct = min((key[1] for key in self._streams), default=100)
        limit_ns = round(SEGMENT_NS * narrowest_pct / self._key[1])
        for graphed in self._graphed:
            for size in graphed.sizes:

                def work(graphed: GraphedProgram = graphed, size: int = size) -> str:
                    try:
                        graphed.plan(size, limit_ns)
                    except graphs.CAPTURE_ERRORS as error:
                        if faults.fault_in(error, "planning graphs") is not None:
                            raise
                        return str(error).split("\n", 1)[0]
                    return ""

                if reason := run(work):
                    graphed.drop(size, str(reason))

    def _capture(self, run: Callable[[Callable[[], object]], object], poll: Callable[[], None]) -> None:
        assert self._driver is not None
        recorder = torch_device.TorchRecorder(self._streams, self._driver)
        ends_ns = time.monotonic_ns() + round(CAPTURE_BUDGET_S * 1e9)
        own = self._key
        missing: list[str] = []
        for key in [own, *(key for key in self._streams if key != own)]:
            for graphed in self._graphed:
                for size in graphed.planned():
                    poll()
                    if time.monotonic_ns() > ends_ns or not self._has_room():
                        missing.append(f"{size} at {key[1]} % from {key[0]} %")
                        continue
                    reason = self._capture_one(graphed, key, size, recorder, run)
                    if reason and key == own:
                        graphed.drop(size, reason)
                    elif reason:
                        # What was captured on other rungs is as good as before.
                        missing.append(f"{size} at {key[1]} % from {key[0]} % ({reason})")
        if missing:
            self.notes.append(f"eager for want of time or memory to capture: batches of {', '.join(missing)}")

    def _capture_one(
        self,
        graphed: GraphedProgram,
        key: tuple[int, int],
        size: int,
        recorder: torch_device.TorchRecorder,
        run: Callable[[Callable[[], object]], object],
    ) -> str:
        """Captures one size on one rung, and on the rung in force compares; returns what is wrong."""
        try:
            graphed.capture(key, size, recorder)
            return str(run(lambda: graphed.check(size))) if self._key == key else ""
        except graphs.CAPTURE_ERRORS as error:
            if faults.fault_in(error, "capturing graphs") is not None:
                raise
            return str(error).split("\n", 1)[0]

    def _has_room(self) -> bool:
        import torch

        total_bytes = torch.cuda.get_device_properties(self._ordinal).total_memory
        limit_bytes = min(self._config.memory_bytes or total_bytes, total_bytes)
        return bool(torch.cuda.memory_reserved(self._ordinal) < MEMORY_KEPT * limit_bytes)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _stay_if_halted(self) -> None:
        while self._halted.is_set():
            time.sleep(1.0)

    def quiesce(self, timeout_s: float) -> bool:
        """Gives the device no more work and waits until it has none; in any thread, before the process is ended.

        A process under MPS that is killed with work on the device may take the other clients with it.

        Returns:
            Whether the device is idle; also when it has failed, as nothing runs then.
        """
        self._halted.set()
        driver = self._driver
        if driver is None or self._fault is not None:
            return True
        until_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        idle_looks = 0
        try:
            driver.use_primary_context(self._device)
            # The executor may be between two launches: it comes to a boundary and stays there.
            while idle_looks < IDLE_LOOKS:
                is_idle = all(driver.is_stream_idle(int(stream.cuda_stream)) for stream in self._streams.values())
                idle_looks = idle_looks + 1 if is_idle else 0
                if time.monotonic_ns() > until_ns:
                    return is_idle
                time.sleep(0.01)
        except DeviceFaultError:
            return True
        return True


class _TimedModel(models.Model):
    """A handler whose batches the layer clock is told of."""

    def __init__(self, model: models.Model, backend: CudaBackend) -> None:
        self._model = model
        self._backend = backend
        self.boundaries_count = model.boundaries_count
        self.emulated, self.note = model.emulated, model.note

    def infer(self, batch: dict[str, tensors.Array], rows: int) -> dict[str, tensors.Array]:
        """Runs a batch."""
        self._backend.begin_batch(rows)
        complete = False
        try:
            outputs = self._model.infer(batch, rows)
            complete = True
        finally:
            self._backend.end_batch(complete=complete)
        return outputs
