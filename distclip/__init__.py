"""Gradient clipping by the true global norm, for MLX models trained over several processes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from distclip.adaptive import adaptive_clip_grad
    from distclip.average import average_and_clip, average_gradients
    from distclip.check import check_layout
    from distclip.clip import clip_grad_norm, clip_grad_value, clip_grads_with_norm
    from distclip.clipper import Clipper
    from distclip.layout import LayoutError, Replicated, Sharded, layout_of
    from distclip.mesh import Mesh
    from distclip.norm import global_norm
    from distclip.optimizer import ClippedOptimizer
    from distclip.records.read import read_records
    from distclip.records.write import Recorder
    from distclip.report import Report
    from distclip.thresholds import AdaGC, AutoClip, ZClip
    from distclip.watchdog import Watchdog
    from distclip.world import World, init

__all__ = [
    "AdaGC",
    "AutoClip",
    "ClippedOptimizer",
    "Clipper",
    "LayoutError",
    "Mesh",
    "Recorder",
    "Replicated",
    "Report",
    "Sharded",
    "Watchdog",
    "World",
    "ZClip",
    "adaptive_clip_grad",
    "average_and_clip",
    "average_gradients",
    "check_layout",
    "clip_grad_norm",
    "clip_grad_value",
    "clip_grads_with_norm",
    "global_norm",
    "init",
    "layout_of",
    "read_records",
]

# The module of each public name. It is imported when the name is first used (PEP 562), so that the command line starts
# where MLX is missing or broken.
_MODULES = {
    "AdaGC": "thresholds",
    "AutoClip": "thresholds",
    "ClippedOptimizer": "optimizer",
    "Clipper": "clipper",
    "LayoutError": "layout",
    "Mesh": "mesh",
    "Recorder": "records.write",
    "Replicated": "layout",
    "Report": "report",
    "Sharded": "layout",
    "Watchdog": "watchdog",
    "World": "world",
    "ZClip": "thresholds",
    "adaptive_clip_grad": "adaptive",
    "average_and_clip": "average",
    "average_gradients": "average",
    "check_layout": "check",
    "clip_grad_norm": "clip",
    "clip_grad_value": "clip",
    "clip_grads_with_norm": "clip",
    "global_norm": "norm",
    "init": "world",
    "layout_of": "layout",
    "read_records": "records.read",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("distclip")
    if name not in _MODULES:
        raise AttributeError(f"module 'distclip' has no attribute '{name}'")
    value = getattr(import_module(f"distclip.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
