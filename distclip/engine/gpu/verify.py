"""Do the kernels work on this GPU? Awkward leaves of every dtype, measured and scaled, and compared with float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx

from distclip.engine.gpu import source
from distclip.engine.gpu.measuring import measure
from distclip.engine.gpu.scaling import scale

FACTOR = 0.375
ERROR = 1e-11  # relative, of a sum
ROUNDING = {mx.float32: 2.0**-23, mx.complex64: 2.0**-23, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}
SUBNORMAL = {mx.float16: 2.0**-14}  # below this a product may be less exact, or 0; of other types:
LEAST_NORMAL = 2.0**-126

WIDE = [1e-45, 3e-42, 1.2e-38, 1e-30, 1e-19, 0.0, 1.1, -7.25, 1e4, 1e10, -1e19, 1e30, -3e38]
NARROW = [6e-8, 3e-6, 6.1e-5, 0.0, 1.1, -7.25, 300.0, -6e4]  # of float16


def problem() -> str:
    """What the kernels do wrongly, as the rest of a sentence that they begin; empty if all is right."""
    try:
        for dtype in source.VALUES:
            leaves = list(_leaves(dtype))
            mx.eval(leaves)
            what = _measured_wrongly(dtype, leaves) or _scaled_wrongly(dtype, leaves)
            if what:
                return what
    except (RuntimeError, TypeError, ValueError) as error:
        return f"cannot run: {' '.join(str(error).split())[:300]}"
    return ""


def _leaves(dtype: mx.Dtype) -> Iterator[mx.array]:
    """Leaves that are subnormal, huge, transposed, cut, empty, tiny, larger than a threadgroup's share, not finite."""
    base = NARROW if dtype == mx.float16 else WIDE
    values = [*base, *reversed(base)] * 4
    with mx.stream(mx.cpu):

        def array(floats: list[float]) -> mx.array:
            return mx.array(floats, mx.float32).astype(dtype)

        matrix = mx.reshape(array(values[:60]), (6, 10))
        yield from (array([x] * 9) for x in base)
        yield from (matrix, matrix.T, matrix[::2, 3:], mx.transpose(mx.reshape(matrix, (3, 4, 5)), (2, 0, 1)))
        yield from (array([1.5])[0], array([-2.5, 3.0, 0.5]), array([]), mx.full((70_001,), 1.1, dtype))
        yield from (array([*base, math.inf]), array([*base, math.nan, -math.inf, 2.0]))


def _values(leaf: mx.array) -> list[float]:
    """The leaf's values, row by row; a complex one is two."""
    with mx.stream(mx.cpu):
        if leaf.dtype == mx.complex64:
            leaf = mx.stack([mx.real(leaf), mx.imag(leaf)], axis=-1)
        flat: list[float] = mx.flatten(leaf.astype(mx.float32)).tolist()  # type: ignore[assignment]
    return flat


EXACT: dict[str, Callable[[list[float]], float]] = {
    "squares": lambda x: math.fsum(v * v for v in x),
    "magnitudes": lambda x: math.fsum(map(abs, x)),
    "largest": lambda x: max(map(abs, x), default=0.0),
}


def _measured_wrongly(dtype: mx.Dtype, leaves: list[mx.array]) -> str:
    kinds = source.KINDS if dtype != mx.complex64 else source.KINDS[:1]  # MLX makes the magnitudes of complex values
    every = [measure(kind, leaves, source.device()) for kind in kinds]
    mx.eval(every)
    for kind, measured in zip(kinds, every, strict=True):
        rows: list[list[float]] = measured.tolist()  # type: ignore[assignment]
        for leaf, (value, count) in zip(leaves, rows, strict=True):
            values = _values(leaf)
            bad = [v for v in values if not math.isfinite(v)]
            truth = EXACT[kind](values) if not bad else math.nan if any(map(math.isnan, bad)) else math.inf
            if count != len(bad) or not _equal(value, truth, ERROR):
                shown = f"{value!r} with {count:.0f} values that are not finite"
                return f"measure {kind} of {_name(leaf)} as {shown}, not as {truth!r} with {len(bad)}"
    return ""


def _scaled_wrongly(dtype: mx.Dtype, leaves: list[mx.array]) -> str:
    factors = mx.array([FACTOR * (1 + i % 2) for i in range(len(leaves))])
    own = scale(leaves, factors, None, source.device())
    common = scale(leaves, mx.array(FACTOR), mx.array(True), source.device())
    zeros = scale(leaves, mx.array(FACTOR), mx.array(False), source.device())
    mx.eval(own, common, zeros)
    for i, leaf in enumerate(leaves):
        for scaled, factor in ((own[i], FACTOR * (1 + i % 2)), (common[i], FACTOR), (zeros[i], 0.0)):
            wrong = next(_differences(leaf, scaled, factor), None)
            if wrong is not None:
                return f"scale {_name(leaf)} wrongly: {wrong}"
    return ""


def _differences(leaf: mx.array, scaled: mx.array, factor: float) -> Iterator[str]:
    if (scaled.shape, scaled.dtype) != (leaf.shape, leaf.dtype):
        yield f"to {_name(scaled)}"
    lost = SUBNORMAL.get(leaf.dtype, LEAST_NORMAL)
    for x, y in zip(_values(leaf), _values(scaled), strict=True):
        truth = x * factor if factor else 0.0
        if not (_equal(y, truth, ROUNDING[leaf.dtype]) or abs(y - truth) <= lost * 2.0**-9):
            yield f"{x!r} times {factor!r} is {y!r}"


def _equal(value: float, truth: float, error: float) -> bool:
    if not math.isfinite(truth):
        return value == truth or (math.isnan(truth) and math.isnan(value))
    return abs(value - truth) <= error * abs(truth)


def _name(leaf: mx.array) -> str:
    return f"{source.name_of(leaf.dtype)} of shape {leaf.shape}"
