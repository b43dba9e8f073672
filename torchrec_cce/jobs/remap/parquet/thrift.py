"""Thrift's compact protocol, as Parquet's footers and page headers use it: read, change a field, write the rest back.

A struct is a dict from field number to value. Subclasses name the fields that are used here (`metadata.py`); what they
do not name, because a later Parquet adds it or nothing asks for it, is carried along without being understood.
"""

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

_TRUE, _FALSE, _BYTE, _I16, I32, I64, _DOUBLE, BINARY, LIST, _SET, _MAP, STRUCT = range(1, 13)
BOOL = _TRUE
_INTEGERS = (I32, I64, _I16)

S = TypeVar("S", bound="Struct")


class Typed(NamedTuple):
    """A value and its type on the wire: bool, int, float, bytes, `Items` or `Struct`."""

    kind: int
    value: Any


class Items(NamedTuple):
    """A list whose items have one type."""

    kind: int
    values: list[Any]


class Struct(dict[int, Typed]):
    """Any struct. `Kind(other)` is a shallow copy."""

    STRUCTS: ClassVar[dict[int, type["Struct"]]] = {}
    """Field number → the class of the struct, or of the structs of the list, that the field holds."""

    def __init_subclass__(cls) -> None:
        fields = (value for value in vars(cls).values() if isinstance(value, _Field))
        cls.STRUCTS = {named.number: named.struct for named in fields if named.struct is not None}


@dataclass(frozen=True)
class _Field:
    """The descriptor of a named field; see `field`."""

    number: int
    kind: int
    struct: type[Struct] | None
    items: int | None
    optional: bool

    def __get__(self, owner: Struct | None, kind: type[Struct]) -> Any:
        if owner is None:
            return self
        found = owner.get(self.number) if self.optional else owner[self.number]
        if found is None:
            return None
        return found.value if self.items is None else found.value.values

    def __set__(self, owner: Struct, value: Any) -> None:
        if value is None:
            owner.pop(self.number, None)
        else:
            owner[self.number] = Typed(self.kind, value if self.items is None else Items(self.items, value))


def field(
    number: int, kind: int, struct: type[Struct] | None = None, *, items: int | None = None, optional: bool = False
) -> Any:
    """Names a field in the body of a `Struct`: `num_rows: int = field(3, I64)` is field 3.

    Args:
        kind: its type on the wire.
        struct: the class of its struct, or of the structs in its list.
        items: of a list, the type of its items on the wire.
        optional: it may be absent, and is None then.
    """
    return _Field(number, kind, struct, items, optional)


def read_struct(kind: type[S], data: bytes, position: int = 0) -> tuple[S, int]:
    """The struct at a position, and the position after it.

    Raises:
        ValueError, IndexError, struct.error: no such struct, or cut short.
    """
    found = kind()
    structs, number = kind.STRUCTS, 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return found, position
        delta, wire = head >> 4, head & 15
        if delta:
            number += delta
        else:
            number, position = _read_integer(data, position)
        if wire in _INTEGERS and data[position] < 128:  # most of a header, so without a call
            found[number] = Typed(wire, (data[position] >> 1) ^ -(data[position] & 1))
            position += 1
        elif wire in (_TRUE, _FALSE):
            found[number] = Typed(_TRUE, wire == _TRUE)
        else:
            value, position = _read_value(data, position, wire, structs.get(number, Struct))
            found[number] = Typed(wire, value)


def write_struct(content: Struct) -> bytes:
    """The struct's bytes."""
    out = bytearray()
    _write_struct(out, content)
    return bytes(out)


def _read_value(data: bytes, position: int, kind: int, struct_kind: type[Struct]) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _read_integer(data, position)
    if kind == BINARY:
        size, position = _read_varint(data, position)
        if position + size > len(data):
            raise ValueError("a string is cut short")
        return data[position : position + size], position + size
    if kind == STRUCT:
        return read_struct(struct_kind, data, position)
    if kind in (LIST, _SET):
        head = data[position]
        position += 1
        size, item = head >> 4, head & 15
        if size == 15:
            size, position = _read_varint(data, position)
        values = []
        for _ in range(size):
            value, position = _read_value(data, position, item, struct_kind)
            values.append(value)
        return Items(item, values), position
    if kind in (_TRUE, _FALSE, _BYTE):  # items of a list; a field's bool is in its header
        return data[position], position + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", data, position)[0], position + 8
    raise ValueError(f"type {kind} is not one that Parquet uses")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _read_integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = _read_varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _write_struct(out: bytearray, content: Struct) -> None:
    last = 0
    for number in sorted(content):
        kind, value = content[number]
        if kind == _TRUE:
            kind = _TRUE if value else _FALSE
        if 0 < number - last < 16:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            _write_integer(out, number)
        last = number
        if kind in _INTEGERS:
            _write_integer(out, value)
        elif kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in _INTEGERS:
        _write_integer(out, value)
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        _write_struct(out, value)
    elif kind in (LIST, _SET):
        size = len(value.values)
        out.append(min(size, 15) << 4 | value.kind)
        if size >= 15:
            _write_varint(out, size)
        for item in value.values:
            _write_value(out, value.kind, item)
    elif kind in (_TRUE, _FALSE, _BYTE):
        out.append(value)
    else:
        out += struct.pack("<d", value)


def _write_integer(out: bytearray, value: int) -> None:
    value = (value << 1) ^ (value >> 63)
    if value < 128:  # most of a header, so without a call
        out.append(value)
    else:
        _write_varint(out, value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
