"""A whole system of real processes in a folder of its own, driven by the command `hasgpu` as a user drives it."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu.inference.v2 import inference_pb2_grpc as oip_grpc
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE

ROOT = pathlib.Path(__file__).resolve().parents[2]
FUNCTIONS = ROOT / "tests" / "support" / "functions"
EXAMPLES = ROOT / "examples"
HASGPU = pathlib.Path(sys.executable).parent / "hasgpu"


_EMULATED = """
name: vision
format: python
path: .
entry: handler.py
inputs:
  - {name: x, datatype: FP32, shape: [-1, 4]}
outputs:
  - {name: y, datatype: FP32, shape: [-1, 3]}
slo_ms: SLO_MS
max_batch: 4
memory_mib: 1024
instances: {min: 2, max: 2}
parameters: {hasgpu.emulate: MODEL}
"""


def emulated_function(folder: pathlib.Path, model: str, *, slo_ms: int = 500) -> str:
    """Writes the function `vision`, whose times are a model's of the profile; returns its YAML's path."""
    (folder / "function.yaml").write_text(_EMULATED.replace("MODEL", model).replace("SLO_MS", str(slo_ms)))
    (folder / "handler.py").write_text("raise RuntimeError('the handler of an emulated function does not run')\n")
    return str(folder / "function.yaml")


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pack_bytes(values: list[bytes]) -> bytes:
    """BYTES elements as the protocol's raw contents have them."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def unpack_bytes(raw: bytes) -> list[bytes]:
    """The inverse of pack_bytes."""
    values, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        values.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return values


def text_request(model: str, *texts: str) -> oip.ModelInferRequest:
    """A request with one BYTES input `text`."""
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(pack_bytes([text.encode() for text in texts]))
    return request


@dataclass
class System:
    """One `hasgpu up` in `home`."""

    home: pathlib.Path
    env: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)

    def cli(self, *args: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs `hasgpu`; a failure shows what it printed."""
        env = {**os.environ, "HASGPU_HOME": str(self.home), "HOME": str(self.home), **self.env}
        done = subprocess.run(
            [str(HASGPU), *args], env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"hasgpu {' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def json(self, *args: str, timeout_s: float = 120) -> Any:
        """Runs `hasgpu ... --json` and parses what it prints."""
        return json.loads(self.cli(*args, "--json", timeout_s=timeout_s).stdout)

    def up(self, *args: str) -> None:
        self.cli("up", "--port", str(self.port), *args)

    def down(self) -> None:
        self.cli("down", timeout_s=60)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pid(self, service: str) -> int:
        """The process id of a service as the supervisor knows it now."""
        for unit in self.units():
            if unit["name"] == service:
                return int(unit["pid"])
        raise KeyError(service)

    def units(self) -> list[dict[str, Any]]:
        """What the supervisor runs: brokers and services."""
        return list(self.json("status")["units"])

    def instances(self, function: str) -> list[dict[str, Any]]:
        return list(self.json("describe", function)["function"]["instances"])

    def serving(self, function: str) -> list[dict[str, Any]]:
        """Its instances without those that are parked, in whatever state."""
        return [i for i in self.instances(function) if i["allocation"]["request_permille"] > PARKED_QUOTA_PERMILLE]

    def hold(self, function: str, count: int, *, for_s: int) -> None:
        """Holds `count` serving instances, once every instance is ready: none comes, goes or is parked after that."""

        def all_ready() -> bool:
            states = {i["state"] for i in self.instances(function)}
            return states == {"ready"} and len(self.serving(function)) == count

        def held() -> bool:
            asked = ("scale", function, "--instances", str(count), "--hold")
            if not all_ready() or self.cli(*asked, str(for_s), check=False).returncode != 0:
                return False
            if all_ready():
                return True
            self.cli(*asked, "1", check=False)  # one was just coming or going: let it, and look again
            return False

        eventually(held, within_s=90)

    @contextmanager
    def stub(self) -> Iterator[Any]:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        with grpc.insecure_channel(self.address, options=options) as channel:
            yield oip_grpc.GRPCInferenceServiceStub(channel)

    def infer_text(self, model: str, *texts: str, timeout_s: float = 30) -> oip.ModelInferResponse:
        with self.stub() as stub:
            answer: oip.ModelInferResponse = stub.ModelInfer(text_request(model, *texts), timeout=timeout_s)
            return answer


@contextmanager
def running_system(
    home: pathlib.Path, *options: str, env: dict[str, str] | None = None, function: str = ""
) -> Iterator[System]:
    """A system that is up inside the block, with `options` of `hasgpu up`, and one of FUNCTIONS deployed, if named."""
    system = System(home, env=env or {})
    try:
        system.up(*options)
        if function:
            system.cli("deploy", str(FUNCTIONS / function / "function.yaml"), "--wait")
        yield system
    finally:
        system.down()


def eventually(check: Any, *, within_s: float, every_s: float = 0.2) -> Any:
    """Returns the first truthy result of `check`; a last AssertionError tells what it saw instead."""
    end_s = time.monotonic() + within_s
    while True:
        seen = check()
        if seen:
            return seen
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {within_s} s: {check.__name__} gave {seen!r}")
        time.sleep(every_s)


class SteadyLoad:
    """Sends one text request every `period_s` in the background and keeps every outcome."""

    def __init__(
        self, system: System, model: str, *, period_s: float, timeout_s: float = 15, text: str = "n{count}"
    ) -> None:
        self._system = system
        self._model = model
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._text = text
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.ok_count = 0
        self.errors: list[tuple[grpc.StatusCode, str]] = []
        self.last_ok_s = 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=self._timeout_s + 15)
        assert not self._thread.is_alive()

    def _done(self, call: Any) -> None:
        with self._lock:
            if call.code() is grpc.StatusCode.OK:
                self.ok_count += 1
                self.last_ok_s = time.monotonic()
            else:
                self.errors.append((call.code(), call.details()))

    def _run(self) -> None:
        with self._system.stub() as stub:
            calls = []
            count = 0
            while not self._stop.wait(self._period_s):
                call = stub.ModelInfer.future(
                    text_request(self._model, self._text.format(count=count)), timeout=self._timeout_s
                )
                call.add_done_callback(self._done)
                calls.append(call)
                count += 1
            for call in calls:
                call.exception()
            self.sent_count = count
            end_s = time.monotonic() + 5
            while self.ok_count + len(self.errors) < count and time.monotonic() < end_s:
                time.sleep(0.01)
