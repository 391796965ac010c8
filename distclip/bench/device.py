"""What a GPU costs beside its bandwidth: launches, crossings to the CPU, memory, subnormal numbers, block sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from distclip.bench import first_use
from distclip.bench.step import peak_of
from distclip.bench.timing import Contestant, Function, Series, interleave, settle, work_of
from distclip.bench.trees import Grads, itemsize
from distclip.clip import clip_grad_norm, clip_grads_with_norm
from distclip.engine import gpu, kernels
from distclip.engine.gpu import measuring, source
from distclip.norm import global_norm

OPERATIONS = 1000  # in a chain of launches
CROSSINGS = 50
ARRAYS = 64  # that cross together
BLOCKS = [(1 << power, 8) for power in range(14, 19)] + [(1 << 16, 4), (1 << 16, 16)]
SUBNORMALS = {"float32": 1e-40, "bfloat16": 1e-40, "float16": 1e-7}


@dataclass(frozen=True)
class Reading:
    """A number, and the question that it answers."""

    question: str
    name: str
    value: float | str
    unit: str = ""


def device_of(only: list[str] | None, device: str | None) -> mx.Stream | None:
    """The stream that the part measures, or None without a GPU. ``--device cpu --only device``: a second CPU stream."""
    if mx.default_device() == mx.gpu:
        return mx.default_stream(mx.gpu)
    return mx.new_stream(mx.cpu) if device == "cpu" and only and "device" in only else None


def first_uses(device: mx.Stream) -> Iterator[Reading]:
    """Time to compile: of this process, which has not used distclip yet, and of another one after it."""
    question = "time to compile: the first use of a kernel in a process takes longer than the second by"
    for process, longer in (("this one", first_use.measure(device)), ("the next", first_use.measure_in_child(device))):
        if isinstance(longer, str):
            yield Reading(question, process, longer)
        else:
            for use, s in longer.items():
                yield Reading(question, f"{process}: {use}", *((s,) if isinstance(s, str) else (s * 1e3, "ms")))
    yield Reading("distclip's kernels for GPUs", kernels.engine(), gpu.problem() or "they measure and scale rightly")


def readings(device: mx.Stream, grads: Grads, rounds: int) -> Iterator[Reading]:
    """The answers, one by one. ``grads``: large gradients of bfloat16."""
    host = mx.default_stream(mx.cpu)
    parts: dict[str, Callable[[], Iterator[Reading]]] = {
        "measuring": partial(_measuring, grads.bytes, rounds),
        "block sizes": partial(_block_sizes, grads.bytes, rounds),
        "launches": partial(_launches, device, rounds),
        "crossings": partial(_crossings, device, host, rounds),
        "memory": partial(_peaks, grads),
        "subnormal numbers": _subnormals,
    }
    with mx.stream(device):
        for name, part in parts.items():
            try:
                yield from part()
            except RuntimeError as error:  # the other answers are wanted all the more
                yield Reading("failed", name, str(error))


# ------------------------------------------------------------------------------------------------- measuring


def _measuring(size: int, rounds: int) -> Iterator[Reading]:
    question = f"measuring one leaf of {size / 1e6:.3g} MB, {kernels.engine()}"
    for dtype in first_use.DTYPES:
        yield Reading(question, dtype, _speed(dtype, size, rounds), "GB/s")


def _block_sizes(size: int, rounds: int) -> Iterator[Reading]:
    question = f"measuring one leaf of {size / 1e6:.3g} MB of bfloat16, by sizes"
    if kernels.engine() != "gpu":
        yield Reading(question, kernels.engine(), "has none to choose")
        return
    for values, batch in BLOCKS:
        with _block_size(values, batch):
            name = f"{values:,} values a threadgroup, {batch} loaded at once"
            yield Reading(question, name, _speed("bfloat16", size, rounds), "GB/s")


def _speed(dtype: str, size: int, rounds: int) -> float:
    leaves = [mx.ones(size // itemsize(dtype), getattr(mx, dtype))]
    mx.eval(leaves)
    return size / _median_s(lambda: [kernels.sum_squares(leaves)], rounds) / 1e9


@contextmanager
def _block_size(values: int, batch: int) -> Iterator[None]:
    """Within it the GPU's kernels take this many values in a threadgroup, and load this many at once in a thread."""

    def use(grouping: source.Grouping, batch: int) -> None:
        source.MEASURE, source.BATCH = grouping, batch
        source.measuring.cache_clear()
        measuring._plan.cache_clear()

    before = source.MEASURE, source.BATCH
    try:
        use(replace(source.MEASURE, chunk=values), batch)
        yield
    finally:
        use(*before)


# ------------------------------------------------------------------------------------- launches and crossings


def _launches(device: mx.Stream, rounds: int) -> Iterator[Reading]:
    question, one = "one launch: 1,000 tiny operations in one evaluation against one", mx.ones(16)

    def chain(n: int) -> list[mx.array]:
        x = one
        for _ in range(n):
            x = mx.add(x, one, stream=device)
        return [x]

    def beside_each_other(n: int) -> list[mx.array]:
        return [mx.add(one, one, stream=device) for _ in range(n)]

    yield Reading(question, "one operation, with its evaluation", _median_s(lambda: chain(1), rounds) * 1e6, "us")
    for name, build in (("each needs the one before", chain), ("independent", beside_each_other)):
        yield Reading(question, name, _each(build, OPERATIONS, rounds), "us each")


def _crossings(device: mx.Stream, host: mx.Stream, rounds: int) -> Iterator[Reading]:
    question, one = "one crossing", mx.ones(16)

    def there_and_back(n: int) -> list[mx.array]:
        x = mx.add(one, one, stream=device)
        for _ in range(n):
            x = mx.add(mx.add(x, one, stream=host), one, stream=device)
        return [x]

    def arrays(n: int, joined_on: mx.Stream) -> list[mx.array]:
        made = [mx.add(one, one, stream=device) for _ in range(n)]
        return [mx.add(mx.concatenate(made, stream=joined_on), 1, stream=host)]

    yield Reading(question, "device -> CPU -> device", _each(there_and_back, CROSSINGS, rounds), "us, there and back")
    apart = _median_s(lambda: arrays(ARRAYS, host), rounds) - _median_s(lambda: arrays(ARRAYS, device), rounds)
    name = f"{ARRAYS} arrays to the CPU, not joined before"
    yield Reading(question, name, apart / (ARRAYS - 1) * 1e6, "us more for each")


def _each(build: Callable[[int], list[mx.array]], n: int, rounds: int) -> float:
    """Microseconds of each of ``n`` beyond the first."""
    return (_median_s(lambda: build(n), rounds) - _median_s(lambda: build(1), rounds)) / (n - 1) * 1e6


def _median_s(build: Callable[[], list[mx.array]], rounds: int) -> float:
    """Seconds of an evaluation, without the time in which Python builds the graph. The first does not count."""
    seconds = []
    for _ in range(rounds + 1):
        lazy = build()
        settle()
        begin = time.perf_counter()
        mx.eval(lazy)
        settle()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


# -------------------------------------------------------------------------------------------------- scaling


def scaling(grads: Grads, rounds: int) -> list[Series]:
    """Contestants that multiply gradients which are given up."""
    factor = mx.array(0.5)

    def multiplied(g: mx.array, f: mx.array) -> mx.array:
        return (g * f).astype(g.dtype)

    def each(function: Callable[[mx.array, mx.array], mx.array]) -> Function:
        return lambda leaves: ([function(g, factor) for g in _popped(leaves)], None)

    functions: dict[str, Function] = {
        "distclip, kernels.scale": lambda leaves: (kernels.scale(leaves, factor), None),
        "mx.compile((g * f).astype(g.dtype))": each(mx.compile(multiplied, shapeless=True)),
        "(g * f).astype(g.dtype)": each(multiplied),
        "MLX, g * f of one dtype": each(lambda g, f: g * f.astype(g.dtype)),
    }
    contestants = [Contestant(name, grads.fresh_mlx, work_of(scale), mlx=True) for name, scale in functions.items()]
    return interleave(contestants, rounds)


def _popped(leaves: list[mx.array]) -> Iterator[mx.array]:
    """The leaves, of which nothing else keeps a reference."""
    while leaves:
        yield leaves.pop()


# --------------------------------------------------------------------------------------- memory and subnormals


def _peaks(grads: Grads) -> Iterator[Reading]:
    question = "peak memory of a clip above the gradients, which are given up"

    def together(max_norm: float, box: list[Any]) -> Any:
        return clip_grad_norm(box.pop(), max_norm)

    def norm_first(max_norm: float, box: list[Any]) -> Any:
        norm = global_norm(box[0])
        mx.eval(norm)
        return clip_grads_with_norm(box.pop(), max_norm, norm), norm

    def mlx(max_norm: float, box: list[Any]) -> Any:
        return optim.clip_grad_norm(box.pop(), max_norm)

    for case, max_norm in (("clipped", grads.norm / 2), ("not clipped", grads.norm * 2)):
        for name, work in (("one evaluation", together), ("mx.eval(norm) first", norm_first), ("MLX", mlx)):
            peak = peak_of(partial(work, max_norm), grads)
            yield Reading(question, f"{case}: {name}", peak * 100, "% of their size")


def _subnormals() -> Iterator[Reading]:
    for dtype, magnitude in SUBNORMALS.items():
        question = f"1,000 values of {magnitude:g}, subnormal in {dtype}"
        x = mx.array(np.full(1000, magnitude, np.float32)).astype(getattr(mx, dtype), stream=mx.cpu)
        (half,) = kernels.scale([x], mx.array(0.5))
        expected = mx.array(np.array(x.astype(mx.float32, stream=mx.cpu)) / 2).astype(x.dtype, stream=mx.cpu)
        (same,) = kernels.scale([x], mx.array(1.0))
        for name, result, right in (("MLX, x * 1", x * 1, x), ("distclip, times 1", same, x)):
            yield Reading(question, name, _equal_bits(result, right), "of 1,000 keep their bits")
        yield Reading(question, "distclip, times 0.5", _equal_bits(half, expected), "of 1,000 have the right bits")
        exact = math.sqrt(1000) * _number(x[0])
        for name, norm in (("distclip", global_norm([x])), ("MLX", optim.clip_grad_norm([x], 1.0)[1])):
            yield Reading(question, f"norm, {name}", _number(norm) / exact, "of the norm in float64")


def _number(x: mx.array) -> float:
    return float(np.array(x.astype(mx.float32, stream=mx.cpu)))


def _equal_bits(x: mx.array, y: mx.array) -> float:
    bits = mx.uint32 if x.dtype == mx.float32 else mx.uint16
    return float(np.sum(np.array(x.view(bits)) == np.array(y.view(bits))))
