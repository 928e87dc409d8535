"""Names for agents that are started alike: each takes the first one that no other agent holds.

A name is held by a lock on `<state dir>/<name>.claim` (flock), which ends with the process however that ends. So an
agent that is started again, in a new container say, takes the name and the folder of the one that it follows.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasgpu_core.errors import InvalidError, UnavailableError

ANY = "*"
"""At the end of a node's name: a number from 1 on takes its place."""
LARGEST_NUMBER = 64


@contextmanager
def claimed_name(state_dir: Path, pattern: str) -> Iterator[str]:
    """Gives the node's name and holds it; a pattern without ANY is the name.

    Args:
        state_dir: Shared by all agents that are started alike; exists.
        pattern: E.g. "node*" for node1, node2, ...

    Raises:
        UnavailableError: All names are held.
        InvalidError: The folder can't be written.
    """
    if not pattern.endswith(ANY):
        yield pattern
        return
    prefix = pattern.removesuffix(ANY)
    for number in range(1, LARGEST_NUMBER + 1):
        name = f"{prefix}{number}"
        try:
            claim = (state_dir / f"{name}.claim").open("ab")
        except OSError as error:
            raise InvalidError("HASGPU_STATE_DIR", expected="a folder to write to", got=str(error)) from error
        with claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield name
            return
    raise UnavailableError(f"HASGPU_NODE={pattern}: agents hold all names up to {prefix}{LARGEST_NUMBER}")
