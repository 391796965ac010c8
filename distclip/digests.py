"""What a rank sends of each leaf so that ranks can compare their leaves: digests of its values, and no values."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx

from distclip.agree import describe, digest
from distclip.layout import Placement, blocks, copies
from distclip.world import all_gather

CAPACITY = 1024  # leaves that fit the first all-gather; a larger tree on any rank takes a second one
SKETCHES = 4  # sums with random signs, by which the distance of two copies is estimated
SLICE = 1 << 22  # values that are digested at a time, so that a large leaf needs little memory
INFINITE = 0x7F800000  # the exponent of a float32 that is not finite: clipped by a NaN, all leaves are alike

Key = tuple[int, int]  # the digest of a leaf's path


class Row(NamedTuple):
    """A leaf of a rank, in words of 32 bits: floats are sent as their bits."""

    path: int
    path_too: int
    shape: int  # and dtype
    placement: int
    block: int
    copies: int
    plain: int
    weighted: int
    constant: int
    norm: int
    sketches: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.path, self.path_too

    @property
    def values(self) -> tuple[int, ...]:
        return self.plain, self.weighted

    @property
    def comparable(self) -> bool:
        """Whether equal values on two ranks mean anything."""
        return not self.constant and self.norm != 0 and self.norm & INFINITE != INFINITE


WIDTH = len(Row._fields) - 1 + SKETCHES


def row_of(path: str, leaf: mx.array, placement: Placement, group: mx.distributed.Group) -> Row:
    name, name_too = digest(path)
    values = Values.of(leaf)
    return Row(
        path=name,
        path_too=name_too,
        shape=digest(describe(leaf.dtype, leaf.shape))[0],
        placement=digest(repr(placement))[0],
        block=blocks(placement, group)[group.rank()],
        copies=copies(placement, group),
        plain=values.plain,
        weighted=values.weighted,
        constant=int(values.constant),
        norm=as_bits(values.norm),
        sketches=tuple(map(as_bits, values.sketches)),
    )


def gather_rows(rows: list[Row], joins: bool, group: mx.distributed.Group) -> tuple[list[dict[Key, Row]], list[bool]]:
    """The rows of each rank by the digests of the paths, and whether each rank joins the norm's collective."""
    capacity = CAPACITY
    while True:
        sent = [(len(rows), int(joins)), *((*row[:-1], *row.sketches) for row in rows[:capacity])]
        sent += [()] * (capacity + 1 - len(sent))
        filled = [[*words, *(0,) * (WIDTH - len(words))] for words in sent]
        gathered: Any = all_gather(mx.array([filled], mx.uint32), group).tolist()
        longest = max(table[0][0] for table in gathered)
        if longest <= capacity:
            break
        capacity = longest  # the same on every rank, since every rank has seen every header
    tables = [
        [Row._make([*x[:-SKETCHES], tuple(x[-SKETCHES:])]) for x in table[1 : table[0][0] + 1]] for table in gathered
    ]
    return [{row.key: row for row in table} for table in tables], [bool(table[0][1]) for table in gathered]


def as_bits(value: float) -> int:
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return INFINITE


def from_bits(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


class Values(NamedTuple):
    """The values of a leaf.

    Attributes:
        plain, weighted: two digests of the bits, the second of their places too, modulo 2**32.
        constant: whether all values are the same.
        norm: of the values, and of their sums with random signs.
    """

    plain: int
    weighted: int
    constant: bool
    norm: float
    sketches: list[float]

    @classmethod
    def of(cls, leaf: mx.array) -> Values:
        """Evaluates the leaf."""
        if leaf.size == 0:
            return cls(0, 0, True, 0.0, [0.0] * SKETCHES)
        with mx.stream(mx.cpu) if leaf.dtype == mx.float64 else nullcontext():
            flat = leaf.reshape(-1)
            first = flat[:1]
            parts = [_values(flat[i : i + SLICE], i, first) for i in range(0, flat.size, SLICE)]
        plain, weighted, constant, squares, *sums = zip(*parts, strict=True)
        norm = sum(squares) ** 0.5
        return cls(sum(plain) % 2**32, sum(weighted) % 2**32, all(constant), norm, [sum(part) for part in sums])


def _values(flat: mx.array, start: int, first: mx.array) -> list[Any]:
    """Of a slice: two digests, whether it is constant, its sum of squares, its sums with random signs."""
    bits = flat.view({1: mx.uint8, 2: mx.uint16}.get(flat.itemsize, mx.uint32)).astype(mx.uint32)
    start *= bits.size // flat.size  # words
    places = mx.arange(start, start + bits.size, dtype=mx.uint32)
    weights = places * 2654435761 + 1
    values = (flat.view(mx.float32) if flat.dtype == mx.complex64 else flat).astype(mx.float32)
    largest = mx.abs(values).max()  # taken out, so that the squares of small values do not vanish
    values = values / mx.where(largest > 0, largest, 1.0)
    signs = _mixed(places[: values.size])
    sketches = [mx.where((signs >> i) & 1, values, -values).sum() for i in range(SKETCHES)]
    digests = mx.stack(
        [bits.sum(), (bits * (weights ^ (weights >> 15))).sum(), mx.all(flat == first).astype(mx.uint32)]
    )
    measures = mx.stack([largest, values.square().sum(), *sketches]).view(mx.uint32)
    plain, weighted, same, *measured = mx.concatenate([digests, measures]).tolist()  # type: ignore[misc]
    scale, squares, *sums = map(from_bits, measured)
    return [plain, weighted, same, squares * scale**2, *(sum_ * scale for sum_ in sums)]


def _mixed(numbers: mx.array) -> mx.array:
    """Random bits for each number, the same on every machine: the last mixing of MurmurHash3."""
    numbers = (numbers ^ (numbers >> 16)) * 0x85EBCA6B
    numbers = (numbers ^ (numbers >> 13)) * 0xC2B2AE35
    return numbers ^ (numbers >> 16)
