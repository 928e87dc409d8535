"""Each thing a caller can get wrong gets a clear answer with the right status, and hurts nobody else."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import grpc
import pytest
from hasgpu.common.v1 import common_pb2
from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu_system import FUNCTIONS, System, eventually, pack_bytes, text_request, unpack_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def changed(change: Callable[[oip.ModelInferRequest], None]) -> oip.ModelInferRequest:
    request = text_request("tricky", "fine")
    change(request)
    return request


def set_name(request: oip.ModelInferRequest) -> None:
    request.inputs[0].name = "txet"


def set_datatype(request: oip.ModelInferRequest) -> None:
    request.inputs[0].datatype = "FP32"


def set_unknown_datatype(request: oip.ModelInferRequest) -> None:
    request.inputs[0].datatype = "STRING"


def set_shape(request: oip.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [1, 1]


def set_count(request: oip.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [2]


def set_bytes(request: oip.ModelInferRequest) -> None:
    request.raw_input_contents[0] = b"\x09\x00\x00\x00abc"


def drop_input(request: oip.ModelInferRequest) -> None:
    del request.inputs[:]
    del request.raw_input_contents[:]


def drop_raw(request: oip.ModelInferRequest) -> None:
    del request.raw_input_contents[:]


def add_input(request: oip.ModelInferRequest) -> None:
    request.inputs.add(name="more", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(pack_bytes([b"x"]))


def set_version(request: oip.ModelInferRequest) -> None:
    request.model_version = "blue"


def set_output(request: oip.ModelInferRequest) -> None:
    request.outputs.add(name="nothing")


def too_many_rows(request: oip.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [5]
    request.raw_input_contents[0] = pack_bytes([b"x"] * 5)


def mixed_contents(request: oip.ModelInferRequest) -> None:
    request.inputs[0].contents.bytes_contents.append(b"x")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (set_name, grpc.StatusCode.INVALID_ARGUMENT, ["txet", "text"]),
        (set_datatype, grpc.StatusCode.INVALID_ARGUMENT, ["text", "BYTES", "FP32"]),
        (set_unknown_datatype, grpc.StatusCode.INVALID_ARGUMENT, ["text", "STRING"]),
        (set_shape, grpc.StatusCode.INVALID_ARGUMENT, ["text", "[1, 1]"]),
        (set_count, grpc.StatusCode.INVALID_ARGUMENT, ["text", "2"]),
        (set_bytes, grpc.StatusCode.INVALID_ARGUMENT, ["text"]),
        (drop_input, grpc.StatusCode.INVALID_ARGUMENT, ["text"]),
        (drop_raw, grpc.StatusCode.INVALID_ARGUMENT, ["text"]),
        (add_input, grpc.StatusCode.INVALID_ARGUMENT, ["more"]),
        (set_version, grpc.StatusCode.INVALID_ARGUMENT, ["blue"]),
        (set_output, grpc.StatusCode.INVALID_ARGUMENT, ["nothing"]),
        (too_many_rows, grpc.StatusCode.INVALID_ARGUMENT, ["5", "4"]),
        (mixed_contents, grpc.StatusCode.INVALID_ARGUMENT, ["text"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_wrong_request_is_told_what_was_wrong(
    system: System, change: Callable[[oip.ModelInferRequest], None], code: grpc.StatusCode, words: list[str]
) -> None:
    with system.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(changed(change), timeout=20)
    assert caught.value.code() is code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


def test_an_unknown_function_is_not_found(system: System) -> None:
    with system.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(text_request("nobody", "x"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "Request for unknown model: 'nobody' is not found" in caught.value.details()


def test_an_oversize_message_is_refused_and_the_limit_named(system: System) -> None:
    with system.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(text_request("tricky", "x" * (80 * 1024 * 1024)), timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details()
    assert system.infer_text("tricky", "fine").model_name == "tricky"


def test_a_handler_that_raises_fails_its_request_alone(system: System) -> None:
    before = system.instances("tricky")
    with system.stub() as stub:
        bad = stub.ModelInfer.future(text_request("tricky", "raise"), timeout=20)
        good = [stub.ModelInfer.future(text_request("tricky", f"g{i}"), timeout=20) for i in range(3)]
        assert bad.code() is grpc.StatusCode.INTERNAL
        assert "ValueError" in bad.details()
        assert "the handler was told to raise" in bad.details()
        for i, call in enumerate(good):
            assert unpack_bytes(call.result().raw_output_contents[0]) == [f"g{i}".encode()]
    assert [i["restarts_count"] for i in system.instances("tricky")] == [i["restarts_count"] for i in before]


def test_a_handler_whose_answer_does_not_fit_is_told_so(system: System) -> None:
    with system.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(text_request("tricky", "wrong-shape"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "length" in caught.value.details()


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("hang", {grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED}),
        ("die", {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}),
    ],
)
def test_a_handler_that_hangs_or_dies_is_replaced(system: System, text: str, codes: set[grpc.StatusCode]) -> None:
    with system.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(text_request("tricky", text), timeout=40)
    assert caught.value.code() in codes, caught.value.details()
    assert caught.value.details()
    answer = system.infer_text("tricky", "back again", timeout_s=30)
    assert unpack_bytes(answer.raw_output_contents[0]) == [b"back again"]


def spec_yaml(tmp_path: pathlib.Path, **changes: str) -> pathlib.Path:
    lines = (FUNCTIONS / "tricky" / "function.yaml").read_text().splitlines()
    out = []
    for line in lines:
        key = line.split(":")[0]
        out.append(f"{key}: {changes.pop(key)}" if key in changes else line)
    out += [f"{key}: {value}" for key, value in changes.items()]
    path = tmp_path / "function.yaml"
    path.write_text("\n".join(out))
    (tmp_path / "handler.py").write_text((FUNCTIONS / "tricky" / "handler.py").read_text())
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [unclosed\nformat: python\n", ["function.yaml:2:", "malformed YAML"]),
        ("just text", ["mapping"]),
        ("name: x\nformat: python\n", ["inputs"]),
    ],
)
def test_malformed_yaml_is_told_where(system: System, tmp_path: pathlib.Path, content: str, words: list[str]) -> None:
    (tmp_path / "function.yaml").write_text(content)
    (tmp_path / "handler.py").write_text("def infer(batch): return batch\n")
    done = system.cli("deploy", str(tmp_path / "function.yaml"), check=False)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slo_msec": "100"}, ["slo_msec", "slo_ms"]),
        ({"slo_ms": "soon"}, ["slo_ms", "soon"]),
        ({"slo_ms": "0"}, ["slo_ms", "0"]),
        ({"name": "Bad_Name"}, ["name", "Bad_Name"]),
        ({"format": "pickle"}, ["format", "pickle", "torchscript"]),
        ({"entry": "nowhere.py"}, ["nowhere.py"]),
    ],
)
def test_a_wrong_spec_is_told_what_was_wrong(
    system: System, tmp_path: pathlib.Path, changes: dict[str, str], words: list[str]
) -> None:
    done = system.cli("deploy", str(spec_yaml(tmp_path, **changes)), check=False)
    assert done.returncode == 1, done.stdout
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_an_objective_that_nothing_can_meet_is_told(system: System, tmp_path: pathlib.Path) -> None:
    source = (FUNCTIONS / "tricky" / "handler.py").read_text()
    path = spec_yaml(tmp_path, name="hopeless", slo_ms="1")
    # 20 ms of work for any text, objective 1 ms
    (tmp_path / "handler.py").write_text(
        source.replace(
            'texts = list(batch["text"])',
            'texts = list(batch["text"])\n    end = time.thread_time() + 0.02\n'
            "    while time.thread_time() < end:\n        pass",
        )
    )
    system.cli("deploy", str(path), "--no-wait")
    try:

        def infeasible() -> str:
            return str(
                (system.json("describe", "hopeless")["function"]["capacity"] or {}).get("infeasible_reason") or ""
            )

        reason = eventually(infeasible, within_s=60)
        assert "1 ms" in reason
        answer = system.infer_text("hopeless", "late but right", timeout_s=30)
        assert unpack_bytes(answer.raw_output_contents[0]) == [b"late but right"]
    finally:
        system.cli("delete", "hopeless")


def test_an_artifact_with_a_wrong_digest_is_refused(system: System) -> None:
    spec = common_pb2.FunctionSpec(
        name="forged",
        format=common_pb2.MODEL_FORMAT_PYTHON,
        entry="handler.py",
        artifact=common_pb2.Artifact(sha256="0" * 64, size_bytes=5),
        inputs=[common_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1])],
        outputs=[common_pb2.TensorSpec(name="y", datatype="FP32", shape=[-1])],
        slo_ms=100,
        slo_permille=950,
        timeout_ms=1000,
        max_batch=1,
        max_instances=1,
        memory_bytes=1 << 28,
        max_queue=10,
        execution_timeout_ms=1000,
    )
    parts = [
        gateway_pb2.DeployFunctionRequest(header=gateway_pb2.DeployHeader(spec=spec)),
        gateway_pb2.DeployFunctionRequest(chunk=b"hello"),
    ]
    with grpc.insecure_channel(system.address) as channel, pytest.raises(grpc.RpcError) as caught:
        gateway_pb2_grpc.FunctionServiceStub(channel).DeployFunction(iter(parts), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sha256" in caught.value.details()
    assert "0" * 64 in caught.value.details()
    assert "forged" not in [f["spec"]["name"] for f in system.json("functions")]


def test_deploying_a_name_twice_is_refused_without_replace(system: System) -> None:
    done = system.cli("deploy", str(FUNCTIONS / "tricky" / "function.yaml"), check=False)
    assert done.returncode == 1
    assert "already exists" in done.stderr
    assert "--replace" in done.stderr
