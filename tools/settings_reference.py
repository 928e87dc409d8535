"""Writes docs/settings.md from the code that reads the settings; `--check` fails when it is stale.

    python tools/settings_reference.py [--check]

A service's settings are read in its `settings.py`, each by one call that names the variable, its default and its
bounds; what it means stands under the field that takes it. A variable that any package reads and that is told of
nowhere is an error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/settings.md"
SOURCES = ("libs/*/src", "services/*/src", "cli/src")
VARIABLE = re.compile(r"HASGPU_[A-Z0-9_]+")
READERS = ("number", "integer", "choice", "text", "url", "address", "with_password", "get")
UNITS = {
    "_S": "s",
    "_MS": "ms",
    "_MIB": "MiB",
    "_BYTES": "bytes",
    "_PERMILLE": "‰",
    "_PER_HOUR": "an hour",
}
MODULES = {
    "Every service": "hasgpu_runtime.settings",
    "gateway": "hasgpu_gateway.settings",
    "scaler": "hasgpu_scaler.settings",
    "scheduler": "hasgpu_scheduler.settings",
    "node-agent": "hasgpu_node_agent.settings",
    "rapp": "hasgpu_rapp.settings",
}
BOUNDS_WORDS = 3
"""A text with so few words only repeats the bounds; then the field that takes the value tells more."""
SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True, slots=True)
class Setting:
    """One variable."""

    name: str
    default: str
    allowed: str
    meaning: str


ELSEWHERE: Mapping[str, Sequence[Setting]] = {
    "The command": (
        Setting(
            "HASGPU_HOME",
            "`$XDG_STATE_HOME/hasgpu`, else `~/.local/state/hasgpu`",
            "a folder",
            "Where `hasgpu up` keeps a system; each home is a system of its own. `up` sets it for all it starts.",
        ),
        *(
            Setting(f"HASGPU_{service.upper()}", "as `hasgpu up` started it", "host:port", f"The {service} to talk to.")
            for service in ("gateway", "scaler", "scheduler", "rapp")
        ),
    ),
    "Workers and containers": (
        Setting(
            "HASGPU_NATIVE_GATE", "1", "0 or 1", "0: the device gate runs in Python, as it does where no C is compiled."
        ),
        Setting(
            "HASGPU_VOLUMES",
            "`/var/lib/hasgpu`",
            "a folder",
            "Where `python -m hasgpu_runtime.volumes` prepares the volumes of the containers.",
        ),
        Setting(
            "HASGPU_VOLUMES_ALSO",
            "none",
            "names, separated by commas",
            "Further volumes that it gives to the services.",
        ),
    ),
    "Standard variables": (
        Setting("XDG_STATE_HOME", "`~/.local/state`", "a folder", "The user's folder for state."),
        Setting(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "none",
            "a URL",
            "Where traces go, over OTLP/gRPC; unset: tracing is off. OTEL_EXPORTER_OTLP_TRACES_ENDPOINT goes "
            "before it.",
        ),
        Setting("OTEL_TRACES_EXPORTER", "otlp", "otlp or none", "none: no traces, whatever the endpoint."),
        Setting(
            "OTEL_TRACES_SAMPLER",
            "parentbased_always_on",
            "as OpenTelemetry has them",
            "Which requests are traced; OTEL_TRACES_SAMPLER_ARG is its share, 0..1. Scaling decisions always are.",
        ),
        Setting(
            "OTEL_METRICS_EXPORTER",
            "none",
            "otlp or none",
            "otlp: metrics are also sent over OTLP/gRPC, to OTEL_EXPORTER_OTLP_METRICS_ENDPOINT (which alone turns it "
            "on too), else OTEL_EXPORTER_OTLP_ENDPOINT; every OTEL_METRIC_EXPORT_INTERVAL ms (60000).",
        ),
        Setting("OTEL_SDK_DISABLED", "false", "true or false", "true: neither traces nor OTLP metrics."),
        Setting(
            "OTEL_SERVICE_NAME",
            "`hasgpu-<service>`",
            "a name",
            "In traces and metrics; further attributes by OTEL_RESOURCE_ATTRIBUTES.",
        ),
    ),
}


def settings_of(module: ModuleType) -> list[Setting]:
    """Returns what a module reads, in the order in which it does."""
    tree = ast.parse(inspect.getsource(module))
    docs = field_docs(module)
    found: dict[str, Setting] = {}
    for call, keyword, owner in reader_calls(tree):
        variable = variable_of(call)
        if variable in found:
            continue
        meaning = meaning_of(variable, keyword, owner, module, docs)
        found[variable] = Setting(
            variable, default_of(call, variable, keyword, module, meaning), allowed_of(call, module), tidy(meaning)
        )
    return list(found.values())


def is_variable(node: ast.AST) -> bool:
    """Whether a node is the name of a variable."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(VARIABLE.fullmatch(node.value))


def variable_of(call: ast.Call) -> str:
    """Returns the variable that a call reads."""
    return next(str(ast.literal_eval(arg)) for arg in call.args if is_variable(arg))


def reader_calls(tree: ast.AST, keyword: str = "", owner: str = "") -> Iterator[tuple[ast.Call, str, str]]:
    """Yields calls that read a variable, the keyword they are given to, and of which class."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Call):
            name = child.func.id if isinstance(child.func, ast.Name) else getattr(child.func, "attr", "")
            if name in READERS and any(map(is_variable, child.args)):
                yield child, keyword, owner
            for argument in child.keywords:
                yield from reader_calls(ast.Module([ast.Expr(argument.value)], []), argument.arg or "", name)
            for positional in (*child.args, *([child.func.value] if isinstance(child.func, ast.Attribute) else ())):
                yield from reader_calls(ast.Module([ast.Expr(positional)], []), keyword, owner)
        else:
            yield from reader_calls(child, keyword, owner)


def field_docs(module: ModuleType) -> dict[tuple[str, str], str]:
    """Returns the docstrings of a module's fields, by class and field."""
    docs = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    docs[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return docs


def meaning_of(variable: str, keyword: str, owner: str, module: ModuleType, docs: Mapping[tuple[str, str], str]) -> str:
    """Returns what is said of a variable: its part of the field's text, else the text of the field that takes it."""
    other = module.__dict__.get(owner)
    if isinstance(other, type):
        docs = {**docs, **field_docs(sys.modules[other.__module__])}
    own = docs.get((owner, keyword), "")
    for text in (own, *docs.values()):
        parts = re.split(r"(?:^|(?<=[.;] ))(?=HASGPU_)", text)
        for part in parts:
            named = VARIABLE.match(part)
            if named and named[0] == variable:
                said = part[named.end() :].strip()
                of_field = own if variable not in own else ""
                return said if len(re.findall("[a-z]{3,}", said)) > BOUNDS_WORDS else of_field or said
    return own or next((text for text in docs.values() if variable in text), "")


def default_of(call: ast.Call, variable: str, keyword: str, module: ModuleType, meaning: str) -> str:
    """Returns a variable's default, in words."""
    if isinstance(call.func, ast.Name) and call.func.id == "with_password":
        return "none"
    told = re.search(r"Default: ([^.]*(?:\.[^ ][^.]*)*)\.?", meaning) or re.search(r"\(default: ([^)]*)\)", meaning)
    if told:
        return told[1].strip()
    place = next(index for index, arg in enumerate(call.args) if is_variable(arg)) + 1
    if place >= len(call.args):
        return "none"
    value = evaluate(call.args[place], module)
    return shown(value, variable)


def evaluate(node: ast.expr, module: ModuleType) -> Any:
    """Returns what an expression of a settings module is worth, defaults of its class included; None: it depends."""
    names = dict(module.__dict__)
    names["default"] = module.CommonSettings() if hasattr(module, "CommonSettings") else None
    names["listen"] = names.get("DEFAULT_LISTEN")
    try:
        return eval(compile(ast.Expression(node), "<settings>", "eval"), names)
    except NameError:
        return None


def shown(value: Any, variable: str) -> str:
    """Returns a value as a reader wants it."""
    if value is None or value == "":
        return "none"
    if variable.endswith("_BYTES") and isinstance(value, int):
        for size, unit in SIZES:
            if value % size == 0:
                return f"{value // size} {unit}"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) else f"`{value}`"


def allowed_of(call: ast.Call, module: ModuleType) -> str:
    """Returns the bounds that the reading call enforces."""
    name = call.func.id if isinstance(call.func, ast.Name) else "get"
    if name in ("number", "integer"):
        low, high = (evaluate(arg, module) for arg in call.args[3:5])
        variable = variable_of(call)
        text = f"{shown(low, variable)} to {shown(high, variable)}"
        unit = next((unit for ending, unit in UNITS.items() if variable.endswith(ending)), "")
        return f"{text} {unit}".strip() if unit != "bytes" else text
    if name == "choice":
        return ", ".join(evaluate(call.args[3], module))
    if name == "url":
        return " or ".join(f"{scheme}://" for scheme in evaluate(call.args[3], module))
    return {"address": "host:port", "with_password": "a file"}.get(name, "")


def tidy(meaning: str) -> str:
    """Returns a sentence of its own."""
    text = re.sub(r" ?Default: .*$| ?\(default: [^)]*\)|,? ?[0-9.]+[0-9]\.\.[0-9.]*[0-9]", "", meaning).strip(" ;:,.")
    text = re.sub(r"^\([^)]*\)[:,]? ?", "", text)
    return text[:1].upper() + text[1:] + "." if text else ""


def read_variables() -> set[str]:
    """Returns every variable that some package names as a string of its own."""
    found = set()
    for pattern in SOURCES:
        for path in ROOT.glob(f"{pattern}/**/*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and is_variable(node)}
    return {str(name) for name in found}


def page() -> str:
    """Returns the page; raises SystemExit for a variable that is told of nowhere, or without a meaning."""
    sections: dict[str, Sequence[Setting]] = {
        title: settings_of(importlib.import_module(module)) for title, module in MODULES.items()
    }
    sections |= ELSEWHERE
    told = {setting.name for settings in sections.values() for setting in settings}
    missing = sorted(read_variables() - told)
    silent = sorted(setting.name for settings in sections.values() for setting in settings if not setting.meaning)
    if missing or silent:
        raise SystemExit(
            f"settings without a meaning: {', '.join(missing + silent)}; say it under the field of the settings class "
            "(its text begins with the variable's name), or in tools/settings_reference.py"
        )
    lines = [
        "# Settings",
        "",
        "All settings are environment variables, read once when a process starts. A value that can't be is refused",
        "in one line that names the variable, what is allowed and what came; the process ends with status 2. `hasgpu",
        "up` sets the addresses, ports and folders of what it starts and passes everything else on; in containers they",
        "stand in `deploy/compose/compose.yaml`.",
        "",
        "This page is written by `python tools/settings_reference.py` from the code that reads them; `make check`",
        "fails when it is stale.",
    ]
    for title, settings in sections.items():
        lines += ["", f"## {title}", "", "| variable | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [
            "| "
            + " | ".join(cell.replace("|", "\\|") for cell in (f"`{s.name}`", s.default, s.allowed, s.meaning))
            + " |"
            for s in settings
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes or checks."""
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if "--check" in sys.argv:
        print("docs/settings.md is stale; run python tools/settings_reference.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
