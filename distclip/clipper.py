"""Clipping as a service that stays in place for a whole run: a layout, a threshold, a policy, and counters."""

from __future__ import annotations

import math
import socket
import warnings
from typing import Any

import mlx.core as mx

from distclip import noise
from distclip.check import check_layout
from distclip.engine.operations import Stream
from distclip.gather import gather_text
from distclip.groups import Groups, check_groups, members, names_of
from distclip.layout import Layout, Replicated, Sharded
from distclip.policy import bad_leaves, raise_if_bad, scale_of
from distclip.report import Report
from distclip.step import Step
from distclip.thresholds import Threshold, threshold_of
from distclip.tree import tree_leaves
from distclip.world import init

POLICIES = ("skip", "zero", "propagate", "raise")


class Clipper:
    """Clip gradients by their global norm, step after step.

    Callable in a training loop and, with ``clipper.state`` among the compiled function's inputs and outputs, inside
    ``mx.compile``. A step takes one small collective at most, whatever is asked for.

        >>> import mlx.core as mx
        >>> clipper = Clipper(max_norm=1.0)
        >>> grads, report = clipper({"w": mx.array([3.0, 4.0])})
        >>> print(report.norm.item(), report.clipped.item())
        5.0 True

    Args:
        max_norm: the threshold: a number, a scalar array, a schedule of MLX (step -> number), or a rule that learns it
            (:class:`distclip.AutoClip`, :class:`distclip.ZClip`, :class:`distclip.AdaGC`).
        layout: where the leaves are, as in :func:`distclip.clip_grad_norm`. Default: ``Sharded()``; ``Replicated()``
            with ``average``.
        group (mlx.core.distributed.Group, optional): the ranks that hold the gradient together. Default: the world.
        average: ``True``, or a group (``mesh.group("dp")``): the gradients are partial over the world, or over that
            group, and are averaged first, as by :func:`distclip.average_and_clip`. Default: ``False``.
        norm_type (float): as in :func:`distclip.clip_grad_norm`. Groups and thresholds per group need 1 or 2.
        nonfinite (str): what a norm that is not finite does, on every rank alike. ``"skip"``: the gradients become
            zeros and the step is counted; with :class:`distclip.ClippedOptimizer` parameters and optimizer state stay
            as they were, to the bit. ``"zero"``: zeros, and no more. ``"propagate"``, ``"raise"``: as in
            :func:`distclip.clip_grad_norm`.
        max_consecutive_skips (int, optional): with ``"skip"``, so many bad steps in a row are borne, and the next call
            after one more raises. Looks at the last step's counters in each call; None never looks.
        groups: norms of groups of leaves in the report: names with patterns of paths, such as
            ``{"attention": "*.self_attn.*"}`` (the first that matches counts, the rest is ``"other"``), or a function
            from a path to a name.
        loss_scale (float or scalar array, optional): the loss was multiplied by it; norm and threshold are of the
            gradients without it, and it is divided out. May be given with each call instead.
        check (str): ``"first"``: :func:`distclip.check_layout` on the gradients of the first call (not inside
            ``mx.compile``, where values cannot be looked at). ``"never"``.
        rank_batch (int, optional): with ``average``, the rows of the batch that each rank's gradient is the mean of:
            the report then has the ranks' own norms before averaging and the gradient noise scale in rows, and a rank
            whose norm stays far above the others' is named in a warning.
        stream (mlx.core.Stream, optional): as in :func:`distclip.clip_grad_norm`.

    Attributes:
        state (dict): arrays only, the same on every rank: save it with the optimizer's, restore it into the same
            dictionary (or assign it), hand it to ``mx.compile``.
        names (list of str): of the groups, once known.

    Raises:
        ValueError, TypeError: an argument is not what it should be.
    """

    def __init__(
        self,
        max_norm: Any = 1.0,
        *,
        layout: Layout = None,
        group: mx.distributed.Group | None = None,
        average: bool | mx.distributed.Group = False,
        norm_type: float = 2.0,
        nonfinite: str = "skip",
        max_consecutive_skips: int | None = 10,
        groups: Groups | None = None,
        loss_scale: float | mx.array | None = None,
        check: str = "first",
        rank_batch: int | None = None,
        stream: Stream = None,
    ) -> None:
        self._threshold: Threshold = threshold_of(max_norm)
        if nonfinite not in POLICIES:
            raise ValueError(f"nonfinite should be one of {', '.join(map(repr, POLICIES))}, not {nonfinite!r}")
        if check not in ("first", "never"):
            raise ValueError(f"check should be 'first' or 'never', not {check!r}")
        if max_consecutive_skips is not None and max_consecutive_skips < 0:
            raise ValueError(
                f"max_consecutive_skips should be at least 0, {max_consecutive_skips} was provided instead"
            )
        check_groups(groups)
        _check_loss_scale(loss_scale)
        if not norm_type > 0:
            raise ValueError(f"norm_type should be > 0 or math.inf, {norm_type} was provided instead")
        if norm_type not in (1, 2) and (groups is not None or self._threshold.per_group or rank_batch is not None):
            raise ValueError(f"groups, rank_batch and AdaGC need norm_type 1 or 2, {norm_type} was provided instead")
        if rank_batch is not None and (average is False or rank_batch < 1 or norm_type != 2):
            raise ValueError(
                "rank_batch is the rows of each rank's batch (at least 1), and needs average and norm_type 2"
            )
        if self._threshold.per_group and groups is None:
            groups = str  # each leaf is a group
        self._layout = layout if layout is not None else Sharded() if average is False else Replicated()
        self._group, self._average, self._norm_type = group, average, norm_type
        self.nonfinite, self.max_consecutive_skips = nonfinite, max_consecutive_skips
        self._groups, self._loss_scale, self._rows, self._stream = groups, loss_scale, rank_batch, stream
        self._check = check == "first"
        self.names: list[str] = []
        self.hosts: list[str] = []
        self._told: set[int] = set()  # ranks of which was said that they are far out
        self._state: dict[str, Any] = {name: mx.array(0, mx.int32) for name in ("step", "clipped", "bad", "in_a_row")}
        if groups is None or not callable(groups):  # else the number of groups is found in the first call
            self._learn(names_of({}, groups, init().group))
        if rank_batch is not None:
            self.state["noise"] = noise.init((self._averages_over() or init().group).size())

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        # Into the containers that are there, which a compiled function may hold; files do not keep empty ones.
        for name, value in {"threshold": {}, **state}.items():
            if isinstance(value, dict):
                self._state.setdefault(name, {}).update(value)
            else:
                self._state[name] = value

    def __call__(self, grads: Any, *, loss_scale: float | mx.array | None = None) -> tuple[Any, Report]:
        """Clip the gradients of a step. Collective, as :func:`distclip.clip_grad_norm` is; lazy but for what looks at
        the step before (``max_consecutive_skips``) and ``"raise"``.

        Returns:
            (tree, Report): the gradients in the same tree, floating types kept, integers as float32; and what was done.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` bad steps in a row; or with ``"raise"``.
            LayoutError, TypeError: see :func:`distclip.check_layout`, :func:`distclip.global_norm`.
        """
        return self.clip(grads, loss_scale=loss_scale)

    def clip(
        self, grads: Any, *, loss_scale: float | mx.array | None = None, keep_bad: bool = False
    ) -> tuple[Any, Report]:
        """As calling it; ``keep_bad`` leaves the gradients of a skipped step as they are, rather than zeros."""
        self.settle()
        self.prepare(grads)
        _check_loss_scale(loss_scale)
        scaled_by = self._loss_scale if loss_scale is None else loss_scale
        over = self._averages_over()
        member = None if self._groups is None else members(grads, self._groups, self.names)
        own_wanted = self._rows is not None
        step = Step(
            *(grads, self._layout, self._world(), over, self._norm_type),
            *(member, len(self.names), own_wanted, self._stream),
        )
        norms, finite, own = step.norms()
        if scaled_by is not None:
            norms = norms / mx.array(scaled_by, mx.float32)
            own = None if own is None else own / mx.array(scaled_by, mx.float32)
        norm = norms[0]
        if self.nonfinite == "raise":
            # Once averaged, the gradient of every rank is bad.
            raise_if_bad(grads, step.agreed or step.over, norm, finite, self._norm_type)

        done = self.state["step"]
        if self.nonfinite == "skip":
            done = done - self.state["bad"]  # a schedule waits, as the optimizer's do
        threshold, following = self._threshold.update(self.state["threshold"], norm, norms[1:], done)
        per_group = self._threshold.per_group
        scale = _scale_of_groups(norms[1:], threshold, norm) if per_group else scale_of(norm, threshold)
        skipped = mx.logical_and(mx.logical_not(finite), mx.array(self.nonfinite == "skip"))
        report = {"norm": norm, "threshold": threshold, "scale": scale, "finite": finite, "skipped": skipped}
        report["clipped"] = mx.logical_and(finite, mx.any(scale < 1))
        report["step"] = self.state["step"] + 1
        if self._groups is not None:
            report["group_norms"] = norms[1:]
        if own is not None:
            report["rank_norms"] = own
            if own.shape[0] > 1:
                report["noise_scale"], spread = noise.update(self.state["noise"], own, norm, self._rows or 1)
                self.state["noise"].update(spread)
                report["far"] = spread["far"]
        self._count(report, following)
        factor = scale if scaled_by is None else scale / mx.array(scaled_by, mx.float32)
        if keep_bad and self.nonfinite == "skip":
            factor = mx.where(finite, factor, 1.0)
        # Who evaluates gradients or parameters alone evaluates the counters too, so that they never pile up.
        (factor,) = mx.depends([factor], [value for _, value in tree_leaves(self.state)])
        zero = self.nonfinite == "zero" or (self.nonfinite == "skip" and not keep_bad)
        clipped = step.scaled(factor, finite if zero else None)
        if self._check:
            self._check = False
            self._check_once(clipped)
        return clipped, Report(report, self.names, self.hosts, self._told)

    def report(self, arrays: dict[str, mx.array]) -> Report:
        """The report of arrays that a compiled function returned: ``return loss, report.arrays``."""
        return Report(arrays, self.names, self.hosts, self._told)

    def settle(self) -> None:
        """Evaluate the counters of the last step, and raise if too many steps in a row were skipped.

        Calling the clipper does it first; compiled loops do it where they wait anyway. Inside ``mx.compile`` it does
        nothing.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` in a row.
        """
        if self.max_consecutive_skips is None:
            return
        try:
            mx.eval(self.state)
            in_a_row = int(self.state["in_a_row"].item())
        except ValueError:  # the arrays of a function that is being compiled have no values
            return
        if self.nonfinite == "skip" and in_a_row > self.max_consecutive_skips:
            raise FloatingPointError(
                f"{in_a_row} steps in a row, up to step {self.state['step'].item()}, had a norm that is not finite and "
                f"were skipped; max_consecutive_skips is {self.max_consecutive_skips}. The run does not recover by "
                "itself: lower the learning rate or the loss scale, look for bad data, or resume from a checkpoint "
                "(clipper.explain(grads) names ranks and leaves)."
            )

    def explain(self, grads: Any) -> str:
        """Which ranks, on which hosts, hold values that are not finite, and in which leaves. Collective: every rank of
        the group calls it with its gradients, for instance where ``report.finite`` is False, which all see alike."""
        mine = ", ".join(bad_leaves(grads, self._norm_type))
        told = gather_text(f"{socket.gethostname()}\n{mine}", self._world())
        lines = []
        for rank, text in enumerate(told):
            host, _, leaves = text.partition("\n")
            if leaves:
                lines.append(f"rank {rank} on {host}: {leaves}")
        return "\n".join(lines) or "every value is finite"

    def prepare(self, grads: Any) -> None:
        """Learn the names of groups that a function gives, and so the shapes of the state, from a tree like the
        gradients (the trainable parameters are). Collective. Calling the clipper does it; ``mx.compile`` needs it
        before."""
        if not self.names:
            self._learn(names_of(grads, self._groups, self._world()))
        if self._rows is not None and not self.hosts:
            self.hosts = gather_text(socket.gethostname(), self._averages_over() or self._world())

    def _check_once(self, clipped: Any) -> None:
        try:
            mx.eval(self.state)  # the norm's collective comes first on a rank without leaves too
            check_layout(clipped, self._layout, group=self._group)
        except ValueError as error:
            if "transformation" not in str(error):  # of MLX: arrays of a function that is being compiled have no values
                raise
            warnings.warn(
                "The layout was not checked, since the first call was inside mx.compile. Call "
                "distclip.check_layout(grads, layout) once outside, or pass check='never'.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _learn(self, names: list[str]) -> None:
        self.names = names
        if not self.state.get("threshold"):
            self.state["threshold"] = self._threshold.init(len(names))

    def _count(self, report: dict[str, mx.array], threshold: dict[str, mx.array]) -> None:
        bad = mx.logical_not(report["finite"]).astype(mx.int32)
        self.state["step"] = report["step"]
        self.state["clipped"] = self.state["clipped"] + report["clipped"].astype(mx.int32)
        self.state["bad"] = self.state["bad"] + bad
        self.state["in_a_row"] = (self.state["in_a_row"] + bad) * bad
        self.state["threshold"].update(threshold)

    def _world(self) -> mx.distributed.Group:
        return init().group if self._group is None else self._group

    def _averages_over(self) -> mx.distributed.Group | None:
        if isinstance(self._average, bool):
            return init().group if self._average else None
        return self._average


def _check_loss_scale(loss_scale: float | mx.array | None) -> None:
    if loss_scale is not None and not isinstance(loss_scale, mx.array) and not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale should be > 0, {loss_scale} was provided instead")


def _scale_of_groups(norms: mx.array, limits: mx.array, whole: mx.array) -> mx.array:
    """``min(1, limit / norm)`` for each group; a group's norm may be far below 1e-6."""
    limited = mx.where(norms <= limits, 1.0, limits / norms)
    return mx.where(mx.isnan(whole), whole, limited)
