"""Hosts made of Linux namespaces: each with its own network, processes, /tmp, /dev/shm, home and sshd; no Docker.

They share this machine's kernel, cores and root filesystem, and sit on a bridge that this machine reaches at `.1`:

    with Hosts(3, prefix="eha", subnet="10.77.1") as hosts:
        hosts[0].run("hostname")

Needs root, iproute2, util-linux and OpenSSH (`why_not` says what is missing). A second process, pretend_reaper.py,
takes everything down when the `with` ends and when this process ends, however it does. Others with another `prefix` and
`subnet` run beside; hosts that a killed reaper left are removed by the next ones of the same prefix.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from hosts.pretend_reaper import has_link, sweep

ROOT = Path(__file__).parents[2]  # the checkout, seen by every host at the same place
STATE = Path("/var/tmp")  # where the hosts' homes and keys lie: neither private to a host nor held in memory
START_SECONDS = 20.0
PRIVATE = ("/tmp", "/root", "/run", "/dev/shm")  # what each host has of its own
TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "sshd")

INIT = """\
set -eu
hostname {name}
mkdir -p {folder}/keep.{name}; mount -t tmpfs none {folder}/keep.{name}; n=0
for p in {keep}; do n=$((n+1)); mkdir {folder}/keep.{name}/$n; mount --bind "$p" {folder}/keep.{name}/$n; done
mount -t tmpfs -o size={disk_mib}m,mode=1777 none /tmp
mount -t tmpfs -o size={shm_mib}m,mode=1777 none /dev/shm
mount -t tmpfs none /run; mkdir /run/sshd
mount --bind {home} {root_home}
mount --bind {folder}/etc-hosts /etc/hosts
n=0
for p in {keep}; do n=$((n+1)); mkdir -p "$p"; mount --bind {folder}/keep.{name}/$n "$p"; done
ip link set lo up
until [ -e /proc/sys/net/ipv4/conf/eth0 ]; do sleep 0.02; done
ip addr add {address}/24 dev eth0; ip link set eth0 up
exec {sshd} -D -e -f /dev/null -h {folder}/hostkey -o ListenAddress={address}:22 \\
  -o AuthorizedKeysFile={folder}/id.pub -o StrictModes=no -o PermitRootLogin=prohibit-password \\
  -o PasswordAuthentication=no -o UsePAM=no -o PidFile=none -o Subsystem='sftp internal-sftp' \\
  -o MaxSessions=100 -o MaxStartups=100:30:200
"""


def why_not() -> str | None:
    """What this machine lacks for such hosts; None when it has everything."""
    if os.geteuid() != 0:
        return "needs root: network namespaces and mounts"
    if missing := [tool for tool in TOOLS if _tool(tool) is None]:
        return f"needs {', '.join(missing)}: apt-get install iproute2 util-linux openssh-server openssh-client rsync"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if probe.returncode == 0 else f"needs namespaces: {probe.stderr.strip()}"


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _kept() -> list[str]:
    """Folders that every host must see though they lie in what it has of its own: Python, packages, the checkout."""
    wanted = sorted({str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, ROOT)})
    hidden = [p for p in wanted if p.startswith(tuple(f"{folder}/" for folder in _private()))]
    return [p for p in hidden if not any(p.startswith(f"{other}/") for other in hidden)]


def _private() -> tuple[str, ...]:
    return (*PRIVATE, _home())


def _home() -> str:
    return pwd.getpwuid(0).pw_dir


class Host:
    """One of the hosts. `name`, `address` (IPv4) and `home` (its home, as this machine sees it) never change."""

    def __init__(self, network: Hosts, number: int) -> None:
        self._network = network
        self.name = f"{network.prefix}{number}"
        self.address = f"{network.subnet}.{10 + number}"
        self.home = network.folder / f"home.{self.name}"
        self._process: subprocess.Popen[bytes] | None = None

    # -- life

    def start(self) -> None:
        """Boot it, again after `kill`: /tmp and /dev/shm are empty then, its home is as it was. Returns at once."""
        network = self._network
        self.home.mkdir(exist_ok=True)
        exports = {"PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        exports |= network.environment
        lines = (f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
        (self.home / ".bashrc").write_text("".join(lines))
        init = network.folder / f"init.{self.name}"
        init.write_text(
            INIT.format(
                name=self.name, address=self.address, folder=network.folder, home=self.home, root_home=_home(),
                disk_mib=network.disk_mib, shm_mib=network.shm_mib, sshd=_tool("sshd"),
                keep=" ".join(map(shlex.quote, _kept())),
            )
        )  # fmt: skip
        with (network.folder / f"log.{self.name}").open("ab") as out:
            process = self._process = subprocess.Popen(
                ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc",
                 "bash", str(init)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        (network.folder / f"pid.{self.name}").write_text(str(process.pid))
        _await(lambda: not _same_network(process.pid), lambda: f"{self.name} has no network: {self.log()}")
        # Always the same one: its neighbours would look for a host that boots again at its old address for a while.
        mac = ":".join(["02", "00", *(f"{int(part):02x}" for part in self.address.split("."))])
        peer = ("peer", "name", "eth0", "address", mac, "netns", str(process.pid))
        _ip("link", "add", self.name, "type", "veth", *peer)
        _ip("link", "set", self.name, "master", network.bridge, "up")

    def await_ssh(self) -> None:
        """Return once it answers. Raises AssertionError with its log when it does not."""
        _await(lambda: self.run("true", check=False).returncode == 0, lambda: f"{self.name} is not up: {self.log()}")

    def kill(self) -> None:
        """The power fails: every process is gone without a word, and so is its network."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        _await(lambda: not has_link(self.name), lambda: f"the link of {self.name} is still there")

    def pid(self) -> int | None:
        """The process whose end is the host's, as this machine counts; None when it is off."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def log(self) -> str:
        """What its init and sshd said."""
        path = self._network.folder / f"log.{self.name}"
        return path.read_text(errors="replace") if path.exists() else ""

    # -- commands

    def ssh_command(self, command: str) -> list[str]:
        """How this machine runs `command` there by ssh, in a shell with the checkout's Python first on its PATH."""
        return [*self._network.ssh, f"root@{self.address}", command]

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The end of a shell command there. Raises AssertionError with all it said when it fails and `check`."""
        done = subprocess.run(
            self.ssh_command(command), capture_output=True, text=True, check=False, timeout=timeout, input=input
        )
        assert not check or done.returncode == 0, (
            f"{self.name}: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def popen(self, command: str, **options: Any) -> subprocess.Popen[bytes]:
        """A command by ssh that goes on. Its end here is no end of what it started there."""
        return subprocess.Popen(self.ssh_command(command), stdin=subprocess.DEVNULL, **options)

    def enter(self, *command: str, check: bool = True) -> str:
        """Output of a command there without its network, so that it works on a host that is cut off."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid()), "--net", "--mount", "--uts", "--ipc", "--", *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Command lines of all its processes by this machine's process ids; its init, sshd and ssh sessions are not."""
        here = self.pid()
        if here is None:
            return {}
        space = os.readlink(f"/proc/{here}/ns/pid_for_children")
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line and os.readlink(entry / "ns/pid") == space and "sshd" not in line:
                    found[int(entry.name)] = line
        return found

    # -- faults

    def cut(self) -> None:
        """Pull the cable from the switch: packets vanish in both directions, and nobody is told."""
        _ip("link", "set", self.name, "nomaster")

    def heal(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self.name, "master", self._network.bridge)

    def fill_disk(self, folder: str = "/tmp") -> None:
        """Leave no byte free in `folder` (/tmp or /dev/shm, of the sizes given to `Hosts`)."""
        self.enter("sh", "-c", f"head -c 1T /dev/zero > {folder}/filler 2>&1; ! head -c 4096 /dev/zero > {folder}/x")

    def free_disk(self, folder: str = "/tmp") -> None:
        """Undo `fill_disk`."""
        self.enter("rm", "-f", f"{folder}/filler", f"{folder}/x")


class Hosts(Sequence[Host]):
    """`count` hosts named `prefix`1, `prefix`2, ... at `subnet`.11, .12, ..., up from `with` on.

    `prefix`: at most 10 letters, also the bridge's name. `disk_mib`, `shm_mib`: of each host's /tmp and /dev/shm, in
    memory as they fill. `environment`: what every shell there exports besides PATH and PYTHONPATH.
    """

    def __init__(
        self, count: int, *, prefix: str = "eh", subnet: str = "10.77.0", disk_mib: int = 2048, shm_mib: int = 1024,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        assert prefix.isalpha(), prefix
        assert len(prefix) <= 10, prefix
        self.prefix, self.subnet, self.disk_mib, self.shm_mib = prefix, subnet, disk_mib, shm_mib
        self.environment = dict(environment or {})
        self.bridge = f"{prefix}br"
        self.folder = STATE / f"echelon-hosts-{prefix}"
        self.key = self.folder / "id"  # the private key that every host lets in as root
        self.ssh = (
            "ssh", "-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-o", "BatchMode=yes",
        )  # fmt: skip
        self._hosts = [Host(self, number + 1) for number in range(count)]
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AssertionError(f"hosts with the prefix {self.prefix!r} run already: take another one") from None
        sweep(self.folder, self.bridge, keep_folder=True)  # of one whose reaper was killed
        reaper = [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("pretend_reaper.py")),
            str(self.folder),
            self.bridge,
        ]
        # It inherits the lock, and has it until all is gone; the end of its stdin is its signal.
        self._reaper = subprocess.Popen(reaper, stdin=subprocess.PIPE, pass_fds=[lock], start_new_session=True)
        os.close(lock)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        names = "".join(f"{host.address} {host.name}\n" for host in self._hosts)
        (self.folder / "etc-hosts").write_text(f"127.0.0.1 localhost\n{names}")
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.subnet}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for host in self._hosts:
            host.start()
        for host in self._hosts:
            host.await_ssh()

    def __exit__(self, *_: object) -> None:
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        assert self._reaper.wait(60) == 0, "the hosts could not be taken down"
        for host in self._hosts:
            host.kill()  # it is dead; now its parent has noticed

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, number: Any) -> Any:
        return self._hosts[number]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def _same_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")


def _await(condition: Callable[[], bool], failure: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.02)
