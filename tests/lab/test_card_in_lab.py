"""Offload cards in the lab: from a request to a guest that computes, and what is refused to it.

Cards run beside the lab's QEMU, the agent reaches them by their mailboxes, and functions go to KVM
guests by vfio. Judged by the demo's judge, which asks kernel, libvirt and guests, and by what the
card itself counts.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from running_lab import bring_up, lab_command

from demo import cardchecker as judge
from demo.cards import CARDS, IMAGE, CardHost
from demo.labhost import LabGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from demo.cardchecker import Sight
    from demo.checker import Finding

DATABASE = LabGuest(name="database", priority=90)
ATTACKER = LabGuest(name="attacker", priority=50)
PATIENCE_S = 180
CARDED = '[cards]\narbiter = "card0"\nanswer_s = 30\n'
"""An emulated host takes its time to show itself to a card."""

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def host() -> Iterator[CardHost]:
    """The agent with both cards, and a guest; another one that attacks what it gets."""
    for lab in bring_up("card"):
        host = CardHost(lab.name, "card")
        host.words[ATTACKER.name] = "vfattack"
        host.bring_program()
        host.install("")
        host.start_agent()
        for guest in (DATABASE, ATTACKER):
            started = host.start_guest(guest)
            assert started.returncode == 0, started.stderr
        for guest in (DATABASE, ATTACKER):
            host.wait_ready(guest)
        yield host


@pytest.fixture
def both(host: CardHost) -> Iterator[CardHost]:
    """Each guest has a function of its own that is programmed."""
    for guest in (DATABASE, ATTACKER):
        host.do(f"virtfabric allocate {guest.name} --device crypto.aes --deadline 300")
        (one,) = host.slices_of(guest)
        host.do(f"virtfabric card program {one['card']}/{one['id']} {IMAGE}")
    yield host
    for grant in host.cli_json("grants"):
        host.do(f"virtfabric release {grant['id']}")


def until(host: CardHost, expect: Callable[[Sight], list[Finding]]) -> Sight:
    """As soon as the judge is content with what is to be seen."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        seen = host.look_at_cards()
        if not (wrong := [what for ok, what in expect(seen) if not ok]):
            return seen
        assert time.monotonic() < deadline, wrong


def test_a_guest_computes_through_its_slice_and_nothing_else_is_open_to_it(both: CardHost) -> None:
    seen = until(
        both,
        lambda seen: [
            judge.expect_encrypts(seen, "database", 1),
            judge.expect_encrypts(seen, "attacker", 1),
            *judge.expect_attacks_refused(seen, "attacker"),
        ],
    )
    (address,) = [a for a in seen.functions if seen.holders(a) == ("attacker",)]
    function = seen.functions[address]
    # its card counted it, and told the agent which slice it was
    faults = [
        one for one in both.cli_json("audit")
        if one["kind"] == "card.event" and one["body"]["what"] == "access-fault"
    ]  # fmt: skip
    assert {one["body"]["slice"] for one in faults} == {function.slice}
    figures = both.cli_json(f"card show {function.card}")["readings"][function.slice]
    assert figures["dma_refused"] >= 2
    assert figures["dma_read"] > 0
    assert figures["dma_written"] > 0
    # and the other guest's work was not disturbed
    until(both, lambda now: [judge.expect_goes_on(now, seen, "database")])


def test_both_go_back_when_they_are_released(host: CardHost) -> None:
    assert host.cli_json("grants") == []
    until(
        host,
        lambda seen: [
            judge.expect_none(seen),
            judge.expect_inside(seen, "database", 0),
            judge.expect_inside(seen, "attacker", 0),
        ],
    )


def test_a_card_that_loses_power_comes_back_as_it_was(host: CardHost) -> None:
    host.do("virtfabric slice create - << 'X'\n" + SLICE + "X")
    (before,) = host.cli_json("slices")
    for power, link in (("off", "lost"), ("on", "connected")):
        host.switch(before["card"], power)
        wait_link(host, before["card"], link)
    (after,) = host.cli_json("slices")
    assert after == before
    host.do("virtfabric slice destroy kept")


SLICE = 'version = 1\n[[slice]]\nname = "kept"\ncores = 2\nmemory = "8MiB"\n'


def wait_link(host: CardHost, card: str, link: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        links = {one["serial"]: one["condition"] for one in host.cli_json("cards")}
        if links[card] == link:
            return
        assert time.monotonic() < deadline, links


def test_a_card_decides_and_while_it_is_off_the_agent_does(host: CardHost) -> None:
    host.stop_agent()
    host.write("/etc/virtfabric/carded.toml", CARDED)
    host.start_agent()
    await_decider(host, deciding=True)
    before = plugged_mib(host)
    grown = host.cli_json("allocate database --memory +64M --deadline 300")["result"]
    assert grown["decided_by"] == "card card0"
    assert plugged_mib(host) == before + 64
    assert "decided by card card0" in host.do(f"virtfabric explain {grown['grant']}")

    host.switch("card0", "off")
    await_decider(host, deciding=False)
    more = host.cli_json("allocate database --memory +32M --deadline 300")["result"]
    assert more["decided_by"].startswith("the agent (card card0 is lost"), more
    assert plugged_mib(host) == before + 96

    host.switch("card0", "on")
    await_decider(host, deciding=True)
    for grant in (more["grant"], grown["grant"]):
        host.do(f"virtfabric release {grant}")
    assert plugged_mib(host) == before


def await_decider(host: CardHost, *, deciding: bool) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (told := host.cli_json("status")["arbiter"])["deciding"] != deciding:
        assert time.monotonic() < deadline, told


def plugged_mib(host: CardHost) -> int:
    """Of virtio-mem, by libvirt."""
    root = ET.fromstring(host.do("virsh -q dumpxml database"))
    (current,) = root.iterfind("devices/memory/target/current")
    assert current.get("unit") == "KiB"
    return int(current.text or "0") >> 10


def test_what_is_wrong_with_a_power_switch_is_told(host: CardHost) -> None:
    done = lab_command("card", host.name, "card7", "off")
    assert done.returncode == 2, done.stderr
    assert "there are card0, card1" in done.stderr
    done = lab_command("card", host.name, CARDS[0], "on", "--json")
    assert done.returncode == 1, json.dumps(done.stdout)
    assert f"card {CARDS[0]} runs already" in done.stderr
