"""Computes a profile of models on an H100 from public data sheets, where no GPU could be had to measure one.

    python tools/modelled_profile.py [--models resnet18,gpt2] [--out FILE]     writes the profile
    python tools/modelled_profile.py --check                                   its scaling beside what others measured

It runs each model on torch's `meta` device (shapes, no arithmetic), notes operations, floating-point work and bytes,
and adds up a roofline of each operation. `docs/profiles.md` tells the formulas and what they leave out.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasgpu_core.profile import Basis, Profile, ProfileHeader, ProfileModel, ProfileRow

OUT = Path(__file__).resolve().parent.parent / "libs/device/src/hasgpu_device/profiles/modelled-h100.csv"
DEVICE_MODEL = "modelled-h100"
CREATED_UNIX_S = 1_795_478_400
"""2026-11-24, when the formulas and constants below were fixed; change it with them."""
MODEL_VERSION = "1"
BATCHES = (1, 2, 4, 8, 16, 32)
RUNGS_PCT = (25, 50, 75, 100)
"""As the cuda backend makes them; the finer shares serve interpolation and the simulator."""
SM_PCTS = (12, 25, 37, 50, 62, 75, 87, 100)
QUOTAS_PERMILLE = (1_000, 500, 200, 100)
SEGMENT_US = 5_000.0
"""As in `hasgpu_device.segments`."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a data sheet says of a GPU."""

    name: str
    sms_count: int
    sms_per_share: int
    """SMs of an eighth of the device: two of the groups that green contexts are cut into."""
    tensor_flops: Mapping[int, float]
    """Dense peak of the tensor cores by bytes of an element (2: FP16 and BF16, 4: TF32), operations a second."""
    plain_flops: float
    """FP32 peak without tensor cores."""
    bytes_per_s: float
    """Of its memory."""
    memory_bytes: int

    def sms(self, sm_pct: int) -> int:
        """Returns the SMs of a share: a multiple of the smallest group, the whole device at 100 %."""
        return self.sms_count if sm_pct == 100 else max(1, round(sm_pct / 12.5)) * self.sms_per_share


H100 = Gpu("H100 SXM5", 132, 16, {2: 989.4e12, 4: 494.7e12}, 66.9e12, 3.35e12, 80 * 10**9)
H200 = Gpu("H200 SXM", 132, 16, {2: 989.4e12, 4: 494.7e12}, 66.9e12, 4.8e12, 141 * 10**9)
SOURCE = (
    "modelled, not measured: tools/modelled_profile.py, a roofline of each operation from NVIDIA's H100 Tensor Core "
    "GPU Datasheet (H100 SXM: peak rates, 3.35 TB/s, 80 GB) and NVIDIA H100 Tensor Core GPU Architecture whitepaper "
    "(132 SMs, PCIe Gen 5); see docs/profiles.md"
)

# What no data sheet tells: round figures, the same for all models, not fitted to any.
KERNEL_US = 2.0
"""From one kernel of a CUDA graph to the next, whatever it does: start, drain, dependency."""
MATMUL_EFFICIENCY = 0.65
CONVOLUTION_EFFICIENCY = 0.45
GROUPED_EFFICIENCY = 0.3
"""Convolutions in groups, which run without tensor cores."""
MEMORY_EFFICIENCY = 0.85
SATURATING_SMS = 44
"""A third of the SMs draws all of an H100's bandwidth; one draws 1/44 of it."""
TILE = 64
"""Edge of a matrix product's tile: what one SM works on at a time."""
SPLIT_K = 512
MAX_SPLITS = 4
BYTES_PER_BLOCK = 16_384
"""Moved by one SM at a time."""
HOST_US = 50.0
"""Of a batch: Python, launching the graph, waiting for it."""
PCIE_BYTES_PER_S = 50e9
CONTEXT_BYTES = 512 * MIB
"""A CUDA context, cuBLAS workspaces, the graphs."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel."""

    flops: float
    efficiency: float
    tensor: bool
    element_bytes: int
    moved_bytes: int
    blocks: int
    """Pieces of its arithmetic that can run on different SMs at once."""

    def time_us(self, gpu: Gpu, sms: int) -> float:
        """Returns its time on so many SMs: the start, and the longer one of computing and moving data."""
        busy_sms = self.blocks / math.ceil(self.blocks / sms)
        peak = gpu.tensor_flops[self.element_bytes] if self.tensor else gpu.plain_flops
        compute_s = self.flops / (peak / gpu.sms_count * self.efficiency * busy_sms)
        per_sm = H100.bytes_per_s / SATURATING_SMS
        drawing_sms = min(math.ceil(self.moved_bytes / BYTES_PER_BLOCK), sms)
        rate = min(gpu.bytes_per_s, per_sm * drawing_sms) * MEMORY_EFFICIENCY
        return KERNEL_US + 1e6 * max(compute_s, self.moved_bytes / rate)


@dataclass(frozen=True, slots=True)
class Work:
    """One batch of a model."""

    operations: tuple[Operation, ...]
    weights_bytes: int
    peak_bytes: int
    """Inputs and outputs of its largest operation."""
    host_bytes: int
    """Over PCIe, both ways."""

    def device_us(self, gpu: Gpu, sms: int) -> float:
        """Returns the device time."""
        return sum(operation.time_us(gpu, sms) for operation in self.operations)

    def longest_segment_us(self, gpu: Gpu, sms: int) -> float:
        """Returns the longest stretch between two gate passes: an operation ends the segment that has run its time."""
        longest = running = 0.0
        for operation in self.operations:
            if running >= SEGMENT_US:
                running = 0.0
            running += operation.time_us(gpu, sms)
            longest = max(longest, running)
        return longest

    def host_us(self) -> float:
        """Returns what a batch takes beside its device time."""
        return HOST_US + 1e6 * self.host_bytes / PCIE_BYTES_PER_S


def latency_us(device_us: float, host_us: float, quota_permille: int) -> float:
    """Returns the mean latency of batches back to back behind the gate.

    The bucket fills at the quota and debt is carried, so in the long run a batch of d takes d / quota, or the
    undisturbed run where that is longer (`hasgpu_device.quota`, `hasgpu_predictor.physical`).
    """
    return max(device_us + host_us, device_us * 1_000 / quota_permille)


def trace(module: Any, inputs: Mapping[str, Any]) -> Work:
    """Runs a module on the meta device and notes its operations.

    Args:
        module: A `torch.nn.Module` with weights and buffers on `meta`.
        inputs: Keyword arguments of its forward, tensors on `meta`.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    operations: list[Operation] = []
    sizes: list[int] = []

    def note(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if _is_free(func) or not list(_tensors(out)):
            return
        moved = {id(t): t.numel() * t.element_size() for t in _tensors((args, kwargs, out))}
        sizes.append(sum(moved.values()))
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            operations.append(Operation(0.0, 1.0, False, 4, sizes[-1], 1))
            return
        flops = float(count(*args, **kwargs, out_val=out))
        convolution = func._overloadpacket is torch.ops.aten.convolution
        grouped = convolution and args[8] > 1
        # torch's defaults for FP32: TF32 in convolutions, no tensor cores in matrix products.
        tensor = not grouped and (convolution or out.element_size() < 4)
        efficiency = CONVOLUTION_EFFICIENCY if convolution else MATMUL_EFFICIENCY
        efficiency = GROUPED_EFFICIENCY if grouped else efficiency
        blocks = _blocks(flops, out, convolution=convolution)
        operations.append(Operation(flops, efficiency, tensor, out.element_size(), sizes[-1], blocks))

    class Counter(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed by mypy
        """Notes each operation that is dispatched."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            note(func, args, kwargs or {}, out)
            return out

    with torch.no_grad(), Counter():
        answer = module(**inputs)
    outputs = list(_tensors(answer))
    return Work(
        tuple(operations),
        sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())),
        max(sizes, default=0),
        sum(t.numel() * t.element_size() for t in (*_tensors(inputs), *outputs[:1])),
    )


def _blocks(flops: float, out: Any, *, convolution: bool) -> int:
    """Tiles of a product's output, times the parts that a deep sum is split into."""
    columns = out.shape[1] if convolution else out.shape[-1]
    products = out.shape[0] if out.dim() == 3 and not convolution else 1
    rows = out.numel() // (columns * products)
    tiles = products * math.ceil(rows / TILE) * math.ceil(columns / TILE)
    depth = flops / (2 * out.numel())
    return int(tiles) * min(MAX_SPLITS, max(1, int(depth // SPLIT_K)))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _is_free(func: Any) -> bool:
    """Views, allocations and the like launch no kernel."""
    name = func._overloadpacket.__name__
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return aliases or name.startswith("empty") or name in {"_unsafe_view", "detach", "lift_fresh", "_to_copy"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the profile."""

    build: Callable[[], Any]
    """Makes the module; called under the meta device."""
    inputs: Callable[[int], Mapping[str, Any]]
    """Its inputs for a batch, on the meta device."""
    half: bool
    """FP16 throughout; otherwise FP32 as torch runs it (TF32 in convolutions)."""
    note: str


def _image(name: str, side_px: int = 224) -> Callable[[int], Mapping[str, Any]]:
    import torch

    return lambda batch: {name: torch.empty(batch, 3, side_px, side_px)}


def _tokens(length: int) -> Callable[[int], Mapping[str, Any]]:
    import torch

    return lambda batch: {
        "input_ids": torch.empty(batch, length, dtype=torch.long),
        # of four dimensions, so that it is added as it is: no value of it is looked at
        "attention_mask": torch.empty(batch, 1, length, length),
    }


def _build(kind: str, config_kind: str, **settings: Any) -> Callable[[], Any]:
    """A transformers model from its configuration; attention spelled out, as a graph of plain kernels."""

    def build() -> Any:
        import transformers

        config = getattr(transformers, config_kind)(**settings)
        config._attn_implementation = "eager"
        return getattr(transformers, kind)(config)

    return build


def _echo() -> Any:
    import torch

    class Echo(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
        """Copies its input."""

        def forward(self, data: Any) -> Any:
            """Returns a copy."""
            return data.clone()

    return Echo()


def _whisper_encoder() -> Any:
    size = {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "encoder_layers": 4, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    return _build("WhisperModel", "WhisperConfig", d_model=384, **size, **heads)().encoder


def entries() -> dict[str, Entry]:
    """Returns the models by function name; the first three are the examples', as their handlers run them."""
    import torch

    image, pixels = "ImageClassification", _image("pixel_values")
    basic: dict[str, Any] = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    minilm: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    swin: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
    labels = {"num_labels": 1000}
    return {
        "echo": Entry(
            _echo, lambda b: {"data": torch.empty(b, 1024, dtype=torch.uint8)}, False, "1 KiB a row, copied once"
        ),
        "minilm": Entry(_build("BertModel", "BertConfig", **minilm), _tokens(32), False, "FP32, 32 tokens"),
        "resnet18": Entry(_build(f"ResNetFor{image}", "ResNetConfig", **basic, **labels), pixels, False, "FP32 (TF32)"),
        "resnet50": Entry(_build(f"ResNetFor{image}", "ResNetConfig", **labels), pixels, True, "FP16"),
        "mobilenet-v2": Entry(_build(f"MobileNetV2For{image}", "MobileNetV2Config", **labels), pixels, True, "FP16"),
        "efficientnet-b0": Entry(
            _build(
                f"EfficientNetFor{image}",
                "EfficientNetConfig",
                width_coefficient=1.0,
                depth_coefficient=1.0,
                image_size=224,
                hidden_dim=1280,
                **labels,
            ),
            pixels,
            True,
            "FP16",
        ),
        "vit-b-16": Entry(_build(f"ViTFor{image}", "ViTConfig", **labels), pixels, True, "FP16"),
        "convnext-tiny": Entry(_build(f"ConvNextFor{image}", "ConvNextConfig", **labels), pixels, True, "FP16"),
        "swin-tiny": Entry(_build(f"SwinFor{image}", "SwinConfig", **swin, **labels), pixels, True, "FP16"),
        "segformer-b0": Entry(
            _build("SegformerForSemanticSegmentation", "SegformerConfig"),
            _image("pixel_values", 512),
            True,
            "FP16, 512 px",
        ),
        "bert-base": Entry(_build("BertModel", "BertConfig"), _tokens(128), True, "FP16, 128 tokens"),
        "distilbert": Entry(_build("DistilBertModel", "DistilBertConfig"), _tokens(128), True, "FP16, 128 tokens"),
        "gpt2": Entry(
            _build("GPT2LMHeadModel", "GPT2Config", use_cache=False),
            lambda b: {**_tokens(128)(b), "logits_to_keep": 1},
            True,
            "FP16, prefill of 128 tokens",
        ),
        "whisper-tiny": Entry(
            _whisper_encoder,
            lambda b: {"input_features": torch.empty(b, 80, 3000)},
            True,
            "FP16, encoder, 30 s of sound",
        ),
    }


def work_of(entry: Entry, batches: Sequence[int]) -> dict[int, Work]:
    """Returns the work of an entry by batch."""
    import torch

    with torch.device("meta"):
        module = entry.build().eval()
        if entry.half:
            module = module.half()
        works = {}
        for batch in batches:
            inputs = entry.inputs(batch)
            works[batch] = trace(module, {name: _as_float(value, entry.half) for name, value in inputs.items()})
    return works


def _as_float(value: Any, half: bool) -> Any:
    return value.half() if half and hasattr(value, "half") and value.is_floating_point() else value


def rows_of(name: str, works: Mapping[int, Work], gpu: Gpu = H100) -> Iterator[ProfileRow]:
    """Yields the rows of a model."""
    for batch, work in works.items():
        for sm_pct in SM_PCTS:
            device_us = work.device_us(gpu, gpu.sms(sm_pct))
            longest_us = work.longest_segment_us(gpu, gpu.sms(sm_pct))
            for quota in QUOTAS_PERMILLE:
                mean_us = latency_us(device_us, work.host_us(), quota)
                times_us = (round(mean_us, 1), round(device_us, 1), round(longest_us, 1))
                yield ProfileRow(name, batch, sm_pct, quota, *times_us, repetitions=1)


def compute(names: Sequence[str] = (), batches: Sequence[int] = BATCHES) -> Profile:
    """Returns the profile of the models named (none: all)."""
    quiet()
    import torch
    import transformers

    known = entries()
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"--models: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    rows: list[ProfileRow] = []
    models: dict[str, ProfileModel] = {}
    for name in names or known:
        works = work_of(known[name], batches)
        rows.extend(rows_of(name, works))
        largest = works[max(batches)]
        memory_bytes = CONTEXT_BYTES + largest.weights_bytes + 2 * largest.peak_bytes
        memory_bytes = math.ceil(memory_bytes / MIB) * MIB
        models[name] = ProfileModel(f"modelled:{name}:{MODEL_VERSION}", memory_bytes, max(batches), known[name].note)
    header = ProfileHeader(
        device_model=DEVICE_MODEL,
        backend="cuda",
        basis=Basis.MODELLED,
        memory_bytes=H100.memory_bytes,
        sm_rungs_pct=RUNGS_PCT,
        driver="",
        versions={
            "modelled_profile": MODEL_VERSION,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        created_unix_s=CREATED_UNIX_S,
        source=SOURCE,
        models=models,
    )
    return Profile(header, tuple(rows))


def quiet() -> None:
    """Keeps transformers from the network and from telling of packages that are not needed here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def scaling(works: Work, gpu: Gpu, sms: Sequence[int]) -> list[float]:
    """Returns times on so many SMs relative to the whole GPU's."""
    whole_us = works.device_us(gpu, gpu.sms_count)
    return [works.device_us(gpu, count) / whole_us for count in sms]


def check() -> None:
    """Prints modelled beside measured scaling on an H200 (one step of an autoregressive decoder, and a vocoder)."""
    quiet()
    import torch

    sms = (32, 48, 64, 80, 96)
    measured_step = (1.33, 1.21, 1.09, 1.08, 1.06)
    decoder: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    decoder |= {"num_attention_heads": 32, "num_key_value_heads": 4, "use_cache": False}
    step = Entry(
        _build("LlamaForCausalLM", "LlamaConfig", **decoder),
        _tokens(1),
        True,
        "",
    )

    def convolutions() -> Any:
        layers = [torch.nn.Conv1d(256, 256, 7, padding=3) for _ in range(12)]
        return torch.nn.Sequential(*layers)

    vocoder = Entry(convolutions, lambda b: {"input": torch.empty(b, 256, 65_536)}, True, "")
    print("time at so many SMs of an H200's 132, relative to all")
    print("  SMs                        ", *(f"{count:>6}" for count in sms))
    print("  decoder step, measured     ", *(f"{ratio:>6.2f}" for ratio in measured_step))
    print("  1.1 B decoder step, model  ", *(f"{r:>6.2f}" for r in scaling(work_of(step, [1])[1], H200, sms)))
    print("  vocoder, measured          ", "  2.50", " " * 20, "  1.18")
    print("  12 convolutions, model     ", *(f"{r:>6.2f}" for r in scaling(work_of(vocoder, [1])[1], H200, sms)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compute a profile from data sheets.")
    parser.add_argument("--out", type=Path, default=OUT, help="the file written (the shipped profile)")
    parser.add_argument("--models", default="", help="names, separated by commas (all)")
    parser.add_argument("--check", action="store_true", help="print the scaling beside measured figures instead")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.check:
        check()
        return
    profile = compute([name for name in options.models.split(",") if name])
    options.out.write_text(profile.format())
    print(f"{len(profile.rows)} rows of {len(profile.header.models)} models written to {options.out}")


if __name__ == "__main__":
    main()
