"""The store on Redis (6.2 or later, or what speaks its protocol): every write is one Lua script, so one atomic step."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import redis.asyncio
import redis.exceptions
from hasgpu_core.errors import ConflictError, FencedError, UnavailableError
from hasgpu_core.ports import Clock, Fence, Versioned
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.diagnosis import Look
from hasgpu_runtime.layout import LAYOUT, check_layout
from hasgpu_runtime.store.redis_checks import check_redis
from hasgpu_runtime.urls import without_secret

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
"""How long a service that starts waits for the store."""
WAIT_S = 2.0
"""How long one attempt of a call waits for an answer."""
_ATTEMPTS = 3

_REVISION = "hasgpu-store:revision"
"""One counter for all keys, so that a key's revisions never repeat, deletions or not."""
_LAYOUT = "hasgpu-store:layout"
_LEASE = "hasgpu-store:lease:"
_TOKEN = "hasgpu-store:lease-token:"  # noqa: S105  a fencing token's key, no secret

_CONFLICT, _FENCED = 1, 2

# KEYS: value, revision counter, lease token. ARGV: fence ("" for none), expected revision ("" for any), value.
_CHECK = """
if ARGV[1] ~= '' then
  local token = redis.call('GET', KEYS[3]) or '0'
  if token ~= ARGV[1] then return {2, tonumber(token)} end
end
local actual = redis.call('HGET', KEYS[1], 'revision') or '0'
"""
# ARGV[4] names the write: the client sends one again whose answer was lost, and what it wrote itself is no conflict.
_SET = (
    _CHECK
    + """
if actual ~= ARGV[2] then
  if redis.call('HGET', KEYS[1], 'write') == ARGV[4] then return {0, tonumber(actual)} end
  return {1, tonumber(actual)}
end
local revision = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'value', ARGV[3], 'revision', string.format('%d', revision), 'write', ARGV[4])
return {0, revision}
"""
)
_DELETE = (
    _CHECK
    + """
if actual ~= '0' and ARGV[2] ~= '' and actual ~= ARGV[2] then return {1, tonumber(actual)} end
redis.call('DEL', KEYS[1])
return {0, 0}
"""
)
# KEYS: lease, its token. ARGV: owner, time to live in ms. Returns the token, or 0 while another owner holds it.
_ACQUIRE = """
local owner = redis.call('GET', KEYS[1])
if owner then
  if owner ~= ARGV[1] then return 0 end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(redis.call('GET', KEYS[2]))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return redis.call('INCR', KEYS[2])
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 0
"""


class RedisStore:
    """Implements `hasgpu_core.ports.Store`; leases run out by the server's clock."""

    def __init__(self, url: str) -> None:
        """Use `connect`."""
        self._where = without_secret(url)
        self._client: Any = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=WAIT_S,
            socket_connect_timeout=WAIT_S,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), _ATTEMPTS - 1),
            health_check_interval=0,
        )
        self._set = self._client.register_script(_SET)
        self._delete = self._client.register_script(_DELETE)
        self._acquire = self._client.register_script(_ACQUIRE)
        self._release = self._client.register_script(_RELEASE)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, timeout_s: float = CONNECT_TIMEOUT_S, clock: Clock | None = None
    ) -> AsyncIterator[Self]:
        """Waits for the server, and closes the connections at the end.

        Raises UnavailableError, naming the URL without its password, when there is no answer within `timeout_s` or the
        password is wrong, UnsupportedError when another version's state is there.
        """
        clock = clock if clock is not None else SystemClock()
        try:
            store = cls(url)
        except ValueError as error:
            raise UnavailableError(f"can't use Redis at {without_secret(url)}: {error}") from error
        try:
            await store._wait(clock, timeout_s)
            yield store
        finally:
            await store._client.aclose()

    @property
    def looks(self) -> tuple[Look, ...]:
        """What a service looks at when it is asked how it is."""
        return (Look("Redis", lambda: check_redis(self._client, self._where)),)

    async def get(self, key: str) -> Versioned | None:
        """Returns the value, or None when the key is absent."""
        value, revision = await self._call(self._client.hmget(key, "value", "revision"))
        return Versioned(bytes(value), int(revision)) if revision is not None else None

    async def list(self, prefix: str) -> dict[str, Versioned]:
        """Returns every key that begins with `prefix`, sorted."""
        keys = sorted(await self._call(self._scan(prefix)))
        if not keys:
            return {}
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(key, "value", "revision")
        rows = await self._call(pipeline.execute())
        return {
            key: Versioned(bytes(value), int(revision))
            for key, (value, revision) in zip(keys, rows, strict=True)
            if revision is not None
        }

    async def compare_and_set(
        self, key: str, value: bytes, *, expected_revision: int, fence: Fence | None = None
    ) -> int:
        """Writes when the key is at `expected_revision` (0: absent); returns the new revision."""
        arguments: list[str | bytes] = [_token(fence), str(expected_revision), value, secrets.token_hex(8)]
        outcome, number = await self._call(self._set(keys=_keys(key, fence), args=arguments))
        _raise_unless_done(int(outcome), int(number), key, expected_revision, fence)
        return int(number)

    async def delete(self, key: str, *, expected_revision: int | None = None, fence: Fence | None = None) -> None:
        """Deletes; what is not there does nothing."""
        expected = "" if expected_revision is None else str(expected_revision)
        outcome, number = await self._call(self._delete(keys=_keys(key, fence), args=[_token(fence), expected]))
        _raise_unless_done(int(outcome), int(number), key, expected_revision or 0, fence)

    async def acquire_lease(self, lease: str, owner: str, *, ttl_s: float) -> Fence | None:
        """Takes or renews the lease; None while another owner holds it."""
        ttl_ms = max(1, round(ttl_s * 1e3))
        token = await self._call(self._acquire(keys=[_LEASE + lease, _TOKEN + lease], args=[owner, ttl_ms]))
        return Fence(lease, int(token)) if int(token) else None

    async def release_lease(self, lease: str, owner: str) -> None:
        """Gives the lease up, when `owner` holds it."""
        await self._call(self._release(keys=[_LEASE + lease], args=[owner]))

    async def _scan(self, prefix: str) -> set[str]:
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", prefix) + "*"
        return {key.decode() async for key in self._client.scan_iter(match=pattern, count=1_000, _type="hash")}

    async def _call(self, call: Any) -> Any:
        try:
            return await call
        except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(f"the store at {self._where} is away: {error}") from error

    async def _wait(self, clock: Clock, timeout_s: float) -> None:
        deadline_s = clock.now_s() + timeout_s
        while True:
            try:
                await self._client.ping()
                # What has no mark yet is of layout 1: it is new, or from before there were marks.
                await self._client.set(_LAYOUT, LAYOUT, nx=True)
                found = await self._client.get(_LAYOUT)
                break
            except redis.exceptions.AuthenticationError as error:
                raise UnavailableError(
                    f"Redis at {self._where} refuses the user or the password ({error}): HASGPU_REDIS_URL and "
                    "HASGPU_REDIS_PASSWORD_FILE must name what the server was given"
                ) from error
            except redis.exceptions.ResponseError as error:
                raise UnavailableError(f"can't use Redis at {self._where}: {error}") from error
            except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
                if clock.now_s() > deadline_s:
                    raise UnavailableError(f"no Redis at {self._where} within {timeout_s:.0f} s: {error}") from error
            await clock.sleep(0.1)
        check_layout(f"Redis at {self._where}", found.decode(errors="replace"))


def _keys(key: str, fence: Fence | None) -> list[str]:
    return [key, _REVISION, _TOKEN + (fence.lease if fence is not None else "")]


def _token(fence: Fence | None) -> str:
    return str(fence.token) if fence is not None else ""


def _raise_unless_done(outcome: int, number: int, key: str, expected_revision: int, fence: Fence | None) -> None:
    if outcome == _CONFLICT:
        raise ConflictError(key, expected_revision=expected_revision, actual_revision=number)
    if outcome == _FENCED and fence is not None:
        raise FencedError(fence.lease, token=fence.token, current_token=number)
