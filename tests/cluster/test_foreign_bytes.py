"""Whatever hosts answer, ranks print or a hosts file has: one clear line, and never a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import BIN

from distclip.cluster import agent, checks, network
from distclip.cluster.answers import CONNECTED, COUNTS, facts_form, fits
from distclip.cluster.doctor import Diagnosis, _place, read_reports, table
from distclip.cluster.hosts import Cluster, Host, Job, read_hostfile
from distclip.cluster.hosts import network as network_of
from distclip.cluster.output import Output, Screen
from distclip.cluster.ranks import Ranks
from distclip.cluster.remote import ask, start_agents

pytestmark = pytest.mark.launches

JOB = Job(Cluster((Host("a"), Host("b"))), 2, sys.executable, str(BIN / "mpirun"), "/", "10.0.0.0/24")
BOUNDED = settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PROBE = {
    "error": None,
    "versions": {"mlx": "1", "mpi4py": "1", "distclip": "1"},
    "device": "gpu",
    "code": "c",
    "wanted": None,
    "cpu": "native",
    "warning": None,
    "engine": "gpu",
    "fast_synch": "",
    "gpu_problem": "",
}
FACTS: dict[str, Any] = {
    "hostname": "here",
    "system": "Darwin",
    "python": ["3.12.1", "/p"],
    "networks": [["en5", "10.0.0.1", 24]],
    "met": ["10.0.0.1"],
    "listening": [5000, "word"],
    "daemon": True,
    "cwd": True,
    "files": {"/train.py": {"folder": False, "bytes": 5, "digest": "d"}},
    "names": {"a": ["10.0.0.1"], "b": {"error": "unknown"}},
    "mpirun": "5.0.11",
    "probe": PROBE,
}
CONNECTED_TO = {"a": {"error": "no route"}, "b": {"to": "10.0.0.2", "by": "10.0.0.1"}}
SAID = [
    {"rank": 0, "library": "/l", "version": "Open MPI v5.0.11"},
    {"rank": 0, "size": 2, "mpi4py": "Open MPI v5.0.11", "loaded": ["/l"]},
    {"rank": 0, "norm": (2.0).hex(), "right": True},
    {"link": [0, 1], "latency_us": 3.0, "bandwidth_gbit_s": 1.0},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that is in a value of JSON."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*path, key))


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON in which something is replaced or missing."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([(0, *path) for path in places(whole[0])]))
        inside: Any = whole
        for key in path:
            inside = inside[key]
        if isinstance(inside, dict) and draw(st.booleans()):
            del inside[last]
        else:
            inside[last] = draw(JSON)
    return whole[0]


@BOUNDED
@given(damaged(FACTS), damaged(CONNECTED_TO), damaged({"en5": 5}))
def test_facts_of_any_form(facts: Any, connected: Any, counts: Any) -> None:
    """What does not fit is refused; what fits makes findings, with any other host."""
    form = facts_form(["/train.py"], ["a", "b"])
    assert fits(FACTS, form)
    theirs = facts if fits(facts, form) else FACTS
    answers = {"a": connected} if fits(connected, CONNECTED) else {}
    for here in (FACTS, theirs):
        hosts = {"a": theirs, "b": FACTS}
        if any(each["probe"] is None for each in hosts.values()):  # of the launching machine alone
            continue
        findings = [*checks.check_installed(JOB, hosts, here), *checks.check_hosts(JOB, hosts, here, ["/train.py"])]
        network.requests(JOB, checks.machines(hosts, here))
        findings += [*network.check_network(JOB, hosts, here, answers), *network.check_names(JOB, hosts, here)]
        findings += checks.check_variables(hosts)
        if fits(counts, COUNTS):
            findings += network.check_bytes(JOB, hosts, {"a": counts}, {"a": {"en5": 7}})
        findings.sort(key=_place)
        assert table(Diagnosis(findings))


@BOUNDED
@given(st.lists(st.sampled_from(SAID).flatmap(damaged) | st.sampled_from(SAID), max_size=6), st.text(max_size=20))
def test_what_ranks_print_of_any_form(said: list[Any], noise: str) -> None:
    output = noise.join(agent.SELF_TEST_MARK + json.dumps(each) for each in said)
    reports, links = read_reports(output + noise, ["a", "b"])
    findings = [*checks.check_ranks(JOB, "5.0.11", ["a", "b"], reports), *network.check_links(links)]
    assert all(finding.ok or finding.remedy for finding in findings)


ANSWERS = {
    "nothing": "",
    "an end of the line": "\n",
    "no JSON": "distclip-agent {oops\n",
    "a number": "distclip-agent 5\n",
    "a list": 'distclip-agent ["hostname"]\n',
    "an empty answer": "distclip-agent {}\n",
    "deep": "distclip-agent " + "[" * 100_000 + "\n",
    "no end": "x" * 2**25,
    "bytes": "distclip-agent \udcff\udcfe\n",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_agent_that_answers_nonsense(answer: str, tmp_path: Path) -> None:
    (tmp_path / "answer").write_bytes(ANSWERS[answer].encode(errors="surrogateescape"))
    line = ["sh", "-c", f"read -r request; cat {tmp_path}/answer; sleep 1"]

    async def request() -> dict[str, Any]:
        async with start_agents({"a": line}) as agents:
            answers = await ask(agents, 5, {"a": {"do": "count"}}, facts_form([], []))
            assert answers == {}
            code, error = await agents["a"].end()
            return {"finding": checks.unreached("a", JOB, code, error)}

    finding = asyncio.run(request())["finding"]
    assert not finding.ok
    assert finding.remedy


@pytest.mark.parametrize("before", [r"\033]0;my mac\007", "Welcome", "Welcome\n", "distclip-", "%s" * 5])
def test_start_up_files_that_print(before: str, tmp_path: Path) -> None:
    """In the shell, without a newline too, and in Python."""
    (tmp_path / "sitecustomize.py").write_text("print('hello', end='')\n")
    shell = 'printf "$1"; export PYTHONPATH=$2; exec "$3" -c "$4"'
    line = ["sh", "-c", shell, "sh", before, str(tmp_path), sys.executable, agent.START]
    request: dict[str, Any] = {
        "do": "look",
        "source": Path(agent.__file__).read_text(),
        "mpirun": JOB.mpirun,
        "cwd": "/",
    }
    request |= {"env": {}, "files": [], "names": [], "probe": True}

    async def look() -> dict[str, Any]:
        async with start_agents({"a": line}) as agents:
            return await ask(agents, 25, {"a": request}, facts_form([], []))

    facts = asyncio.run(look())["a"]
    assert facts["probe"]["error"] is None
    assert facts["mpirun"].startswith("5.")


# -------------------------------------------------------------------------------------------------- hosts files


HOSTS = [{"ssh": "mac1", "ips": ["10.0.0.1"], "rdma": [None]}, {"ssh": "me@mac2", "ips": ["10.0.0.2"]}]
TEXT = "# hosts\nmac1 slots=2\nmac2\n"


@BOUNDED
@given(
    damaged(HOSTS).map(json.dumps)
    | damaged({"hosts": HOSTS, "envs": ["A=1"]}).map(json.dumps)
    | st.text(max_size=40)
    | st.builds(lambda noise, at: TEXT[:at] + noise + TEXT[at:], st.text(max_size=5), st.integers(0, len(TEXT))),
)
def test_hosts_files_of_any_content(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "hosts"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with contextlib.suppress(ValueError):
        network_of(read_hostfile(file))


BAD_FILES = {
    '[{"ssh": "mac1", "ips": 5}]': '"ips" of mac1 is a list of addresses',
    '[{"ssh": "mac1", "ips": [5]}]': '"ips" of mac1 is a list of addresses',
    '[{"ssh": "mac1", "ips": "10.0.0.1"}]': '"ips" of mac1 is a list of addresses',
    "[" * 100_000: "it is nested too deeply",
    "mac1:22": "a port belongs in ~/.ssh/config",
    '[{"ssh": "mac1:22"}]': "a port belongs in ~/.ssh/config",
    "mac1 slots=99999999999999999999999": "is not a number of ranks",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=BAD_FILES.values())
def test_bad_hosts_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match="hosts: ") as error:
        read_hostfile(tmp_path / "hosts")
    assert BAD_FILES[text] in str(error.value)


@pytest.mark.parametrize("text", [json.dumps(HOSTS), "mac1\nme@mac2\n"])
def test_a_byte_order_mark_is_no_host(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text, encoding="utf-8-sig")
    assert [host.name for host in read_hostfile(tmp_path / "hosts").hosts] == ["mac1", "me@mac2"]


# ------------------------------------------------------------------------------------------------ mpirun's output


PARTS = st.sampled_from(
    [
        *(b"[0]<stdout>: ", b"[1]<stderr>: ", b"[7]<stdout>: ", b"[", b"\n", b"\r", b"\0", b"-" * 74, b"text"),
        *(b"\xe2\x86", b"\x92", b"distclip-r", b"distclip-rank 0 started mac1", b"distclip-rank 1 ended 0"),
        *(b"distclip-rank 99 ended 0", b"distclip-rank 1 ended x"),
    ]
)


class Kept(Screen):
    """A screen that keeps what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def _write(self, file: TextIO, text: str) -> None:
        self.text += text


@BOUNDED
@given(st.lists(PARTS | st.binary(max_size=5), max_size=40), st.lists(st.integers(1, 60), max_size=20))
def test_output_of_any_form(parts: list[bytes], sizes: list[int]) -> None:
    """However the output is cut into blocks, the marks and the text are the same."""
    data = b"".join(parts)

    def shown(blocks: list[bytes]) -> tuple[Ranks, str]:
        ranks, screen = Ranks(2), Kept()
        output = Output(sys.stdout, screen, ranks.note)
        for block in blocks:
            output.take(block)
        output.end()
        return ranks, screen.text

    blocks, rest = [], data
    for size in sizes:
        blocks.append(rest[:size])
        rest = rest[size:]
    assert shown([data]) == shown([*blocks, rest])


def test_the_texts_of_marks_are_read(tmp_path: Path) -> None:
    """The launcher reads what a rank writes."""
    program = "from distclip.marks import mark; mark(1, 'joining', 2); mark(1, 'failing', 'ValueError')"
    ended = subprocess.run(
        [sys.executable, "-c", program], env={"DISTCLIP_MARKS": "1", "PATH": "/bin"}, stderr=subprocess.PIPE, timeout=60
    )
    ranks = Ranks(2)
    with (tmp_path / "shown").open("w") as file:
        Output(file, Screen(), ranks.note).take(ended.stderr)
    assert (ranks.joining, ranks.failing) == ({1}, True)
