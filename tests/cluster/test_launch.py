"""``distclip launch`` on this machine alone: what it shows, what it demands of the ranks, and how it ends."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from launching import SHARE_CORES, Ended, environment, launch, wait_for_end

from distclip.cluster import output
from distclip.cluster.launch import script_files
from distclip.cluster.output import Output, Screen
from distclip.cluster.ranks import Ranks

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[2]
MPIRUN_ARGS = {"MPIRUN_ARGS": shlex.join(SHARE_CORES[4:])}
BEGIN = """
import os, signal, sys, time
import distclip as dc
import mlx.core as mx
world = dc.init()
def together():
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
together()
"""


def launched(folder: Path, program: str, *arguments: str, ranks: int = 3, options: tuple[str, ...] = ()) -> Ended:
    """Run a program with some ranks on this machine."""
    return launch(line(folder, program, *arguments, ranks=ranks, options=options), folder, MPIRUN_ARGS)


def line(folder: Path, program: str, *arguments: str, ranks: int = 3, options: tuple[str, ...] = ()) -> list[str]:
    (folder / "program.py").write_text(BEGIN + textwrap.dedent(program))
    command = [sys.executable, "-m", "distclip", "launch", "--hosts", f"localhost:{ranks}", *options]
    return [*command, "program.py", *arguments]


# -------------------------------------------------------------------------------------------------------- files


def test_the_files_of_a_script_are_those_that_it_imports_from_beside_it(tmp_path: Path) -> None:
    files = {
        "train.py": "import os, checkpoints as c\nfrom model.blocks import mlp\ndef f():\n    import late\n",
        "checkpoints.py": "try:\n    from helper import x\nexcept ImportError:\n    import train\n",
        "helper.py": "import checkpoints\n",
        "late.py": "not Python",
        "os.txt": "",
        "unused.py": "",
        "blocks.py": "",
        "model/__init__.py": "from . import blocks, unused\n",
        "model/blocks/mlp.py": "import extra\n",
        "model/__pycache__/mlp.pyc": "",
        "extra.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    imported = {str(path.relative_to(tmp_path)) for path in script_files(tmp_path / "train.py")}
    assert imported == set(files) - {"os.txt", "unused.py", "blocks.py", "model/__pycache__/mlp.pyc"}
    assert script_files(tmp_path / "nowhere.py") == [tmp_path / "nowhere.py"]
    assert script_files(ROOT / "launch/train.py") == [
        ROOT / "launch" / name for name in ("train.py", "checkpoints.py", "folders.py")
    ]


# -------------------------------------------------------------------------------------------------------- marks


class Shown:
    """What the launcher shows of blocks that mpirun wrote, with three ranks."""

    def __init__(self, file: TextIO):
        self.ranks, self.path = Ranks(3), Path(file.name)
        self.output = Output(file, Screen(), self.ranks.note)

    def take(self, *blocks: bytes) -> str:
        """Take blocks, and return what has been shown by then."""
        for block in blocks:
            self.output.take(block)
            self.output.show_unfinished()
        return self.path.read_bytes().decode()


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    with (tmp_path / "shown").open("w", encoding="utf-8") as file:
        yield Shown(file)


def test_marks_are_read_wherever_mpirun_puts_them(shown: Shown) -> None:
    shown.take(
        b"distclip-rank 2 started mac3\n",  # without a tag, as at the end of a job that was aborted
        b"[0]<stderr>: distclip-rank 0 started mac1\n",
        b"[1]<stderr>: distclip-rank 1 started mac2\n",
        b"[0]<stdout>: loss 2.5[1]<stdout>: loss 2.5[1]<stderr>: distclip-rank 1 ended 0\n[0]<stdout>: \n",
        b"[0]<stdout>: 10 %\r20 %\xe2\x80\xa8\n",
        b"[0]<stderr>: \n",
        b"[2]<stderr>: without its enddistclip-rank 2 ended 137\n",
        b"[1]<stderr>: distclip-rank 1 failing overdue\n[1]<std",
        b"out>: loss 2.5\n",
    )
    shown.output.end()
    lines = "[1] loss 2.5\n[0] loss 2.5\n[0] 10 %\r[0] 20 %\u2028\n[2] without its end\n[1] loss 2.5\n"
    assert shown.take() == lines
    assert shown.ranks.started == {0: "mac1", 1: "mac2", 2: "mac3"}
    assert shown.ranks.ended == {1: 0, 2: 137}
    assert shown.ranks.failing


def test_marks_of_watchdogs(shown: Shown) -> None:
    for rank, step in enumerate((17, 0, 18)):
        assert shown.take(f"[{rank}]<stderr>: distclip-rank {rank} overdue {step}\n".encode()) == ""
    assert shown.ranks.overdue == {0: 17, 1: 0, 2: 18}
    assert not shown.ranks.failing
    shown.take(b"[1]<stderr>: distclip-rank 1 recovered 1\n")
    assert shown.ranks.overdue == {0: 17, 2: 18}
    shown.take(b"[2]<stderr>: distclip-rank 2 failing overdue\n")
    assert shown.ranks.failing


def test_what_is_no_mark_of_a_rank_is_not_counted(shown: Shown) -> None:
    shown.take(b"distclip-rank 7 ended 0\ndistclip-rank 1 ended soon\ndistclip-rank 1 overdue -\n")
    assert shown.ranks == Ranks(3)


def test_lines_without_an_end_are_shown_and_go_on(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HOLD_S", 0.0)
    assert shown.take(b"[0]<stdout>: load") == "[0] load"
    assert shown.take(b"[0]<stdout>: ing \xe2\x86") == "[0] loading "
    assert shown.take(b"[0]<stdout>: \x92") == "[0] loading \u2192"
    assert shown.take(b"[1]<stdout>: hello\n") == "[0] loading \u2192\n[1] hello\n"
    assert shown.take(b"[0]<stdout>: done\n").endswith("[1] hello\n[0] done\n")
    assert shown.take(b"[0]<stdout>: \rstep 1").endswith("\n[0] step 1")
    assert shown.take(b"[0]<stdout>: \rstep 2\r").endswith("\n[0] step 1\r[0] step 2")
    assert shown.take(b"[0]<stdout>: step 3distclip-ra").endswith("\r[0] step 2\r[0] step 3")
    assert shown.take(b"[0]<stdout>: nk 0 overdue 3\n").endswith("\r[0] step 3")
    assert shown.ranks.overdue == {0: 3}
    assert shown.take(b"[0]<stdout>: and d").endswith("\r[0] step 3and d")
    assert shown.take(b"[0]<stdout>: istclip-rank 0 overdue 4\n").endswith("\r[0] step 3and d")
    assert shown.ranks.overdue == {0: 4}
    shown.output.end()
    assert shown.take().endswith("\r[0] step 3and d\n")


def test_what_mpirun_says_is_not_taken_for_a_rank(shown: Shown) -> None:
    rule = b"-" * 74 + b"\n"
    text = b"[1]<stderr>: bye\n" + rule + b"prterun has exited\n" + rule + b"more\n[0]<stderr>: me\n"
    expected = f"[1] bye\n{rule.decode()}prterun has exited\n{rule.decode()}[1] more\n[0] me\n"
    assert shown.take(text) == expected
    assert shown.output.spoke


def test_marks_survive_a_burst_of_text(tmp_path: Path) -> None:
    """mpirun reads blocks of 4 KB: marks lie across their ends, and behind text without a newline. None is shown."""
    program = """
    from distclip.marks import mark
    for number in range(400):
        os.write(2, b"x" * (number % 77) + b"\\n" * (number % 2))
        mark(world.rank, "overdue", number)
        mark(world.rank, "recovered", number)
    """
    ended = launched(tmp_path, program)
    assert ended.code == 0, ended.output
    assert "distclip-rank" not in ended.output
    assert ended.output.count("x") == 3 * sum(number % 77 for number in range(400))


def test_a_rank_that_announces_its_failure_and_does_not_end_is_ended(tmp_path: Path) -> None:
    """The mark comes before the end of the rank, and starts the timeout for the end of the job."""
    program = """
    from distclip.marks import mark
    if world.rank == 1:
        mark(1, "failing", "ValueError")
        time.sleep(1000)
    together()
    """
    (tmp_path / "program.py").write_text(BEGIN + textwrap.dedent(program))
    driver = """
    import sys
    from distclip import cli
    from distclip.cluster import launch

    launch.FAIL_S = 1.0
    sys.exit(cli.main(["launch", "--hosts", "localhost:2", "program.py"]))
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))
    ended = launch([sys.executable, "driver.py"], tmp_path, MPIRUN_ARGS)
    assert ended.code != 0
    assert "mpirun had not ended 1 s after a rank had failed" in ended.output
    assert "distclip-rank" not in ended.output


# -------------------------------------------------------------------------------------------------- good runs


def test_every_line_has_its_rank_and_the_end_is_good(tmp_path: Path) -> None:
    program = """
    if world.rank == 1:
        os.write(1, b"odd \\x00\\xff bytes\\n")
    print("of", world.size, sys.argv[1:], os.environ["GIVEN"], os.getcwd(), flush=True)
    together()
    print("no newline", end="")
    """
    arguments = ("--steps", "a b", "$(touch made)")
    ended = launched(tmp_path, program, *arguments, options=("--env", "GIVEN=x;touch made"))
    assert ended.code == 0, ended.output
    line = f"of 3 {list(arguments)} x;touch made {tmp_path}"
    for rank in range(3):
        assert f"[{rank}] {line}\n" in ended.output
        assert f"[{rank}] no newline\n" in ended.output
    assert "[1] odd \ufffd bytes\n" in ended.output
    assert not (tmp_path / "made").exists()
    assert "distclip:" not in ended.output, "it is silent about itself"


def test_a_program_that_never_joins_ends_well_too(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print('plain')\n")
    command = [sys.executable, "-m", "distclip", "launch", "--hosts", "localhost:2", "program.py"]
    ended = launch(command, tmp_path, MPIRUN_ARGS)
    assert (ended.code, sorted(ended.output.split())) == (0, ["[0]", "[1]", "plain", "plain"])


def test_cluster_sh_prints_a_line_that_can_be_typed(tmp_path: Path) -> None:
    script = tmp_path / "my script.py"
    script.write_text("import distclip as dc\nprint('rank', dc.init().rank)\n")
    command = [str(ROOT / "launch/cluster.sh"), "--hosts", "localhost:2", "--dry-run", str(script)]
    printed = launch(command, tmp_path, MPIRUN_ARGS)
    assert printed.code == 0, printed.output
    ended = launch(["sh", "-c", printed.output], tmp_path)
    assert ended.code == 0, ended.output
    assert "rank 0" in ended.output
    assert "rank 1" in ended.output
    default = launch([str(ROOT / "launch/cluster.sh"), "--dry-run", "--hosts", "a,b"], tmp_path)
    assert default.output.endswith(f"{ROOT}/launch/train.py\n")


# -------------------------------------------------------------------------------------------------- bad endings

BAD = {
    "kill -9": ("os.kill(os.getpid(), signal.SIGKILL)", r"rank 1 on \S+ ended by SIGKILL"),
    "an exception": ("raise ValueError('broken data')", "ended with exit code 1"),
    "sys.exit(3)": ("sys.exit(3)", "ended with exit code 3"),
    "an end without a goodbye": ("os._exit(0)", "ended with exit code 0"),
    "a hang": ("os.kill(os.getpid(), signal.SIGSTOP)", "did not report when the watchdogs of the others did"),
}


@pytest.mark.parametrize("how", BAD)
def test_the_rank_that_failed_is_named(how: str, tmp_path: Path) -> None:
    leave, message = BAD[how]
    program = f"""
    with dc.Watchdog(timeout=2) as watchdog:
        for step in range(4):
            together()
            watchdog()
            if world.rank == 1 and step == 2:
                {leave}
    """
    began = time.time()
    ended = launched(tmp_path, program)
    assert ended.code != 0
    assert ended.at - began < 20
    explanation = next(line for line in ended.output.splitlines() if line.startswith("distclip: the job failed"))
    assert "rank 1 on " in explanation
    assert message.replace(r"\S+", explanation.partition("rank 1 on ")[2].split()[0]) in explanation, explanation


def test_what_is_missing_is_said_before_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distclip", "launch", "--hosts", "localhost:2"]
    ended = launch([*command, "--restarts", "3", "nowhere.py"], tmp_path, MPIRUN_ARGS)
    assert ended.code == 1
    assert "nowhere.py" in ended.output
    ended = launch([*command, "--python", "/nowhere/python", "program.py"], tmp_path, MPIRUN_ARGS)
    assert ended.code == 1
    assert "/nowhere/python" in ended.output


def test_a_bad_option_ends_with_2(tmp_path: Path) -> None:
    for options, message in (
        (("--hosts", "a;b", "x.py"), "'a;b' is not a host"),
        (("--hosts", "a"), "name the script"),
    ):
        ended = launch([sys.executable, "-m", "distclip", "launch", *options], tmp_path)
        assert ended.code == 2
        assert message in ended.output


# --------------------------------------------------------------------------------------- restarts, signals, bounds


def test_a_failed_job_is_started_again_with_resume(tmp_path: Path) -> None:
    program = """
    tries = int(open("tries").read()) if os.path.exists("tries") else 0
    together()
    if world.rank == 0:
        open("tries", "w").write(str(tries + 1))
        print("try", tries, sys.argv[1:], flush=True)
    together()
    if tries < 2:
        sys.exit(5)
    """
    ended = launched(tmp_path, program, "--steps=9", ranks=2, options=("--restarts", "2"))
    assert ended.code == 0, ended.output
    tries = [line for line in ended.output.splitlines() if line.startswith("[0] try")]
    first, *others = ("['--steps=9']", *["['--steps=9', '--resume']"] * 2)
    assert tries == [f"[0] try {number} {text}" for number, text in enumerate((first, *others))]
    (tmp_path / "tries").write_text("-9")
    ended = launched(tmp_path, program, ranks=2, options=("--restarts", "1"))
    assert ended.code == 5, ended.output


def test_a_bad_option_is_not_started_again(tmp_path: Path) -> None:
    program = """
    import argparse
    open(f"started-{world.rank}-{time.time()}", "w").close()
    argparse.ArgumentParser().parse_args()
    """
    ended = launched(tmp_path, program, "--no-such-option", ranks=2, options=("--restarts", "3"))
    assert ended.code == 2, ended.output
    assert "not started again: exit code 2 says that the script does not know an option" in ended.output
    assert len(list(tmp_path.glob("started-*"))) == 2


def test_an_mpirun_that_was_killed_is_named(tmp_path: Path) -> None:
    program = """
    if world.rank == 1:
        shell = os.getppid()
        with open(f"/proc/{shell}/stat") as file:
            os.kill(int(file.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
    time.sleep(20)
    """
    ended = launched(tmp_path, program)
    assert ended.code == 1
    assert "distclip: the job failed (exit code 1): " in ended.output
    assert "mpirun was ended by SIGKILL" in ended.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    program = "print('ready', os.getpid(), flush=True)\ntime.sleep(100)\n"
    process = subprocess.Popen(
        line(tmp_path, program),
        cwd=tmp_path,
        env=environment() | MPIRUN_ARGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have what they put aside ignore it
    )
    assert process.stdout is not None
    ranks = [int(process.stdout.readline().split()[-1]) for _ in range(3)]
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    process.stdout.close()
    assert not wait_for_end(ranks, 5)


@pytest.mark.parametrize(("bound", "when"), [("START_S", "starting"), ("FINISH_S", "finished")])
def test_an_mpirun_that_hangs_is_ended(bound: str, when: str, tmp_path: Path) -> None:
    """mpirun is stopped as soon as the launcher is in the state that is to be bounded."""
    (tmp_path / "program.py").write_text("")
    driver = f"""
    import os, signal, sys
    from distclip import cli
    from distclip.cluster import launch

    launch.{bound} = 1.0
    launch.STOP_S = 1.0
    state = launch.Ranks.state.fget
    children = []

    class Popen(launch.subprocess.Popen):
        def __init__(self, line, **options):
            super().__init__(line, **options)
            if "--output" in line:
                children.append(self.pid)

    def stopping(self):
        if state(self) == "{when}" and children:
            os.kill(children.pop(), signal.SIGSTOP)
        return state(self)

    launch.subprocess.Popen = Popen
    launch.Ranks.state = property(stopping)
    sys.exit(cli.main(["launch", "--hosts", "localhost:2", "program.py"]))
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))
    ended = launch([sys.executable, "driver.py"], tmp_path, MPIRUN_ARGS)
    assert ended.code != 0
    what = "had not started after 1 s" if when == "starting" else "had not ended 1 s after every rank had finished"
    assert what in ended.output
