"""Where an instance goes: node, GPU and row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasgpu_core.resources import Allocation, DeviceState


@dataclass(frozen=True, slots=True)
class Placement:
    """A row of a device, existing or new."""

    node: str
    gpu: str
    row: int
    new_row: bool
    reason: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Nothing fits; the reason says what is free."""

    reason: str


def place(allocation: Allocation, devices: Sequence[DeviceState]) -> Placement | NoRoom:
    """Returns where an allocation fits.

    Preference, as HAS-GPU's released placement: a row with the same SM share and room for the request, the fullest
    first; else a new row on a GPU in use; else on an empty GPU. Ties go by (node, gpu, row), so the answer is
    deterministic.
    """
    raise NotImplementedError
