"""`make demo-passthrough`: PCIe functions of running guests, in the nested lab `passthrough`.

Brings the lab up, plays its acts there with the product's own commands, has each judged by
`devicechecker` from kernel, libvirt and guests, and takes the lab down. Exit code 0 only if every
check passed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import devicechecker as judge
from demo.labhost import INTERVALS, LabError, LabGuest
from demo.labplay import REFUSED, LabPlay, play

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from demo.checker import Finding
    from demo.devicechecker import Sight

PF = "0000:01:00.0"
VFS = ("0000:01:10.0", "0000:01:10.2")
"""The two that `vf_count` makes: every other routing id from the 128th (igb, 82576)."""
UPLINK = "0000:51:00.0"
NVME = "0000:52:00.0"
DISK_VF = "0000:52:00.1"
POOL = (*VFS, DISK_VF)
FUNCTIONS = (PF, UPLINK, NVME, "0000:02:00.0", "0000:03:00.0", "0000:03:00.1", *POOL)
CONFIG = f"""\
[[device]]
capability = "net.vf"
match = {{ pf = "{PF}" }}
vf_count = 2

[[device]]
capability = "storage.nvme"
match = {{ pf = "{NVME}" }}
vf_count = 1
nvme_queues = 2

[[device]]
capability = "net.uplink"
match = {{ address = "{UPLINK}" }}
"""
BATCH = LabGuest(name="batch", priority=10, devices=(("net.vf", 1),))
DATABASE = LabGuest(name="database", priority=90)


class Demo(LabPlay):
    """The acts."""

    # -- tools ------------------------------------------------------------------------------------

    def look(self) -> Sight:
        """The lab now."""
        return self.lab.look(FUNCTIONS, UPLINK)

    def judge(self, expect: Callable[[Sight], list[Finding]]) -> Sight:
        """Looks until all is right or patience ends, and shows the pool."""
        deadline = time.monotonic() + self.patience_s
        seen = self.look()
        while not all(ok for ok, _ in expect(seen)) and time.monotonic() < deadline:
            seen = self.look()
        self.stage.table(
            ("function", "driver", "node", "IOMMU group", "open in"),
            [
                (a, f.driver or "-", str(f.node), f.group, ", ".join(seen.holders(a)) or "-")
                for a in POOL
                if (f := seen.functions[a])
            ],
        )
        self.note(*expect(seen))
        return seen

    # -- acts -------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """NICs up, agent, two guests."""
        self.stage.act(
            "A host with VFs, and two guests",
            "The lab is a whole emulated host: IOMMU, two NICs with VFs on one wire, an NVMe "
            "controller with VFs.",
            "batch (priority 10) asks for a NIC in its policy and lends it; database has "
            "priority 90.",
        )
        self.first = self.look()
        for pf in (PF, UPLINK):
            self.lab.do(f"ip link set $(ls /sys/bus/pci/devices/{pf}/net) up")
        self.stage.command("cat /etc/virtfabric/passthrough.toml")
        self.stage.output(INTERVALS + CONFIG)
        self.lab.install(CONFIG)
        self.stage.command("virtfabricd &")
        self.lab.start_agent()
        self._drivers = {
            address: seen.driver if seen else "" for address, seen in self.look().functions.items()
        }
        for guest in (DATABASE, BATCH):
            done = self.lab.start_guest(guest)
            self.stage.command(f"virsh start {guest.name}", done)
            if done.returncode:
                raise LabError(f"virsh start {guest.name}: {done.stderr}")
        for guest in (DATABASE, BATCH):
            self.lab.wait_ready(guest)
        self.stage.say("What batch's policy asks for was attached when it ran:")
        self.start = self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "batch", VFS, 1),
                judge.expect_nics(seen, "batch", 1),
                *judge.expect_holds(seen, "database", POOL, 0),
            ]
        )

    def act_pools(self) -> None:
        """What there is."""
        self.stage.act(
            "What there is to give", "Ports with what is behind them; below, why one cannot be had."
        )
        said = self.run("devices --tree")
        self.note(
            ("with batch" in said, "it says which VF batch has"),
            ("free" in said, "it says which is free"),
            ("PF with 2 of 7 VFs" in said, "it shows the PF with its VFs"),
        )

    def act_attach(self) -> None:
        """A free one, and a disk."""
        self.stage.act(
            "The database gets a NIC and a disk while it runs",
            "First what would be done, and who shares what with the function; then for real.",
        )
        said = self.run("allocate database --device net.vf --dry-run")
        self.note(("shares the" in said, "the dry run names who shares something with it"))
        self.judge(lambda seen: [judge.expect_unchanged(seen, self.start)])
        self.allocate("database --device net.vf --device storage.nvme")
        self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "database", POOL, 2),
                judge.expect_nics(seen, "database", 1),
                judge.expect_disks(seen, "database", 1),
                *judge.expect_holds(seen, "batch", VFS, 1),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_reclaim(self) -> None:
        """batch pays."""
        self.stage.act(
            "None is free: batch pays",
            "batch has the lower priority, and its policy says reclaimable: its VF is detached, "
            "reset, and goes to the database.",
        )
        self.run("allocate database --device net.vf --dry-run")
        self.allocate("database --device net.vf")
        self.reclaimed = self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "database", POOL, 3),
                judge.expect_nics(seen, "database", 2),
                *judge.expect_holds(seen, "batch", VFS, 0),
                judge.expect_nics(seen, "batch", 0),
                judge.expect_same_processes(seen, self.start),
            ]
        )
        self.run("loans")

    def act_refuse(self) -> None:
        """What cannot be had changes nothing."""
        self.stage.act(
            "What cannot be had",
            "A VF that only a higher priority has; the host's uplink; a capability that no pool "
            "has.",
        )
        for words, reason in (
            ("batch --device net.vf", "no-capacity"),
            ("batch --device net.uplink", "device-in-use"),
            ("database --device crypto.slice", "unknown-capability"),
        ):
            said = self.run(f"allocate {words}", REFUSED)
            self.note((reason in said, f"it names the reason {reason}"))
        self.judge(lambda seen: [judge.expect_unchanged(seen, self.reclaimed)])

    def act_return(self) -> None:
        """The loan goes home."""
        self.stage.act("The database gives the second NIC back", "batch gets its NIC again.")
        self.run(f"release {self.grants[-1]}")
        self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "batch", VFS, 1),
                judge.expect_nics(seen, "batch", 1),
                *judge.expect_holds(seen, "database", POOL, 2),
                judge.expect_nics(seen, "database", 1),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_story(self) -> None:
        """From the audit log alone."""
        self.stage.act("The story of the grant, from the audit log")
        said = self.run(f"explain {self.grants[-1]}")
        told = all(name in said for name in ("database", "batch", "net.vf"))
        self.note((told, "the story names borrower, victim and what it was about"))
        self.run("audit --verify")

    def act_home(self) -> None:
        """Everything goes back."""
        self.stage.act(
            "Everything is given back",
            "The database's grant ends and batch stops: every function goes back to the driver "
            "that it had.",
        )
        self.run(f"release {self.grants[0]}")
        self.stage.command("virsh destroy batch", self.lab.run("virsh destroy batch"))
        self.judge(
            lambda seen: [
                judge.expect_free(seen, POOL, self._drivers),
                *judge.expect_holds(seen, "database", POOL, 0),
            ]
        )
        alerts = self.lab.cli_json("status")["alerts"]
        self.note((not alerts, f"the agent has no alert{': ' if alerts else ''}{alerts or ''}"))

    def put_back(self) -> None:
        """The host as found; no check of an act waits for it."""
        self.lab.stop_agent()
        self.lab.end_guests()
        self.lab.clean()
        for pf in (PF, NVME):
            self.lab.run(f"echo 0 > /sys/bus/pci/devices/{pf}/sriov_numvfs")
        for pf in (PF, UPLINK):
            self.lab.run(f"ip link set $(ls /sys/bus/pci/devices/{pf}/net) down")

    def act_as_found(self) -> None:
        """Without VFs, as the lab came up."""
        self.stage.act(
            "The host as found", "Guests, agent and its files are gone; the VFs are unmade."
        )
        self.put_back()
        self.note(judge.expect_host_as_found(self.look(), self.first))

    @property
    def acts(self) -> tuple[Callable[[], None], ...]:
        """In their order."""
        return (
            self.set_up, self.act_pools, self.act_attach, self.act_reclaim, self.act_refuse,
            self.act_return, self.act_story, self.act_home, self.act_as_found,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the demo; 0 only if every check passed."""
    return play(Demo, argv, topology="passthrough", about=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
