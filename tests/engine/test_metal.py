"""All that a user calls, on the GPU, compared with float64 NumPy. The same tests run on the CPU.

``python -m pytest -m metal`` runs them alone. They had not run on a GPU when they were written.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launching
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from reference import EPSILON, Array, alone, assert_close, norm64, normal, relative, wide
from schemes import BAD, bits

import distclip as dc
from distclip.engine import kernels
from distclip.engine.native import module_name

pytestmark = [alone, pytest.mark.metal]

NO_GPU = pytest.mark.skipif(not mx.is_available(mx.gpu), reason="MLX has neither Metal nor CUDA here")
FLOATING = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16, "complex64": mx.complex64}
DTYPES = {**FLOATING, "float64": mx.float64, "int32": mx.int32, "bool": mx.bool_}
MAGNITUDES = {mx.float16: [1e-6, 1.0, 1e3], mx.int32: [1.0], mx.bool_: [1.0]}  # of other types:
WIDE = [1e-38, 1e-30, 1.0, 1e15, 1e30]
OPERATIONS = 1e-5  # the error of norms by MLX operations, which add in float32 on a GPU
POLICIES = ("skip", "zero", "propagate", "raise")

LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.T,
    "permuted": lambda x: x.reshape(30, 7, 90).transpose(2, 0, 1),
    "cut": lambda x: x[5:, 3:17],
    "strided": lambda x: x[::3, ::-2],
    "of one row": lambda x: x[7],
    "broadcast": lambda x: mx.broadcast_to(x[:, :1], (210, 50)),
    "tiny": lambda x: x[0, :3],
    "of one value": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "of 9 axes": lambda x: x.reshape(2, 3, 5, 7, 2, 3, 3, 5, 1),
    "larger than a block": lambda x: mx.tile(x, (5, 3)),
}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[mx.DeviceType]:
    """The default device of a test."""
    before, device = mx.default_device(), getattr(mx, request.param)
    mx.set_default_device(device)
    yield device
    mx.set_default_device(before)


def on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """A result that the device has no part in: a GPU may read subnormal numbers as 0."""
    with mx.stream(mx.cpu):
        result = function(*args)
        mx.eval(result)
        return result


def exact() -> bool:
    """Whether the engine sums with the digits of float64, at any magnitude."""
    return kernels.engine() != "mlx"


def tree(*dtypes: mx.Dtype) -> dict[str, mx.array]:
    shapes = [(300, 200), (7,), (), (64, 3, 3), (70_001,)]
    return {
        f"{str(dtype)[9:]} {shape}": on_cpu(normal, shape, (i, k), dtype)
        for k, dtype in enumerate(dtypes)
        for i, shape in enumerate(shapes)
    }


def truth(grads: Any) -> float:
    return float(on_cpu(norm64, grads))


# ----------------------------------------------------------------------------------------------- which engine

WHICH = """
import warnings
import mlx.core as mx
import distclip as dc
from distclip.engine import kernels
warnings.simplefilter("error")
mx.set_default_device(mx.{device})
norms = [dc.global_norm([mx.full((n,), 3.0, dtype)]).item() for n in (4, 10_000) for dtype in (mx.float32, mx.bfloat16)]
print(kernels.engine(), *norms)
"""


@pytest.mark.launches
@pytest.mark.parametrize("wanted", ["", "mlx", "insisted"])
def test_the_engine_works_without_a_warning(wanted: str, device: mx.DeviceType, tmp_path: Path) -> None:
    kernel = importlib.util.find_spec(f"distclip.engine.native.{module_name(version('mlx'))}")
    own = "gpu" if device == mx.gpu else "mlx" if kernel is None else "native"
    variable = own if wanted == "insisted" else wanted
    program = WHICH.format(device="gpu" if device == mx.gpu else "cpu")
    ended = launching.alone(program, tmp_path, DISTCLIP_ENGINE=variable)
    expected = ["mlx" if wanted == "mlx" else own, "6.0", "6.0", "300.0", "300.0"]
    assert (ended.code, ended.output.split()) == (0, expected), ended.output


# ------------------------------------------------------------------------------------------- norm and scaling


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_norm_of_every_dtype_layout_and_magnitude(
    layout: Callable[[mx.array], mx.array], dtype: mx.Dtype, device: mx.DeviceType
) -> None:
    for at in MAGNITUDES.get(dtype, WIDE):
        if at != 1 and not exact():
            continue  # squares in float32
        leaf = layout(on_cpu(normal, (210, 90), 3, dtype, at))
        norm = dc.global_norm([leaf])
        assert relative(norm, truth([leaf])) <= (1e-7 if exact() else OPERATIONS), at


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", FLOATING.values(), ids=FLOATING)
def test_other_norms(p: float, dtype: mx.Dtype, device: mx.DeviceType) -> None:
    grads = tree(dtype)
    assert relative(dc.global_norm(grads, norm_type=p), on_cpu(norm64, grads, p)) <= OPERATIONS


def test_the_norm_of_a_model_of_many_leaves_and_types(device: mx.DeviceType) -> None:
    grads = [on_cpu(normal, (64, 1 + i % 5), i, list(FLOATING.values())[i % 4]) for i in range(300)]
    assert relative(dc.global_norm(grads), truth(grads)) <= (1e-7 if exact() else OPERATIONS)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", FLOATING.values(), ids=FLOATING)
def test_a_bad_value_anywhere_makes_the_norm_bad(value: float, dtype: mx.Dtype, device: mx.DeviceType) -> None:
    for place in (0, 1000, 70_000):
        host = np.zeros(70_001, np.float32)
        host[place] = value
        norm = float(np.array(dc.global_norm([mx.ones(5), mx.array(host).astype(dtype)])))
        assert not math.isfinite(norm)
        assert math.isnan(norm) == math.isnan(value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("own", [False, True], ids=["one factor", "a factor for each"])
def test_scaling_rounds_once(own: bool, dtype: mx.Dtype, device: mx.DeviceType) -> None:
    grads = list(tree(dtype).values())
    factors = [0.3 + i * own for i in range(len(grads))]
    scaled = kernels.scale(grads, mx.array(factors) if own else mx.array(0.3))
    for leaf, result, factor in zip(grads, scaled, factors, strict=True):
        assert result.dtype == (leaf.dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32)
        assert result.shape == leaf.shape
        assert_close(result, wide(leaf) * float(np.float32(factor)), rtol=EPSILON[result.dtype])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_scaling_of_every_layout(layout: Callable[[mx.array], mx.array], device: mx.DeviceType) -> None:
    for dtype in FLOATING.values():
        leaf = layout(on_cpu(normal, (210, 90), 3, dtype))
        expected = wide(leaf) * 2.0
        (scaled,) = kernels.scale([leaf], mx.array(2.0))
        np.testing.assert_array_equal(wide(scaled), expected)


# -------------------------------------------------------------------------------------------- public functions


def clipped64(grads: dict[str, mx.array], max_norm: float) -> dict[str, Array]:
    factor = min(1.0, max_norm / (truth(grads) + 1e-6))
    return {name: wide(leaf) * factor for name, leaf in grads.items()}


CLIPS: dict[str, Callable[[Any, float], Any]] = {
    "clip_grad_norm": dc.clip_grad_norm,
    "average_and_clip": dc.average_and_clip,
    "Clipper": lambda grads, max_norm: dc.Clipper(max_norm)(grads),
    "clip_grad_norm, compiled": lambda grads, max_norm: mx.compile(partial(dc.clip_grad_norm, max_norm=max_norm))(
        grads
    ),
    "clip_grad_norm, stream=mx.cpu": lambda grads, max_norm: dc.clip_grad_norm(grads, max_norm, stream=mx.cpu),
}


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clips_equal_float64(clip: Callable[[Any, float], Any], max_norm: float, device: mx.DeviceType) -> None:
    grads = tree(*FLOATING.values())
    expected = clipped64(grads, max_norm)
    result, norm = clip(grads, max_norm)
    norm = norm.norm if isinstance(norm, dc.Report) else norm
    assert relative(norm, truth(grads)) <= (1e-7 if exact() else OPERATIONS)
    for name, leaf in result.items():
        assert leaf.dtype == grads[name].dtype
        assert_close(leaf, expected[name], rtol=max(2 * EPSILON[leaf.dtype], 0 if exact() else 2 * OPERATIONS))


def test_a_clip_of_what_the_device_made_by_the_cpu(device: mx.DeviceType) -> None:
    """``stream=mx.cpu``, on arrays that the device has not finished yet."""
    x = on_cpu(normal, (1000, 300), 1)
    made = mx.exp(x) * 2
    result, norm = dc.clip_grad_norm({"w": made}, 1.0, stream=mx.cpu)
    after = result["w"] + 1  # on the device again
    host = 2 * np.exp(wide(x))
    assert relative(norm, float(np.linalg.norm(host))) <= 1e-5  # exp is the device's
    assert_close(after, 1 + host / np.linalg.norm(host), rtol=1e-5)


def test_the_derivative_of_a_norm(device: mx.DeviceType) -> None:
    grads = tree(mx.float32)
    slopes = mx.grad(lambda tree: dc.global_norm(tree))(grads)
    for name, slope in slopes.items():
        assert_close(slope, wide(grads[name]) / truth(grads), rtol=1e-5)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_of_a_clipper(policy: str, value: float, device: mx.DeviceType) -> None:
    grads, clipper = tree(mx.float32, mx.bfloat16), dc.Clipper(1.0, nonfinite=policy)
    clipper(tree(mx.float32, mx.bfloat16))
    grads["bfloat16 (300, 200)"][17, 3] = value
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"bfloat16 \(300, 200\)"):
            clipper(grads)
        return
    clipped, report = clipper(grads)
    assert not report.finite
    sums = [float(np.abs(wide(leaf)).sum()) for leaf in clipped.values()]
    if policy == "propagate":
        assert not np.isfinite(sums).all()
    else:
        assert sums == [0.0] * len(sums)
    assert clipper.state["bad"].item() == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_skipped_step_changes_no_bit(value: float, compiled: bool, device: mx.DeviceType) -> None:
    def trained(batches: list[dict[str, mx.array]]) -> tuple[Any, Any]:
        parameters = tree(mx.float32, mx.bfloat16)
        optimizer = dc.ClippedOptimizer(optim.AdamW(1e-2), dc.Clipper(0.5, check="never"))
        optimizer.init(parameters)
        box = [parameters, optimizer.state]

        def step(grads: Any) -> None:
            box[0].update(optimizer.apply_gradients(grads, box[0]))

        run: Any = partial(mx.compile, inputs=box, outputs=box)(step) if compiled else step
        for batch in batches:
            run(batch)
            mx.eval(box)
        return parameters, optimizer.state["optimizer"]

    def batch(factor: float) -> dict[str, mx.array]:
        return {name: leaf * mx.array(factor, leaf.dtype) for name, leaf in tree(mx.float32, mx.bfloat16).items()}

    spoiled = batch(1.0)
    spoiled["float32 (70001,)"][70_000] = value
    assert bits(trained([batch(0.5), spoiled, batch(2.0)])) == bits(trained([batch(0.5), batch(2.0)]))


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_peak_of_memory_of_a_clip_of_gradients_given_up(dtype: mx.Dtype, device: mx.DeviceType) -> None:
    """A GPU holds what it reads until its commands have ended, so it scales in place after the norm is evaluated."""

    def clipped(norm_first: bool) -> float:
        box = [[mx.ones((1 << 19,), dtype) * 2 for _ in range(16)]]
        mx.eval(box)
        size = sum(leaf.nbytes for leaf in box[0])
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        if norm_first:
            norm = dc.global_norm(box[0])
            mx.eval(norm)
            mx.eval(dc.clip_grads_with_norm(box.pop(), 1.0, norm))
        else:
            mx.eval(dc.clip_grad_norm(box.pop(), 1.0))
        return (mx.get_peak_memory() - before) / size

    in_one, in_two = clipped(False), clipped(True)
    if kernels.engine() == "native":
        assert max(in_one, in_two) < 0.1
    elif kernels.engine() == "gpu":
        assert in_one < 1.2
        assert in_two < 0.5
