"""Gradient clipping by the true global norm, for MLX models trained over several processes."""

from distclip.adaptive import adaptive_clip_grad as adaptive_clip_grad
from distclip.average import average_and_clip as average_and_clip
from distclip.average import average_gradients as average_gradients
from distclip.check import check_layout as check_layout
from distclip.clip import clip_grad_norm as clip_grad_norm
from distclip.clip import clip_grad_value as clip_grad_value
from distclip.clip import clip_grads_with_norm as clip_grads_with_norm
from distclip.clipper import Clipper as Clipper
from distclip.layout import LayoutError as LayoutError
from distclip.layout import Replicated as Replicated
from distclip.layout import Sharded as Sharded
from distclip.layout import layout_of as layout_of
from distclip.norm import global_norm as global_norm
from distclip.optimizer import ClippedOptimizer as ClippedOptimizer
from distclip.outcome import Report as Report
from distclip.record import Recorder as Recorder
from distclip.record import read_records as read_records
from distclip.thresholds import AdaGC as AdaGC
from distclip.thresholds import AutoClip as AutoClip
from distclip.thresholds import ZClip as ZClip
from distclip.watchdog import Watchdog as Watchdog
from distclip.world import Mesh as Mesh
from distclip.world import World as World
from distclip.world import init as init
