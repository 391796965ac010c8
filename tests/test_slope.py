"""check_gradient: silent when the gradient is right, and one error on all ranks, with the leaves, when it is not."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import devices
import mlx.core as mx
import mlx.nn as nn
import pytest
from launching import alone, on_terminal
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten, tree_unflatten
from reference import WORLD, mesh, norm64, relative, several, square, told_by_all
from schemes import bits

import distclip as dc

N = WORLD.size
PLAYED_STREAM = devices.played() == "stream"
ROWS, LENGTH, BYTES, DIMS, HIDDEN = 12, 6, 16, 8, 12
R = dc.Replicated()


class Block(nn.Module):
    """Its hidden values can be split over ranks; ``gain`` is then partial, since each rank applies it to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.RMSNorm(DIMS), nn.Linear(DIMS, DIMS)
        self.up, self.down = nn.Linear(DIMS, HIDDEN), nn.Linear(HIDDEN, DIMS)
        self.gain = mx.ones(1)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + mx.tanh(self.mix(self.norm(x)))
        y: mx.array = x + self.down(self.gain * mx.tanh(self.up(x)))
        return y


class Net(nn.Module):
    """A language model whose embedding is its head, too."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(BYTES, DIMS), [Block(), Block()]
        self.dropout = nn.Dropout(dropout)

    def __call__(self, tokens: mx.array, head: mx.array | None = None) -> mx.array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(self.dropout(x))
        logits: mx.array = x @ (self.embedding.weight if head is None else head).T
        return logits


def loss_fn(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def flat(tree: Any) -> dict[str, Any]:
    return dict(tree_flatten(tree))


def nested(leaves: dict[str, Any]) -> Any:
    return tree_unflatten(list(leaves.items()))


@dataclass
class Training:
    """A model in training on this rank, with its gradient: partial over dp, then averaged."""

    model: Net
    batch: mx.array
    local: Any
    grads: dict[str, mx.array]
    layout: dict[str, Any]
    mesh: dc.Mesh

    @property
    def tp(self) -> mx.distributed.Group:
        return self.mesh.group("tp")

    def check(self, **options: Any) -> Any:
        return dc.check_gradient(self.model, loss_fn, self.batch, nested(self.grads), nested(self.layout), **options)


def train(parallel: str, dtype: mx.Dtype = mx.float32, seed: int = 3) -> Training:
    """``dp``: each rank reads other rows. ``tp``: each has a part of the hidden values. ``dp+tp``: four ranks."""
    grid = square() if parallel == "dp+tp" else mesh(dp=N, tp=1) if parallel == "dp" else mesh(dp=1, tp=N)
    dp, tp = grid.group("dp"), grid.group("tp")
    mx.random.seed(0)
    model = Net()
    model.layers[0].norm.weight = mx.random.uniform(0.5, 1.5, (DIMS,))
    model.set_dtype(dtype)
    tokens = mx.random.randint(0, BYTES, (ROWS, LENGTH), key=mx.random.key(seed))
    if tp.size() > 1:
        for layer in model.layers:
            layer.up = shard_linear(layer.up, "all-to-sharded", group=tp)
            layer.down = shard_linear(layer.down, "sharded-to-all", group=tp)
    layout = flat(dc.layout_of(model, grid))
    if tp.size() > 1:
        layout |= {path: dc.Partial("tp", mesh=grid) for path in layout if path.endswith("gain")}
    batch = tokens[dp.rank() :: dp.size()]
    _, local = nn.value_and_grad(model, loss_fn)(model, batch)
    grads = dc.average_gradients(local, group=dp)
    mx.eval(local, grads)
    return Training(model, batch, local, flat(grads), layout, grid)


PARALLEL = [
    "dp",
    pytest.param("tp", marks=several),
    pytest.param("dp+tp", marks=pytest.mark.mpi(min_size=4)),
]
every_parallel = pytest.mark.parametrize("parallel", PARALLEL)


def complaint(training: Training, **options: Any) -> str:
    """The error's text, which must be the same on every rank."""
    with pytest.raises(dc.LayoutError) as error:
        training.check(**options)
    text = str(error.value)
    assert len(set(told_by_all(text))) == 1
    return text


# ----------------------------------------------------------------------------------------------- it is right


@every_parallel
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_right_gradient_is_right(parallel: str, dtype: mx.Dtype) -> None:
    slopes = train(parallel, dtype).check()
    assert slopes.verdict == "right"
    assert len(set(told_by_all(str(slopes)))) == 1
    whole = slopes.rows[0]
    assert (whole.leaves, whole.along, whole.verdict) == ("all", "the gradient", "right")
    assert abs(whole.ratio - 1) < (0.01 if dtype == mx.float32 else 0.03)
    assert str(slopes).splitlines()[1].split()[-4:-2] == [f"{whole.slope:.6g}", f"{whole.ratio:.4f}"]


def test_the_norm_that_is_claimed_is_the_global_norm() -> None:
    training = train("dp")
    assert relative(training.check().rows[0].claimed, norm64(training.grads)) <= 1e-5


@every_parallel
def test_eight_forward_passes_and_few_collectives(parallel: str, collectives: Counter[str]) -> None:
    training = train(parallel)
    passes = 0

    def counted(model: nn.Module, batch: mx.array) -> mx.array:
        nonlocal passes
        passes += 1
        return loss_fn(model, batch)

    training.check()  # what compares trees once has done so
    collectives.clear()
    dc.check_gradient(training.model, counted, training.batch, nested(training.grads), nested(training.layout))
    assert passes == 10, "two for the loss itself, and two for each of four displacements"
    compared = PLAYED_STREAM and "tp" in parallel  # contributions, at each call where the host waits
    assert collectives["all_gather"] == 4 + compared  # digests of gradients and parameters, and the paths


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_numbers_are_what_they_were(fails: bool) -> None:
    training = train("dp", mx.bfloat16)
    training.model.freeze(recurse=True)
    training.model.unfreeze()
    training.model.layers[1].mix.freeze()
    before, trainable = bits(training.model.parameters()), list(flat(training.model.trainable_parameters()))
    mx.random.seed(5)
    drawn = mx.random.normal((3,)).tolist()
    mx.random.seed(5)
    if fails:
        training.grads["embedding.weight"] *= 2
        complaint(training)
    else:
        training.check()
    assert mx.random.normal((3,)).tolist() == drawn
    assert bits(training.model.parameters()) == before
    assert list(flat(training.model.trainable_parameters())) == trainable
    assert all(leaf.dtype == mx.bfloat16 for leaf in flat(training.model.parameters()).values())


def test_parameters_are_float32_in_each_pass() -> None:
    """A step of theirs is rounded away in bfloat16, and the loss by activations of that type."""
    training = train("dp", mx.bfloat16)
    seen: set[mx.Dtype] = set()

    def watched(model: nn.Module, batch: mx.array) -> mx.array:
        seen.update(leaf.dtype for leaf in flat(model.parameters()).values())
        return loss_fn(model, batch)

    dc.check_gradient(training.model, watched, training.batch, nested(training.grads), nested(training.layout))
    assert seen == {mx.float32}


def test_a_loss_that_fails_leaves_the_model_as_it_was() -> None:
    training = train("dp")
    before = bits(training.model.parameters())
    calls = []

    def fails(model: nn.Module, batch: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return loss_fn(model, batch)

    with pytest.raises(ZeroDivisionError):
        dc.check_gradient(training.model, fails, training.batch, nested(training.grads), nested(training.layout))
    assert bits(training.model.parameters()) == before


# ------------------------------------------------------------------------------------------------ it is wrong

Plant = Callable[[Training], None]
MIX, UP, DOWN = "layers.0.mix.weight", "layers.1.up.weight", "layers.0.down.weight"
BIAS, DOWN_BIAS, GAIN, EMBEDDING = "layers.1.mix.bias", "layers.0.down.bias", "layers.0.gain", "embedding.weight"


def times(factor: float, *paths: str) -> Plant:
    def plant(training: Training) -> None:
        for path in paths or training.grads:
            training.grads[path] = training.grads[path] * factor

    return plant


def swap(training: Training) -> None:
    grads, other = training.grads, MIX.replace("0", "1")
    grads[MIX], grads[other] = grads[other], grads[MIX]


def transpose(training: Training) -> None:
    training.grads[MIX] = mx.contiguous(training.grads[MIX].T)


def half(training: Training) -> None:
    rows = mx.arange(DIMS)[:, None] < DIMS // 2
    training.grads[MIX] = mx.where(rows, training.grads[MIX], 0.0)


def of_another_batch(training: Training) -> None:
    training.grads = train("dp", seed=4).grads


def head_twice(training: Training) -> None:
    """The weight that is embedding and head: what the head adds to its gradient is counted twice."""

    def of_head(head: mx.array) -> mx.array:
        tokens = training.batch
        return nn.losses.cross_entropy(training.model(tokens[:, :-1], head), tokens[:, 1:], reduction="mean")

    more = dc.average_gradients(mx.grad(of_head)(training.model.embedding.weight))
    training.grads[EMBEDDING] = training.grads[EMBEDDING] + more


def not_averaged(training: Training) -> None:
    training.grads = flat(training.local)


def of_rank_0(training: Training) -> None:
    training.grads = {
        path: mx.distributed.all_sum(leaf if WORLD.rank == 0 else mx.zeros_like(leaf), group=WORLD.group)
        for path, leaf in flat(training.local).items()
    }


def shards_of_rank_0(training: Training) -> None:
    if training.tp.rank() > 0:
        for path in (UP, DOWN):
            training.grads[path] = mx.zeros_like(training.grads[path])


def counted_n_times(training: Training) -> None:
    training.grads[DOWN_BIAS] = training.grads[DOWN_BIAS] * training.tp.size()


def averaged_contributions(training: Training) -> None:
    """The remedy that a comparison of copies suggests."""
    training.grads[GAIN] = mx.distributed.all_sum(training.grads[GAIN], group=training.tp) / training.tp.size()
    training.layout[GAIN] = R


def call(path: str, placement: Any) -> Plant:
    def plant(training: Training) -> None:
        training.layout[path] = placement(training)

    return plant


ALL = [MIX, UP, DOWN, BIAS, EMBEDDING]
MISTAKES: dict[str, tuple[Plant, list[str]]] = {
    "a sign flipped": (times(-1, MIX), [MIX]),
    "a leaf doubled": (times(2, UP), [UP]),
    "a leaf halved": (times(0.5, EMBEDDING), [EMBEDDING]),
    "a small leaf doubled": (times(2, BIAS), [BIAS]),
    "a leaf zeroed": (times(0, MIX), [MIX]),
    "a small leaf zeroed": (times(0, BIAS), [BIAS]),
    "half a leaf zeroed": (half, [MIX]),
    "two leaves swapped": (swap, [MIX, MIX.replace("0", "1")]),
    "a leaf transposed": (transpose, [MIX]),
    "a loss scale left in": (times(1024), ALL),
    "clipped already": (times(0.3), ALL),
    "a gradient of another batch": (of_another_batch, ALL),
    "a tied weight counted twice": (head_twice, [EMBEDDING]),
}
MISTAKES_OF_DP: dict[str, tuple[Plant, list[str]]] = {
    "a sum for a mean": (times(N), ALL),
    "averaged twice": (times(1 / N), ALL),
    "an average forgotten": (not_averaged, ALL),
    "the gradient of one rank": (of_rank_0, ALL),
}
MISTAKES_OF_TP: dict[str, tuple[Plant, list[str]]] = {
    "a shard called a replica": (call(UP, lambda training: R), [UP]),
    "a replica called a shard": (call(MIX, lambda training: dc.Sharded("tp", mesh=training.mesh)), [MIX]),
    "a contribution called a replica": (call(GAIN, lambda training: R), [GAIN]),
    "contributions averaged": (averaged_contributions, [GAIN]),
    "a replica called a contribution": (call(MIX, lambda training: dc.Partial("tp", mesh=training.mesh)), [MIX]),
    "a bias counted n times": (counted_n_times, [DOWN_BIAS]),
    "the shards of one rank": (shards_of_rank_0, [UP, DOWN]),
    "a shard doubled": (times(2, DOWN), [DOWN]),
}


def assert_named(text: str, wrong: list[str], among: dict[str, Any]) -> None:
    named = {path for path in among if f"  {path}" in text}
    if wrong == ALL:
        assert len(named) == 10, text
        assert "more" in text
    else:
        assert named == set(wrong), text


def assert_mistake_is_named(parallel: str, plant: Plant, wrong: list[str]) -> None:
    training = train(parallel)
    plant(training)
    assert_named(complaint(training), wrong, training.grads)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    assert_mistake_is_named("dp", *MISTAKES[name])


@several
@pytest.mark.parametrize("name", MISTAKES_OF_DP)
def test_a_mistake_of_data_parallel_training_is_named(name: str) -> None:
    assert_mistake_is_named("dp", *MISTAKES_OF_DP[name])


@pytest.mark.parametrize("parallel", PARALLEL[1:])
@pytest.mark.parametrize("name", MISTAKES_OF_TP)
def test_a_mistake_of_tensor_parallel_training_is_named(name: str, parallel: str) -> None:
    assert_mistake_is_named(parallel, *MISTAKES_OF_TP[name])


def test_leaves_that_the_model_does_not_have_are_named() -> None:
    training = train("dp")
    training.grads[MIX] = mx.zeros((3, 5))
    training.grads["more"], training.layout["more"] = mx.ones(2), R
    text = complaint(training)
    assert f"  {MIX}: the gradient has shape (3, 5), the parameter (8, 8)" in text
    assert "  more: the model has no such parameter" in text


@several
def test_copies_of_a_parameter_that_differ_are_named() -> None:
    training = train("dp")
    if WORLD.rank == N - 1:
        training.model.layers[0].mix.weight = training.model.layers[0].mix.weight + 1e-6
    text = complaint(training)
    assert text.startswith("The parameters contradict the layout:")
    assert_named(text, [MIX], training.grads)


def test_all_leaves_are_wrong_where_the_loss_ignores_them() -> None:
    training = train("dp")
    loss = loss_fn(training.model, training.batch)
    with pytest.raises(dc.LayoutError, match="slope 0, ratio 0"):
        dc.check_gradient(
            training.model, lambda model, batch: loss, training.batch, nested(training.grads), nested(training.layout)
        )


# ------------------------------------------------------------------------------------ what cannot be measured


def test_a_random_loss_needs_the_seed_of_the_gradient() -> None:
    training = train("dp")
    training.model.dropout = nn.Dropout(0.5)
    with pytest.raises(ValueError, match=r"the loss is random. Check with model.eval"):
        training.check()
    mx.random.seed(7 + WORLD.rank)
    _, grads = nn.value_and_grad(training.model, loss_fn)(training.model, training.batch)
    training.grads = flat(dc.average_gradients(grads))
    assert training.check(seed=7 + WORLD.rank).verdict == "right"
    assert_named(complaint(training, seed=8 + WORLD.rank), ALL, training.grads)
    training.model.eval()
    _, grads = nn.value_and_grad(training.model, loss_fn)(training.model, training.batch)
    training.grads = flat(dc.average_gradients(grads))
    assert training.check().verdict == "right"


def test_what_is_not_finite_is_refused() -> None:
    training = train("dp")
    training.grads[MIX] = training.grads[MIX] * float("nan")
    with pytest.raises(ValueError, match=r"finite numbers; the loss is .* and the norm of the gradient nan"):
        training.check()


def test_a_loss_that_jumps_cannot_be_told() -> None:
    """As behind a router that sends tokens elsewhere: the slope is another one at every step size."""
    training = train("dp")

    def jumps(model: nn.Module, batch: mx.array) -> mx.array:
        return loss_fn(model, batch) + 0.5 * mx.sign(model.layers[0].mix.weight - weight).sum()

    weight = training.model.layers[0].mix.weight
    slopes = dc.check_gradient(training.model, jumps, training.batch, nested(training.grads), nested(training.layout))
    assert slopes.verdict == "cannot tell"
    verdicts = {row.leaves: row.verdict for row in slopes.rows}
    assert verdicts["the rest"] == "cannot tell"
    assert verdicts["layers.*.up.weight"] == "right"


def test_leaves_without_a_gradient_may_be_right() -> None:
    """As lora_a at the start, where lora_b is zero."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    model.layers[1].weight = mx.zeros((3, 4))
    x, y = mx.random.normal((2, 5, 1), key=mx.random.key(1)), mx.array([0, 2])
    batch = (mx.broadcast_to(x[:, :, 0:1], (2, 5, 6)), y)

    def of(model: nn.Module, batch: Any) -> mx.array:
        return nn.losses.cross_entropy(model(batch[0]).mean(axis=1), batch[1], reduction="mean")

    mx.random.seed(1)
    model.layers[0].weight = mx.random.normal((4, 6))
    _, grads = nn.value_and_grad(model, of)(model, batch)
    assert norm64(grads["layers"][0]) == 0
    slopes = dc.check_gradient(model, of, batch, grads, R)
    assert slopes.verdict == "right"
    assert slopes.rows[-1].leaves == "all without a gradient"


@pytest.mark.mpi(min_size=2)
def test_ranks_may_hold_different_leaves() -> None:
    """Experts of the same names, a stage that rank 0 alone has: each rank's loss holds what it has."""
    weights = {"expert": mx.random.normal((4,), key=mx.random.key(WORLD.rank))}
    weights |= {"first": mx.random.normal((3,), key=mx.random.key(9))} if WORLD.rank == 0 else {}
    model = nn.Module()
    for name, weight in weights.items():
        setattr(model, name, weight)

    def of(model: Any, batch: Any) -> mx.array:
        mine = sum((mx.exp(0.3 * leaf).sum() for leaf in flat(model.parameters()).values()), mx.array(0.0))
        return mx.distributed.all_sum(mine, group=WORLD.group)

    _, grads = nn.value_and_grad(model, of)(model, None)
    assert dc.check_gradient(model, of, None, grads, dc.Sharded()).verdict == "right"
    if WORLD.rank == 0:
        grads["first"] = grads["first"] * 2
    with pytest.raises(dc.LayoutError, match=r"first, along the gradient.* ratio 0\.500"):
        dc.check_gradient(model, of, None, grads, dc.Sharded())


@pytest.mark.launches
def test_a_person_sees_which_leaves_are_moved(tmp_path: Path) -> None:
    program = """
    import distclip as dc, mlx.core as mx, mlx.nn as nn
    mx.random.seed(0)
    model = nn.Linear(4, 3)
    loss_fn = lambda model, x: mx.square(model(x)).mean()
    x = mx.random.normal((5, 4))
    grads = nn.value_and_grad(model, loss_fn)(model, x)[1]
    grads["bias"] = -grads["bias"]
    try:
        dc.check_gradient(model, loss_fn, x, grads, dc.Replicated())
    except dc.LayoutError:
        print("named")
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    shown = on_terminal(["sh", "-c", f"exec {sys.executable} program.py 2>&1"], tmp_path).decode()
    assert "checking the gradient: bias (0 more)" in shown
    assert shown.rstrip().endswith("\x1b[Knamed")
    assert "checking" not in alone(program, tmp_path).output
