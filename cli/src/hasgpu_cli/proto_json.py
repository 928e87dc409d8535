"""Protobuf messages as plain values for `--json`: integers stay integers, enums lose their prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message


def to_plain(message: Message) -> dict[str, Any]:
    """Returns every field; an absent message or optional field is None."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def enum_word(enum: Any, number: int) -> str:
    """INSTANCE_STATE_READY becomes "ready"; takes an EnumDescriptor (two unrelated classes, hence Any)."""
    names = [value.name for value in enum.values]
    zero = enum.values_by_number[0].name
    prefix = zero[: zero.rindex("_") + 1] if "_" in zero else ""
    if (value := enum.values_by_number.get(number)) is None:
        return str(number)
    name: str = value.name
    return name[len(prefix) :].lower() if all(other.startswith(prefix) for other in names) else name


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value_field = field.message_type.fields_by_name["value"]
        return {str(key): _single(item, value_field) for key, item in value.items()}
    if field.is_repeated:
        return [_single(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(value, field)


def _single(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return to_plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return value.hex() if isinstance(value, bytes) else value
