"""The world laid out on named axes, and the group of ranks along each."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from distclip.world import World, group_of_one, init

Group = mx.distributed.Group | World | str  # what a user may pass for a group: see as_group

MESHES: list[Mesh] = []  # of this program, in the order in which they were made


class Mesh:
    """The world laid out on named axes, the last axis fastest.

    ``Mesh(dp=2, tp=2)`` puts ranks 0 and 1 into one ``tp`` group, 2 and 3 into the other, and pairs 0 with 2 and 1
    with 3 along ``dp``. Making a mesh is collective: every rank makes the same meshes in the same order.

    Args:
        **axes (int): the size of each axis; their product is the world's size.

    Raises:
        ValueError: the sizes do not multiply to the world's size.
        RuntimeError: the backend cannot split the world (only MPI and NCCL can), and an axis needs it.
    """

    def __init__(self, **axes: int):
        world = init()
        if not axes or any(not isinstance(n, int) or n < 1 for n in axes.values()):
            raise ValueError(f"Mesh needs named axes with sizes of at least 1, such as Mesh(dp=2, tp=2), not {axes}.")
        if math.prod(axes.values()) != world.size:
            asked = ", ".join(f"{name}={n}" for name, n in axes.items())
            raise ValueError(
                f"Mesh({asked}) needs {math.prod(axes.values())} ranks and the world has {world.size}: start with "
                f"`mpirun -n {math.prod(axes.values())} python ...`, or change the sizes."
            )
        self.axes: dict[str, int] = dict(axes)
        self._groups: dict[tuple[str, ...], mx.distributed.Group] = {}
        for name in axes:
            self.group(name)
        MESHES.append(self)

    def group(self, *names: str) -> mx.distributed.Group:
        """This rank's group along one or more axes: the ranks that differ from it on these axes alone.

        A group over several axes is made on first use, which is collective: every rank must ask for it.
        """
        wanted = self.ordered(names)
        if wanted not in self._groups:
            self._groups[wanted] = self._split(wanted)
        return self._groups[wanted]

    def coordinates(self, rank: int | None = None) -> dict[str, int]:
        """Where a rank (default: this one) stands on each axis."""
        rest = init().rank if rank is None else rank
        place: dict[str, int] = {}
        for name in reversed(self.axes):
            rest, place[name] = divmod(rest, self.axes[name])
        return {name: place[name] for name in self.axes}

    def size(self, *names: str) -> int:
        """How many ranks one group along these axes has."""
        return math.prod(self.axes[name] for name in self.ordered(names))

    def ordered(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names in the mesh's order, each once. Raises ValueError for a name that is no axis."""
        for name in names:
            if name not in self.axes:
                raise ValueError(f"The mesh has no axis {name!r}; its axes are {', '.join(self.axes)}.")
        return tuple(name for name in self.axes if name in names)

    def axes_of(self, group: mx.distributed.Group) -> tuple[str, ...] | None:
        """The axes whose group this is, or None when this mesh did not make it."""
        if group is init().group:
            return tuple(self.axes)
        return next((names for names, made in self._groups.items() if made is group), None)

    def _split(self, names: tuple[str, ...]) -> mx.distributed.Group:
        world = init()
        if self.size(*names) == world.size:
            return world.group
        if self.size(*names) == 1:
            return group_of_one()
        if world.backend not in ("mpi", "nccl"):
            raise RuntimeError(
                f"A mesh with several axes splits the world into sub-groups, which MLX's {world.backend} backend "
                "cannot do. Start with Open MPI's `mpirun`, or use a mesh with one axis larger than 1."
            )
        place = self.coordinates()
        color = 0
        for name, size in self.axes.items():
            if name not in names:
                color = color * size + place[name]
        return world.group.split(color)

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={n}' for name, n in self.axes.items())})"


def as_group(group: Any, name: str = "group") -> mx.distributed.Group:
    """The group that an argument means: a group, the world's, or that along an axis of a mesh; None for the world.

    Raises:
        TypeError: it is none of these, or no mesh has that axis.
    """
    if group is None or isinstance(group, World):
        return init().group
    if isinstance(group, mx.distributed.Group):
        return group
    for mesh in reversed(MESHES):
        if isinstance(group, str) and group in mesh.axes:
            return mesh.group(group)
    raise TypeError(
        f"{name} is {group!r}; pass a group, such as mesh.group('dp'), the name of a mesh's axis, or the World of "
        "dc.init()"
    )
