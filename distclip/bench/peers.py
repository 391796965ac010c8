"""The contestants in one process: distclip, MLX, PyTorch, optax, and the floors of reading and copying."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from distclip.bench.timing import Contestant, Work, eager_and_compiled, work_of
from distclip.bench.trees import Grads
from distclip.clip import clip_grad_norm
from distclip.engine import operations
from distclip.engine.kernels import engine
from distclip.engine.native import load
from distclip.norm import global_norm

INSTALL = 'pip install "distclip[bench]"'


def threads() -> int:
    """The number of distclip's threads."""
    kernel = load() if engine() == "native" else None
    return 1 if kernel is None else kernel.threads


class Peers:
    """The libraries that are installed, and in ``missing`` a line about each that is not."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.torch = self._import("torch", "torch")
        self.optax = self._import("optax", "jax", "ml_dtypes", "optax")
        if self.optax is not None:
            import_module("jax").config.update("jax_platforms", "cpu")

    def _import(self, name: str, *modules: str) -> ModuleType | None:
        try:
            return [import_module(module) for module in modules][-1]
        except ImportError as error:
            self.missing.append(f"{name} is left out: {error}. To add it: {INSTALL}")
            return None

    def versions(self) -> dict[str, str]:
        modules = {"torch": self.torch, "optax": self.optax, "jax": self.optax and import_module("jax")}
        return {name: str(module.__version__) for name, module in modules.items() if module is not None}

    def norm(self, grads: Grads) -> list[Contestant]:
        def fresh() -> list[mx.array]:
            return grads.mlx

        def mlx_norm(tree: Any) -> tuple[Any, mx.array]:
            return [], optim.clip_grad_norm(tree, math.inf)[1]  # lazy: only the norm is computed

        contestants = eager_and_compiled("distclip", lambda tree: ([], global_norm(tree)), fresh, given_up=False)
        if engine() == "native":
            work = work_of(lambda tree: ([], _norm_by_operations(tree)), given_up=False)
            contestants.append(Contestant("distclip, MLX operations", fresh, work))
        contestants += eager_and_compiled("MLX", mlx_norm, fresh, given_up=False)
        return contestants + self._torch_norm(grads) + self._optax_norm(grads) + reads(grads.bytes)

    def clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        def fresh() -> list[mx.array]:
            return grads.fresh_mlx() if given_up else grads.mlx

        contestants = eager_and_compiled("distclip", lambda tree: clip_grad_norm(tree, max_norm), fresh, given_up)
        contestants += eager_and_compiled("MLX", lambda tree: optim.clip_grad_norm(tree, max_norm), fresh, given_up)
        contestants += self._torch_clip(grads, max_norm, given_up) + self._optax_clip(grads, max_norm, given_up)
        return contestants + reads(grads.bytes) + copies(grads.bytes)

    def _torch_norm(self, grads: Grads) -> list[Contestant]:
        if self.torch is None:
            return []
        total_norm = self.torch.nn.utils.get_total_norm
        return self._torch_threads(lambda: grads.torch, lambda box: (None, total_norm(box[0])))

    def _torch_clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        torch: Any = self.torch
        if torch is None:
            return []

        def parameters(gradients: list[Any]) -> list[Any]:
            owners = []
            for gradient in gradients:
                owners.append(torch.zeros((), dtype=gradient.dtype).expand(gradient.shape))  # without memory
                owners[-1].grad = gradient
            return owners

        def fresh() -> Any:
            return parameters([g.clone() for g in grads.torch]) if given_up else grads.torch

        def work(box: list[Any]) -> tuple[Any, Any]:
            owners = box[0] if given_up else parameters([g.clone() for g in box[0]])
            return owners, torch.nn.utils.clip_grad_norm_(owners, max_norm)

        return self._torch_threads(fresh, work)

    def _torch_threads(self, fresh: Callable[[], Any], work: Work) -> list[Contestant]:
        torch: Any = self.torch

        def fresh_with(count: int) -> Callable[[], Any]:
            def set_threads() -> Any:
                torch.set_num_threads(count)
                torch.ones(1 << 18).add_(1)  # starts them
                return fresh()

            return set_threads

        counts = [1] if (os.cpu_count() or 1) == 1 else [1, max(threads(), 2)]
        return [Contestant(f"torch, {n} thread{'s' if n > 1 else ''}", fresh_with(n), work) for n in counts]

    def _optax_norm(self, grads: Grads) -> list[Contestant]:
        if self.optax is None:
            return []
        norm = import_module("jax").jit(self.optax.global_norm)
        return [Contestant("optax, jit", lambda: grads.jax, lambda box: (None, norm(box[0]).block_until_ready()))]

    def _optax_clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        if self.optax is None:
            return []
        jax: Any = import_module("jax")
        jitted = self._jitted_clip(given_up)

        def work(box: list[Any]) -> tuple[Any, Any]:
            return jax.block_until_ready(jitted(box.pop() if given_up else box[0], max_norm))  # type: ignore[no-any-return]

        return [Contestant("optax, jit", lambda: grads.fresh_jax() if given_up else grads.jax, work)]

    @cache  # noqa: B019
    def _jitted_clip(self, given_up: bool) -> Any:
        """The same function for every threshold: XLA takes 20 s to compile it for 2,000 leaves."""
        jax, optax = import_module("jax"), import_module("optax")

        def clip(tree: Any, max_norm: Any) -> tuple[Any, Any]:
            clipped, _ = optax.clip_by_global_norm(max_norm).update(tree, optax.EmptyState())
            return clipped, optax.global_norm(tree)

        return jax.jit(clip, donate_argnums=(0,) if given_up else ())


def _norm_by_operations(tree: Any) -> mx.array:
    """The norm as distclip computes it without the native kernel."""
    sums = operations.sum_squares(tree)  # of squares, and of values that are not finite; of all leaves, or by leaf
    with mx.stream(mx.cpu):
        return mx.sqrt(mx.sum(sums.reshape(-1, 2)[:, 0])).astype(mx.float32)


def reads(size: int) -> list[Contestant]:
    """Read as many bytes once, as an array of float32: with a single thread, and with as many as distclip has."""
    array = np.ones(max(size // 4, 1), np.float32)
    floors = [_floor("plain read, 1 thread", lambda: np.dot(array, array))]
    if (n := threads()) > 1:
        blocks, pool = np.array_split(array, n), ThreadPoolExecutor(n)
        floors.append(_floor(f"plain read, {n} threads", lambda: list(pool.map(np.dot, blocks, blocks))))
    return floors


def copies(size: int) -> list[Contestant]:
    source, target = np.ones(max(size // 4, 1), np.float32), np.zeros(max(size // 4, 1), np.float32)
    return [_floor("plain copy, 1 thread", lambda: np.copyto(target, source))]


def _floor(name: str, act: Callable[[], Any]) -> Contestant:
    return Contestant(name, lambda: None, lambda _: (act(), None), floor=True)
