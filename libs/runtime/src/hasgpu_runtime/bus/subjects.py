"""Subjects and patterns: dot-separated tokens, `*` for one of them, a final `>` for one or more."""

from __future__ import annotations

import re

from hasgpu_core.errors import InvalidError

_TOKEN = re.compile(r"[^\s.*>]+")


def check_subject(subject: str) -> None:
    """Raises InvalidError unless a message can be sent to the subject."""
    if not all(_TOKEN.fullmatch(token) for token in subject.split(".")):
        raise InvalidError(
            "subject", expected="dot-separated tokens without blanks and without wildcards", got=repr(subject)
        )


def check_pattern(pattern: str) -> None:
    """Raises InvalidError unless the pattern can be listened to."""
    parts = pattern.split(".")
    last = len(parts) - 1
    for at, part in enumerate(parts):
        if not (part == "*" or (part == ">" and at == last) or _TOKEN.fullmatch(part)):
            raise InvalidError("pattern", expected="dot-separated tokens, * or a final >", got=repr(pattern))


def matches(pattern: str, subject: str) -> bool:
    """Returns whether the pattern covers the subject."""
    wanted = pattern.split(".")
    have = subject.split(".")
    for at, part in enumerate(wanted):
        if part == ">":
            return len(have) > at
        if at >= len(have) or part not in ("*", have[at]):
            return False
    return len(have) == len(wanted)


def check_covered(subject: str, patterns: tuple[str, ...], stream: str) -> None:
    """Raises InvalidError unless one of the patterns of a stream takes the subject."""
    check_subject(subject)
    if not any(matches(pattern, subject) for pattern in patterns):
        raise InvalidError("subject", expected=f"one of {stream}'s: {', '.join(patterns)}", got=repr(subject))


def check_listenable(pattern: str, covering: tuple[str, ...], stream: str) -> None:
    """Raises InvalidError unless all that the pattern covers belongs to the stream."""
    check_pattern(pattern)
    if not any(matches(cover, pattern) for cover in covering):
        raise InvalidError("pattern", expected=f"inside {stream}'s: {', '.join(covering)}", got=repr(pattern))
