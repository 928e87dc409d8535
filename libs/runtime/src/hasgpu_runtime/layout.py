"""The layout of what is kept (streams, store, folders): one that another version wrote is refused, not misread.

LAYOUT is raised by a change after which an older or a newer version would misread the state, and by nothing else:
versions with one layout take turns freely. What bears no mark is of layout 1, which was not marked at first.
"""

from __future__ import annotations

import json
from pathlib import Path

from hasgpu_core.errors import InvalidError, UnsupportedError

LAYOUT = 1
MARK = "hasgpu-layout"
"""Key of the mark in a stream's metadata."""
FILE = "hasgpu-layout.json"


def check_layout(where: str, found: str | int) -> None:
    """Raises UnsupportedError, saying what to do, unless a mark is of this version's layout.

    Args:
        where: What bears it.
        found: The mark.
    """
    if str(found) == str(LAYOUT):
        return
    raise UnsupportedError(
        f"{where} has state of layout {found}, but this version of hasgpu reads layout {LAYOUT}: run the version that "
        "wrote it, or set that state aside and begin with none (docs/operations.md, Upgrades)"
    )


def claim_folder(folder: Path) -> None:
    """Makes a folder, if need be, and marks it; repeating that does nothing.

    Raises:
        UnsupportedError: Another version's layout lies there.
        InvalidError: It can't be written, or the mark can't be read.
    """
    mark = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            # Several processes may do so at once: each writes the same.
            mark.write_text(json.dumps({"layout": LAYOUT}) + "\n", encoding="utf-8")
            return
        found = json.loads(mark.read_text(encoding="utf-8"))["layout"]
    except OSError as error:
        raise InvalidError(f"state folder {folder}", expected="a folder to write to", got=str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError(str(mark), expected='{"layout": N}', got=f"{type(error).__name__}: {error}") from error
    check_layout(str(folder), found)
