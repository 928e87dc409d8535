"""A thread for calls that may hang: the event loop never waits in them, and the process can end while one does."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class SideThread:
    """Makes one call after another in a thread of its own. Used from one event loop.

    A daemon thread, unlike those of `asyncio.to_thread`: a call that never returns does not keep the process.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open_count = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way or in line."""
        return self._open_count > 0

    async def run(self, call: Callable[[], T]) -> T:
        """Makes a call after those in line and returns what it returns, or raises what it raises.

        A caller that is cancelled meanwhile does not stop the call.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._open_count += 1

        def settle(result: T | None, error: BaseException | None) -> None:
            self._open_count -= 1
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # T may be None, and is where there was no error

        def make() -> None:
            result: T | None = None
            failure: BaseException | None = None
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001  handed to the caller, whatever it is
                failure = error
            try:
                loop.call_soon_threadsafe(settle, result, failure)
            except RuntimeError:
                return  # the loop has closed meanwhile: nobody waits

        self._calls.put(make)
        return await done

    def close(self) -> None:
        """Ends the thread after the calls in line."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
