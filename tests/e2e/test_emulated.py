"""`hasgpu up --device emulated`: the whole live system on GPUs that are not there, and it says so everywhere."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu_system import System, emulated_function, running_system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("home"), "--device", "emulated", "--gpus", "2") as running:
        yield running


def test_a_function_is_served_and_everything_says_that_it_is_emulated(emulated: System, tmp_path: pathlib.Path) -> None:
    (node,) = emulated.json("status")["cluster"]["nodes"]
    devices = [one["device"] for one in node["devices"]]
    assert [device["gpu"] for device in devices] == ["gpu0", "gpu1"]
    for device in devices:
        assert device["backend"] == "emulated"
        assert device["model"].startswith("emulated-")
        assert device["capabilities"][0].startswith("emulated: ")

    emulated.cli("deploy", emulated_function(tmp_path, "resnet50"), "--wait")
    answer = emulated.json("infer", "vision", "--input", "x=[[1,2,3,4],[1,2,3,4]]")
    assert answer["emulated"]
    first, second = answer["outputs"][0]["data"]
    assert first == second
    assert len(first) == 3
    assert "emulated" in emulated.cli("infer", "vision", "--input", "x=[[1,2,3,4]]").stdout

    request = oip.ModelInferRequest(model_name="vision")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(bytes(16))
    with emulated.stub() as stub:
        response = stub.ModelInfer(request, timeout=60)
    assert response.parameters["emulated"].bool_param

    instances = emulated.instances("vision")
    assert instances
    for instance in instances:
        assert instance["reason"].startswith("emulated from modelled-h100.csv (modelled) as resnet50")
    for command in (["status"], ["describe", "vision"], ["top", "--count", "1"]):
        assert "emulated" in emulated.cli(*command).stdout


def test_a_function_that_the_profile_lacks_fails_with_what_it_has(emulated: System, tmp_path: pathlib.Path) -> None:
    path = emulated_function(tmp_path, "unheard-of")
    text = pathlib.Path(path).read_text().replace("name: vision", "name: other").replace("min: 2", "min: 1")
    pathlib.Path(path).write_text(text)
    done = emulated.cli("deploy", path, "--wait", "--timeout", "60", check=False)
    assert done.returncode == 1
    assert "no model 'unheard-of'" in done.stderr
    assert "resnet50" in done.stderr


def test_a_function_in_advisory_mode_serves_with_its_minimum(emulated: System, tmp_path: pathlib.Path) -> None:
    text = pathlib.Path(emulated_function(tmp_path, "resnet18")).read_text().replace("name: vision", "name: advised")
    path = tmp_path / "function.yaml"
    path.write_text(text.replace("{min: 2, max: 2}", "{min: 1, max: 2}") + "advisory: true\n")
    told = emulated.cli("deploy", str(path), "--wait").stdout
    assert "advisory mode: its minimum of 1 is kept" in told
    assert emulated.json("infer", "advised", "--input", "x=[[1,2,3,4]]")["emulated"]
    emulated.cli("scale", "advised", "--instances", "2", "--hold", "1")
    emulated.cli("delete", "advised")

    text = text.replace("name: advised", "name: quiet").replace("{min: 2, max: 2}", "{min: 0, max: 2}")
    path.write_text(text + "advisory: true\n")
    told = emulated.cli("deploy", str(path), "--wait").stdout
    assert "`hasgpu scale quiet --instances 1` starts an instance" in told
    assert emulated.instances("quiet") == []
    emulated.cli("scale", "quiet", "--instances", "1")
    assert emulated.json("infer", "quiet", "--input", "x=[[1,2,3,4]]")["emulated"]
    emulated.cli("delete", "quiet")
