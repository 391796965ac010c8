"""Clipping as a service that stays in place for a whole run: a layout, a threshold, a policy, and counters."""

from __future__ import annotations

import socket
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from distclip import noise
from distclip.arguments import check_gradients, described, whole
from distclip.average import check_communication_dtype
from distclip.check import check_first_step, warn_of_replicas
from distclip.engine import kernels
from distclip.engine.buckets import BUCKET_BYTES
from distclip.engine.streams import Stream
from distclip.groups import Groups, check_groups, members, names_of
from distclip.layout import Layout, Placed, Replicated, Sharded, check_kind, place
from distclip.loss_scale import DynamicLossScale, LossScale, checked_loss_scale, divisor, of_this_step, unscaled
from distclip.mesh import Group, as_group
from distclip.norm import check_norm_type
from distclip.outcome import Outcome, outcome, with_noise
from distclip.policy import check_policy, explanation, raise_if_bad, too_many_skips
from distclip.report import Report
from distclip.spikes import rule_for_skips
from distclip.states import first_state, fitted, grown, shapes
from distclip.step import Step
from distclip.thresholds import MaxNorm, Threshold, threshold_of
from distclip.tree import Leaves, flatten_beside
from distclip.world import gather_text

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
        group (Group, World or axis, optional): the ranks that hold the gradient together. Default: the world.
        average: ``True``, or a group (``mesh.group("dp")`` or ``"dp"``): the gradients are partial over the world, or
            over that group, and are averaged first, as by :func:`distclip.average_and_clip`. Default: ``False``.
        norm_type (float): as in :func:`distclip.clip_grad_norm`. Groups and thresholds per group need 1 or 2.
        nonfinite (str): what a norm that is not finite does, on every rank alike. ``"skip"``: the gradients become
            zeros and the step is counted; with :class:`distclip.ClippedOptimizer` parameters and optimizer state stay
            as they were, to the bit. ``"zero"``: zeros, and no more. ``"propagate"``, ``"raise"``: as in
            :func:`distclip.clip_grad_norm`.
        skip_above: a step whose norm is finite but above it is skipped too, to the bit: a number, a schedule, or
            :class:`distclip.Spike`, which learns from the norms before. Needs ``nonfinite="skip"``. Default: None.
        max_consecutive_skips (int, optional): with ``"skip"``, how many skips in a row are allowed; the call after
            one more raises, and the count starts again. Each call evaluates the counters of the last step to know;
            None never does.
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
        communication_dtype (mlx.core.Dtype, optional): with ``average``, as in :func:`distclip.average_gradients`.
        bucket_bytes (int): with ``average``, as in :func:`distclip.average_gradients`.
        stream (mlx.core.Stream, optional): as in :func:`distclip.clip_grad_norm`.

    Attributes:
        state (dict): arrays only, the same on every rank: save it with the optimizer's, restore it into the same
            dictionary (or assign it), hand it to ``mx.compile``. One of another rule, history or warm-up is refused,
            in the next call at the latest. It has ``norm``, ``scale``, ``finite`` and ``group_norms`` of the last
            step, and counts ``step``, ``clipped``, ``bad``, ``in_a_row`` and ``spikes`` (the finite ones of ``bad``).
        names (list of str): of the groups, once known.

    Raises:
        ValueError, TypeError: an argument is not what it should be.
    """

    def __init__(
        self,
        max_norm: MaxNorm = 1.0,
        *,
        layout: Layout | None = None,
        group: Group | None = None,
        average: bool | Group | None = False,
        norm_type: float = 2.0,
        nonfinite: str = "skip",
        skip_above: MaxNorm | None = None,
        max_consecutive_skips: int | None = 10,
        groups: Groups | None = None,
        loss_scale: LossScale = None,
        check: str = "first",
        rank_batch: int | None = None,
        communication_dtype: mx.Dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        stream: Stream = None,
    ) -> None:
        self._rules: dict[str, Threshold] = {"threshold": threshold_of(max_norm)}
        check_policy(nonfinite, POLICIES)
        if skip_above is not None:
            self._rules["skip_above"] = rule_for_skips(skip_above, nonfinite)
        if check not in ("first", "never"):
            raise ValueError(f"check should be 'first' or 'never', not {check!r}")
        if max_consecutive_skips is not None:
            max_consecutive_skips = whole("max_consecutive_skips", max_consecutive_skips, 0)
        loss_scale = checked_loss_scale(loss_scale, nonfinite)
        norm_type, per_group = check_norm_type(norm_type), self._rules["threshold"].per_group
        check_groups(groups, norm_type, also_measured=per_group or rank_batch is not None)
        check_communication_dtype(communication_dtype)
        check_kind(layout)
        rank_batch = noise.checked_rows(rank_batch, averages=bool(average), norm_type=norm_type)
        if per_group and groups is None:
            groups = str  # each leaf is a group
        self._over = as_group(None if average is True else average, "average") if average else None
        self._layout: Layout = layout if layout is not None else Replicated() if average else Sharded()
        self._by_default = layout is None and not average
        self._group, self._norm_type = as_group(group), norm_type
        self.nonfinite, self.max_consecutive_skips = nonfinite, max_consecutive_skips
        self._groups, self._loss_scale, self._rows, self._stream = groups, loss_scale, rank_batch, stream
        self._dtype, self._bucket_bytes = communication_dtype, whole("bucket_bytes", bucket_bytes, 0)
        self._check = check == "first"
        self.names, self.hosts = list[str](), list[str]()
        self._members: tuple[list[str], mx.array] | None = None  # the paths of the last step's leaves, and their groups
        self._warned: set[int] = set()  # ranks whose norm is far above the others', while it is
        ranks = (self._over or self._group).size() if rank_batch is not None else None
        self._state = first_state(loss_scale, groups=groups is not None, spikes=skip_above is not None, ranks=ranks)
        self._shapes: dict[str, Any] = {}  # of the rules' states, when they were last compared with the rules
        if not callable(groups):  # else the first call finds the names
            self.names = names_of([], groups, self._group)
            self._fit_state()

    @property
    def loss_scale(self) -> float | mx.array:
        """What to multiply the loss of this step by; 1 without a loss scale."""
        return of_this_step(self._loss_scale, self.state)

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if self.names:  # else the first call compares them, which learns how many groups there are
            for name, rule in self._rules.items():
                fitted(rule, dict(state.get(name, {})), len(self.names), name)
        # Into the containers that are there, which a compiled function may hold; files do not keep empty ones.
        for name, value in {"threshold": {}, **state}.items():
            if isinstance(value, dict):
                self._state.setdefault(name, {}).update(value)
            else:
                self._state[name] = value

    def __call__(
        self, grads: Any, *, loss_scale: float | mx.array | None = None, weight: float | mx.array | None = None
    ) -> tuple[Any, Report]:
        """Clip the gradients of a step. Collective, as :func:`distclip.clip_grad_norm` is; lazy, except for
        the counters of the last step (``max_consecutive_skips``), ``"raise"``, and with several ranks and a GPU.

        Args:
            loss_scale: of this step, instead of the clipper's.
            weight: of this rank, with ``average``, as in :func:`distclip.average_gradients`.

        Returns:
            (tree, Report): the gradients in the same tree, floating types kept (with a loss scale float16 becomes
            float32), integers as float32; and what was done.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` bad steps in a row; or with ``"raise"``.
            LayoutError, TypeError: see :func:`distclip.check_layout`, :func:`distclip.global_norm`.
        """
        return self.clip(grads, loss_scale=loss_scale, weight=weight)[:2]

    def clip(
        self, grads: Any, *, loss_scale: float | mx.array | None = None, weight: float | mx.array | None = None
    ) -> tuple[Any, Report, bool | None]:
        """As calling it. The last of the results says whether the step is taken; None where that is not evaluated
        yet."""
        unnamed = self._look() if self.max_consecutive_skips is not None else False
        scaled_by = divisor(loss_scale, self._loss_scale, self.state)
        over = self._over
        named = self._groups is not None or self._check or (over is not None and over.size() > 1)
        placed = place(grads, self._layout, self._group, named=named)
        self._prepare(placed.leaves, unnamed)
        by_leaf, groups = self._members_of(placed)
        step = Step(
            placed,
            average=over,
            norm_type=self._norm_type,
            members=by_leaf,
            groups=groups,
            rank_norms=self._rows is not None,
            weight=weight,
            communication_dtype=self._dtype,
            bucket_bytes=self._bucket_bytes,
            stream=self._stream,
        )
        norms, finite, rank_norms = step.norms()
        with step.schedule.arithmetic():
            if scaled_by is not None:
                norms, finite, rank_norms = unscaled(norms, finite, rank_norms, scaled_by)
            if self.nonfinite == "raise":
                raise_if_bad(placed, norms[0], finite, self._norm_type, averaged=over)
            found = self._take(norms, finite, rank_norms)
            factor, flag = self._factor(found, scaled_by)
        clipped = step.scaled(factor, flag, widen=scaled_by is not None)
        if self._check:
            self._check = False
            check_first_step(placed, clipped, self.state)
        known = bool(found.taken.item()) if step.schedule.waits else None
        return placed.leaves.rebuild(clipped), self.report(found.arrays), known

    def _take(self, norms: mx.array, finite: mx.array, rank_norms: mx.array | None) -> Outcome:
        """Take the norms of a step into the state."""
        found = outcome(self._rules, self.nonfinite, self.state, norms, finite, len(self.names))
        if rank_norms is not None:
            found = with_noise(found, self.state, rank_norms, self._rows or 1)
        for name, value in found.following.items():
            if isinstance(value, dict):
                self.state[name].update(value)
            else:
                self.state[name] = value
        return found

    def _factor(self, found: Outcome, scaled_by: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """What the gradients are multiplied by, and the flag that makes them zeros where it is False, if any."""
        factor, arrays = found.scale, found.arrays
        if scaled_by is not None:
            factor, arrays["loss_scale"] = factor / scaled_by, scaled_by
        if isinstance(self._loss_scale, DynamicLossScale):
            self.state["loss_scale"].update(self._loss_scale.update(self.state["loss_scale"], arrays["finite"]))
        # Who evaluates gradients or parameters alone evaluates the counters too, so that they never pile up.
        state: Any = tree_flatten(self.state)
        (factor,) = mx.depends([factor], [value for _, value in state])
        return factor, found.taken if self.nonfinite in ("zero", "skip") else None

    def __repr__(self) -> str:
        max_norm, skip_above = self._rules["threshold"], self._rules.get("skip_above")
        given = {"layout": self._layout, "average": self._over, "nonfinite": self.nonfinite}
        return described(self, max_norm=max_norm, skip_above=skip_above, **given, loss_scale=self._loss_scale)

    def report(self, arrays: dict[str, mx.array]) -> Report:
        """The report of arrays that a compiled function returned: ``return loss, report.arrays``."""
        return Report(arrays, self.names, self.hosts)

    def settle(self) -> None:
        """Evaluate the counters of the last step, and raise if too many steps in a row were skipped.

        It also warns when the norm of one rank was far above the others' for many steps, naming rank and host. Calling
        the clipper does it first; compiled loops do it where they wait anyway. Inside ``mx.compile`` it does nothing.

        Raises:
            FloatingPointError: more than ``max_consecutive_skips`` in a row. The count starts again, on every rank: a
                program that catches it and mends the cause goes on.
        """
        self._look()

    def _look(self) -> bool:
        """As :meth:`settle`; and whether leaves were seen, on any rank, whose group has no name."""
        try:
            mx.eval(self.state)
            in_a_row = int(self.state["in_a_row"].item())
        except ValueError:  # the arrays of a function that is being compiled have no values
            return False
        if self._rows is not None:
            noise.warn_of_far_ranks(self.state["noise"], self.hosts, self._warned)
        most = self.max_consecutive_skips
        if self.nonfinite == "skip" and most is not None and in_a_row > most:
            self.state["in_a_row"] = mx.array(0, mx.int32)  # who mends the cause goes on
            raise too_many_skips(in_a_row, self.state["step"].item(), most, "skip_above" in self._rules)
        return bool(self.state["unnamed"].item()) if callable(self._groups) else False

    def explain(self, grads: Any) -> str:
        """Which ranks, on which hosts, hold values that are not finite, and in which leaves. Collective: every rank of
        the group calls it with its gradients, for instance where ``report.finite`` is False, which all see alike."""
        return explanation(grads, self._norm_type, self._group)

    def prepare(self, grads: Any) -> None:
        """Learn the names of groups that a function gives, and so the shapes of the state, from a tree like the
        gradients (the trainable parameters are); of more groups, when leaves join later. Collective. Calling the
        clipper does it; ``mx.compile`` needs it before. On a GPU it also proves that the kernels work there, which
        evaluates a small tree once."""
        kernels.engine(self._stream)
        self._prepare(Leaves(grads, named=callable(self._groups)), anew=True)

    def check_parameters(self, grads: Any, parameters: Any) -> None:
        """Warn, once before the first call, if parameters look like replicas and no layout was given."""
        if self._check and self._by_default:
            self._by_default = False
            check_gradients(grads)
            leaves, values = flatten_beside(grads, parameters)
            warn_of_replicas(place(leaves.rebuild(values), self._layout, self._group, named=True))

    def _prepare(self, leaves: Leaves, anew: bool = False) -> None:
        """Learn the names of groups, if there are none yet or if they are to be asked for again. Collective then."""
        if callable(self._groups) and (anew or not self.names):
            self._learn(names_of(leaves.paths, self._groups, self._group))
        self._fit_state()
        if self._rows is not None and not self.hosts:
            self.hosts = gather_text(socket.gethostname(), self._over or self._group)

    def _learn(self, names: list[str]) -> None:
        """Take the names of groups into the sorted names of all, and make room in the state."""
        every = sorted({*self.names, *names})
        if self.names and every != self.names:
            self._fit_state()
            held = self.state["threshold"]
            held.update(grown(self._rules["threshold"], held, self.names, every))
            self._members = None
        self.names = every

    def _members_of(self, placed: Placed) -> tuple[mx.array | None, int]:
        """The group of each leaf, int32, shape (leaves,), worked out again when the leaves have changed; and how many
        groups there are: with several ranks one more, for leaves whose group has no name on the other ranks yet."""
        if self._groups is None:
            return None, 1
        paths, alone = placed.leaves.paths, placed.agreed is None or placed.agreed.size() == 1
        if self._members is None or self._members[0] != paths:
            if alone and callable(self._groups):  # all ranks have these leaves, so none asks the others
                self._learn([str(self._groups(path)) for path in paths])
                self._fit_state()
            self._members = paths, mx.array(members(paths, self._groups, self.names), mx.int32)
        return self._members[1], len(self.names) + (callable(self._groups) and not alone)

    def _fit_state(self) -> None:
        """Compare a state that was restored with the rule, by names and shapes alone; a fresh one if there is none."""
        for name, rule in self._rules.items():
            held = self.state.setdefault(name, {})
            if self._shapes.get(name) != shapes(held):
                held.update(fitted(rule, held, len(self.names), name))
                self._shapes[name] = shapes(held)
        # When there are more groups, a step that is compiled is traced again, on every rank.
        if self._groups is not None and self.state["group_norms"].size != len(self.names):
            self.state["group_norms"] = mx.zeros(len(self.names))
        if self._rows is not None:
            self.state["noise"].update(noise.fitted(self.state["noise"], (self._over or self._group).size()))
