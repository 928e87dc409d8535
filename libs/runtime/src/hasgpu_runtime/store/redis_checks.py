"""How Redis is, for `hasgpu doctor`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import redis.exceptions

from hasgpu_runtime.diagnosis import Check, Level

OLDEST_VERSION = (6, 2)
SLOW_MS = 50.0
FULL_SHARE = 0.9


async def check_redis(client: Any, where: str) -> Sequence[Check]:
    """Looks at the version, at whether writes survive a crash, and at the memory.

    Args:
        client: The Redis client.
        where: The URL without its password.
    """
    begin_s = time.perf_counter()
    try:
        await client.ping()
        took_ms = (time.perf_counter() - begin_s) * 1e3
        info = await client.info()
    except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
        advice = "is it running? HASGPU_REDIS_URL names it"
        return [Check(Level.FAULT, "Redis", f"{where} does not answer: {error}", advice)]
    version = str(info.get("redis_version", "?"))
    found = f"{version} at {where}, answers in {took_ms:.1f} ms, {info.get('used_memory', 0) / 2**20:.1f} MiB"
    return [Check(level, "Redis", found, advice) for level, advice in (_judge(version, took_ms, info),)]


def _judge(version: str, took_ms: float, info: dict[str, Any]) -> tuple[Level, str]:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_VERSION:
        return Level.FAULT, "hasgpu needs Redis 6.2 or later"
    if str(info.get("aof_last_write_status", "ok")) != "ok" or str(info.get("rdb_last_bgsave_status", "ok")) != "ok":
        return Level.FAULT, "it can't write to its disk: is that full?"
    most = int(info.get("maxmemory", 0))
    if most and int(info.get("used_memory", 0)) > FULL_SHARE * most:
        return Level.FAULT, "its memory is nearly full: raise maxmemory"
    if str(info.get("maxmemory_policy", "noeviction")) != "noeviction":
        return Level.WARNING, "maxmemory-policy should be noeviction: the desired state must not be dropped"
    if not int(info.get("aof_enabled", 0)):
        return (
            Level.WARNING,
            "no append-only file (appendonly yes): a crash loses the last changes of the desired state",
        )
    if took_ms > SLOW_MS:
        return Level.WARNING, "slow: is its host, or this one, overloaded?"
    return Level.OK, ""
