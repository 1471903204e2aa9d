"""A host with PCIe functions on which plans are carried out, step by step, and undone.

The simulated host objects where a real one would: a function that is attached keeps its driver,
nobody is attached to a group that a host driver is in, every step finds what it expects.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from host_data import BOOT_MEMORY, guest_id, load_host, make_guest, snapshot_of

from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Decision
from virtfabric.model.device import (
    DeviceInventory,
    DevicePool,
    GuestDevice,
    HostUse,
    Match,
    PciAddress,
    PciFunction,
    UseKind,
    VfSettings,
    alias_of,
)
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import GuestState, RunState
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot
from virtfabric.model.plan import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Plan,
    Presence,
    ResetFunction,
    SetNodeset,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.profile import Profile, ProfileFile
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.loans import depart, settle
from virtfabric.policy.placement import plan_decision
from virtfabric.policy.pools import members, pool_of, vfio_driver_of

if TYPE_CHECKING:
    from virtfabric.model.host import HostTopology
    from virtfabric.model.step import Step

NET, NVME = "net.vf", "storage.nvme"
IN_USE = (HostUse(UseKind.NETWORK, "eth0 is up"),)
OLD = VfSettings(mac="52:54:00:00:00:09", vlan=0, trust=False)
WANTED = VfSettings(vlan=7, trust=True)
PROFILE = Profile(ProfileFile("vendor/type"), "1155", "0")


def at(number: int) -> PciAddress:
    return PciAddress(f"0000:01:{number:02x}.0")


def nic(number: int, group: int | None = None, **fields: Any) -> PciFunction:
    """A VF of a PF that is not in any group of theirs."""
    defaults: dict[str, Any] = {
        "class_code": 0x020000, "driver": "igbvf", "node": 0, "parent": at(30), "pf": at(31),
        "group": number if group is None else group, "settings": OLD,
    }  # fmt: skip
    return PciFunction(at(number), **defaults | fields)


def disk(number: int, group: int | None = None, **fields: Any) -> PciFunction:
    defaults: dict[str, Any] = {
        "class_code": 0x010802, "driver": "nvme", "node": 1, "parent": at(29),
        "group": number if group is None else group,
    }  # fmt: skip
    return PciFunction(at(number), **defaults | fields)


def inventory_of(*functions: PciFunction, **pool: Any) -> DeviceInventory:
    """With two ports and a PF, the pools net.vf (`pool` for its fields) and storage.nvme."""
    ports = (
        PciFunction(at(29), bridge=True, class_code=0x060400, group=129, driver="pcieport"),
        PciFunction(at(30), bridge=True, class_code=0x060400, group=130, driver="pcieport"),
    )
    pf = PciFunction(at(31), class_code=0x020000, driver="igb", group=131, uses=IN_USE)
    pools = (
        DevicePool(NET, Match(class_prefix="0200", vfs=True), **{"settings": WANTED} | pool),
        DevicePool(NVME, Match(class_prefix="0108"), link_speed=8000),
    )
    return DeviceInventory({f.address: f for f in (*ports, pf, *functions)}, pools)


def device_guest(number: int, *wishes: DevicePolicy, priority: int = 50, **fields: Any) -> Any:
    guest = make_guest(number, **{"free_ports": 4, "priority": priority} | fields)
    return replace(guest, policy=replace(guest.policy, devices=wishes))


def ask_for(
    guest: GuestId, mode: Mode = Mode.BY, *, partial: bool = False, **wants: int
) -> Request:
    names = {"net": NET, "nvme": NVME}
    devices = {names.get(name, name): Want(mode, n) for name, n in wants.items()}
    return Request(RequestId("req-1"), guest, AGENT, Origin.DBUS, devices=devices, partial=partial)


@cache
def three_nodes() -> HostTopology:
    """Two sockets, and a node 2 of memory without CPUs (CXL)."""
    topology = load_host("two-sockets")
    far = replace(topology.nodes[1], number=2, cpus=CpuSet(), distances={0: 40, 1: 40, 2: 10})
    return replace(topology, nodes={**topology.nodes, 2: far})


@dataclass
class Host:
    """What a plan changes: drivers, settings of VFs, links, profiles, and who has what attached.

    Attributes:
        profiles: what their files say; of functions in a pool with a profile, one file each.
        settled: functions of which a step found the profile as it should be already.
        reconfigured: its pools are not those any more by which guests were given what they have.
    """

    inventory: DeviceInventory
    drivers: dict[PciAddress, str] = field(default_factory=dict)
    settings: dict[PciAddress, VfSettings] = field(default_factory=dict)
    links: dict[PciAddress, int] = field(default_factory=dict)
    profiles: dict[PciAddress, str] = field(default_factory=dict)
    settled: set[PciAddress] = field(default_factory=set)
    reconfigured: bool = False
    attached: dict[PciAddress, GuestId] = field(default_factory=dict)
    by_hand: dict[PciAddress, GuestId] = field(default_factory=dict)
    nodes: dict[GuestId, CpuSet] = field(default_factory=dict)

    @classmethod
    def of(cls, inventory: DeviceInventory) -> Host:
        found = inventory.functions.items()
        return cls(
            inventory,
            {a: f.driver or "" for a, f in found},
            {a: f.settings for a, f in found if f.settings is not None},
            profiles={a: pool.profile.none for a in inventory.functions
                      if (pool := pool_of(inventory, a)) is not None and pool.profile},
        )  # fmt: skip

    def state(self) -> tuple[Any, ...]:
        links = {port: speed for port, speed in self.links.items() if speed}
        return copy.deepcopy(
            (self.drivers, self.settings, links, self.profiles, self.attached, self.nodes)
        )

    def run(self, step: Step) -> None:
        match step:
            case BindDriver():
                assert step.address not in self.attached | self.by_hand
                mates = (one.address for one in self.inventory.group_of(step.address))
                open_to_vfio = ("vfio-pci", vfio_driver_of(self.inventory, step.address))
                assert step.after in open_to_vfio or not any(
                    mate in self.attached for mate in mates
                )
                assert self.drivers[step.address] == step.before != step.after
                self.drivers[step.address] = step.after
            case SetUpVf():
                assert step.address not in self.attached | self.by_hand
                now = self.settings[step.address]
                for name in ("mac", "vlan", "trust", "spoofchk", "rate"):
                    before, after = getattr(step.before, name), getattr(step.after, name)
                    assert before is None or getattr(now, name) == before
                    if after is not None:
                        now = replace(now, **{name: after})
                self.settings[step.address] = now
            case SetProfile():
                assert step.address not in self.attached | self.by_hand
                assert self.profiles[step.address] in (step.before, step.after)
                assert step.before != step.after
                if self.profiles[step.address] == step.after:
                    self.settled.add(step.address)
                self.profiles[step.address] = step.after
            case LimitLink():
                assert self.links.get(step.address, 0) == step.before != step.after
                self.links[step.address] = step.after
            case ResetFunction():
                assert step.address not in self.attached | self.by_hand
            case AttachFunction(after=Presence.ATTACHED):
                self._attach(step.address, step.guest)
            case AttachFunction():
                assert self.attached.pop(step.address) == step.guest
            case SetNodeset():
                pinned = {*self.attached.values(), *self.by_hand.values()}
                assert step.guest not in pinned, "its pages are pinned"
                assert self.nodes[step.guest] == step.before
                self.nodes[step.guest] = step.after

    def _attach(self, address: PciAddress, guest: GuestId) -> None:
        assert address not in self.attached | self.by_hand
        pool = pool_of(self.inventory, address)
        assert pool is not None
        if not self.reconfigured:
            assert self.drivers[address] == pool.vfio_driver
            assert pool.profile is None or self.profiles[address] == pool.profile.value
        for mate in self.inventory.group_of(address):
            harmless = ("vfio-pci", "", vfio_driver_of(self.inventory, mate.address))
            assert mate.bridge or self.drivers[mate.address] in harmless
            assert (self.attached | self.by_hand).get(mate.address, guest) == guest
            assert not mate.uses
        self.attached[address] = guest


@dataclass
class World:
    """Host, guests and books, from decision to decision."""

    host: Host
    guests: dict[GuestId, GuestState]
    books: Books
    now: int = 0
    gone: dict[PciAddress, PciFunction] = field(default_factory=dict)
    _hands: dict[PciAddress, str] = field(default_factory=dict)

    @classmethod
    def of(cls, inventory: DeviceInventory, *guests: GuestState) -> World:
        amounts = Amounts.of(cpu=500, memory=BOOT_MEMORY)
        held = {
            g.uuid: Holding(g.uuid, amounts)
            for g in guests if g.managed and g.active
        }  # fmt: skip
        host = Host.of(inventory)
        host.nodes = {g.uuid: g.numa_nodes for g in guests}
        return cls(host, {g.uuid: g for g in guests}, Books(7, held))

    @property
    def by_hand(self) -> dict[PciAddress, GuestId]:
        """Who has what beside this agent."""
        return self.host.by_hand

    def snapshot(self) -> HostSnapshot:
        functions = {
            a: replace(
                f,
                driver=self.host.drivers[a] or None,
                settings=self.host.settings.get(a),
                limit=self.host.links.get(a, 0) if f.bridge else None,
            )
            for a, f in self.host.inventory.functions.items()
        }
        found = [self._seen(guest) for guest in self.guests.values()]
        snapshot = snapshot_of(three_nodes(), found)
        inventory = replace(self.host.inventory, functions=functions)
        return replace(snapshot, books=self.books, devices=inventory)

    def _seen(self, guest: GuestState) -> GuestState:
        ours = [a for a, g in self.host.attached.items() if g == guest.uuid]
        hand = [a for a, g in self.by_hand.items() if g == guest.uuid]
        devices = (
            *(GuestDevice(a, alias_of(a)) for a in ours),
            *(GuestDevice(a, "hostdev0", managed=True) for a in hand),
        )
        nodes = self.host.nodes[guest.uuid]
        free = max(0, guest.free_ports - len(devices))
        return replace(guest, devices=devices, free_ports=free, numa_nodes=nodes)

    def carry_out(self, plan: Plan) -> None:
        """All steps; and, on a copy, back from the end through every prefix.

        But for a profile that was set already, or was not: nobody reads it before the step does,
        so its undo sets it the other way, which is what the next step of its holder expects.
        """
        self.host.settled.clear()
        trail = [copy.deepcopy(self.host)]
        for step in plan.steps:
            self.host.run(step)
            trail.append(copy.deepcopy(self.host))
        back = copy.deepcopy(self.host)
        for index in reversed(range(len(plan.steps))):
            back.run(plan.steps[index].inverse())
            for address in self.host.settled:
                trail[index].profiles[address] = back.profiles[address]
            assert back.state() == trail[index].state(), plan.steps[index]

    def commit(self, decision: Decision, ends: Grant | None = None) -> tuple[Plan, Grant]:
        snapshot = self.snapshot()
        plan = plan_decision(snapshot, decision)
        assert isinstance(plan, Plan), plan
        assert plan == plan_decision(snapshot, decision)
        self.carry_out(plan)
        self.now += 1
        gain = decision.delta.positive()
        grant = Grant(GrantId(f"g{self.now}"), decision.guest, gain, decision.request, self.now)
        self.books = settle(
            self.books, decision, grant=ends, new_grant=grant if gain else None,
            loan_ids=[LoanId(f"l{self.now}.{n}") for n in range(len(decision.takes))],
            at=self.now, orders=plan.orders, functions=plan.functions, retired=plan.retired,
        )  # fmt: skip
        return plan, grant

    def reconfigure(self, **net: Any) -> None:
        """The pool net.vf is another from now on."""
        inventory = self.host.inventory
        first, *rest = inventory.pools
        self.host.inventory = replace(inventory, pools=(replace(first, **net), *rest))
        self.host.reconfigured = True

    def stop(self, guest: GuestId) -> None:
        self.guests[guest] = replace(self.guests[guest], state=RunState.SHUTOFF, pid=None)
        for address in [a for a, g in self.host.attached.items() if g == guest]:
            del self.host.attached[address]
        for address in [a for a, g in self.by_hand.items() if g == guest]:
            del self.by_hand[address]
            self.host.drivers[address] = self._hands.pop(address, self.host.drivers[address])

    # -- what happens beside this agent -----------------------------------------------------

    @property
    def present(self) -> list[PciAddress]:
        """Functions of pools that are there."""
        pools = [p.capability for p in self.host.inventory.pools]
        return [one.address for name in pools for one in members(self.host.inventory, name)]

    def has_pool(self, capability: str) -> bool:
        """Whether it has, or had, any function."""
        of = self.host.inventory
        everything = replace(of, functions={**of.functions, **self.gone})
        return bool(members(everything, capability))

    def held_addresses(self) -> list[PciAddress]:
        """What anybody holds, with those of its group."""
        held = [a for g in self.guests for a in self.held(g)]
        return held + [m.address for a in held for m in self.host.inventory.group_of(a)]

    def open_to_hands(self) -> list[PciAddress]:
        """What libvirt and vfio would let an operator attach: books mean nothing to them."""
        theirs = self.host.attached | self.by_hand
        functions = self.host.inventory.functions
        return [
            one for one in self.present
            if one not in theirs and not functions[one].uses and not any(
                m.address in theirs or (self.host.drivers[m.address] not in ("vfio-pci", ""))
                for m in self.host.inventory.group_of(one) if not m.bridge
            )
        ]  # fmt: skip

    def attach_by_hand(self, address: PciAddress, guest: GuestId) -> None:
        """`<hostdev managed='yes'>`: libvirt binds it, and gives it back as it was."""
        self._hands[address] = self.host.drivers[address]
        self.host.drivers[address] = "vfio-pci"
        self.by_hand[address] = guest

    def vanish(self, address: PciAddress) -> None:
        """It is pulled from its slot."""
        functions = dict(self.host.inventory.functions)
        self.gone[address] = functions.pop(address)
        self.host.inventory = replace(self.host.inventory, functions=functions)
        for kept in (
            self.host.drivers, self.host.settings, self.host.attached, self.host.profiles,
        ):  # fmt: skip
            kept.pop(address, None)

    def reappear(self, address: PciAddress) -> None:
        """It is put back where its group is free, and the host's driver binds to it."""
        there = self.host.inventory.functions.values()
        if any(one.group == self.gone[address].group for one in there):
            return
        function = self.gone.pop(address)
        functions = {**self.host.inventory.functions, address: function}
        self.host.inventory = replace(self.host.inventory, functions=functions)
        self.host.drivers[address] = function.driver or ""
        if function.settings is not None:
            self.host.settings[address] = function.settings
        pool = pool_of(self.host.inventory, address)
        if pool is not None and pool.profile is not None:
            self.host.profiles[address] = pool.profile.none

    def departed(self, guest: GuestId) -> None:
        self.books = depart(self.books, guest, self.now)

    def held(self, guest: GuestId) -> list[PciAddress]:
        holding = self.books.holdings.get(guest)
        return [f.address for f in holding.functions] if holding else []


def decided(answer: Decision | Refusal) -> Decision:
    assert isinstance(answer, Decision), answer
    return answer


def refused(answer: Decision | Plan | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


A, B, C = (guest_id(n) for n in (1, 2, 3))
YIELDS = DevicePolicy(NET, 2, reclaimable=True)
KEEPS = DevicePolicy(NET, 2)
