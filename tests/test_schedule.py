"""No device waits for the network: a CPU stream of its own plays the device, and a rank is late."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import devices
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from engine.counting import count
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_map
from reference import WORLD, leaves, line, normal, relative, same_bits, several, square, told_by_all
from schemes import BAD

import distclip as dc
from distclip import agree, schedule
from distclip.engine import buckets, kernels, native
from distclip.world import group_of_one

N = WORLD.size
LATE_S = 0.8
FREE_S = 0.2  # a device that is free ends a tiny operation in less
STEPS = 6
REPLICAS = ("dp", "compiled", "mixed", "frozen")  # where every rank holds the whole model


def model_of(seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    mx.eval(model.parameters())
    return model


def loss_fn(model: Any, x: mx.array) -> Any:
    return model(x).square().mean()


def batch(step: int, rank: int = WORLD.rank) -> mx.array:
    return normal((8, 16), (step, rank))


# --------------------------------------------------------------------------------- a device that nothing blocks

Function = Callable[[Any, nn.Module], Any]  # of a gradient and its model


def clipper(**options: Any) -> Function:
    made = dc.Clipper(0.1, check="never", **options)
    return lambda grads, model: (made(grads)[0], made.state)


def optimizer(**options: Any) -> Function:
    made = dc.ClippedOptimizer(optim.AdamW(1e-3), dc.Clipper(0.1, check="never", **options))

    def update(grads: Any, model: nn.Module) -> Any:
        made.update(model, grads)
        return model.parameters(), made.state

    return update


def lazy_norm(grads: Any) -> mx.array:
    return mx.sqrt(mx.distributed.all_sum(leaves(grads)[0].square().sum(), stream=WORLD.stream))


FUNCTIONS: dict[str, Callable[[], Function]] = {
    "global_norm": lambda: lambda grads, model: dc.global_norm(grads) * 2,
    "clip_grad_norm": lambda: lambda grads, model: dc.clip_grad_norm(grads, 0.1),
    "clip_grad_norm, zero": lambda: lambda grads, model: dc.clip_grad_norm(grads, 0.1, nonfinite="zero"),
    "clip_grad_norm, inf": lambda: lambda grads, model: dc.clip_grad_norm(grads, 0.1, norm_type=math.inf),
    "clip_grad_norm, 3": lambda: lambda grads, model: dc.clip_grad_norm(grads, 0.1, norm_type=3),
    "clip_grads_with_norm": lambda: lambda grads, model: dc.clip_grads_with_norm(grads, 0.1, lazy_norm(grads)),
    "average_gradients": lambda: lambda grads, model: dc.average_gradients(grads),
    "average_gradients, bfloat16": lambda: (
        lambda grads, model: dc.average_gradients(grads, communication_dtype=mx.bfloat16)
    ),
    "average_and_clip": lambda: lambda grads, model: dc.average_and_clip(grads, 0.1),
    "average_and_clip, inf": lambda: lambda grads, model: dc.average_and_clip(grads, 0.1, norm_type=math.inf),
    "average_and_clip, shards": lambda: (
        lambda grads, model: dc.average_and_clip(grads, 0.1, group=group_of_one(), layout=dc.Sharded())
    ),
    "adaptive_clip_grad": lambda: (
        lambda grads, model: dc.adaptive_clip_grad(grads, model, 1e-3, layout=dc.Sharded(dim=1))
    ),
    "Clipper": lambda: clipper(),
    "Clipper, groups": lambda: clipper(groups={"first": "layers.0.*"}, average=True, rank_batch=8),
    "Clipper, loss scale": lambda: clipper(loss_scale=4.0, nonfinite="zero"),
    "ClippedOptimizer": lambda: optimizer(),
    "ClippedOptimizer, average": lambda: optimizer(average=True),
    "check_layout": lambda: lambda grads, model: dc.check_layout(grads),
}


@several
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_late_rank_does_not_block_the_device(name: str, device: mx.Stream) -> None:
    function, model, small = FUNCTIONS[name](), model_of(), mx.ones(4)
    gradient = nn.value_and_grad(model, loss_fn)
    mx.eval(small, function(gradient(model, batch(0))[1], model))
    WORLD.barrier()
    start = time.perf_counter()
    if WORLD.rank == 1:
        time.sleep(LATE_S)
    made = function(gradient(model, batch(1))[1], model)
    asked = time.perf_counter()
    mx.async_eval(made)
    mx.eval(small + 1)
    blocked = time.perf_counter() - asked
    mx.eval(made)
    took = time.perf_counter() - start
    assert told_by_all(f"free: {blocked < FREE_S}") == ["free: True"] * N, f"{blocked:.2f} s"
    assert took > LATE_S * 0.9, "it waits on the host, for the rank that is late"


@several
def test_ranks_meet_at_the_barrier(device: mx.Stream) -> None:
    WORLD.barrier()
    start = time.perf_counter()
    if WORLD.rank == N - 1:
        time.sleep(0.3)
    WORLD.barrier()
    assert time.perf_counter() - start > 0.29


def test_one_rank_passes_the_barrier() -> None:
    if N == 1:
        WORLD.barrier()
    assert WORLD.stream.device == mx.Device(mx.cpu, 0)


@several
def test_other_threads_may_not_communicate() -> None:
    said: list[str] = []

    def work() -> None:
        for call in (lambda: dc.global_norm({"w": mx.ones(3)}), lambda: dc.average_gradients({"w": mx.ones(3)})):
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
        mx.eval(dc.clip_grad_norm({"w": mx.ones(3)}, 1.0, layout=dc.Replicated()))

    thread = threading.Thread(target=work, name="loader")
    thread.start()
    thread.join()
    assert len(said) == 2
    assert all("thread that called distclip.init()" in text and "'loader'" in text for text in said)


# ---------------------------------------------------------------------------------------------- wait, then build


@several
def test_gradients_that_need_no_change_come_back_as_they_are(device: mx.Stream) -> None:
    grads = {"w": normal((3, 4), WORLD.rank), "i": mx.array([1, 2])}
    clipped, norm = dc.clip_grad_norm(grads, 1e9)
    assert clipped["w"] is grads["w"]
    assert clipped["i"].dtype == mx.float32
    smaller, _ = dc.clip_grad_norm(grads, norm / 2)
    assert mx.allclose(smaller["w"], grads["w"] / 2).item()
    assert dc.Clipper(1e9, check="never")(grads)[0]["w"] is grads["w"]
    assert dc.Clipper(1e9, loss_scale=2.0, check="never")(grads)[0]["w"] is not grads["w"]


class Counting(optim.SGD):
    """Counts its updates."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.calls = 0

    def apply_gradients(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().apply_gradients(*arguments)


@several
@pytest.mark.parametrize("average", [False, True])
def test_a_bad_step_does_not_call_the_optimizer(
    average: bool, device: mx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected: list[Any] = []
    monkeypatch.setattr(kernels, "select", lambda *arguments: selected.append(arguments))
    model, inner = model_of(), Counting()
    made = dc.ClippedOptimizer(inner, dc.Clipper(0.1, average=average, layout=dc.Replicated(), check="never"))
    if not average:
        made.clipper = dc.Clipper(0.1, check="never")
    made.init(model.trainable_parameters())
    grads = nn.value_and_grad(model, loss_fn)(model, batch(0))[1]
    before = leaves(model.parameters())
    if WORLD.rank == N - 1:
        grads["layers"][0]["weight"][0, 0] = BAD["nan"]
    made.update(model, grads)
    assert inner.calls == 0
    assert all(after is old for after, old in zip(leaves(model.parameters()), before, strict=True))
    assert made.report is not None
    assert made.report.skipped.item()
    assert (made.clipper.state["bad"].item(), inner.step.item()) == (1, 0)
    made.update(model, nn.value_and_grad(model, loss_fn)(model, batch(1))[1])
    assert (inner.calls, inner.step.item(), selected) == (1, 1, [])


@several
def test_traced_steps_say_once_that_the_device_waits(device: mx.Stream) -> None:
    compiled = mx.compile(lambda grads: dc.clip_grad_norm(grads, 1.0)[0])
    grads = {"w": normal((3, 4), WORLD.rank)}
    schedule._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="barrier") as caught:
        mx.eval(compiled(grads))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.eval(mx.compile(lambda grads: dc.average_gradients(grads))(grads))


# -------------------------------------------------------------------------------------------- averages in flight


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each hand-over to MLX the number of its arrays."""
    sizes: list[int] = []
    original = mx.async_eval

    def spy(*arrays: Any) -> None:
        sizes.append(len(arrays))
        original(*arrays)

    monkeypatch.setattr(mx, "async_eval", spy)
    return sizes


@several
@pytest.mark.parametrize("count", [1, 10, 200])
def test_few_buckets_leave_in_the_order_of_the_backward_pass(
    count: int, device: mx.Stream, handed_over: list[int], collectives: Counter[str]
) -> None:
    grads = {f"w{i}": normal((50, 1 + i % 7), (WORLD.rank, i)) for i in range(count)}
    for _ in range(2):
        handed_over.clear()
        collectives.clear()
        averaged = dc.average_gradients(grads, bucket_bytes=1)
        sent = collectives["all_sum"]
        assert min(count, 8) <= sent <= buckets.HAND_OVERS
        assert len(handed_over) == sent + 1, "and the first leaf, so that the device begins"
        assert collectives["all_gather"] == 1
    for i in (0, count - 1):
        truth = mx.mean(mx.stack([normal((50, 1 + i % 7), (rank, i)) for rank in range(N)]), axis=0)
        assert mx.allclose(averaged[f"w{i}"], truth, atol=1e-6).item()


@several
@pytest.mark.skipif(native.load() is None, reason="the kernel reads the graph")
@pytest.mark.parametrize("clip", [False, True], ids=["average", "clip"])
def test_the_device_scales_each_bucket_once_and_waits_for_nothing(
    clip: bool, monkeypatch: pytest.MonkeyPatch, collectives: Counter[str]
) -> None:
    stream = devices.play_device(monkeypatch)
    grads = {f"w{i}": normal((50, 1 + i % 7), (WORLD.rank, i)) for i in range(100)}
    if clip:
        averaged, norm = dc.average_and_clip(grads, 0.1, bucket_bytes=1, stream=stream)
        assert count([norm], stream).launches == 0
    else:
        averaged = dc.average_gradients(grads, bucket_bytes=1, stream=stream)
    counts = count(leaves(averaged), stream)
    assert (counts.launches, counts.waits) == (collectives["all_sum"], 0)
    assert counts.bytes < 2.1 * sum(leaf.nbytes for leaf in leaves(grads)), "one read and one write"


@several
def test_ranks_with_other_graphs_send_in_one_order(device: mx.Stream) -> None:
    def grads(step: int, rank: int) -> dict[str, mx.array]:
        made = {f"w{i}": normal((40, 3), (step, rank, i)) for i in range(8)}
        for i, name in enumerate(made):
            for _ in range(i if rank % 2 else 8 - i):  # these ranks make them the other way round
                made[name] = made[name] * 1.5
        return made

    for step in range(3):
        averaged = dc.average_gradients(grads(step, WORLD.rank), bucket_bytes=1)
        every = [grads(step, rank) for rank in range(N)]
        for name, mean in averaged.items():
            assert mx.allclose(mean, mx.mean(mx.stack([tree[name] for tree in every]), axis=0), rtol=1e-5).item()


@several
@pytest.mark.parametrize("changed", ["missing", "shape", "dtype"])
def test_a_tree_that_changes_on_one_rank_is_an_error(changed: str, device: mx.Stream) -> None:
    grads = {"a": normal((4, 3), 0), f"changing {changed}": normal((5,), 1)}
    for _ in range(2):
        mx.eval(dc.average_gradients(grads))
    if WORLD.rank == N - 1:
        leaf = grads.pop(f"changing {changed}")
        if changed != "missing":
            grads[f"changing {changed}"] = leaf[:3] if changed == "shape" else leaf.astype(mx.float16)
    with pytest.raises(dc.LayoutError, match=f"changing {changed}"):
        dc.average_gradients(grads)
    mx.eval(dc.average_gradients({"a": grads["a"]}))


@several
def test_a_rank_without_a_device_is_named(device: mx.Stream) -> None:
    with (
        mx.stream(WORLD.stream if WORLD.rank == 0 else device),
        pytest.raises(dc.LayoutError, match="engine: on a GPU"),
    ):
        dc.average_gradients({"on two kinds of streams": normal((4,), 0)})


def parallel(name: str) -> tuple[Any, dict[str, Any], int]:
    """A model, the options of its clipper, and which of the different batches this rank reads."""
    model: Any = model_of()
    if name in ("dp", "compiled"):
        return model, {"average": True}, WORLD.rank
    if name == "mixed":
        model.layers[2].set_dtype(mx.bfloat16)
        return model, {"average": True}, WORLD.rank
    if name == "frozen":
        model.layers[0].freeze()
        return model, {"average": True}, WORLD.rank
    if name == "fsdp":
        for i in (0, 2, 4):
            model.layers[i] = nn.fully_shard(model.layers[i])
        return model, {"layout": dc.layout_of(model)}, WORLD.rank
    axes = line() if name == "tp" else square()
    group = axes.group("x" if name == "tp" else "tp")
    model.layers[0] = shard_linear(model.layers[0], "all-to-sharded", group=group)
    model.layers[2] = shard_linear(model.layers[2], "sharded-to-all", group=group)
    options: dict[str, Any] = {"layout": dc.layout_of(model, axes)}
    if name == "dp+tp":
        options["average"] = axes.group("dp")
    return model, options, axes.coordinates().get("dp", 0)


def trained(name: str, *, resumed: int | None = None) -> list[Any]:
    """What a few steps make, of which one is skipped, where a step may be the first after the run is resumed."""
    model, options, reader = parallel(name)

    def begin() -> tuple[dc.ClippedOptimizer, Callable[..., Any]]:
        made = dc.ClippedOptimizer(optim.AdamW(1e-2), dc.Clipper(0.5, **options))
        made.init(model.trainable_parameters())
        gradient = nn.value_and_grad(model, loss_fn)
        if name == "compiled":
            return made, mx.compile(partial(gradient, model), inputs=model.state, outputs=model.state)
        return made, partial(gradient, model)

    made, gradient = begin()
    seen: list[Any] = []
    for step in range(STEPS):
        if step == resumed:
            saved = tree_map(mx.array, made.state)
            agree._orders.clear()
            made, gradient = begin()
            made.state = saved
        x = batch(step, reader)
        if step == 2:
            x = mx.where(mx.arange(8)[:, None] == 0, math.nan, x)
        loss, grads = gradient(x)
        made.update(model, grads)
        mx.eval(loss, model.parameters(), made.state)
        assert made.report is not None
        seen.append([loss, made.report.norm, *leaves(model.parameters()), *leaves(made.optimizer.state)])
    return seen


@several
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dp"),
        pytest.param("compiled"),
        pytest.param("mixed"),
        pytest.param("frozen"),
        pytest.param("tp", marks=pytest.mark.mpi),
        pytest.param("fsdp", marks=pytest.mark.mpi),
        pytest.param("dp+tp", marks=[pytest.mark.mpi, pytest.mark.skipif(N != 4, reason="needs 2 x 2 ranks")]),
    ],
)
def test_buckets_in_flight_make_the_bits_of_lazy_ones(
    name: str, device: mx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "fsdp" and N == 3:
        pytest.skip("3 ranks do not divide the layers")
    if name == "tp" and 32 % N:
        pytest.skip(f"{N} ranks do not divide the layers")
    in_flight = trained(name)
    again = trained(name, resumed=3)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    lazy = trained(name)
    for step, (some, *others) in enumerate(zip(in_flight, again, lazy, strict=True)):
        for a, b, c in zip(some, *others, strict=True):
            assert mx.array_equal(a, b, equal_nan=True).item(), f"resumed, step {step}"
            assert mx.array_equal(a, c, equal_nan=True).item(), f"lazy, step {step}"
    if name in REPLICAS:
        assert same_bits(in_flight[-1][1:])


@several
@pytest.mark.parametrize("name", REPLICAS)
def test_both_schedules_train_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = trained(name)
    devices.pin_collectives(WORLD.stream, monkeypatch.setattr)
    with mx.stream(mx.new_stream(mx.cpu)):
        waiting = trained(name)
    for some, others in zip(waiting, lazy, strict=True):
        assert relative(some[1], others[1].item()) < 1e-5 or math.isnan(others[1].item())
        for a, b in zip(some, others, strict=True):
            assert mx.allclose(a, b, rtol=2e-2 if name == "mixed" else 1e-4, atol=1e-3, equal_nan=True).item()
