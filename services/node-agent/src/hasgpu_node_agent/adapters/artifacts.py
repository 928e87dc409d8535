"""The node's cache of unpacked artifacts, one folder a digest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from hasgpu_core.errors import IntegrityError
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import ObjectStore

from hasgpu_node_agent.archive import unpack


class ArtifactCache:
    """Implements `hasgpu_node_agent.ports.Artifacts` on the bus's object store and a folder."""

    def __init__(self, store: ObjectStore, root: Path) -> None:
        self._store = store
        self._root = root
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
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

    def prune(self, keep: Iterable[str]) -> None:
        """Deletes all artifacts but those of the given digests."""
        kept = set(keep)
        for folder in self._root.iterdir():
            if folder.name not in kept:
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
