"""From the ranks' own gradient norms in data parallel training: the noise scale, and ranks far above the others."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from distclip.arguments import callers_level, whole

State = dict[str, mx.array]

SMOOTHING = 0.99  # of both estimates: about 100 steps
FAR = 5.0  # times the median of the ranks' norms
FAR_STEPS = 50  # in a row, before a rank is named


def init(ranks: int) -> State:
    return {"signal": mx.array(0.0), "noise": mx.array(0.0), "far": mx.zeros(ranks, mx.int32)}


def checked_rows(rows: int | None, averages: bool, norm_type: float) -> int | None:
    """The rows of the batch of each rank, if they are given.

    Raises:
        ValueError: they are below 1, nothing is averaged, or the norm is no 2-norm.
    """
    if rows is None:
        return None
    if averages and norm_type == 2 and (plain := whole("rank_batch", rows, 0)) > 0:
        return plain
    raise ValueError("rank_batch is the rows of each rank's batch (at least 1), and needs average and norm_type 2")


def fitted(state: State, ranks: int) -> State:
    """A state that was saved, for this number of ranks: which rank was far above the others is counted anew."""
    return state if state["far"].size == ranks else {**state, "far": init(ranks)["far"]}


def warn_of_far_ranks(state: State, hosts: list[str], warned: set[int]) -> None:
    """Warn of ranks whose norm stays far above the others', once while it does. Evaluates.

    Args:
        hosts: of the ranks, or none.
        warned: the ranks that were warned of. It is brought up to date.
    """
    far: Any = state["far"].tolist()
    for rank, steps in enumerate(far):
        if steps < FAR_STEPS:
            warned.discard(rank)
        elif rank not in warned:
            warned.add(rank)
            host = f" on {hosts[rank]}" if hosts else ""
            warnings.warn(
                f"The gradient norm of rank {rank}{host} has been more than {FAR:g} times the ranks' median "
                f"for {steps} steps: look at its data, and at its memory.",
                RuntimeWarning,
                stacklevel=callers_level(),
            )


def update(state: State, own: mx.array, norm: mx.array, rows: float) -> tuple[mx.array, State]:
    """The gradient noise scale so far, in rows of a batch, and the next state.

    The unbiased pair of estimates of McCandlish, Kaplan and Amodei, 2018, appendix A.1
    (https://arxiv.org/abs/1812.06162), from the squared norm of the mean over all ranks' rows and the mean of the
    squared norms over each rank's; both are smoothed before they are divided.

    Args:
        own: the ranks' norms before averaging, float32, shape (ranks,), replicated.
        norm: the norm of the average, float32, shape ().
        rows: of the batch of one rank.
    """
    n = own.shape[0]
    big, small = mx.square(norm), mx.mean(mx.square(own))
    finite = mx.isfinite(n * big + small)  # the squares of huge norms are not
    signal, noise = (n * big - small) / (n - 1), (small - big) * (rows * n / (n - 1))
    signal = SMOOTHING * state["signal"] + (1 - SMOOTHING) * signal
    noise = SMOOTHING * state["noise"] + (1 - SMOOTHING) * noise
    middle = mx.sort(own)[(n - 1) // 2]
    far = mx.where(own > FAR * middle, state["far"] + 1, 0)
    following = {
        "signal": mx.where(finite, signal, state["signal"]),
        "noise": mx.where(finite, noise, state["noise"]),
        "far": mx.where(finite, far, state["far"]),
    }
    return following["noise"] / following["signal"], following
