"""Functions named by hand, through jobs: what `prepare` is told, and what stays when it fails."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.adapters.simulated.records import MemoryJournal
from virtfabric.daemon.handmade import Handmade
from virtfabric.daemon.jobs import Jobs
from virtfabric.daemon.ledger import Ledger
from virtfabric.daemon.notices import Notices
from virtfabric.daemon.undertaking import Outcome
from virtfabric.model.amounts import Amounts
from virtfabric.model.device import (
    DeviceInventory,
    Found,
    GuestDevice,
    HeldFunction,
    HostUse,
    PciAddress,
    PciFunction,
    UseKind,
)
from virtfabric.model.devicesteps import BindDriver
from virtfabric.model.errors import Refusal, RefusedError, VirtfabricError
from virtfabric.model.guest import GuestState, RunState
from virtfabric.model.host import Capacity
from virtfabric.model.ids import GuestId, TransactionId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.units import Bytes
from virtfabric.policy.handmade import BY_HAND

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.undertaking import Undertaking

DB = GuestId("00000000-0000-4000-8000-000000000001")
NIC = PciAddress("0000:3b:00.0")
NAMED = GuestState(DB, "db", RunState.SHUTOFF, devices=(GuestDevice(NIC),))


class Host:
    """A host with one function; conducts as the conductor does, on a table of drivers."""

    def __init__(self) -> None:
        self.drivers = {NIC: "ixgbe"}
        self.uses: tuple[HostUse, ...] = ()
        self.fails = ""
        self.gate = threading.Event()
        self.gate.set()
        self.ledger = Ledger(Books(holdings={DB: Holding(DB, Amounts())}))
        self.journal = MemoryJournal()
        self.jobs = Jobs(Notices(SystemClock()))
        self.handmade = Handmade(
            conduct=self.conduct, jobs=self.jobs, ledger=self.ledger, journal=self.journal,
            clock=SystemClock(),
        )  # fmt: skip

    @property
    def held(self) -> tuple[HeldFunction, ...]:
        return self.ledger.view().books.holdings[DB].named

    def conduct(self, work: Undertaking, _: Progress) -> Outcome:
        assert self.gate.wait(10)
        topology = make_topology(cores=1)
        capacity = Capacity(topology.cpus, topology.cpus, {0: Bytes(0)}, Bytes(0), Bytes(0))
        found = PciFunction(NIC, driver=self.drivers[NIC], group=1, uses=self.uses)
        snapshot = HostSnapshot(
            1, topology, capacity, {}, self.ledger.view().books,
            devices=DeviceInventory({NIC: found}),
        )  # fmt: skip
        plan = work.place(snapshot, None)
        if isinstance(plan, Refusal):
            raise RefusedError(plan)
        if self.fails:
            raise VirtfabricError(self.fails)
        for step in plan.steps:
            if isinstance(step, BindDriver):
                self.drivers[step.address] = step.after
        assert work.settle_books is not None
        self.ledger.commit(None, work.settle_books, self.journal.store_books)
        return Outcome(TransactionId("txn-1"), None, None, (), (), (), 0.0, 0.0)


@pytest.fixture
def host() -> Iterator[Host]:
    found = Host()
    yield found
    found.gate.set()
    found.jobs.close()


def test_bound_for_the_start_and_given_back_at_the_end(host: Host) -> None:
    assert host.handmade.bind(NAMED, 5.0) == ""
    assert host.drivers == {NIC: "vfio-pci"}
    assert host.held == (HeldFunction(BY_HAND, NIC, Found("ixgbe")),)
    host.handmade.release(DB, "db")
    assert host.drivers == {NIC: "ixgbe"}
    assert host.held == ()


def test_a_refusal_reaches_virsh_with_reason_and_detail(host: Host) -> None:
    host.uses = (HostUse(UseKind.NETWORK, "eth0 is up"),)
    line = host.handmade.bind(NAMED, 5.0)
    assert line == (
        "virtfabric: db cannot start: device-in-use: the host uses 0000:3b:00.0: "
        "network: eth0 is up"
    )
    assert host.drivers == {NIC: "ixgbe"}


def test_a_guest_that_names_nothing_costs_no_job(host: Host) -> None:
    assert host.handmade.bind(GuestState(DB, "db", RunState.SHUTOFF), 5.0) == ""
    host.handmade.release(DB, "db")
    assert host.jobs.all() == []


def test_a_slow_binding_is_to_be_asked_for_again(host: Host) -> None:
    host.gate.clear()
    assert host.handmade.bind(NAMED, 0.01).endswith("are still being bound, retry")
    host.gate.set()
    assert host.handmade.bind(NAMED, 5.0) == ""
    assert host.held == (HeldFunction(BY_HAND, NIC, Found("ixgbe")),)


def test_what_cannot_go_back_is_nobodys(host: Host) -> None:
    assert host.handmade.bind(NAMED, 5.0) == ""
    host.fails = "driver ixgbe did not take 0000:3b:00.0"
    host.handmade.release(DB, "db")
    entry = host.ledger.view().books.quarantine[NIC]
    assert entry.why == f"it did not go back to the host after db ended: {host.fails}"
    assert "virtfabric devices release 0000:3b:00.0" in entry.remedy
    assert host.journal.load_books().quarantine == {NIC: entry}


def test_an_agent_that_stops_says_so(host: Host) -> None:
    host.jobs.close()
    assert host.handmade.bind(NAMED, 5.0) == "virtfabric: the agent is shutting down"
