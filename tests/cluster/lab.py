"""Several hosts on one machine, for tests: Linux namespaces with real sshd, real TCP, and faults on demand.

    with Lab() as lab:                                    # h1 to h4: 10.77.0.1 to 10.77.0.4, one switch
        ended = lab.on(1, ["ssh", "h2", "hostname"], limit_s=5)     # Ended(code, output, at)
        job = lab.start(1, [*lab.mpirun(), *python, "train.py"])    # runs while the test goes on
        job.wait_for("step 3/", limit_s=20)
        lab.cut(3)
        ended = job.wait(limit_s=10)
        assert lab.left(grace_s=5) == []                  # nothing runs on any host

Each host has its own address, host name, processes, shared memory, /home, /tmp and /run; root's home is HOME. All
hosts share the rest of the disk: the repository, Python's environment, ``lab.shared``. For the test, host 2's /tmp/x is
``lab.outside(2, "/tmp/x")``. Hosts do not see the test's ``tmp_path``, which lies in /tmp.

The hosts share the machine's cores and one kernel. So ``lab.mpirun()`` lets ranks sleep while they wait, and use TCP
alone; ``MPIRUN_ARGS`` has the same settings for other launchers.

Labs have no global names, so two labs do not disturb each other. Every process of a lab ends when the process that made
the lab ends, for any reason; namespaces, mounts and links go with the last process. The next lab removes the folder of
a lab whose maker was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from launching import MPIRUN, Ended

from cluster.system import (
    LIMIT_S,
    NAMESPACES,
    PATH,
    Keeper,
    Process,
    child_of,
    in_host,
    in_network,
    pid_inside,
    processes,
    remove,
    run,
    send,
    wait_until,
)

ROOT = Path(__file__).parent.parent.parent
HOME = "/home/root"  # of root, on each host
SUBNET = "10.77.0"
TOOLS = ("bash", "ip", "tc", "mount", "nsenter", "unshare", "ssh", "sshd", "ssh-keygen")
PRIVATE = ("/home", "/tmp", "/run")  # folders that every host has for itself
PREFIX = "distclip-lab-"
MPIRUN_ARGS = (
    "--mca pml ob1 --mca btl tcp,self --mca mpi_yield_when_idle 1 --mca threads_pthreads_yield_strategy nanosleep"
)


@dataclass(frozen=True)
class Link:
    """The link of a host to the switch: bits per second each way, in the form of tc (None: no limit), and a delay."""

    rate: str | None
    delay_s: float  # from any host to any other


LINKS = {
    "unshaped": Link(None, 0),
    "10gbit": Link("10gbit", 0),
    "1gbit": Link("1gbit", 0.00016),  # 0.5 ms for a round trip, with the work of the switch
}


class Running:
    """A command that runs on a host."""

    def __init__(self, lab: Lab, host: int, command: Sequence[str], entry: subprocess.Popen[bytes], output: Path):
        self._lab, self.host, self._command, self._entry, self._output = lab, host, command, entry, output
        self._at: float | None = None

    @property
    def output(self) -> str:
        """Its standard output and error so far."""
        return self._output.read_text(errors="replace").replace("\0", "")  # mpirun also writes zero bytes

    @property
    def code(self) -> int | None:
        """Its exit code, 128 and the signal if one ended it, None while it runs."""
        code = self._entry.poll()
        if code is not None and self._at is None:
            self._at = time.time()
        return code

    def wait_for(self, text: str, *, limit_s: float) -> str:
        """Wait for a text in the output, and return the output.

        Raises:
            AssertionError: the command ended without it, or the limit is over.
        """
        until = time.monotonic() + limit_s
        while True:
            ended = self.code is not None
            if text in (output := self.output):
                return output
            if ended or time.monotonic() > until:
                how = f"ended with exit code {self.code}" if ended else f"ran for {limit_s} s"
                raise AssertionError(f"{' '.join(self._command)} {how} and did not say {text!r}:\n{output}")
            time.sleep(0.02)

    def wait(self, *, limit_s: float) -> Ended:
        """Wait for the end of the command.

        Raises:
            AssertionError: it does not within the limit; then everything that runs in the lab is ended.
        """
        until = time.monotonic() + limit_s
        while self.code is None:
            if time.monotonic() > until:
                self._lab.clear()
                raise AssertionError(f"{' '.join(self._command)} took longer than {limit_s} s:\n{self.output}")
            time.sleep(0.01)
        assert self._at is not None
        return Ended(self._entry.returncode, self.output, self._at)

    def forget(self) -> None:
        """Stop waiting for it, since its host has ended it."""
        self._entry.kill()
        self._entry.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the command itself, such as mpirun, and to nothing that it started."""
        for process in self._lab.processes(self.host):
            if process.parent == self._entry.pid:
                os.kill(process.pid, number)


@dataclass
class _Host:
    """A host, and what is wrong with it."""

    number: int
    folder: Path
    keeper: Keeper  # the host ends with it
    init: int  # the pid of its first process, outside
    sshd: int = 0  # the pid of its sshd; 0: none
    mounts: list[str] = field(default_factory=list)
    is_cut: bool = False
    is_blocked: bool = False


class Lab:
    """N hosts and a switch, which exist inside the ``with``.

    Hosts are numbered from 1. :meth:`reset` takes back what the other methods do to hosts and links.
    """

    def __init__(self, hosts: int = 4):
        self.hosts = [f"h{k}" for k in range(1, hosts + 1)]
        self.subnet = f"{SUBNET}.0/24"
        self._hosts: dict[int, _Host] = {}
        self._running: list[Running] = []
        self._link = LINKS["unshaped"]
        self._keepers: list[Keeper] = []
        self._delaying: Keeper | None = None

    def __enter__(self) -> Lab:
        why = unavailable()
        if why is not None:
            raise RuntimeError(why)
        _remove_abandoned()
        self.folder, self._lock = _own_folder()
        self.shared = self.folder / "shared"  # the same disk, and the same path, on every host
        self.shared.mkdir()
        self._kept = _kept(self.folder)
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)  # if what follows fails
            self._write_etc()
            self._switch = self._keep(["unshare", "--net", "bash", "-c", "echo ready; read _"])
            self._switch.wait_ready()
            self._ip("link add br0 type bridge", "link set br0 up")
            self._boot(range(1, len(self.hosts) + 1))
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    # --------------------------------------------------------------------------------------------- the hosts

    def address(self, k: int) -> str:
        return f"{SUBNET}.{k}"

    def hosts_json(self, path: Path, n: int | None = None) -> Path:
        """Write the first n hosts (default: all) as MLX's hosts.json, and return the path."""
        hosts = [{"ssh": name, "ips": [self.address(k)]} for k, name in enumerate(self.hosts[:n], 1)]
        path.write_text(json.dumps(hosts))
        return path

    def hostfile(self, path: Path, n: int | None = None) -> Path:
        """Write the first n hosts (default: all) as a hostfile of Open MPI, one rank each, and return the path."""
        path.write_text("".join(f"{name} slots=1\n" for name in self.hosts[:n]))
        return path

    def outside(self, k: int, path: str) -> Path:
        """The path, for the test, of a path in a host's /home, /tmp or /run."""
        assert any(Path(path).is_relative_to(private) for private in PRIVATE), f"{path} is the same on every host"
        return self._hosts[k].folder / path.lstrip("/")

    def mpirun(self, *hosts: str) -> list[str]:
        """The words of an mpirun line up to the program, on hosts such as ``"h1", "h2:2"`` (default: one rank each).

        It notices within 5 s that a host is gone.
        """
        slots = [name if ":" in name else f"{name}:1" for name in hosts or self.hosts]
        ssh = "-o ServerAliveInterval=1 -o ServerAliveCountMax=4 -o ConnectTimeout=5 -o BatchMode=yes"
        line = [str(MPIRUN), "--allow-run-as-root", "--host", ",".join(slots)]
        line += [
            "-n",
            str(sum(int(slot.partition(":")[2]) for slot in slots)),
            "--bind-to",
            "none",
            *MPIRUN_ARGS.split(),
        ]
        line += ["--mca", "btl_tcp_if_include", self.subnet, "--prtemca", "prte_if_include", self.subnet]
        for name, value in (("time", 5), ("intvl", 1), ("probes", 5)):
            line += ["--prtemca", f"oob_tcp_keepalive_{name}", str(value)]
        return [*line, "--prtemca", "plm_ssh_args", ssh]

    # ------------------------------------------------------------------------------------------- processes

    def on(
        self,
        k: int,
        command: Sequence[str],
        *,
        limit_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> Ended:
        """Run a command on host k, in ``lab.shared`` or another folder, with a clean environment and ``env``.

        Raises:
            AssertionError: it takes longer than the limit; then everything that runs in the lab is ended.
        """
        return self.start(k, command, env=env, cwd=cwd).wait(limit_s=limit_s)

    def start(
        self,
        k: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> Running:
        """Start a command on host k, as :meth:`on` does, and do not wait for it."""
        clean = {"HOME": HOME, "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "PATH": PATH}
        output = self.folder / f"output-{len(self._running)}"
        with output.open("wb") as file:
            entry = subprocess.Popen(
                [*in_host(self._hosts[k].init, cwd or self.shared), *command],
                env=clean | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running = Running(self, k, command, entry, output)
        self._running.append(running)
        return running

    def processes(self, k: int | None = None, containing: str = "") -> list[Process]:
        """The processes on host k, or on all hosts, with a text in their command line. Leaves out init and sshd."""
        hosts = [self._hosts[k]] if k is not None else list(self._hosts.values())
        at_rest = {pid for host in hosts for pid in (host.init, host.sshd)}
        running = processes({host.number: host.init for host in hosts})
        return [process for process in running if process.pid not in at_rest and containing in process.command]

    def left(self, *, grace_s: float) -> list[Process]:
        """The processes that still run after the grace period; empty as soon as none do."""
        until = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return left

    def clear(self) -> None:
        """End everything that runs on the hosts."""
        until = time.monotonic() + LIMIT_S
        while left := self.processes():
            for process in left:
                send(signal.SIGKILL, process.pid)
            if time.monotonic() > until:
                raise RuntimeError(f"the lab cannot end {left}")
            time.sleep(0.01)

    def bytes_sent(self, k: int) -> int:
        """How many bytes host k has sent over its link since it was started."""
        lines = Path(f"/proc/{self._hosts[k].init}/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("eth0:"))

    # ------------------------------------------------------------------------------------------ faults of links

    def shape(self, link: str) -> None:
        """Give every host another link: one of ``LINKS``."""
        self._link = LINKS[link]
        if self._delaying is not None:
            self._delaying.end()
            self._delaying = None
        for k in self._hosts:
            self._shape(k)
        if self._link.delay_s:
            ports = [f"p{k}" for k in self._hosts if self._is_up(k)]
            command = [
                sys.executable,
                "-S",
                str(Path(__file__).with_name("switch.py")),
                str(self._link.delay_s),
                *ports,
            ]
            self._delaying = self._keep([*in_network(self._switch.pid), *command])
            self._delaying.wait_ready()

    def _shape(self, k: int) -> None:
        if not self._is_up(k):
            return
        self._ip(f"link set p{k} nomaster" if self._link.delay_s else f"link set p{k} master br0")
        rate = self._link.rate
        for namespace, device in ((self._hosts[k].init, "eth0"), (self._switch.pid, f"p{k}")):
            script = f"tc qdisc del dev {device} root; true"
            if rate is not None:
                script = f"tc qdisc replace dev {device} root tbf rate {rate} burst 256kb latency 50ms"
            run([*in_network(namespace), "bash", "-c", script])

    def cut(self, k: int) -> None:
        """Drop all that passes host k's link, without an error to anyone."""
        self._hosts[k].is_cut = True
        self._filter(k)

    def block(self, k: int) -> None:
        """Drop connections to host k, except to ssh's port; connections from it work."""
        self._hosts[k].is_blocked = True
        self._filter(k)

    def mend(self, k: int) -> None:
        """Take back :meth:`cut` and :meth:`block`."""
        self._hosts[k].is_cut = self._hosts[k].is_blocked = False
        self._filter(k)

    def _filter(self, k: int) -> None:
        host = self._hosts[k]
        script = "tc qdisc del dev eth0 clsact; ip link del hole; set -e\n"
        if host.is_cut or host.is_blocked:  # the hole is a bridge without ports: kernels may lack "action drop"
            script += "ip link add hole type bridge; ip link set hole up; tc qdisc add dev eth0 clsact\n"
        if host.is_cut:
            script += CUT
        if host.is_blocked:
            script += BLOCK
        run([*in_network(host.init), "bash", "-c", script])

    # ------------------------------------------------------------------------------------------ faults of hosts

    def stop_host(self, k: int) -> None:
        """Stop every process of host k, sshd too; its kernel still acknowledges packets."""
        self._signal_all(k, signal.SIGSTOP, lambda process: process.state == "T")

    def continue_host(self, k: int) -> None:
        """Take back :meth:`stop_host`."""
        self._signal_all(k, signal.SIGCONT, lambda process: process.state != "T")

    def _signal_all(self, k: int, number: int, is_done: Callable[[Process], bool]) -> None:
        host = self._hosts[k]

        def done() -> bool:
            others = [
                process for process in processes({k: host.init}) if process.pid != host.init and not is_done(process)
            ]
            for process in others:
                send(number, process.pid)
            return not others

        wait_until(done, f"host {k} to take signal {number}")

    def kill_host(self, k: int) -> None:
        """Pull host k's plug: all its processes are gone at once, without an error to anyone."""
        host = self._hosts[k]
        self.cut(k)  # a kernel that lives on would end the connections of processes that died
        send(signal.SIGKILL, host.init)
        host.keeper.wait()
        self._ip(f"link del p{k}")

    def boot_host(self, k: int) -> None:
        """Start host k again after :meth:`kill_host`; its disk is as it was, except /run and /tmp,
        which a start empties: a daemon of Open MPI keeps files in /tmp by its process number."""
        self._boot([k])

    def refuse_ssh(self, k: int) -> None:
        """End the sshd of host k that listens; its open sessions go on."""
        host = self._hosts[k]
        if host.sshd:
            send(signal.SIGKILL, host.sshd)
            wait_until(
                lambda: all(process.pid != host.sshd for process in processes({k: host.init})),
                f"host {k}'s sshd to end",
            )
            host.sshd = 0

    def freeze_ssh(self, k: int) -> None:
        """Stop the sshd of host k, so that it does not answer."""
        send(signal.SIGSTOP, self._hosts[k].sshd)

    def accept_ssh(self, k: int) -> None:
        """Take back :meth:`refuse_ssh` and :meth:`freeze_ssh`."""
        host = self._hosts[k]
        if host.sshd:
            send(signal.SIGCONT, host.sshd)
            return
        file = host.folder / "run/sshd.pid"
        file.unlink(missing_ok=True)
        run([*in_host(host.init), str(shutil.which("sshd", path=PATH)), "-f", str(self.folder / "etc/sshd_config")])
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), f"host {k}'s sshd")
        inside = file.read_text().strip()
        host.sshd = next(process.pid for process in processes({k: host.init}) if pid_inside(process.pid) == inside)

    # ------------------------------------------------------------------------------------------ faults of disks

    def hide(self, k: int, path: Path | str) -> None:
        """Hide a file or folder from host k."""
        folder, name = Path(path).parent, Path(path).name
        script = """
            aside=$(mktemp -d /run/hidden.XXXXXX) && mount -t tmpfs tmpfs "$aside" && mkdir "$aside/upper" "$aside/work"
            mknod "$aside/upper/$2" c 0 0 # what overlayfs takes for "not there"
            mount -t overlay overlay -o "lowerdir=$1,upperdir=$aside/upper,workdir=$aside/work" "$1"
        """
        self._mount(k, str(folder), script, str(folder), name)

    def replace(self, k: int, path: Path | str, content: str) -> None:
        """Give a file another content on host k, and the same mode."""
        script = """
            aside=$(mktemp /run/replaced.XXXXXX) && cp -p "$1" "$aside" && printf %s "$2" >"$aside"
            mount --bind "$aside" "$1"
        """
        self._mount(k, str(path), script, str(path), content)

    def overlay(self, k: int, path: Path | str, other: Path | str) -> None:
        """Replace a file or folder on host k."""
        self._mount(k, str(path), 'mount --bind "$2" "$1"', str(path), str(other))

    def small_disk(self, k: int, path: Path | str, size: str) -> None:
        """Make a folder on host k a disk of its own, of a size such as ``"1M"``."""
        script = 'mkdir -p "$1" && mount -t tmpfs -o "size=$2" tmpfs "$1"'
        self._mount(k, str(path), script, str(path), size)

    def _mount(self, k: int, point: str, script: str, *arguments: str) -> None:
        run([*in_host(self._hosts[k].init), "bash", "-euc", script, "bash", *arguments])
        self._hosts[k].mounts.append(point)

    # --------------------------------------------------------------------------------------------------- reset

    def reset(self) -> None:
        """As new: every host up and idle, links whole and unshaped, disks and folders empty."""
        self.clear()
        for k, host in self._hosts.items():
            if not self._is_up(k):
                continue
            while host.mounts:
                run([*in_host(host.init), "umount", "--lazy", host.mounts.pop()])
            if host.is_cut or host.is_blocked:
                self.mend(k)
            self.refuse_ssh(k)  # connections may wait at a frozen one
            self.accept_ssh(k)
        if self._link != LINKS["unshaped"]:
            self.shape("unshaped")
        self._boot([k for k in self._hosts if not self._is_up(k)])
        for k in self._hosts:
            self._empty_disk(k)
        for path in self.shared.iterdir():
            remove(path)
        for running in self._running:
            running.forget()
        self._running.clear()

    # --------------------------------------------------------------------------------------------------- set-up

    def _write_etc(self) -> None:
        """Make a key pair, the same for root and for every host, so that all accept all."""
        etc = self.folder / "etc"
        etc.mkdir()
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(etc / "key")])
        users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        files = {
            "passwd": "\n".join([f"root:x:0:0:root:{HOME}:/bin/bash", *users]) + "\n",
            "shadow": "root:*:19000:0:99999:7:::\n",
            "hosts": "127.0.0.1 localhost\n",
            "resolv.conf": "",
            "sshd_config": f"HostKey {etc}/key\nPidFile /run/sshd.pid\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\n",
        }
        for k, name in enumerate(self.hosts, 1):
            files["hosts"] += f"{self.address(k)} {name}\n"
        for name, text in files.items():
            (etc / name).write_text(text)

    def _boot(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        keepers = {}
        for k in numbers:
            folder = self.folder / f"h{k}"
            remove(folder / "run")
            self._empty(folder, "tmp")
            self._make_disk(folder)
            words = [f"h{k}", str(folder), str(self.folder / "etc"), *self._kept]
            keepers[k] = self._keep(["unshare", *NAMESPACES, "bash", "-euc", INIT, "bash", *words])
        for k, keeper in keepers.items():
            keeper.wait_ready()
            self._hosts[k] = _Host(k, self.folder / f"h{k}", keeper, child_of(keeper.pid))
            self._plug_in(k)
            self.accept_ssh(k)
        if self._delaying is not None:
            self.shape(next(name for name, link in LINKS.items() if link == self._link))

    def _plug_in(self, k: int) -> None:
        init = self._hosts[k].init
        end = f"eth0 address 02:00:00:00:00:{k:02x} netns {init}"  # fixed: other hosts remember it after it was away
        self._ip(f"link add p{k} type veth peer name {end}", f"link set p{k} master br0 up")
        self._ip("link set lo up", f"addr add {self.address(k)}/24 dev eth0", "link set eth0 up", namespace=init)
        self._shape(k)

    def _ip(self, *commands: str, namespace: int | None = None) -> None:
        run([*in_network(namespace or self._switch.pid), "ip", "-batch", "-"], "\n".join(commands) + "\n")

    def _make_disk(self, folder: Path) -> None:
        for name in ("home", "tmp", "run", "run/sshd", HOME[1:], f"{HOME[1:]}/.ssh"):
            (folder / name).mkdir(mode=0o1777 if name == "tmp" else 0o755, parents=True, exist_ok=True)
        (folder / "tmp").chmod(0o1777)
        key, ssh = self.folder / "etc/key", folder / HOME[1:] / ".ssh"
        public = key.with_suffix(".pub").read_text()
        shutil.copy(key, ssh / "id_ed25519")
        (ssh / "authorized_keys").write_text(public)
        (ssh / "known_hosts").write_text(f"h*,{SUBNET}.* {public}")

    def _empty_disk(self, k: int) -> None:
        folder = self._hosts[k].folder
        self._empty(folder, "tmp", "home")
        self._make_disk(folder)

    def _empty(self, folder: Path, *names: str) -> None:
        for path in [path for name in names for path in folder.glob(f"{name}/*")]:
            inside = Path("/") / path.relative_to(folder)
            if not any(Path(kept).is_relative_to(inside) for kept in self._kept):
                remove(path)

    def _keep(self, command: Sequence[str]) -> Keeper:
        """Start a process that ends with the lab."""
        keeper = Keeper(command)
        self._keepers.append(keeper)
        return keeper

    def _is_up(self, k: int) -> bool:
        return k in self._hosts and self._hosts[k].keeper.is_alive

    def _end(self) -> None:
        for keeper in self._keepers:
            keeper.end()
        for running in self._running:
            running.forget()
        remove(self.folder)
        os.close(self._lock)


INTO_HOLE = "action mirred egress redirect dev hole"
CUT = f"""
for direction in ingress egress; do
    tc filter add dev eth0 $direction protocol all u32 match u32 0 0 {INTO_HOLE}
done
"""
# Not to port 22, SYN without ACK: byte 13 of the TCP header, which follows 20 bytes of IP header.
BLOCK = f"""
tc filter add dev eth0 ingress protocol ip pref 2 u32 match ip protocol 6 0xff match ip dport 22 0xffff flowid :1
tc filter add dev eth0 ingress protocol ip pref 3 u32 match ip protocol 6 0xff match u8 2 0x12 at 33 {INTO_HOLE}
"""

# What a lab does and a machine may forbid.
ATTEMPT = f"""
ip link add hole type bridge
ip link add p1 type veth peer name eth0
tc qdisc add dev eth0 root tbf rate 1gbit burst 256kb latency 50ms
tc qdisc add dev eth0 clsact
{CUT}{BLOCK}
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mkdir /tmp/lower /tmp/upper /tmp/work
mknod /tmp/upper/hidden c 0 0
mount -t overlay overlay -o lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work /tmp/lower
"""

# The first process of a host. It adopts orphans, and ends with its standard input.
INIT = """
name=$1 folder=$2 etc=$3 && shift 3
hostname "$name"
mount -t sysfs sysfs /sys
for file in passwd shadow hosts resolv.conf; do
    [ ! -e "/etc/$file" ] || mount --bind "$etc/$file" "/etc/$file"
done
for path in "$@"; do
    mkdir -p "$folder$path"
    mount --bind "$path" "$folder$path"
done
for path in home tmp run; do
    mount --rbind "$folder/$path" "/$path"
done
mount -t tmpfs tmpfs /dev/shm
echo ready
read -r _ || true
"""


def unavailable() -> str | None:
    """Why no lab can be made on this machine, in one line; None if it can."""
    if sys.platform != "linux":
        return "hosts on one machine need Linux namespaces"
    if os.getuid() != 0:
        return "hosts on one machine need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"hosts on one machine need {', '.join(missing)}: install openssh-server and iproute2"
    ended = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-euc", ATTEMPT], capture_output=True, text=True, timeout=LIMIT_S
    )
    if ended.returncode:
        return f"no hosts can be made on this machine: {ended.stderr.strip()}"
    return None


def _own_folder() -> tuple[Path, int]:
    """A new folder, and the lock that its maker holds while it lives."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    folder.chmod(0o755)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_abandoned() -> None:
    """Remove the folders of labs whose makers were killed; nothing else of them is left."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(lock.parent)


def _kept(folder: Path) -> list[str]:
    """The paths that all hosts share though they lie in a folder that every host has for itself."""
    paths = {path.resolve() for path in (folder, ROOT, Path(sys.prefix), Path(sys.base_prefix))}
    return sorted(str(path) for path in paths if any(path.is_relative_to(private) for private in PRIVATE))
