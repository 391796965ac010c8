"""Gradient clipping by the true global norm, for MLX models trained over several processes."""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from distclip.adaptive import adaptive_clip_grad as adaptive_clip_grad
    from distclip.average import average_and_clip as average_and_clip
    from distclip.average import average_gradients as average_gradients
    from distclip.check import check_layout as check_layout
    from distclip.clip import clip_grad_norm as clip_grad_norm
    from distclip.clip import clip_grad_value as clip_grad_value
    from distclip.clip import clip_grads_with_norm as clip_grads_with_norm
    from distclip.clipper import Clipper as Clipper
    from distclip.layers import layout_of as layout_of
    from distclip.layers import shapes_of as shapes_of
    from distclip.layout import LayoutError as LayoutError
    from distclip.layout import Partial as Partial
    from distclip.layout import Replicated as Replicated
    from distclip.layout import Sharded as Sharded
    from distclip.loss_scale import DynamicLossScale as DynamicLossScale
    from distclip.mesh import Mesh as Mesh
    from distclip.norm import global_norm as global_norm
    from distclip.optimizer import ClippedOptimizer as ClippedOptimizer
    from distclip.programs.every_optimizer import clipped_optimizers as clipped_optimizers
    from distclip.records.read import read_records as read_records
    from distclip.records.write import Recorder as Recorder
    from distclip.report import Report as Report
    from distclip.slope import check_gradient as check_gradient
    from distclip.spikes import Spike as Spike
    from distclip.thresholds import AdaGC as AdaGC
    from distclip.thresholds import AutoClip as AutoClip
    from distclip.thresholds import ZClip as ZClip
    from distclip.watchdog import Watchdog as Watchdog
    from distclip.world import World as World
    from distclip.world import init as init

    __version__: str

# The public names of each module. A module is imported when a name of it is first used (PEP 562), so that the command
# line starts where MLX is missing or broken.
_PUBLIC = {
    "adaptive": "adaptive_clip_grad",
    "average": "average_and_clip average_gradients",
    "check": "check_layout",
    "clip": "clip_grad_norm clip_grad_value clip_grads_with_norm",
    "clipper": "Clipper",
    "programs.every_optimizer": "clipped_optimizers",
    "layers": "layout_of shapes_of",
    "layout": "LayoutError Partial Replicated Sharded",
    "loss_scale": "DynamicLossScale",
    "mesh": "Mesh",
    "norm": "global_norm",
    "optimizer": "ClippedOptimizer",
    "records.read": "read_records",
    "records.write": "Recorder",
    "report": "Report",
    "slope": "check_gradient",
    "spikes": "Spike",
    "thresholds": "AdaGC AutoClip ZClip",
    "watchdog": "Watchdog",
    "world": "World init",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _importlib.import_module("importlib.metadata").version("distclip")
    if name not in _MODULES:
        raise AttributeError(f"module 'distclip' has no attribute '{name}'")
    value = globals()[name] = getattr(_importlib.import_module(f"distclip.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
