"""`make demo-card`: two offload cards and running guests, in the nested lab `card`.

Brings the lab up, plays its acts there with the product's own commands, has each judged by
`cardchecker` from kernel, libvirt and guests, and takes the lab down. Exit code 0 only if every
check passed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import cardchecker as judge
from demo.cardchecker import Sight
from demo.cardguest import build_archive
from demo.labhost import LabError, LabGuest, LabHost
from demo.labplay import REFUSED, LabPlay, play

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from demo.checker import Finding

CARDS = ("card0", "card1")
IMAGE = "/opt/virtfabric/lab/cards/crypto.aes.img"
INITRD = "/root/card-initrd"
BATCH = LabGuest(name="batch", priority=10, devices=(("crypto.aes", 3),))
DATABASE = LabGuest(name="database", priority=90)


class CardHost(LabHost):
    """A lab whose guests have a program that computes through cards."""

    def __init__(self, name: str, topology: str) -> None:
        super().__init__(name, topology)
        self.words: dict[str, str] = {}
        """What a guest's kernel command line has besides, by guest."""

    def bring_program(self) -> None:
        """Puts the guests' program into the lab."""
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "vfaes.gz"
            archive.write_bytes(build_archive())
            done = self.lab("copy", self.name, str(archive), ":/root/vfaes.gz")
        if done.returncode:
            raise LabError(f"virtfabric lab copy: {done.stderr}")
        self.do(f"cat /opt/virtfabric/cache/guest/*/initrd /root/vfaes.gz > {INITRD}")

    def format_guest(self, guest: LabGuest) -> str:
        """The lab's guest with that program."""
        xml = super().format_guest(guest)
        _, start, rest = xml.partition("<initrd>")
        old, end, _ = rest.partition("</initrd>")
        words = self.words.get(guest.name, "")
        return xml.replace(f"{start}{old}{end}", f"{start}{INITRD}{end}").replace(
            "</cmdline>", f" {words}</cmdline>"
        )

    def look_at_cards(self) -> Sight:
        """What kernel, libvirt and guests show of cards now."""
        asked = {"guests": [guest.name for guest in self.guests]}
        return Sight.from_json(self.see("cardsight", asked))

    def slices_of(self, guest: LabGuest) -> list[dict[str, Any]]:
        """As the agent lists them."""
        every = self.cli_json("slices")
        return [one for one in every if one["holder_name"] == guest.name]

    def switch(self, card: str, power: str) -> str:
        """A card's power.

        Raises:
            LabError: it could not be done.
        """
        done = self.lab("card", self.name, card, power)
        if done.returncode:
            raise LabError(f"virtfabric lab card {card} {power}: {done.stdout}{done.stderr}")
        return done.stdout.strip()


class Demo(LabPlay):
    """The acts."""

    host = CardHost
    lab: CardHost

    # -- tools ------------------------------------------------------------------------------------

    def judge(self, expect: Callable[[Sight], list[Finding]], *, longer: float = 1) -> Sight:
        """Looks until all is right or patience ends, and shows the functions."""
        deadline = time.monotonic() + self.patience_s * longer
        seen = self.lab.look_at_cards()
        while not all(ok for ok, _ in expect(seen)) and time.monotonic() < deadline:
            seen = self.lab.look_at_cards()
        self.stage.table(
            ("function", "card", "slice", "driver", "IOMMU group", "open in"),
            [
                (a, f.card, f.slice, f.driver or "-", f.group, ", ".join(seen.holders(a)) or "-")
                for a, f in seen.functions.items()
            ],
        )
        self.note(*expect(seen))
        return seen

    def program(self, guest: LabGuest) -> None:
        """Programs what a guest has that is blank."""
        for one in self.lab.slices_of(guest):
            if one["phase"] == "blank":
                self.run(f"card program {one['card']}/{one['id']} {IMAGE}")

    def wait_link(self, card: str, link: str) -> None:
        """Until the agent says so of its link to a card."""
        deadline = time.monotonic() + 300
        while True:
            cards = {one["serial"]: one for one in self.lab.cli_json("cards")}
            if cards[card]["condition"] == link:
                return
            if time.monotonic() > deadline:
                raise LabError(f"{card} is {cards[card]['condition']} ({cards[card]['why']})")

    # -- acts -------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Agent, two guests."""
        self.stage.act(
            "A host with two offload cards, and two guests",
            "The lab is a whole emulated host. Each card is a process of its own beside it, with "
            "PCIe functions in it (vfio-user), firmware, and a certificate.",
            "The agent reaches each card by the mailbox of its management function, TLS inside.",
        )
        self.lab.bring_program()
        self.stage.command("cat /etc/virtfabric/cards.toml")
        self.stage.output(self.lab.do("cat /etc/virtfabric/cards.toml"))
        self.lab.install("")
        self.stage.command("virtfabricd &")
        self.lab.start_agent()
        for guest in (DATABASE, BATCH):
            done = self.lab.start_guest(guest)
            self.stage.command(f"virsh start {guest.name}", done)
            if done.returncode:
                raise LabError(f"virsh start {guest.name}: {done.stderr}")
        for guest in (DATABASE, BATCH):
            self.lab.wait_ready(guest)
        for card in CARDS:
            self.wait_link(card, "connected")
        said = self.run("cards")
        self.note(*((card in said, f"the agent has {card}") for card in CARDS))
        self.start = self.judge(lambda seen: [judge.expect_none(seen)])

    def act_one(self) -> None:
        """A slice, its function, an image, and the guest computes."""
        self.stage.act(
            "The database asks for AES while it runs",
            "No function is there: a card makes a slice, which comes to the host as a function of "
            "its own, and goes to the guest. It is blank until a signed image is programmed.",
        )
        self.run("allocate database --device crypto.aes --dry-run")
        self.allocate("database --device crypto.aes")
        seen = self.judge(
            lambda seen: [
                judge.expect_inside(seen, "database", 1),
                judge.expect_encrypts(seen, "database", 0),
                judge.expect_same_processes(seen, self.start),
            ]
        )
        self.first = [one.card for one in seen.functions.values()]
        self.note(*judge.expect_holds(seen, "database", self.first))
        self.program(DATABASE)
        self.judge(lambda seen: [judge.expect_encrypts(seen, "database", 1)])

    def act_combined(self) -> None:
        """More than one card has."""
        self.stage.act(
            "batch asks for three: no card has them alone",
            "One is on the card that the database uses, two are on the other: all or none.",
        )
        self.allocate("batch --device crypto.aes:3")
        other = next(card for card in CARDS if card not in self.first)
        self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "batch", [*self.first, other, other]),
                judge.expect_inside(seen, "batch", 3),
                judge.expect_same_processes(seen, self.start),
            ]
        )
        self.program(BATCH)
        self.judge(
            lambda seen: [
                judge.expect_encrypts(seen, "batch", 3),
                judge.expect_encrypts(seen, "database", 1),
            ]
        )
        self.run("cards")

    def act_preempt(self) -> None:
        """batch pays."""
        self.stage.act(
            "The database asks for one more: batch pays",
            "Its policy says that its functions are reclaimable: one is detached and reset, the "
            "card is told who has the slice now, and it goes to the database.",
        )
        self.run("allocate database --device crypto.aes --dry-run")
        self.allocate("database --device crypto.aes")
        self.preempted = self.judge(
            lambda seen: [
                judge.expect_inside(seen, "database", 2),
                judge.expect_encrypts(seen, "database", 2),
                judge.expect_inside(seen, "batch", 2),
                judge.expect_encrypts(seen, "batch", 2),
                judge.expect_same_processes(seen, self.start),
            ]
        )
        self.run("loans")
        self.run(f"explain {self.grants[-1]}")

    def act_refuse(self) -> None:
        """What cannot be had changes nothing."""
        self.stage.act(
            "batch asks for it back",
            "All accelerators are taken, and only a higher priority has what it wants.",
        )
        said = self.run("allocate batch --device crypto.aes", REFUSED)
        self.note(("no-capacity" in said, "it names the reason no-capacity"))
        self.judge(lambda seen: [judge.expect_unchanged(seen, self.preempted)])

    def act_return(self) -> None:
        """The loan goes home."""
        self.stage.act("The database gives it back", "batch has three again.")
        self.run(f"release {self.grants.pop()}")
        self.judge(
            lambda seen: [
                judge.expect_inside(seen, "batch", 3),
                judge.expect_encrypts(seen, "batch", 3),
                judge.expect_encrypts(seen, "database", 1),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_death(self) -> None:
        """A card dies."""
        other = next(card for card in CARDS if card not in self.first)
        self.stage.act(
            f"{other} dies",
            "Its process is killed. Guests run on, and the other card computes as before.",
        )
        self.stage.command(f"virtfabric lab card {self.lab.name} {other} off")
        self.stage.output(self.lab.switch(other, "off"))
        self.wait_link(other, "lost")
        self.run("cards")
        before = self.lab.look_at_cards()
        self.judge(
            lambda seen: [
                judge.expect_goes_on(seen, before, "database"),
                judge.expect_same_processes(seen, self.start),
            ]
        )

    def act_replace(self) -> None:
        """Another card comes in its place."""
        other = next(card for card in CARDS if card not in self.first)
        self.stage.act(
            f"{other} is replaced",
            "Another one is put into its ports: the same serial number, an empty memory. That is "
            "not what the agent knows of it, so it believes nothing of it until an operator says "
            "that it is right.",
        )
        self.stage.command(f"virtfabric lab card {self.lab.name} {other} replace")
        self.stage.output(self.lab.switch(other, "replace"))
        self.wait_link(other, "distrusted")
        self.run("cards")
        self.run(f"card trust {other}")
        self.wait_link(other, "connected")
        self.judge(
            lambda seen: [
                *judge.expect_holds(seen, "batch", self.first),
                judge.expect_inside(seen, "batch", 1),
                judge.expect_same_processes(seen, self.start),
            ],
            longer=6,
        )
        self.run("slices")
        self.run("audit --verify")

    def act_home(self) -> None:
        """Everything goes back."""
        self.stage.act("Everything is given back", "Slices end, and their functions go.")
        for grant in [one["id"] for one in self.lab.cli_json("grants")]:
            self.run(f"release {grant}")
        self.judge(
            lambda seen: [
                judge.expect_none(seen),
                judge.expect_inside(seen, "database", 0),
                judge.expect_inside(seen, "batch", 0),
                judge.expect_same_processes(seen, self.start),
            ],
            longer=3,
        )

    @property
    def acts(self) -> tuple[Callable[[], None], ...]:
        """In their order."""
        return (
            self.set_up, self.act_one, self.act_combined, self.act_preempt, self.act_refuse,
            self.act_return, self.act_death, self.act_replace, self.act_home,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the demo; 0 only if every check passed."""
    return play(Demo, argv, topology="card", about=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
