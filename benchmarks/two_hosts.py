"""Two hosts of namespaces on this machine, joined by a cable, with a node of Ray each; a command runs on the first.

    python benchmarks/two_hosts.py --gpus 1 -- python benchmarks/served_gang.py --address {address} --nodes 2 --tp 2 ...

Each has a network, a name and a /dev/shm of its own, one logical CPU for ranks, and with --gpus 1 one of this machine's
GPUs: the first sees GPU 0 alone, the second GPU 1. Processes are not hidden from each other, so that the command can
signal those of both. `{address}` in the command is that of Ray. With --shared-network the hosts are two nodes of Ray in
one network, for kernels without veth. Needs root and util-linux, no iproute2. Its status is the command's; 3: no cable.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

SUBNET, PORT, CARD = "10.77.3", 6379, "eth0"
SHM_BYTES = 8 << 30
WAIT_SECONDS = 40.0
NO_CABLE = 3  # exit status
_OWN = "ECHELON_TWO_HOSTS"  # set in the process that has a process namespace of its own
_RTM_NEWLINK, _FLAGS = 16, 0x605  # request, acknowledge, create, exclusive
_NAME, _LINK_INFO, _NET_OF_PID = 3, 18, 19
_KIND, _DATA, _PEER = 1, 2, 1
_SET_FLAGS, _SET_ADDRESS, _SET_MASK = 0x8914, 0x8916, 0x891C
_UP_RUNNING = 0x41
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_SERVE_ENABLE_HA_PROXY": "1"}


def plug(first: int, second: int) -> None:
    """A cable between the networks of two processes, `CARD` at both ends. Raises OSError."""

    def attribute(kind: int, data: bytes) -> bytes:
        return struct.pack("HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)

    def end(pid: int) -> bytes:
        return attribute(_NAME, CARD.encode() + b"\0") + attribute(_NET_OF_PID, struct.pack("I", pid))

    device = struct.pack("BxHiII", 0, 0, 0, 0, 0)
    peer = attribute(_DATA, attribute(_PEER, device + end(second)))
    body = device + end(first) + attribute(_LINK_INFO, attribute(_KIND, b"veth") + peer)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.bind((0, 0))
        kernel.send(struct.pack("IHHII", 16 + len(body), _RTM_NEWLINK, _FLAGS, 1, 0) + body)
        (error,) = struct.unpack_from("i", kernel.recv(4096), 16)
    if error:
        raise OSError(-error, f"no cable: {os.strerror(-error)}")


def set_up(card: str, address: str | None = None) -> None:
    """Switch an interface on, with an IPv4 address of a network of 256."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for request, value in ((_SET_ADDRESS, address), (_SET_MASK, "255.255.255.0")):
            if address is not None and value is not None:
                packed = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(s, request, struct.pack("16s16s", card.encode(), packed))
        fcntl.ioctl(s, _SET_FLAGS, struct.pack("16sH14x", card.encode(), _UP_RUNNING))


def be_host(number: int, address: str, head: str, gpus: int, *, own_network: bool) -> None:
    """Become a node of Ray, in namespaces that `unshare` has made."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SHM_BYTES}", "none", "/dev/shm"], check=True)
    if own_network:
        socket.sethostname(f"host{number}")
        set_up("lo")
        await_true(lambda: CARD in {name for _, name in socket.if_nameindex()}, "the cable")
        set_up(CARD, address)
    os.environ |= RAY
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number - 1)
    join = ["--head", f"--port={PORT}", "--include-dashboard=false"] if address == head and number == 1 else None
    if join is None:
        await_true(lambda: answers(head), "Ray's head")
        join = [f"--address={head}:{PORT}"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *join, f"--node-ip-address={address}",
           "--num-cpus=1", f"--num-gpus={gpus}", "--object-store-memory=100000000"]  # fmt: skip
    os.execv(sys.executable, ray)


def answers(head: str) -> bool:
    """Whether Ray's GCS listens."""
    try:
        socket.create_connection((head, PORT), timeout=1).close()
    except OSError:
        return False
    return True


def await_true(holds: object, what: str) -> None:
    """Return once `holds()`. Raises TimeoutError."""
    assert callable(holds)
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}")
        time.sleep(0.05)


def separate(pid: int) -> bool:
    """Whether the process has a network of its own by now."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1), help="of each host")
    parser.add_argument("--shared-network", action="store_true")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="what Ray's nodes say")
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)  # 0: wait until the first one has a Ray
    parser.add_argument("command", nargs="*")
    args = parser.parse_args()
    addresses = ["127.0.0.1"] * 2 if args.shared_network else [f"{SUBNET}.11", f"{SUBNET}.12"]
    if args.host == 0:
        await_true(lambda: answers(addresses[0]), "Ray's head")
        return
    if args.host:
        be_host(args.host, addresses[args.host - 1], addresses[0], args.gpus, own_network=not args.shared_network)
    if _OWN not in os.environ:  # all processes end with this one
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", sys.executable, *sys.argv]
        os.execvpe(own[0], own, os.environ | {_OWN: "1"})
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    spaces = ["--mount", "--ipc"] if args.shared_network else ["--net", "--mount", "--uts", "--ipc"]
    shared = [f"--gpus={args.gpus}", *(["--shared-network"] if args.shared_network else [])]
    with args.log.open("ab") as log:
        nodes = [
            subprocess.Popen(
                ["unshare", *spaces, sys.executable, __file__, f"--host={number}", *shared], stdout=log, stderr=log
            )
            for number in (1, 2)
        ]
        if not args.shared_network:
            for node in nodes:
                await_true(lambda pid=node.pid: separate(pid), "a network of its own")
            try:
                plug(nodes[0].pid, nodes[1].pid)
            except OSError as e:
                print(e, file=sys.stderr)
                sys.exit(NO_CABLE)
        enter = ["nsenter", f"--target={nodes[0].pid}", *spaces, f"--wd={Path.cwd()}", "--"]
        subprocess.run([*enter, sys.executable, __file__, "--host=0", *shared], check=True)
        command = [part.replace("{address}", f"{addresses[0]}:{PORT}") for part in args.command]
        sys.exit(subprocess.run([*enter, *command], check=False).returncode)


if __name__ == "__main__":
    main()
