"""Do the gradients agree with the layout? Digests of every leaf, compared over the ranks in one small collective."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from distclip.agree import describe, digest, first_ten, in_words, others
from distclip.complete import completed
from distclip.layout import Layout, LayoutError, Placed, Placement, Sharded, blocks, copies, place
from distclip.world import all_gather, gather_text

CAPACITY = 1024  # leaves that fit the first all-gather; a larger tree on any rank takes a second one

# One row per leaf: path (two words), shape and dtype, placement, block, copies, values (two words), norm.
_Row = tuple[int, ...]
_WIDTH = 9
INFINITE = 0x7F800000  # the exponent of a float32 that is not finite: clipped by a NaN, all leaves are alike


def check_layout(
    grads: Any,
    layout: Layout = Sharded(),  # noqa: B008
    *,
    group: mx.distributed.Group | None = None,
) -> None:
    """Raise, on every rank alike, if the gradients contradict the layout. Collective; evaluates the gradients.

    It finds leaves called sharded of which ranks that should hold different shards hold the same (a leaf of zeros
    is not judged), leaves called replicas, or copies of one shard, that differ by as much as a bit, leaves that are
    missing where a copy must be, and ranks that place one leaf differently. No gradient is sent: each rank sends
    36 bytes per leaf in one all-gather of 36 KB (a second one when a tree has more than 1,024 leaves, and two more to
    name the leaves when something is wrong). Call it on the gradients of a first step, outside ``mx.compile``.

    Args:
        grads: tree of arrays (any shapes and dtypes) as they would be clipped: sharded or replicated, not partial.
        layout: a placement, a tree prefix of placements, or a callable ``(path, array) -> placement``.
        group (mlx.core.distributed.Group, optional): the ranks that hold the gradients. Default: the world.

    Raises:
        LayoutError: names the leaves, the ranks (their numbers in the group) and what to change.
    """
    placed = completed(place(grads, layout, group, named=True), None)
    check_placed(placed, placed.leaves.arrays, placed.group)


def check_placed(
    placed: Placed,
    arrays: list[mx.array],
    group: mx.distributed.Group,
    *,
    what: str = "gradients",
    shards_differ: bool = True,
) -> None:
    """As :func:`check_layout`, for arrays that are placed as the leaves are.

    Args:
        what: the arrays are, for the message.
        shards_differ: whether shards that are the same are wrong.
    """
    paths, placements = placed.leaves.paths, placed.placements
    rows = [_row(*leaf, group) for leaf in zip(paths, arrays, placements, strict=True)]
    tables, joins = _gather_rows(rows, placed.agreed is not None, group)
    suspects = _suspects(tables, shards_differ)
    if not suspects and len(set(joins)) == 1:
        return
    # Every rank has the same tables, so every rank comes here: now the names may be sent.
    mine = {
        _key(row): [path, describe(array.dtype, array.shape), repr(placement), blocks(placement, group)]
        for row, path, array, placement in zip(rows, paths, arrays, placements, strict=True)
        if row[:2] in suspects
    }
    names = [json.loads(text) for text in gather_text(json.dumps(mine), group)]
    raise LayoutError(f"The {what} contradict the layout:\n{_explain(suspects, names, joins)}")


def _row(path: str, leaf: mx.array, placement: Placement, group: mx.distributed.Group) -> _Row:
    block = blocks(placement, group)[group.rank()]
    shape, _ = digest(describe(leaf.dtype, leaf.shape))
    place, _ = digest(repr(placement))
    return (*digest(path), shape, place, block, copies(placement, group), *_values(leaf))


def _key(words: tuple[int, ...]) -> str:
    return f"{words[0]:x}.{words[1]:x}"


def _values(leaf: mx.array) -> tuple[int, ...]:
    """Two digests of a leaf's bits, plain and weighted by position modulo 2**32, and the bits of its norm."""
    if leaf.size == 0:
        return 0, 0, 0
    with mx.stream(mx.cpu) if leaf.dtype == mx.float64 else nullcontext():
        flat = leaf.reshape(-1)
        bits = flat.view(mx.uint8 if flat.itemsize == 1 else mx.uint16 if flat.itemsize == 2 else mx.uint32)
        bits = bits.astype(mx.uint32)
        places = mx.arange(bits.size, dtype=mx.uint32) * 2654435761 + 1
        sizes = mx.abs(flat).astype(mx.float32)
        largest = sizes.max()  # taken out, so that the squares of small values do not vanish
        norm = largest * mx.sqrt((sizes / mx.where(largest > 0, largest, 1.0)).square().sum())
        digests: Any = mx.stack([bits.sum(), (bits * (places ^ (places >> 15))).sum(), norm.view(mx.uint32)]).tolist()
    return tuple(digests)


def _gather_rows(
    rows: list[_Row], joins: bool, group: mx.distributed.Group
) -> tuple[list[dict[tuple[int, int], _Row]], list[bool]]:
    capacity = CAPACITY
    while True:
        header = (len(rows), int(joins)) + (0,) * (_WIDTH - 2)
        sent = [header, *rows[:capacity]]
        sent += [(0,) * _WIDTH] * (capacity + 1 - len(sent))
        gathered: Any = all_gather(mx.array([sent], mx.uint32), group).tolist()
        longest = max(table[0][0] for table in gathered)
        if longest <= capacity:
            break
        capacity = longest  # the same on every rank, since every rank has seen every header
    tables = [{tuple(row[:2]): tuple(row) for row in table[1 : table[0][0] + 1]} for table in gathered]
    return tables, [bool(table[0][1]) for table in gathered]


def _suspects(
    tables: list[dict[tuple[int, int], _Row]], shards_differ: bool
) -> dict[tuple[int, int], list[tuple[str, list[int]]]]:
    """For every leaf (by the digest of its path) that contradicts its placement: what is wrong, on which ranks."""
    holders: dict[tuple[int, int], dict[int, _Row]] = defaultdict(dict)
    for rank, table in enumerate(tables):
        for path, row in table.items():
            holders[path][rank] = row
    judged = {
        path: [one for one in _judge(rows) if shards_differ or one[0] != "same"] for path, rows in holders.items()
    }
    return {path: wrong for path, wrong in judged.items() if wrong}


def _judge(rows: dict[int, _Row]) -> list[tuple[str, list[int]]]:
    if len({row[3] for row in rows.values()}) > 1:
        return [("placement", list(rows))]
    wrong: list[tuple[str, list[int]]] = []
    by_block: dict[int, list[int]] = defaultdict(list)
    by_values: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, (_, _, shape, _, block, _, plain, weighted, norm) in rows.items():
        by_block[block].append(rank)
        if norm != 0 and norm & INFINITE != INFINITE:
            by_values[shape, plain, weighted].append(rank)
    for ranks in by_block.values():
        first = rows[ranks[0]]
        if len(ranks) < first[5]:
            wrong.append(("missing", ranks))
        if any(rows[rank][2] != first[2] for rank in ranks):
            wrong.append(("shape", ranks))
        elif any(rows[rank][6:8] != first[6:8] for rank in ranks):
            wrong.append((f"drift {_versions(rows, ranks)}", ranks))
    for ranks in by_values.values():
        if len({rows[rank][4] for rank in ranks}) > 1:
            wrong.append(("same", ranks))
    return wrong


def _versions(rows: dict[int, _Row], ranks: list[int]) -> str:
    versions: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in ranks:
        versions[rows[rank][6:]].append(rank)
    most_first = sorted(versions.items(), key=lambda version: -len(version[1]))
    texts = []
    for values, held in most_first:
        norm = struct.unpack("<f", struct.pack("<I", values[2]))[0]
        texts.append(f"{in_words(held)} with norm {norm:.9g}")
    return ", ".join(texts)


def _explain(
    suspects: dict[tuple[int, int], list[tuple[str, list[int]]]], names: list[dict[str, Any]], joins: list[bool]
) -> str:
    lines = []
    for words, wrong in suspects.items():
        key = _key(words)
        facts = {rank: tree[key] for rank, tree in enumerate(names) if key in tree}
        for kind, ranks in wrong:
            lines.append("  " + _sentence(kind, ranks, facts))
    lines.sort()
    if len(set(joins)) > 1:
        silent = [rank for rank, takes_part in enumerate(joins) if not takes_part]
        lines.append(
            f"  {in_words(silent)}: everything is called replicated there, so no collective would be entered, while "
            f"{in_words(others(silent, len(joins)))} would wait in one; give every rank the same layout"
        )
    return first_ten(lines)


def _sentence(kind: str, ranks: list[int], facts: dict[int, Any]) -> str:
    path, _, placement, block_of = facts[ranks[0]]
    leaf = f"{path or 'the array'}: called {placement}, but "
    if kind == "same":
        return leaf + f"{in_words(ranks)} hold the same values; call it Replicated(), or name the axes that do shard it"
    if kind == "missing":
        block = block_of[ranks[0]]
        absent = [rank for rank, other in enumerate(block_of) if other == block and rank not in ranks]
        hold = "holds" if len(ranks) == 1 else "hold"
        return leaf + f"it is missing on {in_words(absent)}, while {in_words(ranks)} {hold} a copy"
    if kind == "shape":
        shapes = ", ".join(f"{facts[rank][1]} on rank {rank}" for rank in ranks)
        return leaf + f"its copies have different shapes or types: {shapes}"
    if kind == "placement":
        placements = ", ".join(f"{facts[rank][2]} on rank {rank}" for rank in ranks)
        return f"{path or 'the array'}: the ranks place it differently: {placements}"
    return leaf + (
        f"its copies differ on {in_words(ranks)} ({kind.removeprefix('drift ')}); call it Sharded(...) if they are "
        "shards, average it if they are partial, else the copies have drifted apart"
    )
