"""`hasgpu infer`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.function import TensorSpec

from hasgpu_cli import tensors
from hasgpu_cli.client import Target
from hasgpu_cli.options import json_option, print_json, run, target_options


@click.command("infer")
@click.argument("name")
@click.option("--text", "texts", multiple=True, help="Text for the only BYTES input; again for more rows.")
@click.option("--input", "inputs", multiple=True, metavar="TENSOR=JSON", help="Values as JSON, as x=[[1,2,3]].")
@click.option("--file", "files", multiple=True, metavar="TENSOR=PATH", help="A .npy file, or raw bytes.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for the answer.")
@json_option
@target_options("gateway")
def infer_command(
    target: Target,
    name: str,
    texts: tuple[str, ...],
    inputs: tuple[str, ...],
    files: tuple[str, ...],
    timeout_s: float,
    as_json: bool,
) -> None:
    """Send one request to the function NAME and print what it answers (--json: in full)."""
    outputs, took_s, emulated = run(_infer(target, name, texts, inputs, files, timeout_s))
    if as_json:
        shown = [
            {"name": t.name, "datatype": t.datatype, "shape": list(t.shape), "data": tensors.to_json_value(t)}
            for t in outputs
        ]
        print_json({"function": name, "latency_ms": round(took_s * 1e3, 3), "emulated": emulated, "outputs": shown})
        return
    for tensor in outputs:
        click.echo(f"{tensor.name}  {tensor.datatype} {list(tensor.shape)}  {tensors.summarise(tensor)}")
    note = " by an emulated device: the outputs are made up" if emulated else ""
    click.echo(f"answered in {took_s * 1e3:.1f} ms{note}")


async def _infer(
    target: Target, name: str, texts: Sequence[str], inputs: Sequence[str], files: Sequence[str], timeout_s: float
) -> tuple[list[tensors.Tensor], float, bool]:
    from hasgpu.inference.v2 import inference_pb2 as oip
    from hasgpu.inference.v2 import inference_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = await stub.ModelMetadata(oip.ModelMetadataRequest(name=name), timeout=timeout_s)
        specs = [TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in metadata.inputs]
        given = build_inputs(specs, texts, inputs, files)
        began_s = time.monotonic()
        response: Any = await stub.ModelInfer(tensors.infer_request(name, given), timeout=timeout_s)
        took_s = time.monotonic() - began_s
    emulated = "emulated" in response.parameters and response.parameters["emulated"].bool_param
    return tensors.response_tensors(response), took_s, emulated


def build_inputs(
    specs: Sequence[TensorSpec], texts: Sequence[str], inputs: Sequence[str], files: Sequence[str]
) -> list[tensors.Tensor]:
    """Makes the request's tensors of what was typed; raises InvalidError, NotFoundError."""
    by_name = {spec.name: spec for spec in specs}
    given: dict[str, tensors.Tensor] = {}
    if texts:
        takers = [spec for spec in specs if spec.datatype == "BYTES"]
        if len(takers) != 1:
            described = ", ".join(f"{spec.name} {spec.datatype}" for spec in specs)
            raise InvalidError("--text", expected="a function with one BYTES input", got=described)
        shape = (len(texts), *(1 for _ in takers[0].shape[1:]))
        raw = tensors.pack_bytes([text.encode() for text in texts])
        given[takers[0].name] = tensors.Tensor(takers[0].name, "BYTES", shape, raw)
    for option, pairs in (("--input", inputs), ("--file", files)):
        for pair in pairs:
            tensor, equals, value = pair.partition("=")
            if not equals:
                raise InvalidError(option, expected="TENSOR=VALUE", got=repr(pair))
            if tensor not in by_name:
                raise NotFoundError("input", tensor, f"the function takes {', '.join(by_name)}")
            if tensor in given:
                raise InvalidError(f"input {tensor!r}", expected="to be given once", got="it twice")
            make = tensors.from_json if option == "--input" else _from_path
            given[tensor] = make(by_name[tensor], value)
    if missing := [name for name in by_name if name not in given]:
        raise InvalidError(f"input {missing[0]!r}", expected="a value (--text, --input or --file)", got="none")
    return list(given.values())


def _from_path(spec: TensorSpec, value: str) -> tensors.Tensor:
    return tensors.from_file(spec, Path(value))
