"""The store in memory: for tests, and the model of what the Redis one does."""

from __future__ import annotations

from dataclasses import dataclass

from hasgpu_core.errors import ConflictError, FencedError, UnavailableError
from hasgpu_core.ports import Clock, Fence, Versioned


@dataclass(slots=True)
class _Lease:
    owner: str
    token: int
    expires_s: float


class MemoryStore:
    """Implements `hasgpu_core.ports.Store`; leases run out by the clock given.

    `go_away()` and `come_back()` act out a store that is lost and returns.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: dict[str, Versioned] = {}
        self._leases: dict[str, _Lease] = {}
        self._revision = 0
        self._away = False

    def go_away(self) -> None:
        """From now on every call raises UnavailableError."""
        self._away = True

    def come_back(self) -> None:
        """Serves again what it held."""
        self._away = False

    async def get(self, key: str) -> Versioned | None:
        """Returns the value, or None when the key is absent."""
        self._check_here()
        return self._values.get(key)

    async def list(self, prefix: str) -> dict[str, Versioned]:
        """Returns every key that begins with `prefix`, sorted."""
        self._check_here()
        return {key: self._values[key] for key in sorted(self._values) if key.startswith(prefix)}

    async def compare_and_set(
        self, key: str, value: bytes, *, expected_revision: int, fence: Fence | None = None
    ) -> int:
        """Writes when the key is at `expected_revision` (0: absent); returns the new revision."""
        self._check_here()
        self._check(key, expected_revision, fence)
        self._revision += 1
        self._values[key] = Versioned(bytes(value), self._revision)
        return self._revision

    async def delete(self, key: str, *, expected_revision: int | None = None, fence: Fence | None = None) -> None:
        """Deletes; what is not there does nothing."""
        self._check_here()
        if key not in self._values:
            expected_revision = None
        self._check(key, expected_revision, fence)
        self._values.pop(key, None)

    async def acquire_lease(self, lease: str, owner: str, *, ttl_s: float) -> Fence | None:
        """Takes or renews the lease; None while another owner holds it."""
        self._check_here()
        now_s = self._clock.now_s()
        held = self._leases.get(lease)
        if held is not None and held.expires_s > now_s:
            if held.owner != owner:
                return None
            held.expires_s = now_s + ttl_s
            return Fence(lease, held.token)
        token = held.token + 1 if held is not None else 1
        self._leases[lease] = _Lease(owner, token, now_s + ttl_s)
        return Fence(lease, token)

    async def release_lease(self, lease: str, owner: str) -> None:
        """Gives the lease up, when `owner` holds it."""
        self._check_here()
        held = self._leases.get(lease)
        if held is not None and held.owner == owner:
            held.owner, held.expires_s = "", self._clock.now_s()

    def _check(self, key: str, expected_revision: int | None, fence: Fence | None) -> None:
        if fence is not None:
            held = self._leases.get(fence.lease)
            current = held.token if held is not None else 0
            if current != fence.token:
                raise FencedError(fence.lease, token=fence.token, current_token=current)
        stored = self._values.get(key)
        actual = stored.revision if stored is not None else 0
        if expected_revision is not None and expected_revision != actual:
            raise ConflictError(key, expected_revision=expected_revision, actual_revision=actual)

    def _check_here(self) -> None:
        if self._away:
            raise UnavailableError("the store is away")
