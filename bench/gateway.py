"""What the gateway costs: requests per second and latency of an echo function, beside a bare grpc.aio echo server.

    python bench/gateway.py [--duration-s 4] [--output bench/results/cpu/gateway.json]

Starts real brokers, the gateway and a worker (quota 1000 per mille, announced on the bus as a node agent would), and
drives them with a load process of its own; the bare server answers the same messages with nothing behind it and is
measured in the same run, cell by cell, so that the two can be set against each other. Loops are closed: each of
`concurrency` callers sends its next request when its last is answered. Load, gateway and worker share the machine's
cores; on two of them they compete.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from hasgpu.gateway.v1 import gateway_pb2
from hasgpu.gateway.v1.gateway_pb2_grpc import FunctionServiceStub
from hasgpu.inference.v2 import inference_pb2 as pb
from hasgpu_core.events import InstanceEvent, instance_subject
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import RowGate
from hasgpu_device.status import WorkerStatus
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_runtime import wire
from hasgpu_runtime.brokers import NatsServer, RedisServer
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock

SIZES_BYTES = (64, 602_112)
"""Nothing to speak of, and one 224 x 224 x 3 image in FP32."""
CONCURRENCIES = (1, 16)
WARM_UP_S = 1.0
START_TIMEOUT_S = 60.0
FUNCTION = "echo"
HANDLER = 'def infer(batch):\n    return {"y": batch["x"]}\n'
UNBOUNDED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def request_of(size_bytes: int) -> pb.ModelInferRequest:
    """Returns a request of one row with so many bytes of contents."""
    request = pb.ModelInferRequest(model_name=FUNCTION)
    request.inputs.add(name="x", datatype="UINT8", shape=[1, size_bytes])
    request.raw_input_contents.append(os.urandom(size_bytes))
    return request


# The load, in a process of its own


async def drive(address: str, size_bytes: int, concurrency: int, duration_s: float) -> dict[str, Any]:
    """Runs closed loops against a server; returns what was measured. Raises when an answer is not the echo."""
    request = request_of(size_bytes)
    wire_request = request.SerializeToString()
    latencies_s: list[float] = []
    async with grpc.aio.insecure_channel(address, options=UNBOUNDED) as channel:
        call: Any = channel.unary_unary(METHOD)
        answer = pb.ModelInferResponse.FromString(
            await call(wire_request, timeout=START_TIMEOUT_S, wait_for_ready=True)
        )
        if list(answer.raw_output_contents) != list(request.raw_input_contents):
            raise SystemExit("the answer is not what was sent")
        expected = len(answer.SerializeToString())
        begin_s = time.perf_counter() + WARM_UP_S
        end_s = begin_s + duration_s

        async def caller() -> None:
            while (sent_s := time.perf_counter()) < end_s:
                got = await call(wire_request, timeout=30)
                done_s = time.perf_counter()
                if len(got) != expected:
                    raise SystemExit("an answer has another size than the first")
                if begin_s <= sent_s and done_s <= end_s:
                    latencies_s.append(done_s - sent_s)

        await asyncio.gather(*(caller() for _ in range(concurrency)))
    latencies_s.sort()
    if not latencies_s:
        raise SystemExit("no request was answered in time")
    return {"rps": round(len(latencies_s) / duration_s, 1)} | {
        f"p{share}_ms": round(latencies_s[min(len(latencies_s) - 1, len(latencies_s) * share // 100)] * 1e3, 3)
        for share in (50, 95, 99)
    }


def load(address: str, size_bytes: int, concurrency: int, duration_s: float) -> dict[str, Any]:
    """Runs `drive` in a process of its own."""
    arguments = [sys.executable, __file__, "--role", "load", "--address", address]
    arguments += ["--size-bytes", str(size_bytes), "--concurrency", str(concurrency), "--duration-s", str(duration_s)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, timeout=duration_s + 60)
    return dict(json.loads(done.stdout))


# The base: a bare grpc.aio server


async def echo(request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
    """Answers with what came, in the same messages."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1")
    response.outputs.add(name="y", datatype="UINT8", shape=request.inputs[0].shape)
    response.raw_output_contents.append(request.raw_input_contents[0])
    return response


async def serve_bare(address: str) -> None:
    """Serves the base for ever."""
    server = grpc.aio.server(options=UNBOUNDED)
    handler = grpc.unary_unary_rpc_method_handler(
        echo,
        request_deserializer=pb.ModelInferRequest.FromString,
        response_serializer=pb.ModelInferResponse.SerializeToString,
    )
    service, method = METHOD[1:].split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


# The system under test


def free_address() -> str:
    """Returns a loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def process(arguments: Sequence[str], log: Path, environ: dict[str, str] | None = None) -> Iterator[None]:
    """Runs a process while the block lasts; its output goes to a file."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, env=os.environ | (environ or {})
        )
        try:
            yield
        except BaseException:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            raise
        finally:
            running.terminate()
            running.wait(20)


async def deploy(address: str) -> FunctionSpec:
    """Deploys the echo function on the gateway."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("handler.py")
        entry.size = len(HANDLER)
        archive.addfile(entry, io.BytesIO(HANDLER.encode()))
    artifact = packed.getvalue()
    spec = FunctionSpec(
        name=FUNCTION,
        format=ModelFormat.PYTHON,
        artifact=Artifact(hashlib.sha256(artifact).hexdigest(), len(artifact)),
        entry="handler.py",
        inputs=(TensorSpec("x", "UINT8", (-1, -1)),),
        outputs=(TensorSpec("y", "UINT8", (-1, -1)),),
        slo_ms=1_000,
        max_batch=16,
        min_instances=0,
    )

    async def parts() -> AsyncIterator[gateway_pb2.DeployFunctionRequest]:
        yield gateway_pb2.DeployFunctionRequest(header=gateway_pb2.DeployHeader(spec=wire.spec_to_proto(spec)))
        yield gateway_pb2.DeployFunctionRequest(chunk=artifact)

    async with grpc.aio.insecure_channel(address) as channel:
        await FunctionServiceStub(channel).DeployFunction(parts(), wait_for_ready=True, timeout=START_TIMEOUT_S)
    return spec


def prepare_worker(folder: Path, spec: FunctionSpec, cores: int) -> Path:
    """Makes what a node agent makes for a worker; returns its configuration file."""
    (folder / "handler.py").write_text(HANDLER)
    ControlBlock.create(folder / "control", Shares(request_permille=1000, limit_permille=1000)).close()
    RowGate.create(folder / "gate").close()
    config = WorkerConfig(
        instance=f"{FUNCTION}-0",
        function=FUNCTION,
        function_revision=1,
        format=spec.format,
        entry=spec.entry,
        artifact_dir=str(folder),
        inputs=spec.inputs,
        outputs=spec.outputs,
        max_batch=spec.max_batch,
        control_path=str(folder / "control"),
        gate_path=str(folder / "gate"),
        status_path=str(folder / "status.json"),
        device_model=f"cpu-{cores}c",
        device_cores=float(cores),
        orphan_timeout_s=0.0,
    )
    config.save(folder / "worker.json")
    return folder / "worker.json"


async def worker_address(folder: Path) -> str:
    """Waits until the worker is ready; returns where it listens."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            status = WorkerStatus.load(folder / "status.json")
            if status is not None and status.state is InstanceState.READY and status.address:
                return status.address
            if status is not None and status.state is InstanceState.FAILED:
                raise SystemExit(f"the worker failed: {status.reason}")
            await asyncio.sleep(0.05)


def ready_event(address: str, cores: int) -> InstanceEvent:
    """What the node agent of the instance would say of it."""
    return InstanceEvent(
        function=FUNCTION,
        instance=f"{FUNCTION}-0",
        node="bench",
        gpu="cpu0",
        row=0,
        state=InstanceState.READY,
        reason="",
        address=address,
        allocation=Allocation(sm_pct=100, request_permille=1000, limit_permille=1000, memory_bytes=1 << 30),
        allocation_revision=1,
        function_revision=1,
        device_model=f"cpu-{cores}c",
        plan_revision=1,
    )


async def announce(nats_url: str, address: str, cores: int) -> None:
    """Says on the bus that the instance is ready, as its node agent would."""
    event = ready_event(address, cores)
    async with NatsBus.connect(nats_url, name="bench", clock=SystemClock()) as bus:
        await bus.put(instance_subject(FUNCTION, event.instance), wire.encode(event))


@contextlib.contextmanager
def system(folder: Path, cores: int) -> Iterator[str]:
    """Runs brokers, gateway and worker; yields the gateway's address."""
    address = free_address()
    with NatsServer(folder / "nats") as nats, RedisServer(folder / "redis") as redis:
        environ = {"HASGPU_NATS_URL": nats.url, "HASGPU_REDIS_URL": redis.url, "HASGPU_LISTEN": address}
        with process(["-m", "hasgpu_gateway"], folder / "gateway.log", environ):
            spec = asyncio.run(deploy(address))
            config = prepare_worker(folder, spec, cores)
            with process(["-m", "hasgpu_device.worker", "--config", str(config)], folder / "worker.log"):
                asyncio.run(announce(nats.url, asyncio.run(worker_address(folder)), cores))
                yield address


def measure(duration_s: float) -> dict[str, Any]:
    """Measures every cell on both systems; returns the report."""
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hasgpu-bench-") as scratch:
        folder = Path(scratch)
        bare = free_address()
        with (
            system(folder, cores) as gateway,
            process([__file__, "--role", "bare", "--address", bare], folder / "bare.log"),
        ):
            for size_bytes in SIZES_BYTES:
                for concurrency in CONCURRENCIES:
                    for name, address in (("grpc.aio", bare), ("gateway", gateway)):
                        figures = load(address, size_bytes, concurrency, duration_s)
                        rows.append({"size_bytes": size_bytes, "concurrency": concurrency, "system": name} | figures)
                        print_row(rows)
    return {"device": f"cpu-{cores}c", "duration_s": duration_s, "rows": rows}


def print_row(rows: list[dict[str, Any]]) -> None:
    """Prints the newest row, with its ratio to the base measured just before it."""
    if len(rows) == 1:
        print(f"{'size':>9} {'callers':>8} {'system':>9} {'rps':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}  of base")
    row = rows[-1]
    ratio = f"{row['rps'] / rows[-2]['rps']:8.1%}" if row["system"] == "gateway" else ""
    print(
        f"{row['size_bytes']:>9} {row['concurrency']:>8} {row['system']:>9} {row['rps']:>9.1f} "
        f"{row['p50_ms']:>9.2f} {row['p95_ms']:>9.2f} {row['p99_ms']:>9.2f} {ratio}",
        flush=True,
    )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration-s", type=float, default=4.0, help="of each cell, after a warm-up of 1 s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu" / "gateway.json")
    parser.add_argument("--role", choices=("bench", "load", "bare"), default="bench", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--size-bytes", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "load":
        figures = asyncio.run(drive(options.address, options.size_bytes, options.concurrency, options.duration_s))
        print(json.dumps(figures))
        return
    if options.role == "bare":
        asyncio.run(serve_bare(options.address))
        return
    report = measure(options.duration_s)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
