"""Train a byte-level language model on one process or many: the example to copy.

Alone:                   python launch/train.py
On four processes:       mpirun -n 4 python launch/train.py --parallel dp    (or tp, dp+tp, fsdp)

Every mode runs the same step: a gradient, and the update of a ``distclip.ClippedOptimizer``, which averages, clips, and
skips what is not finite. The text is the language reference that Python ships (``pydoc_data.topics``), or any file that
is given with ``--data``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import distclip as dc
from distclip.record import on_terminal

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


# -------------------------------------------------------------------------------------- how it is parallel


def make_mesh(parallel: str, size: int) -> dc.Mesh:
    """Lay the world out: ``dp`` averages gradients, ``tp`` splits layers, ``fsdp`` splits parameters and data."""
    if parallel == "dp+tp":
        if size % 2 and size > 1:
            raise SystemExit(f"--parallel dp+tp needs an even number of ranks, not {size}")
        tp = min(2, size)
        return dc.Mesh(dp=size // tp, fsdp=1, tp=tp)
    return dc.Mesh(**{axis: size if axis == parallel else 1 for axis in ("dp", "fsdp", "tp")})


def shard(model: Any, mesh: dc.Mesh) -> None:
    """Keep this rank's part of the model, which every rank has made whole from the same seed."""
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


# --------------------------------------------------------------------------------------------------- the data


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
        if len(data) - cut < self.length:
            raise SystemExit(
                f"The text has {len(data)} bytes, too few for --context {context}: use a longer --data file"
            )

    def batch(self, part: str, rows: int, step: int, rank: int, ranks: int) -> mx.array:
        """This rank's rows of the global batch of a step: bytes, shape (rows / ranks, context + 1)."""
        data, choose = self.parts[part], random.Random(f"{self.seed} {part} {step}")
        starts = [choose.randrange(len(data) - self.length + 1) for _ in range(rows)]
        return mx.array([list(data[start : start + self.length]) for start in starts[rank::ranks]])


# ------------------------------------------------------------------------------------------------ checkpoints


class Checkpoints:
    """Whole checkpoints only: a folder is written aside and renamed, so a kill at any moment leaves the last one."""

    def __init__(self, folder: str, world: dc.World, mesh: dc.Mesh, facts: dict[str, Any]):
        place = mesh.coordinates()
        self.folder, self.world, self.facts = Path(folder), world, facts  # facts: what a resumed run must share
        self.writes = place["dp"] == 0  # the other dp ranks hold copies
        self.facts["pieces"] = mesh.size("fsdp", "tp")
        self.file = f"piece-{place['fsdp'] * mesh.size('tp') + place['tp']}.safetensors"

    def save(self, step: int, model: nn.Module, optimizer: dc.ClippedOptimizer) -> None:
        aside = self.folder / f".step-{step:08d}"
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self._wait_for_all()
        if self.writes:
            arrays = {"model": model.parameters(), "optimizer": optimizer.state}
            mx.save_safetensors(str(aside / self.file), dict(tree_flatten(arrays)))
        self._wait_for_all()
        if self.world.rank == 0:
            (aside / "checkpoint.json").write_text(json.dumps(self.facts | {"step": step}))
            aside.rename(self.folder / f"step-{step:08d}")
            for old in self._whole()[:-2]:
                shutil.rmtree(old)

    def start_afresh(self) -> None:
        """Move the checkpoints of an earlier run out of the way."""
        if self.world.rank == 0 and self._whole():
            number = 1
            while (moved := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
                number += 1
            self.folder.rename(moved)
            print(f"earlier checkpoints in {self.folder} are now in {moved}", flush=True)

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("step-*/checkpoint.json"))

    def load(self, model: nn.Module, optimizer: dc.ClippedOptimizer) -> int:
        """Take up the newest checkpoint; returns the number of steps it has seen."""
        found = self._whole()
        if not found:
            raise SystemExit(f"--resume: there is no checkpoint in {self.folder}")
        facts = json.loads((found[-1] / "checkpoint.json").read_text())
        one_piece = facts["pieces"] == self.facts["pieces"] == 1  # any number of dp ranks can take that up
        for name, mine in self.facts.items():
            if facts[name] != mine and not (name == "parallel" and one_piece):
                raise SystemExit(
                    f"--resume: {found[-1]} was written with {name} = {facts[name]}, and this run has {mine}: resume "
                    "it the way it was started, or start afresh without --resume"
                )
        flat: Any = mx.load(str(found[-1] / self.file))
        arrays: Any = tree_unflatten(list(flat.items()))
        model.update(arrays["model"])
        optimizer.state = arrays["optimizer"]
        mx.eval(model.parameters(), optimizer.state)
        return int(facts["step"])

    def _wait_for_all(self) -> None:
        mx.eval(mx.distributed.all_sum(mx.ones(1), group=self.world.group))


# --------------------------------------------------------------------------------------------------- progress


def number(scalar: mx.array) -> float:
    return scalar.item()  # type: ignore[return-value]


class Progress:
    """A bar on rank 0's terminal; a line every ``every`` steps where the output is no terminal."""

    def __init__(self, steps: int, every: int, rank: int):
        self.steps, self.every, self.shown = steps, every, rank == 0
        self.terminal = self.shown and on_terminal()
        self.since, self.tokens, self.clipped, self.skipped, self.seen, self.valid = (
            time.perf_counter(),
            0,
            0,
            0,
            0,
            "-",
        )

    def step(self, step: int, loss: float, report: dc.Report, tokens: int, valid: float | None) -> None:
        self.seen += 1
        self.tokens += tokens
        self.clipped += bool(report.clipped.item())
        self.skipped += bool(report.skipped.item())
        self.valid = self.valid if valid is None else f"{valid:.4f}"
        if not self.shown:
            return
        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        text = (
            f"step {step}/{self.steps}  loss {loss:.4f}  valid {self.valid}  norm {number(report.norm):.3f}  "
            f"clipped {self.clipped / self.seen:.0%}{skipped}  "
            f"{self.tokens / (time.perf_counter() - self.since):,.0f} tokens/s"
        )
        if self.terminal:
            bar = "#" * (20 * step // self.steps)
            print(f"\r[{bar:<20}] {text}\x1b[K", end="" if step < self.steps else "\n", flush=True)
        elif step % self.every == 0 or step == self.steps or self.seen == 1:
            print(text, flush=True)


# --------------------------------------------------------------------------------------------------- the run

GROUPS = {"embedding": "embedding.*", "attention": "*.attention.*", "mlp": ["*.up.*", "*.down.*"], "head": "head.*"}
FACTS = ("parallel", "dims", "heads", "layers", "dtype", "optimizer", "threshold")  # what a resumed run must share


def train(args: argparse.Namespace) -> None:
    world = dc.init()
    mesh = make_mesh(args.parallel, world.size)
    mx.random.seed(args.seed)
    model = ByteLM(args.dims, args.heads, args.layers)
    model.set_dtype(getattr(mx, args.dtype))
    shard(model, mesh)
    layout = dc.layout_of(model, mesh)

    rate = optim.cosine_decay(args.learning_rate, max(args.steps - args.warm_up, 1), args.learning_rate / 10)
    if args.warm_up:
        warm_up = optim.linear_schedule(0.0, args.learning_rate, args.warm_up)
        rate = optim.join_schedules([warm_up, rate], [args.warm_up])
    inner = optim.AdamW(rate, weight_decay=0.01) if args.optimizer == "adamw" else optim.SGD(rate, momentum=0.9)
    rules = {"fixed": args.max_norm, "autoclip": dc.AutoClip(), "zclip": dc.ZClip(max_norm=args.max_norm)}
    # Gradients are partial over dp; fsdp has averaged its own, and the layout says what tp and fsdp split.
    clipper = dc.Clipper(
        rules[args.threshold], average=mesh.group("dp"), layout=layout, nonfinite=args.nonfinite, groups=GROUPS
    )
    optimizer = dc.ClippedOptimizer(inner, clipper)
    optimizer.init(model.trainable_parameters())
    facts = {name: getattr(args, name) for name in FACTS}
    checkpoints = Checkpoints(args.checkpoint, world, mesh, facts)
    first = checkpoints.load(model, optimizer) if args.resume else 0
    if first >= args.steps and world.rank == 0:
        print(f"nothing to do: the checkpoint has seen {first} steps, and --steps is {args.steps}")
    if not args.resume and args.checkpoint_every:
        checkpoints.start_afresh()

    # Ranks along dp and fsdp read different rows of a batch; ranks along tp work on the same rows.
    place, readers = mesh.coordinates(), mesh.size("dp", "fsdp")
    reader = place["dp"] * mesh.size("fsdp") + place["fsdp"]
    if args.batch_size % readers:
        raise SystemExit(
            f"--batch-size {args.batch_size} cannot be divided among the {readers} ranks that read data: "
            f"take {args.batch_size // readers * readers or readers}"
        )
    text = Text(args.data, args.context, args.seed)
    data_group = mesh.group("dp", "fsdp")

    def over_ranks(value: mx.array) -> float:
        return number(mx.distributed.all_sum(value, group=data_group)) / readers

    def validate() -> float:
        batches = range(args.valid_batches)
        losses = [loss_fn(model, text.batch("valid", args.batch_size, i, reader, readers)) for i in batches]
        return over_ranks(sum(losses, mx.array(0.0)) / len(losses))

    loss_and_grad = nn.value_and_grad(model, loss_fn)
    progress = Progress(args.steps, args.log_every, world.rank)
    recorder = dc.Recorder(args.record, config=vars(args)) if args.record else None
    for step in range(first, args.steps):
        loss, grads = mx.array(0.0), None
        for part in range(args.accumulate):
            batch = text.batch("train", args.batch_size, step * args.accumulate + part, reader, readers)
            part_loss, part_grads = loss_and_grad(model, batch)
            loss = loss + part_loss / args.accumulate
            part_grads = tree_map(lambda g: g / args.accumulate, part_grads) if args.accumulate > 1 else part_grads
            grads = part_grads if grads is None else tree_map(mx.add, grads, part_grads)
            mx.eval(loss, grads)

        optimizer.update(model, grads)
        report, grads = optimizer.report, None
        assert report is not None
        mx.eval(model.parameters(), optimizer.state, report.arrays)

        done = step + 1
        valid = validate() if done % args.valid_every == 0 or done == args.steps else None
        tokens = args.batch_size * args.accumulate * args.context
        mean = over_ranks(loss)
        progress.step(done, mean, report, tokens, valid)
        if recorder is not None:
            recorder(report, loss=mean, **({} if valid is None else {"valid": valid}))
        if args.checkpoint_every and (done % args.checkpoint_every == 0 or done == args.steps):
            checkpoints.save(done, model, optimizer)
    if recorder is not None:
        recorder.close()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parallel", choices=["dp", "tp", "dp+tp", "fsdp"], default="dp", help="how the ranks share the work")
    add("--data", metavar="FILE", help="text to train on (default: Python's own language reference)")
    add("--max-norm", type=float, default=0.5, help="largest gradient norm; inf never clips (default: %(default)s)")
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
    add("--record", metavar="FILE", help="append a JSON line per step to this file")
    add("--checkpoint", metavar="DIR", default="runs/train", help="folder of checkpoints (default: %(default)s)")
    add("--checkpoint-every", type=int, default=100, metavar="N", help="0 for none (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    args = parser.parse_args(argv)
    least = dict.fromkeys(("warm_up", "checkpoint_every", "seed"), 0)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < least.get(name, 1) and not isinstance(value, bool):
            parser.error(f"--{name.replace('_', '-')} must be at least {least.get(name, 1)}")
    if args.dims % (2 * args.heads):
        parser.error(f"--dims {args.dims} must be a multiple of 2 x --heads {args.heads}")
    return args


if __name__ == "__main__":
    train(parse())
