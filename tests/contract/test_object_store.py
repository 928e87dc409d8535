"""What an ObjectStore promises, asked of the double and of real NATS."""

from __future__ import annotations

import hashlib
import random

import pytest
from hasgpu_core.errors import IntegrityError, InvalidError, NotFoundError
from hasgpu_core.ports import ObjectStore


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ObjectStoreContract:
    @pytest.fixture
    def objects(self) -> ObjectStore:
        raise NotImplementedError

    @pytest.mark.parametrize("size_bytes", [0, 1, 128 * 1024, 3 * 1024 * 1024 + 17])
    async def test_what_was_put_comes_back(self, objects, size_bytes):
        data = random.Random(1).randbytes(size_bytes)
        await objects.put_artifact(digest(data), data)
        await objects.put_artifact(digest(data), data)
        assert await objects.get_artifact(digest(data)) == data

    async def test_a_wrong_digest_is_refused_and_stores_nothing(self, objects):
        with pytest.raises(IntegrityError):
            await objects.put_artifact(digest(b"a"), b"b")
        with pytest.raises(NotFoundError):
            await objects.get_artifact(digest(b"a"))

    async def test_what_is_no_digest_is_invalid(self, objects):
        with pytest.raises(InvalidError):
            await objects.get_artifact("../etc/passwd")

    async def test_a_deleted_artifact_is_gone_and_can_be_put_again(self, objects):
        await objects.put_artifact(digest(b"a"), b"a")
        await objects.delete_artifact(digest(b"a"))
        await objects.delete_artifact(digest(b"a"))
        with pytest.raises(NotFoundError):
            await objects.get_artifact(digest(b"a"))
        await objects.put_artifact(digest(b"a"), b"a")
        assert await objects.get_artifact(digest(b"a")) == b"a"


class TestMemoryObjectStore(ObjectStoreContract):
    @pytest.fixture
    async def objects(self, memory_bus):
        return memory_bus


class TestNatsObjectStore(ObjectStoreContract):
    @pytest.fixture
    async def objects(self, nats_bus, background_errors):
        return nats_bus

    async def test_bytes_changed_at_rest_are_found_out(self, objects):
        """An object under the name of another digest, as a broken disk or a stranger would leave it."""
        await objects._artifacts._bucket.put(digest(b"a"), b"b")
        with pytest.raises(IntegrityError):
            await objects.get_artifact(digest(b"a"))
