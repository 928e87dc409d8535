"""What the bus has to be told so that it says what the store says: found anew at each pass, so nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hasgpu_core.events import HorizontalScaleEvent, InstanceEvent, VerticalScaleEvent
from hasgpu_core.resources import InstanceState

from hasgpu_scaler.records import DesiredRecord

FIRST_RESEND_S = 5.0
"""Instances wanted that no agent has heard of after this long: the command is sent again; then after twice as long."""
LAST_RESEND_S = 60.0


@dataclass(frozen=True, slots=True)
class Horizontal:
    """A command to send."""

    event: HorizontalScaleEvent
    dedup_id: str


@dataclass(frozen=True, slots=True)
class Vertical:
    """A value to put."""

    event: VerticalScaleEvent


@dataclass(frozen=True, slots=True)
class Purge:
    """A vertical subject whose instance is not there any more."""

    node: str
    instance: str


Announcement = Horizontal | Vertical | Purge

_Set = frozenset[tuple[str, bool, int]]


@dataclass(slots=True)
class _Sent:
    """The last command of a function."""

    revision: int
    wanted: _Set
    at_s: float
    resent_count: int = 0


class Announcer:
    """Compares records with what was announced; the shell sends what is due and tells what it has sent."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}
        self._verticals: dict[tuple[str, str], VerticalScaleEvent] = {}
        self._reported: dict[str, InstanceEvent] = {}

    def reset(self) -> None:
        """Forgets which commands were sent: a new leader sends each again (the same revision does no harm)."""
        self._sent.clear()

    def on_vertical(self, node: str, instance: str, event: VerticalScaleEvent | None) -> None:
        """Notes what the bus holds under a vertical subject (None: nothing)."""
        if event is None:
            self._verticals.pop((node, instance), None)
        else:
            self._verticals[node, instance] = event

    def on_instance(self, event: InstanceEvent) -> None:
        """Notes where an instance is and what it has in force."""
        self._reported[event.instance] = event

    def on_instance_gone(self, instance: str) -> None:
        """Notes that an instance is gone."""
        self._reported.pop(instance, None)

    def due(self, records: Mapping[str, DesiredRecord], now_s: float, *, fencing_token: int) -> list[Announcement]:
        """Returns what has to be sent now, most urgent first: shares, then commands, then purges."""
        out: list[Announcement] = []
        live = sorted(records)
        for name in live:
            out.extend(self._verticals_due(records[name]))
        for name in live:
            command = self._horizontal_due(records[name], now_s, fencing_token)
            if command is not None:
                out.append(command)
        out.extend(self._purges_due(records.values()))
        return out

    def sent(self, announcement: Announcement, now_s: float) -> None:
        """Notes that one of `due` was sent."""
        match announcement:
            case Horizontal(event):
                last = self._sent.get(event.function)
                again = last is not None and last.revision == event.revision
                self._sent[event.function] = _Sent(
                    event.revision,
                    _wanted_set(event),
                    now_s,
                    last.resent_count + 1 if last is not None and again else 0,
                )
            case Vertical(event):
                self._verticals[event.node, event.instance] = event
            case Purge(node, instance):
                self._verticals.pop((node, instance), None)

    def forget(self, function: str) -> None:
        """Drops a deleted function."""
        self._sent.pop(function, None)

    def _verticals_due(self, record: DesiredRecord) -> list[Announcement]:
        """A live instance's share is announced when the bus, or in its silence the agent, has another one.

        The first share of an instance comes with its plan, so there is nothing to announce before it is changed.
        """
        out: list[Announcement] = []
        for item in record.instances:
            event = self._reported.get(item.instance)
            if event is None or not event.node or event.state is InstanceState.STOPPED:
                continue
            said = self._verticals.get((event.node, item.instance))
            if said is not None:
                differs = said.allocation != item.allocation
            else:
                differs = event.allocation != item.allocation and event.allocation_revision < record.revision
            if differs:
                out.append(
                    Vertical(
                        VerticalScaleEvent(
                            function=record.function,
                            instance=item.instance,
                            node=event.node,
                            allocation=item.allocation,
                            revision=record.revision,
                            reason=record.reason,
                            decided_unix_ns=record.decided_unix_ns,
                        )
                    )
                )
        return out

    def _horizontal_due(self, record: DesiredRecord, now_s: float, fencing_token: int) -> Horizontal | None:
        """A command is due when the set (or who is standby, or an SM share) is another than last sent.

        Also when wanted instances stay unknown to every agent: the command may have been lost.
        """
        event = HorizontalScaleEvent(
            function=record.function,
            revision=record.revision,
            instances=record.instances,
            reason=record.reason,
            decided_unix_ns=record.decided_unix_ns,
            fencing_token=fencing_token,
        )
        if not record.revision:
            return None
        last = self._sent.get(record.function)
        if last is None or last.wanted != _wanted_set(event):
            return Horizontal(event, f"{record.function}:{record.revision}")
        wait_s = min(LAST_RESEND_S, FIRST_RESEND_S * 2**last.resent_count)
        missing = any(item.instance not in self._reported for item in record.instances)
        left = not record.instances and any(e.function == record.function for e in self._reported.values())
        if (missing or left) and now_s - last.at_s >= wait_s:
            return Horizontal(event, f"{record.function}:{record.revision}:{fencing_token}.{last.resent_count + 1}")
        return None

    def _purges_due(self, records: Iterable[DesiredRecord]) -> list[Announcement]:
        wanted = {item.instance for record in records for item in record.instances}
        out: list[Announcement] = []
        for node, instance in sorted(self._verticals):
            event = self._reported.get(instance)
            if event.node != node if event is not None else instance not in wanted:
                out.append(Purge(node, instance))
        return out


def _wanted_set(event: HorizontalScaleEvent) -> _Set:
    return frozenset((item.instance, item.standby, item.allocation.sm_pct) for item in event.instances)
