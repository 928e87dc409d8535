"""What the agent does when a GPU, its MPS server or a worker on it fails: a table, and a pure function that reads it.

`decide` looks at one GPU and returns ordered actions; the agent carries them out and looks again. It may be called as
often as one likes: what has been done shows in the next observation. Rules, the first that fits:

| observed | done |
|---|---|
| NVML says that the GPU is lost | kill its workers, mark it unhealthy; nothing is started again |
| the daemon does not run | stop the workers, start the daemon, start the workers |
| the daemon does not answer, for UNRESPONSIVE_S | stop the workers, quit and start the daemon, start the workers |
| the server is in FAULT, or a worker met a fault that MPS reports to all clients | stop all workers of the GPU |
| FAULT, no worker left, for RECOVERY_S | quit and start the daemon, start the workers |
| the server has been starting for INITIALIZE_S | quit and start the daemon, start the workers |
| a worker's heartbeat is lost | terminate its client, kill it, start it |
| a worker ended | by the class of its fault (`FAULTS`); one whose model can't be loaded is not the table's affair |
| `limit_count` recoveries within `limit_s` did not help | stop the workers; unhealthy until they are so long ago |

A worker is stopped by three steps: it is asked to drain and end, then its MPS client is terminated, then it is killed.
SIGKILL of a client with work on the GPU is undefined without the second (NVIDIA MPS guide, "Client Termination"). A
server in FAULT accepts no client until all that it had have ended (same guide, "Error Containment").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from hasgpu_device.backends.cuda import sharing
from hasgpu_device.backends.cuda.mps import MpsState
from hasgpu_device.status import EXIT_LOAD_FAILED


class FaultClass(StrEnum):
    """How far a fault reaches."""

    WORKER = "worker"
    """This worker alone; it is started again."""
    GPU = "gpu"
    """Every MPS client of the GPU without static partitions; else this worker alone."""
    SERVER = "server"
    """The way to the MPS server is broken; started again when the server is well."""
    FULL = "full"
    """The MPS server has no room; not started again before another worker of the GPU has ended."""
    UNPROTECTED = "unprotected"
    """It would run without its limits; not started again before the GPU is probed anew."""
    HARDWARE = "hardware"
    """The device itself; it is unhealthy."""


FAULTS: Mapping[str, FaultClass] = {
    "CUDA_ERROR_OUT_OF_MEMORY": FaultClass.WORKER,
    "CUDA_ERROR_MPS_CONNECTION_FAILED": FaultClass.SERVER,
    "CUDA_ERROR_MPS_RPC_FAILURE": FaultClass.SERVER,
    "CUDA_ERROR_MPS_SERVER_NOT_READY": FaultClass.SERVER,
    "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED": FaultClass.FULL,
    "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED": FaultClass.FULL,
    "CUDA_ERROR_MPS_CLIENT_TERMINATED": FaultClass.WORKER,
    "CUDA_ERROR_CONTAINED": FaultClass.WORKER,
    "CUDA_ERROR_ILLEGAL_ADDRESS": FaultClass.GPU,
    "CUDA_ERROR_LAUNCH_TIMEOUT": FaultClass.GPU,
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": FaultClass.GPU,
    "CUDA_ERROR_ASSERT": FaultClass.GPU,
    "CUDA_ERROR_HARDWARE_STACK_ERROR": FaultClass.GPU,
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": FaultClass.GPU,
    "CUDA_ERROR_MISALIGNED_ADDRESS": FaultClass.GPU,
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": FaultClass.GPU,
    "CUDA_ERROR_INVALID_PC": FaultClass.GPU,
    "CUDA_ERROR_LAUNCH_FAILED": FaultClass.GPU,
    "CUDA_ERROR_TENSOR_MEMORY_LEAK": FaultClass.GPU,
    "CUDA_ERROR_UNKNOWN": FaultClass.GPU,
    "CUDA_ERROR_DEINITIALIZED": FaultClass.WORKER,
    "CUDA_ERROR_ECC_UNCORRECTABLE": FaultClass.HARDWARE,
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": FaultClass.HARDWARE,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": FaultClass.HARDWARE,
    "CUDA_ERROR_NO_DEVICE": FaultClass.HARDWARE,
    sharing.NOT_IN_USE: FaultClass.UNPROTECTED,
    sharing.LIMIT_MISSING: FaultClass.UNPROTECTED,
}
"""By the name in `DeviceFaultError` and a worker's status. A fault that is not here is taken for WORKER."""


class ActionKind(StrEnum):
    """What is to be done."""

    DRAIN = "drain"
    """Ask a worker to finish what it has and end; go on after `timeout_s`."""
    TERMINATE_CLIENT = "terminate_client"
    """`terminate_client` of the worker's pid; a worker that has ended meanwhile is passed over."""
    KILL = "kill"
    """SIGKILL, if it still runs."""
    QUIT_DAEMON = "quit_daemon"
    START_DAEMON = "start_daemon"
    """Start the daemon and its server, and await ACTIVE."""
    START_WORKER = "start_worker"
    """Start an instance of the plan again, with its back-off."""
    MARK_UNHEALTHY = "mark_unhealthy"


@dataclass(frozen=True, slots=True)
class Action:
    """One step; they are carried out in order."""

    kind: ActionKind
    instance: str = ""
    timeout_s: float = 0.0
    """How long the step may take."""


@dataclass(frozen=True, slots=True)
class ObservedWorker:
    """A worker of the GPU that the plan wants."""

    instance: str
    is_running: bool
    exit_code: int | None = None
    """Of one that ended; None: not known, or killed by a signal."""
    fault: str = ""
    """Name of the fault that it told of."""
    is_silent: bool = False
    """Its heartbeat is lost."""
    knew_full: bool = False
    """As many workers run as when it was turned away for want of room."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One GPU at one time."""

    now_s: float
    mps: MpsState | None
    """None: the GPU is shared without MPS."""
    mps_since_s: float
    """Since when the MPS state has been what it is."""
    workers: tuple[ObservedWorker, ...]
    """In the order of the plan."""
    is_static: bool = False
    """With static SM partitions, which contain a client's fault."""
    lost_reason: str = ""
    """Why the GPU is lost (NVML), in words; empty: it is not."""
    recoveries_s: tuple[float, ...] = ()
    """When decisions with `is_recovery` were made for this GPU."""
    is_unhealthy: bool = False
    """What the newest decision said."""


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """How much is tried, and how long is waited."""

    limit_count: int = 3
    """Recoveries within `limit_s` after which the GPU is unhealthy."""
    limit_s: float = 600.0
    incident_s: float = 60.0
    """Steps of recovery that lie nearer to the last one belong to it and are not counted."""
    drain_s: float = 5.0
    terminate_s: float = 10.0
    quit_s: float = 20.0
    start_s: float = 60.0
    recovery_s: float = 10.0
    """How long a server in FAULT without clients may take to become active by itself."""
    unresponsive_s: float = 15.0
    initialize_s: float = 60.0
    look_again_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a GPU."""

    actions: tuple[Action, ...]
    reason: str
    """In words; empty when nothing is wrong."""
    is_recovery: bool = False
    """To be noted in `recoveries_s`, with the time at which it was decided."""
    is_unhealthy: bool = False
    """Nothing may be placed on the GPU."""
    look_again_s: float | None = None
    """Something is awaited: look again after so long at the latest."""


def class_of(fault: str) -> FaultClass:
    """Returns how far a fault reaches."""
    return FAULTS.get(fault, FaultClass.WORKER)


def decide(seen: Observation, limits: FaultLimits) -> Decision:
    """Returns what is to be done about one GPU; with nothing wrong, nothing."""
    if seen.lost_reason:
        kills = tuple(Action(ActionKind.KILL, worker.instance) for worker in seen.workers if worker.is_running)
        return Decision(
            (*kills, Action(ActionKind.MARK_UNHEALTHY)), f"the GPU is lost: {seen.lost_reason}", is_unhealthy=True
        )
    if broken := _first_fault(seen.workers, FaultClass.HARDWARE):
        return _give_up(seen, limits, f"{broken.instance} met {broken.fault}, a fault of the device")
    recovery = _daemon_trouble(seen, limits) or _common_fault(seen, limits)
    recent = [at_s for at_s in seen.recoveries_s if 0 <= seen.now_s - at_s < limits.limit_s]
    is_going_on = any(seen.now_s - at_s < limits.incident_s for at_s in recent)
    is_tired = len(recent) >= limits.limit_count
    if is_tired and (seen.is_unhealthy or (recovery is not None and recovery.is_recovery and not is_going_on)):
        told = recovery.reason if recovery is not None else "the GPU is unhealthy"
        given_up = _give_up(seen, limits, f"{told}; {len(recent)} recoveries within {limits.limit_s:g} s did not help")
        rest_s = min(recent) + limits.limit_s - seen.now_s
        return replace(given_up, look_again_s=max(rest_s, limits.look_again_s))
    if recovery is None:
        return _single_workers(seen, limits)
    return replace(recovery, is_recovery=recovery.is_recovery and not is_going_on)


def _daemon_trouble(seen: Observation, limits: FaultLimits) -> Decision | None:
    """Returns what the state of the daemon and its server asks for; None: nothing."""
    age_s = seen.now_s - seen.mps_since_s
    if seen.mps is MpsState.GONE:
        return _recover(seen, limits, "the MPS daemon does not run", quits=False)
    patience = {
        MpsState.UNRESPONSIVE: (limits.unresponsive_s, "the MPS daemon does not answer"),
        MpsState.INITIALIZING: (limits.initialize_s, "the MPS server is starting"),
    }
    if seen.mps in patience:
        patience_s, words = patience[seen.mps]
        if age_s < patience_s:
            return Decision((), words, look_again_s=limits.look_again_s)
        return _recover(seen, limits, f"{words}, for {age_s:.0f} s", quits=True)
    if seen.mps is not MpsState.FAULT:
        return None
    if any(worker.is_running for worker in seen.workers):
        # The workers are started again when the server has come back.
        return Decision(
            tuple(_stop(seen.workers, seen, limits)),
            "the MPS server is in FAULT: all its clients have to end",
            is_recovery=True,
            look_again_s=limits.look_again_s,
        )
    if age_s < limits.recovery_s:
        return Decision((), "the MPS server is in FAULT, awaited without clients", look_again_s=limits.look_again_s)
    return _recover(seen, limits, f"the MPS server is in FAULT, for {age_s:.0f} s, without clients", quits=True)


def _common_fault(seen: Observation, limits: FaultLimits) -> Decision | None:
    """Returns the recovery from a fault that reached all clients, though the server is well (again)."""
    if seen.mps is None or seen.is_static:
        return None
    culprit = _first_fault(seen.workers, FaultClass.GPU)
    if culprit is None:
        return None
    actions = [*_stop(seen.workers, seen, limits), *_start(seen.workers)]
    reason = f"{culprit.instance} met {culprit.fault}, which MPS reports to all clients of the GPU"
    return Decision(tuple(actions), reason, is_recovery=True)


def _single_workers(seen: Observation, limits: FaultLimits) -> Decision:
    """Returns what is to be done about workers whose trouble is their own."""
    actions: list[Action] = []
    reasons = []
    for worker in seen.workers:
        if worker.is_running and worker.is_silent:
            actions += [*_stop((worker,), seen, limits, drain=False), *_start((worker,))]
            reasons.append(f"{worker.instance} gives no sign")
        elif not worker.is_running:
            words = worker.fault or ("no exit code" if worker.exit_code is None else f"exit code {worker.exit_code}")
            reach = class_of(worker.fault)
            if worker.exit_code == EXIT_LOAD_FAILED:
                continue
            if reach is FaultClass.UNPROTECTED:
                reasons.append(
                    f"{worker.instance} runs without its limits ({words}): not started before the GPU is probed"
                )
            elif reach is FaultClass.FULL and worker.knew_full:
                reasons.append(f"{worker.instance} finds no room in the MPS server ({words})")
            else:
                actions += _start((worker,))
                reasons.append(f"{worker.instance} ended ({words})")
    return Decision(tuple(actions), "; ".join(reasons))


def _recover(seen: Observation, limits: FaultLimits, reason: str, *, quits: bool) -> Decision:
    actions = list(_stop(seen.workers, seen, limits))
    if quits:
        actions.append(Action(ActionKind.QUIT_DAEMON, timeout_s=limits.quit_s))
    actions.append(Action(ActionKind.START_DAEMON, timeout_s=limits.start_s))
    return Decision((*actions, *_start(seen.workers)), reason, is_recovery=True)


def _give_up(seen: Observation, limits: FaultLimits, reason: str) -> Decision:
    return Decision((*_stop(seen.workers, seen, limits), Action(ActionKind.MARK_UNHEALTHY)), reason, is_unhealthy=True)


def _stop(
    workers: Iterable[ObservedWorker], seen: Observation, limits: FaultLimits, *, drain: bool = True
) -> list[Action]:
    """Returns the steps that end the running ones, each step for all of them before the next."""
    running = [worker.instance for worker in workers if worker.is_running]
    steps = [Action(ActionKind.DRAIN, name, limits.drain_s) for name in running] if drain else []
    if seen.mps not in (None, MpsState.GONE):
        steps += [Action(ActionKind.TERMINATE_CLIENT, name, limits.terminate_s) for name in running]
    return steps + [Action(ActionKind.KILL, name) for name in running]


def _start(workers: Iterable[ObservedWorker]) -> list[Action]:
    return [
        Action(ActionKind.START_WORKER, worker.instance)
        for worker in workers
        if class_of(worker.fault) is not FaultClass.UNPROTECTED and worker.exit_code != EXIT_LOAD_FAILED
    ]


def _first_fault(workers: Iterable[ObservedWorker], reach: FaultClass) -> ObservedWorker | None:
    """Returns the first worker that ended with a fault of this reach."""
    return next((w for w in workers if w.fault and not w.is_running and class_of(w.fault) is reach), None)
