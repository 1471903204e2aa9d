"""The small lab: a host with two nodes and SMT on cgroup v2, KVM guests, and a host's faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from running_lab import RunningLab

GUEST = "/opt/virtfabric/cache/guest/*"
XML = """<domain type='kvm'><name>probe</name><memory unit='MiB'>192</memory><vcpu>2</vcpu>
<os><type machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>console=ttyS0 quiet no_timer_check unknown_nmi_panic panic=-1</cmdline></os>
<features><acpi/><apic/></features><cpu mode='host-passthrough'/>
<numatune><memory mode='restrictive' nodeset='1'/></numatune><on_reboot>destroy</on_reboot>
<devices><serial type='file'><source path='/var/log/libvirt/qemu/probe-console.log'/></serial>
<memballoon model='virtio'/></devices></domain>"""


def start_guest(lab: RunningLab) -> None:
    """A KVM guest on node 1, until its userland says that it is ready."""
    kernel, initrd = lab.run(f"ls {GUEST}/vmlinux {GUEST}/initrd").split()[::-1]
    xml = XML.format(kernel=kernel, initrd=initrd)
    lab.run(f"virsh -q destroy probe 2> /dev/null; cat > /tmp/probe.xml <<'X'\n{xml}\nX")
    lab.run("rm -f /var/log/libvirt/qemu/probe-console.log; virsh -q create /tmp/probe.xml")
    lab.wait("grep -qs VFREADY /var/log/libvirt/qemu/probe-console.log", timeout_s=120)


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
    start_guest(small)
    pid = small.run("cat /run/libvirt/qemu/probe.pid")
    assert small.run(f"grep -c kvm-vcpu /proc/{pid}/maps /proc/{pid}/task/*/comm", code=None)
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


def test_a_guest_panics(small: RunningLab) -> None:
    start_guest(small)
    small.fault("guest-panic")
    small.wait("! virsh -q domstate probe 2> /dev/null | grep -q running", timeout_s=60)


def test_libvirtd_crashes_and_guests_go_on(small: RunningLab) -> None:
    start_guest(small)
    pid = small.run("cat /run/libvirt/qemu/probe.pid")
    small.fault("libvirtd-crash")
    small.wait("! pidof libvirtd > /dev/null")
    small.run(f"[ -d /proc/{pid} ]; libvirtd -d")
    small.wait("virsh -q domstate probe 2> /dev/null | grep -q running")
    small.run("virsh -q destroy probe")


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
    small.wait("virtfabric status > /dev/null 2>&1", timeout_s=120)
    host = small.json("virtfabric host --json")
    assert len(host["nodes"]) == 2
    small.fault("agent-kill")
    small.wait("! pgrep -f virtfabric.cli.agentd > /dev/null")
    assert small.run("virtfabric status > /dev/null 2>&1; echo $?") == "4"
