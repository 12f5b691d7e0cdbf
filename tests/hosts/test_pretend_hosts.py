"""The hosts that other tests run clusters on: what each has of its own, their faults, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts.pretend import STATE, Hosts, why_not
from hosts.pretend_reaper import has_link
from watching import await_true

if missing := why_not():
    pytest.skip(f"hosts of namespaces: {missing}", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.hosts]

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20  # tests run in several processes
PREFIX, SUBNET = f"ehp{chr(ord('a') + NUMBER)}", f"10.77.{40 + NUMBER}"
CRASHED, OTHER = f"ehc{PREFIX[-1]}", f"10.77.{60 + NUMBER}"

CRASHING = f"""
import os
from hosts.pretend import Hosts
with Hosts(1, prefix="{CRASHED}", subnet="{OTHER}") as hosts:
    print(hosts[0].pid(), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2, prefix=PREFIX, subnet=SUBNET, disk_mib=8) as up:
        yield up
    assert traces(PREFIX) == []


def traces(prefix: str) -> list[str]:
    """What such hosts have left on this machine."""
    links = [p.name for p in Path("/sys/class/net").iterdir() if p.name.startswith(prefix)]
    files = [str(p) for p in STATE.glob(f"echelon-hosts-{prefix}*")]
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"echelon-hosts-{prefix}" in line:
            commands.append(line)
    return links + files + commands


def test_a_host_has_its_own_processes_files_and_name_and_sees_the_checkout(hosts: Hosts) -> None:
    one, two = hosts
    seen = one.run(
        "echo mine > /tmp/of-ehp; echo mine > ~/of-ehp; hostname; ls /proc | grep -c '^[0-9]'; which python echelon"
    )
    name, processes, *commands = seen.stdout.split()
    assert name == one.name
    assert int(processes) < 12
    assert commands == [str(Path(sys.executable).parent / c) for c in ("python", "echelon")]
    assert two.run("ls ~/of-ehp /tmp/of-ehp", check=False).returncode != 0
    assert not Path("/tmp/of-ehp").exists()
    assert one.run("python -c 'import cluster; print(cluster.__file__)'").stdout.strip() == str(
        Path(__file__).parents[2] / "cluster/__init__.py"
    )
    one.run(f"bash -c '</dev/tcp/{two.name}/22'")


def test_a_cut_link_is_silent_and_heals(hosts: Hosts) -> None:
    one, two = hosts
    one.cut()
    assert one.enter("cat", "/sys/class/net/eth0/carrier").strip() == "1"
    reach = f"timeout 1 bash -c '</dev/tcp/{one.address}/22'"
    assert two.run(reach, check=False).returncode == 124
    one.heal()
    await_true(lambda: two.run(reach, check=False).returncode == 0, "the healed link carries nothing")


def test_a_full_disk_takes_no_byte_until_it_is_freed(hosts: Hosts) -> None:
    one, two = hosts
    write = "head -c 100000 /dev/zero > /tmp/y"
    one.fill_disk()
    assert "No space left" in one.run(write, check=False).stderr
    two.run(write)
    one.free_disk()
    one.run(write)


def test_a_killed_host_is_gone_with_all_that_ran_there_and_boots_again(hosts: Hosts) -> None:
    two = hosts[1]
    sleeper = two.popen("exec sleep 1000")
    await_true(lambda: "sleep 1000" in two.processes().values(), "it does not sleep")
    (number,) = (n for n, line in two.processes().items() if line == "sleep 1000")
    two.run("echo kept > ~/kept")
    two.kill()
    await_true(lambda: not Path(f"/proc/{number}").exists(), "a process outlived its host")
    assert two.pid() is None
    assert not has_link(two.name)
    assert sleeper.wait(60) != 0
    two.start()
    two.await_ssh()
    assert two.run("cat ~/kept; ls -d /tmp/y", check=False).stdout == "kept\n"


def test_nothing_is_left_when_the_test_is_killed() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CRASHING], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    said, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    await_true(lambda: not Path(f"/proc/{int(said)}").exists(), "the host outlived the test")
    await_true(lambda: not traces(CRASHED), f"left behind: {traces('ehc')}")


def test_two_of_one_prefix_exclude_each_other(hosts: Hosts) -> None:
    with pytest.raises(AssertionError, match="run already"):
        Hosts(1, prefix=PREFIX, subnet=OTHER).__enter__()
    assert hosts[0].run("echo well").stdout == "well\n"
