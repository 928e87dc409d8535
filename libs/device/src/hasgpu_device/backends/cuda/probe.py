"""The probe: what a GPU can really enforce, found out before anything is placed on it.

`python -m hasgpu_device.backends.cuda.probe --gpu UUID --json OUT [--cache FILE] [--pipe-dir D] [--mode MODE]`

Each step runs in a process of its own with a time-out, so that a driver that hangs or crashes is a finding. Without
`--pipe-dir` the probe starts a throw-away MPS daemon in a temporary folder and quits it at the end; with it, it is a
client of the daemon that runs there, which it never quits. The GPU should be idle: the timed steps compare times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError

from hasgpu_device.backends.cuda.mps import (
    MpsDaemon,
    client_environment,
    replace_cuda_variables,
    timeshare_environment,
)
from hasgpu_device.backends.cuda.mps_control import BINARY, MpsControl
from hasgpu_device.backends.cuda.probe_findings import (
    STEPS,
    WIDTHS_PCT,
    Finding,
    Findings,
    ModeChoice,
    ProbeCache,
    capabilities,
    choose_mode,
    compare_sms,
    judge_rungs,
)
from hasgpu_device.backends.cuda.sharing import MODES
from hasgpu_device.errors import MpsError, MpsTimeoutError
from hasgpu_device.worker_config import write_json

STEP_TIMEOUT_S = 60.0
KILL_WAIT_S = 5.0
RECORD_S = 2.0
"""How long each of two processes records its SMs; longer than their starts lie apart."""
MODULE = "hasgpu_device.backends.cuda.probe_steps"

Argv = Callable[[str, Mapping[str, Any]], Sequence[str]]


def step_argv(step: str, arguments: Mapping[str, Any]) -> Sequence[str]:
    """Returns the command line of a step's process."""
    return (sys.executable, "-m", MODULE, step, json.dumps(arguments))


class Child:
    """A step's process.

    Args:
        step: The name under which its finding is told.
        argv: Its command line.
        environment: Its environment.
        control: Of the MPS daemon whose client it is: asked to end the client's work before it is killed.
    """

    def __init__(
        self, step: str, argv: Sequence[str], environment: Mapping[str, str], control: MpsControl | None = None
    ) -> None:
        self._step = step
        self._control = control
        self._failure = ""
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            self._failure = f"its process can't be started: {error.strerror or error}"

    def finish(self, timeout_s: float) -> Finding:
        """Waits for the process and returns what it found; a hang or crash is a finding, too."""
        name = STEPS.get(self._step, self._step)
        if self._process is None:
            return Finding(self._step, False, self._failure, is_final=False)
        try:
            out, complaints = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._end(self._process)
            text = f"the probe of {name} did not answer in {timeout_s:.3g} s"
            return Finding(self._step, False, text, is_final=False)
        code = self._process.returncode
        if code:
            last = complaints.strip().splitlines()[-1:] or ["no message"]
            how = f"exit code {code}" if code > 0 else f"signal {_signal_name(-code)}"
            return Finding(self._step, False, f"the probe of {name} ended with {how}: {last[0]}", is_final=False)
        try:
            answer = json.loads(out.strip().splitlines()[-1])
            return Finding(self._step, answer["is_proven"] is True, str(answer["detail"]), dict(answer["data"]))
        except (ValueError, LookupError, TypeError):
            text = f"the probe of {name} gave no answer that can be read: {out.strip()[-200:]!r}"
            return Finding(self._step, False, text, is_final=False)

    def _end(self, process: subprocess.Popen[str]) -> None:
        if self._control is not None:
            try:
                for server in self._control.servers():
                    if process.pid in self._control.clients(server):
                        self._control.terminate_client(server, process.pid)
            except MpsError:
                pass  # what hangs a client may well hang the daemon; the process has to go all the same
        with suppress(ProcessLookupError):
            # Its session is its own, so its group is.
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            # A process that hangs inside the kernel's driver does not even end by that: it is left behind.
            process.communicate(timeout=KILL_WAIT_S)


class Probe:
    """Runs the steps for one GPU.

    Args:
        gpu_uuid: "GPU-...".
        environment: What the steps' processes inherit, PATH included.
        widths_pct: Widths of the partitions that are to be offered; 100 is always tried.
        wanted: A mode asked for; only for "mps+static" are static partitions tried.
        pipe_dir: Of an MPS daemon that runs; None: one is started and quit.
        binary: MPS's control program.
        timeout_s: Of each step.
        record_s: How long SMs are recorded.
        argv: Makes a step's command line.
    """

    def __init__(
        self,
        gpu_uuid: str,
        *,
        environment: Mapping[str, str],
        widths_pct: Sequence[int] = WIDTHS_PCT,
        wanted: str = "",
        pipe_dir: Path | None = None,
        binary: str = BINARY,
        timeout_s: float = STEP_TIMEOUT_S,
        record_s: float = RECORD_S,
        argv: Argv = step_argv,
    ) -> None:
        self.gpu_uuid = gpu_uuid
        self.widths_pct = tuple(sorted({*widths_pct, 100}))
        self._inherited = environment
        self._wanted = wanted
        self._pipe_dir = pipe_dir
        self._binary = binary
        self._timeout_s = timeout_s
        self._record_s = record_s
        self._argv = argv
        self._steps: dict[str, Finding] = {}
        self._control: MpsControl | None = None

    def run(self, cache: ProbeCache | None = None) -> Findings:
        """Returns what is known of the GPU: from the cache, or found out now and put there.

        Never raises for what a step did; OSError when the cache or a temporary folder can't be written.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hgp")))
            empty = folder / "none"
            empty.mkdir()
            outside = replace_cuda_variables(self._inherited, timeshare_environment(self.gpu_uuid, empty))
            nvml = self._note(self._step("nvml", outside))
            torch_version = _torch_version()
            driver_version = str(nvml.data.get("driver_version") or "")
            if cache is not None and driver_version:
                kept = cache.load(self.gpu_uuid, driver_version, torch_version, self.widths_pct)
                if kept is not None and (self._wanted != "mps+static" or "static" in kept.steps):
                    return replace(kept, steps={**kept.steps, "nvml": nvml})
            driver = self._note(self._step("driver", outside))
            if driver.is_proven and not nvml.data.get("refused"):
                self._probe_mps(folder)
        cuda = driver.data.get("cuda", [0, 0])
        findings = Findings(
            self.gpu_uuid,
            driver_version or f"CUDA {cuda[0]}.{cuda[1]}",
            torch_version,
            self.widths_pct,
            dict(self._steps),
        )
        if cache is not None and driver_version:
            cache.save(findings)
        return findings

    def _probe_mps(self, folder: Path) -> None:
        daemon = None
        if self._pipe_dir is None:
            daemon = self._start_daemon(folder / "m", static=False)
        else:
            self._join(self._pipe_dir)
        try:
            if self._steps["mps_start"].is_proven:
                self._probe_space()
        finally:
            if daemon is not None:
                daemon.quit()
        if self._wanted == "mps+static" and self._steps["mps_start"].is_proven:
            self._note(self._probe_static(folder / "s"))

    def _start_daemon(self, folder: Path, *, static: bool) -> MpsDaemon | None:
        step = "static" if static else "mps_start"
        try:
            daemon = MpsDaemon(self.gpu_uuid, folder, environment=self._inherited, binary=self._binary)
            # Static partitions are made before there are clients; a server may count as one.
            daemon.start(static=static, server_uid=None if static else os.geteuid(), timeout_s=self._timeout_s)
        except (MpsError, InvalidError) as error:
            self._note(Finding(step, False, str(error), is_final=not isinstance(error, MpsTimeoutError)))
            return None
        self._control = daemon.control
        if not static:
            self._pipe = daemon.pipe_dir
            self._note(Finding(step, True, "a daemon started in a private folder, and its server is active"))
        return daemon

    def _join(self, pipe_dir: Path) -> None:
        control = MpsControl(
            replace_cuda_variables(self._inherited, {"CUDA_MPS_PIPE_DIRECTORY": str(pipe_dir)}), binary=self._binary
        )
        try:
            control.default_active_thread_pct()
        except MpsError as error:
            self._note(Finding("mps_start", False, f"the daemon in {pipe_dir} does not answer: {error}"))
            return
        self._control, self._pipe = control, pipe_dir
        self._note(Finding("mps_start", True, f"the daemon in {pipe_dir} answers"))

    def _probe_space(self) -> None:
        inside = self._client()
        if not self._note(self._step("mps_in_use", inside)).is_proven:
            return
        if self._wanted != "mps+pct" and self._note(self._step("green_api", inside)).is_proven:
            self._probe_green(inside)
        green = ("green_api", "groups", "bite_green", "disjoint")
        if not all(step in self._steps and self._steps[step].is_proven for step in green):
            self._note(self._probe_pct())

    def _probe_green(self, inside: Mapping[str, str]) -> None:
        if not self._note(self._step("groups", inside)).is_proven:
            return
        timed = self._step("bite_green", inside)
        if timed.is_proven:
            try:
                times = {int(width): [(int(s), float(t)) for s, t in v] for width, v in timed.data["times_us"].items()}
            except (KeyError, TypeError, ValueError) as error:
                timed = replace(timed, is_proven=False, detail=f"its times can't be read: {error!r}", is_final=False)
            else:
                timed = judge_rungs("bite_green", times)
        if self._note(timed).is_proven:
            self._note(self._probe_disjoint(inside))

    def _probe_disjoint(self, inside: Mapping[str, str]) -> Finding:
        children = [self._child("disjoint", inside, "record_sms") for _ in range(2)]
        deadline_s = time.monotonic() + self._timeout_s
        found = [child.finish(max(deadline_s - time.monotonic(), 1.0)) for child in children]
        for one in found:
            if not one.is_proven:
                return one
        compared = compare_sms(found[0].data.get("sms", {}), found[1].data.get("sms", {}))
        (one_begin, one_end), (two_begin, two_end) = (one.data.get("span_ns", (0, 0)) for one in found)
        together = one_begin < two_end and two_begin < one_end
        return replace(compared, detail=f"{compared.detail}, {'at once' if together else 'one after the other'}")

    def _probe_pct(self) -> Finding:
        times: dict[int, list[tuple[int, float]]] = {}
        for width in self.widths_pct:
            found = self._child("bite_pct", self._client("mps+pct", sm_pct=width)).finish(self._timeout_s)
            if not found.is_proven:
                return replace(found, detail=f"at {width} %: {found.detail}")
            times[width] = [(int(found.data["sms"]), float(found.data["time_us"]))]
        return judge_rungs("bite_pct", times)

    def _probe_static(self, folder: Path) -> Finding:
        if self._pipe_dir is not None:
            return Finding("static", False, f"not tried: a daemon without -S runs in {self._pipe_dir}", is_final=False)
        daemon = self._start_daemon(folder, static=True)
        if daemon is None:
            return self._steps["static"]
        try:
            partition = daemon.add_partition(1)
            listed = daemon.partitions()
            self._pipe = daemon.pipe_dir
            seen = self._child("static", self._client("mps+static", partition=partition), "visible_sms").finish(
                self._timeout_s
            )
        except MpsError as error:
            return Finding("static", False, str(error))
        finally:
            daemon.quit()
        return _judge_static(seen, listed.used_sms_count, listed.free_chunks_count + listed.used_chunks_count)

    def _client(self, mode: str = "mps+green", **options: Any) -> Mapping[str, str]:
        return replace_cuda_variables(self._inherited, client_environment(self._pipe, mode, **options))

    def _child(self, step: str, environment: Mapping[str, str], function: str = "") -> Child:
        arguments = {"gpu_uuid": self.gpu_uuid, "widths_pct": list(self.widths_pct), "record_s": self._record_s}
        return Child(step, self._argv(function or step, arguments), environment, self._control)

    def _step(self, step: str, environment: Mapping[str, str]) -> Finding:
        return self._child(step, environment).finish(self._timeout_s)

    def _note(self, found: Finding) -> Finding:
        self._steps[found.step] = found
        return found


def _judge_static(seen: Finding, partition_sms: int, chunks_count: int) -> Finding:
    """Returns what a client inside a partition of one chunk proves."""
    if not seen.is_proven:
        return replace(seen, step="static")
    sms = int(seen.data["sms"])
    if sms != partition_sms or chunks_count < 1:
        return Finding("static", False, f"a client sees {sms} SMs in a partition of {partition_sms}")
    rungs = sorted({-(-100 * count // chunks_count) for count in range(1, chunks_count + 1)})
    text = f"a client in a partition of one chunk sees its {sms} SMs; there are {chunks_count} chunks"
    return Finding("static", True, text, {"sm_rungs_pct": rungs, "chunk_sms": sms, "chunks": chunks_count})


def report(findings: Findings, choice: ModeChoice) -> dict[str, Any]:
    """Returns what the command writes: the mode, what may be claimed, and all findings."""
    return {
        "mode": choice.mode,
        "reasons": list(choice.reasons),
        "sm_rungs_pct": list(choice.sm_rungs_pct),
        "capabilities": list(capabilities(findings, choice)),
        "findings": findings.to_json(),
    }


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Probes a GPU and writes what was found; 0 also when the GPU can't be used, which the file then says."""
    parser = argparse.ArgumentParser(prog="hasgpu-probe", description="Find out what a GPU can enforce.")
    parser.add_argument("--gpu", required=True, metavar="UUID", help="GPU-..., as nvidia-smi -L prints it")
    parser.add_argument("--json", required=True, type=Path, metavar="OUT", help="where the findings are written")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="findings of earlier runs, read and written")
    parser.add_argument("--pipe-dir", type=Path, metavar="D", help="of an MPS daemon of this GPU that runs")
    parser.add_argument("--mode", default="", choices=("", *MODES), help="a mode asked for")
    parser.add_argument("--timeout-s", type=float, default=STEP_TIMEOUT_S, help="of each step")
    given = parser.parse_args(argv)
    if not given.gpu.startswith("GPU-"):
        parser.error(f'--gpu: expected a UUID, "GPU-...", got {given.gpu!r}')
    probe = Probe(
        given.gpu,
        environment=os.environ,
        wanted=given.mode,
        pipe_dir=given.pipe_dir,
        timeout_s=given.timeout_s,
    )
    findings = probe.run(ProbeCache(given.cache) if given.cache else None)
    choice = choose_mode(findings, given.mode)
    write_json(given.json, report(findings, choice))
    for step, found in findings.steps.items():
        sys.stdout.write(f"{'proven' if found.is_proven else 'not proven':11} {STEPS[step]}: {found.detail}\n")
    sys.stdout.write(f"mode {choice.mode}, SM rungs {', '.join(map(str, choice.sm_rungs_pct)) or 'none'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
