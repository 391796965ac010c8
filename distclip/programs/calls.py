"""What a program does with its gradients before its optimizer gets them, by the functions that it calls."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from distclip import adaptive, average, clip
from distclip.clipper import Clipper
from distclip.engine.streams import is_tracing
from distclip.mesh import as_group
from distclip.programs.patches import Function, Patches
from distclip.world import init

AVERAGES = "averages"
OF_ALL = "averages the gradients of all ranks"
CLIPS = "clips"
TALKS = "talks"  # to other ranks, in another way


class Calls:
    """The calls since the last step of an optimizer.

    Attributes:
        clips (set of str): the functions that clip gradients which were called.
    """

    def __init__(self) -> None:
        self._kinds: set[tuple[str, bool]] = set()  # and whether MLX traced
        self.clips: set[str] = set()

    def averages(self, *, traced: bool) -> bool:
        """Whether the program may have averaged its gradients: in the function that MLX traces, or outside of one."""
        return (AVERAGES, traced) in self._kinds

    @property
    def averages_all(self) -> bool:
        """Whether all ranks have averaged their gradients, outside of a function that MLX traces, and so make a step:
        of other programs only some may, and the rest would not join a collective."""
        return (OF_ALL, False) in self._kinds

    @property
    def communicates(self) -> bool:
        return any(kind != CLIPS for kind, _ in self._kinds)

    def note(self, kinds: tuple[str, ...], name: str) -> None:
        traced = is_tracing()
        self._kinds.update((kind, traced) for kind in kinds)
        if CLIPS in kinds:
            self.clips.add(name)

    def forget(self) -> None:
        self._kinds.clear()
        self.clips.clear()


def listen(calls: Calls, patches: Patches, counts: Callable[[], bool]) -> None:
    """Note the calls of functions that average and clip, while ``counts()`` holds."""

    def noting(original: Function, kinds: tuple[str, ...], name: str) -> Function:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if counts():
                of_all = OF_ALL not in kinds or _is_of_all(original, args, kwargs)
                calls.note(kinds if of_all else tuple(kind for kind in kinds if kind != OF_ALL), name)
            return original(*args, **kwargs)

        return call

    functions = [(original, noting(original, kinds, name)) for original, kinds, name in _functions()]
    patches.functions(functions)
    patches.method(Clipper, "clip", lambda original: noting(original, (CLIPS,), "dc.Clipper"))


def _is_of_all(average: Function, args: Any, kwargs: Any) -> bool:
    group = inspect.signature(average).bind(*args, **kwargs).arguments.get("group")
    return as_group(group).size() == init().size


def _functions() -> list[tuple[Function, tuple[str, ...], str]]:
    """The functions, of what kinds they are, and how a user calls them."""
    found: list[tuple[Function, tuple[str, ...], str]] = [
        (nn.average_gradients, (AVERAGES, OF_ALL), "nn.average_gradients"),
        (average.average_gradients, (AVERAGES, OF_ALL), "dc.average_gradients"),
        (average.average_and_clip, (AVERAGES, OF_ALL, CLIPS), "dc.average_and_clip"),
        (optim.clip_grad_norm, (CLIPS,), "mlx.optimizers.clip_grad_norm"),
        (clip.clip_grad_norm, (CLIPS,), "dc.clip_grad_norm"),
        (clip.clip_grad_value, (CLIPS,), "dc.clip_grad_value"),
        (clip.clip_grads_with_norm, (CLIPS,), "dc.clip_grads_with_norm"),
        (adaptive.adaptive_clip_grad, (CLIPS,), "dc.adaptive_clip_grad"),
    ]
    if hasattr(nn.utils, "clip_grad_norm_sharded"):
        found.append((nn.utils.clip_grad_norm_sharded, (CLIPS,), "nn.utils.clip_grad_norm_sharded"))
    for name in ("all_sum", "sum_scatter", "all_gather", "send", "recv", "recv_like"):
        kind = AVERAGES if "sum" in name else TALKS
        found.append((getattr(mx.distributed, name), (kind,), f"mx.distributed.{name}"))
    return found


def value_clip() -> str | None:
    """The limit by value of a trainer of mlx-vlm that is making this step, as the trainer calls it: no function of it
    can be seen."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("mlx_vlm."):
            limit = getattr(frame.f_locals.get("args"), "grad_clip", None)
            if limit is not None:
                return f"mlx-vlm's grad_clip={limit}"
        frame = frame.f_back
    return None
