"""The function YAML: what is read, and what each complaint says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hasgpu_cli.spec import read_deployment
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import MIB, ModelFormat, TensorSpec

GOOD = """\
name: f
format: python
inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 2]}]
slo_ms: 100
"""


def write(folder: Path, text: str, **files: str) -> Path:
    for name, content in (files or {"handler.py": "def load(): ...\n"}).items():
        (folder / name).write_text(content)
    path = folder / "function.yaml"
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    spec = read_deployment(write(tmp_path, GOOD)).spec
    assert (spec.name, spec.format, spec.entry) == ("f", ModelFormat.PYTHON, "handler.py")
    assert spec.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert (spec.slo_ms, spec.slo_permille, spec.timeout_ms, spec.max_batch) == (100, 950, 30_000, 8)
    assert (spec.min_instances, spec.max_instances, spec.standby) == (1, 8, 0)
    assert (spec.memory_bytes, spec.max_queue, spec.execution_timeout_ms) == (512 * MIB, 1_000, 30_000)


def test_everything_given(tmp_path: Path) -> None:
    text = GOOD + (
        "path: model.bin\nslo_target: 0.999\ntimeout_ms: 1\nmax_batch: 2\nmemory_mib: 3\nmax_queue: 4\n"
        "execution_timeout_ms: 5\ninstances: {min: 0, max: 2, standby: 1}\n"
        "parameters: {n: 3, flag: true, rate: 0.5, text: a}\n"
    )
    deployment = read_deployment(write(tmp_path, text, **{"model.bin": "x"}))
    spec = deployment.spec
    assert deployment.names == ("model.bin",)
    assert spec.entry == "model.bin"
    assert (spec.slo_permille, spec.min_instances, spec.max_instances, spec.standby) == (999, 0, 2, 1)
    assert spec.parameters == {"n": "3", "flag": "true", "rate": "0.5", "text": "a"}
    assert spec.memory_bytes == 3 * MIB


def test_the_yaml_is_not_part_of_the_artifact(tmp_path: Path) -> None:
    before = read_deployment(write(tmp_path, GOOD))
    after = read_deployment(write(tmp_path, GOOD.replace("slo_ms: 100", "slo_ms: 200")))
    assert before.names == ("handler.py",)
    assert before.spec.artifact == after.spec.artifact


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("slo_ms: 100", "slo_ms: [1"), [":6:1: malformed YAML"]),
        (("slo_ms: 100", "a: b: c"), [":5:5: malformed YAML", "mapping values are not allowed"]),
        (("slo_ms: 100", "slo_ms: 1\nslo_ms: 2"), [":6:1: malformed YAML", "'slo_ms' comes twice"]),
        (
            ("slo_ms: 100", "slo_ms: !!python/object:os.system x"),
            ["malformed YAML", "not determine a constructor"],
        ),
        (("slo_ms:", "slo_m:"), ["unknown key 'slo_m'", "did you mean 'slo_ms'?"]),
        (("slo_ms:", "zzzz: 1\nslo_ms:"), ["unknown key 'zzzz'", "known: name, format"]),
        (("slo_ms: 100", ""), ["slo_ms: expected a whole number, got nothing"]),
        (("slo_ms: 100", "slo_ms:"), ["slo_ms: expected a whole number, got an empty value"]),
        (("slo_ms: 100", "slo_ms: fast"), ["slo_ms: expected a whole number, got the string 'fast'"]),
        (("slo_ms: 100", "slo_ms: true"), ["slo_ms: expected a whole number, got the boolean True"]),
        (("slo_ms: 100", "slo_ms: 1.5"), ["slo_ms: expected a whole number, got the number 1.5"]),
        (("slo_ms: 100", "slo_ms: 0"), ["slo_ms: expected 1..600000, got 0"]),
        (("slo_ms: 100", "slo_ms: 100\nslo_target: 95"), ["slo_target: expected a share above 0 and up to 1", "95"]),
        (("name: f", "name: F_"), ["name: expected 1 to 63 of a-z", "'F_'"]),
        (("name: f", "name: 7"), ["name: expected a string, got the number 7"]),
        (("format: python", "format: onnx"), ["format: expected python or torchscript or torch-export", "'onnx'"]),
        (("format: python", "format: torchscript"), ["entry: expected one of the files packed, got 'model.pt'"]),
        (("name: f", "name: f\npath: nowhere"), ["path: expected a file or a folder", "nowhere, which does not exist"]),
        (("name: f", "name: f\nentry: other.py"), ["entry: expected one of the files packed, got 'other.py'"]),
        (("datatype: FP32, shape: [-1, 4]", "datatype: F32, shape: [-1, 4]"), ["datatype of 'x'", "got 'F32'"]),
        (("shape: [-1, 4]", "shape: [1, 4]"), ["shape of 'x'", "-1 (the batch) as first dimension"]),
        (("shape: [-1, 4]", "shape: [-1, four]"), ["inputs[0].shape", "whole numbers", "four"]),
        (("shape: [-1, 4]", "shapes: [-1, 4]"), ["inputs[0]: unknown key 'shapes'", "did you mean 'shape'?"]),
        (("inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]", "inputs: []"), ["inputs: expected at least one"]),
        (("inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]", "inputs: x"), ["inputs: expected a list"]),
        (("slo_ms: 100", "slo_ms: 100\ninstances: {min: 3, max: 2}"), ["min_instances", "at most max_instances (2)"]),
        (("slo_ms: 100", "slo_ms: 100\ninstances: {mn: 3}"), ["instances: unknown key 'mn'", "did you mean 'min'?"]),
        (("slo_ms: 100", "slo_ms: 100\ninstances: 3"), ["instances: expected a mapping, got the number 3"]),
        (
            ("slo_ms: 100", "slo_ms: 100\nparameters: {a: [1]}"),
            ["parameters.a: expected a string or number"],
        ),
        ((GOOD, "- a list"), ["expected a mapping of keys to values, got a list"]),
        ((GOOD, ""), ["expected a mapping of keys to values, got nothing"]),
    ],
)
def test_complaints(tmp_path: Path, change: tuple[str, str], says: list[str]) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(InvalidError) as raised:
        read_deployment(path)
    message = str(raised.value)
    assert "function.yaml" in message
    for part in says:
        assert part in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"cannot read .*none.yaml: got|cannot read .*none.yaml"):
        read_deployment(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["minilm", "resnet18", "echo"])
def test_the_examples_are_read(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / name / "function.yaml"
    deployment = read_deployment(path)
    assert deployment.spec.name == name
    assert "handler.py" in deployment.names


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "functions.md").read_text()
    blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", text[: text.index("## The keys")], re.DOTALL))
    deployment = read_deployment(write(tmp_path, blocks["yaml"], **{"handler.py": blocks["python"]}))
    assert deployment.spec.name == "shout"
    assert deployment.spec.min_instances == 0
    namespace: dict[str, Any] = {}
    exec(blocks["python"], namespace)
    namespace["load"](**deployment.spec.parameters)
    answer = namespace["infer"]({"text": np.array([b"hello"], dtype=object)})
    assert answer["loud"].tolist() == [b"HELLO!"]
    assert set(answer) == {tensor.name for tensor in deployment.spec.outputs}
