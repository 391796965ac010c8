"""The gradient noise scale, against its paper in float64 and against a noise that is known; and a rank far out."""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import Array, alone, relative, same_bits, several, square
from schemes import N

import distclip as dc
from distclip import noise


def noise_scale64(own: Array, norm: Array, rows: int) -> Iterator[float]:
    """McCandlish and others, 2018, appendix A.1, smoothed; steps that are not finite are passed over.

    Args:
        own: the ranks' norms, shape (steps, ranks).
        norm: of the mean, shape (steps,).
    """
    n = own.shape[1]
    small, big = rows, rows * n
    signal = spread = 0.0
    for each, whole in zip(own, norm, strict=True):
        if np.isfinite(each).all() and math.isfinite(whole):
            low, high = float(np.square(each).mean()), whole**2
            signal = 0.99 * signal + 0.01 * (big * high - small * low) / (big - small)
            spread = 0.99 * spread + 0.01 * (low - high) / (1 / small - 1 / big)
        yield spread / signal if signal else math.nan


@alone
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_it_is_the_papers_step_by_step(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    partial = rng.standard_normal((200, ranks, 50)) * 0.7 + 1.0
    own, norm = np.linalg.norm(partial, axis=2), np.linalg.norm(partial.mean(axis=1), axis=1)
    own[[0, 30, 31]], norm[[0, 30, 31]] = math.nan, math.nan
    own[60, 0] = norm[60] = math.inf
    state = noise.init(ranks)
    for each, whole, expected in zip(own, norm, noise_scale64(own, norm, 4), strict=True):
        found, state = noise.update(state, mx.array(each, mx.float32), mx.array(whole, mx.float32), 4)
        if math.isfinite(expected):
            assert relative(found, expected) <= 1e-3


@alone
@pytest.mark.parametrize("huge", [1e18, 1e19, 1e25, 3e38])
def test_a_huge_norm_does_not_poison_it(huge: float) -> None:
    state = noise.init(2)
    for own, norm in (([1.0, 2.0], 1.2), ([1.0, huge], huge / 2), ([1.0, 2.0], 1.2)):
        scale, state = noise.update(state, mx.array(own), mx.array(norm), 4)
    assert math.isfinite(scale.item())  # type: ignore[arg-type]
    assert all(math.isfinite(state[name].item()) for name in ("signal", "noise"))  # type: ignore[arg-type]


@several
@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_a_known_noise_is_found(loss_scale: float | None, world: dc.World) -> None:
    size, rows, known = 300, 4, 10.0
    rng = np.random.default_rng(1)
    true = rng.standard_normal(size)
    true *= math.sqrt(size / known) / np.linalg.norm(true)  # each row adds noise of variance 1 to each value
    clipper = dc.Clipper(1.0, average=True, rank_batch=rows, check="never", loss_scale=loss_scale)
    for step in range(250):
        noises = np.random.default_rng((step, world.rank)).standard_normal(size) / math.sqrt(rows)
        grads = {"w": mx.array(((true + noises) * (loss_scale or 1.0)).astype(np.float32))}
        if step == 100:
            grads["w"][3] = math.nan if world.rank == 0 else 1.0
        mx.eval(report := clipper(grads)[1].arrays)
    assert relative(report["noise_scale"], known) <= 0.05
    assert same_bits(report)


@several
def test_the_ranks_own_norms_are_reported(world: dc.World) -> None:
    clipper = dc.Clipper(1.0, average=True, rank_batch=2)
    report = clipper({"w": mx.full((4,), 1.0 + world.rank), "v": mx.zeros(3)})[1]
    np.testing.assert_allclose(report.rank_norms.tolist(), [2.0 * (1 + rank) for rank in range(N)], rtol=1e-6)
    assert report.to_dict()["rank_hosts"] == [socket.gethostname()] * N
    assert relative(report.norm, 1.0 + N) <= 1e-6


@alone
def test_one_rank_has_no_noise_scale() -> None:
    report = dc.Clipper(1.0, average=True, rank_batch=2)({"w": mx.array([3.0, 4.0])})[1]
    assert report.rank_norms.tolist() == [5.0]
    assert "noise_scale" not in report.to_dict()


@pytest.mark.mpi(min_size=4)
def test_on_a_mesh_the_averaged_ranks_have_norms(world: dc.World) -> None:
    """Of which each holds shards and replicas over the other axis."""
    mesh = square()
    dp, tp = divmod(world.rank, 2)
    layout = {"s": dc.Sharded("tp", mesh=mesh), "r": dc.Replicated()}
    clipper = dc.Clipper(1.0, average=mesh.group("dp"), layout=layout, rank_batch=2)
    report = clipper({"s": mx.array([1.0 + dp, 1.0 + tp]), "r": mx.array([2.0 + dp])})[1]
    expected = [math.sqrt(2 * (1 + d) ** 2 + 1 + 4 + (2 + d) ** 2) for d in range(2)]
    np.testing.assert_allclose(report.rank_norms.tolist(), expected, rtol=1e-6)
    assert same_bits(report.arrays)
    alike = dc.Clipper(1.0, average=mesh.group("dp"), rank_batch=2)({"r": mx.array([3.0 + dp])})[1]
    assert alike.rank_norms.tolist() == [3.0, 4.0]


# ------------------------------------------------------------------------------------------- a rank far out


def warned(steps: int, every: int, world: dc.World, compiled: bool = False) -> list[str]:
    """What is said over some steps in which the last rank is far out, where every so many are looked at."""
    clipper = dc.Clipper(1.0, average=True, rank_batch=2, check="never", max_consecutive_skips=None)
    said = []
    for step in range(1, steps + 1):
        far = 100.0 if world.rank == N - 1 else 1.0
        value = math.nan if step in (10, 51) and world.rank == 0 else far
        report = clipper({"w": mx.array([value, far])})[1]
        if step % every == 0:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                clipper.settle()
            said += [str(each.message) for each in seen]
        else:
            mx.eval(report.arrays)
    return said


@several
@pytest.mark.parametrize(("steps", "every", "times"), [(51, 1, 0), (75, 1, 1), (75, 7, 1)])
def test_a_rank_far_out_is_named_once(steps: int, every: int, times: int, world: dc.World) -> None:
    said = warned(steps, every, world)
    assert len(said) == times
    for text in said:
        assert f"The gradient norm of rank {N - 1} on {socket.gethostname()} has been more than 5 times" in text


@several
def test_a_rank_that_comes_back_is_not_named(world: dc.World) -> None:
    clipper = dc.Clipper(1.0, average=True, rank_batch=2, check="never")
    for step in range(60):
        report = clipper({"w": mx.array([100.0 if world.rank == 0 and step != 40 else 1.0])})[1]
        found: Any = report.to_dict()
    assert len(found["rank_norms"]) == N
