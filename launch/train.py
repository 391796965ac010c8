"""Train a byte-level language model on one process or many: the example to copy, with checkpoints.py and
folders.py beside it.

Alone:                   python launch/train.py
On four processes:       mpirun -n 4 python launch/train.py --parallel dp    (or tp, dp+tp, fsdp)

Every mode runs the same step: a gradient, and the update of a ``distclip.ClippedOptimizer``, which averages, clips, and
skips what is not finite. The text is the language reference that Python ships (``pydoc_data.topics``), or any file that
is given with ``--data``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_map

import distclip as dc
from checkpoints import Checkpoints

# ------------------------------------------------------------------------------------------------- settings

WATCHDOG = (
    "end the job when a step, with its validation and checkpoint, takes longer; 0 for never (default: %(default)s)"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parallel", choices=["dp", "tp", "dp+tp", "fsdp"], default="dp", help="how the ranks share the work")
    add("--data", metavar="FILE", help="text to train on (default: Python's own language reference)")
    add("--max-norm", type=float, default=0.5, help="largest gradient norm; 0 never clips (default: %(default)s)")
    add("--threshold", choices=["fixed", "autoclip", "zclip"], default="fixed", help="rule (default: %(default)s)")
    add("--nonfinite", choices=["skip", "zero", "propagate", "raise"], default="skip", help="what a bad step does")
    add("--steps", type=int, default=300, help="optimizer updates (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="rows of text in a batch, over all ranks (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches whose gradients make one update (default: %(default)s)")
    add("--context", type=int, default=64, help="bytes in a row (default: %(default)s)")
    add("--dims", type=int, default=64, help="width of the model (default: %(default)s)")
    add("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    add("--layers", type=int, default=2, help="blocks (default: %(default)s)")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd has momentum 0.9 (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="after warm-up (default: %(default)s)")
    add("--warm-up", type=int, default=20, help="steps from 0 to the learning rate (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    add("--seed", type=int, default=0, help="of the parameters and of the order of the text (default: %(default)s)")
    add("--valid-every", type=int, default=50, metavar="N", help="validate every N steps (default: %(default)s)")
    add("--valid-batches", type=int, default=4, metavar="N", help="batches to validate on (default: %(default)s)")
    add("--log-every", type=int, default=10, metavar="N", help="a line every N steps (default: %(default)s)")
    add("--check-gradient", action="store_true", help="before the first update, measure that the loss rises along it")
    add("--record", metavar="FILE", help="append a JSON line per step to this file")
    add("--checkpoint", metavar="DIR", default="runs/train", help="folder of checkpoints (default: %(default)s)")
    add("--checkpoint-every", type=int, default=100, metavar="N", help="0 for none (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint, or begin where there is none")
    add("--allow-changed", action="store_true", help="resume with other options than those the run was started with")
    add("--watchdog", type=float, default=300, metavar="SECONDS", help=WATCHDOG)
    args = parser.parse_args(argv)
    least = dict.fromkeys(("warm_up", "checkpoint_every", "seed"), 0)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < least.get(name, 1) and not isinstance(value, bool):
            parser.error(f"--{name.replace('_', '-')} must be at least {least.get(name, 1)}")
    if not args.max_norm >= 0:
        parser.error(f"--max-norm {args.max_norm:g} must be at least 0")
    args.max_norm = args.max_norm or float("inf")
    if args.dims % (2 * args.heads):
        parser.error(f"--dims {args.dims} must be a multiple of 2 x --heads {args.heads}")
    return args


# ------------------------------------------------------------------------------------------------ the model


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.heads, self.head_dims = heads, dims // heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.out = nn.Linear(dims, dims)
        self.rope = nn.RoPE(self.head_dims)

    def __call__(self, x: mx.array) -> mx.array:
        rows, length, _ = x.shape
        q, k, v = (
            part.reshape(rows, length, self.heads, -1).swapaxes(1, 2) for part in mx.split(self.qkv(x), 3, axis=-1)
        )
        y = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=self.head_dims**-0.5, mask="causal"
        )
        return self.out(y.swapaxes(1, 2).reshape(rows, length, -1))


class Block(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.attention, self.norm_1 = Attention(dims, heads), nn.RMSNorm(dims)
        self.up, self.down, self.norm_2 = nn.Linear(dims, 4 * dims), nn.Linear(4 * dims, dims), nn.RMSNorm(dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nn.gelu_approx(self.up(self.norm_2(x))))


class ByteLM(nn.Module):
    def __init__(self, dims: int, heads: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(256, dims)
        self.layers = [Block(dims, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, 256, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:], reduction="mean")


# ---------------------------------------------------------------------------------------- the parallel layout


def make_mesh(parallel: str, size: int) -> dc.Mesh:
    """Lay the ranks out: ``dp`` averages gradients, ``tp`` splits layers, ``fsdp`` splits parameters and data."""
    if parallel == "dp+tp":
        if size % 2 and size > 1:
            raise SystemExit(f"--parallel dp+tp needs an even number of ranks, not {size}")
        tp = min(2, size)
        return dc.Mesh(dp=size // tp, fsdp=1, tp=tp)
    return dc.Mesh(**{axis: size if axis == parallel else 1 for axis in ("dp", "fsdp", "tp")})


def shard(model: Any, mesh: dc.Mesh) -> None:
    """Keep this rank's shards of a model that every rank has made whole from the same seed."""
    tp, fsdp = mesh.group("tp"), mesh.group("fsdp")
    if model.layers[0].attention.heads % tp.size():
        raise SystemExit(f"--heads {model.layers[0].attention.heads} cannot be divided among {tp.size()} tp ranks")
    for block in model.layers if tp.size() > 1 else []:
        block.attention.qkv = shard_linear(block.attention.qkv, "all-to-sharded", segments=3, group=tp)
        block.attention.out = shard_linear(block.attention.out, "sharded-to-all", group=tp)
        block.attention.heads //= tp.size()
        block.up = shard_linear(block.up, "all-to-sharded", group=tp)
        block.down = shard_linear(block.down, "sharded-to-all", group=tp)
    if fsdp.size() > 1:
        model.embedding = nn.fully_shard(model.embedding, group=fsdp)
        model.layers = [nn.fully_shard(block, group=fsdp) for block in model.layers]
        model.norm = nn.fully_shard(model.norm, group=fsdp)
        model.head = nn.fully_shard(model.head, group=fsdp)


# -------------------------------------------------------------------------------------------------- the data


class Text:
    """Batches of a text, each a function of the seed and the step alone: nothing to save, the same on every layout."""

    def __init__(self, path: str | None, context: int, seed: int):
        if path is None:
            from pydoc_data.topics import topics

            data = "\n".join(topics.values()).encode()
        else:
            data = Path(path).read_bytes()
        cut = len(data) * 19 // 20  # the last twentieth is for validation
        self.parts = {"train": data[:cut], "valid": data[cut:]}
        self.length, self.seed = context + 1, seed
        self.digest = f"{len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"
        if len(data) - cut < self.length:
            raise SystemExit(
                f"The text has {len(data)} bytes, too few for --context {context}: use a longer --data file"
            )

    def batch(self, part: str, rows: int, step: int, rank: int, ranks: int) -> mx.array:
        """This rank's rows of the global batch of a step: bytes, shape (rows / ranks, context + 1)."""
        data, choose = self.parts[part], random.Random(f"{self.seed} {part} {step}")
        starts = [choose.randrange(len(data) - self.length + 1) for _ in range(rows)]
        return mx.array([list(data[start : start + self.length]) for start in starts[rank::ranks]])


def reader_of(mesh: dc.Mesh, rows: int) -> tuple[int, int]:
    """This rank's place among the readers, and their number: ranks along dp and fsdp read different rows of a batch."""
    place, readers = mesh.coordinates(), mesh.size("dp", "fsdp")
    if rows % readers:
        raise SystemExit(
            f"--batch-size {rows} cannot be divided among the {readers} ranks that read data: "
            f"take {rows // readers * readers or readers}"
        )
    return place["dp"] * mesh.size("fsdp") + place["fsdp"], readers


# --------------------------------------------------------------------------------------------- the optimizer

GROUPS = {"embedding": "embedding.*", "attention": "*.attention.*", "mlp": ["*.up.*", "*.down.*"], "head": "head.*"}


def make_optimizer(args: argparse.Namespace, model: nn.Module, mesh: dc.Mesh) -> dc.ClippedOptimizer:
    """AdamW or SGD with a learning rate that warms up and decays, behind a clipper that averages and clips."""
    rate = optim.cosine_decay(args.learning_rate, max(args.steps - args.warm_up, 1), args.learning_rate / 10)
    if args.warm_up:
        warm_up = optim.linear_schedule(0.0, args.learning_rate, args.warm_up)
        rate = optim.join_schedules([warm_up, rate], [args.warm_up])
    inner = optim.AdamW(rate, weight_decay=0.01) if args.optimizer == "adamw" else optim.SGD(rate, momentum=0.9)
    rules = {"fixed": args.max_norm, "autoclip": dc.AutoClip(), "zclip": dc.ZClip(max_norm=args.max_norm)}
    clipper = dc.Clipper(
        rules[args.threshold],
        average=mesh.group("dp"),  # fsdp has averaged its own gradients
        layout=dc.layout_of(model, mesh),  # which leaves tp and fsdp split
        nonfinite=args.nonfinite,
        groups=GROUPS,
    )
    optimizer = dc.ClippedOptimizer(inner, clipper)
    optimizer.init(model.trainable_parameters())
    return optimizer


# -------------------------------------------------------------------------------------------------- the loop

# Options that change nothing of what is computed. A resumed run must have the same others.
FREE = {"valid_every", "valid_batches", "log_every", "check_gradient", "record", "checkpoint", "checkpoint_every"}
FREE |= {"resume", "allow_changed", "watchdog"}


def mean_gradient(
    loss_and_grad: Callable[[nn.Module, mx.array], Any], model: nn.Module, batches: list[mx.array]
) -> tuple[mx.array, Any]:
    """The mean loss and gradient of batches, evaluated batch by batch, to hold the activations of a single batch. The
    last is left to the update, which sends its gradients to the other ranks as they are made."""
    mean_loss, mean = mx.array(0.0), None
    for i, batch in enumerate(batches, 1):
        loss, grads = loss_and_grad(model, batch)
        if len(batches) > 1:
            loss, grads = loss / len(batches), tree_map(lambda g: g / len(batches), grads)
        mean_loss, mean = mean_loss + loss, grads if mean is None else tree_map(mx.add, mean, grads)
        if i < len(batches):
            mx.eval(mean_loss, mean)
    return mean_loss, mean


def check_gradient(model: nn.Module, mesh: dc.Mesh, batches: list[mx.array], grads: Any) -> None:
    """Raise if the loss does not rise along the gradient as its norm and its leaves say."""

    def mean_loss(model: nn.Module, batches: list[mx.array]) -> mx.array:
        return mx.mean(mx.stack([loss_fn(model, batch) for batch in batches]))

    mean = dc.average_gradients(grads, group=mesh.group("dp"))
    slopes = dc.check_gradient(model, mean_loss, batches, mean, dc.layout_of(model, mesh))
    if dc.init().rank == 0:
        print(slopes)


def open_record(args: argparse.Namespace) -> dc.Recorder:
    try:
        return dc.Recorder(args.record, config=vars(args), live=True, live_every=args.log_every, steps=args.steps)
    except OSError as error:
        raise SystemExit(f"--record: {error}") from None


def train(args: argparse.Namespace, watchdog: dc.Watchdog | None = None) -> None:
    world = dc.init()
    mesh = make_mesh(args.parallel, world.size)
    mx.random.seed(args.seed)
    model = ByteLM(args.dims, args.heads, args.layers)
    model.set_dtype(getattr(mx, args.dtype))
    shard(model, mesh)
    optimizer = make_optimizer(args, model, mesh)
    text, data_group = Text(args.data, args.context, args.seed), mesh.group("dp", "fsdp")
    reader, readers = reader_of(mesh, args.batch_size)

    settings = {name: value for name, value in vars(args).items() if name not in FREE} | {"data": text.digest}
    checkpoints = Checkpoints(args.checkpoint, world, mesh, settings)
    if args.resume or args.checkpoint_every:
        checkpoints.own()
    first = checkpoints.load(model, optimizer, args.allow_changed) if args.resume else 0
    if first >= args.steps and world.rank == 0:
        print(f"nothing to do: the checkpoint has seen {first} steps, and --steps is {args.steps}")

    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def batches(part: str, start: int, count: int) -> list[mx.array]:
        return [text.batch(part, args.batch_size, i, reader, readers) for i in range(start, start + count)]

    def over_ranks(loss: mx.array) -> mx.array:
        with mx.stream(world.stream):  # where no GPU waits for other ranks
            return mx.distributed.all_sum(loss, group=data_group) / readers

    def validate() -> mx.array:
        losses = [loss_fn(model, batch) for batch in batches("valid", 0, args.valid_batches)]
        loss = over_ranks(mx.mean(mx.stack(losses)))
        mx.eval(loss)
        return loss

    with open_record(args) as record:
        if args.checkpoint_every and not args.resume:
            checkpoints.start_afresh()  # now that nothing can refuse the run any more
        for step in range(first + 1, args.steps + 1):
            train_batches = batches("train", (step - 1) * args.accumulate, args.accumulate)
            loss, grads = mean_gradient(loss_and_grad, model, train_batches)
            loss = over_ranks(loss)
            if args.check_gradient and step == first + 1:
                check_gradient(model, mesh, train_batches, grads)
            optimizer.update(model, grads)
            report: Any = optimizer.report
            del grads  # the update can take their memory
            mx.eval(model.parameters(), optimizer.state, report.arrays, loss)

            last = step == args.steps
            record(report, loss=loss, valid=validate() if step % args.valid_every == 0 or last else None)
            if args.checkpoint_every and (step % args.checkpoint_every == 0 or last):
                record.flush()  # a run that is killed now goes on behind this step
                checkpoints.save(step, model, optimizer)
            if watchdog is not None:
                watchdog(step=step)
            world.barrier()  # a GPU must not wait for a rank that still saves


if __name__ == "__main__":
    args = parse()
    with dc.Watchdog(args.watchdog) if args.watchdog else contextlib.nullcontext() as watchdog:
        train(args, watchdog)
