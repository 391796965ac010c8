"""Do the gradients agree with the layout? Digests of every leaf, compared over the ranks in one small collective."""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from typing import Any

import mlx.core as mx

from distclip.agree import describe, digest, in_words, others
from distclip.arguments import callers_level
from distclip.complete import completed
from distclip.contradictions import Evidence, Found, Rows, are_replicas, axes_of, by_leaf, describe_leaf, judge
from distclip.digests import Key, Row, Values, gather_rows, row_of
from distclip.engine.graph import waits_for_messages
from distclip.engine.streams import is_tracing
from distclip.layout import Layout, LayoutError, Placed, Replicated, Sharded, WrongLeaf, blocks, copies, place
from distclip.mesh import Group
from distclip.world import all_gather, gather_text

SHOWN = 10  # leaves in the message of an error
LARGE = 64  # values of a leaf that are not equal on all ranks by accident


def check_layout(
    grads: Any,
    layout: Layout = Sharded(),  # noqa: B008
    *,
    group: Group | None = None,
) -> None:
    """Raise, on every rank alike, if the gradients contradict the layout. Collective; evaluates the gradients.

    It finds leaves called sharded of which ranks that should hold different shards hold the same (a leaf whose values
    are all the same is not judged), leaves called replicas, or copies of one shard, that differ by as much as a bit,
    leaves that are missing where a copy must be, and ranks that place one leaf differently. For each it says what to
    call it. No gradient is sent: each rank sends 56 bytes per leaf in one all-gather of 57 KB (a second one when a tree
    has more than 1,024 leaves, and two more to name the leaves when something is wrong). Call it on the gradients of a
    first step, outside ``mx.compile``.

    Args:
        grads: tree of arrays (any shapes and dtypes) as they would be clipped: sharded or replicated, not partial.
        layout: a placement, a tree prefix of placements, or a callable ``(path, array) -> placement``.
        group (Group, World or axis, optional): the ranks that hold the gradients. Default: the world.

    Raises:
        LayoutError: names the leaves, the ranks (their numbers in the group) and what to change; ``error.leaves`` has
            a record of every leaf.
    """
    placed = completed(place(grads, layout, group, named=True), None)
    check_placed(placed, placed.leaves.arrays)


def check_placed(
    placed: Placed, arrays: list[mx.array], *, what: str = "gradients", shards_differ: bool = True
) -> None:
    """As :func:`check_layout`, for arrays that are placed as the leaves are: see :func:`contradiction`."""
    error, _ = contradiction(placed, arrays, drift=True, what=what, shards_differ=shards_differ)
    if error is not None:
        raise error


def differing_replicas(tree: Any, *, what: str, drift: bool) -> LayoutError | None:
    """What is not the same on every rank of the world in a tree that should be, if anything is. Collective; evaluates
    the leaves, unless their values wait for messages between two ranks: then nothing is compared.

    Args:
        what: the leaves are, for the message.
        drift: whether leaves that differ by a small share of their norm count too.
    """
    placed = place(tree, Replicated(), None, named=True)
    arrays = placed.leaves.arrays
    if _any_waits(waits_for_messages(arrays), placed.group):
        return None
    return contradiction(placed, arrays, drift=drift, what=what)[0]


def contradiction(
    placed: Placed,
    arrays: list[mx.array],
    *,
    drift: bool,
    what: str = "gradients",
    shards_differ: bool = True,
) -> tuple[LayoutError | None, bool]:
    """Compare arrays that are placed as the leaves are. Collective; evaluates them.

    Args:
        drift: whether copies that differ by a small share of their norm are wrong.
        what: the arrays are, for the message.
        shards_differ: whether shards that are the same are wrong.

    Returns:
        What is wrong, the same on every rank, if anything is; and whether that is certain: trees, shapes or layouts are
        at odds, or all large leaves are replicas that are called sharded.
    """
    placements, group = placed.placements, placed.group
    rows = [row_of(*leaf, group) for leaf in zip(placed.leaves.paths, arrays, placements, strict=True)]
    tables, joins = gather_rows(rows, placed.agreed is not None, group)
    leaves = by_leaf(tables)
    large = [row.key for row, array in zip(rows, arrays, strict=True) if array.size >= LARGE]
    if not drift and shards_differ and are_replicas(leaves, large, group.size()):
        return _replicas_called_sharded(placed, arrays), True
    wrong = {
        key: found
        for key, held in leaves.items()
        if (found := judge(held, shards_differ)) and (drift or not found.is_drift(held))
    }
    of_trees = len(set(joins)) > 1 or any(found.of_trees for found in wrong.values())
    if not wrong and not of_trees:
        return None, False
    # Every rank has the same tables, so every rank comes here: now the names may be sent.
    records = _records(placed, arrays, rows, leaves, wrong)
    return _error(what, sorted(records, key=lambda leaf: leaf.path), joins), of_trees


def _records(
    placed: Placed, arrays: list[mx.array], rows: list[Row], leaves: dict[Key, Rows], wrong: dict[Key, Found]
) -> list[WrongLeaf]:
    """What is wrong with each leaf, in words."""
    placements, group = placed.placements, placed.group
    mine = {
        _text(row.key): [path, describe(array.dtype, array.shape), repr(placement), blocks(placement, group)]
        for row, path, array, placement in zip(rows, placed.leaves.paths, arrays, placements, strict=True)
        if row.key in wrong
    }
    named = {axis for x in placements if not isinstance(x, Replicated) for axis in x.axes}
    gathered = [json.loads(text) for text in gather_text(json.dumps([sorted(named), mine]), group)]
    axes = axes_of(group, {axis for names, _ in gathered for axis in names})
    evidence = Evidence(leaves, axes)
    return [
        describe_leaf(found, leaves[key], _facts(key, [facts for _, facts in gathered]), axes, evidence)
        for key, found in wrong.items()
    ]


def _text(key: Key) -> str:
    return f"{key[0]:x}.{key[1]:x}"


def _facts(key: Key, by_rank: list[dict[str, Any]]) -> dict[int, Any]:
    return {rank: facts[_text(key)] for rank, facts in enumerate(by_rank) if _text(key) in facts}


def _error(what: str, leaves: list[WrongLeaf], joins: list[bool]) -> LayoutError:
    lines = [f"The {what} contradict the layout:", *(f"  {leaf}" for leaf in leaves[:SHOWN])]
    if len(leaves) > SHOWN:
        lines.append(f"  and {len(leaves) - SHOWN} more: error.leaves has all {len(leaves)}")
    if len(set(joins)) > 1:
        silent = [rank for rank, takes_part in enumerate(joins) if not takes_part]
        lines.append(
            f"  {in_words(silent)}: everything is called replicated there, so no collective would be entered, while "
            f"{in_words(others(silent, len(joins)))} would wait in one; give every rank the same layout"
        )
    return LayoutError("\n".join(lines), leaves)


# ------------------------------------------------------------------------------------ checks that run by themselves

_called: set[tuple[str, mx.distributed.Group]] = set()  # functions that were called, by group


def check_first_call(
    function: str, placed: Placed, arrays: list[mx.array], agreed: list[mx.array] | None = None
) -> None:
    """Raise, at a function's first call with a group, if it is certain that replicas are called sharded.

    Only where the call communicates. It evaluates the leaves, and looks at none while MLX traces, nor where their
    values wait for messages between two ranks: a pipeline may evaluate what it sends together with the result.

    Args:
        agreed: what the ranks agree on to make the arrays, which comes first on a rank without leaves, too.

    Raises:
        LayoutError: all leaves of at least 64 values, none of them constant, are called sharded and equal on all ranks.
    """
    group = placed.agreed
    if group is None or (function, group) in _called:
        return
    _called.add((function, group))
    if is_tracing():
        _warn_once()
        return
    waits = waits_for_messages(arrays)
    if agreed is not None and _any_waits(waits, group):
        return
    if not waits:
        mx.eval(arrays, agreed)  # before ranks part: what makes them may communicate
    large = [] if waits else [i for i, array in enumerate(arrays) if array.size >= LARGE]
    if all(_are_equal(placed, {i: Values.of(arrays[i]) for i in numbers}) for numbers in (large[:1], large)):
        raise _replicas_called_sharded(placed, arrays)


def check_first_step(placed: Placed, clipped: list[mx.array], state: Any) -> None:
    """As :func:`check_first_call`, at every call, for the clipped gradients of a clipper: it also raises if trees,
    shapes or layouts are at odds, and warns of what :func:`check_layout` would raise otherwise, drift apart.

    Args:
        state: of the clipper, which is evaluated first: the norm's collective comes first on a rank without leaves too.
    """
    group = placed.agreed
    if group is None:
        return
    warning: object = (
        "The layout was not checked, since the first call was inside mx.compile. Call "
        "distclip.check_layout(grads, layout) once outside, or pass check='never'."
    )
    if not is_tracing():
        if _any_waits(waits_for_messages(clipped), group):
            return
        mx.eval(state)
        warning, certain = contradiction(placed, clipped, drift=False)
        if isinstance(warning, LayoutError) and certain:
            raise warning
    if warning is not None:
        warnings.warn(str(warning), RuntimeWarning, stacklevel=callers_level())


def _any_waits(waits: bool, group: mx.distributed.Group) -> bool:
    return bool(mx.any(all_gather(mx.array([waits]), group)).item())


def _replicas_called_sharded(placed: Placed, arrays: list[mx.array]) -> LayoutError:
    called = next(x for x, array in zip(placed.placements, arrays, strict=True) if array.size >= LARGE)
    return LayoutError(
        f"All gradients are equal on all ranks and called {called}, which makes the norm sqrt({placed.group.size()}) "
        "times too large. They are replicas: pass layout=Replicated()."
    )


def warn_of_replicas(placed: Placed) -> None:
    """Warn if parameters look like replicas, while nobody has said that they are. Collective if ranks agree on a norm.

    A warning, since the stages of a pipeline, or experts, may be made from one seed.
    """
    if placed.agreed is None or is_tracing():
        return
    large = {i: Values.of(array) for i, array in enumerate(placed.leaves.arrays) if array.size >= LARGE}
    if _are_equal(placed, {i: values for i, values in large.items() if not values.constant}):
        warnings.warn(
            "The parameters are equal on all ranks, while a Clipper without a layout takes them for shards. If ranks "
            "take different batches, pass average=True; if the gradients are averaged before, layout=Replicated(); if "
            "ranks hold different shards that are equal at the start, layout=Sharded().",
            RuntimeWarning,
            stacklevel=callers_level(),
        )


def _are_equal(placed: Placed, values: dict[int, Values]) -> bool:
    """Whether some leaves, by their numbers, are called sharded and equal on all ranks, and none is constant. One tiny
    all-gather."""
    group, mine = placed.group, list[int]()
    sharded = all(copies(placed.placements[i], group) < group.size() for i in values)
    if values and sharded and not any(x.constant or not math.isfinite(x.norm) for x in values.values()):
        shapes = [array.shape for array in placed.leaves.arrays]
        mine = [1, *digest(repr([(placed.leaves.paths[i], shapes[i], x[:2]) for i, x in values.items()]))]
    gathered: Any = all_gather(mx.array([mine or [0, 0, 0]], mx.uint32), group).tolist()
    return bool(mine) and all(row == mine for row in gathered)


@cache
def _warn_once() -> None:
    warnings.warn(
        "The layout was not checked, since the first call was inside a function that MLX traces (mx.compile, mx.grad). "
        "Call distclip.check_layout(grads, layout) once outside.",
        RuntimeWarning,
        stacklevel=callers_level(),
    )
