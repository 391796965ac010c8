"""Who is measured in one process: distclip, MLX, PyTorch, optax, and the floors of reading and copying."""

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

from distclip.bench.timing import Contestant
from distclip.bench.trees import Grads
from distclip.clip import clip_grad_norm
from distclip.engine import operations
from distclip.engine.kernels import engine
from distclip.engine.native import load
from distclip.norm import global_norm

INSTALL = 'pip install "distclip[bench]"'
Clip = Callable[..., tuple[Any, mx.array]]


def threads() -> int:
    """How many threads distclip works with."""
    kernel = load() if engine() == "native" else None
    return 1 if kernel is None else kernel.threads


class Peers:
    """The libraries that are there, and a line about each that is not."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.torch = self._find("torch", "torch")
        self.optax = self._find("optax", "jax", "ml_dtypes", "optax")
        if self.optax is not None:
            import_module("jax").config.update("jax_platforms", "cpu")

    def _find(self, name: str, *modules: str) -> ModuleType | None:
        try:
            return [import_module(module) for module in modules][-1]
        except ImportError as error:
            self.missing.append(f"{name} is left out: {error}. To add it: {INSTALL}")
            return None

    def versions(self) -> dict[str, str]:
        found = {"torch": self.torch, "optax": self.optax, "jax": self.optax and import_module("jax")}
        return {name: str(module.__version__) for name, module in found.items() if module is not None}

    def norm(self, grads: Grads) -> list[Contestant]:
        def evaluated(find: Callable[[Any], mx.array]) -> Callable[[list[Any]], tuple[Any, Any]]:
            def work(box: list[Any]) -> tuple[Any, Any]:
                norm = find(box[0])
                mx.eval(norm)
                return None, norm

            return work

        def mlx_norm(tree: Any) -> mx.array:
            norm: mx.array = optim.clip_grad_norm(tree, math.inf)[1]  # lazy: only the norm is worked out
            return norm

        def by_operations(tree: Any) -> mx.array:
            return mx.sqrt(operations.sum_squares(tree)[0], stream=mx.cpu).astype(mx.float32, stream=mx.cpu)

        ways: list[tuple[str, Callable[[Any], mx.array]]] = [
            ("distclip", global_norm),
            ("distclip, compiled", mx.compile(global_norm)),
        ]
        if engine() == "native":
            ways.append(("distclip, MLX operations", by_operations))
        ways += [("MLX", mlx_norm), ("MLX, compiled", mx.compile(mlx_norm))]
        found = [Contestant(name, lambda: grads.mlx, evaluated(way)) for name, way in ways]
        if self.torch is not None:
            total_norm = self.torch.nn.utils.get_total_norm
            found += self._torch_threads(lambda: grads.torch, lambda box: (None, total_norm(box[0])))
        if self.optax is not None:
            measure = import_module("jax").jit(self.optax.global_norm)
            found.append(
                Contestant("optax, jit", lambda: grads.jax, lambda box: (None, measure(box[0]).block_until_ready()))
            )
        return found + reads(grads.bytes)

    def clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        def evaluated(way: Clip) -> Callable[[list[Any]], tuple[Any, Any]]:
            def work(box: list[Any]) -> tuple[Any, Any]:
                clipped, norm = way(box.pop() if given_up else box[0], max_norm)
                mx.eval(clipped, norm)
                return clipped, norm

            return work

        def fresh() -> list[mx.array]:
            return grads.fresh_mlx() if given_up else grads.mlx

        def compiled(way: Clip) -> Clip:
            def clip(tree: Any) -> tuple[Any, mx.array]:
                return way(tree, max_norm)

            traced: Any = mx.compile(clip)
            return lambda tree, _: traced(tree)

        ways: list[tuple[str, Clip]] = [
            ("distclip", clip_grad_norm),
            ("distclip, compiled", compiled(clip_grad_norm)),
            ("MLX", optim.clip_grad_norm),
            ("MLX, compiled", compiled(optim.clip_grad_norm)),
        ]
        found = [Contestant(name, fresh, evaluated(way)) for name, way in ways]
        found += self._torch_clip(grads, max_norm, given_up) + self._optax_clip(grads, max_norm, given_up)
        return found + reads(grads.bytes) + copies(grads.bytes)

    def _torch_clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        torch: Any = self.torch
        if torch is None:
            return []

        def parameters(gradients: list[Any]) -> list[Any]:
            found = []
            for gradient in gradients:
                found.append(torch.zeros((), dtype=gradient.dtype).expand(gradient.shape))  # no memory of its own
                found[-1].grad = gradient
            return found

        def fresh() -> Any:
            return parameters([g.clone() for g in grads.torch]) if given_up else grads.torch

        def work(box: list[Any]) -> tuple[Any, Any]:
            owners = box[0] if given_up else parameters([g.clone() for g in box[0]])
            return owners, torch.nn.utils.clip_grad_norm_(owners, max_norm)

        return self._torch_threads(fresh, work)

    def _torch_threads(
        self, fresh: Callable[[], Any], work: Callable[[list[Any]], tuple[Any, Any]]
    ) -> list[Contestant]:
        torch: Any = self.torch

        def with_threads(count: int) -> Callable[[], Any]:
            def set_and_make() -> Any:
                torch.set_num_threads(count)
                torch.ones(1 << 18).add_(1)  # starts them
                return fresh()

            return set_and_make

        counts = [1] if (os.cpu_count() or 1) == 1 else [1, max(threads(), 2)]
        return [Contestant(f"torch, {n} thread{'s' if n > 1 else ''}", with_threads(n), work) for n in counts]

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
        """One for every threshold: XLA takes 20 s to compile it for 2,000 leaves."""
        jax, optax = import_module("jax"), import_module("optax")

        def clip(tree: Any, max_norm: Any) -> tuple[Any, Any]:
            clipped, _ = optax.clip_by_global_norm(max_norm).update(tree, optax.EmptyState())
            return clipped, optax.global_norm(tree)

        return jax.jit(clip, donate_argnums=(0,) if given_up else ())


def reads(size: int) -> list[Contestant]:
    """Read as many bytes once, as one array of float32: by one thread, and by as many as distclip has."""
    array = np.ones(max(size // 4, 1), np.float32)
    found = [_floor("plain read, 1 thread", lambda: np.dot(array, array))]
    if (n := threads()) > 1:
        parts, pool = np.array_split(array, n), ThreadPoolExecutor(n)
        found.append(_floor(f"plain read, {n} threads", lambda: list(pool.map(lambda part: np.dot(part, part), parts))))
    return found


def copies(size: int) -> list[Contestant]:
    source, target = np.ones(max(size // 4, 1), np.float32), np.zeros(max(size // 4, 1), np.float32)
    return [_floor("plain copy, 1 thread", lambda: np.copyto(target, source))]


def _floor(name: str, act: Callable[[], Any]) -> Contestant:
    return Contestant(name, lambda: None, lambda _: (act(), None), floor=True)
