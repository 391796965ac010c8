"""Programs that are right: no check that runs by itself stops them, or says a word (warnings are errors here)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.nn.layers.distributed import shard_linear
from reference import WORLD, normal, several

import distclip as dc
from distclip import check, digests
from distclip.schedule import is_apart
from distclip.world import group_of_one

N, RANK = WORLD.size, WORLD.rank
ONE = group_of_one()


def by_a_clipper(grads: Any, layout: Any) -> Any:
    clipped, report = dc.Clipper(1.0, layout=layout)(grads)
    return clipped, report.norm


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "average_and_clip": lambda grads, layout: dc.average_and_clip(grads, 1.0, group=ONE, layout=layout),
    "global_norm": lambda grads, layout: dc.global_norm(grads, layout=layout),
    "clip_grad_norm": lambda grads, layout: dc.clip_grad_norm(grads, 1.0, layout=layout),
    "Clipper": by_a_clipper,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture(autouse=True)
def first_calls() -> Iterator[None]:
    """Every call of a test is the first of its function."""
    check._called.clear()
    check._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "A GPU waits")  # where a stream plays a device, and a step is traced
        yield


def last_bit(leaf: mx.array) -> mx.array:
    """A leaf that differs in the last bit on the last rank, as between an M1 and an M4."""
    return leaf * (1 + 2.0**-23 * (RANK == N - 1))


# Each with its layout, which is right.
RIGHT: dict[str, tuple[Any, Any]] = {
    "shards": ({"a": normal((20, 8), RANK), "b": normal((70,), (RANK, 1))}, dc.Sharded()),
    "one leaf equal by accident": ({"a": normal((20, 8), RANK), "b": mx.ones((70,))}, dc.Sharded()),
    "constant gradients": ({"a": mx.ones((20, 8)), "b": mx.full((70,), 3.0)}, dc.Sharded()),
    "one constant leaf and equal ones": ({"a": normal((70,), 1), "b": mx.ones((70,))}, dc.Replicated()),
    "zeros": ({"a": mx.zeros((20, 8)), "b": mx.zeros((70,))}, dc.Sharded()),
    "small leaves": ({"a": mx.array([3.0, 4.0, 5.0]), "b": mx.array(2.0)}, dc.Replicated()),
    "LoRA at its start": ({"lora_a": mx.zeros((16, 8)), "lora_b": normal((8, 16), RANK)}, dc.Sharded()),
    "biases of zeros": ({"weight": normal((16, 8), RANK), "bias": mx.zeros((128,))}, dc.Sharded()),
    "replicas": ({"a": normal((20, 8), 1)}, dc.Replicated()),
    "replicas of other last bits": (
        {"r": last_bit(normal((20, 8), 1)), "s": normal((90,), RANK)},
        {"r": dc.Replicated(), "s": dc.Sharded()},
    ),
    "shards and replicas": (
        {"r": normal((90,), 1), "s": normal((90,), RANK)},
        {"r": dc.Replicated(), "s": dc.Sharded()},
    ),
    "stages": ({f"layer{RANK}": normal((20, 8), 1)}, dc.Sharded()),
    "a rank without leaves": ({} if RANK == 0 else {"a": normal((20, 8), RANK)}, dc.Sharded()),
    "not finite": ({"a": mx.full((80,), float("nan"))}, dc.Sharded()),
    "tied": (
        {"w": normal((80,), RANK), "t": normal((90,), 1)},
        {"w": dc.Sharded(), "t": dc.Replicated(ranks=range(N))},
    ),
}


@every_function
@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_are_not_stopped(name: str, function: Callable[..., Any]) -> None:
    grads, layout = RIGHT[name]
    if function is FUNCTIONS["Clipper"] and name == "not finite":
        pytest.skip("said by the policy")
    for _ in range(2):
        mx.eval(function(grads, layout))


def test_ranks_may_see_new_trees_at_different_calls() -> None:
    """A stage of one rank is unfrozen later than that of another."""
    for step in range(3):
        grads = {f"layer{i}": normal((80,), (RANK, i, step)) for i in range(1 + (step > RANK))}
        mx.eval(dc.clip_grad_norm(grads, 1.0))


def test_a_rank_that_calls_alone_with_replicas_is_not_waited_for() -> None:
    """Nothing is communicated there."""
    if RANK == 0:
        for function in FUNCTIONS.values():
            mx.eval(function({"a": normal((80,), 1)}, dc.Replicated()))


def network() -> nn.Module:
    mx.random.seed(0)  # the same parameters on every rank, before they are cut
    return nn.Sequential(nn.Linear(24, 48), nn.RMSNorm(48), nn.ReLU(), nn.Linear(48, 24))


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.mean(model(x).square())


def train(model: nn.Module, optimizer: dc.ClippedOptimizer, batch: int = RANK) -> None:
    for step in range(2):
        _, grads = nn.value_and_grad(model, loss_fn)(model, normal((4, 24), (batch, step)))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)


def test_data_parallel_training_is_not_stopped() -> None:
    train(network(), dc.ClippedOptimizer(optim.AdamW(1e-2), dc.Clipper(1.0, average=True)))


def test_averaged_before_is_not_stopped() -> None:
    model, optimizer = network(), dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0, layout=dc.Replicated()))
    _, grads = nn.value_and_grad(model, loss_fn)(model, normal((4, 24), RANK))
    optimizer.update(model, nn.average_gradients(grads))
    mx.eval(model.parameters())


def test_tensor_parallel_training_is_not_stopped() -> None:
    model = network()
    model.layers[0] = shard_linear(model.layers[0], "all-to-sharded")
    model.layers[3] = shard_linear(model.layers[3], "sharded-to-all")
    model.layers.pop(1)  # which would see a shard of the features
    train(model, dc.ClippedOptimizer(optim.AdamW(1e-2), dc.Clipper(1.0, layout=dc.layout_of(model))), batch=0)


def test_fully_sharded_training_is_not_stopped() -> None:
    """With RMSNorm weights of ones, equal on all ranks."""
    model = network()
    model.layers = [nn.fully_shard(layer) if layer.parameters() else layer for layer in model.layers]
    train(model, dc.ClippedOptimizer(optim.AdamW(1e-2), dc.Clipper(1.0, layout=dc.layout_of(model))))


def test_stages_made_from_one_seed_are_not_stopped() -> None:
    """Their parameters are equal, and have one name, on all ranks."""
    train(network(), dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0, layout=dc.Sharded())))


def test_stages_made_from_one_seed_without_a_layout_are_warned_and_not_stopped() -> None:
    """Nothing tells them from ranks that forget to average."""
    with pytest.warns(RuntimeWarning, match=r"layout=Sharded\(\)") if N > 1 else nullcontext():
        train(network(), dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0)))


def test_a_run_alone_is_not_checked() -> None:
    if N == 1:
        for function in FUNCTIONS.values():
            mx.eval(function({"a": normal((80,), 1)}, dc.Sharded()))


@several
def test_replicas_called_sharded_are_stopped(world: dc.World) -> None:
    """Averaged by ``nn.average_gradients``, then clipped with no layout: the norm is sqrt(N) too large."""
    grads = nn.average_gradients({"a": normal((20, 8), RANK), "b": normal((70,), (RANK, 1)), "small": mx.ones(3)})
    for name, function in FUNCTIONS.items():
        with pytest.raises(dc.LayoutError, match=r"All gradients are equal .* layout=Replicated\(\)"):
            function(grads, dc.Sharded())
        if name != "Clipper":  # a service, whose first call each is
            mx.eval(function(grads, dc.Sharded()))


@several
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pipeline_that_sends_after_it_has_clipped_is_not_stopped(name: str) -> None:
    """The gradients of the first stage need what the second sends, and both send when they have clipped."""
    if is_apart(WORLD.group, None):
        pytest.skip("the host waits for the norm in each step")
    weight, x = normal((16, 16), RANK), normal((8, 16), 5)

    def stage(weight: mx.array, x: mx.array) -> mx.array:
        return mx.tanh(x @ weight)

    for _ in range(2):
        grads, sent = {}, []
        if RANK == 0:
            sent = [mx.distributed.send(stage(weight, x), 1, group=WORLD.group)]
            error = mx.distributed.recv((8, 16), mx.float32, 1, group=WORLD.group)
            grads = {"weight": mx.vjp(lambda weight: stage(weight, x), [weight], [error])[1][0]}
        if RANK == 1:
            received = mx.distributed.recv((8, 16), mx.float32, 0, group=WORLD.group)
            _, (own, error) = mx.vjp(stage, [weight, received], [mx.ones((8, 16))])
            grads, sent = {"weight": own}, [mx.distributed.send(error, 0, group=WORLD.group)]
        result = FUNCTIONS[name](grads, dc.Sharded())
        mx.eval(sent)
        mx.eval(result)


@several
def test_a_clipper_digests_each_leaf_once(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[tuple[int, ...]] = []
    digest = digests._values

    def counted(flat: mx.array, *rest: Any) -> Any:
        digested.append(flat.shape)
        return digest(flat, *rest)

    monkeypatch.setattr(digests, "_values", counted)
    with pytest.raises(dc.LayoutError, match="All gradients are equal"):
        dc.Clipper(1.0)({"a": normal((80,), 1), "b": normal((90,), 2)})
    assert sorted(digested) == [(80,), (90,)]


@several
def test_adaptive_clipping_of_replicas_that_are_called_cut_is_stopped() -> None:
    cut, replicas = dc.Sharded(dim=1), {"a": normal((20, 8), 1)}
    shards = {"a": normal((20, 8), RANK)}
    mx.eval(dc.adaptive_clip_grad(shards, shards, layout=dc.Sharded(dim=0)))  # nothing is sent
    mx.eval(dc.adaptive_clip_grad(shards, shards, layout=cut))
    check._called.clear()
    with pytest.raises(dc.LayoutError, match="All gradients are equal"):
        dc.adaptive_clip_grad(replicas, replicas, layout=cut)


@pytest.mark.parametrize("parallel", ["dp", "tp", "dp+tp", "fsdp"])
def test_the_example_is_not_stopped(parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if parallel in ("dp+tp", "fsdp") and N == 3:
        pytest.skip("its layers are not divided by three")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "launch"))
    example = import_module("train")
    sizes = ["--dims", "48", "--heads", "12", "--layers", "1", "--context", "8", "--batch-size", "12"]
    example.train(example.parse(["--parallel", parallel, "--steps", "2", "--checkpoint-every", "0", *sizes]))


@several
def test_the_check_costs_the_first_call_alone(collectives: Counter[str]) -> None:
    for grads, expected in (({"a": normal((80,), RANK)}, 1), ({"a": normal((80,), RANK), "b": mx.ones(70)}, 0)):
        mx.eval(dc.clip_grad_norm(grads, 1.0))
        assert (collectives["all_gather"], collectives["all_sum"]) == (expected, 1)
        collectives.clear()


@several
def test_a_first_call_that_is_traced_warns_once() -> None:
    """On a rank without leaves too, where the others would wait for its check."""
    grads = {"a": normal((80,), 1)} if RANK == 0 else {}
    step = mx.compile(lambda grads: dc.clip_grad_norm(grads, 1.0))
    with pytest.warns(RuntimeWarning, match="The layout was not checked") as seen:
        mx.eval(step(grads))
    mx.eval(step({**grads, "b": normal((80,), 1)}), dc.clip_grad_norm(grads, 1.0))
    assert [warning.filename for warning in seen if "layout" in str(warning.message)] == [__file__]


@several
def test_what_is_not_certain_is_a_warning() -> None:
    """Copies that differ, and one leaf that is equal among others."""
    grads = {"equal": normal((80,), 1), "sharded": normal((80,), RANK), "differs": normal((80,), (RANK, 1))}
    layout = {"equal": dc.Sharded(), "sharded": dc.Sharded(), "differs": dc.Replicated()}
    with pytest.warns(RuntimeWarning, match=r"(?s)differs: called Replicated.*equal: called Sharded") as seen:
        dc.Clipper(1.0, layout=layout)(grads)
    assert [warning.filename for warning in seen] == [__file__]
    dc.clip_grad_norm(grads, 1.0, layout=layout)


@several
def test_a_forgotten_average_is_warned_of_before_a_step_is_compiled(world: dc.World, collectives: Counter[str]) -> None:
    parameters = {"a": normal((80,), 1)}
    optimizer = dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0, check="first"))
    with pytest.warns(RuntimeWarning, match="equal on all ranks") as seen:
        optimizer.init(parameters)
    assert [warning.filename for warning in seen] == [__file__]
    collectives.clear()
    optimizer.init(parameters)  # once
    dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0, average=True)).init(parameters)
    dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0, layout=dc.Sharded())).init(parameters)
    assert collectives.total() == 0


@several
def test_a_forgotten_average_is_warned_of(world: dc.World) -> None:
    optimizer = dc.ClippedOptimizer(optim.SGD(1e-2), dc.Clipper(1.0))
    with pytest.warns(RuntimeWarning, match=r"equal on all ranks.* pass average=True.* layout=Replicated\(\)") as seen:
        train(network(), optimizer)
    assert [warning.filename for warning in seen] == [__file__]
