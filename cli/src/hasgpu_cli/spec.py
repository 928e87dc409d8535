"""The function's YAML: parsing it, and packing what it names.

Every complaint is an InvalidError that names the file and the key. The table of keys is in docs/functions.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import MIB, FunctionSpec, ModelFormat, TensorSpec, slo_class_of

from hasgpu_cli.pack import pack

T = TypeVar("T")
LARGEST_YAML_BYTES = 1 << 20
DEFAULT_ENTRIES: Mapping[ModelFormat, str] = {
    ModelFormat.PYTHON: "handler.py",
    ModelFormat.TORCHSCRIPT: "model.pt",
    ModelFormat.TORCH_EXPORT: "model.pt2",
}
KEYS = (
    "name",
    "format",
    "path",
    "entry",
    "inputs",
    "outputs",
    "slo_ms",
    "slo_target",
    "timeout_ms",
    "max_batch",
    "instances",
    "memory_mib",
    "max_queue",
    "execution_timeout_ms",
    "parameters",
    "advisory",
    "slo_class",
    "weight",
)
TENSOR_KEYS = ("name", "datatype", "shape")
INSTANCE_KEYS = ("min", "max", "standby")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A function ready to be sent."""

    spec: FunctionSpec
    archive: bytes
    names: tuple[str, ...]
    """Files in the archive."""


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, which YAML forbids and PyYAML lets pass."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_deployment(path: Path) -> Deployment:
    """Reads a function's YAML and packs its files.

    Raises:
        InvalidError: Naming the file, the key, what was expected and what came.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= LARGEST_YAML_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read {path}", got=str(getattr(error, "strerror", None) or error)) from error
    if size > LARGEST_YAML_BYTES:
        raise InvalidError(str(path), expected=f"at most {LARGEST_YAML_BYTES} bytes of YAML", got=f"{size}")
    return build_deployment(text, folder=path.parent, source=path)


def build_deployment(text: str, *, folder: Path, source: Path) -> Deployment:
    """Parses a function's YAML; relative paths count from `folder`. Raises InvalidError."""
    keys = _Section(str(source), _parse(text, source))
    keys.refuse_unknown(KEYS)
    model_format = keys.choice("format", {member.value: member for member in ModelFormat})
    target = folder / keys.text("path", ".")
    instances = _Section(f"{source}: instances", keys.mapping("instances", {}))
    instances.refuse_unknown(INSTANCE_KEYS)
    packed = keys.wrap(lambda: pack(target, leave_out=frozenset({source.resolve()})))
    entry = keys.text("entry", target.name if target.is_file() else DEFAULT_ENTRIES[model_format])
    if entry not in packed.names:
        raise InvalidError(
            f"{source}: entry", expected="one of the files packed", got=f"{entry!r}; packed: {_some(packed.names)}"
        )
    spec = FunctionSpec(
        name=keys.text("name"),
        format=model_format,
        artifact=packed.artifact,
        entry=entry,
        inputs=_tensors(keys, "inputs"),
        outputs=_tensors(keys, "outputs"),
        slo_ms=keys.integer("slo_ms"),
        slo_permille=_permille(keys, "slo_target", 0.95),
        timeout_ms=keys.integer("timeout_ms", 30_000),
        max_batch=keys.integer("max_batch", 8),
        min_instances=instances.integer("min", 1),
        max_instances=instances.integer("max", 8),
        standby=instances.integer("standby", 0),
        memory_bytes=keys.integer("memory_mib", 512) * MIB,
        max_queue=keys.integer("max_queue", 1_000),
        parameters=_parameters(keys),
        execution_timeout_ms=keys.integer("execution_timeout_ms", 30_000),
        advisory=keys.boolean("advisory", False),
        slo_class=keys.wrap(lambda: slo_class_of(keys.text("slo_class", "standard"))),
        weight=keys.integer("weight", 100),
    )
    keys.wrap(spec.validate)
    return Deployment(spec, packed.archive, packed.names)


def _parse(text: str, source: Path) -> Mapping[str, Any]:
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506  _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InvalidError(f"{source}{place}: malformed YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidError(f"{source}: malformed YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InvalidError(str(source), expected="a mapping of keys to values", got=_kind(document))
    return document


class _Section:
    """One mapping of the YAML; each getter checks the type."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    def refuse_unknown(self, known: Sequence[str]) -> None:
        for key in self._values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
                raise InvalidError(f"{self.where}: unknown key {key!r}; {hint}")

    def wrap(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except InvalidError as error:
            raise InvalidError(f"{self.where}: {error.what}", expected=error.expected, got=error.got) from error

    def get(self, key: str, default: Any, expected: str) -> Any:
        value = self._values.get(key, default)
        if value is None:
            got = "nothing" if key not in self._values else "an empty value"
            raise InvalidError(f"{self.where}: {key}", expected=expected, got=got)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default, "a string")
        if not isinstance(value, str) or not value:
            raise InvalidError(f"{self.where}: {key}", expected="a string", got=_kind(value))
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default, "a whole number")
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidError(f"{self.where}: {key}", expected="a whole number", got=_kind(value))
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default, "true or false")
        if not isinstance(value, bool):
            raise InvalidError(f"{self.where}: {key}", expected="true or false", got=_kind(value))
        return value

    def mapping(self, key: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
        value = self.get(key, default, "a mapping")
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise InvalidError(f"{self.where}: {key}", expected="a mapping", got=_kind(value))
        return value

    def sequence(self, key: str) -> Sequence[Any]:
        value = self.get(key, None, "a list")
        if not isinstance(value, list):
            raise InvalidError(f"{self.where}: {key}", expected="a list", got=_kind(value))
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default, "a number")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidError(f"{self.where}: {key}", expected="a number", got=_kind(value))
        return float(value)

    def choice(self, key: str, choices: Mapping[str, T]) -> T:
        expected = " or ".join(choices)
        value = self.get(key, None, expected)
        if not isinstance(value, str) or value not in choices:
            raise InvalidError(f"{self.where}: {key}", expected=expected, got=_kind(value))
        return choices[value]


def _permille(keys: _Section, key: str, default: float) -> int:
    value = keys.number(key, default)
    if not 0 < value <= 1:
        raise InvalidError(f"{keys.where}: {key}", expected="a share above 0 and up to 1, as 0.95", got=str(value))
    return max(1, round(value * 1_000))


def _tensors(keys: _Section, key: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for index, item in enumerate(keys.sequence(key)):
        where = f"{keys.where}: {key}[{index}]"
        if not isinstance(item, dict):
            raise InvalidError(where, expected="a mapping with name, datatype and shape", got=_kind(item))
        section = _Section(where, item)
        section.refuse_unknown(TENSOR_KEYS)
        shape = section.sequence("shape")
        if not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in shape):
            raise InvalidError(f"{where}.shape", expected="whole numbers, as [-1, 384]", got=str(shape))
        tensors.append(TensorSpec(section.text("name"), section.text("datatype"), tuple(shape)))
    return tuple(tensors)


def _parameters(keys: _Section) -> dict[str, str]:
    parameters = {}
    for key, value in keys.mapping("parameters", {}).items():
        if not isinstance(value, str | int | float):
            raise InvalidError(f"{keys.where}: parameters.{key}", expected="a string or number", got=_kind(value))
        parameters[key] = str(value).lower() if isinstance(value, bool) else str(value)
    return parameters


def _kind(value: Any) -> str:
    """Names a YAML value for an error message."""
    kinds = {str: "the string", bool: "the boolean", int: "the number", float: "the number"}
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return f"{kinds.get(type(value), f'the {type(value).__name__}')} {value!r}"


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
