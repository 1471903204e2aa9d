"""The small lab: a host with two nodes and SMT on cgroup v2, KVM guests, and a host's faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from running_lab import RunningLab

CONSOLE = "/var/log/libvirt/qemu/guest-console.log"
BIND = "<numatune><memory mode='restrictive' nodeset='1'/></numatune></domain>"


def ensure_guest(lab: RunningLab) -> None:
    """The sample KVM guest on node 1, its userland up; one that runs already will do."""
    if "running" not in lab.run("virsh -q domstate guest 2> /dev/null", code=None):
        lab.run(f"rm -f {CONSOLE}")
        lab.run(f'sed "s|</domain>|{BIND}|" /opt/virtfabric/lab/guest.xml > /tmp/guest.xml')
        lab.run("virsh -q create /tmp/guest.xml")
    lab.wait_for_guest("guest")


def test_the_host_is_what_the_topology_says(small: RunningLab) -> None:
    said = small.run("lscpu")
    shape = {key: value.strip() for key, _, value in (x.partition(":") for x in said.splitlines())}
    assert (shape["Socket(s)"], shape["Core(s) per socket"], shape["Thread(s) per core"]) == (
        "2", "2", "2",
    )  # fmt: skip
    assert shape["NUMA node1 CPU(s)"] == "4-7"
    assert small.run("stat -fc %T /sys/fs/cgroup") == "cgroup2fs"
    assert small.run("virsh capabilities | grep -c '<cell '") == "2"


def test_a_kvm_guest_runs_on_the_node_it_is_bound_to(small: RunningLab) -> None:
    ensure_guest(small)
    pid = small.run("cat /run/libvirt/qemu/guest.pid")
    small.run(f"ls -l /proc/{pid}/fd | grep -q anon_inode:kvm-vcpu")
    maps = small.run(f"cat /proc/{pid}/numa_maps")
    pages = {
        node: sum(
            int(word.split("=")[1])
            for line in maps.splitlines() if "anon=" in line
            for word in line.split() if word.startswith(f"N{node}=")
        )
        for node in (0, 1)
    }  # fmt: skip
    assert pages[1] > 10 * max(pages[0], 1), pages


def test_libvirtd_crashes_and_guests_go_on(small: RunningLab) -> None:
    ensure_guest(small)
    pid = small.run("cat /run/libvirt/qemu/guest.pid")
    small.fault("libvirtd-crash")
    small.wait("! pidof libvirtd > /dev/null")
    small.run(f"[ -d /proc/{pid} ] && libvirtd -d")
    small.wait("virsh -q domstate guest 2> /dev/null | grep -q running")


def test_a_guest_panics(small: RunningLab) -> None:
    ensure_guest(small)
    small.fault("guest-panic")
    small.wait("! virsh -q domstate guest 2> /dev/null | grep -q running", timeout_s=60)


def test_memory_is_short_until_it_is_let_go(small: RunningLab) -> None:
    free = "awk '/MemFree/ {print int($4 / 1024)}' /sys/devices/system/node/node1/meminfo"
    before = int(small.run(free))
    said = small.fault("memory-pressure", "1")
    assert int(small.run(free)) < 200 < before
    pid = said.split("pid ")[1].split(";")[0]
    small.run(f"kill {pid}")
    small.wait(f"[ $({free}) -gt {before - 200} ]")


def test_the_clock_jumps(small: RunningLab) -> None:
    before = int(small.run("date +%s"))
    small.fault("clock-jump", "7200")
    assert 7200 <= int(small.run("date +%s")) - before < 7300
    small.fault("clock-jump", "-7200")


def test_this_checkouts_agent_runs_and_is_killed(small: RunningLab) -> None:
    small.run("virtfabric install > /dev/null 2>&1; kill -HUP $(cat /run/dbus/pid)")
    small.run("setsid virtfabricd > /var/log/virtfabricd.log 2>&1 < /dev/null & disown")
    small.wait("virtfabric status > /dev/null 2>&1", timeout_s=300)
    host = small.json("virtfabric host --json")
    assert {cpu["node"] for cpu in host["cpus"]} == {0, 1}
    small.fault("agent-kill")
    small.wait("! pgrep -f '[v]irtfabric.cli.agentd' > /dev/null")
    assert small.run("virtfabric status > /dev/null 2>&1; echo $?") == "4"
