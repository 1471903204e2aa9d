"""`virtfabric memory`: what people see of nodes and CXL memory, and what is said unasked."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.adapters.cxl.conditions import parse_conditions, read_conditions
from virtfabric.adapters.cxl.marks import RegionMarks
from virtfabric.adapters.cxl.memory import SysfsMemory
from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.simulated.machines import small_host
from virtfabric.cli.memorytables import memory_tables, memory_tree_lines, problem_lines
from virtfabric.cli.screen import format_plain
from virtfabric.daemon.memorydesk import ASK_EVERY_S, MemoryDesk
from virtfabric.daemon.memoryviews import memory_view, with_conditions
from virtfabric.daemon.notices import Notices
from virtfabric.model.cxl import Condition, HostMemory, PoisonRecord, Serial
from virtfabric.model.errors import CxlError, StepCancelledError
from virtfabric.model.hugepages import HugePools

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from machine import Machine

    from virtfabric.adapters.simulated.memory import SimulatedMemory

POISON = Condition("ok", (PoisonRecord(0, 64, "Internal"),))


def shown(machine: Machine, conditions: Mapping[str, Condition] | None = None) -> dict[str, Any]:
    memory = machine.memory().read_memory()
    known = with_conditions(memory.cxl, conditions or {})
    return json.loads(json.dumps(memory_view(HostMemory(memory.nodes, known), HugePools(), str)))  # type: ignore[no-any-return]


# -- the document -------------------------------------------------------------------------------


def test_the_document_of_a_busy_host(busy: Machine) -> None:
    RegionMarks(busy.marks).put(0x150000000, (Serial(0x104),))
    document = shown(busy)
    assert [
        (n["node"], n["tier"], n["region"], n["offlinable"]) for n in document["nodes"]
    ] == [
        (0, "dram", None, False), (1, "cxl", "region0", True), (2, "cxl", "region1", True),
        (3, "cxl", "region2", True),
    ]  # fmt: skip
    assert [(r["name"], r["ours"], r["members"]) for r in document["regions"]] == [
        ("region0", True, ["0x104"]), ("region1", False, ["0x102", "0x103"]),
        ("region2", False, ["0x100", "0x101"]),
    ]  # fmt: skip
    assert [(w["base"], w["size"] - w["free"]) for w in document["windows"]] == [
        ("0x150000000", 256 << 20), ("0x1d0000000", 512 << 20), ("0x250000000", 512 << 20),
    ]  # fmt: skip
    assert {m["serial"]: m["region"] for m in document["memdevs"]} == {
        "0x100": "region2", "0x101": "region2", "0x102": "region1", "0x103": "region1",
        "0x104": "region0", "0x200": None,
    }  # fmt: skip
    assert document["problems"] == []


def test_poison_says_which_node_it_hits(busy: Machine) -> None:
    name = busy.memdev("0x101").name
    document = shown(busy, {name: replace(POISON, health="maintenance needed")})
    assert document["problems"] == [
        f"memdev 0x101 ({name}): it says maintenance needed",
        f"memdev 0x101 ({name}): poisoned 64B at 0x0 (internal), part of the memory of node 3: "
        "take it offline",
    ]
    (memdev,) = [m for m in document["memdevs"] if m["serial"] == "0x101"]
    assert memdev["poison"] == [{"offset": 0, "length": 64, "source": "Internal"}]
    assert memdev["health"] == "maintenance needed"


# -- for people ---------------------------------------------------------------------------------


def test_tables(busy: Machine) -> None:
    (busy.memdev("0x200") / "serial").write_text("\x1b[31mroot\n")
    document = shown(busy)
    text = "\n".join(format_plain(table) for table in memory_tables(document))
    for expected in ("0x150000000", "region2", "0x100, 0x101", "2 x 256B", "online, movable",
                     "by hand", "cannot be told apart", "ZONE_DMA"):  # fmt: skip
        assert expected in text
    assert "\x1b" not in text
    assert len(problem_lines(document)) == 1


def test_a_host_without_cxl_has_one_table(busy: Machine) -> None:
    document = shown(busy) | {"windows": [], "regions": [], "memdevs": [], "ports": []}
    assert [table.title for table in memory_tables(document)] == ["nodes"]
    assert len(memory_tree_lines(document)) == 4


def test_the_tree_leaves_nobody_out(busy: Machine) -> None:
    lines = memory_tree_lines(shown(busy))
    text = "\n".join(lines)
    for serial in ("0x100", "0x101", "0x102", "0x103", "0x104", "0x200"):
        assert sum(f" {serial}  mem" in line for line in lines) == 1, text
    switch = next(n for n, line in enumerate(lines) if "switch" in line)
    assert "0x102" in lines[switch + 1] + lines[switch + 2]
    assert "0x103" in lines[switch + 1] + lines[switch + 2]
    for number in range(3):
        assert sum(line.strip().startswith(f"region{number} ") for line in lines) == 1


# -- health -------------------------------------------------------------------------------------

FINE = {
    "maintenance_needed": False, "media_normal": True, "ext_life_used": "normal",
    "ext_temperature": "unknown", "temperature": 25, "volatile_errors": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("health", "word"),
    [
        (None, ""),
        (FINE, "ok"),
        (FINE | {"hw_replacement_needed": True}, "hw replacement needed"),
        (FINE | {"ext_life_used": "critical"}, "life used critical"),
        (
            FINE | {"media_normal": False, "media_data_lost": True, "ext_temperature": "warning"},
            "media data lost, temperature warning",
        ),
    ],
)
def test_health_in_words(health: dict[str, Any] | None, word: str) -> None:
    text = json.dumps([{"memdev": "mem0", "health": health}])
    assert parse_conditions(text)["mem0"].health == word


def test_poison_as_the_lab_printed_it() -> None:
    text = """[{"memdev":"mem2","ram_size":268435456,"serial":257},
        {"memdev":"mem1","ram_size":268435456,"serial":256,
         "media_errors":[{"offset":0,"length":64,"source":"Internal"},
                         {"offset":"x","length":64}]}]"""
    found = parse_conditions(text)
    assert found["mem2"].poison == ()
    assert found["mem1"].poison == (PoisonRecord(0, 64, "Internal"),)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"name": "mem0"}]', '[{"memdev": "m", "health": 3}]']
)
def test_what_cxl_list_never_prints(text: str) -> None:
    with pytest.raises(CxlError, match="prints something unknown"):
        parse_conditions(text)


def test_an_older_cxl_knows_no_poison() -> None:
    asked = []

    def run(command: Any, *, deadline_s: float, cancelled: Any = None) -> str:
        asked.append(command)
        if "--media-errors" in command:
            raise CxlError("unknown option `media-errors'")
        return '[{"memdev": "mem0", "health": {"media_normal": true}}]'

    assert read_conditions(run, threading.Event()) == {"mem0": Condition("ok")}
    assert len(asked) == 2


def test_a_failed_look_does_not_pass_for_memory_without_poison() -> None:
    def run(command: Any, **_options: Any) -> str:
        if "--media-errors" in command:
            raise CxlError("cxl list: no trace instance")
        return '[{"memdev": "mem0", "health": {"media_normal": true}}]'

    with pytest.raises(CxlError, match="no trace instance"):
        read_conditions(run, threading.Event())


def test_memdevs_are_asked_by_one_at_a_time(tmp_path: Path) -> None:
    begun, end, running = threading.Event(), threading.Event(), []

    def run(command: Any, **_options: Any) -> str:
        running.append(command)
        begun.set()
        assert end.wait(30)
        return "[]"

    memory = SysfsMemory(tmp_path, tmp_path, marks=tmp_path / "marks", run=run)
    first = threading.Thread(target=memory.read_conditions, args=(threading.Event(),))
    first.start()
    assert begun.wait(30)
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(StepCancelledError):
        memory.read_conditions(given_up)
    assert len(running) == 1
    end.set()
    first.join(30)
    assert memory.read_conditions(threading.Event()) == {}
    assert len(running) == 2


# -- the desk -----------------------------------------------------------------------------------


class Watched:
    """A simulated host, its desk, and what was said."""

    def __init__(self, machine: Machine) -> None:
        self.clock = clock = SimulatedClock()
        host = small_host(clock)
        self.memory: SimulatedMemory = host.memory
        self.memory.cxl = machine.read()
        self.notices = Notices(clock)
        self.judged: list[Mapping[Serial, Condition]] = []
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.notices.subscribe(lambda notice: self.told.append((notice.kind, notice.body)))
        self.desk = MemoryDesk(
            self.memory, host.pages, self.notices, clock, judge=self.judged.append, name_of=str
        )
        self.asked = threading.Event()
        self.ask = self.memory.read_conditions

        def read_conditions(cancelled: threading.Event) -> Mapping[str, Condition]:
            found = self.ask(cancelled)
            self.asked.set()
            return found

        self.memory.read_conditions = read_conditions  # type: ignore[method-assign,assignment]

    def wait_for(self, text: str) -> None:
        """Until it is among the problems; they come from a thread."""
        done = threading.Event()
        for _ in range(500):
            if any(text in problem for problem in self.desk.show()["problems"]):
                return
            done.wait(0.01)
        raise AssertionError(self.desk.show()["problems"])


@pytest.fixture
def watched(busy: Machine) -> Iterator[Watched]:
    found = Watched(busy)
    yield found
    found.desk.close()


def test_hot_added_and_removed_memdevs_are_told(watched: Watched) -> None:
    watched.desk.start()
    (extra,) = [m for m in watched.memory.cxl.memdevs if m.serial == 0x200]
    watched.memory.remove(Serial(0x200))
    watched.memory.plug(extra)
    region = watched.memory.cxl.regions[0]
    watched.memory.drop_region(region)
    assert watched.told == [
        ("memory.changed", {"came": [], "went": ["memdev 0x200"]}),
        ("memory.changed", {"came": ["memdev 0x200"], "went": []}),
        ("memory.changed", {"came": [], "went": ["region of 0x104, node 1 online"]}),
    ]


def test_nobody_waits_for_a_poison_list(watched: Watched) -> None:
    gate = threading.Event()
    watched.ask = lambda cancelled: (gate.wait(10), {"mem0": POISON})[1]
    watched.desk.start()
    assert watched.desk.show()["problems"] == [
        "health and poison of the memdevs have not been asked yet"
    ]
    gate.set()
    watched.wait_for("poisoned 64B at 0x0")
    assert any("poisoned" in text for text in watched.notices.alerts)


def test_no_tool_is_said_once_and_shown(watched: Watched) -> None:
    def fail(cancelled: threading.Event) -> Mapping[str, Condition]:
        raise CxlError("cxl cannot be run: No such file or directory")

    watched.ask = fail  # type: ignore[assignment]
    watched.desk.start()
    watched.wait_for("are not known: cxl cannot be run")


def test_a_problem_is_an_alert_until_it_is_gone(watched: Watched) -> None:
    sound = watched.memory.cxl
    watched.memory.cxl = replace(sound, problems=("memdev ? (mem9): it has no capacity",))
    watched.desk.start()
    assert watched.notices.alerts == ["memdev ? (mem9): it has no capacity"]
    watched.memory.cxl = sound
    watched.desk.look()
    assert watched.notices.alerts == []


# -- how often memdevs are asked ----------------------------------------------------------------


def test_memdevs_are_asked_after_a_change_and_every_so_often(watched: Watched) -> None:
    def asked() -> bool:
        found = watched.asked.wait(10)
        watched.asked.clear()
        return found

    watched.desk.start()
    assert asked()
    for _ in range(5):  # memory went on- or offline somewhere: no reason to keep them busy
        watched.desk.look()
    assert not watched.desk._wanted.is_set()
    assert not watched.asked.is_set()
    watched.memory.remove(Serial(0x200))
    assert asked()
    watched.clock.advance(ASK_EVERY_S)
    watched.desk.look()
    assert asked()


def test_what_memdevs_tell_is_passed_on_by_serial(watched: Watched) -> None:
    """And nothing of one whose name is another's by then."""
    memdevs = {str(m.serial): m for m in watched.memory.cxl.memdevs}
    told = {memdevs["0x100"].name: POISON, memdevs["0x200"].name: POISON}

    def ask(cancelled: threading.Event) -> Mapping[str, Condition]:
        others = (m for m in watched.memory.cxl.memdevs if m.serial != Serial(0x200))
        new = replace(memdevs["0x200"], serial=Serial(0x201))
        watched.memory.cxl = replace(watched.memory.cxl, memdevs=(*others, new))
        return told

    watched.ask = ask  # type: ignore[assignment]
    watched.desk.start()
    assert watched.asked.wait(10)
    watched.desk.close()
    assert watched.judged == [{Serial(0x100): POISON}]


def test_broken_pages_as_the_kernel_counts_them(busy: Machine) -> None:
    nodes = busy.sys / "devices/system/node"
    assert busy.memory().read_broken_pages() == {}  # before Linux 6.3
    for number, total in ((0, "0"), (2, "7"), (3, "garbage")):
        (nodes / f"node{number}/memory_failure").mkdir()
        (nodes / f"node{number}/memory_failure/total").write_text(f"{total}\n")
    assert busy.memory().read_broken_pages() == {0: 0, 2: 7}
