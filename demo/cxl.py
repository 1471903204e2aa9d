"""`make demo-cxl`: CXL memory of a running guest, in the nested lab `cxl`.

A region comes up, a guest grows onto it live, the memory is called home, the region goes away; then
the combination that would strand it is refused. Played with the product's own commands, judged by
`memorychecker` from kernel, ndctl's tools, libvirt and the guest. Exit code 0 only if every check
passed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import memorychecker as judge
from demo.labhost import CONFIG as CONFIG_FILE
from demo.labhost import INTERVALS, LabError, LabGuest
from demo.labplay import REFUSED, LabPlay, play
from demo.memorychecker import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from demo.checker import Finding
    from demo.memorychecker import MemorySight

SERIAL = "0x100"
WINDOW = "decoder0.0"
NODE = 1
"""What the first window becomes: each has a node of its own."""
GROWTH = 128 * MIB
DATABASE = LabGuest(name="database", priority=90, tiered=True)
CONFIG = """\
[[device]]
capability = "net.vf"
match = {{ pf = "{pf}" }}
vf_count = 1
"""


class Demo(LabPlay):
    """The acts."""

    # -- tools ------------------------------------------------------------------------------------

    def judge(self, expect: Callable[[MemorySight], list[Finding]]) -> MemorySight:
        """Looks until all is right or patience ends, and shows where the guest's memory lies."""
        deadline = time.monotonic() + self.patience_s
        seen = self.lab.look_at_memory()
        while not all(ok for ok, _ in expect(seen)) and time.monotonic() < deadline:
            seen = self.lab.look_at_memory()
        self.stage.table(
            ("node", "total", "free", "of the guest's pages"),
            [
                (
                    str(node), f"{total // MIB} MiB", f"{free // MIB} MiB",
                    ", ".join(
                        f"{name} {guest.on_node(node) // MIB} MiB"
                        for name, guest in seen.guests.items()
                    ) or "-",
                )
                for node, (total, free) in sorted(seen.nodes.items())
            ],
        )  # fmt: skip
        self.note(*expect(seen))
        return seen

    def make_region(self) -> None:
        """A region, and a libvirt that knows its node."""
        self.run(f"memory region create --window {WINDOW} --memdev {SERIAL}")
        if str(NODE) in self.withheld():
            self.stage.say("libvirt learns of a node only at its start, and the agent says so:")
            self.stage.output(*self.alerts())
            self.stage.command("systemctl restart libvirtd    (guests run on)")
            self.lab.restart_libvirtd()
        deadline = time.monotonic() + self.patience_s
        while (held := self.withheld()) and time.monotonic() < deadline:
            pass  # each look starts a client, which takes an emulated host seconds
        self.note((not held, f"nothing of the host is withheld{': ' if held else ''}{held or ''}"))

    @property
    def region(self) -> str:
        """The kernel's name of the one that there is: it counts on after each that ended."""
        (found,) = self.lab.cli_json("memory")["regions"]
        return str(found["name"])

    def withheld(self) -> dict[str, str]:
        """Nodes of which nothing is granted, as the agent says."""
        found: dict[str, str] = self.lab.cli_json("status")["host"]["withheld"]
        return found

    def alerts(self) -> list[str]:
        """The agent's."""
        found: list[str] = self.lab.cli_json("status")["alerts"]
        return found

    # -- acts -------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """The agent, and a NIC that has a VF."""
        self.stage.act(
            "A host with CXL memory devices",
            "The lab is a whole emulated host: two CXL host bridges, a switch, memory devices that "
            "nobody uses yet, and a NIC with VFs.",
        )
        self.first = self.lab.look_at_memory()
        self.pf = self.lab.do("cd /sys/bus/pci/drivers/igb && ls -d 0* | head -n 1")
        self.lab.do(f"ip link set $(ls /sys/bus/pci/devices/{self.pf}/net) up")
        config = CONFIG.format(pf=self.pf)
        self.stage.command(f"cat {CONFIG_FILE}")
        self.stage.output(INTERVALS + config)
        self.lab.install(config)
        self.stage.command("virtfabricd &")
        self.lab.start_agent()
        said = self.run("memory --tree")
        self.note(
            (SERIAL in said, f"it shows memdev {SERIAL} by its serial number"),
            ("window" in said, "it shows the windows that regions can be made in"),
        )
        self.judge(lambda seen: judge.expect_no_region(seen, NODE))

    def act_region(self) -> None:
        """It becomes a node."""
        self.stage.act(
            "A region comes up",
            "First what would be done, then for real. The memory comes online movable: it can be "
            "taken back.",
        )
        create = f"memory region create --window {WINDOW} --memdev {SERIAL}"
        said = self.run(f"{create} --dry-run")
        self.note(("offline -> movable" in said, "the dry run names both steps"))
        self.judge(lambda seen: judge.expect_no_region(seen, NODE))
        self.make_region()
        self.judge(lambda seen: judge.expect_region(seen, (SERIAL,), NODE))

    def act_guest(self) -> None:
        """All of it on DRAM."""
        self.stage.act(
            "A guest that may have memory of both tiers",
            'Its policy says tiers="dram,cxl"; it is strict, and all that it has is on node 0.',
        )
        done = self.lab.start_guest(DATABASE)
        self.stage.command(f"virsh start {DATABASE.name}", done)
        if done.returncode:
            raise LabError(f"virsh start {DATABASE.name}: {done.stderr}")
        self.lab.wait_ready(DATABASE)
        self.start = self.judge(lambda seen: [judge.expect_nothing_on(seen, "database", NODE)])

    def act_grow(self) -> None:
        """Live."""
        self.stage.act(
            "The guest grows onto the region while it runs",
            "A memory device on that node is attached, filled, and checked in numa_maps.",
        )
        words = f"database --memory +{GROWTH // MIB}M --tier cxl"
        said = self.run(f"allocate {words} --dry-run")
        self.note((f"CXL node {NODE}" in said, "the dry run names the node, and why this one"))
        self.judge(lambda seen: [judge.expect_nothing_on(seen, "database", NODE)])
        self.allocate(words)
        self.grown = self.judge(
            lambda seen: [
                *judge.expect_plugged(seen, "database", NODE, GROWTH),
                judge.expect_grown(seen, self.start, "database", GROWTH),
                judge.expect_touched(seen, "database", NODE),
                judge.expect_same_processes(seen, self.start),
            ]
        )
        said = self.run("status")
        self.note(("offlinable" in said, "status says of each part who can have it back"))
        said = self.run(f"memory region destroy {self.region}", REFUSED)
        self.note(("database" in said, "the region stays while the guest has memory there: named"))
        self.judge(lambda seen: [judge.expect_unchanged(seen, self.grown)])

    def act_home(self) -> None:
        """The guest gives it back, and lives on."""
        self.stage.act("The memory is called home", "The grant ends: the device is emptied.")
        self.run(f"release {self.grants[-1]}")
        self.judge(
            lambda seen: [
                *judge.expect_plugged(seen, "database", NODE, 0),
                judge.expect_grown(seen, self.start, "database", 0),
                judge.expect_nothing_on(seen, "database", NODE),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_region_goes(self) -> None:
        """Offline first, then destroyed."""
        self.stage.act("The region goes away", "Its memory goes offline, then it is destroyed.")
        self.run(f"memory region destroy {self.region}")
        self.judge(
            lambda seen: [
                *judge.expect_no_region(seen, NODE),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_refuse(self) -> None:
        """What would strand it."""
        self.stage.act(
            "What is refused: a PCIe function beside memory that is to come back",
            "vfio pins all memory of a guest, and pinned pages cannot stay in movable memory: the "
            "kernel moves them to another node without a word, or the node never comes back.",
        )
        self.make_region()
        words = f"database --memory +{GROWTH // MIB}M --tier cxl"
        self.allocate(words)
        before = self.judge(lambda seen: judge.expect_plugged(seen, "database", NODE, GROWTH))
        said = self.run("allocate database --device net.vf", REFUSED)
        self.note(
            ("strands-memory" in said, "it names the reason strands-memory"),
            ("node" in said, "it says which memory stands against it"),
        )
        self.judge(lambda seen: [judge.expect_unchanged(seen, before)])
        self.run(f"release {self.grants[-1]}")
        self.stage.say("Both in one request, with none of either yet:")
        said = self.run(f"allocate {words} --device net.vf", REFUSED)
        self.note(("strands-memory" in said, "it names the reason strands-memory"))
        self.judge(
            lambda seen: [
                *judge.expect_plugged(seen, "database", NODE, 0),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_story(self) -> None:
        """From the audit log alone."""
        self.stage.act("The story of the first grant, from the audit log")
        said = self.run(f"explain {self.grants[0]}")
        told = all(words in said for words in ("database", "CXL", "offlinable"))
        self.note((told, "the story names guest, tier, and who can have the memory back"))
        self.run("audit --verify")

    def act_as_found(self) -> None:
        """Nothing is left."""
        self.stage.act("The host as found", "Region, guest, agent and its files are gone.")
        self.run(f"memory region destroy {self.region}")
        alerts = self.alerts()
        self.note((not alerts, f"the agent has no alert{': ' if alerts else ''}{alerts or ''}"))
        self.put_back()
        self.note(judge.expect_host_as_found(self.lab.look_at_memory(), self.first))

    def put_back(self) -> None:
        """The host as found; no check of an act waits for it."""
        self.lab.stop_agent()
        self.lab.end_guests()
        self.lab.clean()
        self.lab.run(f"echo 0 > /sys/bus/pci/devices/{self.pf}/sriov_numvfs")
        self.lab.run(f"ip link set $(ls /sys/bus/pci/devices/{self.pf}/net) down")

    @property
    def acts(self) -> tuple[Callable[[], None], ...]:
        """In their order."""
        return (
            self.set_up, self.act_region, self.act_guest, self.act_grow, self.act_home,
            self.act_region_goes, self.act_refuse, self.act_story, self.act_as_found,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the demo; 0 only if every check passed."""
    return play(Demo, argv, topology="cxl", about=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
