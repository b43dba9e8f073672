"""Thrift's compact protocol, as Parquet's footers and page headers use it: read, change a field, write the rest back.

A struct is a dict from field number to type and value. Subclasses name the fields that are used here (`metadata.py`);
what they do not name, because a later Parquet adds it or nothing asks for it, is carried along as bytes. Whatever the
bytes are, reading them ends: named structs do not hold themselves, and the others are not nested without end.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit

_TRUE, _FALSE, _BYTE, _I16, I32, I64, _DOUBLE, BINARY, LIST, _SET, _MAP, STRUCT = range(1, 13)
BOOL = _TRUE
_MOST_BITS = 63
"""How far the last byte of a varint is shifted at most."""
_MOST_NESTED = 32

S = TypeVar("S", bound="Struct")

Typed: TypeAlias = tuple[int, Any]
"""The type of a value on the wire, and the value: bool, int, bytes, `Items`, `Struct` or `Raw`."""


class Raw(bytes):
    """The bytes of a value that nobody has asked for."""


class Items(NamedTuple):
    """A list whose items have one type."""

    kind: int
    values: list[Any]


class Struct(dict[int, Typed]):
    """Any struct. `Kind(other)` is a shallow copy."""

    FIELDS: ClassVar[dict[int, "_Field"]] = {}
    """Field number → the field, of those that have a name."""

    def __missing__(self, number: int) -> Typed:
        raise ValueError(f"a {type(self).__name__} has no field {number}")

    def __init_subclass__(cls) -> None:
        cls.FIELDS = {named.number: named for named in vars(cls).values() if isinstance(named, _Field)}


class _Field(property):
    """A named field; see `field`. Properties, as they are the fastest way to an item that Python has."""

    def __init__(
        self, number: int, kind: int, struct: type[Struct] | None, items: int | None, optional: bool, lazy: bool
    ) -> None:
        self.number, self.kind, self.struct, self.items, self.lazy = number, kind, struct, items, lazy

        def lazily(owner: Struct) -> Any:
            if number not in owner:
                return None
            value = owner[number][1]
            if type(value) is Raw:
                assert struct is not None
                value, _ = read_struct(struct, value)
                owner[number] = kind, value
            return value

        def assign(owner: Struct, value: Any) -> None:
            if value is None:
                owner.pop(number, None)
            else:
                owner[number] = kind, value if items is None else Items(items, value)

        of_list: tuple[Callable[[Struct], Any], Callable[[Struct], Any]] = (
            lambda owner: owner[number][1].values,
            lambda owner: owner[number][1].values if number in owner else None,
        )
        of_value: tuple[Callable[[Struct], Any], Callable[[Struct], Any]] = (
            lambda owner: owner[number][1],
            lambda owner: owner[number][1] if number in owner else None,
        )
        super().__init__(lazily if lazy else (of_value if items is None else of_list)[optional], assign)


def field(
    number: int,
    kind: int,
    struct: type[Struct] | None = None,
    *,
    items: int | None = None,
    optional: bool = False,
    lazy: bool = False,
) -> Any:
    """Names a field in the body of a `Struct`: `num_rows: int = field(3, I64)` is field 3.

    Args:
        kind: its type on the wire.
        struct: the class of its struct, or of the structs in its list.
        items: of a list, the type of its items on the wire.
        optional: it may be absent, and is None then.
        lazy: a struct that may be absent, and is read when it is asked for.
    """
    return _Field(number, kind, struct, items, optional, lazy)


def read_struct(kind: type[S], data: bytes, position: int = 0) -> tuple[S, int]:
    """The struct at a position, and the position after it.

    Raises:
        ValueError, IndexError: no such struct, or cut short.
    """
    found = kind()
    fields, number = kind.FIELDS, 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return found, position
        wire = head & 15
        if head > 15:
            number += head >> 4
        else:
            number, position = _read_integer(data, position, _I16)
        named = fields.get(number)
        if named is not None and named.kind != wire and (named.kind, wire) != (BOOL, _FALSE):
            raise ValueError(f"field {number} of a {kind.__name__} has the type {wire}, not {named.kind}")
        value: Any
        if _BYTE < wire < _DOUBLE:
            byte = data[position]
            if byte < 128:  # most of a header, so without a call
                found[number] = wire, (byte >> 1) ^ -(byte & 1)
                position += 1
            else:
                value, position = _read_integer(data, position, wire)
                found[number] = wire, value
        elif wire <= _FALSE:
            found[number] = _TRUE, wire == _TRUE
        elif wire == BINARY:
            value, position = _read_binary(data, position)
            found[number] = wire, value
        elif named is not None and named.struct is not None and wire == STRUCT and not named.lazy:
            value, position = read_struct(named.struct, data, position)
            found[number] = wire, value
        elif named is not None and named.items is not None:
            value, position = _read_items(data, position, named)
            found[number] = wire, value
        else:
            end = skipped(np.frombuffer(data, np.uint8), position, wire)
            if end < 0:
                raise ValueError(f"field {number} of a {kind.__name__} is cut short, or of no type that Parquet uses")
            found[number] = wire, Raw(data[position:end])
            position = end


def write_struct(content: Struct, *, after: int = 0) -> bytes:
    """The struct's bytes, or those of its last fields, which come after the field of this number."""
    out = bytearray()
    _write_struct(out, content, after)
    return bytes(out)


def _read_items(data: bytes, position: int, named: _Field) -> tuple[Items, int]:
    head = data[position]
    position += 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, position = _read_varint(data, position)
    if kind != named.items and size:
        raise ValueError(f"the list of field {named.number} has items of type {kind}, not {named.items}")
    if size > len(data) - position:  # an item has a byte at least
        raise ValueError("a list is cut short")
    values: list[Any] = []
    value: Any
    for _ in range(size):
        if named.struct is not None:
            value, position = read_struct(named.struct, data, position)
        elif kind == BINARY:
            value, position = _read_binary(data, position)
        else:
            value, position = _read_integer(data, position, kind)
        values.append(value)
    return Items(kind, values), position


def _read_binary(data: bytes, position: int) -> tuple[bytes, int]:
    size = data[position]
    position += 1
    if size > 127:
        size, position = _read_varint(data, position - 1)
    end = position + size
    if end > len(data):
        raise ValueError("a string is cut short")
    return data[position:end], end


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > _MOST_BITS:
            raise ValueError("a number has no end")


def _read_integer(data: bytes, position: int, kind: int) -> tuple[int, int]:
    value, position = _read_varint(data, position)
    value = (value >> 1) ^ -(value & 1)
    most = 1 << (15 if kind == _I16 else 31 if kind == I32 else 63)
    if not -most <= value < most:
        raise ValueError(f"the number {value} is too large for its type {kind}")
    return value, position


@jit
def _varint(data: npt.NDArray[np.uint8], position: int) -> tuple[int, int]:
    """The number at a position, and the position after it; both are -1 if it is cut short or has no end."""
    value, shift = 0, 0
    while position < len(data) and shift <= _MOST_BITS:
        byte = np.int64(data[position])
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    return -1, -1


@jit
def skipped(data: npt.NDArray[np.uint8], position: int, kind: int) -> int:
    """The position after a value of any type, which begins at `position`; -1 if it is cut short or has no such type."""
    # What is open: how many items of a list are left, -1 for a struct, and the type of the items.
    left, kinds = np.zeros(_MOST_NESTED, np.int64), np.zeros(_MOST_NESTED, np.int64)
    left[0], kinds[0] = 1, kind
    depth, size, value = 0, len(data), 0
    while depth >= 0:
        if left[depth] == 0:
            depth -= 1
            continue
        if left[depth] > 0:
            left[depth] -= 1
            wire = kinds[depth]
        else:
            if position >= size:
                return -1
            head = np.int64(data[position])
            position += 1
            wire = head & 15
            if head == 0:
                depth -= 1
            elif head < 16:  # the number of the field follows
                value, position = _varint(data, position)
            if position < 0:
                return -1
            if wire <= _FALSE:  # the end, or a bool, which has no more bytes
                continue
        if wire <= _BYTE:
            position += 1
        elif wire == _DOUBLE:
            position += 8
        elif wire <= BINARY:
            value, position = _varint(data, position)
            if position < 0:
                return -1
            if wire == BINARY:
                if not 0 <= value <= size - position:
                    return -1
                position += value
        elif wire in (LIST, _SET, STRUCT):
            depth += 1
            if depth == _MOST_NESTED:
                return -1
            left[depth] = -1
            if wire != STRUCT:
                if position >= size:
                    return -1
                head = np.int64(data[position])
                position += 1
                value = head >> 4
                if value == 15:
                    value, position = _varint(data, position)
                if position < 0 or not 0 <= value <= size - position:
                    return -1
                left[depth], kinds[depth] = value, head & 15
        else:
            return -1
        if position > size:
            return -1
    return position


def _write_struct(out: bytearray, content: Struct, last: int = 0) -> None:
    append = out.append
    for number in sorted(content):
        kind, value = content[number]
        wire = _FALSE if value is False else kind
        if 0 < number - last < 16:
            append((number - last) << 4 | wire)
        else:
            append(wire)
            _write_integer(out, number)
        last = number
        if _BYTE < kind < _DOUBLE:
            value = (value << 1) ^ (value >> 63)
            if value < 128:  # most of a header, so without a call
                append(value)
            else:
                _write_varint(out, value)
        elif kind != _TRUE:
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if type(value) is Raw:
        out += value
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        _write_struct(out, value)
    elif kind == LIST:
        size = len(value.values)
        out.append(min(size, 15) << 4 | value.kind)
        if size >= 15:
            _write_varint(out, size)
        for item in value.values:
            _write_value(out, value.kind, item)
    else:
        _write_integer(out, value)


def _write_integer(out: bytearray, value: int) -> None:
    _write_varint(out, (value << 1) ^ (value >> 63))


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
