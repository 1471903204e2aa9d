"""The step handlers of PCI functions on a real kernel, a real libvirt and a running KVM guest.

What they report is not believed: the lab's own tools are asked (sysfs, ip, virsh, QEMU).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from worker import carry_out, done, start_worker

from virtfabric.model.device import PciAddress, VfSettings
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Presence,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.ids import GuestId
from virtfabric.model.profile import ProfileFile

if TYPE_CHECKING:
    from running_lab import RunningLab

    from virtfabric.model.step import Step

CONSOLE = "/var/log/libvirt/qemu/guest-console.log"
IGB = PciAddress("0000:01:00.0")
IGB_VF = PciAddress("0000:01:10.0")
EDU = PciAddress("0000:02:00.0")
NOBODY = GuestId("00000000-0000-4000-8000-00000000dead")
DEVICES = "/sys/bus/pci/devices"


def driver(lab: RunningLab, address: str) -> str:
    return lab.run(f"basename $(readlink {DEVICES}/{address}/driver || echo none)")


def override(lab: RunningLab, address: str) -> str:
    return lab.run(f"cat {DEVICES}/{address}/driver_override")


def live_hostdevs(lab: RunningLab) -> int:
    return lab.run("virsh -q dumpxml guest").count("<hostdev ")


def open_files(lab: RunningLab) -> list[str]:
    """What the guest's QEMU has open."""
    return lab.run("readlink /proc/$(cat /run/libvirt/qemu/guest.pid)/fd/* || :").splitlines()


def inside(lab: RunningLab) -> str:
    """The guest's PCI bus as QEMU shows it to the guest."""
    return lab.run("virsh qemu-monitor-command guest --hmp 'info pci'")


@pytest.fixture(scope="module", autouse=True)
def worker(passthrough: RunningLab) -> None:
    start_worker(passthrough)


@pytest.fixture(scope="module")
def guest(passthrough: RunningLab) -> GuestId:
    passthrough.run("virsh -q create /opt/virtfabric/lab/guest.xml")
    passthrough.wait_for_guest("guest")
    return GuestId(passthrough.run("virsh -q domuuid guest"))


@pytest.fixture(scope="module")
def nvme(passthrough: RunningLab) -> PciAddress:
    return PciAddress(passthrough.run("basename $(readlink -f /sys/class/nvme/nvme0/device)"))


def goes_in_and_out(
    lab: RunningLab, guest: GuestId, address: PciAddress, ids: str, original: str,
    *between: Step, told: str = "",
) -> None:  # fmt: skip
    """Bind, attach, look; detach, reset, bind back, look.

    With `told`, the guest says so (`VFDEV told`) when it uses the function, and that comes first:
    a driver in the middle of its probe lets go when it is through, which can take a minute here.
    """
    assert driver(lab, address) == (original or "none"), address
    bind = BindDriver(guest=guest, name="guest", address=address, before=original, after="vfio-pci")
    attach = AttachFunction(
        guest=guest, name="guest", address=address, before=Presence.ABSENT,
        after=Presence.ATTACHED,
    )  # fmt: skip
    done(carry_out(lab, ("apply", bind), *(("apply", s) for s in between), ("apply", attach)))
    assert driver(lab, address) == "vfio-pci"
    assert live_hostdevs(lab) == 1
    assert ids in inside(lab)
    group = lab.run(f"basename $(readlink {DEVICES}/{address}/iommu_group)")
    assert f"/dev/vfio/{group}" in open_files(lab)
    assert lab.run(f"cat {DEVICES}/{address}/enable") == "1"
    if told:
        lab.wait(f"grep -aq 'VFDEV {told}' {CONSOLE}", timeout_s=120)
    # what a guest holds is not unbound, whatever a plan says
    refused = carry_out(lab, ("undo", bind))
    assert refused[0]["error"] == "DeviceError", refused
    assert "still open" in refused[0]["text"]
    reset = ResetFunction(guest=guest, name="guest", address=address)
    done(
        carry_out(
            lab,
            ("apply", attach.inverse()),
            ("apply", reset),
            *(("undo", s) for s in reversed(between)),
            ("undo", bind),
        )
    )
    assert driver(lab, address) == (original or "none")
    assert override(lab, address) == "(null)"
    assert live_hostdevs(lab) == 0
    assert ids not in inside(lab)
    assert f"/dev/vfio/{group}" not in open_files(lab)


def test_vf_of_a_nic(passthrough: RunningLab, guest: GuestId) -> None:
    assert done(carry_out(passthrough, ("vfs", [IGB, 2]), ("vfs", [IGB, 3]))) == [2, 2]
    # udev has the VFs' driver loaded, and it stays away from them
    passthrough.wait("udevadm settle && [ -d /sys/bus/pci/drivers/igbvf ]")
    passthrough.run(f"ip link set $(ls {DEVICES}/{IGB}/net) up")
    before = VfSettings.parse(done(carry_out(passthrough, ("settings", IGB_VF)))[0])
    settings = SetUpVf(
        guest=guest, name="guest", address=IGB_VF, before=before,
        after=VfSettings(mac="52:54:00:00:00:07", vlan=7, trust=True, spoofchk=False),
    )  # fmt: skip
    goes_in_and_out(passthrough, guest, IGB_VF, "8086:10ca", "", settings, told="net")
    after = VfSettings.parse(done(carry_out(passthrough, ("settings", IGB_VF)))[0])
    assert after == before


def test_vf_settings_as_ip_shows_them(passthrough: RunningLab, guest: GuestId) -> None:
    pf = passthrough.run(f"ls {DEVICES}/{IGB}/net")
    wanted = VfSettings(mac="52:54:00:00:00:08", vlan=9, spoofchk=False)
    step = SetUpVf(guest=guest, address=IGB_VF, before=VfSettings(), after=wanted)
    done(carry_out(passthrough, ("apply", step)))
    shown = passthrough.run(f"ip link show dev {pf}")
    assert "52:54:00:00:00:08" in shown
    assert "vlan 9" in shown
    assert "spoof checking off" in shown
    broken = SetUpVf(guest=guest, address=IGB_VF, before=VfSettings(), after=VfSettings(rate=10**9))
    answer = carry_out(passthrough, ("apply", broken))[0]
    assert answer["error"] == "DeviceError", answer
    assert "rate=1000000000" in answer["text"]


def test_a_profile_of_a_vf(passthrough: RunningLab, guest: GuestId) -> None:
    """No function of a vendor's vfio driver is in the lab; `power/control` is such a file, too."""
    assert done(carry_out(passthrough, ("vfs", [IGB, 2]))) == [2]
    path = f"{DEVICES}/{IGB_VF}/power/control"
    before = passthrough.run(f"cat {path}")
    after = {"on": "auto", "auto": "on"}[before]
    step = SetProfile(
        guest=guest, name="guest", address=IGB_VF, file=ProfileFile("power/control"),
        before=before, after=after,
    )  # fmt: skip
    done(carry_out(passthrough, ("apply", step), ("apply", step)))
    assert passthrough.run(f"cat {path}") == after
    done(carry_out(passthrough, ("undo", step), ("undo", step)))
    assert passthrough.run(f"cat {path}") == before

    theirs = replace(step, before="first", after="second")
    answers = carry_out(passthrough, ("apply", theirs), ("undo", theirs))
    assert answers[0]["error"] == "DeviceError", answers
    assert "somebody else set it" in answers[0]["text"]
    assert answers[1]["result"] == 0, answers
    assert passthrough.run(f"cat {path}") == before

    # what the kernel does not take, and what it does not have
    refused = replace(step, after="asleep")
    missing = replace(step, file=ProfileFile("nvidia/current_vgpu_type"))
    answers = carry_out(
        passthrough, *((verb, s) for s in (refused, missing) for verb in ("apply", "undo"))
    )
    for answer in answers[::2]:
        assert answer["error"] == "DeviceError", answers
    assert "Invalid argument" in answers[0]["text"]
    bound = driver(passthrough, IGB_VF).replace("none", "no driver")
    assert f"current_vgpu_type is not there; {bound} is bound" in answers[2]["text"]
    assert [answer["result"] for answer in answers[1::2]] == [0, 0], answers
    assert passthrough.run(f"cat {path}") == before


def test_vf_of_an_nvme_controller(
    passthrough: RunningLab, guest: GuestId, nvme: PciAddress
) -> None:
    assert done(carry_out(passthrough, ("vfs", [nvme, 2]), ("nvme", [nvme, 2])))[0] == 2
    vf = PciAddress(passthrough.run(f"basename $(readlink {DEVICES}/{nvme}/virtfn0)"))
    # the host's own driver is proof that the controller works
    passthrough.run(
        f"echo nvme > {DEVICES}/{vf}/driver_override; echo {vf} > /sys/bus/pci/drivers_probe"
    )
    passthrough.wait(f"grep -qs live {DEVICES}/{vf}/nvme/nvme*/state")
    passthrough.run(f"echo > {DEVICES}/{vf}/driver_override")
    goes_in_and_out(passthrough, guest, vf, "1b36:0010", "nvme", told="block")
    passthrough.wait(f"grep -qs live {DEVICES}/{vf}/nvme/nvme*/state")


def test_a_plain_function(passthrough: RunningLab, guest: GuestId) -> None:
    goes_in_and_out(passthrough, guest, EDU, "1234:11e8", "")


def test_what_the_host_uses_is_not_unbound(passthrough: RunningLab) -> None:
    passthrough.run(f"ip link set $(ls {DEVICES}/{IGB}/net) up")
    bind = BindDriver(guest=NOBODY, address=IGB, before="igb", after="vfio-pci")
    answer = carry_out(passthrough, ("apply", bind))[0]
    assert answer["error"] == "DeviceError", answer
    assert "is up" in answer["text"]
    assert driver(passthrough, IGB) == "igb"


def test_link_limits_are_refused_by_this_kernel(passthrough: RunningLab) -> None:
    port = PciAddress(passthrough.run(f"basename $(dirname $(readlink -f {DEVICES}/{IGB}))"))
    step = LimitLink(guest=NOBODY, address=port, before=0, after=2500)
    answers = carry_out(passthrough, ("offered", port), ("apply", step), ("undo", step))
    assert answers[0]["result"] == []
    assert answers[1]["error"] == "DeviceError"
    assert "6.13" in answers[1]["advice"]
    assert answers[2]["result"] == 0


def test_a_function_without_a_reset_of_its_own(passthrough: RunningLab) -> None:
    """Two in one slot: neither can be reset alone, and its neighbour is not vfio-pci's."""
    first = PciAddress("0000:03:00.0")
    answer = carry_out(passthrough, ("apply", ResetFunction(guest=NOBODY, address=first)))[0]
    assert answer["error"] == "DeviceError", answer
    assert "cannot be reset" in answer["text"]


def test_a_guest_that_does_not_answer(passthrough: RunningLab, guest: GuestId) -> None:
    """It is asked once, hears of it when it runs again, and lets go then."""
    bind = BindDriver(guest=guest, name="guest", address=EDU, before="", after="vfio-pci")
    attach = AttachFunction(
        guest=guest, name="guest", address=EDU, before=Presence.ABSENT, after=Presence.ATTACHED,
        deadline_s=4.0,
    )  # fmt: skip
    done(carry_out(passthrough, ("apply", bind), ("apply", attach)))
    passthrough.run("virsh -q suspend guest")
    answers = carry_out(passthrough, ("apply", attach.inverse()), ("apply", attach.inverse()))
    assert [answer.get("error") for answer in answers] == ["ShortfallError"] * 2, answers
    assert live_hostdevs(passthrough) == 1
    passthrough.run("virsh -q resume guest")
    passthrough.wait("! virsh -q dumpxml guest | grep -q '<hostdev '", timeout_s=60)
    done(carry_out(passthrough, ("apply", attach.inverse()), ("undo", bind)))
    assert driver(passthrough, EDU) == "none"
