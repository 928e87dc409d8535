"""Profiles that come with the package; each header says whether it was measured or modelled."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from hasgpu_core.errors import NotFoundError
from hasgpu_core.profile import Profile

MODELLED_H100 = "modelled-h100"
"""Computed from data sheets (`tools/modelled_profile.py`), not measured."""
DEFAULT = MODELLED_H100
_SUFFIX = ".csv"


def names() -> tuple[str, ...]:
    """Returns the names of the shipped profiles, sorted."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)))


def shipped(name: str = DEFAULT) -> Profile:
    """Reads a shipped profile.

    Args:
        name: One of `names()`.

    Raises:
        NotFoundError: There is none of this name.
    """
    if name not in names():
        raise NotFoundError("shipped profile", name, f"there is {', '.join(names())}")
    return Profile.parse(resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8"))


def shipped_path(name: str = DEFAULT) -> Path:
    """Returns the file of a shipped profile, for whoever is told of profiles by their files.

    Raises:
        NotFoundError: There is none of this name.
    """
    if name not in names():
        raise NotFoundError("shipped profile", name, f"there is {', '.join(names()) or 'none'}")
    return Path(__file__).with_name(name + _SUFFIX)
