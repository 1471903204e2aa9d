"""The CXL demo without a lab: its judge, what its sight reads, its guest, its script of acts."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from demo import memorychecker as judge
from demo import memorysight
from demo.cxl import DATABASE, GROWTH, Demo
from demo.labhost import LabError, LabHost, format_tiered
from demo.memorychecker import MIB, DeviceSight, GuestMemory, MemorySight, RegionSight
from demo.stage import Stage
from virtfabric.domxml.domain import parse_domain
from virtfabric.model.guest import NumaMode
from virtfabric.policy.tiers import device_nodes, fixed_parts
from virtfabric.shim.lab.payload import format_sample_guest

DEVICE = DeviceSight("ua-virtfabric-cxl1", "1", GROWTH, GROWTH)
PLAIN = GuestMemory(7, True, 180 * MIB, (), 0, {"0": {0: 90 * MIB}, "-": {0: 40 * MIB}})
GROWN = replace(
    PLAIN, inside=180 * MIB + GROWTH, devices=(DEVICE,),
    pages=PLAIN.pages | {"1": {1: 2 * MIB}},
)  # fmt: skip
REGION = RegionSight("region0", 256 * MIB, True, ("0x100",))
BARE = MemorySight({0: (3 << 30, 2 << 30)}, ("0x100", "0x101"), (), (), {"database": PLAIN})
UP = replace(
    BARE, nodes=BARE.nodes | {1: (256 * MIB, 250 * MIB)}, regions=(REGION,), movable=(True,)
)
HOME = replace(
    PLAIN, devices=(replace(DEVICE, requested=0, current=0),), pages=PLAIN.pages | {"1": {}}
)


def with_guest(seen: MemorySight, guest: GuestMemory) -> MemorySight:
    return replace(seen, guests={"database": guest})


def passed(findings: list[tuple[bool, str]]) -> list[bool]:
    return [ok for ok, _ in findings]


def test_a_region_that_came_and_went() -> None:
    assert passed(judge.expect_region(UP, ("0x100",), 1)) == [True, True, True]
    assert passed(judge.expect_region(BARE, ("0x100",), 1)) == [False, False, False]
    assert passed(judge.expect_region(UP, ("0x101",), 1))[0] is False
    assert passed(judge.expect_region(replace(UP, movable=(False,)), ("0x100",), 1))[2] is False
    half = replace(UP, regions=(replace(REGION, committed=False),))
    assert passed(judge.expect_region(half, ("0x100",), 1))[0] is False
    assert passed(judge.expect_no_region(BARE, 1)) == [True, True]
    assert passed(judge.expect_no_region(UP, 1)) == [False, False]


def test_a_guest_that_grew() -> None:
    seen, before = with_guest(UP, GROWN), with_guest(UP, PLAIN)
    assert passed(judge.expect_plugged(seen, "database", 1, GROWTH)) == [True, True]
    assert judge.expect_grown(seen, before, "database", GROWTH)[0]
    assert judge.expect_touched(seen, "database", 1)[0]
    assert not judge.expect_nothing_on(seen, "database", 1)[0]
    assert judge.expect_same_processes(seen, before)[0]


def test_an_executor_that_does_nothing() -> None:
    seen = with_guest(UP, PLAIN)
    assert passed(judge.expect_plugged(seen, "database", 1, GROWTH)) == [False, False]
    assert not judge.expect_grown(seen, seen, "database", GROWTH)[0]
    assert not judge.expect_touched(seen, "database", 1)[0]


@pytest.mark.parametrize(
    "pages", [{"1": {1: MIB, 0: MIB}}, {"1": {0: MIB}}, {"0-1": {1: MIB}}],
    ids=["partly elsewhere", "all elsewhere", "bound to both"],
)  # fmt: skip
def test_pages_that_are_not_where_they_should_be(pages: dict[str, dict[int, int]]) -> None:
    seen = with_guest(UP, replace(GROWN, pages=PLAIN.pages | pages))
    assert passed(judge.expect_plugged(seen, "database", 1, GROWTH)) == [True, False]


def test_memory_that_was_called_home() -> None:
    home, grown = with_guest(UP, HOME), with_guest(UP, GROWN)
    assert passed(judge.expect_plugged(home, "database", 1, 0)) == [True, True]
    assert judge.expect_nothing_on(home, "database", 1)[0]
    assert judge.expect_grown(home, with_guest(UP, PLAIN), "database", 0)[0]
    assert passed(judge.expect_plugged(grown, "database", 1, 0))[0] is False
    assert not judge.expect_grown(grown, home, "database", 0)[0]


def test_what_changed() -> None:
    seen = with_guest(UP, GROWN)
    assert judge.expect_unchanged(seen, seen)[0]
    assert not judge.expect_unchanged(with_guest(UP, replace(GROWN, functions=1)), seen)[0]
    assert not judge.expect_unchanged(with_guest(BARE, GROWN), seen)[0]
    assert not judge.expect_same_processes(with_guest(UP, replace(GROWN, pid=8)), seen)[0]
    assert judge.expect_host_as_found(BARE, BARE)[0]
    assert not judge.expect_host_as_found(UP, BARE)[0]
    assert not judge.expect_host_as_found(replace(BARE, memdevs=("0x100",)), BARE)[0]


def test_what_is_read() -> None:
    assert memorysight.parse_list("0,2-3\n") == [0, 2, 3]
    pages = memorysight.parse_numa_maps(
        "7f00 bind:1 anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n"
        "7f10 bind=static:1 file=/memfd:x N1=1 kernelpagesize_kB=2048\n"
        "7f20 default file=/usr/lib/x.so mapped=9 N0=9 kernelpagesize_kB=4\n"
        "7f30 bind:0-1 anon=1 N1=1 kernelpagesize_kB=4\n"
    )
    assert pages == {
        "1": {"0": 4096, "1": 8192 + (2 << 20)}, "-": {"0": 9 * 4096}, "0-1": {"1": 4096},
    }  # fmt: skip
    told = "VFREADY\nVFSTAT up=1 memtotal_kib=100 x\nVFSTAT up=2 mem"
    assert memorysight.parse_console(told) == (True, 100 << 10)
    regions = [
        {
            "region": "region3", "size": 512, "decode_state": "commit",
            "mappings": [
                {"position": 1, "memdev": "mem0"}, {"position": 0, "memdev": "mem4"},
            ],
        }
    ]  # fmt: skip
    memdevs = [{"memdev": "mem0", "serial": 0x101}, {"memdev": "mem4", "serial": 0x100}]
    (found,) = memorysight.read_regions(regions, memdevs)
    assert (found["serials"], found["committed"]) == (["0x100", "0x101"], True)


def test_memory_devices_of_the_live_xml() -> None:
    devices, functions = memorysight.parse_devices(
        """<domain><devices><hostdev/><memory model='virtio-mem'><source><nodemask>1</nodemask>
        </source><target><size unit='MiB'>256</size><requested unit='MiB'>128</requested>
        <current unit='KiB'>131072</current></target><alias name='ua-x'/></memory>
        </devices></domain>"""
    )
    assert functions == 1
    assert devices == [
        {"alias": "ua-x", "nodes": "1", "requested": GROWTH, "current": GROWTH},
    ]


def test_the_guest_is_what_a_tiered_guest_needs() -> None:
    """As the agent reads it: strict, all of it on node 0, room and ports for a device on node 1."""
    xml = format_tiered(format_sample_guest("database", metadata_xml=DATABASE.policy_xml))
    uuid = "<uuid>11111111-1111-4111-8111-111111111111</uuid>"
    guest = parse_domain(xml.replace("</name>", f"</name>{uuid}", 1), None)
    assert (guest.policy_error, guest.numa_mode) == ("", NumaMode.STRICT)
    assert guest.policy is not None
    assert guest.policy.memory.tiers == ("dram", "cxl")
    assert [set(part.host_nodes) for part in fixed_parts(guest)] == [{0}]
    (device,) = guest.virtio_mem
    assert set(device_nodes(guest, device)) == {0}
    assert guest.memory_room.slots >= 1
    assert guest.memory_room.size >= 256 * MIB
    assert xml.count("pcie-root-port") >= 1
    with pytest.raises(LabError):
        format_tiered("<domain/>")


class PaperLab(LabHost):
    """Answers as a host would on which everything works; nothing runs anywhere."""

    def __init__(self) -> None:
        super().__init__("paper", "cxl")
        self.said: list[str] = []
        self.region_up = self.known = self.running = self.grown = self.had = False
        self.count = 0

    def run(self, command: str, *, timeout_s: float = 1) -> subprocess.CompletedProcess[str]:
        self.said.append(command)
        code, out = self._answer(command.partition("virtfabric ")[2], command)
        return subprocess.CompletedProcess(command, code, out, "")

    def _answer(self, words: str, command: str) -> tuple[int, str]:
        match words.split():
            case ["memory", "--tree"]:
                return 0, "window 0x1 0x100"
            case ["memory", "region", "create", *_, "--dry-run"]:
                return 0, "offline -> movable"
            case ["memory", "region", "create", *_]:
                self.region_up = True
            case ["memory", "region", "destroy", "region0"] if self.grown:
                return 3, "guests use it: database"
            case ["memory", "region", "destroy", "region0"]:
                self.region_up = False
                return 0, "database: detach empty virtio-mem"
            case ["allocate", "database", *_, "--device", "net.vf"]:
                return 3, "strands-memory: memory on node 1"
            case ["allocate", *_, "--dry-run"]:
                return 0, "CXL node 1: 256MiB free"
            case ["allocate", *_]:
                self.grown = self.had = True
                self.count += 1
            case ["release", _]:
                self.grown = False
            case ["status"]:
                return 0, "offlinable"
            case ["explain", _]:
                return 0, "database CXL offlinable"
            case _ if "ls -d" in command:
                return 0, "0000:01:00.0\n"
        return 0, ""

    def cli_json(self, words: str) -> Any:
        if words == "grants":
            return [{"id": f"grant-{self.count}"}] if self.grown else []
        if words == "memory":
            return {"regions": [{"name": "region0"}]}
        unknown = self.region_up and not self.known
        held = {"1": "libvirt does not know it"} if unknown else {}
        return {"host": {"withheld": held}, "alerts": ["restart libvirtd"] if unknown else []}

    def restart_libvirtd(self) -> None:
        self.known = self.region_up

    def start_guest(self, guest: Any) -> subprocess.CompletedProcess[str]:
        self.guests.append(guest)
        return subprocess.CompletedProcess("virsh start", 0, "", "")

    def end_guests(self) -> None:
        self.guests.clear()

    def look_at_memory(self) -> MemorySight:
        guest = GROWN if self.grown else HOME if self.had else PLAIN
        seen = UP if self.region_up else BARE
        return replace(seen, guests={"database": guest} if self.guests else {})


def test_the_demo_passes_where_everything_works() -> None:
    lab = PaperLab()
    demo = Demo(lab, Stage(quiet=True), patience_s=0.0)
    demo.play()
    assert demo.verdicts.failed == []
    assert demo.verdicts.exit_code == 0
    assert not lab.region_up


def test_the_demo_fails_where_nothing_is_done() -> None:
    class Idle(PaperLab):
        def _answer(self, words: str, command: str) -> tuple[int, str]:
            code, out = super()._answer(words, command)
            self.grown = self.had = False
            return code, out

    demo = Demo(Idle(), Stage(quiet=True), patience_s=0.0)
    demo.play(keep_going=False)
    assert demo.verdicts.exit_code != 0
    assert any("128 MiB of node 1" in str(finding) for finding in demo.verdicts.failed)


def test_the_sight_is_json() -> None:
    data = {
        "nodes": {"0": {"total": 1, "free": 1}}, "memdevs": ["0x100"], "movable": [],
        "regions": [{"name": "region0", "size": 1, "committed": True, "serials": ["0x100"]}],
        "guests": {
            "database": {
                "pid": None, "ready": False, "inside": 0, "functions": 0,
                "devices": [{"alias": "a", "nodes": "1", "requested": 0, "current": 0}],
                "pages": {"1": {"1": 4096}},
            }
        },
    }  # fmt: skip
    seen = MemorySight.from_json(json.loads(json.dumps(data)))
    assert seen.guests["database"].on_node(1) == 4096
