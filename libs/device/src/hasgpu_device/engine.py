"""The executor: one thread that loads the model and runs the batches of all streams, one at a time, as they arrive."""

from __future__ import annotations

import logging
import queue
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hasgpu.events.v1 import events_pb2
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu_core.errors import HasgpuError, ModelError, UnavailableError, UnsupportedError
from hasgpu_core.resources import InstanceState

from hasgpu_device import backends, batches, models, tensors
from hasgpu_device.batches import JoinedBatch
from hasgpu_device.control import ControlBlock
from hasgpu_device.errors import DeviceFaultError, GateTimeoutError, LoadError
from hasgpu_device.gate import GateMember
from hasgpu_device.ledger import SmLedger
from hasgpu_device.segments import Run, SegmentRunner
from hasgpu_device.tensors import Array
from hasgpu_device.worker_config import WorkerConfig

if TYPE_CHECKING:
    from hasgpu_device.operators import OperatorRow

POLL_S = 0.02
"""How often a worker that loads its model looks whether its shares have changed."""
IDLE_S = 0.25
"""An idle worker is woken by the control block's bell, and looks so often all the same."""
OBSERVATIONS = 64
WARM_UP_BUDGET_NS = 2_000_000_000
"""A largest batch that would take longer on the device is left out of the warm-up."""
COLD_RUNS_FROM = 3
"""With so many repetitions of a measurement or more, the first is left out."""
REASON_MAX_LENGTH = 500
"""Of why a model has no operators."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as it went, for traces."""

    instance: str
    function: str
    batch: int
    """As the gateway numbered it in its stream."""
    traceparent: str
    """Of the batch; empty when not traced."""
    item_traceparents: tuple[str, ...]
    rows: int
    arrived_unix_ns: int
    started_unix_ns: int
    """Taken up: the end of its time in line."""
    ended_unix_ns: int
    run: Run | None
    """Gate wait, execution and segments; None when it never passed the gate."""
    error: str
    """Of the whole batch; empty when it ran."""


class Observer(Protocol):
    """Who wants to know of batches that are traced. Called in the executor thread, after the answer is on its way."""

    def batch_done(self, record: BatchRecord) -> None:
        """A batch was answered of which a request at least is traced."""
        ...

    def close(self) -> None:
        """The worker is about to end; called once."""
        ...


@dataclass(slots=True)
class Job:
    """Something for the executor to do; `answer` may be called from any thread and is called once at most."""

    arrived_unix_ns: int = field(default_factory=time.time_ns)
    cancelled: bool = False
    """The caller is gone: there is nobody to answer."""
    is_done: bool = False


@dataclass(slots=True)
class BatchJob(Job):
    """Run a batch."""

    request: pb.ExecuteRequest = field(default_factory=pb.ExecuteRequest)
    answer: Callable[[pb.ExecuteResponse], None] = lambda _: None
    lose: Callable[[str], None] = lambda _: None
    """Called in place of `answer` when the batch is lost with its device; told why."""


@dataclass(slots=True)
class MeasureJob(Job):
    """Run random batches."""

    request: pb.MeasureRequest = field(default_factory=pb.MeasureRequest)
    answer: Callable[[pb.MeasureResponse | HasgpuError], None] = lambda _: None


@dataclass(slots=True)
class OperatorsJob(Job):
    """Export the model's graph."""

    answer: Callable[[pb.OperatorTable | HasgpuError], None] = lambda _: None


class Engine:
    """The executor thread and its queue.

    Args:
        config: The worker's configuration.
        control: Its control block.
        on_change: Called, in any thread, when `state` has changed or, while draining, the last batch is done.
        observer: Told of every batch that is traced, if given.
    """

    def __init__(
        self,
        config: WorkerConfig,
        control: ControlBlock,
        *,
        on_change: Callable[[], None],
        observer: Observer | None = None,
    ) -> None:
        self._config = config
        self._control = control
        self._on_change = on_change
        self._observer = observer
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: set[int] = set()
        self._current: Job | None = None
        self._runner: SegmentRunner | None = None
        self._model: models.Model | None = None
        self._observations: deque[events_pb2.BatchObservation] = deque(maxlen=OBSERVATIONS)
        self._open: dict[int, Job] = {}
        self.state = InstanceState.LOADING
        self.reason = ""
        self.is_broken = False
        """The executor thread ended by an error of its own."""
        self.fault: DeviceFaultError | None = None
        """The device failed; the state is FAILED."""
        self.is_draining = False
        self.batches_count = 0
        self.thread = threading.Thread(target=self._main, name="executor", daemon=True)

    @property
    def in_flight_count(self) -> int:
        """Jobs taken and not answered."""
        return len(self._open)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread after the jobs before."""
        self._queue.put(None)
        self._control.ring()

    def submit(self, job: Job) -> None:
        """Puts a job into the line, or refuses it at once while draining."""
        if self.is_draining or self.state is InstanceState.FAILED:
            self._refuse(job)
            return
        with self._lock:
            self._open[id(job)] = job
        self._queue.put(job)
        self._control.ring()

    def take_observations(self) -> list[events_pb2.BatchObservation]:
        """Returns the newest observations and forgets them."""
        taken = []
        while self._observations:
            taken.append(self._observations.popleft())
        return taken

    def held_ns(self) -> int:
        """Returns for how long the running batch has held the device."""
        return self._runner.held_ns() if self._runner is not None else 0

    def abandon(self, reason: str) -> None:
        """The executor hangs: answers the running batch as hung and sends the others elsewhere."""
        self.reason = reason
        self.state = InstanceState.FAILED
        current = self._current
        with self._lock:
            jobs = list(self._open.values())
        for job in jobs:
            if job is not current:
                self._refuse(job)
            elif isinstance(job, BatchJob):
                error = batches.item_error(pb.ERROR_KIND_HUNG, reason)
                self._finish(job, pb.ExecuteResponse(results=batches.fail(None, error, len(job.request.items))))
            elif isinstance(job, MeasureJob | OperatorsJob):
                self._finish_other(job, ModelError(reason))

    def quiesce(self, timeout_s: float) -> bool:
        """Waits until the device has no more work of this process, which then may be ended; for any thread.

        Returns:
            Whether it has none; True at once for a device that does not mind.
        """
        backend = self._runner.backend if self._runner is not None else None
        return backend.quiesce(timeout_s) if isinstance(backend, backends.Quiesces) else True

    def _fail(self, reason: str) -> None:
        """The device is gone: what waits goes elsewhere, and the batch that ran is lost.

        It is not sent elsewhere like the others, because it may have been the cause: who lost a batch with its stream
        tries it again once, not without end.
        """
        current = self._current
        self._change(InstanceState.FAILED, reason)
        with self._lock:
            jobs = list(self._open.values())
        for job in jobs:
            if job is not current:
                self._refuse(job)
        if isinstance(current, MeasureJob | OperatorsJob):
            self._finish_other(current, UnavailableError(reason))
        elif isinstance(current, BatchJob) and self._close(current):
            current.lose(reason)

    def _refuse(self, job: Job) -> None:
        text = f"instance {self._config.instance} is {'draining' if self.is_draining else self.state.value}"
        if isinstance(job, BatchJob):
            error = batches.item_error(pb.ERROR_KIND_DRAINING, text)
            self._finish(job, pb.ExecuteResponse(results=batches.fail(None, error, len(job.request.items))))
        elif isinstance(job, MeasureJob | OperatorsJob):
            self._finish_other(job, UnavailableError(text))

    def _close(self, job: Job) -> bool:
        """Takes a job off the list; False when it was answered before."""
        with self._lock:
            self._open.pop(id(job), None)
            was_done, job.is_done = job.is_done, True
            is_last = not self._open
        if is_last and self.is_draining:
            self._on_change()
        return not was_done

    def _finish(self, job: BatchJob, response: pb.ExecuteResponse) -> None:
        response.batch = job.request.batch
        if self._close(job):
            job.answer(response)

    def _finish_measure(self, job: MeasureJob, answer: pb.MeasureResponse | HasgpuError) -> None:
        if self._close(job):
            job.answer(answer)

    def _finish_other(self, job: MeasureJob | OperatorsJob, error: HasgpuError) -> None:
        if self._close(job):
            job.answer(error)

    def _change(self, state: InstanceState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._on_change()

    def _main(self) -> None:
        try:
            with GateMember(self._config.gate_path, self._control.read_shares()) as member:
                try:
                    runner, model = self._set_up(member)
                except (LoadError, UnsupportedError) as error:
                    self._change(InstanceState.FAILED, str(error))
                    return
                self._model = model
                note = self._warm_up(runner, model)
                self._change(InstanceState.READY, "; ".join(said for said in (model.note, note) if said))
                self._loop(runner, model)
        except DeviceFaultError as error:
            logger.error("the device failed: %s", error)
            self.fault = error
            self._fail(str(error))
        except UnsupportedError as error:
            # Shares that this device can't give a running worker; it is started again, with them.
            logger.error("%s", error)
            self.is_broken = True
            self._fail(str(error))
        except BaseException as error:
            logger.exception("the executor broke")
            self.is_broken = True
            self._change(InstanceState.FAILED, f"the worker broke: {models.describe(error)}")
            raise

    def _set_up(self, member: GateMember) -> tuple[SegmentRunner, models.Model]:
        backend = backends.create(self._config)
        ledger = SmLedger(self._config.ledger_path) if self._config.ledger_path else None
        runner = SegmentRunner(backend, member, self._control, ledger=ledger)
        self._runner = runner
        runner.poll()

        # In a thread of its own: where a thread's priority can only be lowered, the executor must not share in it.
        with ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=backend.setup_loader) as pool:
            loading = pool.submit(backend.load, self._config, runner.boundary)
            while not loading.done():
                runner.poll()
                wait([loading], timeout=POLL_S)
        model = loading.result()
        backend.setup()
        runner.poll()
        return runner, model

    def _warm_up(self, runner: SegmentRunner, model: models.Model) -> str:
        """Runs random batches of 1 and of the largest size; returns what went wrong, in words.

        A model may rightly refuse random input (an image decoder does), so this is no reason not to serve. An emulated
        model has nothing to be warmed up.
        """
        if model.emulated:
            return ""
        if isinstance(runner.backend, backends.WarmsUp):
            return runner.backend.warm_up(model, lambda work: runner.run(work, background=True)[0], runner.poll)
        rng = random.Random(1)  # noqa: S311  made-up input, not a secret
        device_ns = 0
        for rows in sorted({1, self._config.max_batch}):
            if device_ns * rows > WARM_UP_BUDGET_NS:
                return ""
            batch = tensors.random_inputs(self._config.inputs, rows, rng)
            answer, run = runner.run(lambda: _infer(model, batch, rows), background=True)  # noqa: B023  runs at once
            device_ns = run.device_ns
            if isinstance(answer, HasgpuError):
                return f"warm-up with random input of {rows} failed: {answer}"
        return ""

    def _loop(self, runner: SegmentRunner, model: models.Model) -> None:
        while True:
            seen = self._control.bell()
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                runner.poll()
                if self._control.read_shares().draining != self.is_draining:
                    self._on_change()
                self._control.wait_for_bell(seen, IDLE_S)
                continue
            if job is None:
                return
            self._current = job
            if isinstance(job, BatchJob):
                self._execute(runner, model, job)
            elif isinstance(job, MeasureJob):
                self._measure(runner, model, job)
            elif isinstance(job, OperatorsJob):
                self._list_operators(model, job)
            self._current = None
            if runner.lingers and self._queue.empty():
                runner.withdraw()

    def _execute(self, runner: SegmentRunner, model: models.Model, job: BatchJob) -> None:
        started_unix_ns = time.time_ns()
        request = job.request
        count = len(request.items)
        batch: JoinedBatch | None = None
        run: Run | None = None
        failure = ""
        try:
            left_ns = request.deadline_unix_ns - started_unix_ns if request.deadline_unix_ns else None
            if job.cancelled or (left_ns is not None and left_ns <= 0):
                raise GateTimeoutError("", "the deadline passed in line")
            batch = batches.join(request, self._config.inputs, max_batch=self._config.max_batch)
            results = [pb.ItemResult(error=batch.errors.get(index)) for index in range(count)]
            if batch.rows:
                inputs, rows = batch.inputs, batch.rows
                answer, run = runner.run(
                    lambda: _infer(model, inputs, rows),
                    deadline_ns=None if left_ns is None else time.monotonic_ns() + left_ns,
                    cancelled=lambda: job.cancelled,
                    linger=lambda: not self._queue.empty(),
                )
                if isinstance(answer, HasgpuError):
                    failure = str(answer)
                    results = batches.fail(batch, batches.item_error(pb.ERROR_KIND_MODEL, failure), count)
                else:
                    results = batches.split(batch, answer, self._config.outputs, count)
        except GateTimeoutError:
            failure = "the caller is gone" if job.cancelled else "the deadline passed before the device was free"
            results = batches.fail(batch, batches.item_error(pb.ERROR_KIND_EXPIRED, failure), count)
        except MemoryError:
            failure = "the batch does not fit into memory"
            results = batches.fail(batch, batches.item_error(pb.ERROR_KIND_MODEL, failure), count)
        self._answer(job, results, started_unix_ns, batch, run, failure)

    def _answer(
        self,
        job: BatchJob,
        results: list[pb.ItemResult],
        started_unix_ns: int,
        batch: JoinedBatch | None,
        run: Run | None,
        failure: str,
    ) -> None:
        request = job.request
        line_ns = max(0, started_unix_ns - job.arrived_unix_ns)
        response = pb.ExecuteResponse(results=results, started_unix_ns=started_unix_ns, line_ns=line_ns)
        response.emulated = self._model is not None and self._model.emulated
        rows = batch.rows if batch is not None else 0
        self.batches_count += 1
        if run is not None:
            response.gate_wait_ns, response.execute_ns = run.gate_wait_ns, run.execute_ns
            response.device_time_ns, response.segments_count = run.device_ns, run.segments_count
            response.sm_pct, response.request_permille = run.sm_pct, run.request_permille
            if not failure:
                self._observations.append(
                    events_pb2.BatchObservation(
                        batch=rows,
                        sm_pct=run.sm_pct,
                        request_permille=run.request_permille,
                        latency_ns=run.gate_wait_ns + run.execute_ns,
                        device_time_ns=run.device_ns,
                        gate_wait_ns=run.gate_wait_ns,
                    )
                )
        self._finish(job, response)
        if self._observer is not None and any(item.traceparent for item in request.items):
            self._observer.batch_done(
                BatchRecord(
                    self._config.instance,
                    self._config.function,
                    request.batch,
                    request.traceparent,
                    tuple(item.traceparent for item in request.items),
                    rows,
                    job.arrived_unix_ns,
                    started_unix_ns,
                    time.time_ns(),
                    run,
                    failure,
                )
            )

    def _measure(self, runner: SegmentRunner, model: models.Model, job: MeasureJob) -> None:
        request = job.request
        rng = random.Random(request.batch)  # noqa: S311  made-up input, not a secret
        batch = tensors.random_inputs(self._config.inputs, request.batch, rng)
        wanted = max(1, request.repetitions_count)
        runs: list[Run] = []
        began_ns = time.monotonic_ns()
        while len(runs) < wanted and not job.cancelled:
            more = len(runs) + 1 < wanted
            try:
                answer, run = runner.run(
                    lambda: _infer(model, batch, request.batch),
                    cancelled=lambda: job.cancelled,
                    linger=lambda: more,  # noqa: B023  asked before the loop goes on
                )
            except GateTimeoutError:
                break
            if isinstance(answer, HasgpuError):
                self._finish_measure(job, answer)
                return
            runs.append(run)
            if request.budget_ms and time.monotonic_ns() - began_ns >= request.budget_ms * 1_000_000:
                break
        if not runs:
            self._finish_measure(job, UnavailableError("the measurement was cancelled"))
            return
        self._finish_measure(job, summary(runs))

    def _list_operators(self, model: models.Model, job: OperatorsJob) -> None:
        """Exports the model; why that can't be done is part of the answer. The device is not held meanwhile."""
        from hasgpu_device import extraction  # it takes torch, which an emulated device does without

        try:
            table = pb.OperatorTable(rows=[_operator(row) for row in extraction.extract(model, self._config)])
        except HasgpuError as error:
            table = pb.OperatorTable(reason=str(error)[:REASON_MAX_LENGTH])
        if self._close(job):
            job.answer(table)


def summary(runs: Sequence[Run]) -> pb.MeasureResponse:
    """Returns what repetitions of one batch come to.

    Medians, because a shared host now and then holds one up for long. Of three or more the first is left out: it finds
    the caches cold and the bucket as the time before left it.

    Args:
        runs: In the order they were made; at least one.
    """
    counted = runs[1:] if len(runs) >= COLD_RUNS_FROM else runs
    return pb.MeasureResponse(
        latency_ns=round(statistics.median(run.gate_wait_ns + run.execute_ns for run in counted)),
        device_time_ns=round(statistics.median(run.device_ns for run in counted)),
        longest_segment_ns=max(run.longest_segment_ns for run in counted),
        repetitions_count=len(runs),
    )


def _infer(model: models.Model, batch: dict[str, Array], rows: int) -> dict[str, Array] | HasgpuError:
    try:
        return model.infer(batch, rows)
    except ModelError as error:
        return error


def _operator(row: OperatorRow) -> pb.Operator:
    return pb.Operator(
        op=row.op,
        flops=row.flops,
        input_bytes=row.input_bytes,
        weight_bytes=row.weight_bytes,
        output_bytes=row.output_bytes,
        groups=row.groups,
        output_shape=row.output_shape,
    )
