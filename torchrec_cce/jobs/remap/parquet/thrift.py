"""Thrift's compact protocol, as Parquet's footers and page headers use it: read, change a field, write the rest back.

A struct is a dict from field number to `Field`; what a later Parquet adds is carried along without being understood.
"""

import struct
from typing import Any, NamedTuple

_TRUE, _FALSE, _BYTE, _I16, I32, I64, _DOUBLE, BINARY, LIST, _SET, _MAP, STRUCT = range(1, 13)


class Field(NamedTuple):
    """A value and its type on the wire: bool, int, float, bytes, `Items` or `Struct`."""

    kind: int
    value: Any


class Items(NamedTuple):
    """A list whose items have one type."""

    kind: int
    values: list[Any]


Struct = dict[int, Field]


def i32(value: int) -> Field:
    return Field(I32, value)


def i64(value: int) -> Field:
    return Field(I64, value)


def binary(value: bytes) -> Field:
    return Field(BINARY, value)


def items(kind: int, values: list[Any]) -> Field:
    return Field(LIST, Items(kind, values))


def read_struct(data: bytes, position: int = 0) -> tuple[Struct, int]:
    """The struct at a position, and the position after it.

    Raises:
        ValueError, IndexError, struct.error: no such struct, or cut short.
    """
    found: Struct = {}
    number = 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return found, position
        delta, kind = head >> 4, head & 15
        if delta:
            number += delta
        else:
            number, position = _read_zigzag(data, position)
        if kind in (_TRUE, _FALSE):
            found[number] = Field(_TRUE, kind == _TRUE)
        else:
            value, position = _read_value(data, position, kind)
            found[number] = Field(kind, value)


def write_struct(content: Struct) -> bytes:
    """The struct's bytes."""
    out = bytearray()
    _write_struct(out, content)
    return bytes(out)


def _read_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (_I16, I32, I64):
        return _read_zigzag(data, position)
    if kind == BINARY:
        size, position = _read_varint(data, position)
        if position + size > len(data):
            raise ValueError("a string is cut short")
        return data[position : position + size], position + size
    if kind == STRUCT:
        return read_struct(data, position)
    if kind in (LIST, _SET):
        head = data[position]
        position += 1
        size, item = head >> 4, head & 15
        if size == 15:
            size, position = _read_varint(data, position)
        values = []
        for _ in range(size):
            value, position = _read_value(data, position, item)
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


def _read_zigzag(data: bytes, position: int) -> tuple[int, int]:
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
            _write_zigzag(out, number)
        last = number
        if kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_I16, I32, I64):
        _write_zigzag(out, value)
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
        for one in value.values:
            _write_value(out, value.kind, one)
    elif kind in (_TRUE, _FALSE, _BYTE):
        out.append(value)
    else:
        out += struct.pack("<d", value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _write_zigzag(out: bytearray, value: int) -> None:
    _write_varint(out, (value << 1) ^ (value >> 63))
