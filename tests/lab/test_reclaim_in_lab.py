"""Memory called home on a real kernel: an emptied device leaves its guest, and the region goes.

What handlers and agent report is not believed: virsh, numa_maps and sysfs are asked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from device_bed import DeviceBed, console
from worker import carry_out, done, start_worker

from virtfabric.model.ids import GuestId
from virtfabric.model.memorysteps import AttachMemory, DetachMemory
from virtfabric.model.plan import ResizeVirtioMem

if TYPE_CHECKING:
    from running_lab import RunningLab

MIB = 1 << 20
ALIAS = "ua-virtfabric-cxl1"
STRICT = (
    "<numatune><memory mode='strict' nodeset='0-1'/>"
    "<memnode cellid='0' mode='strict' nodeset='0'/></numatune>"
)
"""libvirt holds QEMU to the nodes that were named at its start."""
POLICY = (
    "<metadata><v:policy xmlns:v='urn:virtfabric:policy:1' version='1' priority='50'>"
    "<v:cpu reservation='500m' limit='1'/>"
    "<v:memory reservation='128MiB' limit='2GiB' tiers='dram,cxl'/></v:policy></metadata>"
)


def define(lab: RunningLab, name: str) -> None:
    """A tiered guest without a memory device, with room and ports for one; persistent."""
    xml = lab.run("cat /opt/virtfabric/lab/guest.xml")
    xml = xml.replace("<name>guest</name>", f"<name>{name}</name>{POLICY}{STRICT}")
    xml = xml.replace("guest-console", f"{name}-console")
    xml = re.sub(r"<memory model=.*?</memory>", "", xml, flags=re.DOTALL)
    room = "<maxMemory slots='4' unit='GiB'>2</maxMemory>"
    xml, count = re.subn(r"<maxMemory.*?</maxMemory>", room, xml)
    assert count == 1
    lab.run(f"virsh -q undefine {name} 2> /dev/null", code=None)
    lab.run(f"cat > /tmp/{name}.xml <<'X'\n{xml}\nX\nvirsh -q define /tmp/{name}.xml")
    lab.run(f"rm -f {console(name)}; virsh -q start {name}", timeout_s=400)
    lab.wait_for_guest(name)


def bound_to(lab: RunningLab, name: str, node: int) -> int:
    """Mappings of the guest's QEMU that are bound to this node alone."""
    return int(
        lab.run(
            f"grep -cE '^[0-9a-f]+ bind(=static)?:{node}( |$)' "
            f"/proc/$(cat /run/libvirt/qemu/{name}.pid)/numa_maps || :"
        )
    )


def has_device(lab: RunningLab, name: str, more: str = "") -> bool:
    return "model='virtio-mem'" in lab.run(f"virsh -q dumpxml {name} {more}")


@pytest.fixture(scope="module")
def small_guest(small: RunningLab) -> GuestId:
    start_worker(small)
    define(small, "emptied")
    return GuestId(small.run("virsh -q domuuid emptied"))


def test_emptied_device_leaves_and_the_definition_never_had_it(
    small: RunningLab, small_guest: GuestId
) -> None:
    """Node 1 of this lab is of DRAM: to libvirt and QEMU that is all the same."""
    attach = AttachMemory(
        guest=small_guest, name="emptied", alias=ALIAS, node=1, cell=0, size=512 * MIB,
        block=2 * MIB, before=0, after=256 * MIB, deadline_s=120.0,
    )  # fmt: skip
    empty = ResizeVirtioMem(
        guest=small_guest, name="emptied", alias=ALIAS, before=256 * MIB, after=0, tolerance=0,
        deadline_s=120.0, tier="cxl",
    )  # fmt: skip
    detach = DetachMemory(
        guest=small_guest, name="emptied", alias=ALIAS, node=1, cell=0, size=512 * MIB,
        block=2 * MIB, deadline_s=120.0,
    )  # fmt: skip
    done(carry_out(small, ("apply", attach)))
    assert bound_to(small, "emptied", 1) == 1
    (refused,) = carry_out(small, ("apply", detach))
    assert refused["error"] == "ShortfallError", refused
    assert "still holds" in refused["text"]
    assert has_device(small, "emptied")

    done(carry_out(small, ("apply", empty), ("apply", detach), ("apply", detach)))
    assert not has_device(small, "emptied")
    assert not has_device(small, "emptied", "--inactive")
    assert bound_to(small, "emptied", 1) == 0

    assert done(carry_out(small, ("undo", detach), ("undo", detach))) == [0, 0]
    assert has_device(small, "emptied")
    assert not has_device(small, "emptied", "--inactive")
    assert bound_to(small, "emptied", 1) == 1
    done(carry_out(small, ("apply", detach)))
    assert not has_device(small, "emptied")


@pytest.mark.timeout(0)
def test_memory_comes_home_and_the_region_goes(cxl: RunningLab) -> None:
    bed = DeviceBed(cxl)
    cxl.run(
        "cd /opt/virtfabric/checkout && virtfabric-python -m compileall -q virtfabric; "
        "virtfabric install > /dev/null 2>&1; kill -HUP $(cat /run/dbus/pid); "
        "rm -f /etc/virtfabric/devices.toml",
        timeout_s=600,
    )
    bed.start_agent()
    made = bed.ask("memory region create --window decoder0.0 --memdev 0x100")["result"]
    (node,) = (entry["node"] for entry in made["nodes"])
    cxl.run(
        "old=$(pidof libvirtd); kill $old; while [ -d /proc/$old ]; do read -rt 0.2 <> <(:); "
        "done; libvirtd -d"
    )
    cxl.wait("virsh -q capabilities > /dev/null 2>&1", timeout_s=300)
    cxl.wait(
        '[ "$(virtfabric status --json | virtfabric-python -c '
        '\'import json, sys; print(json.load(sys.stdin)["host"]["withheld"])\')" = \'{}\' ]',
        timeout_s=300,
    )
    define(cxl, "db")
    bed.ask("allocate db --memory +128M --tier cxl")
    assert bound_to(cxl, "db", node) == 1

    refused = bed.refused(f"memory region destroy {made['region']}")
    assert "db has 128MiB" in refused
    home = bed.ask(f"memory reclaim {node} --detach --deadline 120s")["result"]
    assert (home["asked"], home["freed"], home["out"]) == (128 * MIB, 128 * MIB, 0), home
    assert home["detached"] == [{"name": "db", "alias": f"ua-virtfabric-cxl{node}"}]
    assert not has_device(cxl, "db")
    assert bound_to(cxl, "db", node) == 0
    story = cxl.run(f"virtfabric explain {home['request']}", timeout_s=300)
    assert "128MiB of 128MiB came, 0B still out" in story

    bed.ask(f"memory region destroy {made['region']}")
    assert cxl.run("cat /sys/devices/system/node/has_memory") == "0"
    assert cxl.run("cxl list -R") in ("", "[\n]", "[]")
    assert cxl.run("virsh -q domstate db") == "running"
