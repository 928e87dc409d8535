"""What a pass would do if things were otherwise: the live pass itself, on a changed copy of what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.events import DesiredInstance, HorizontalScaleEvent, InstanceEvent, PlannedInstance
from hasgpu_core.function import NAME_PATTERN
from hasgpu_core.policy.placement import ordinal_key
from hasgpu_core.policy.placement.bounds import fewest_gpus
from hasgpu_core.resources import Allocation, DeviceHealth

from hasgpu_scheduler.binding import Binding, NodeView, Unplaced, bind

MOST_ADDED = 20_000
"""Hypothetical instances in one question."""
_Plans = Mapping[str, Sequence[PlannedInstance]]


@dataclass(frozen=True, slots=True)
class Added:
    """Instances as if they were wanted too."""

    function: str
    allocation: Allocation
    count: int = 1
    standby: bool = False


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What is supposed to be otherwise."""

    add: tuple[Added, ...] = ()
    lose_nodes: tuple[str, ...] = ()
    lose_gpus: tuple[tuple[str, str], ...] = ()
    """(node, gpu)"""
    drop_functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WouldGo:
    """An instance that would be somewhere else than now."""

    node: str
    planned: PlannedInstance
    source: str
    """"node/gpu"; "": nowhere yet."""
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What would be."""

    placed: tuple[WouldGo, ...]
    unplaced: tuple[Unplaced, ...]
    gpus_total: int
    gpus_used_before: int
    gpus_used_after: int
    gpus_needed_at_least: int
    """For what is placed then, by `fewest_gpus`, on GPUs like the largest; 0 where there is none."""
    interrupted: tuple[str, ...]
    """Functions that lose all instances that they have placed."""


def suppose(
    hypothesis: Hypothesis,
    nodes: Mapping[str, NodeView],
    wanted: Mapping[str, HorizontalScaleEvent],
    plans: _Plans,
    reported: Mapping[str, InstanceEvent],
    warm: Mapping[str, frozenset[str]],
) -> Outcome:
    """Returns what the next pass would do; changes nothing.

    A scheduler that does not lead knows no commands: what the plans hold counts as wanted then.

    Raises:
        InvalidError: an allocation, a name or a count can't be, or nothing is supposed.
        NotFoundError: no such node, device or function.
    """
    _check(hypothesis, nodes, wanted, plans)
    known = dict(wanted) or _wanted_of(plans)
    for function in hypothesis.drop_functions:
        known.pop(function, None)
    for added in hypothesis.add:
        known[added.function] = _with_added(known.get(added.function), added, plans)
    before = bind(nodes, wanted or _wanted_of(plans), plans, reported, warm)
    after = bind(_without(nodes, hypothesis), known, plans, reported, warm)
    return _compare(hypothesis, nodes, before, after)


def _compare(
    hypothesis: Hypothesis,
    nodes: Mapping[str, NodeView],
    before: Binding,
    after: Binding,
) -> Outcome:
    was, now = _places(before.plans), _places(after.plans)
    lost = [place for place in was.values() if _is_lost(hypothesis, place)]
    functions = {planned.function for _, planned in lost}
    left = {p.function for node, p in was.values() if not _is_lost(hypothesis, (node, p))}
    placed = []
    for instance, (node, planned) in sorted(now.items(), key=lambda item: ordinal_key(item[0])):
        old = was.get(instance)
        if _is_lost(hypothesis, (node, planned)):
            continue  # it waits there for room elsewhere, and is among the unplaced
        if old is None or (old[0], old[1].gpu, old[1].row) != (node, planned.gpu, planned.row):
            source = f"{old[0]}/{old[1].gpu}" if old is not None else ""
            # A note is "<instance> to <place> (<why>)".
            why = after.notes.get(instance, "").partition(" (")[2].removesuffix(")")
            placed.append(WouldGo(node, planned, source, why))
    usable = [device for view in nodes.values() if view.usable for device in view.devices.values()]
    largest = max(usable, key=lambda device: device.memory_bytes, default=None)
    kept = [place for place in now.values() if not _is_lost(hypothesis, place)]
    shares = [planned.allocation for _, planned in kept]
    given = [replace(a, sm_pct=largest.given_sm_pct(a.sm_pct)) for a in shares] if largest is not None else []
    return Outcome(
        placed=tuple(placed),
        unplaced=after.unplaced,
        gpus_total=len(usable),
        gpus_used_before=len({(node, p.gpu) for node, p in was.values()}),
        gpus_used_after=len({(node, p.gpu) for node, p in kept}),
        gpus_needed_at_least=fewest_gpus(given, largest.memory_bytes).gpus if largest is not None else 0,
        interrupted=tuple(sorted(functions - left)),
    )


def _places(plans: _Plans) -> dict[str, tuple[str, PlannedInstance]]:
    return {p.instance: (node, p) for node, entries in plans.items() for p in entries if not p.moving_from}


def _is_lost(hypothesis: Hypothesis, place: tuple[str, PlannedInstance]) -> bool:
    node, planned = place
    return node in hypothesis.lose_nodes or (node, planned.gpu) in hypothesis.lose_gpus


def _without(nodes: Mapping[str, NodeView], hypothesis: Hypothesis) -> dict[str, NodeView]:
    """The nodes, those supposed lost not alive, devices supposed lost LOST."""
    out = {}
    for name, view in nodes.items():
        event = view.event
        lost = {gpu for node, gpu in hypothesis.lose_gpus if node == name}
        if lost and event is not None:
            devices = tuple(
                replace(d, health=DeviceHealth.LOST, health_reason="supposed") if d.gpu in lost else d
                for d in event.devices
            )
            event = replace(event, devices=devices)
        out[name] = replace(view, event=event, alive=view.alive and name not in hypothesis.lose_nodes)
    return out


def _wanted_of(plans: _Plans) -> dict[str, HorizontalScaleEvent]:
    """What the plans hold, as if it had been commanded."""
    of_function: dict[str, list[PlannedInstance]] = {}
    for _, planned in _places(plans).values():
        of_function.setdefault(planned.function, []).append(planned)
    return {
        function: HorizontalScaleEvent(
            function=function,
            revision=max(p.allocation_revision for p in entries),
            instances=tuple(DesiredInstance(p.instance, p.allocation, p.standby) for p in entries),
            reason="as planned",
            decided_unix_ns=0,
            fencing_token=0,
        )
        for function, entries in of_function.items()
    }


def _with_added(event: HorizontalScaleEvent | None, added: Added, plans: _Plans) -> HorizontalScaleEvent:
    event = event or HorizontalScaleEvent(added.function, 1, (), "supposed", 0, 0)
    taken = [d.instance for d in event.instances] + [p.instance for entries in plans.values() for p in entries]
    first = 1 + max((ordinal_key(i)[1] for i in taken if ordinal_key(i)[0] == added.function), default=-1)
    more = tuple(
        DesiredInstance(f"{added.function}-{first + n}", added.allocation, added.standby) for n in range(added.count)
    )
    return replace(event, instances=event.instances + more)


def _check(
    hypothesis: Hypothesis,
    nodes: Mapping[str, NodeView],
    wanted: Mapping[str, HorizontalScaleEvent],
    plans: _Plans,
) -> None:
    if not (hypothesis.add or hypothesis.lose_nodes or hypothesis.lose_gpus or hypothesis.drop_functions):
        raise InvalidError(
            "hypothesis", expected="instances to add, or nodes, GPUs or functions to lose", got="nothing"
        )
    for added in hypothesis.add:
        if not NAME_PATTERN.fullmatch(added.function):
            raise InvalidError(
                "function", expected="1 to 63 of a-z, 0-9 and -, not at an end", got=repr(added.function)
            )
        added.allocation.validate()
    count = sum(added.count for added in hypothesis.add)
    if not 0 <= count <= MOST_ADDED:
        raise InvalidError("count", expected=f"0..{MOST_ADDED} instances in all", got=str(count))
    for node in (*hypothesis.lose_nodes, *(node for node, _ in hypothesis.lose_gpus)):
        if node not in nodes:
            raise NotFoundError("node", node, f"there are: {', '.join(sorted(nodes)) or 'none'}")
    for node, gpu in hypothesis.lose_gpus:
        event = nodes[node].event
        known = [device.gpu for device in event.devices] if event is not None else []
        if gpu not in known:
            raise NotFoundError("device", f"{node}/{gpu}", f"there are: {', '.join(known) or 'none'}")
    functions = {*wanted, *(p.function for entries in plans.values() for p in entries)}
    for function in hypothesis.drop_functions:
        if function not in functions:
            raise NotFoundError("function", function, f"there are: {', '.join(sorted(functions)) or 'none'}")
