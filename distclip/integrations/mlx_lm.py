"""Fine-tune with mlx-lm, clipped, and without losing the run to a bad batch.

    python -m distclip.integrations.mlx_lm lora --max-grad-norm 1.0 -- --model MODEL --data DATA --train

What follows ``--`` is for ``mlx_lm.lora``. A program that calls mlx-lm's ``train`` itself calls the one here instead.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import numbers
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
from distclip.optimizer import ClippedOptimizer
from distclip.records.write import Recorder
from distclip.thresholds import AutoClip
from distclip.world import init

RECORDED = {"train_loss": "loss", "val_loss": "valid"}  # of the trainer's reports, and under which name
RECORDED |= {name: name for name in ("learning_rate", "tokens_per_second", "trained_tokens")}
BAD = {"skip": "skipped", "zero": "taken with zeros for gradients", "propagate": "taken as it is"}


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
    max_norm = math.inf if isinstance(max_norm, numbers.Real) and max_norm == 0 else max_norm
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
        clipper = Clipper(max_norm, nonfinite=nonfinite, check="never", **where, **options)
        clipped = _Reporting(optimizer, clipper)
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
        watch.say(f"{watch.step} steps, {watch.totals()}")
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


class _Reporting(ClippedOptimizer):
    """Keeps its last report in its state: the trainer's compiled step hands out nothing else."""

    def apply_gradients(self, gradients: Any, parameters: Any, **options: Any) -> Any:
        updated = super().apply_gradients(gradients, parameters, **options)
        assert self.report is not None
        self.clipper.state["report"] = dict(self.report.arrays)
        return updated


class _Watch(TrainingCallback):
    """Reads the clipper's state between the trainer's steps, and adds its numbers to the trainer's reports."""

    def __init__(self, clipper: Clipper, callback: Any, recorder: Recorder | None):
        self.clipper, self.callback, self.recorder = clipper, callback, recorder
        self.speaks = init().rank == 0
        self.step, self.clipped, self.bad, self.norm = 0, 0, 0, 0.0
        self.reported: dict[str, float] = {}  # by the trainer since the last update was recorded

    def read(self) -> None:
        """Read the last step if it is new, and raise if too many steps in a row were skipped."""
        state = self.clipper.state
        if state["step"].item() == self.step:
            return
        self.step, self.clipped, self.bad = (state[name].item() for name in ("step", "clipped", "bad"))
        report = self.clipper.report(dict(state["report"]))  # the compiled step puts the next one into that dictionary
        self.norm = float(report.norm.item())  # type: ignore[arg-type]
        if report.skipped.item() or not report.finite.item():
            limit = f", above {report.skip_above.item():.4g}" if report.finite.item() else ""
            self.say(f"the norm of step {self.step} is {self.norm}{limit}; the step was {BAD[self.clipper.nonfinite]}")
        if self.recorder is not None:
            self.recorder(report, **self.reported)
            self.reported = {}
        self.clipper.settle()

    def keep(self, info: dict[str, Any]) -> None:
        self.reported |= {RECORDED[name]: value for name, value in info.items() if name in RECORDED}

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.keep(train_info)
        self.read()
        self.say(self.totals())
        if self.callback is not None:
            numbers = {"grad_norm": self.norm, "clipped_share": self.share(), "nonfinite_steps": self.bad}
            self.callback.on_train_loss_report(train_info | numbers)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.keep(val_info)
        if self.callback is not None:
            self.callback.on_val_loss_report(val_info)

    def totals(self) -> str:
        bad = "skipped" if self.clipper.nonfinite == "skip" else "not finite"
        return f"{self.share():.0%} clipped, {self.bad} {bad}, last norm {self.norm:.4g}"

    def share(self) -> float:
        return self.clipped / max(self.step, 1)

    def say(self, what: str) -> None:
        if self.speaks:
            print(f"distclip: {what}", flush=True)


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
    threshold = lora.add_mutually_exclusive_group()
    text = "0 clips nothing; default: %(default)s"
    threshold.add_argument("--max-grad-norm", type=_between(0, math.inf), default=1.0, metavar="NORM", help=text)
    text = "the threshold is a percentile of the norms so far"
    threshold.add_argument("--auto-clip", type=_between(0, 100), metavar="PERCENTILE", help=text)
    lora.add_argument("--nonfinite", choices=list(BAD), default="skip", help="default: %(default)s")
    lora.add_argument("--record", metavar="FILE", help="append a line of JSON for each update")
    lora.set_defaults(run=_lora)
    return parser


def _between(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not least <= (value := float(text)) <= most:
            raise argparse.ArgumentTypeError(f"should be between {least:g} and {most:g}, not {text}")
        return value

    return number


def _lora(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    init()  # before mlx-lm starts MPI
    lora: Any = import_module("mlx_lm.lora")

    max_norm = args.max_grad_norm if args.auto_clip is None else AutoClip(args.auto_clip)
    plain, plain_run, called = lora.train, lora.run, sys.argv
    config: dict[str, Any] = {}  # the model and all options, its --config file's too

    def run(options: Any, *others: Any) -> None:
        config.update(vars(options))
        plain_run(options, *others)

    lora.train = partial(train, max_norm=max_norm, nonfinite=args.nonfinite, record=args.record, config=config)
    lora.run = run
    sys.argv = ["mlx_lm.lora", *arguments]
    try:
        with adapted():  # in the evaluation of --test, too
            lora.main()
    finally:
        lora.train, lora.run, sys.argv = plain, plain_run, called


if __name__ == "__main__":
    sys.exit(main())
