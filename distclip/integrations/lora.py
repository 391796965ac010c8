"""LoRA of a sharded model: what mlx-lm's ``linear_to_lora_layers`` gets when it asks a layer for ``to_lora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from distclip.integrations.whole import AXIS, Sharding
from distclip.layout import Partial, Placement, Replicated, Sharded
from distclip.world import all_sum, init

TO_SHARDED = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
TO_ALL = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear, nn.QuantizedEmbedding, TO_SHARDED[1], TO_ALL[1])
CONVERTED = (nn.Linear, nn.QuantizedLinear, *SWITCHES, *EMBEDDINGS, *TO_SHARDED, *TO_ALL)


class _Communicating(LoRALinear):
    def fuse(self, dequantize: bool = False) -> NoReturn:
        raise TypeError(
            "The LoRA of a sharded layer is not fused. distclip's train() saves adapters whole: fuse them into the "
            "whole model by mlx_lm.fuse."
        )


class AllToShardedLoRA(_Communicating):
    """LoRA of a layer whose output is sharded: ``lora_a``, shape (in, r), is a replica, and ``lora_b``, shape
    (r, out / ranks), a shard. The backward pass sums the ranks' gradients of ``x @ lora_a``, r values a token."""

    sharded_parameter, sharded_dim = "lora_b", 1

    def __call__(self, x: mx.array) -> mx.array:
        low: mx.array = sum_gradients(self.group)(self.dropout(x) @ self.lora_a)
        y: mx.array = self.linear(x)
        return y + (self.scale * (low @ self.lora_b)).astype(x.dtype)


class ShardedToAllLoRA(_Communicating):
    """LoRA of a layer whose input is sharded: ``lora_a``, shape (in / ranks, r), is a shard, and ``lora_b``, shape
    (r, out), a replica. The forward pass sums the ranks' ``x @ lora_a``, r values a token."""

    sharded_parameter, sharded_dim = "lora_a", 0

    def __call__(self, x: mx.array) -> mx.array:
        low = mx.distributed.all_sum(self.dropout(x) @ self.lora_a, group=self.group)
        y: mx.array = self.linear(x)
        return y + (self.scale * (low @ self.lora_b)).astype(x.dtype)


@dataclass
class _Layer:
    """A layer of a sharded model that may be given LoRA, and where it is."""

    path: str
    module: Any
    node: dict[str, Any]  # its part of the layout
    sharding: Sharding

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
        """A LoRA layer around this one, cut as it is, with the matrices of rank 0. Collective over all ranks."""
        lora = self._whole(r, dropout, scale)
        self._move_inside()
        self.set(lora, lora.lora_a, lora.lora_b)
        return lora

    def set(self, lora: Any, lora_a: mx.array, lora_b: mx.array) -> None:
        """Give a LoRA layer this rank's part of whole matrices, those of rank 0. Collective over all ranks."""
        world = init()
        placements: Any = self._placements()
        for name, whole, placement in zip(("lora_a", "lora_b"), (lora_a, lora_b), placements, strict=True):
            leaf = all_sum(whole if world.rank == 0 else mx.zeros_like(whole), world.group)
            if self.sharding.is_cut(placement):
                positions = self._positions()
                leaf = mx.take(leaf, mx.array(positions), axis=placement.dim)
                self.sharding.positions[f"{self.path}.{name}"] = positions
            mx.eval(leaf)
            lora[name], self.node[name] = leaf, placement

    @property
    def _inside(self) -> str:
        return "embedding" if isinstance(self.module, EMBEDDINGS) else "linear"

    @property
    def _weight(self) -> Placement:
        return self.node.get(self._inside, self.node)["weight"]  # type: ignore[no-any-return]

    @property
    def _cut(self) -> str | None:
        """What the ranks share: "outputs", "inputs" or "experts"."""
        weight: Any = self._weight
        if not self.sharding.is_cut(weight):
            return None
        if isinstance(self.module, EMBEDDINGS):
            raise TypeError(f"'{self.path}' is an embedding that is cut, and cannot be given LoRA.")
        return ("inputs", "outputs", "experts")[self.module.weight.ndim - 1 - weight.dim]

    def _placements(self) -> tuple[Placement, Placement]:
        """Of ``lora_a`` and ``lora_b``.

        A layer that communicates does so for its LoRA, too. One that is cut in place leaves that to the layers around
        it: to what is whole in its LoRA each rank has a contribution.
        """
        dim_a, dim_b = (2, 1) if isinstance(self.module, SWITCHES) else (0, 1)
        if self._cut == "experts":
            dim_a = dim_b = 0
        mesh = self.sharding.mesh
        whole: Placement = Replicated() if isinstance(self.module, TO_SHARDED + TO_ALL) else Partial(AXIS, mesh=mesh)
        shard_a, shard_b = (Sharded(AXIS, mesh=mesh, dim=dim) for dim in (dim_a, dim_b))
        both = {"outputs": (whole, shard_b), "inputs": (shard_a, whole), "experts": (shard_a, shard_b)}
        return both.get(self._cut or "", (self._weight, self._weight))

    def _positions(self) -> list[int]:
        """This rank's inputs, outputs or experts."""
        base = f"{self.path}.{self._inside}"
        if self._cut != "inputs" or not isinstance(self.module, QUANTIZED):
            return self.sharding.positions[f"{base}.weight"]
        each = self.module.group_size  # inputs that have one scale
        return [first * each + i for first in self.sharding.positions[f"{base}.scales"] for i in range(each)]

    def _whole(self, rank: int, dropout: float, scale: float) -> Any:
        """A LoRA layer around this one, with whole matrices."""
        module: Any = self.module
        options: dict[str, Any] = {"r": rank, "dropout": dropout, "scale": scale}
        if isinstance(self.module, EMBEDDINGS):
            return LoRAEmbedding.from_base(module, **options)
        *_, outputs, inputs = module.weight.shape
        experts = module.weight.shape[0]
        if isinstance(module, QUANTIZED):
            inputs = module.scales.shape[-1] * module.group_size
        ranks = self.sharding.mesh.size(AXIS)
        sizes = {"inputs": inputs, "outputs": outputs, "experts": experts}
        if self._cut is not None:
            sizes[self._cut] *= ranks
        if isinstance(module, SWITCHES):
            lora: Any = LoRASwitchLinear(sizes["inputs"], sizes["outputs"], sizes["experts"], **options)
        else:
            kinds = ((TO_SHARDED, AllToShardedLoRA), (TO_ALL, ShardedToAllLoRA), (nn.Module, LoRALinear))
            kind = next(kind for base, kind in kinds if isinstance(module, base))
            lora = kind(sizes["inputs"], sizes["outputs"], **options)
            if kind is not LoRALinear:
                lora.group = module.group
        lora.linear = module
        return lora

    def _move_inside(self) -> None:
        """The layer's own parameters are below ``linear`` now, in the layout and in the paths, if they were not."""
        if self._inside in self.node:
            return
        inner = dict(self.node)
        self.node.clear()
        self.node[self._inside] = inner
        self.sharding.rename(f"{self.path}.", f"{self.path}.{self._inside}.")


def offer_lora(model: nn.Module, sharding: Sharding) -> None:
    """Let mlx-lm's ``linear_to_lora_layers`` ask the layers of a sharded model: it asks those that have ``to_lora``."""
    for path, module in model.named_modules():
        if isinstance(module, CONVERTED):
            node = sharding.layout
            for key in path.split("."):
                node = node[int(key) if isinstance(node, list) else key]
            module.to_lora = _Layer(path, module, node, sharding).to_lora


def take_lora_off(model: nn.Module) -> dict[str, Any]:
    """Put the layers that LoRA is around in its place, before a model is sharded, and return the LoRA by path.

    Raises:
        TypeError: a layer has DoRA.
    """
    taken = {}
    for path, module in model.named_modules():
        if isinstance(module, DoRALinear | DoRAEmbedding):
            raise TypeError(f"'{path}' has DoRA, which cannot be sharded: its norms are those of whole rows. Use LoRA.")
        if isinstance(module, LoRALinear | LoRASwitchLinear | LoRAEmbedding):
            taken[path] = module
    if taken:
        model.update_modules(tree_unflatten([(path, _base(lora)) for path, lora in taken.items()]))
    return taken


def put_lora_back(model: nn.Module, taken: dict[str, Any]) -> None:
    """Give a sharded model the LoRA that it had, cut as its layers are. Collective over all ranks."""
    layers = dict(model.named_modules())
    made = []
    for path, old in taken.items():
        layer = layers[path].to_lora.__self__
        lora = layer.to_lora(old.lora_a.shape[1], scale=old.scale)
        layer.set(lora, old.lora_a, old.lora_b)
        lora.dropout, lora._no_grad = old.dropout, set(old._no_grad)
        made.append((path, lora))
    if made:
        model.update_modules(tree_unflatten(made))


def _base(lora: Any) -> Any:
    return lora.embedding if isinstance(lora, LoRAEmbedding) else lora.linear
