"""mlx-lm's own trainer on several ranks with a device, which a CPU stream of its own plays: nothing there waits for the
network."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import devices
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_lm.tuner import trainer
from reference import WORLD, same_bits, several, told_by_all

import distclip as dc
from distclip.integrations.mlx_lm import main, train
from integrations.tiny import Seen, arguments, batches, leaves, tiny

LATE_S = 0.8
FREE_S = 0.3  # a device that is free ends a tiny operation in less
REPLACED = ("mx", "nn", "average_gradients")  # names of the trainer


def late_before(number: int, rank: int) -> Callable[[], None]:
    """To call before each batch: a rank is late with one of them, counted from 1. Rank -1 is none."""
    count = 0

    def between() -> None:
        nonlocal count
        count += 1
        if count == number and WORLD.rank == rank:
            time.sleep(LATE_S)

    return between


@pytest.fixture
def blocked(device: mx.Stream, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For each evaluation how long the device that was given its arrays is not free, in seconds."""
    small, evaluate = mx.ones(4), mx.eval
    evaluate(small)
    seconds: list[float] = []

    def spy(*arrays: Any) -> None:
        asked = time.perf_counter()
        mx.async_eval(*arrays)  # itself waits where more than ten operations are on their way to a device that waits
        evaluate(mx.add(small, 1, stream=device))
        seconds.append(time.perf_counter() - asked)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", spy)
    return seconds


@several
@pytest.mark.parametrize("late", ["a batch", "saving"])
def test_a_late_rank_does_not_block_the_device(
    late: str, blocked: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors

    def save_slowly(*given: Any) -> None:
        time.sleep(LATE_S)
        save(*given)

    if late == "saving":  # which rank 0 does
        monkeypatch.setattr(mx, "save_safetensors", save_slowly)
    between = late_before(4, 1 if late == "a batch" else -1)
    warm = 0

    def iterate(*_: Any, **__: Any) -> Iterator[Any]:
        nonlocal warm
        for number, one in enumerate(batches(WORLD, between=between)()):
            if number == 2:
                warm = len(blocked)
            yield one

    started = time.perf_counter()
    args = arguments(tmp_path, 6, steps_per_report=6, steps_per_save=4)
    train(tiny("full"), optim.AdamW(1e-3), None, args=args, iterate_batches=iterate)
    took = time.perf_counter() - started
    WORLD.barrier()  # before rank 0 saves for the last time, the others are gone
    longest = max(blocked[warm:])
    assert told_by_all(f"free: {longest < FREE_S}") == ["free: True"] * WORLD.size, f"{longest:.2f} s"
    assert took > LATE_S * 0.9, "the host waits for the rank that is late"


@several
def test_the_host_waits_for_a_rank_that_validates_longer(
    device: mx.Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[float] = []
    all_sum, seen, started = mx.distributed.all_sum, Seen(), time.perf_counter()

    def timed(*given: Any, **named: Any) -> mx.array:
        summed.append(time.perf_counter() - started)
        return all_sum(*given, **named)

    monkeypatch.setattr(mx.distributed, "all_sum", timed)
    train(
        tiny(),
        optim.SGD(1e-3),
        None,
        [0] * 3,
        arguments(tmp_path, 1, val_batches=1),
        iterate_batches=lambda **named: batches(WORLD, between=late_before(1, -1 if named.get("loop") else 1))(),
        training_callback=seen,
    )
    losses, tokens = summed[:2]
    assert tokens > LATE_S * 0.9, "the sum of losses is there before that of tokens is asked for"
    assert losses < LATE_S * 0.5 or WORLD.rank == 1
    assert np.isfinite([seen.valid[0]["val_loss"], seen.train[0]["train_loss"]]).all()


# ---------------------------------------------------------------------------------------------- both forms of a step


class Counting(optim.AdamW):
    """Counts how often its Python code runs."""

    calls = 0

    def apply_gradients(self, *given: Any) -> Any:
        self.calls += 1
        return super().apply_gradients(*given)


def tuned(folder: Path, kind: str, apart: bool, **others: Any) -> tuple[Any, dc.Clipper, Seen, Counter[str]]:
    """What six batches make of a model, of which the third is bad, and how often the loss and the optimizer were run by
    Python."""
    calls: Counter[str] = Counter()

    def loss(*given: Any) -> Any:
        calls["loss"] += 1
        return trainer.default_loss(*given)

    model, optimizer, seen = tiny(kind, dropout=0.1), Counting(optim.cosine_decay(1e-2, 10)), Seen()
    mx.random.seed(3)
    clipper = train(
        model,
        optimizer,
        None,
        args=arguments(folder, 6, **others),
        loss=loss,
        iterate_batches=batches(WORLD, bad=(3,), between=lambda: check_names(apart)),
        training_callback=seen,
        max_norm=0.5,
    )
    check_names(False)
    assert "apply_gradients" not in vars(optimizer)
    return model, clipper, seen, calls | Counter(update=optimizer.calls)


def check_names(apart: bool) -> None:
    assert [vars(trainer)[name] is REAL[name] for name in REPLACED] == [not apart] * len(REPLACED)


REAL = {name: vars(trainer)[name] for name in REPLACED}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_both_forms_train_alike(
    parts: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: dc.World
) -> None:
    forms = []
    devices.pin_collectives(world.stream, monkeypatch.setattr)
    for stream in (world.stream, mx.new_stream(mx.cpu)):
        apart = world.size > 1 and stream != world.stream
        with mx.stream(stream):
            forms.append(tuned(tmp_path, kind, apart, grad_accumulation_steps=parts))
    (model, clipper, seen, _), (other, other_clipper, others, other_calls) = forms
    for (path, value), (_, expected) in zip(leaves(other.parameters()), leaves(model.parameters()), strict=True):
        np.testing.assert_allclose(np.array(value), np.array(expected), rtol=1e-4, atol=1e-5, err_msg=path)
    for name in ("step", "bad", "clipped"):
        assert other_clipper.state[name].item() == clipper.state[name].item() > 0, name
    for name in ("train_loss", "grad_norm", "clipped_share", "nonfinite_steps", "learning_rate", "trained_tokens"):
        values, wanted = ([info[name] for info in form.train] for form in (others, seen))
        np.testing.assert_allclose(values, wanted, rtol=1e-4, err_msg=name)
    if world.size > 1:
        assert other_calls == {"loss": 1, "update": 1}, "what needs no other rank stays compiled"
        assert same_bits([value for _, value in leaves(other.trainable_parameters())])


@several
def test_accumulated_gradients_are_sent_once(device: mx.Stream, collectives: Counter[str], tmp_path: Path) -> None:
    train(
        tiny(),
        optim.SGD(1e-3),
        None,
        args=arguments(tmp_path, 6, steps_per_report=6, grad_accumulation_steps=3),
        iterate_batches=batches(WORLD),
    )
    assert collectives["all_sum"] == 2 + 2, "one bucket for each update, the report's losses and tokens"


@several
@pytest.mark.parametrize("error", [FloatingPointError, KeyError])
def test_an_error_leaves_the_trainer_as_it_was(error: type[Exception], device: mx.Stream, tmp_path: Path) -> None:
    def fail() -> None:
        if error is KeyError:
            raise KeyError("a batch")

    with pytest.raises(error):
        train(
            tiny(),
            optim.SGD(1e-3),
            None,
            args=arguments(tmp_path, 4),
            iterate_batches=batches(WORLD, bad=(1, 2, 3), between=fail),
            max_consecutive_skips=1,
        )
    check_names(False)


@several
def test_the_command_s_test_of_the_model_waits_on_the_host_too(
    device: mx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: Counter[str] = Counter()

    def check() -> None:
        called["main"] += 1
        check_names(True)

    monkeypatch.setattr(import_module("mlx_lm.lora"), "main", check)
    assert main(["lora", "--"]) == 0
    assert called["main"] == 1
    check_names(False)
