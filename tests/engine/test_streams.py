"""What passes between a device and the CPU, and what is started when. The default device is played by the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from devices import play_device
from reference import alone

import distclip as dc
from distclip.engine import kernels, streams
from engine.counting import count

pytestmark = alone


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays each ``mx.async_eval`` was given, on a machine whose default device is no CPU."""
    real, evaluate, numbers = streams.device_of, mx.async_eval, []

    def async_eval(arrays: list[mx.array]) -> None:
        numbers.append(len(arrays))
        evaluate(arrays)

    monkeypatch.setattr(mx, "async_eval", async_eval)
    monkeypatch.setattr(streams, "device_of", lambda stream: "a device" if stream is None else real(stream))
    return numbers


def leaves() -> list[mx.array]:
    return [mx.ones((3, 4)) * 2, mx.ones(7) * 2]


def test_the_cpu_reads_leaves_that_were_started_together(started: list[int]) -> None:
    clipped, norm = dc.clip_grad_norm(leaves(), 1.0, stream=mx.cpu)
    assert started == [2, 2]  # to be measured, and to be scaled
    assert norm.item() == pytest.approx(np.sqrt(19 * 4))
    assert clipped[1][0].item() == pytest.approx(2 / np.sqrt(19 * 4))


def test_a_clipper_too(started: list[int]) -> None:
    optimizer_reads, report = dc.Clipper(1.0, stream=mx.cpu, check="never")(leaves())
    assert started == [2, 2]
    assert report.norm.item() == pytest.approx(np.sqrt(19 * 4))
    assert len(optimizer_reads) == 2


@pytest.mark.parametrize("transform", [mx.compile, mx.grad])
def test_nothing_is_started_while_mlx_traces(transform: Callable[..., Any], started: list[int]) -> None:
    def norm(a: mx.array, b: mx.array) -> mx.array:
        clipped, _ = dc.clip_grad_norm([a, b], 1.0, stream=mx.cpu)
        return dc.global_norm(clipped, stream=mx.cpu)

    mx.eval(transform(norm)(*leaves()))
    assert started == []


def test_nothing_is_started_on_a_machine_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "async_eval", lambda _: pytest.fail("evaluated"))
    dc.clip_grad_norm(leaves(), 1.0, stream=mx.cpu)
    dc.clip_grad_norm(leaves(), 1.0)


def test_nothing_is_started_where_the_device_does_the_work(started: list[int]) -> None:
    dc.clip_grad_norm(leaves(), 1.0)
    assert started == []


@pytest.mark.parametrize("number", [1, 3])
def test_arrays_cross_to_a_device_in_a_single_wait(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = play_device(monkeypatch)
    made = [mx.array([1.5, -2.0]) + 1, mx.array(3.0) > 2, mx.array(2.0) + 1][:number]
    there = streams.to_device(made, device)
    consumers = [mx.add(x, 1, stream=device) for x in there for _ in range(3)]
    if kernels.native_kernel(None) is not None:
        assert count(consumers, device).waits == 1
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in made]
    assert all(mx.array_equal(x, y).item() for x, y in zip(there, made, strict=True))


def test_what_mlx_traces_is_known() -> None:
    seen: list[bool] = []

    def look(x: mx.array) -> mx.array:
        seen.append(streams.is_traced([x]))
        return x.sum()

    x = mx.array([[1.0, 2.0]])
    for call in (look, mx.compile(look), mx.grad(look), mx.vmap(look)):
        call(x)
    mx.compile(lambda y: y + look(x))(mx.array(1.0))  # x is from outside
    assert seen == [False, True, True, True, False]


@pytest.mark.skipif(kernels.native_kernel(None) is None, reason="MLX operations make new arrays")
def test_the_cpu_scales_what_it_was_given_in_place(started: list[int]) -> None:
    given = [[mx.ones(1 << 20) * 2 for _ in range(8)]]
    mx.eval(given)
    size = sum(leaf.nbytes for leaf in given[0])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(dc.clip_grad_norm(given.pop(), 1.0, stream=mx.cpu))
    assert mx.get_peak_memory() - before < size / 2  # not a second gradient
    assert started == [8, 8]
