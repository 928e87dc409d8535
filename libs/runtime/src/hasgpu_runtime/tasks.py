"""Ending tasks."""

from __future__ import annotations

import asyncio

_AGAIN_S = 0.2


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits until it has ended; raises the error that it ended with, if any.

    It is cancelled again when it goes on: up to Python 3.11 `asyncio.wait_for`, which the NATS client uses, swallows a
    cancellation that arrives together with its result (https://github.com/python/cpython/issues/86296).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_AGAIN_S)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
