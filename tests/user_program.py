"""All public names in a typed program. It runs on any number of ranks, and mypy and pyright accept it strictly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import distclip as dc

RECORD = Path("runs/user.jsonl")
world: dc.World = dc.init(timeout=60)
texts: list[str] = world.gather(f"rank {world.rank} of {world.size}, {world.backend}")
forget: Callable[[], None] = world.on_end(world.barrier)
forget()
mesh = dc.Mesh(dp=world.size, tp=1)
group: mx.distributed.Group = mesh.group("dp")

# --------------------------------------------------------------------------- functions of a gradient

mx.random.seed(0)
model = nn.Linear(8, 4)
shapes = dc.shapes_of(model)
layout = dc.layout_of(model, mesh, whole=shapes)
x = mx.random.normal((16, 8), key=mx.random.key(world.rank))


def loss_of(model: nn.Module, x: mx.array) -> mx.array:
    y: mx.array = model(x)
    return y.square().mean()


loss_and_grad: Callable[..., tuple[mx.array, dict[str, mx.array]]] = nn.value_and_grad(model, loss_of)
loss, own = loss_and_grad(model, x)
grads = dc.average_gradients(own, group, weight=len(x), communication_dtype=mx.float32, bucket_bytes=2**20)
dc.check_layout(grads, dc.Replicated(), group=world)
print(dc.check_gradient(model, loss_of, x, grads, layout).verdict)
norm: mx.array = dc.global_norm(grads, layout=layout, norm_type=1)
grads, norm = dc.clip_grad_norm(grads, max_norm=mx.array(1.0), layout=lambda path, leaf: dc.Replicated())
grads, norm = dc.average_and_clip(own, 1.0, group="dp", layout={"weight": dc.Replicated(), "bias": dc.Partial("tp")})
grads = dc.clip_grads_with_norm(grads, 1.0, norm)
grads = dc.clip_grad_value(grads, 0.1, stream=mx.cpu)
grads = dc.adaptive_clip_grad(grads, model.trainable_parameters(), 0.01, layout=dc.Replicated())
mx.eval(grads)
try:
    dc.clip_grad_norm(own, 1.0, layout=dc.Sharded("sp"))
except dc.LayoutError as error:
    advice: list[str] = [leaf.advice for leaf in error.leaves]

# ------------------------------------------------------------------------------------ a whole run

clipper = dc.Clipper(
    dc.ZClip(z_score=3),
    average="dp",
    skip_above=dc.Spike(ratio=9),
    groups={"weights": "*weight"},
    loss_scale=dc.DynamicLossScale(growth_interval=100),
    rank_batch=len(x),
    communication_dtype=mx.bfloat16,
)
optimizer = dc.ClippedOptimizer(optim.AdamW(optim.cosine_decay(1e-2, 10)), clipper)
optimizer.init(model.trainable_parameters())
with dc.Recorder(RECORD, config={"lr": 1e-2}) as record, dc.Watchdog(timeout=60) as watchdog:
    for step in range(1, 4):
        loss, own = loss_and_grad(model, x)
        scaled = {name: grad * clipper.loss_scale for name, grad in own.items()}
        optimizer.update(model, scaled, weight=len(x))
        mx.eval(model.parameters(), optimizer.state)
        record(optimizer.report, loss=loss)
        watchdog(step=step)
report: dc.Report = optimizer.report
numbers: dict[str, Any] = report.to_dict()
skipped: bool = bool(report.skipped.item())
rank_norms: list[float] = numbers["rank_norms"]
state: dict[str, Any] = optimizer.state
optimizer.state = state
clipper.settle()
runs = dc.read_records(RECORD) if world.rank == 0 else None
losses: list[float] = [] if runs is None else [step["loss"] for step in runs.steps]

# ------------------------------------------------------------------------------ a compiled step

compiled = dc.ClippedOptimizer(optim.SGD(0.1), dc.Clipper(lambda step: 1 / (step + 1), average=True))
compiled.init(model.trainable_parameters())
states: list[Any] = [model.state, compiled.state]


@partial(mx.compile, inputs=states, outputs=states)
def train(x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
    loss, grads = loss_and_grad(model, x)
    compiled.update(model, grads)
    return loss, compiled.report.arrays


loss, arrays = train(x)
norm = compiled.clipper.report(arrays).norm
updates: mx.array = compiled.step
compiled.learning_rate = 0.01

rules = [dc.AutoClip(percentile=10), dc.AdaGC(ratio=1.05, warm_up=10)]
for rule in rules:
    clipped, report = dc.Clipper(rule, check="never")(own)
    mx.eval(clipped)

with dc.clipped_optimizers(max_norm=1.0, on_step=lambda report: None) as clipping:
    optim.SGD(0.1).update(model, dc.average_gradients(own))
steps: int = clipping.steps
print(dc.__version__, *sorted(dc.__all__))
