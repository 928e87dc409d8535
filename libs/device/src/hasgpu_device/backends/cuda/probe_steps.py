"""The probe's steps, each run in a process of its own: `python -m hasgpu_device.backends.cuda.probe_steps STEP JSON`.

A step prints one JSON object, its finding, as its last line. What it does to the GPU ends with its process; what
crashes it is found out by the process that started it (`probe`).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from hasgpu_core.errors import HasgpuError

from hasgpu_device.backends.cuda.driver import CudaDriver
from hasgpu_device.backends.cuda.rungs import RungSet

BF16_SIZE = 4096
FP32_SIZE = 2048
"""Edges of the matrices: work enough for each SM of the largest device, milliseconds on the smallest partition."""
WARM_UPS_COUNT = 3
RUNS_COUNT = 11

Answer = tuple[bool, str, dict[str, Any]]
"""Proven; in words; data."""


def nvml(arguments: Mapping[str, Any]) -> Answer:
    """Asks NVML for the GPU and the driver's version."""
    from hasgpu_device.backends.cuda.nvml import Nvml

    opened = Nvml.open()
    found = opened.inventory()
    opened.close()
    uuid = arguments["gpu_uuid"]
    data: dict[str, Any] = {"driver_version": found.driver_version}
    for gpu in found.refused:
        if uuid in (gpu.uuid, str(gpu.index)):
            return False, f"GPU {gpu.index} {gpu.name}: {gpu.reason}", data | {"refused": True}
    gpu_found = found.find(uuid)
    if gpu_found is None:
        return False, found.reason or f"NVML lists no GPU {uuid}", data
    data |= {"name": gpu_found.name, "sm_count": gpu_found.sm_count, "compute_mode": gpu_found.compute_mode}
    return True, "; ".join((f"{gpu_found.name}, driver {found.driver_version}", *gpu_found.notes)), data


def driver(arguments: Mapping[str, Any]) -> Answer:
    """Loads the driver and looks at the device."""
    opened = CudaDriver()
    device = opened.device()
    major, minor = opened.version()
    uuid = opened.uuid(device)
    data = {"cuda": [major, minor], "sms": opened.multiprocessors(device), "name": opened.name(device), "uuid": uuid}
    if uuid != arguments["gpu_uuid"]:
        return False, f"expected GPU {arguments['gpu_uuid']}, the driver shows {uuid}", data
    return True, f"CUDA {major}.{minor}, {data['name']} with {data['sms']} SMs", data


def mps_in_use(arguments: Mapping[str, Any]) -> Answer:
    """Looks from inside a process, with a context, whether it is an MPS client."""
    opened = CudaDriver()
    device = opened.device()
    opened.use_primary_context(device)
    opened.synchronize_context()
    if not opened.is_mps_client(device):
        return False, "a process with the daemon's pipe directory is no MPS client (attribute 133 is not 1)", {}
    return True, "a process with the daemon's pipe directory is an MPS client (attribute 133 is 1)", {}


def green_api(arguments: Mapping[str, Any]) -> Answer:
    """Looks for the green-context functions in the driver."""
    opened = CudaDriver()
    if not opened.has_green_contexts:
        return False, f"the driver has no {opened.missing[0]} (green contexts with streams need CUDA 12.5)", {}
    return True, "the driver has green contexts with streams", {}


def groups(arguments: Mapping[str, Any]) -> Answer:
    """Splits the SMs into the smallest groups and makes all rungs of them."""
    opened = CudaDriver()
    device = opened.device()
    opened.use_primary_context(device)
    least = opened.sm_resource(device).min_partition_size
    rungs = RungSet(opened, device, arguments["widths_pct"])
    split = rungs.split
    data: dict[str, Any] = {
        "min_partition_sms": least,
        "groups": split.count,
        "group_sms": split.group_sms,
        "rest_sms": split.rest_sms,
        "rungs": [rung.describe() for rung in rungs.rungs],
        "notes": list(rungs.notes),
    }
    rungs.destroy()
    text = f"{split.count} groups of {split.group_sms} SMs, {split.rest_sms} left over"
    return True, "; ".join((text, *data["notes"])), data


def bite_green(arguments: Mapping[str, Any]) -> Answer:
    """Times a matrix product in each rung; what that proves is for the caller to judge."""
    import torch

    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device, or was built without CUDA", {}
    opened = CudaDriver()
    device = opened.device()
    opened.use_primary_context(device)
    rungs = RungSet(opened, device, arguments["widths_pct"])
    product = _matrix_product()
    times: dict[str, list[tuple[int, float]]] = {}
    for live in rungs.live.values():
        stream = torch.cuda.ExternalStream(live.stream)
        times.setdefault(str(live.rung.sm_pct), []).append((live.rung.sms_count, _time_us(product, stream)))
    torch.cuda.synchronize()
    return True, "timed", {"times_us": times}


def bite_pct(arguments: Mapping[str, Any]) -> Answer:
    """Times a matrix product in a process that was started with an MPS percentage."""
    import torch

    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device, or was built without CUDA", {}
    opened = CudaDriver()
    device = opened.device()
    if not opened.is_mps_client(device):
        return False, "the process is no MPS client", {}
    time_us = _time_us(_matrix_product(), torch.cuda.Stream())
    return True, "timed", {"sms": opened.multiprocessors(device), "time_us": time_us}


def record_sms(arguments: Mapping[str, Any]) -> Answer:
    """Records the SMs of each range of the smallest width, several times over while another process does the same."""
    from hasgpu_device.backends.cuda.smid import SmRecorder

    opened = CudaDriver()
    device = opened.device()
    opened.use_primary_context(device)
    widths = arguments["widths_pct"]
    rungs = RungSet(opened, device, widths)
    recorder = SmRecorder()
    sms: dict[str, set[int]] = {}
    begin_ns = time.monotonic_ns()
    while True:
        for live in rungs.live.values():
            if live.rung.sm_pct == min(widths):
                sms.setdefault(str(live.rung.first_pct), set()).update(recorder.record(live.stream))
        end_ns = time.monotonic_ns()
        if end_ns - begin_ns >= arguments["record_s"] * 1e9:
            break
    recorder.close()
    rungs.destroy()
    data = {"sms": {name: sorted(numbers) for name, numbers in sms.items()}, "span_ns": [begin_ns, end_ns]}
    return True, "recorded", data


def visible_sms(arguments: Mapping[str, Any]) -> Answer:
    """Tells how many SMs this process sees, as an MPS client with a context."""
    opened = CudaDriver()
    device = opened.device()
    opened.use_primary_context(device)
    sms = opened.multiprocessors(device)
    if not opened.is_mps_client(device):
        return False, "the process is no MPS client", {"sms": sms}
    return True, f"a client sees {sms} SMs", {"sms": sms}


def _matrix_product() -> Callable[[], object]:
    """Returns a matrix product on static buffers: BF16 where the device has it in hardware, else FP32."""
    import torch

    is_bf16 = torch.cuda.get_device_capability()[0] >= 8
    size, dtype = (BF16_SIZE, torch.bfloat16) if is_bf16 else (FP32_SIZE, torch.float32)
    left = torch.randn(size, size, device="cuda", dtype=dtype)
    right = torch.randn(size, size, device="cuda", dtype=dtype)
    out = torch.empty(size, size, device="cuda", dtype=dtype)
    torch.cuda.synchronize()
    return lambda: torch.mm(left, right, out=out)


def _time_us(product: Callable[[], object], stream: Any) -> float:
    """Returns the median time of a product on a stream, by CUDA events."""
    import torch

    pairs = []
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS_COUNT):
            product()
        for _ in range(RUNS_COUNT):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            product()
            end.record(stream)
            pairs.append((begin, end))
    stream.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in pairs)) * 1e3


STEPS: Mapping[str, Callable[[Mapping[str, Any]], Answer]] = {
    step.__name__: step
    for step in (nvml, driver, mps_in_use, green_api, groups, bite_green, bite_pct, record_sms, visible_sms)
}


def main(argv: list[str]) -> int:
    """Runs one step."""
    step, arguments = argv
    try:
        is_proven, detail, data = STEPS[step](json.loads(arguments))
    except HasgpuError as error:
        is_proven, detail, data = False, str(error), {}
    sys.stdout.write("\n" + json.dumps({"is_proven": is_proven, "detail": detail, "data": data}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
