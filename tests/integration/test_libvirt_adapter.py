"""The libvirt adapter against a real libvirtd and guests (KVM where that works) in a sandbox.

The test stays outside: libvirtd is reached through its socket, QEMU's processes through the
sandbox's /proc. What a step did is judged from the kernel's files and from the guest's console,
read here and not through the adapter.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from demo import checker
from virtfabric.adapters.libvirt import LibvirtAdapters, open_libvirt
from virtfabric.domxml.policy import bare_policy, format_bare_policy
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.guest import MemoryMechanism, NumaMode, RunState
from virtfabric.model.ids import GuestId
from virtfabric.model.mark import MARK_NAMESPACE, NO_MARK, PinMark
from virtfabric.model.plan import (
    Definition,
    MarkPins,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.model.policy import POLICY_NAMESPACE, GuestPolicy
from virtfabric.model.units import MIB, CpuSet
from virtfabric.ports import Event, EventKind
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.guestxml import GuestSpec, format_guest_xml
from virtfabric.shim.kvmprobe import choose_domain_type
from virtfabric.shim.patience import allow
from virtfabric.shim.sandbox import Sandbox
from virtfabric.shim.sandbox_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.step import Step

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("libvirtd") is None, reason="needs root and libvirtd"
)

VMEM = GuestId("aaaaaaaa-0000-4000-8000-000000000001")
BALLOON = GuestId("aaaaaaaa-0000-4000-8000-000000000002")
SPEC = {VMEM: "vmem", BALLOON: "balloon"}
NOBODY = GuestId("aaaaaaaa-0000-4000-8000-00000000ffff")
ALIAS = "virtiomem0"
SLOW_QEMU = """\
#!/bin/sh
case "$*" in
  *guest=slow,*) touch /run/at-the-gate; while [ -e /run/gate ]; do sleep 0.1; done ;;
esac
exec /usr/bin/qemu-system-x86_64 "$@"
"""


@dataclass
class Context:
    """A `StepContext` that remembers."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    told: list[tuple[float, str]] = field(default_factory=list)

    def progress(self, fraction: float, text: str) -> None:
        self.told.append((fraction, text))


@dataclass
class Lab:
    """A sandbox with two guests, the adapters, and what events came."""

    box: Sandbox
    adapters: LibvirtAdapters
    events: queue.Queue[Event]

    def go(self, step: Step, context: Context | None = None) -> None:
        handler = self.adapters.handlers.for_step(step)
        handler.apply(step, context or Context())
        handler.verify(step)

    def undo(self, step: Step) -> int:
        return self.adapters.handlers.for_step(step).undo(step)

    def undo_in_time(self, step: Step, kept: int = 0) -> None:
        """Until no more than `kept` is left: a slow guest lets go after the 2 s of an undo."""
        wait_until(lambda: self.undo(step) <= kept, "the guest has let go")

    def host_pid(self, name: str) -> int:
        """QEMU as the host counts: by its command line, not by libvirt's pid file."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                line = (entry / "cmdline").read_bytes() if (entry / "cmdline").exists() else b""
                if f"guest={name},".encode() in line:
                    return int(entry.name)
        raise AssertionError(f"no QEMU of {name}")

    def threads(self, name: str) -> dict[str, str]:
        """Affinity by thread name."""
        found = {}
        for task in Path(f"/proc/{self.host_pid(name)}/task").iterdir():
            status = (task / "status").read_text()
            match = re.search(r"Cpus_allowed_list:\s*(\S+)", status)
            name = (task / "comm").read_text().strip()  # CPU 0/TCG, CPU 0/KVM
            found[name.partition("/")[0]] = match[1] if match else ""
        return found

    def cgroup_file(self, name: str, v1: str, v2: str) -> str:
        """A cpu file of the whole guest; the judge walks the tree by the guest's name."""
        root = Path("/sys/fs/cgroup")
        unified = (root / "cgroup.controllers").exists()
        top = root if unified else root / "cpu"
        group = next((top / f"virtfabric-{self.box.name}").rglob(f"*-{name}.libvirt-qemu"))
        return (group / (v2 if unified else v1)).read_text().strip()

    def report(self, name: str) -> checker.GuestReport:
        """What the guest told about itself last."""
        report = checker.read_report(self.box.path(f"/var/log/libvirt/{name}.log"))
        assert report is not None, f"{name} has told nothing"
        return report

    def wait_online(self, name: str, wanted: set[int]) -> None:
        wait_until(lambda: self.report(name).online == wanted, f"{name}: online are {wanted}")

    def wait_event(self, kind: EventKind, name: str = "", detail: str | None = None) -> Event:
        deadline = time.monotonic() + allow(20)
        while True:
            event = self.events.get(timeout=max(0.01, deadline - time.monotonic()))
            if event.kind is kind and event.name == name and detail in (None, event.detail):
                return event


@contextmanager
def started(root: Path, name: str, guests: dict[GuestId, GuestSpec]) -> Iterator[Lab]:
    with Sandbox(name, root) as box:
        box.start_libvirtd()
        for spec in guests.values():
            (box.root / f"{spec.name}.xml").write_text(format_guest_xml(spec))
            box.run(["virsh", "define", str(box.root / f"{spec.name}.xml")])
            box.run(["virsh", "start", spec.name])
        adapters = open_libvirt(box.libvirt_uri, run_root=box.path("/run"), proc=box.path("/proc"))
        events: queue.Queue[Event] = queue.Queue()
        adapters.events.start(events.put)
        try:
            for spec in guests.values():
                log = box.path(spec.console_log)
                wait_until(
                    lambda log=log: checker.read_report(log) is not None, "boot", timeout_s=90
                )
            yield Lab(box, adapters, events)
        finally:
            adapters.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("libvirt-")]


def spec_of(guest: GuestId, **more: object) -> GuestSpec:
    image = ensure_guest_image()
    name = SPEC[guest]
    spec = GuestSpec(
        name=name, uuid=guest, kernel=image.kernel, initrd=image.initrd, vcpus=1, max_vcpus=4,
        memory_mib=160, domain_type=choose_domain_type(image),
        console_log=f"/var/log/libvirt/{name}.log",
    )  # fmt: skip
    return replace(spec, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    guests = {
        VMEM: spec_of(VMEM, virtio_mem_mib=256, numatune_mode="restrictive"),
        BALLOON: spec_of(BALLOON),
    }
    root = tmp_path_factory.mktemp("libvirt-adapter")
    with started(root, f"lvad{os.getpid()}", guests) as lab:
        yield lab


def test_reads_host_and_guests(lab: Lab) -> None:
    topology = lab.adapters.host.read_topology()
    conf = (lab.box.root / "etc-libvirt/libvirtd.conf").read_text()
    assert f'host_uuid = "{topology.host_id}"' in conf
    guests = lab.adapters.guests.read_guests()
    assert set(guests) == {VMEM, BALLOON}
    guest = guests[VMEM]
    assert (guest.name, guest.state, guest.job) == ("vmem", RunState.RUNNING, None)
    assert guest.mechanism is MemoryMechanism.VIRTIO_MEM
    assert guests[BALLOON].mechanism is MemoryMechanism.BALLOON
    assert guest.boot_memory == guest.memory_current == 160 * MIB
    assert guest.memory_max == 416 * MIB
    assert (guest.vcpus_online, guest.vcpus_max) == (len(guest.vcpu_threads), 4)
    assert (guest.numa_mode, guest.numa_nodes) == (NumaMode.RESTRICTIVE, CpuSet([0]))
    assert not guest.managed
    assert lab.adapters.guests.read_guest(NOBODY) is None


def test_pins_and_their_undo(lab: Lab) -> None:
    cpus = lab.adapters.host.read_topology().cpus
    one = CpuSet([max(cpus)])
    vcpu = PinVcpu(guest=VMEM, name="vmem", vcpu=0, before=CpuSet(), after=one)
    emulator = PinEmulator(guest=VMEM, name="vmem", before=CpuSet(), after=CpuSet([min(cpus)]))
    lab.go(vcpu)
    lab.go(emulator)
    threads = lab.threads("vmem")
    assert threads["CPU 0"] == str(one)
    assert threads["qemu-system-x86"] == str(min(cpus))
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert (guest.vcpu_affinity[0], guest.emulator_affinity) == (one, CpuSet([min(cpus)]))
    assert lab.wait_event(EventKind.TUNABLE, "vmem").guest == VMEM
    assert lab.undo(emulator) == lab.undo(vcpu) == 0
    assert lab.threads("vmem")["CPU 0"] == str(cpus)


def test_pinning_a_vcpu_that_is_not_plugged_changes_nothing(lab: Lab) -> None:
    before = lab.threads("vmem")
    lab.go(PinVcpu(guest=VMEM, name="vmem", vcpu=3, before=CpuSet(), after=CpuSet([0])))
    assert lab.threads("vmem") == before


def test_verification_sees_a_change_made_beside_us(lab: Lab) -> None:
    step = PinVcpu(guest=VMEM, name="vmem", vcpu=0, before=CpuSet(), after=CpuSet([0]))
    lab.go(step)
    lab.box.run(["virsh", "vcpupin", "vmem", "0", "1", "--live"])
    with pytest.raises(VerificationError, match="pCPU 0 expected"):
        lab.adapters.handlers.for_step(step).verify(step)
    lab.undo(step)


def test_a_pcpu_that_is_not_there(lab: Lab) -> None:
    step = PinVcpu(guest=VMEM, name="vmem", vcpu=0, before=CpuSet(), after=CpuSet([4000]))
    with pytest.raises(HypervisorError):
        lab.go(step)


def test_mark_is_live_only_and_its_undo(lab: Lab) -> None:
    mark = PinMark.parse("0=1/0-1 emulator=0")
    step = MarkPins(guest=VMEM, name="vmem", before=NO_MARK, after=mark)
    lab.go(step)
    assert lab.wait_event(EventKind.METADATA, "vmem", MARK_NAMESPACE).guest == VMEM
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.marked_pins == mark
    assert MARK_NAMESPACE not in lab.box.run(["virsh", "dumpxml", "--inactive", "vmem"]).stdout
    lab.box.run(["virsh", "metadata", "vmem", "--uri", MARK_NAMESPACE, "--remove", "--live"])
    with pytest.raises(VerificationError, match="a mark 0=1"):
        lab.adapters.handlers.for_step(step).verify(step)
    lab.go(step)
    assert lab.undo(step) == lab.undo(step) == 0
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.marked_pins == NO_MARK


def test_quota_and_its_undo(lab: Lab) -> None:
    step = SetQuota(guest=VMEM, name="vmem", before=-1, after=1500)
    lab.go(step)
    shown = lab.cgroup_file("vmem", "cpu.cfs_quota_us", "cpu.max")
    assert shown in ("150000", "150000 100000")
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.scheduler.global_quota == 150_000
    assert lab.undo(step) == 0
    assert lab.cgroup_file("vmem", "cpu.cfs_quota_us", "cpu.max") in ("-1", "max 100000")


def test_shares_and_their_undo(lab: Lab) -> None:
    step = SetShares(guest=VMEM, name="vmem", before=100, after=250)
    lab.go(step)
    assert lab.cgroup_file("vmem", "cpu.shares", "cpu.weight") in ("2560", "250")
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.scheduler.shares == 250
    assert lab.undo(step) == 0
    assert lab.cgroup_file("vmem", "cpu.shares", "cpu.weight") in ("1024", "100")


def test_nodes_of_a_restrictive_guest_only(lab: Lab) -> None:
    node = CpuSet([0])
    lab.go(SetNodeset(guest=VMEM, name="vmem", before=node, after=node))
    with pytest.raises(HypervisorError, match="restrictive"):
        lab.go(SetNodeset(guest=BALLOON, name="balloon", before=node, after=node))


def test_virtio_mem_grows_shrinks_and_goes_back(lab: Lab) -> None:
    small = lab.report("vmem").memory
    grow = ResizeVirtioMem(guest=VMEM, name="vmem", alias=ALIAS, before=0, after=128 * MIB)
    context = Context()
    lab.go(grow, context)
    assert context.told[-1][0] == 1.0
    wait_until(lambda: lab.report("vmem").memory > small, "the guest has more")
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.memory_current == (160 + 128) * MIB

    shrink = ResizeVirtioMem(guest=VMEM, name="vmem", alias=ALIAS, before=128 * MIB, after=64 * MIB)
    context = Context()
    lab.go(shrink, context)
    assert any("64MiB of 64MiB returned" in text for _, text in context.told)

    lab.undo_in_time(replace(grow, after=64 * MIB), kept=4 * MIB)
    wait_until(lambda: lab.report("vmem").memory <= small + 4 * MIB, "it has less")


def test_virtio_mem_that_stops_short_asks_for_nothing_more(lab: Lab) -> None:
    lab.box.run(["virsh", "suspend", "vmem"])  # a paused guest follows no request
    step = ResizeVirtioMem(
        guest=VMEM, name="vmem", alias=ALIAS, before=0, after=64 * MIB, deadline_s=0.3
    )
    try:
        with pytest.raises(ShortfallError) as error:
            lab.go(step)
        guest = lab.adapters.guests.read_guest(VMEM)
        assert guest is not None
        assert guest.state is RunState.PAUSED
        device = guest.virtio_mem[0]
        assert error.value.reached == device.current == device.requested < 64 * MIB
    finally:
        lab.box.run(["virsh", "resume", "vmem"])
    lab.undo_in_time(step, kept=4 * MIB)


def test_cancelling_while_a_guest_is_waited_for(lab: Lab) -> None:
    lab.box.run(["virsh", "suspend", "vmem"])
    step = ResizeVirtioMem(guest=VMEM, name="vmem", alias=ALIAS, before=0, after=64 * MIB)
    context = Context()
    timer = threading.Timer(0.2, context.cancelled.set)
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(StepCancelledError):
            lab.go(step, context)
        assert time.monotonic() - began < allow(5)
    finally:
        timer.join()
        lab.box.run(["virsh", "resume", "vmem"])
    lab.undo_in_time(step)


def test_a_size_between_blocks_is_refused(lab: Lab) -> None:
    step = ResizeVirtioMem(guest=VMEM, name="vmem", alias=ALIAS, before=0, after=3 * MIB)
    with pytest.raises(HypervisorError, match="block size"):
        lab.go(step)
    with pytest.raises(HypervisorError, match="nosuch"):
        lab.go(replace(step, alias="nosuch"))


def test_balloon_and_its_undo(lab: Lab) -> None:
    step = SetBalloon(guest=BALLOON, name="balloon", before=160 * MIB, after=128 * MIB)
    lab.go(step)
    guest = lab.adapters.guests.read_guest(BALLOON)
    assert guest is not None
    assert guest.memory_current == 128 * MIB
    assert lab.undo(step) == 0


def test_a_balloon_leaves_the_guest_what_it_needs(lab: Lab) -> None:
    step = SetBalloon(guest=BALLOON, name="balloon", before=160 * MIB, after=24 * MIB)
    with pytest.raises(ShortfallError, match="needs the rest"):
        lab.go(step)
    assert lab.undo(step) == 0
    up = lab.report("balloon").uptime_s
    wait_until(lambda: lab.report("balloon").uptime_s > up, "the guest lives on")


def test_vcpus_are_plugged_and_leave_only_with_kvm(lab: Lab) -> None:
    plug = SetVcpuCount(guest=BALLOON, name="balloon", before=1, after=3)
    lab.go(plug)
    lab.wait_online("balloon", {0, 1, 2})
    assert {"CPU 0", "CPU 1", "CPU 2"} <= set(lab.threads("balloon"))
    lab.go(PinVcpu(guest=BALLOON, name="balloon", vcpu=2, before=CpuSet(), after=CpuSet([0])))
    assert lab.threads("balloon")["CPU 2"] == "0"
    unplug = SetVcpuCount(guest=BALLOON, name="balloon", before=3, after=2)
    if choose_domain_type(ensure_guest_image()) == "kvm":
        lab.go(unplug)
        lab.wait_online("balloon", {0, 1})
        assert "CPU 2" not in lab.threads("balloon")
        lab.undo_in_time(plug)
        lab.wait_online("balloon", {0})
        return
    # An unplug would make the next plug kill QEMU under TCG, so it falls short and is a residue.
    with pytest.raises(ShortfallError) as error:
        lab.go(unplug)
    assert error.value.reached == 3
    assert lab.undo(plug) == 2


def test_more_vcpus_than_there_can_be(lab: Lab) -> None:
    step = SetVcpuCount(guest=BALLOON, name="balloon", before=1, after=5)
    with pytest.raises(HypervisorError):
        lab.go(step)


def test_policy_is_written_live_and_persistent(lab: Lab) -> None:
    policy = GuestPolicy(priority=77)
    lab.adapters.policy.write_policy(VMEM, policy)
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.policy == policy
    assert 'priority="77"' in lab.box.run(["virsh", "dumpxml", "--inactive", "vmem"]).stdout
    assert lab.wait_event(EventKind.METADATA, "vmem", POLICY_NAMESPACE).guest == VMEM
    lab.adapters.policy.write_policy(VMEM, None)
    lab.adapters.policy.write_policy(VMEM, None)
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.policy is None


def test_policy_as_a_step_of_each_definition(lab: Lab) -> None:
    text = format_bare_policy(GuestPolicy(priority=77))
    steps = [
        SetPolicy(guest=VMEM, name="vmem", definition=which, before="", after=text)
        for which in Definition
    ]
    for step, flag in zip(steps, ("--live", "--config"), strict=True):
        with pytest.raises(VerificationError):
            lab.adapters.handlers.for_step(step).verify(step)
        lab.go(step)
        virsh = ["virsh", "-c", "qemu:///system", "metadata", "vmem", "urn:virtfabric:policy:1"]
        assert 'priority="77"' in lab.box.run([*virsh, flag]).stdout.replace("'", '"')
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.policy_text == guest.config_policy_text == text
    for step in steps:
        assert lab.undo(step) == 0
        assert lab.undo(step) == 0
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert (guest.policy_text, guest.config_policy_text) == ("", "")


def test_an_undo_brings_back_what_somebody_wrote_by_hand(lab: Lab) -> None:
    """Also what is no valid policy."""
    odd = bare_policy('<policy version="1" colour="red"><cpu>word</cpu></policy>')
    after = format_bare_policy(GuestPolicy(priority=77))
    which = Definition.CONFIG
    lab.go(SetPolicy(guest=VMEM, name="vmem", definition=which, before="", after=odd))
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    step = SetPolicy(
        guest=VMEM, name="vmem", definition=which, before=guest.config_policy_text, after=after
    )
    lab.go(step)
    assert lab.undo(step) == 0
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert guest.config_policy_text == odd
    lab.go(SetPolicy(guest=VMEM, name="vmem", definition=which, before=odd, after=""))


def test_stats(lab: Lab) -> None:
    sample = lab.adapters.stats.sample()
    assert set(sample) == {VMEM, BALLOON}
    assert sample[BALLOON]["balloon.maximum"] == 160 * MIB


def test_a_guest_that_takes_long_to_start_keeps_nobody_waiting(lab: Lab) -> None:
    """Its QEMU says nothing until a file is gone: libvirt's job lasts, and others are read."""
    slow, gate = GuestId("aaaaaaaa-0000-4000-8000-000000000003"), lab.box.path("/run/gate")
    wrapper = lab.box.path("/run/slow-qemu")
    wrapper.write_text(SLOW_QEMU)
    wrapper.chmod(0o755)
    spec = replace(
        spec_of(BALLOON), name="slow", uuid=slow, emulator="/run/slow-qemu", memory_mib=96,
        console_log="/var/log/libvirt/slow.log",
    )  # fmt: skip
    (lab.box.root / "slow.xml").write_text(format_guest_xml(spec))
    lab.box.run(["virsh", "define", str(lab.box.root / "slow.xml")])  # asks QEMU what it can do
    gate.touch()
    starting = lab.box.popen(["virsh", "start", "slow"])
    try:
        wait_until(lab.box.path("/run/at-the-gate").exists, "QEMU is started")
        began = time.monotonic()
        guests = lab.adapters.guests.read_guests()
        assert time.monotonic() - began < allow(5)
        assert starting.poll() is None, "it is still being started"
        assert (guests[slow].job, guests[slow].detained) == ("start", True)
        assert guests[VMEM].job is None
    finally:
        gate.unlink()
        starting.wait(allow(60))
    assert starting.returncode == 0
    guest = lab.adapters.guests.read_guest(slow)
    assert guest is not None
    assert (guest.state, guest.job) == (RunState.RUNNING, None)
    lab.box.run(["virsh", "destroy", "slow"])
    lab.box.run(["virsh", "undefine", "slow"])


def test_a_guest_nobody_knows(lab: Lab) -> None:
    step = SetShares(guest=NOBODY, before=100, after=50)
    with pytest.raises(GuestGoneError):
        lab.go(step)
    assert lab.undo(step) == 0


# The last two change the lab for good, in this order.


def test_libvirtd_killed_and_started_again(lab: Lab) -> None:
    step = SetShares(guest=VMEM, name="vmem", before=100, after=50)
    lab.box.kill_libvirtd()
    lab.wait_event(EventKind.DISCONNECTED)
    with pytest.raises(HypervisorGoneError):
        lab.go(step)
    with pytest.raises(HypervisorGoneError):
        lab.undo(step)
    lab.box.start_libvirtd()
    lab.wait_event(EventKind.CONNECTED)
    lab.go(step)
    assert lab.wait_event(EventKind.TUNABLE, "vmem").guest == VMEM
    assert lab.undo(step) == 0


def test_a_guest_destroyed_while_it_is_waited_for(lab: Lab) -> None:
    lab.box.run(["virsh", "suspend", "vmem"])
    step = ResizeVirtioMem(guest=VMEM, name="vmem", alias=ALIAS, before=0, after=64 * MIB)
    killer = threading.Timer(0.2, lambda: lab.box.run(["virsh", "destroy", "vmem"]))
    killer.start()
    try:
        with pytest.raises(GuestGoneError):
            lab.go(step)
    finally:
        killer.join()
    assert lab.wait_event(EventKind.STOPPED, "vmem").guest == VMEM
    assert lab.undo(step) == 0
    guest = lab.adapters.guests.read_guest(VMEM)
    assert guest is not None
    assert (guest.state, guest.pid, guest.vcpu_threads) == (RunState.SHUTOFF, None, {})
    lab.box.run(["virsh", "undefine", "vmem"])
    assert lab.adapters.guests.read_guest(VMEM) is None
