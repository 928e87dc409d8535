"""The gateway's own errors; the rest is `hasgpu_core.errors`.

NotFoundError
└── UnknownModelError     no function of that name or version, in the words that clients of the protocol know
UnavailableError
├── ExpiredError          the request's time ran out while it waited or ran
└── InstanceLostError     the instance that ran the request is gone, and no second try was possible
"""

from __future__ import annotations

from hasgpu_core.errors import NotFoundError, UnavailableError

TIMEOUT_EXPIRED = "Request timeout expired"


class UnknownModelError(NotFoundError):
    """No function of that name, or none of that version."""

    def __init__(self, name: str, version: str = "", current: int = 0) -> None:
        super().__init__("model", name)
        which = f"{name!r}" + (f" version {version}" if version else "")
        self.args = (
            f"Request for unknown model: {which} is not found"
            + (f"; the version served is {current}" if version and current else ""),
        )


class ExpiredError(UnavailableError):
    """The request's time ran out while it waited or ran; the first words are those that clients of Triton know."""

    def __init__(self, how: str) -> None:
        super().__init__(f"{TIMEOUT_EXPIRED}: {how}")


class InstanceLostError(UnavailableError):
    """The instance that ran the request is gone, and no second try was possible."""
