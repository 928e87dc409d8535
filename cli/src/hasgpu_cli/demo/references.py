"""Inputs and right answers: the models called directly in torch, in a process of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import InvalidError, ModelError

from hasgpu_cli.sender import Sample
from hasgpu_cli.tensors import Tensor, pack_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

FUNCTIONS = ("minilm", "resnet18")
INPUT_NAMES: Mapping[str, str] = {"minilm": "text", "resnet18": "image"}
WITHIN_S = 300.0


@dataclass(frozen=True, slots=True)
class References:
    """What one function must answer."""

    samples: tuple[Sample, ...]
    expected: npt.NDArray[Any]
    """Row by row."""


def find_examples(given: Path | None) -> Path:
    """Returns the folder of the examples: the one given, else `examples` beside the packages or the working folder."""
    here = Path(__file__).resolve()
    candidates = [given] if given else [Path.cwd() / "examples", *(parent / "examples" for parent in here.parents)]
    for folder in candidates:
        if all((folder / name / "function.yaml").is_file() for name in FUNCTIONS):
            return folder
    raise InvalidError("--examples", expected=f"a folder with {' and '.join(FUNCTIONS)}", got=str(candidates[0]))


async def compute_references(examples: Path, function: str, folder: Path) -> References:
    """Runs `reference.py` of the examples; raises ModelError with the end of what it printed when it fails."""
    target = folder / f"{function}.npz"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(examples / "reference.py"),
        function,
        str(target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(WITHIN_S):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise ModelError(f"the reference of {function} took longer than {WITHIN_S:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = output.decode(errors="replace").strip().splitlines()
        raise ModelError(f"the reference of {function} failed: {lines[-1] if lines else 'it said nothing'}")
    return _load(target, INPUT_NAMES[function])


def _load(path: Path, name: str) -> References:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        inputs, expected = file["input"], file["output"]
    samples = []
    for row, answer in zip(inputs, expected, strict=True):
        if row.dtype.kind == "S":
            tensor = Tensor(name, "BYTES", (1,), pack_bytes([bytes(row)]))
        else:
            tensor = Tensor(name, "FP32", (1, *row.shape), row.astype("<f4").tobytes())
        samples.append(Sample([tensor], answer))
    return References(tuple(samples), expected)
