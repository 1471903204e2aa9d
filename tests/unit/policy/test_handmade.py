"""Functions that a guest's XML names: what is done for them, and every reason to refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.model.amounts import Amounts
from virtfabric.model.device import (
    DeviceInventory,
    DevicePool,
    Found,
    GuestDevice,
    HeldFunction,
    HostUse,
    Match,
    PciAddress,
    PciFunction,
    Quarantine,
    UseKind,
    alias_of,
)
from virtfabric.model.devicesteps import BindDriver, ResetFunction
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import GuestState, RunState
from virtfabric.model.host import Capacity
from virtfabric.model.ids import GuestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.units import Bytes
from virtfabric.policy.handmade import (
    BY_HAND,
    Binding,
    names_functions,
    plan_binding,
    plan_unbinding,
    with_named,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.model.step import Step

DB = GuestId("00000000-0000-4000-8000-000000000001")
WEB = GuestId("00000000-0000-4000-8000-000000000002")
NIC, AUDIO, PORT, NVME = (
    PciAddress(a) for a in ("0000:3b:00.0", "0000:3b:00.1", "0000:3a:00.0", "0000:5e:00.0")
)
MOUNTED = (HostUse(UseKind.MOUNTED, "nvme0n1p1 on /"),)


def functions(**changes: object) -> dict[PciAddress, PciFunction]:
    """A NIC and its sibling with the port above in one group, and a disk in another."""
    found = (
        PciFunction(PORT, driver="pcieport", group=7, bridge=True),
        PciFunction(NIC, driver="ixgbe", group=7, parent=PORT),
        PciFunction(AUDIO, driver="snd", group=7, parent=PORT),
        PciFunction(NVME, driver="nvme", group=8),
    )
    by_address = {f.address: f for f in found}
    return by_address | {NIC: replace(by_address[NIC], **changes)}


def guest(*devices: GuestDevice, uuid: GuestId = DB, name: str = "db") -> GuestState:
    return GuestState(uuid, name, RunState.SHUTOFF, devices=devices)


def by_hand(*addresses: PciAddress, managed: bool = False) -> tuple[GuestDevice, ...]:
    return tuple(GuestDevice(a, managed=managed) for a in addresses)


def snapshot(
    there: dict[PciAddress, PciFunction] | None = None,
    *,
    held: Iterable[HeldFunction] = (),
    others: Iterable[HeldFunction] = (),
    quarantine: Iterable[Quarantine] = (),
    guests: Iterable[GuestState] = (),
) -> HostSnapshot:
    topology = make_topology(cores=1)
    books = Books(
        holdings={
            DB: Holding(DB, Amounts(), named=tuple(held)),
            WEB: Holding(WEB, Amounts(), functions=tuple(others)),
        },
        quarantine={q.address: q for q in quarantine},
    )
    capacity = Capacity(topology.cpus, topology.cpus, {0: Bytes(0)}, Bytes(0), Bytes(0))
    known = {WEB: guest(uuid=WEB, name="web")} | {g.uuid: g for g in guests}
    return HostSnapshot(
        1, topology, capacity, known, books, devices=DeviceInventory(there or functions())
    )


def planned(answer: Binding | Refusal) -> Binding:
    assert isinstance(answer, Binding), answer
    return answer


def moves(steps: Iterable[Step]) -> list[tuple[PciAddress, str, str]]:
    return [(s.address, s.before, s.after) for s in steps if isinstance(s, BindDriver)]


def resets(steps: Iterable[Step]) -> list[PciAddress]:
    """Those come before anything else."""
    steps = list(steps)
    found = [s.address for s in steps if isinstance(s, ResetFunction)]
    assert all(isinstance(s, ResetFunction) and s.optional for s in steps[: len(found)])
    return found


def refused(answer: Binding | Refusal) -> tuple[Reason, str]:
    assert isinstance(answer, Refusal), answer
    return answer.reason, answer.detail


def test_a_function_and_its_group_go_to_vfio_and_the_way_back_is_kept() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    assert moves(plan.steps) == [(AUDIO, "snd", "vfio-pci"), (NIC, "ixgbe", "vfio-pci")]
    found = Found("ixgbe", siblings=((AUDIO, "snd"),))
    assert plan.named == (HeldFunction(BY_HAND, NIC, found),)


def test_both_functions_of_a_group_are_bound_once() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC, AUDIO))))
    assert moves(plan.steps) == [(NIC, "ixgbe", "vfio-pci"), (AUDIO, "snd", "vfio-pci")]


def test_what_libvirt_binds_itself_is_counted_only() -> None:
    used = functions(uses=MOUNTED)
    plan = planned(plan_binding(snapshot(used), guest(*by_hand(NIC, managed=True))))
    assert moves(plan.steps) == []
    assert plan.named == (HeldFunction(BY_HAND, NIC),)


def test_what_is_with_vfio_already_stays_there_afterwards() -> None:
    there = functions(driver="vfio-pci")
    there[AUDIO] = replace(there[AUDIO], driver=None)
    plan = planned(plan_binding(snapshot(there), guest(*by_hand(NIC))))
    assert moves(plan.steps) == []
    held = plan.named
    assert plan_unbinding(snapshot(there, held=held), DB, "db") == ()


VENDORS = DevicePool("net.vf", Match(addresses=frozenset({NIC})), vfio_driver="vendor")


def vendors(**changes: object) -> HostSnapshot:
    """The NIC is in a pool of a vendor's vfio driver."""
    found = snapshot(functions(**changes))
    return replace(found, devices=replace(found.devices, pools=(VENDORS,)))


def test_a_function_goes_to_the_vfio_driver_of_its_pool_and_its_group_to_vfio_pci() -> None:
    plan = planned(plan_binding(vendors(), guest(*by_hand(NIC))))
    assert moves(plan.steps) == [(AUDIO, "snd", "vfio-pci"), (NIC, "ixgbe", "vendor")]
    found = Found("ixgbe", siblings=((AUDIO, "snd"),), vfio_driver="vendor")
    assert plan.named == (HeldFunction(BY_HAND, NIC, found),)
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    there[NIC] = replace(there[NIC], driver="vendor")
    # also where the pool is gone meanwhile
    back = plan_unbinding(snapshot(there, held=plan.named), DB, "db")
    assert resets(back) == [NIC]
    assert moves(back) == [(NIC, "vendor", "ixgbe"), (AUDIO, "vfio-pci", "snd")]


@pytest.mark.parametrize("driver", ["vendor", "vfio-pci"])
def test_what_vfio_can_open_already_stays_with_its_driver(driver: str) -> None:
    plan = planned(plan_binding(vendors(driver=driver), guest(*by_hand(NIC))))
    assert moves(plan.steps) == [(AUDIO, "snd", "vfio-pci")]
    [held] = plan.named
    assert held.found.driver == driver
    found = vendors(driver=driver)
    own = replace(found.books.holdings[DB], named=plan.named)
    found = replace(found, books=replace(found.books, holdings={DB: own}))
    back = plan_unbinding(found, DB, "db")
    assert (resets(back), moves(back)) == ([NIC], [])


def test_our_own_devices_are_not_made_by_hand() -> None:
    ours = GuestDevice(NIC, alias=alias_of(NIC))
    assert not names_functions(guest(ours))
    assert moves(planned(plan_binding(snapshot(), guest(ours))).steps) == []


def test_all_of_it_goes_back_to_what_it_was() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    back = plan_unbinding(snapshot(there, held=plan.named), DB, "db")
    assert resets(back) == [NIC]
    assert moves(back) == [(NIC, "vfio-pci", "ixgbe"), (AUDIO, "vfio-pci", "snd")]


def test_all_are_reset_before_any_goes_back() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC, NVME))))
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    back = plan_unbinding(snapshot(there, held=plan.named), DB, "db")
    assert resets(back) == [NVME, NIC]
    assert [move[0] for move in moves(back)] == [NVME, NIC, AUDIO]


def test_what_is_with_the_host_again_is_not_reset() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    assert plan_unbinding(snapshot(held=plan.named), DB, "db") == ()


def test_a_granted_function_of_its_group_goes_back_with_the_departure() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    found = snapshot(there, held=plan.named)
    own = replace(found.books.holdings[DB], functions=(HeldFunction("audio", AUDIO),))
    found = replace(found, books=replace(found.books, holdings={DB: own}))
    assert moves(plan_unbinding(found, DB, "db")) == [(NIC, "vfio-pci", "ixgbe")]


def test_the_books_keep_named_functions_apart_from_granted_ones() -> None:
    granted = HeldFunction("storage.nvme", NVME)
    books = Books(holdings={DB: Holding(DB, Amounts(), functions=(granted,))})
    named = (HeldFunction(BY_HAND, NIC, Found("ixgbe", siblings=((AUDIO, "snd"),))),)
    holding = with_named(books, DB, named).holdings[DB]
    assert (holding.functions, holding.named) == ((granted,), named)
    assert Holding.from_json(holding.to_json()) == holding
    assert with_named(books, WEB, named) == books


def test_a_function_that_vanished_does_not_keep_the_others_from_going_back() -> None:
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    del there[NIC]
    back = plan_unbinding(snapshot(there, held=plan.named), DB, "db")
    assert resets(back) == []
    assert moves(back) == [(AUDIO, "vfio-pci", "snd")]


def test_asking_twice_keeps_the_way_back() -> None:
    """A `prepare` that was told "retry" comes again when all is bound already."""
    plan = planned(plan_binding(snapshot(), guest(*by_hand(NIC))))
    there = {a: replace(f, driver="vfio-pci") for a, f in functions().items()}
    again = planned(plan_binding(snapshot(there, held=plan.named), guest(*by_hand(NIC))))
    assert moves(again.steps) == []
    assert again.named == plan.named


@pytest.mark.parametrize("managed", [False, True])
def test_what_another_guest_has_is_refused_whoever_binds(*, managed: bool) -> None:
    mine = guest(*by_hand(NIC, managed=managed))
    held = snapshot(others=[HeldFunction("net.vf", NIC)])
    named = snapshot()
    named = replace(named, books=with_named(named.books, WEB, (HeldFunction(BY_HAND, NIC),)))
    assert refused(plan_binding(named, mine)) == refused(plan_binding(held, mine))
    assert refused(plan_binding(held, mine)) == (
        Reason.DEVICE_IN_USE, f"guest web has {NIC}",
    )  # fmt: skip
    running = replace(guest(*by_hand(NIC), uuid=WEB, name="web"), state=RunState.RUNNING)
    assert refused(plan_binding(snapshot(guests=[running]), mine)) == (
        Reason.DEVICE_IN_USE, f"guest web has {NIC}",
    )  # fmt: skip


def test_what_a_guest_names_that_does_not_run_is_free() -> None:
    idle = guest(*by_hand(NIC), uuid=WEB, name="web")
    assert planned(plan_binding(snapshot(guests=[idle]), guest(*by_hand(NIC)))).steps


@pytest.mark.parametrize("managed", [False, True])
def test_quarantine_holds_for_everybody(*, managed: bool) -> None:
    entry = Quarantine(NIC, "its reset failed", "power-cycle the host", 0.0)
    answer = plan_binding(snapshot(quarantine=[entry]), guest(*by_hand(NIC, managed=managed)))
    reason, detail = refused(answer)
    assert reason is Reason.DEVICE_IN_USE
    assert "its reset failed (power-cycle the host)" in detail


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"uses": MOUNTED}, Reason.DEVICE_IN_USE, "the host uses 0000:3b:00.0: mounted: nvme0n1p1"),
        ({"bridge": True}, Reason.DEVICE_IN_USE, "bridge or port"),
        ({"vfs": (AUDIO,)}, Reason.DEVICE_IN_USE, "has 1 VFs"),
        ({"group": None}, Reason.GROUP_NOT_VIABLE, "is the IOMMU switched on?"),
    ],
)
def test_what_the_host_has_against_it(
    changes: dict[str, object], reason: Reason, words: str
) -> None:
    answer = refused(plan_binding(snapshot(functions(**changes)), guest(*by_hand(NIC))))
    assert answer[0] is reason
    assert words in answer[1]


def test_a_group_is_viable_only_without_the_host_and_other_guests() -> None:
    used = functions()
    used[AUDIO] = replace(used[AUDIO], uses=MOUNTED)
    held = snapshot(others=[HeldFunction("audio", AUDIO)])
    for state, words in ((snapshot(used), "which the host uses"), (held, "which guest web has")):
        reason, detail = refused(plan_binding(state, guest(*by_hand(NIC))))
        assert reason is Reason.GROUP_NOT_VIABLE
        assert f"group 7 with {AUDIO}, {words}" in detail


def test_a_function_that_is_not_there() -> None:
    nowhere = PciAddress("0000:ff:00.0")
    assert refused(plan_binding(snapshot(), guest(*by_hand(nowhere)))) == (
        Reason.UNKNOWN_ID, "this host has no PCI function 0000:ff:00.0",
    )  # fmt: skip


def test_one_that_cannot_be_had_leaves_the_others_alone() -> None:
    used = functions()
    used[NVME] = replace(used[NVME], uses=MOUNTED)
    answer = plan_binding(snapshot(used), guest(*by_hand(NIC, NVME)))
    assert refused(answer)[0] is Reason.DEVICE_IN_USE
