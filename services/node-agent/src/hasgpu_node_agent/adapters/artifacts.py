"""The node's cache of unpacked artifacts, one folder a digest."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from hasgpu_core.errors import IntegrityError
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import ObjectStore

from hasgpu_node_agent.archive import unpack

GONE = ".gone"


class ArtifactCache:
    """Implements `hasgpu_node_agent.ports.Artifacts` on the bus's object store and a folder."""

    def __init__(self, store: ObjectStore, root: Path) -> None:
        self._store = store
        self._root = root
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._numbers = itertools.count()
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def unpacked(self, spec: FunctionSpec) -> Path | None:
        """Returns the folder of an artifact that is here already."""
        folder = self._root / spec.artifact.sha256
        return folder if folder.is_dir() else None

    async def fetch(self, spec: FunctionSpec) -> Path:
        """Returns the folder of an artifact, fetched, verified and unpacked if it was not here yet.

        Raises:
            NotFoundError, UnavailableError: from the object store.
            IntegrityError: the bytes have another digest than was declared.
            UnsafeArchiveError: it must not be unpacked.
            OSError: the disk refuses.
        """
        spec.validate()
        sha256 = spec.artifact.sha256
        async with self._locks[sha256]:
            folder = self.unpacked(spec)
            if folder is not None:
                return folder
            data = await self._store.get_artifact(sha256)
            return await asyncio.to_thread(self._install, sha256, data)

    def prune(self, keep: Collection[str]) -> Sequence[str]:
        """Takes away, at once, all artifacts but those of the given digests; returns the digests taken away.

        They are only renamed, so that nobody finds a part of one; `sweep` deletes them. What is being fetched stays.

        Raises:
            OSError: the disk refuses.
        """
        taken: list[str] = []
        for folder in list(self._root.iterdir()):
            if folder.name.startswith(".") or folder.name in keep:
                continue
            folder.rename(self._root / f".{folder.name}.{next(self._numbers)}{GONE}")
            taken.append(folder.name)
            lock = self._locks.get(folder.name)
            if lock is not None and not lock.locked():
                del self._locks[folder.name]
        return taken

    async def sweep(self) -> None:
        """Deletes what `prune` took away; what can't be deleted now is tried again with the next."""
        await asyncio.to_thread(self._sweep)

    def _sweep(self) -> None:
        for folder in self._root.glob(f".*{GONE}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _install(self, sha256: str, data: bytes) -> Path:
        got = hashlib.sha256(data).hexdigest()
        if got != sha256:
            raise IntegrityError(expected_sha256=sha256, got_sha256=got)
        draft = self._root / f".{sha256}.{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            unpack(data, draft)
            # Renamed when whole, so that a folder that is there is complete.
            return draft.rename(self._root / sha256)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
