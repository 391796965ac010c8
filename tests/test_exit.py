"""How a job ends: every program here is started for real, and its exit code, output and time are what is tested."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import pytest
from launching import MPIRUN, Ended, alone, over_ring, under_mpirun

from distclip.openmpi import find_libmpi

pytestmark = pytest.mark.launches

SOON_S = 5
DEBIAN_MPIRUN = Path("/usr/bin/mpirun")

# Rank 1 leaves in the way that the test names, while the others wait for it in an all-sum.
ONE_LEAVES = """
    import sys, time
    from pathlib import Path
    import distclip as dc
    import mlx.core as mx

    world = dc.init()
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
    if world.rank == 1:
        Path("leaving").write_text(str(time.time()))
        {leave}
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
    print("never here", flush=True)
"""
HELD_GROUPS = {
    "a global": """
        group = world.group.split(0)
        mx.eval(mx.distributed.all_sum(mx.ones(3), group=group))
    """,
    "a layer": """
        import mlx.nn as nn
        model = nn.Sequential(nn.layers.distributed.AllToShardedLinear(6, 6, group=world.group.split(0)))
        mx.eval(model(mx.ones((1, 6))))
    """,
    "a compiled function": """
        group = world.group.split(0)
        total = mx.compile(lambda x: mx.distributed.all_sum(x, group=group))
        mx.eval(total(mx.ones(3)))
    """,
    "a cycle": """
        class Held: pass
        held = Held()
        held.itself, held.group = held, world.group.split(0)
        mx.eval(mx.distributed.all_sum(mx.ones(3), group=held.group))
        del held
    """,
}
BEGIN = """
import os, sys, time
from pathlib import Path
import distclip as dc
import mlx.core as mx
world = dc.init()
"""


def dedented(program: str) -> str:
    lines = program.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines) + "\n"


def assert_good(ended: Ended) -> None:
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output, ended.output


def assert_ended_soon(ended: Ended, folder: Path) -> None:
    left_at = float((folder / "leaving").read_text())
    assert ended.at - left_at < SOON_S, ended.output
    assert "never here" not in ended.output, ended.output


# ------------------------------------------------------------------------------------------- one rank fails


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(n: int, tmp_path: Path) -> None:
    ended = under_mpirun(n, ONE_LEAVES.format(leave='raise ValueError("broken data")'), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert "Traceback (most recent call last)" in ended.output
    assert "ValueError: broken data" in ended.output
    assert re.search(rf"rank 1 of {n} on .* failed with ValueError; the whole job ends", ended.output), ended.output


@pytest.mark.parametrize(("n", "leave"), [(2, "sys.exit(3)"), (3, "raise SystemExit(3)"), (4, "sys.exit(3)")])
def test_an_exit_with_an_error_on_one_rank_ends_the_job(n: int, leave: str, tmp_path: Path) -> None:
    ended = under_mpirun(n, ONE_LEAVES.format(leave=leave), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert f"rank 1 of {n}" in ended.output


def test_an_exit_with_an_error_ends_the_job_with_a_collective_under_way(tmp_path: Path) -> None:
    """Rank 1 has asked for a sum that the other rank will not join, as it waits for something else."""
    program = """
    import distclip.ending
    from mpi4py import MPI

    distclip.ending.PENDING_GRACE_S = 1.0
    if world.rank == 1:
        mx.async_eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
        Path("leaving").write_text(str(time.time()))
        sys.exit(3)
    MPI.COMM_WORLD.recv(source=1)
    """
    ended = under_mpirun(2, BEGIN + dedented(program), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert "rank 1 of 2" in ended.output


def test_an_interrupt_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    ended = under_mpirun(2, ONE_LEAVES.format(leave="raise KeyboardInterrupt"), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert re.search(r"rank 1 of 2 on .* failed with KeyboardInterrupt", ended.output), ended.output


CLOSED = ("sys.stdout.close()", "sys.stderr.close()", "sys.stdout = None", "os.close(1)")


@pytest.mark.parametrize("closed", CLOSED)
def test_an_exception_ends_the_job_where_the_output_is_closed(closed: str, tmp_path: Path) -> None:
    ended = under_mpirun(2, ONE_LEAVES.format(leave=f"import os; {closed}; raise ValueError"), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0


# --------------------------------------------------------------------------------------------- good endings


def test_a_program_alone_ends_well(tmp_path: Path) -> None:
    program = BEGIN + "assert (world.rank, world.size, world.backend) == (0, 1, 'none')\n"
    program += "mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))\n"
    assert_good(alone(program, tmp_path))


def test_one_rank_under_mpirun_is_a_single_process_and_ends_well(tmp_path: Path) -> None:
    assert_good(under_mpirun(1, BEGIN + "assert (world.size, world.backend) == (1, 'none'), world\n", tmp_path))


@pytest.mark.parametrize("held_in", HELD_GROUPS)
def test_a_sub_group_held_at_exit_does_no_harm(held_in: str, tmp_path: Path) -> None:
    assert_good(under_mpirun(2, BEGIN + dedented(HELD_GROUPS[held_in]), tmp_path))


def test_meshes_held_at_exit_do_no_harm(tmp_path: Path) -> None:
    program = """
    mesh = dc.Mesh(dp=2, tp=2)
    for axis in mesh.axes:
        mx.eval(mx.distributed.all_sum(mx.ones(3), group=mesh.group(axis)))
    """
    assert_good(under_mpirun(4, BEGIN + dedented(program), tmp_path))


def test_a_collective_under_way_at_exit_is_waited_for(tmp_path: Path) -> None:
    program = "total = mx.distributed.all_sum(mx.ones(3_000_000), group=world.group)\nmx.async_eval(total)\n"
    assert_good(under_mpirun(2, BEGIN + program, tmp_path))


def test_a_rank_may_end_while_another_still_saves(tmp_path: Path) -> None:
    program = """
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
    if world.rank == 0:
        time.sleep(3)
        mx.save_safetensors("model.safetensors", {"weight": mx.ones(3)})
    """
    assert_good(under_mpirun(3, BEGIN + dedented(program), tmp_path))
    assert (tmp_path / "model.safetensors").exists()


def test_a_rank_that_fails_after_the_others_ended_fails_the_job(tmp_path: Path) -> None:
    program = """
    if world.rank == 0:
        time.sleep(2)
        Path("leaving").write_text(str(time.time()))
        raise OSError("disk full")
    """
    ended = under_mpirun(2, BEGIN + dedented(program), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert "OSError: disk full" in ended.output


# -------------------------------------------------------------------------------------------- mpi4py and MLX


def test_mpi4py_works_after_init_and_agrees_with_mlx(tmp_path: Path) -> None:
    program = """
    from mpi4py import MPI

    assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) == (world.rank, world.size) and world.size == 3
    for step in range(3):
        total = mx.distributed.all_sum(mx.array(world.rank + 1.0), group=world.group).item()
        assert MPI.COMM_WORLD.allreduce(world.rank + 1.0) == total == 6.0
    """
    assert_good(under_mpirun(3, BEGIN + dedented(program), tmp_path))


def test_mpi4py_works_after_init_in_a_program_alone(tmp_path: Path) -> None:
    program = BEGIN + "from mpi4py import MPI\nassert MPI.COMM_WORLD.allreduce(5) == 5\n"
    assert_good(alone(program, tmp_path))


def test_a_program_that_started_mpi4py_too_early_is_told_what_to_move(tmp_path: Path) -> None:
    ended = under_mpirun(2, "from mpi4py import MPI\n" + BEGIN, tmp_path)
    assert ended.code != 0
    assert "RuntimeError: MPI was started before distclip.init()" in ended.output
    assert "Move `from mpi4py import MPI` below distclip.init()" in ended.output


@pytest.mark.parametrize("library_named", [True, False])
def test_a_program_that_started_mlx_too_early_is_told_what_to_move(library_named: bool, tmp_path: Path) -> None:
    """Without MLX_MPI_LIBNAME, MLX finds no library and would go on as one process."""
    program = "import mlx.core as mx\nmx.distributed.init()\n"
    if library_named:
        program = f"import os\nos.environ['MLX_MPI_LIBNAME'] = {find_libmpi()!r}\n" + program
    ended = under_mpirun(2, program + BEGIN, tmp_path)
    assert ended.code != 0
    assert "RuntimeError" in ended.output
    assert "mx.distributed" in ended.output
    assert "distclip.init()" in ended.output


# ------------------------------------------------------------------------------- never N programs that look like one


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("content", [None, "not a library", "another library"])
def test_a_library_that_is_none_is_named(content: str | None, n: int, tmp_path: Path) -> None:
    named = tmp_path / "libmpi.so.40"
    if content == "another library":
        import _ctypes

        named.symlink_to(_ctypes.__file__)
    elif content is not None:
        named.write_text(content)
    ended = under_mpirun(n, BEGIN + "print('never here')", tmp_path, MLX_MPI_LIBNAME=str(named))
    assert ended.code != 0
    assert f"RuntimeError: The Open MPI library {named} cannot be used" in ended.output
    assert "MLX_MPI_LIBNAME" in ended.output
    assert "never here" not in ended.output


def test_another_launcher_is_refused(tmp_path: Path) -> None:
    ended = alone(BEGIN + "print('never here')", tmp_path, WORLD_SIZE="4", RANK="0")
    assert ended.code != 0
    assert "WORLD_SIZE=4" in ended.output
    assert "mpirun -n 4 python" in ended.output
    assert "never here" not in ended.output


# ------------------------------------------------------------------------------------------------- mlx.launch


def test_mlx_launch_makes_a_ring_that_ends_well(tmp_path: Path) -> None:
    program = """
    assert (world.size, world.backend) == (2, "ring"), world
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
    print(f"rank {world.rank} is well", flush=True)
    """
    ended = over_ring(2, BEGIN + dedented(program), tmp_path)
    assert_good(ended)
    assert "rank 0 is well" in ended.output
    assert "rank 1 is well" in ended.output


@pytest.mark.parametrize("leave", ['raise ValueError("broken data")', "sys.exit(3)"])
def test_a_rank_that_fails_ends_the_ring(leave: str, tmp_path: Path) -> None:
    ended = over_ring(2, ONE_LEAVES.format(leave=leave), tmp_path)
    assert_ended_soon(ended, tmp_path)
    assert "rank 1" in ended.output
    if leave.startswith("raise"):
        assert "rank 1 of 2" in ended.output
        assert "ValueError: broken data" in ended.output


# --------------------------------------------------------------------------------------------- Debian's Open MPI


@pytest.fixture
def debian_mpirun() -> Path:
    if not DEBIAN_MPIRUN.exists() or DEBIAN_MPIRUN == MPIRUN:
        pytest.skip(f"there is no {DEBIAN_MPIRUN} here")
    version = subprocess.run([DEBIAN_MPIRUN, "--version"], capture_output=True, text=True, timeout=20).stdout
    if "Open MPI" not in version:
        pytest.skip(f"{DEBIAN_MPIRUN} is not Open MPI's")
    return DEBIAN_MPIRUN


def test_the_systems_mpirun_finds_its_own_library(debian_mpirun: Path, tmp_path: Path) -> None:
    program = """
    from mpi4py import MPI

    assert (world.size, world.backend) == (2, "mpi"), world
    group = world.group.split(0)
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=group))
    print(f"library {os.environ['MLX_MPI_LIBNAME']} {MPI.Get_library_version()}", flush=True)
    """
    ended = under_mpirun(2, BEGIN + dedented(program), tmp_path, mpirun=debian_mpirun)
    assert_good(ended)
    version = subprocess.run([debian_mpirun, "--version"], capture_output=True, text=True, timeout=20).stdout
    number = version.split()[3]  # mpirun (Open MPI) 4.1.4
    assert f"Open MPI v{number}" in ended.output
    assert "library /usr/lib" in ended.output, ended.output


@pytest.mark.parametrize("leave", ['raise ValueError("broken data")', "sys.exit(3)"])
def test_a_rank_that_fails_ends_the_job_of_the_systems_mpirun(leave: str, debian_mpirun: Path, tmp_path: Path) -> None:
    ended = under_mpirun(2, ONE_LEAVES.format(leave=leave), tmp_path, mpirun=debian_mpirun)
    assert_ended_soon(ended, tmp_path)
    assert ended.code != 0
    assert "rank 1 of 2" in ended.output


# ------------------------------------------------------------------------------- what a rank starts is no rank

CHILDREN = {
    "subprocess": """
        import subprocess
        child = "import distclip as dc; dc.init()"
        ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=10)
        assert ended.returncode != 0
        assert "was started by a rank" in ended.stderr, ended.stderr
    """,
    "subprocess that is to run alone": """
        import subprocess
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "MLX_"))}
        child = "import distclip as dc; assert dc.init().size == 1"
        subprocess.run([sys.executable, "-c", child], env=env, check=True, timeout=10)
    """,
    "fork that exits": """
        child = os.fork()
        if child == 0:
            sys.exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    """,
    "fork that fails": """
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    """,
}


@pytest.mark.parametrize("who", ["every rank", "one rank"])
@pytest.mark.parametrize("child", CHILDREN)
def test_what_a_rank_starts_does_the_job_no_harm(child: str, who: str, tmp_path: Path) -> None:
    program = BEGIN + "mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))\n"
    condition = "world.rank == 1" if who == "one rank" else "True"
    program += f"if {condition}:\n" + textwrap.indent(dedented(CHILDREN[child]), "    ")
    program += "\nmx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))\n"
    ended = under_mpirun(2, program, tmp_path)
    assert ended.code == 0, ended.output
    assert "the whole job ends" not in ended.output


def test_one_process_under_mlx_launch_runs_alone(tmp_path: Path) -> None:
    ended = over_ring(
        1, "import distclip as dc\nworld = dc.init()\nprint('size', world.size, world.backend)\n", tmp_path
    )
    assert "size 1 none" in ended.output
