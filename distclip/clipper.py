"""Clipping as a service that stays in place for a whole run: a layout, a threshold, a policy, and counters."""

from __future__ import annotations

import socket
import warnings
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from distclip import noise
from distclip.check import check_first_clip, warn_of_replicas
from distclip.engine import kernels
from distclip.engine.streams import Stream, is_tracing
from distclip.groups import Groups, check_groups, members, names_of
from distclip.layout import Layout, Placed, Replicated, Sharded, place
from distclip.loss_scale import DynamicLossScale, LossScale, check_loss_scale, divisor, of_this_step, unscaled
from distclip.norm import check_norm_type
from distclip.policy import bad_leaves, check_policy, raise_if_bad, scale_of, scale_of_groups
from distclip.report import Report
from distclip.schedule import callers_level
from distclip.step import Step
from distclip.thresholds import Threshold, threshold_of
from distclip.tree import Leaves, flatten_beside
from distclip.world import gather_text, init

POLICIES = ("skip", "zero", "propagate", "raise")


class Clipper:
    """Clip gradients by their global norm, step after step.

    Callable in a training loop and, with ``clipper.state`` among the compiled function's inputs and outputs, inside
    ``mx.compile``. A step takes one small collective at most, with every option.

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
        max_consecutive_skips (int, optional): with ``"skip"``, how many bad steps in a row are allowed; the call after
            one more raises. Each call evaluates the counters of the last step to know; None never does.
        groups: norms of groups of leaves in the report: names with patterns of paths, such as
            ``{"attention": "*.self_attn.*"}`` (the first that matches counts, the rest is ``"other"``), or a function
            from a path to a name.
        loss_scale (float, scalar array or DynamicLossScale, optional): the loss was multiplied by it; norm and
            threshold are of the gradients without it, and it is divided out. float16 gradients become float32, since
            float16 cannot hold what the scale has saved. One that changes is given with each call, or dynamic.
        check (str): ``"first"``: compare the gradients of the first call with the layout, where the ranks agree on a
            norm (not inside ``mx.compile``, where values cannot be looked at). It raises where all are equal and
            called sharded, or trees and layouts are at odds, and warns of what :func:`distclip.check_layout` would
            raise for otherwise, drift apart. ``"never"``.
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
        loss_scale: LossScale = None,
        check: str = "first",
        rank_batch: int | None = None,
        stream: Stream = None,
    ) -> None:
        self._threshold: Threshold = threshold_of(max_norm)
        check_policy(nonfinite, POLICIES)
        if check not in ("first", "never"):
            raise ValueError(f"check should be 'first' or 'never', not {check!r}")
        if (most := max_consecutive_skips) is not None and most < 0:
            raise ValueError(f"max_consecutive_skips should be at least 0, {most} was provided instead")
        check_groups(groups)
        check_loss_scale(loss_scale, nonfinite)
        check_norm_type(norm_type)
        if norm_type not in (1, 2) and (groups is not None or self._threshold.per_group or rank_batch is not None):
            raise ValueError(f"groups, rank_batch and AdaGC need norm_type 1 or 2, {norm_type} was provided instead")
        if rank_batch is not None and (average is False or rank_batch < 1 or norm_type != 2):
            raise ValueError(
                "rank_batch is the rows of each rank's batch (at least 1), and needs average and norm_type 2"
            )
        if self._threshold.per_group and groups is None:
            groups = str  # each leaf is a group
        self._layout = layout if layout is not None else Sharded() if average is False else Replicated()
        self._by_default = layout is None and average is False
        self._group, self._average, self._norm_type = group, average, norm_type
        self.nonfinite, self.max_consecutive_skips = nonfinite, max_consecutive_skips
        self._groups, self._loss_scale, self._rows, self._stream = groups, loss_scale, rank_batch, stream
        self._check = check == "first"
        self.names: list[str] = []
        self.hosts: list[str] = []
        self._members: tuple[list[str], mx.array] | None = None  # the paths of the last step's leaves, and their groups
        self._warned: set[int] = set()  # ranks whose norm is far above the others', while it is
        self._state: dict[str, Any] = {name: mx.array(0, mx.int32) for name in ("step", "clipped", "bad", "in_a_row")}
        if groups is None or not callable(groups):  # else the first call finds the names
            self._learn(names_of([], groups, init().group))
        if isinstance(loss_scale, DynamicLossScale):
            self.state["loss_scale"] = loss_scale.init()
        if rank_batch is not None:
            self.state["noise"] = noise.init((self._averages_over() or init().group).size())

    @property
    def loss_scale(self) -> float | mx.array:
        """What to multiply the loss of this step by; 1 without a loss scale."""
        return of_this_step(self._loss_scale, self.state)

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
        """Clip the gradients of a step. Collective, as :func:`distclip.clip_grad_norm` is; lazy, except for
        the counters of the last step (``max_consecutive_skips``), ``"raise"``, and with several ranks and a GPU.

        Returns:
            (tree, Report): the gradients in the same tree, floating types kept (with a loss scale float16 becomes
            float32), integers as float32; and what was done.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` bad steps in a row; or with ``"raise"``.
            LayoutError, TypeError: see :func:`distclip.check_layout`, :func:`distclip.global_norm`.
        """
        clipped, report, _ = self.clip(grads, loss_scale=loss_scale)
        return clipped, report

    def clip(self, grads: Any, *, loss_scale: float | mx.array | None = None) -> tuple[Any, Report, bool | None]:
        """As calling it. The last of the results says whether all is finite; None where that is not evaluated yet."""
        if self.max_consecutive_skips is not None:
            self.settle()
        scaled_by = divisor(loss_scale, self._loss_scale, self.state)
        over = self._averages_over()
        named = self._groups is not None or self._check or (over is not None and over.size() > 1)
        placed = place(grads, self._layout, self._group, named=named)
        self._prepare(placed.leaves)
        step = Step(
            placed,
            average=over,
            norm_type=self._norm_type,
            members=self._members_of(placed.leaves),
            groups=len(self.names),
            rank_norms=self._rows is not None,
            stream=self._stream,
        )
        norms, finite, rank_norms = step.norms()
        with step.schedule.arithmetic():
            if scaled_by is not None:
                norms, finite, rank_norms = unscaled(norms, finite, rank_norms, scaled_by)
            if self.nonfinite == "raise":
                raise_if_bad(placed, norms[0], finite, self._norm_type, averaged=over)
            arrays = self._take(norms, finite, rank_norms)
            factor, flag = self._factor(arrays, scaled_by)
        clipped = step.scaled(factor, flag, widen=scaled_by is not None)
        if self._check:
            self._check = False
            self._check_once(placed, clipped)
        known = bool(finite.item()) if step.schedule.waits else None
        return placed.leaves.rebuild(clipped), self.report(arrays), known

    def _take(self, norms: mx.array, finite: mx.array, rank_norms: mx.array | None) -> dict[str, mx.array]:
        """Take the norms of a step into the state, and return the arrays of its report."""
        norm, done = norms[0], self.state["step"]
        if self.nonfinite == "skip":
            done = done - self.state["bad"]  # a schedule waits, as the optimizer's do
        threshold, following = self._threshold.update(self.state["threshold"], norm, norms[1:], done)
        per_group = self._threshold.per_group
        scale = scale_of_groups(norms[1:], threshold, norm) if per_group else scale_of(norm, threshold)
        skipped = mx.logical_and(mx.logical_not(finite), mx.array(self.nonfinite == "skip"))
        arrays = {"norm": norm, "threshold": threshold, "scale": scale, "finite": finite, "skipped": skipped}
        arrays["clipped"] = mx.logical_and(finite, mx.any(scale < 1))
        arrays["step"] = self.state["step"] + 1
        if self._groups is not None:
            arrays["group_norms"] = norms[1:]
        if rank_norms is not None:
            arrays["rank_norms"] = rank_norms
            if rank_norms.shape[0] > 1:
                seen = noise.update(self.state["noise"], rank_norms, norm, self._rows or 1)
                arrays["noise_scale"] = seen[0]
                self.state["noise"].update(seen[1])
        bad = mx.logical_not(finite).astype(mx.int32)
        self.state["step"] = arrays["step"]
        self.state["clipped"] = self.state["clipped"] + arrays["clipped"].astype(mx.int32)
        self.state["bad"] = self.state["bad"] + bad
        self.state["in_a_row"] = (self.state["in_a_row"] + bad) * bad
        self.state["threshold"].update(following)
        return arrays

    def _factor(self, arrays: dict[str, mx.array], scaled_by: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """What the gradients are multiplied by, and the flag that makes them zeros where it is False, if any."""
        factor, finite = arrays["scale"], arrays["finite"]
        if scaled_by is not None:
            factor, arrays["loss_scale"] = factor / scaled_by, scaled_by
        if isinstance(self._loss_scale, DynamicLossScale):
            self.state["loss_scale"].update(self._loss_scale.update(self.state["loss_scale"], finite))
        # Who evaluates gradients or parameters alone evaluates the counters too, so that they never pile up.
        state: Any = tree_flatten(self.state)
        (factor,) = mx.depends([factor], [value for _, value in state])
        return factor, finite if self.nonfinite in ("zero", "skip") else None

    def report(self, arrays: dict[str, mx.array]) -> Report:
        """The report of arrays that a compiled function returned: ``return loss, report.arrays``."""
        return Report(arrays, self.names, self.hosts)

    def settle(self) -> None:
        """Evaluate the counters of the last step, and raise if too many steps in a row were skipped.

        It also warns when the norm of one rank was far above the others' for many steps, naming rank and host. Calling
        the clipper does it first; compiled loops do it where they wait anyway. Inside ``mx.compile`` it does nothing.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` in a row.
        """
        try:
            mx.eval(self.state)
            in_a_row = int(self.state["in_a_row"].item())
        except ValueError:  # the arrays of a function that is being compiled have no values
            return
        if "noise" in self.state:
            self._warn_of_far_ranks(self.state["noise"]["far"].tolist())
        most = self.max_consecutive_skips
        if self.nonfinite == "skip" and most is not None and in_a_row > most:
            raise FloatingPointError(
                f"{in_a_row} steps in a row, up to step {self.state['step'].item()}, had a norm that is not finite and "
                f"were skipped; max_consecutive_skips is {most}. The run does not recover by itself: lower the "
                "learning rate or the loss scale, look for bad data, or resume from a checkpoint "
                "(clipper.explain(grads) names ranks and leaves)."
            )

    def explain(self, grads: Any) -> str:
        """Which ranks, on which hosts, hold values that are not finite, and in which leaves. Collective: every rank of
        the group calls it with its gradients, for instance where ``report.finite`` is False, which all see alike."""
        mine = ", ".join(bad_leaves(Leaves(grads, named=True), self._norm_type))
        lines = []
        for rank, text in enumerate(gather_text(f"{socket.gethostname()}\n{mine}", self._world())):
            host, _, leaves = text.partition("\n")
            if leaves:
                lines.append(f"rank {rank} on {host}: {leaves}")
        return "\n".join(lines) or "every value is finite"

    def prepare(self, grads: Any) -> None:
        """Learn the names of groups that a function gives, and so the shapes of the state, from a tree like the
        gradients (the trainable parameters are). Collective. Calling the clipper does it; ``mx.compile`` needs it
        before. On a GPU it also proves that the kernels work there, which evaluates a small tree once."""
        kernels.engine(self._stream)
        self._prepare(Leaves(grads, named=not self.names))

    def check_parameters(self, grads: Any, parameters: Any) -> None:
        """Warn, before the first call, if the parameters of gradients look like replicas and no layout was given."""
        if self._check and self._by_default:
            leaves, values = flatten_beside(grads, parameters)
            warn_of_replicas(place(leaves.rebuild(values), self._layout, self._group, named=True))

    def _prepare(self, leaves: Leaves) -> None:
        if not self.names:
            self._learn(names_of(leaves.paths, self._groups, self._world()))
        if self._rows is not None and not self.hosts:
            self.hosts = gather_text(socket.gethostname(), self._averages_over() or self._world())

    def _members_of(self, leaves: Leaves) -> mx.array | None:
        """The group of each leaf, int32, shape (leaves,); worked out again when the leaves have changed."""
        if self._groups is None:
            return None
        if self._members is None or self._members[0] != leaves.paths:
            self._members = leaves.paths, mx.array(members(leaves.paths, self._groups, self.names), mx.int32)
        return self._members[1]

    def _check_once(self, placed: Placed, clipped: list[mx.array]) -> None:
        if placed.agreed is None:
            return
        warning: object = (
            "The layout was not checked, since the first call was inside mx.compile. Call "
            "distclip.check_layout(grads, layout) once outside, or pass check='never'."
        )
        if not is_tracing():  # the norm's collective, in the state, comes first on a rank without leaves too
            warning = check_first_clip(placed, clipped, self.state)
        if warning is not None:
            warnings.warn(str(warning), RuntimeWarning, stacklevel=callers_level())

    def _warn_of_far_ranks(self, far: list[int]) -> None:
        for rank, steps in enumerate(far):
            if steps < noise.FAR_STEPS:
                self._warned.discard(rank)
            elif rank not in self._warned:
                self._warned.add(rank)
                host = f" on {self.hosts[rank]}" if self.hosts else ""
                warnings.warn(
                    f"The gradient norm of rank {rank}{host} has been more than {noise.FAR:g} times the ranks' median "
                    f"for {steps} steps: look at its data, and at its memory.",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _learn(self, names: list[str]) -> None:
        self.names = names
        if not self.state.get("threshold"):
            self.state["threshold"] = self._threshold.init(len(names))

    def _world(self) -> mx.distributed.Group:
        return init().group if self._group is None else self._group

    def _averages_over(self) -> mx.distributed.Group | None:
        if isinstance(self._average, bool):
            return init().group if self._average else None
        return self._average
