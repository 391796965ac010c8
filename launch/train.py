"""Train a byte-level language model on one process or many: the example to copy.

Alone:                   python launch/train.py
On four processes:       mpirun -n 4 python launch/train.py --parallel dp    (or tp, dp+tp, fsdp)

Every mode runs the same step: a gradient, and the update of a ``distclip.ClippedOptimizer``, which averages, clips, and
skips what is not finite. The text is the language reference that Python ships (``pydoc_data.topics``), or any file that
is given with ``--data``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import distclip as dc
from distclip.gather import gather_text
from distclip.records.live import on_terminal

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
    """Whole checkpoints only, with disks that hosts share or have of their own.

    Each rank that holds a piece of its own writes it into a folder aside, on its disk. When all have, each gives that
    folder its name; where a disk is shared, the first one does. A kill at any moment leaves a step that is whole over
    all ranks, as the last two are kept.
    """

    def __init__(self, folder: str, world: dc.World, mesh: dc.Mesh, facts: dict[str, Any]):
        self.folder, self.world, self.mesh = Path(folder).absolute(), world, mesh
        self.facts = facts | {"pieces": mesh.size("fsdp", "tp")}  # what a resumed run must share
        self.writes = mesh.coordinates()["dp"] == 0  # the other dp ranks hold copies
        self.file = self._file(world.rank)
        drawn = random.getrandbits(31) if world.rank == 0 else 0
        self.run = self._sum(drawn)  # by which ranks know that their checkpoints are of one run

    def _file(self, rank: int) -> str:
        place = self.mesh.coordinates(rank)
        return f"piece-{place['fsdp'] * self.mesh.size('tp') + place['tp']}.safetensors"

    def save(self, step: int, model: nn.Module, optimizer: dc.ClippedOptimizer) -> None:
        aside, arrays = self.folder / f".step-{step:08d}", flat(model, optimizer)
        key = mx.random.state[0][None]  # type: ignore[index]
        keys: Any = mx.distributed.all_gather(key, group=self.world.group).tolist()
        failure: Exception | None = None
        if self.writes:
            try:
                aside.mkdir(parents=True, exist_ok=True)
                mx.save_safetensors(str(aside / self.file), arrays)
                flush(aside / self.file)
                facts = self.facts | {"run": self.run, "step": step, "random": keys}
                (aside / "checkpoint.json").write_text(json.dumps(facts))
                flush(aside / "checkpoint.json")
                flush(aside)
            except (OSError, RuntimeError) as error:  # the latter from MLX
                failure = error
        if self._sum(failure is not None):  # waits for all
            shutil.rmtree(aside, ignore_errors=True)
            self._sum(0)  # the first rank to leave takes the others with it
            needed = sum(array.nbytes for array in arrays.values())
            why = (
                f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()} cannot write the checkpoint of "
                f"step {step} to {self.folder}: {failure} (it takes {needed:,} bytes, and {free_bytes(self.folder):,} "
                "are free). The earlier ones are whole: make room, and go on with --resume"
            )
            leave(None if failure is None else why)
        if self.writes:
            rename(aside, self.folder / f"step-{step:08d}")
            flush(self.folder)
            for old in self._named("step-")[:-2]:
                remove(old)

    def start_afresh(self) -> None:
        """Move the checkpoints of an earlier run out of the way."""
        if self._named("step-"):
            number = 1
            while (moved := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
                number += 1
            if rename(self.folder, moved):
                on = f" on {socket.gethostname()}" if self.world.size > 1 else ""
                print(f"earlier checkpoints in {self.folder}{on} are now in {moved}", flush=True)
        for unfinished in self._named(".step-"):
            remove(unfinished)
        self._sum(0)  # before anyone writes there again

    def load(self, model: nn.Module, optimizer: dc.ClippedOptimizer) -> int:
        """Take up the newest step that is whole over all ranks; returns how many steps that is, 0 without any."""
        told = self._told()
        chosen = self._chosen(told)
        if chosen is None:
            if self.world.rank == 0:
                print(f"--resume: no rank has a checkpoint in {self.folder}: starting from the beginning", flush=True)
            self._keep_up_to(0)
            return 0
        step = int(chosen["step"])
        whole = self._keep_up_to(step) / self.file

        # One rank of each dp group reads, and sends the bits to the others, whose disk may be another.
        arrays: Any = flat(model, optimizer)
        read: Any = mx.load(str(whole)) if self._holders(told, step)[self.file] == self.world.rank else None
        if read is not None and described(read) != described(arrays):
            raise SystemExit(f"--resume: {whole} does not hold the arrays that this model and this optimizer have")
        for name in sorted(arrays):
            arrays[name] = self._sent(mx.zeros_like(arrays[name]) if read is None else read.pop(name))
            mx.eval(arrays[name])
        arrays = tree_unflatten(list(arrays.items()))
        model.update(arrays["model"])
        optimizer.state = arrays["optimizer"]
        mx.eval(model.parameters(), optimizer.state)
        self.run = chosen["run"]
        high, low = chosen["random"][self.world.rank % len(chosen["random"])]  # ranks beyond those then draw alike
        mx.random.seed(high << 32 | low)
        return step

    def _told(self) -> list[dict[str, Any]]:
        """Of every rank where it looked, and the facts of each step it found, with whether its piece is there."""
        found = []
        for path in [*self._named("step-"), *self._named(".step-")]:
            with contextlib.suppress(OSError, ValueError):  # a folder aside may be as a kill left it
                facts = json.loads((path / "checkpoint.json").read_text())
                found.append(facts | {"piece": (path / self.file).exists(), "aside": path.name[0] == "."})
        at = f"rank {self.world.rank} on {socket.gethostname()}, in {self.folder}"
        return [json.loads(text) for text in gather_text(json.dumps({"at": at, "found": found}), self.world.group)]

    def _chosen(self, told: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The facts of the newest step of which every piece is found, the same on all ranks; None without any."""
        named = [facts | {"at": one["at"]} for one in told for facts in one["found"] if not facts["aside"]]
        named.sort(key=lambda facts: -facts["step"])
        for facts in named:
            of = f"step {facts['step']} of {facts['at']},"
            one_piece = facts["pieces"] == self.facts["pieces"] == 1  # any number of dp ranks can take that up
            for name, mine in self.facts.items():
                if facts[name] != mine and not (name == "parallel" and one_piece):
                    self._refuse(
                        f"{of} was written with {name} = {facts[name]}, and this run has {mine}: resume it the way it "
                        "was started, or start afresh without --resume"
                    )
            if facts["run"] != named[0]["run"]:
                other = f"step {named[0]['step']} of {named[0]['at']}"
                self._refuse(f"{of} and {other}, are of different runs: move the one away that is not to go on")
        for facts in named:
            if len(self._holders(told, facts["step"])) == self.facts["pieces"]:
                return dict(facts)
        if named:
            steps = [[str(facts["step"]) for facts in one["found"] if facts["piece"]] or ["none"] for one in told]
            has = [
                f"\n  {one['at']}: {self._file(rank)} of steps {', '.join(steps[rank])}"
                for rank, one in enumerate(told)
            ]
            self._refuse(
                f"no step is whole over all ranks.{''.join(has)}\nPut back what is missing, or start afresh without "
                "--resume"
            )
        return None

    def _holders(self, told: list[dict[str, Any]], step: int) -> dict[str, int]:
        """Of each piece of a step the first rank that has it."""
        ranks = [rank for rank, one in enumerate(told) if any(f["step"] == step and f["piece"] for f in one["found"])]
        return {self._file(rank): rank for rank in reversed(ranks)}

    def _keep_up_to(self, step: int) -> Path:
        """Remove what is newer than a step that is whole over all ranks, and unfinished; returns that step's folder."""
        whole = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{whole.name}"
        if step and (aside / "checkpoint.json").exists():  # all had written, and a kill came before the new name
            rename(aside, whole)
        for path in [*self._named(".step-"), *self._named("step-")]:
            if path.name[0] == "." or path > whole:
                remove(path)
        return whole

    def _refuse(self, why: str) -> NoReturn:
        leave(f"--resume: {why}" if self.world.rank == 0 else None)  # every rank sees the same, so one says it

    def _named(self, prefix: str) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self.folder.iterdir() if path.name.startswith(prefix))
        return []

    def _sent(self, array: mx.array) -> mx.array:
        """The one of the dp group that is not zeros, to the bit: as integers, since -0.0 + 0.0 is 0.0."""
        integers = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.itemsize]
        sum_ = mx.distributed.all_sum(array.reshape(-1).view(integers), group=self.mesh.group("dp"))
        return sum_.view(array.dtype).reshape(array.shape)

    def _sum(self, number: int) -> int:
        total = mx.distributed.all_sum(mx.array(number, mx.int32), group=self.world.group)
        return total.item()  # type: ignore[return-value]


def leave(why: str | None) -> NoReturn:
    """End all ranks, those that say why before the others: mpirun may drop what it hears after the first end."""
    if why is None:
        time.sleep(0.5)
    raise SystemExit(why or 1)


def flat(model: nn.Module, optimizer: dc.ClippedOptimizer) -> dict[str, mx.array]:
    """All arrays of a checkpoint by their paths."""
    return dict(tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}))


def described(arrays: dict[str, mx.array]) -> dict[str, Any]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself: a host may lose power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, name: Path) -> bool:
    """False where another rank that shares the disk was faster."""
    try:
        path.rename(name)
    except FileNotFoundError:
        return False
    return True


def remove(folder: Path) -> None:
    """Take the name first, so that a kill leaves no half of a checkpoint under it."""
    if not folder.name.startswith("."):
        aside = folder.with_name(f".{folder.name}")
        rename(folder, aside)
        folder = aside
    shutil.rmtree(folder, ignore_errors=True)  # another rank may do the same


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


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


def train(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    world = dc.init()
    watchdog = stack.enter_context(dc.Watchdog(args.watchdog)) if args.watchdog else None
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
    recorder = stack.enter_context(dc.Recorder(args.record, config=vars(args))) if args.record else None
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
        if watchdog is not None:
            watchdog(step=done)


WATCHDOG = (
    "end the job when a step, with its validation and checkpoint, takes longer; 0 for never (default: %(default)s)"
)


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
    add("--resume", action="store_true", help="go on from the newest checkpoint, or begin where there is none")
    add("--watchdog", type=float, default=300, metavar="SECONDS", help=WATCHDOG)
    args = parser.parse_args(argv)
    least = dict.fromkeys(("warm_up", "checkpoint_every", "seed"), 0)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < least.get(name, 1) and not isinstance(value, bool):
            parser.error(f"--{name.replace('_', '-')} must be at least {least.get(name, 1)}")
    if args.dims % (2 * args.heads):
        parser.error(f"--dims {args.dims} must be a multiple of 2 x --heads {args.heads}")
    return args


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        train(parse(), stack)
