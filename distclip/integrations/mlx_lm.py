"""Fine-tune with mlx-lm, clipped, and without losing the run to a bad batch.

    python -m distclip.integrations.mlx_lm lora --max-grad-norm 1.0 -- --model MODEL --data DATA --train

What follows ``--`` is for ``mlx_lm.lora``. A program that calls mlx-lm's ``train`` itself calls the one here instead.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from distclip.clipper import Clipper
from distclip.integrations.shard import shard as shard
from distclip.integrations.trainer import (
    adapted,
    check_copies,
    compiled_update,
    draw_alike,
    same_batches,
    sharding_over,
)
from distclip.integrations.whole import sharding_of
from distclip.layout import Replicated
from distclip.mesh import Mesh
from distclip.programs.every_optimizer import off_at_zero
from distclip.programs.run import add_clipping_arguments, threshold_of
from distclip.programs.watch import BAD, Reporting, Watch, say
from distclip.records.write import Recorder
from distclip.report import Report
from distclip.world import init

RECORDED = {"train_loss": "loss", "val_loss": "valid"}  # of the trainer's reports, and under which name
RECORDED |= {name: name for name in ("learning_rate", "tokens_per_second", "trained_tokens")}


def train(
    model: Any,
    optimizer: Any,
    train_dataset: Any,
    val_dataset: Any = None,
    args: trainer.TrainingArgs | None = None,
    loss: Callable[..., Any] = trainer.default_loss,
    iterate_batches: Callable[..., Any] = trainer.iterate_batches,
    training_callback: Any = None,
    *,
    max_norm: Any = 1.0,
    nonfinite: str = "skip",
    record: str | Path | None = None,
    sinks: Any = (),
    config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> Clipper:
    """``mlx_lm.tuner.trainer.train``, with clipping and a guard against gradients that are not finite.

    The trainer averages gradients over ranks and accumulated batches, and what is clipped is that average, once for
    each update. Rank 0 says which steps had a norm that is not finite and, with every training report, how many were
    clipped; ``training_callback`` gets ``grad_norm``, ``clipped_share`` and ``nonfinite_steps`` in that report.

    With several ranks and a GPU the trainer's compiled step is taken apart: the gradient is compiled, and the update,
    and in between the host waits for the other ranks.

    Args:
        max_norm: as for :class:`distclip.Clipper`, but 0 clips nothing, as in other trainers: the norm is still
            measured, and bad steps are still skipped.
        nonfinite: as for :class:`distclip.Clipper`, but for ``"raise"``: the trainer's step is compiled.
        record: a file for one line of each update, as :class:`distclip.Recorder` writes it. The updates at which the
            trainer reports have its loss (the mean since its last report), learning rate and tokens too.
        sinks: trackers that get the same, as for :class:`distclip.Recorder`.
        config: more for the header of the record, beside ``args`` and the options of clipping, such as the model.
        mesh (Mesh, optional): with the axes ``"tp"`` and, if there are several models, ``"dp"``. The model is sharded
            over it by :func:`shard`, unless it is already. Ranks along dp split each batch and average; those along tp
            get the same rows, which is checked for each batch. All shuffle with NumPy's state of rank 0. Weights are
            saved by rank 0, whole, as mlx-lm saves those of one process.
        options: others of :class:`distclip.Clipper`, such as ``max_consecutive_skips``.

    Returns:
        Clipper: with the run's counters in its state.

    Raises:
        FloatingPointError: more than ``max_consecutive_skips`` bad steps in a row.
        ValueError: ranks along tp have different batches; the model is sharded over another mesh, or over one that was
            not given; the mesh has other axes.
        LayoutError: see :func:`shard`; or copies of a trained parameter differ at the start.
    """
    if nonfinite not in BAD:
        raise ValueError(f"nonfinite should be one of {', '.join(map(repr, BAD))} with mlx-lm, not {nonfinite!r}")
    args = args or trainer.TrainingArgs()
    sharding = None if mesh is None else sharding_over(model, mesh)
    if sharding is None and sharding_of(model) is not None:
        raise ValueError("The model is sharded: pass mesh=, the mesh that it was sharded over.")
    with contextlib.ExitStack() as stack:
        apart = stack.enter_context(adapted(sharding))
        where: dict[str, Any] = {"layout": Replicated(), "average": apart}
        if sharding is not None:
            draw_alike(sharding)
            check_copies(model, sharding)
            iterate_batches = same_batches(iterate_batches, sharding)
            where = {"layout": sharding.layout, "average": apart and sharding.data_group}
        clipper = Clipper(off_at_zero(max_norm), nonfinite=nonfinite, check="never", **where, **options)
        clipped = Reporting(optimizer, clipper)
        clipped.init(model.trainable_parameters())
        if apart:
            optimizer.apply_gradients = compiled_update(optimizer)
            stack.callback(delattr, optimizer, "apply_gradients")
        settings = {**(config or {}), **vars(args), "max_norm": max_norm, "nonfinite": nonfinite, **options}
        recorder = None
        if record is not None or sinks:
            recorder = stack.enter_context(Recorder(record, config=settings, sinks=sinks))
        watch = _Watch(clipper, training_callback, recorder)

        def watched(*arguments: Any, **keywords: Any) -> Iterator[Any]:
            for batch in iterate_batches(*arguments, **keywords):
                watch.read()
                yield batch

        trainer.train(model, clipped, train_dataset, val_dataset, args, loss, watched, watch)
        watch.read()
        say(f"{watch.step} steps, {watch.totals()}")
    return clipper


def evaluate(
    model: Any,
    dataset: Any,
    batch_size: int,
    num_batches: int,
    max_seq_length: int = 2048,
    loss: Callable[..., Any] = trainer.default_loss,
    iterate_batches: Callable[..., Any] = trainer.iterate_batches,
    *,
    mesh: Mesh,
) -> float:
    """``mlx_lm.tuner.trainer.evaluate`` of a model that is sharded over a mesh: the mean loss, the same on every rank.

    Raises:
        ValueError: as :func:`train`.
    """
    sharding = sharding_over(model, mesh)
    draw_alike(sharding)
    with adapted(sharding):
        batches = same_batches(iterate_batches, sharding)
        return float(trainer.evaluate(model, dataset, batch_size, num_batches, max_seq_length, loss, batches))


class _Watch(Watch, TrainingCallback):
    """Adds the clipper's numbers to the trainer's reports."""

    def __init__(self, clipper: Clipper, callback: Any, recorder: Recorder | None):
        super().__init__(clipper, self._record)
        self.callback, self.recorder = callback, recorder
        self.reported: dict[str, float] = {}  # by the trainer since the last update was recorded

    def _record(self, report: Report) -> None:
        if self.recorder is not None:
            self.recorder(report, **self.reported)
            self.reported = {}

    def keep(self, info: dict[str, Any]) -> None:
        self.reported |= {RECORDED[name]: value for name, value in info.items() if name in RECORDED}

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.keep(train_info)
        self.read()
        say(self.totals())
        if self.callback is not None:
            numbers = {"grad_norm": self.norm, "clipped_share": self.share, "nonfinite_steps": self.bad}
            self.callback.on_train_loss_report(train_info | numbers)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.keep(val_info)
        if self.callback is not None:
            self.callback.on_val_loss_report(val_info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process), and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (those of mlx_lm.lora come after --)")
    args.run(args, argv[cut + 1 :])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distclip.integrations.mlx_lm", description="mlx-lm, clipped.")
    lora = parser.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "lora",
        help="mlx_lm.lora",
        usage="%(prog)s [OPTIONS] -- [OPTIONS OF mlx_lm.lora]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_clipping_arguments(lora, "--max-grad-norm")
    lora.set_defaults(run=_lora)
    return parser


def _lora(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    init()  # before mlx-lm starts MPI
    lora: Any = import_module("mlx_lm.lora")

    plain, plain_run, called = lora.train, lora.run, sys.argv
    config: dict[str, Any] = {}  # the model and all options, its --config file's too

    def run(arguments: Any, *others: Any) -> None:
        config.update(vars(arguments))
        plain_run(arguments, *others)

    lora.train = partial(
        train, max_norm=threshold_of(args), nonfinite=args.nonfinite, record=args.record, config=config
    )
    lora.run = run
    sys.argv = ["mlx_lm.lora", *arguments]
    try:
        with adapted():  # in the evaluation of --test, too
            lora.main()
    finally:
        lora.train, lora.run, sys.argv = plain, plain_run, called


if __name__ == "__main__":
    sys.exit(main())
