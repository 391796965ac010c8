"""Forward passes of a model with displaced parameters, and the model as it was when they are done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from distclip.terminal import on_terminal
from distclip.tree import Leaves
from distclip.world import all_sum, init

NOISE = 1e-6  # of the loss: what rounding does to it


class Passes:
    """A model whose parameters are float32 copies inside a ``with`` statement.

    Args:
        loss_fn, batch, seed: as in :func:`distclip.check_gradient`.
        group: the ranks whose losses are averaged.

    Attributes:
        parameters: by path, as they were.
        loss: the mean over the ranks, where nothing is displaced.
        noise: how much of a difference of losses is rounding.

    Raises:
        ValueError: two equal passes give different losses.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Any],
        batch: Any,
        group: mx.distributed.Group,
        seed: int | None,
    ) -> None:
        self._model, self._loss_fn, self._batch, self._group, self._seed = model, loss_fn, batch, group, seed
        self._leaves = Leaves(model.parameters(), named=True)
        self.parameters = dict(zip(self._leaves.paths, self._leaves.arrays, strict=True))
        self._random: Any = mx.random.state[0].tolist()  # type: ignore[index]
        self._shown = False

    def __enter__(self) -> Passes:
        try:
            self._wide = [x.astype(mx.float32) if _is_narrow(x) else x for x in self._leaves.arrays]
            self.loss = self._pass({}, 0)
            self.noise = NOISE * abs(self.loss)
            self._refuse_chance()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def change(self, displacement: dict[str, mx.array]) -> float:
        """Half of what the loss gains from the parameters below to those above, the same on every rank."""
        above = self._pass(displacement, 0)
        return (above - self._pass({path: -x for path, x in displacement.items()}, 0)) / 2

    def progress(self, text: str) -> None:
        """Show what is being done, on rank 0's terminal."""
        if init().rank == 0 and on_terminal(sys.stderr):
            print(f"\r\033[Kchecking the gradient: {text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def _pass(self, displacement: dict[str, mx.array], seed: int) -> float:
        """The mean of the ranks' losses; every rank waits for it on the host."""
        moved = zip(self._leaves.paths, self._wide, strict=True)
        self._model.update(
            self._leaves.rebuild([x + displacement[path] if path in displacement else x for path, x in moved])
        )
        mx.random.seed(seed if self._seed is None else self._seed)
        loss = self._loss_fn(self._model, self._batch)
        value = (loss[0] if isinstance(loss, tuple | list) else loss).item()
        with mx.stream(mx.cpu):
            mine = mx.array([value], mx.float64)
        total: Any = all_sum(mine, self._group).item()
        return float(total) / self._group.size()

    def _refuse_chance(self) -> None:
        again = self._pass({}, 1)
        if abs(again - self.loss) > self.noise:
            raise ValueError(
                f"Two equal passes have the losses {self.loss:.9g} and {again:.9g}: the loss is random. Check with "
                "model.eval(), where there is no dropout, or compute the gradient right after mx.random.seed(seed) and "
                "pass that seed, as check_gradient(..., seed=seed)."
            )

    def _restore(self) -> None:
        self._model.update(self._leaves.rebuild(self._leaves.arrays))
        high, low = self._random
        mx.random.seed(high << 32 | low)
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _is_narrow(x: mx.array) -> bool:
    return bool(mx.issubdtype(x.dtype, mx.floating)) and x.itemsize < 4
