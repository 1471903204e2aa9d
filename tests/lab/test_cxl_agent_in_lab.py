"""The agent and CXL memory on a real kernel: killed at every boundary, lent often, failed.

The order counts: the last test pulls a memdev that is in use, and the node is lost until a reboot.
Tests that end a region end every one. VIRTFABRIC_CYCLES says how often memory is lent (default 5).
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from cxl_bed import SERIAL, WINDOW, CxlBed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running_lab import RunningLab

CYCLES = int(os.environ.get("VIRTFABRIC_CYCLES", "5"))
MIB = 1 << 20
FAR_TOLERANCE_MIB = 4
"""Of the CXL node: what virtio-mem may stick short of (docs/architecture.md)."""
NEAR_TOLERANCE_MIB = 48
"""Of node 0, where all programs and the kernel itself live; a leak of 1 MiB a cycle shows."""
BOUNDARIES = [
    (kind, phase)
    for kind in ("create-region", "online-memory")
    for phase in ("before-apply", "after-apply", "after-verify")
]

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def bed(cxl: RunningLab) -> CxlBed:
    bed = CxlBed(cxl)
    bed.prepare()
    return bed


@pytest.fixture
def idle(bed: CxlBed) -> Iterator[CxlBed]:
    """No agent runs and no region is there, whatever a failed test left of them."""
    end = "kill -9 $(pgrep -f '[f]ault_agent|[a]gentd') 2> /dev/null"
    bed.lab.run(end, code=None)
    bed.await_agents_end()
    bed.end_regions()
    yield bed
    bed.lab.run(end, code=None)
    bed.await_agents_end()


@pytest.fixture
def agent(idle: CxlBed) -> CxlBed:
    """The agent serves."""
    idle.start_agent()
    return idle


# -- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "phase"), BOUNDARIES)
@pytest.mark.parametrize("making", [True, False], ids=["making", "ending"])
def test_killed_at_a_boundary(idle: CxlBed, kind: str, phase: str, making: bool) -> None:
    """The next start undoes it; then the same command does it."""
    if not making:
        idle.start_agent()
        idle.ask(idle.create_words())
        idle.kill_agent()
    before = idle.ground()
    assert before.regions == (() if making else ((SERIAL,),))
    idle.start_agent(f"kill:{kind}:{phase}")
    words = idle.create_words() if making else f"memory region destroy {idle.region_name()}"
    idle.lab.run(f"virtfabric {words} > /dev/null 2>&1", code=None, timeout_s=300)
    idle.await_agents_end()
    idle.start_agent()
    assert idle.ground() == before
    if making:
        idle.ask(words)
        assert idle.ground().regions == ((SERIAL,),)
    idle.ask(f"memory region destroy {idle.region_name()}")
    assert idle.ground().regions == ()
    assert idle.ground().nodes == "0"
    idle.kill_agent()


def test_killed_while_a_tool_works(agent: CxlBed) -> None:
    """No program of ndctl outlives the agent, and what it left half made goes."""
    before = agent.ground()
    # in one shell: the next command in the lab would come when all is done
    agent.lab.run(
        f"setsid virtfabric {agent.create_words()} > /dev/null 2>&1 < /dev/null & disown; "
        "end=$(( SECONDS + 120 )); until pgrep -f '[c]xl create-region' > /dev/null; do "
        "[ $SECONDS -lt $end ] || exit 9; done; kill -9 $(pgrep -f '[c]li.agentd')"
    )
    agent.await_agents_end()
    agent.lab.wait("! pgrep -f '[c]xl create-region' > /dev/null")
    agent.start_agent()
    assert agent.ground() == before
    agent.ask(agent.create_words())
    agent.ask(f"memory region destroy {agent.region_name()}")
    assert agent.ground() == before
    assert agent.lab.run("dmesg | grep -ci 'oops\\|BUG:' || :") == "0"


# -- nothing leaks --------------------------------------------------------------------------------


def test_regions_come_and_go_without_a_trace(agent: CxlBed) -> None:
    agent.cycle("host", f"region:{WINDOW}:{SERIAL}", 2)
    before, ground, free = agent.trace(), agent.ground(), agent.free_mib(0)
    agent.cycle("host", f"region:{WINDOW}:{SERIAL}", CYCLES)
    after = agent.trace()
    assert agent.ground() == ground
    assert after.agent_files <= before.agent_files
    assert after.journal_rows == before.journal_rows
    assert abs(agent.free_mib(0) - free) <= NEAR_TOLERANCE_MIB


def test_lent_and_returned_without_a_trace(agent: CxlBed) -> None:
    """Growth onto the node and back: files, rows and free memory are what they were."""
    agent.make_region()
    agent.define_tiered("db", 90)
    agent.boot("db")
    agent.cycle("db", "memory@cxl:128M", 2)  # the device is attached, caches are warm
    before, ground = agent.trace(), agent.ground()
    free = agent.free_mib(0), agent.free_mib(1)
    agent.cycle("db", "memory@cxl:128M", CYCLES)
    after = agent.trace()
    assert agent.ground() == ground
    assert agent.far_bytes("db") == 0
    assert agent.pages_on_node("db", 1) == 0
    assert after.agent_files <= before.agent_files
    assert after.libvirtd_files <= before.libvirtd_files
    assert after.journal_rows == before.journal_rows
    assert abs(agent.free_mib(1) - free[1]) <= FAR_TOLERANCE_MIB
    assert abs(agent.free_mib(0) - free[0]) <= NEAR_TOLERANCE_MIB
    agent.stop("db")
    agent.ask(f"memory region destroy {agent.region_name()}")
    assert agent.ground().regions == ()


def test_nothing_grows_on_a_device_whose_node_was_away(agent: CxlBed) -> None:
    """It is bound to another one since; by `region destroy` it would have left."""
    grow = "allocate db --memory +128M --tier cxl --deadline 300"
    agent.make_region()
    agent.define_tiered("db", 90)
    agent.boot("db")
    agent.ask(f"release {agent.ask(grow)['result']['grant']}")
    agent.lab.run("daxctl offline-memory all; cxl disable-region all; cxl destroy-region all")
    agent.make_region()
    assert "memory reclaim 1 --detach" in agent.refused(grow)
    agent.ask("memory reclaim 1 --detach --deadline 120")
    grant = agent.ask(grow)["result"]["grant"]
    maps = "/proc/$(cat /run/libvirt/qemu/db.pid)/numa_maps"
    assert agent.lab.run(f"grep -cE ' bind:1( |$)' {maps}") == "1"
    agent.ask(f"release {grant}")
    agent.ask(f"memory region destroy {agent.region_name()}")
    assert "ua-virtfabric-cxl" not in agent.lab.run("virsh -q dumpxml db")
    agent.stop("db")


# -- failure --------------------------------------------------------------------------------------


def test_poison(agent: CxlBed) -> None:
    """Told with guest and way out; the way out is gone, command by command."""
    agent.make_region()
    agent.define_tiered("db", 90)
    agent.boot("db")
    agent.ask("allocate db --memory +128M --tier cxl --deadline 300")
    agent.lab.fault("cxl-poison")
    agent.kill_agent()
    agent.start_agent()  # a start asks the memdevs, and takes its time for it
    agent.await_agent(
        f"any('memdev {SERIAL} is poisoned' in a for a in document['alerts'])", timeout_s=600
    )
    (text,) = [a for a in agent.ask("status")["alerts"] if f"{SERIAL} is poisoned" in a]
    for words in ("64B at 0x0", "node 1", "db 128MiB"):
        assert words in text, text
    home = re.search(r"virtfabric (memory reclaim \d+ --detach)", text)
    assert home, text
    assert agent.far_bytes("db") == 128 * MIB  # nobody moved it
    agent.refused("allocate db --memory +64M --tier cxl")
    assert "db" in agent.refused(f"memory region destroy {agent.region_name()}")
    assert agent.ask(f"{home[1]} --deadline 300")["result"]["out"] == 0
    agent.ask(f"memory region destroy {agent.region_name()}")
    assert "in quarantine" in agent.refused(agent.create_words())
    said = agent.refused(f"memory release {SERIAL}")
    assert "lists poison still" in said
    clear = re.search(r"echo 0x\w+ > \S+/clear_poison", " ".join(said.split()))
    assert clear, said
    debug = "/sys/kernel/debug"
    agent.lab.run(f"mountpoint -q {debug} || mount -t debugfs debugfs {debug}; {clear[0]}")
    agent.ask(f"memory release {SERIAL}")
    assert agent.ask("memory")["quarantine"] == []
    agent.ask(agent.create_words())
    agent.ask(f"memory region destroy {agent.region_name()}")
    agent.stop("db")


def test_a_memdev_is_pulled_while_a_guest_has_it(agent: CxlBed) -> None:
    """The last one: the node is lost. The agent lives, says so, and grants nothing of it.

    The guest is paused first. One that runs reads zeros where its memory was and falls over, at
    times before anybody could look who has some there, and at times QEMU 11.1.2 does.
    """
    agent.make_region()
    agent.define_tiered("db", 90)
    agent.boot("db")
    agent.ask("allocate db --memory +128M --tier cxl --deadline 300")
    agent.lab.run("virsh -q suspend db")
    agent.take_out(SERIAL)
    agent.await_agent(
        f"any('{SERIAL} was taken out while' in a for a in document['alerts'])", timeout_s=300
    )
    (text,) = [a for a in agent.ask("status")["alerts"] if "was taken out while" in a]
    assert "db" in text
    assert "node 1" in text
    host = agent.ask("status")["host"]
    assert "1" in host["withheld"]
    node = next(n for n in host["memory"] if n["node"] == 1)
    assert (node["tier"], node["grantable"]) == ("cxl", 0)  # it must not pass for DRAM
    agent.refused("allocate db --memory +64M --tier cxl")
    assert "only a reboot" in agent.refused(f"memory release {SERIAL}")
    agent.kill_agent()
    agent.start_agent()
    assert [q["subject"] for q in agent.ask("memory")["quarantine"]] == [SERIAL]
