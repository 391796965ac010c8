"""The contestants: distclip, MLX, PyTorch, optax, and the floors of reading, copying and a bare all-reduce."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.nn.utils as nn_utils
import mlx.optimizers as optim
import numpy as np

from distclip.average import average_and_clip
from distclip.bench import engines
from distclip.bench.machine import threads
from distclip.bench.timing import Contestant, Fresh, Function, Work, eager_and_compiled, work_of
from distclip.bench.trees import Grads
from distclip.clip import clip_grad_norm
from distclip.engine.streams import Stream
from distclip.norm import global_norm
from distclip.world import World


class Peers:
    """The libraries that are installed, and in ``missing`` a line about each that is not.

    Args:
        others: whether PyTorch, optax and plain reads are measured, beside distclip and MLX.
    """

    def __init__(self, others: bool) -> None:
        self.missing: list[str] = []
        self.others = others
        (self.torch,) = self._import("torch")
        self.jax, self.optax = self._import("jax", "optax")
        if self.jax:
            self.jax.config.update("jax_platforms", "cpu")

    def _import(self, *names: str) -> list[Any]:
        """The modules, or None for each if any of them is missing."""
        if not self.others:
            return [None] * len(names)
        try:
            return [import_module(name) for name in names]
        except ImportError as error:
            self.missing.append(f"{names[-1]} is left out: {error}. To add it: pip install {' '.join(names)}")
            return [None] * len(names)

    def versions(self) -> dict[str, str]:
        modules = {"torch": self.torch, "optax": self.optax, "jax": self.jax}
        return {name: str(module.__version__) for name, module in modules.items() if module}

    def norm(self, grads: Grads) -> list[Contestant]:
        def mlx(tree: Any) -> tuple[Any, Any]:
            return [], optim.clip_grad_norm(tree, math.inf)[1]  # lazy: only the norm is computed

        contestants = distclip_and_mlx(norm_of, mlx, lambda: grads.mlx, given_up=False)
        if self.torch:
            total_norm = self.torch.nn.utils.get_total_norm
            contestants += self._torch_threads(lambda: grads.torch, lambda box: (None, total_norm(box[0])))
        if self.optax:
            jitted = self.jax.jit(self.optax.global_norm)
            work = work_of(lambda tree: (None, jitted(tree)), False, self.jax.block_until_ready)
            contestants.append(Contestant("optax, jit", lambda: grads.jax, work))
        return contestants + (reads(grads.bytes) if self.others else [])

    def clip(self, grads: Grads, case: str) -> list[Contestant]:
        given_up, max_norm = "given up" in case, grads.norm * (2 if case.startswith("no clip") else 0.5)
        contestants = distclip_and_mlx(
            partial(clip_grad_norm, max_norm=max_norm),
            partial(optim.clip_grad_norm, max_norm=max_norm),
            grads.fresh_mlx if given_up else lambda: grads.mlx,
            given_up,
        )
        if self.torch:
            contestants += self._torch_clip(grads, max_norm, given_up)
        if self.optax:
            jitted = _jitted_clip(given_up)
            work = work_of(lambda tree: jitted(tree, max_norm), given_up, self.jax.block_until_ready)
            contestants.append(Contestant("optax, jit", grads.fresh_jax if given_up else lambda: grads.jax, work))
        if not self.others:
            return contestants
        source, target = np.ones(grads.bytes // 4, np.float32), np.zeros(grads.bytes // 4, np.float32)
        return [*contestants, *reads(grads.bytes), _floor("plain copy, 1 thread", lambda: np.copyto(target, source))]

    def _torch_clip(self, grads: Grads, max_norm: float, given_up: bool) -> list[Contestant]:
        def parameters() -> list[Any]:
            """A parameter without memory for each gradient, which holds a copy of it."""
            owners = []
            for gradient in grads.torch:
                owners.append(self.torch.zeros((), dtype=gradient.dtype).expand(gradient.shape))
                owners[-1].grad = gradient.clone()
            return owners

        def work(box: list[Any]) -> tuple[Any, Any]:
            owners = box[0] if given_up else parameters()
            return owners, self.torch.nn.utils.clip_grad_norm_(owners, max_norm)

        return self._torch_threads(parameters if given_up else lambda: None, work)

    def _torch_threads(self, fresh: Fresh, work: Work) -> list[Contestant]:
        def fresh_with(n: int) -> Any:
            self.torch.set_num_threads(n)
            self.torch.ones(1 << 18).add_(1)  # starts them
            return fresh()

        counts = [1] if (os.cpu_count() or 1) == 1 else [1, max(threads(), 2)]
        return [Contestant(f"torch, {n} thread{'s' if n > 1 else ''}", partial(fresh_with, n), work) for n in counts]


@cache
def _jitted_clip(given_up: bool) -> Any:
    """The same function for every threshold: XLA takes 20 s to compile it for 2,000 leaves."""
    import jax
    import optax

    def clip(tree: Any, max_norm: Any) -> tuple[Any, Any]:
        clipped, _ = optax.clip_by_global_norm(max_norm).update(tree, optax.EmptyState())
        return clipped, optax.global_norm(tree)

    return jax.jit(clip, donate_argnums=(0,) if given_up else ())


def norm_of(tree: Any, stream: Stream = None) -> tuple[Any, Any]:
    return [], global_norm(tree, stream=stream)


def distclip_and_mlx(ours: Callable[..., Any], mlx: Function, fresh: Fresh, given_up: bool) -> list[Contestant]:
    """distclip by each engine, by the first compiled as well, and MLX, eager and compiled.

    Args:
        ours: a function of gradients and ``stream=``.
    """
    first, *others = engines.available()
    functions: dict[str, Function] = {str(first): partial(ours, stream=first.stream), "MLX": mlx}
    own, compiled, *theirs = eager_and_compiled(functions, fresh, given_up)
    by_others = [engine.contestant(partial(ours, stream=engine.stream), fresh, given_up) for engine in others]
    return [own, compiled, *by_others, *theirs]


def reads(size: int) -> list[Contestant]:
    """Read as many bytes once, as an array of float32: with a single thread, and with as many as distclip has."""
    array = np.ones(size // 4, np.float32)
    floors = [_floor("plain read, 1 thread", lambda: np.dot(array, array))]
    if (n := threads()) > 1:
        blocks, pool = np.array_split(array, n), ThreadPoolExecutor(n)
        floors.append(_floor(f"plain read, {n} threads", lambda: list(pool.map(np.dot, blocks, blocks))))
    if mx.default_device() == mx.gpu:
        on_gpu, one = mx.array(array) * mx.array(1.0), mx.array(1.0)
        mx.eval(on_gpu)
        product = work_of(lambda x: (x * one, None), given_up=False)
        floors.append(Contestant("read and write on the GPU", lambda: on_gpu, product, floor=True, mlx=True))
    return floors


def _floor(name: str, act: Callable[[], Any]) -> Contestant:
    return Contestant(name, lambda: None, lambda _: (act(), None), floor=True)


def average_and_clip_over(world: World, grads: Grads, max_norm: float) -> list[Contestant]:
    functions = {
        "distclip": lambda tree: average_and_clip(tree, max_norm, group=world.group),
        "MLX": lambda tree: optim.clip_grad_norm(nn.average_gradients(tree, world.group), max_norm),
    }
    return [*eager_and_compiled(functions, grads.fresh_mlx), _all_reduce(world, grads)]


def clip_shards(world: World, grads: Grads, max_norm: float) -> list[Contestant]:
    functions = {"distclip": lambda tree: clip_grad_norm(tree, max_norm, group=world.group)}
    exists = mx.array(float(hasattr(nn_utils, "clip_grad_norm_sharded")))
    if mx.distributed.all_sum(exists, group=world.group).item() == world.size:  # else a rank would wait for the others
        functions["MLX"] = lambda tree: nn_utils.clip_grad_norm_sharded(tree, max_norm, world.group)
    return eager_and_compiled(functions, grads.fresh_mlx)


def _all_reduce(world: World, grads: Grads) -> Contestant:
    """As many bytes, one array of each type, which is given up."""
    sizes: Counter[str] = Counter()
    for leaf, dtype in grads.leaves:
        sizes[dtype] += leaf.size

    def fresh() -> list[mx.array]:
        arrays = [mx.ones((size,), getattr(mx, dtype)) for dtype, size in sizes.items()]
        mx.eval(arrays)
        return arrays

    def all_reduce(arrays: list[mx.array]) -> tuple[list[mx.array], None]:
        return [mx.distributed.all_sum(arrays.pop(), group=world.group) for _ in sizes], None

    return Contestant("bare all-reduce", fresh, work_of(all_reduce), floor=True)
