"""Artifacts in a JetStream object-store bucket, keyed by digest; other NATS object-store clients can read it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import nats.errors
import nats.js.errors
from hasgpu_core.errors import NotFoundError, UnavailableError
from nats.js.object_store import ObjectStore

from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.bus.artifacts import check_digest, verify

_log = logging.getLogger(__name__)

TRANSFER_TIMEOUT_S = 120.0
"""For one artifact either way."""


class ArtifactBucket:
    """Puts, gets and deletes artifacts."""

    def __init__(self, js: Any) -> None:
        self._js = js
        self._bucket: Any = ObjectStore(name=nats_streams.BUCKET, stream=nats_streams.BUCKET_STREAM, js=js)

    async def put(self, sha256: str, data: bytes) -> None:
        """Stores; raises IntegrityError, UnavailableError."""
        check_digest(sha256)
        await asyncio.to_thread(verify, sha256, data)
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                if await self._info(sha256) is None:
                    await self._bucket.put(sha256, data)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise _unavailable("stored", sha256, error) from error

    async def get(self, sha256: str) -> bytes:
        """Returns verified bytes; raises NotFoundError, IntegrityError, UnavailableError."""
        check_digest(sha256)
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                info = await self._info(sha256)
                if info is None:
                    raise NotFoundError("artifact", sha256)
                data = await self._read(f"$O.{nats_streams.BUCKET}.C.{info.nuid}", info.chunks or 0)
        except nats.js.errors.NotFoundError as error:
            raise NotFoundError("artifact", sha256, "it was deleted while it was read") from error
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise _unavailable("read", sha256, error) from error
        await asyncio.to_thread(verify, sha256, data)
        return data

    async def delete(self, sha256: str) -> None:
        """Deletes; raises UnavailableError."""
        check_digest(sha256)
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                if await self._info(sha256) is not None:
                    await self._bucket.delete(sha256)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise _unavailable("deleted", sha256, error) from error

    async def _info(self, sha256: str) -> Any:
        """The object's description; None when it is not there. A lost stream is made again, empty."""
        try:
            return await self._bucket.get_info(sha256)
        except nats.js.errors.ObjectNotFoundError:
            await nats_streams.ensure(self._js)
            return None

    async def _read(self, subject: str, chunks_count: int) -> bytes:
        """Asks for one chunk after the other: no consumer is left behind, and nothing comes faster than it is taken."""
        chunks: list[bytes] = []
        sequence = 1
        while len(chunks) < chunks_count:
            message = await self._js.get_msg(
                nats_streams.BUCKET_STREAM, seq=sequence, subject=subject, next=True, direct=True
            )
            chunks.append(message.data or b"")
            sequence = message.seq + 1
        return b"".join(chunks)


def _unavailable(done: str, sha256: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"artifact {sha256[:12]} can't be {done}: {str(error) or type(error).__name__}")
