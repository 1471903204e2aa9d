"""A simulated host with one of everything that a step changes."""

from copy import copy
from dataclasses import replace

from tests.contract.handler_contract import OF_THE_HOST, Context
from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.simulated.devices import NO_SETTINGS, small_devices
from virtfabric.adapters.simulated.guest import GuestSpec
from virtfabric.adapters.simulated.host import build_simulated_host
from virtfabric.adapters.simulated.machines import DATABASE, make_topology, small_guests
from virtfabric.domxml.policy import format_bare_policy
from virtfabric.model.cxl import CxlInventory, CxlPort, Memdev, PortKind, Serial, Window
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.device import (
    PciAddress,
    VfSettings,
)
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Presence,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.guest import MemoryRoom, NumaMode
from virtfabric.model.hugepages import MakeHugePages
from virtfabric.model.ids import HOST_ITSELF, GuestId
from virtfabric.model.mark import NO_MARK, PinMark
from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory
from virtfabric.model.plan import (
    Definition,
    MarkPins,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.model.policy import GuestPolicy
from virtfabric.model.profile import ProfileFile
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet

POLICY = format_bare_policy(GuestPolicy(priority=77))
BALLOON = GuestId("00000000-0000-4000-8000-000000000001")
TIERED = GuestId("00000000-0000-4000-8000-000000000002")
EMPTIED = GuestId("00000000-0000-4000-8000-000000000009")
GROW = ResizeVirtioMem(guest=DATABASE, alias="ua-vm0", before=512 * MIB, after=1 * GIB)
PLUG = SetVcpuCount(guest=DATABASE, before=2, after=3)
PIN = PinVcpu(guest=DATABASE, vcpu=0, before=CpuSet(), after=CpuSet([2]))


PORT, DISK, CRYPTO = (PciAddress(f"0000:{text}") for text in ("00:10.2", "02:00.0", "03:00.0"))
VF, BOUND_VF = PciAddress("0000:01:10.0"), PciAddress("0000:01:10.2")
BIND = BindDriver(guest=DATABASE, address=CRYPTO, before="", after="vfio-pci")
ATTACH = AttachFunction(
    guest=DATABASE, address=BOUND_VF, before=Presence.ABSENT, after=Presence.ATTACHED
)
TYPE = ProfileFile("nvidia/current_vgpu_type")
PROFILE = SetProfile(guest=DATABASE, address=VF, file=TYPE, before="0", after="1155")
RESET = ResetFunction(guest=DATABASE, address=BOUND_VF)
CREATE = CreateRegion(
    window=0x1000000000, members=(Serial(0x100), Serial(0x101)), size=512 * MIB,
    before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
)  # fmt: skip
OFFLINE = OnlineMemory(
    window=0x1000000000, members=(Serial(0x102),), before=MemoryUse.MOVABLE,
    after=MemoryUse.OFFLINE,
)  # fmt: skip
CXL = CxlInventory(
    memdevs=tuple(
        Memdev(f"mem{n}", Serial(0x100 + n), ram=Bytes(256 * MIB), port="port1") for n in range(4)
    ),
    ports=(CxlPort("root0", PortKind.ROOT), CxlPort("port1", PortKind.BRIDGE, "root0")),
    windows=(Window("decoder0.0", 0x1000000000, Bytes(4 * GIB), targets=("port1",)),),
)


ATTACH_MEMORY = AttachMemory(
    guest=TIERED, alias="ua-virtfabric-cxl1", node=1, cell=0, size=GIB, block=2 * MIB,
    before=0, after=512 * MIB,
)  # fmt: skip
ATTACH_DIMM = AttachDimm(
    guest=TIERED, alias="ua-virtfabric-cxl1-dimm0", node=1, cell=0, before=0, after=256 * MIB
)
MAKE_PAGES = MakeHugePages(guest=DATABASE, node=0, page=2 * MIB, before=0, after=256, free=260)


FILL = AttachMemory(
    guest=EMPTIED, alias="ua-virtfabric-cxl1", node=1, cell=0, size=GIB, block=2 * MIB,
    before=0, after=64 * MIB,
)  # fmt: skip
EMPTY = ResizeVirtioMem(guest=EMPTIED, alias=FILL.alias, before=64 * MIB, after=0)
DETACH_MEMORY = DetachMemory(
    guest=EMPTIED, alias=FILL.alias, node=1, cell=0, size=GIB, block=2 * MIB
)


class SimulatedWorld:
    def __init__(self):
        self.clock = SimulatedClock()
        tiered = GuestSpec(
            TIERED, "tiered", boot_memory=Bytes(GIB), numa_mode=NumaMode.STRICT,
            numa_nodes=CpuSet([0]), memory_room=MemoryRoom(2, Bytes(2 * GIB), 0),
        )  # fmt: skip
        balloon = GuestSpec(
            BALLOON, "balloon", boot_memory=Bytes(GIB), balloon=True,
            numa_mode=NumaMode.RESTRICTIVE, numa_nodes=CpuSet([0]),
        )  # fmt: skip
        self.host = build_simulated_host(
            make_topology(cores=2, nodes=2),
            (*small_guests(), balloon, tiered, replace(tiered, uuid=EMPTIED, name="emptied")),
            self.clock, small_devices(),
        )  # fmt: skip
        self.host.devices.bind(BOUND_VF, "vfio-pci")
        self.host.devices.find(VF).profiles = {TYPE: "0"}
        self.host.memory.cxl = CXL
        self.host.memory.make_region(OFFLINE.window, OFFLINE.members, 256 * MIB, 256)
        self.host.pages.set_pool(MAKE_PAGES.pool, 10)
        self.handlers = self.host.handlers
        for step in (FILL, EMPTY):
            self.apply(step)

    def steps(self):
        return [
            GROW,
            SetBalloon(guest=BALLOON, before=GIB, after=512 * MIB),
            PLUG,
            PIN,
            PinEmulator(guest=DATABASE, before=CpuSet(), after=CpuSet([0])),
            SetQuota(guest=DATABASE, before=-1, after=1500),
            SetShares(guest=DATABASE, before=100, after=300),
            SetNodeset(guest=BALLOON, before=CpuSet([0]), after=CpuSet([1])),
            MarkPins(guest=DATABASE, before=NO_MARK, after=PinMark.parse("0=2 emulator=0")),
            SetPolicy(guest=BALLOON, definition=Definition.LIVE, before="", after=POLICY),
            BIND,
            SetUpVf(
                guest=DATABASE, address=VF, before=NO_SETTINGS,
                after=VfSettings(mac="52:54:00:00:00:01", vlan=7, trust=True),
            ),
            PROFILE,
            LimitLink(guest=DATABASE, address=PORT, before=0, after=2500),
            ATTACH,
            CREATE,
            OFFLINE,
            ATTACH_MEMORY,
            DETACH_MEMORY,
            MAKE_PAGES,
            ATTACH_DIMM,
        ]  # fmt: skip

    def observe(self, step):
        if isinstance(step, MakeHugePages):
            return self.host.pages.read_pools().pools[step.pool]
        if isinstance(step, CreateRegion | OnlineMemory):
            return self.host.memory.cxl.region_of(step.window, step.members)
        if step.kind in OF_THE_HOST:
            return copy(self.host.devices.find(step.address))
        seen = self.host.kernel(step.guest)
        # The kernel's default weight and policy's 100 are the same thing.
        seen.shares = seen.shares or 100
        return seen

    def vanish(self, step):
        if step.guest != HOST_ITSELF:
            self.host.stop_guest(step.guest)

    def apply(self, step):
        self.handlers.for_step(step).apply(step, Context())
