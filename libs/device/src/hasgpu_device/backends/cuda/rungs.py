"""Rungs: the SM ranges that a worker can be switched between, each a green context with one stream.

The device is split once into the smallest groups that the driver allows, by the same call in every worker. A rung is a
run of neighbouring groups, joined in one descriptor; only groups of one split may be joined, which is why there is one.
All rungs are made when the worker starts and none is destroyed while it lives: a stream with work can't be, and a
captured graph stays bound to the context of its capture. Changing the SM share is taking another stream.

A range in per cent becomes groups by rounding both of its ends up to whole groups, so that ranges that touch never
overlap and the last one ends with the device. A range too small to hold a group gets one all the same, and its rung
says so (`rounded_up`): it then shares the group with its neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hasgpu_core.errors import InvalidError, UnsupportedError

from hasgpu_device.backends.cuda import faults
from hasgpu_device.backends.cuda.driver import CudaDriver, SmSplit
from hasgpu_device.errors import DeviceFaultError

WHOLE_PCT = 100


@dataclass(frozen=True, slots=True)
class Rung:
    """A range of SMs."""

    first_pct: int
    sm_pct: int
    first_group: int
    groups_count: int
    sms_count: int
    """SMs that it really has."""
    has_rest: bool = False
    """Whether the SMs that fit into no group belong to it; only to the whole device they do."""
    rounded_up: bool = False
    """It is wider than asked: the range is smaller than the device's granule."""

    @property
    def key(self) -> tuple[int, int]:
        """`(first_pct, sm_pct)`."""
        return self.first_pct, self.sm_pct

    def describe(self) -> str:
        """Says what it is, in words."""
        text = f"{self.sm_pct} % at {self.first_pct} %: {self.sms_count} SMs"
        return text + " (rounded up to the smallest group)" if self.rounded_up else text


def layout(widths_pct: Sequence[int], groups_count: int, group_sms: int, rest_sms: int = 0) -> tuple[Rung, ...]:
    """Lays out the rungs of a device: every width at every multiple of the smallest one.

    Args:
        widths_pct: Widths of the partitions, ascending; the whole device is always one.
        groups_count: Groups of the split.
        group_sms: SMs of a group.
        rest_sms: SMs in no group.

    Returns:
        Rungs, the widest first, those of a width by place.

    Raises:
        InvalidError: A width is outside 1..100, or there are none or no groups.
    """
    if not widths_pct:
        raise InvalidError("sm_rungs_pct", expected="at least one width", got="none")
    if wrong := [width for width in widths_pct if not 1 <= width <= WHOLE_PCT]:
        raise InvalidError("sm_rungs_pct", expected="1..100", got=str(wrong[0]))
    if groups_count < 1 or group_sms < 1:
        raise InvalidError("SM groups", expected="at least one", got=f"{groups_count} of {group_sms} SMs")
    step = min(widths_pct)
    return tuple(
        _rung(first, width, groups_count, group_sms, rest_sms)
        for width in sorted({*widths_pct, WHOLE_PCT}, reverse=True)
        for first in range(0, WHOLE_PCT - width + 1, step)
    )


def _rung(first_pct: int, width_pct: int, groups_count: int, group_sms: int, rest_sms: int) -> Rung:
    first = -(-first_pct * groups_count // WHOLE_PCT)
    end = -(-(first_pct + width_pct) * groups_count // WHOLE_PCT)
    is_empty = end == first
    if is_empty:
        first = min(first_pct * groups_count // WHOLE_PCT, groups_count - 1)
        end = first + 1
    has_rest = width_pct == WHOLE_PCT and rest_sms > 0
    sms = (end - first) * group_sms + (rest_sms if has_rest else 0)
    return Rung(first_pct, width_pct, first, end - first, sms, has_rest, rounded_up=is_empty)


def covering(rungs: Iterable[Rung], sm_pct: int, first_pct: int) -> Rung:
    """Finds the rung of a range.

    Raises:
        UnsupportedError: There is none; the message names those of the same width, or all widths.
    """
    rungs = tuple(rungs)
    for rung in rungs:
        if rung.key == (first_pct, sm_pct):
            return rung
    places = sorted(rung.first_pct for rung in rungs if rung.sm_pct == sm_pct)
    if places:
        offered = f"{sm_pct} % begins at " + ", ".join(f"{place} %" for place in places)
    else:
        offered = "widths are " + ", ".join(f"{width} %" for width in sorted({rung.sm_pct for rung in rungs}))
    raise UnsupportedError(f"no SM range of {sm_pct} % at {first_pct} %: {offered}")


@dataclass(frozen=True, slots=True)
class LiveRung:
    """A rung with what holds it on the device."""

    rung: Rung
    context: int
    """`CUgreenCtx`."""
    stream: int
    """`CUstream`."""


class RungSet:
    """All rungs of one worker, made at once.

    Args:
        driver: The driver; the device's primary context is current.
        device: Handle.
        widths_pct: As in `layout`.

    Attributes:
        split: The split that they are of.
        live: By `(first_pct, sm_pct)`.
        notes: What is not as asked, in words.

    Raises:
        UnsupportedError: The driver has no green contexts.
        DeviceFaultError: It refused one.
    """

    def __init__(self, driver: CudaDriver, device: int, widths_pct: Sequence[int]) -> None:
        self._driver = driver
        self._device = device
        if not driver.has_green_contexts:
            raise UnsupportedError(f"the installed NVIDIA driver has no green contexts (no {driver.missing[0]})")
        self.split: SmSplit = driver.split(device)
        self.rungs = layout(widths_pct, self.split.count, self.split.group_sms, self.split.rest_sms)
        self.notes = [rung.describe() for rung in self.rungs if rung.rounded_up]
        self.live: dict[tuple[int, int], LiveRung] = {rung.key: self._make(rung) for rung in self.rungs}

    def _make(self, rung: Rung) -> LiveRung:
        count = rung.groups_count + (1 if rung.has_rest else 0)
        try:
            descriptor = self._driver.descriptor(self.split.resources, rung.first_group, count)
        except DeviceFaultError as error:
            if not rung.has_rest or error.code != faults.INVALID_RESOURCE_CONFIGURATION:
                raise
            self.notes.append(f"{self.split.rest_sms} SMs lie idle: the driver joins them to no group")
            descriptor = self._driver.descriptor(self.split.resources, rung.first_group, rung.groups_count)
        context = self._driver.create_green_context(self._device, descriptor)
        return LiveRung(rung, context, self._driver.create_green_stream(context))

    def find(self, sm_pct: int, first_pct: int) -> LiveRung:
        """Returns the rung of a range; UnsupportedError when there is none."""
        return self.live[covering(self.rungs, sm_pct, first_pct).key]

    def destroy(self) -> None:
        """Ends all of them, streams first; for probes and tests, with no work in flight."""
        for live in self.live.values():
            self._driver.destroy_stream(live.stream)
            self._driver.destroy_green_context(live.context)
        self.live.clear()
