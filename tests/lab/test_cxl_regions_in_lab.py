"""The life of CXL regions on a real kernel: made, online, offline, destroyed, and what is refused.

What the handlers report is not believed: `cxl list`, `daxctl list` and sysfs are asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from worker import carry_out, done, start_worker

from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence

if TYPE_CHECKING:
    from running_lab import RunningLab

MIB = 1 << 20
ONE_BRIDGE, OTHER_BRIDGE, BOTH = range(3)
"""Windows of the topology, by number."""
HOARD = """
import ctypes, os, pathlib
mask = ctypes.c_ulong(1 << 1)
assert ctypes.CDLL(None).syscall(238, 2, ctypes.byref(mask), 64) == 0  # set_mempolicy(MPOL_BIND)
pathlib.Path("/tmp/hoard").mkdir()
os.system("mount -t tmpfs -o nr_inodes=0 hoard /tmp/hoard")
for number in range(20000):
    os.mknod(f"/tmp/hoard/{number}")
"""
"""Has the kernel put data of its own on node 1: inodes of files that are there."""


@pytest.fixture(scope="module", autouse=True)
def worker(cxl: RunningLab) -> None:
    start_worker(cxl)


@pytest.fixture(scope="module")
def bases(cxl: RunningLab) -> list[int]:
    """Where each window begins."""
    return [window["resource"] for window in cxl.json("cxl list -D -d root")]


def create(base: int, *serials: int, size: int | None = None) -> CreateRegion:
    return CreateRegion(
        window=base, members=tuple(map(Serial, serials)),
        size=size or 256 * MIB * len(serials),
        before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
    )  # fmt: skip


def use(
    region: CreateRegion, before: MemoryUse, after: MemoryUse, deadline_s: float = 60
) -> OnlineMemory:
    return OnlineMemory(
        window=region.window, members=region.members, before=before, after=after,
        deadline_s=deadline_s,
    )  # fmt: skip


def nodes(lab: RunningLab) -> str:
    return lab.run("cat /sys/devices/system/node/online")


def regions(lab: RunningLab) -> list[dict[str, Any]]:
    return list(lab.json("cxl list -R -T || echo '[]'") or [])


def serials_of(lab: RunningLab, region: dict[str, Any]) -> list[int]:
    known = {m["memdev"]: m["serial"] for m in lab.json("cxl list -M")}
    parts = sorted(region["mappings"], key=lambda m: m["position"])
    return [known[part["memdev"]] for part in parts]


def dax(lab: RunningLab) -> dict[str, Any]:
    (device,) = lab.json("daxctl list")
    return dict(device)


@pytest.mark.parametrize(
    ("window", "serials", "online_nodes"),
    [
        (ONE_BRIDGE, (0x100,), "0-1"),
        (BOTH, (0x100, 0x101), "0,3"),
        (OTHER_BRIDGE, (0x102, 0x103), "0,2"),
    ],
    ids=["single", "interleaved", "behind-a-switch"],
)
def test_life_of_a_region(
    cxl: RunningLab, bases: list[int], window: int, serials: tuple[int, ...], online_nodes: str
) -> None:
    """Each window has a node of its own, which its regions become."""
    made = create(bases[window], *serials)
    online = use(made, MemoryUse.OFFLINE, MemoryUse.MOVABLE)
    done(carry_out(cxl, ("changes", None), ("apply", made), ("apply", online)))
    assert nodes(cxl) == online_nodes
    (region,) = regions(cxl)
    assert (region["size"], region["resource"]) == (made.size, bases[window])
    assert region["decode_state"] == "commit"
    assert serials_of(cxl, region) == list(serials)
    assert (dax(cxl)["mode"], dax(cxl)["movable"]) == ("system-ram", True)
    changed, *_ = done(carry_out(cxl, ("changes", None), ("apply", made), ("apply", online)))
    assert changed > 0  # the kernel's uevents were heard
    assert len(regions(cxl)) == 1  # once is enough

    destroy = made.inverse()
    (refused,) = carry_out(cxl, ("apply", destroy))
    assert "its memory is online" in refused["text"]
    assert nodes(cxl) == online_nodes

    done(carry_out(cxl, ("apply", online.inverse()), ("apply", destroy), ("apply", destroy)))
    assert nodes(cxl) == "0"
    assert regions(cxl) == []
    assert cxl.run("ls -A /run/virtfabric/regions") == ""


def test_undoing_it_all_at_once(cxl: RunningLab, bases: list[int]) -> None:
    """As after a crash: the kernel brought the memory online by itself, and no step did."""
    made = create(bases[ONE_BRIDGE], 0x100)
    done(carry_out(cxl, ("apply", made)))
    cxl.wait("[ $(cat /sys/devices/system/node/online) = 0-1 ]")
    assert done(carry_out(cxl, ("undo", made), ("undo", made))) == [0, 0]
    assert (nodes(cxl), regions(cxl)) == ("0", [])


def test_what_is_refused(cxl: RunningLab, bases: list[int]) -> None:
    refused = {
        "there is no memdev with the serial 0x999": create(bases[ONE_BRIDGE], 0x999),
        "there is no window at": create(4096, 0x100),
        "is not behind": create(bases[ONE_BRIDGE], 0x101),
        "has 256MiB of volatile memory": create(bases[ONE_BRIDGE], 0x100, size=512 * MIB),
        "is interleaved over 2 host bridges": create(bases[BOTH], 0x100),
        "is a multiple of": create(bases[ONE_BRIDGE], 0x100, size=100 * MIB),
    }
    answers = carry_out(cxl, *(("apply", step) for step in refused.values()))
    for text, answer in zip(refused, answers, strict=True):
        assert answer.get("error") == "CxlError", answer
        assert text in answer["text"]
    assert (nodes(cxl), regions(cxl)) == ("0", [])
    assert cxl.run("ls -A /run/virtfabric/regions") == ""


def test_a_region_made_by_hand_is_never_touched(cxl: RunningLab, bases: list[int]) -> None:
    (device,) = cxl.json("cxl list -M -s 0x100")
    cxl.run(f"cxl create-region -m -t ram -d decoder0.0 -w 1 {device['memdev']}")
    cxl.wait("[ $(cat /sys/devices/system/node/online) = 0-1 ]")
    before = regions(cxl)
    made = create(bases[ONE_BRIDGE], 0x100)
    offline = use(made, MemoryUse.MOVABLE, MemoryUse.OFFLINE)
    steps = (made, made.inverse(), offline, offline.inverse())
    for answer in carry_out(cxl, *(("apply", step) for step in steps)):
        assert "was made by hand, and is never changed" in answer["text"]
    assert done(carry_out(cxl, *(("undo", step) for step in steps))) == [0] * len(steps)
    assert regions(cxl) == before
    assert (nodes(cxl), dax(cxl)["movable"]) == ("0-1", True)
    cxl.run("daxctl offline-memory all && cxl disable-region all && cxl destroy-region all")
    assert nodes(cxl) == "0"


def test_memory_that_does_not_go_offline_leaves_the_region(
    cxl: RunningLab, bases: list[int]
) -> None:
    """The last one: what the kernel has put there stays until the lab ends."""
    made = create(bases[ONE_BRIDGE], 0x100)
    normal = use(made, MemoryUse.MOVABLE, MemoryUse.NORMAL)
    done(carry_out(cxl, ("apply", made), ("apply", normal)))
    assert dax(cxl)["movable"] is False
    cxl.run(f"cat > /tmp/hoard.py <<'X'\n{HOARD}\nX\npython3 /tmp/hoard.py")
    offline = use(made, MemoryUse.NORMAL, MemoryUse.OFFLINE, deadline_s=10)
    (failed,) = carry_out(cxl, ("apply", offline))
    assert failed["error"] == "CxlError", failed
    assert failed["seconds"] < 40
    assert nodes(cxl) == "0-1"
    device = dax(cxl)
    assert device["online_memblocks"] == device["total_memblocks"]
    (refused,) = carry_out(cxl, ("apply", made.inverse()))
    assert "its memory is online" in refused["text"]
    (undone,) = carry_out(cxl, ("undo", made))
    assert undone["error"] == "CxlError"
    assert len(regions(cxl)) == 1
    assert nodes(cxl) == "0-1"
    assert cxl.run("dmesg | grep -ci 'oops\\|BUG:' || :") == "0"
