"""Which metrics and labels a PromQL expression names; enough of its grammar for that, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABEL_LISTS = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass(frozen=True)
class Named:
    metrics: frozenset[str]
    labels: frozenset[str]
    """Grouped or matched by, anywhere in the expression."""
    matched: frozenset[tuple[str, str]]
    """(metric, label) of every matcher in braces."""


def named(expression: str) -> Named:
    text = _STRING.sub('""', expression)
    labels: set[str] = set()

    def take(found: re.Match[str]) -> str:
        labels.update(_WORD.findall(found[2]))
        return " "

    text = _LABEL_LISTS.sub(take, text)
    text = _RANGE.sub(" ", text)
    matched = set()
    for metric, inside in _SELECTOR.findall(text):
        for label in _WORD.findall(re.sub(r'(=~|!~|!=|=)\s*""', " ", inside)):
            matched.add((metric, label))
    text = re.sub(r"\{[^}]*\}", " ", text)
    words = [found for found in _WORD.finditer(text) if not re.match(r"\s*\(", text[found.end() :])]
    metrics = {w[0] for w in words if w[0].lower() not in _KEYWORDS and not re.search(r"[0-9.]$", text[: w.start()])}
    return Named(frozenset(metrics), frozenset(labels), frozenset(matched))
