"""Writing functions: the store is the truth, the object store holds their artifacts, the bus tells everyone.

Several gateways write side by side: each write compares and sets, so one of two that race is told to read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from hasgpu_core.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError, UnavailableError
from hasgpu_core.events import FunctionEvent, function_subject
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import Bus, Clock, ObjectStore, Store
from hasgpu_runtime import wire
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_gateway.directory import Directory

log = logging.getLogger(__name__)

KEY_PREFIX = "hasgpu:function:"
LAST_PREFIX = "hasgpu:function-last:"
"""Holds the last revision of a deleted function, so that a name deployed again never repeats one."""
_ATTEMPTS = 5


class Registry:
    """Deploys, changes and deletes functions."""

    def __init__(
        self,
        *,
        store: Store,
        bus: Bus,
        objects: ObjectStore,
        directory: Directory,
        clock: Clock,
        telemetry: Telemetry,
        seen_timeout_s: float = 2.0,
    ) -> None:
        self._store = store
        self._bus = bus
        self._objects = objects
        self._directory = directory
        self._clock = clock
        self._telemetry = telemetry
        self._seen_timeout_s = seen_timeout_s

    async def check_deployable(self, spec: FunctionSpec, *, replace_existing: bool) -> None:
        """Raises what `deploy` would raise without its artifact, so that a bad upload ends before it begins."""
        spec.validate()
        if not replace_existing and await self._store.get(KEY_PREFIX + spec.name) is not None:
            raise AlreadyExistsError("function", spec.name, "deploy with replace to change it")

    async def deploy(self, spec: FunctionSpec, artifact: bytes, *, replace_existing: bool) -> FunctionEvent:
        """Stores the artifact, then the spec, then announces it; returns once this gateway serves it.

        Raises:
            InvalidError: The spec can't be, or the artifact has another size than declared.
            IntegrityError: The artifact has another digest than declared.
            AlreadyExistsError: The name is taken and `replace_existing` is False.
            ConflictError: Another writer was faster, several times.
            UnavailableError: The store or the bus is away.
        """
        await self.check_deployable(spec, replace_existing=replace_existing)
        if len(artifact) != spec.artifact.size_bytes:
            raise InvalidError(
                "artifact", expected=f"{spec.artifact.size_bytes} bytes as declared", got=f"{len(artifact)} bytes"
            )
        await self._objects.put_artifact(spec.artifact.sha256, artifact)

        def change(old: FunctionEvent | None) -> FunctionSpec:
            if old is not None and not replace_existing:
                raise AlreadyExistsError("function", spec.name, "deploy with replace to change it")
            return spec

        return await self._write(spec.name, change)

    async def update(
        self, name: str, change: Callable[[FunctionSpec], FunctionSpec], *, if_revision: int
    ) -> FunctionEvent:
        """Changes a spec; the artifact stays. Returns once this gateway serves it.

        Args:
            name: The function's.
            change: Returns the new spec.
            if_revision: The revision it must be at; 0: any.

        Raises:
            NotFoundError, InvalidError, UnavailableError: As they say.
            ConflictError: It is at another revision.
        """

        def checked(old: FunctionEvent | None) -> FunctionSpec:
            if old is None:
                raise NotFoundError("function", name)
            if if_revision and old.revision != if_revision:
                raise ConflictError(f"function {name!r}", expected_revision=if_revision, actual_revision=old.revision)
            spec = change(old.spec)
            spec.validate()
            return spec

        return await self._write(name, checked)

    async def delete(self, name: str) -> None:
        """Forgets a function; its artifact goes when no other function uses it.

        Raises:
            NotFoundError, UnavailableError: As they say.
        """
        key = KEY_PREFIX + name
        stored = await self._store.get(key)
        if stored is None:
            raise NotFoundError("function", name)
        event = wire.decode_function(stored.value)
        await self._remember_last(name, event.revision)
        await self._store.delete(key, expected_revision=stored.revision)
        await self._bus.delete(function_subject(name), self._telemetry.inject())
        await self._collect(event.spec.artifact.sha256)
        await self._directory.wait_until(
            lambda: self._revision_seen(name) != event.revision, timeout_s=self._seen_timeout_s
        )

    async def reconcile(self) -> None:
        """Makes the bus say what the store holds. May be repeated; raises UnavailableError while either is away.

        What the bus has is read first: every writer stores before it announces, so what is announced but not stored
        was deleted.
        """
        announced = dict(self._directory.functions)
        stored = await self._stored()
        for name, event in stored.items():
            known = announced.get(name)
            if known is None or known.revision < event.revision:
                log.info("function %s: announcing revision %d", name, event.revision)
                await self._bus.put(function_subject(name), wire.encode(event), self._telemetry.inject())
                if await self._store.get(KEY_PREFIX + name) is None:
                    await self._bus.delete(function_subject(name))
        for name in announced.keys() - stored.keys():
            log.info("function %s: no longer in the store", name)
            await self._bus.delete(function_subject(name), self._telemetry.inject())

    async def _write(self, name: str, change: Callable[[FunctionEvent | None], FunctionSpec]) -> FunctionEvent:
        """Reads, changes, writes, announces; reads again when another writer came in between."""
        key = KEY_PREFIX + name
        for attempt in range(_ATTEMPTS):
            stored = await self._store.get(key)
            old = wire.decode_function(stored.value) if stored else None
            last = old.revision if old else await self._last_revision(name)
            event = FunctionEvent(change(old), revision=last + 1, updated_unix_ns=self._clock.unix_ns())
            try:
                await self._store.compare_and_set(
                    key, wire.encode(event), expected_revision=stored.revision if stored else 0
                )
            except ConflictError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                continue
            await self._announce(event)
            if old and old.spec.artifact.sha256 != event.spec.artifact.sha256:
                await self._collect(old.spec.artifact.sha256)
            return event
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _announce(self, event: FunctionEvent) -> None:
        name = event.spec.name
        try:
            await self._bus.put(function_subject(name), wire.encode(event), self._telemetry.inject())
        except UnavailableError as error:
            raise UnavailableError(
                f"function {name!r} is stored as revision {event.revision}, and will be announced "
                f"once the bus is back: {error}"
            ) from error
        await self._directory.wait_until(
            lambda: self._revision_seen(name) >= event.revision, timeout_s=self._seen_timeout_s
        )

    def _revision_seen(self, name: str) -> int:
        known = self._directory.functions.get(name)
        return known.revision if known else 0

    async def _stored(self) -> dict[str, FunctionEvent]:
        result = {}
        for key, stored in (await self._store.list(KEY_PREFIX)).items():
            try:
                result[key.removeprefix(KEY_PREFIX)] = wire.decode_function(stored.value)
            except InvalidError as error:
                log.warning("%s can't be read and is left out: %s", key, error)
        return result

    async def _last_revision(self, name: str) -> int:
        stored = await self._store.get(LAST_PREFIX + name)
        return int(stored.value) if stored else 0

    async def _remember_last(self, name: str, revision: int) -> None:
        for _ in range(_ATTEMPTS):
            stored = await self._store.get(LAST_PREFIX + name)
            if stored and int(stored.value) >= revision:
                return
            try:
                await self._store.compare_and_set(
                    LAST_PREFIX + name, str(revision).encode(), expected_revision=stored.revision if stored else 0
                )
            except ConflictError:
                continue
            return
        raise UnavailableError(f"function {name!r} is being changed by others; try again")

    async def _collect(self, sha256: str) -> None:
        """Deletes an artifact that no function uses any more; a failure leaves it lying, which does no harm."""
        try:
            if all(event.spec.artifact.sha256 != sha256 for event in (await self._stored()).values()):
                await self._objects.delete_artifact(sha256)
        except UnavailableError as error:
            log.warning("artifact %s is left behind: %s", sha256, error)


def with_changes(spec: FunctionSpec, changes: dict[str, int]) -> FunctionSpec:
    """Returns the spec with some of its numbers changed."""
    return replace(spec, **changes)  # type: ignore[arg-type]  # names and types come from the update message
