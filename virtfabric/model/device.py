"""PCIe functions of a host, the pools that the configuration makes of them, and who holds which.

A *function* is what the kernel shows under `/sys/bus/pci/devices`; bridges and root ports are
among them, as who shares a group or a link is asked of them. A *pool* is every function that has
one capability; a guest asks for a capability and a count, never for an address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtfabric.model.badge import Badge, SliceFunction

VFIO_PCI: Final = "vfio-pci"
_ADDRESS: Final = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{1,2}):([01]?[0-9a-f])\.([0-7])", re.IGNORECASE
)


class PciAddress(str):
    """Where a function is: domain, bus, slot and function, `0000:3b:10.1` in canonical form."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str, *, field: str = "address") -> Self:
        """Read an address with or without its domain.

        Raises:
            InvalidValueError: not an address.
        """
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            raise InvalidValueError(
                field, text, "is not a PCI address", advice="write it like 0000:3b:10.1"
            )
        domain, bus, slot, function = (int(part or "0", 16) for part in match.groups())
        return cls(f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Domain, bus, slot, function."""
        domain, bus, rest = self.split(":")
        slot, _, function = rest.partition(".")
        return int(domain, 16), int(bus, 16), int(slot, 16), int(function, 16)


@dataclass(frozen=True, slots=True)
class Link:
    """A PCIe link: speed in MT/s (2.5 GT/s is 2500) and width in lanes; 0 where not told.

    Source: `current_link_speed`, `max_link_speed`, `current_link_width`, `max_link_width`.
    """

    speed: int = 0
    width: int = 0
    speed_max: int = 0
    width_max: int = 0


class UseKind(StrEnum):
    """How the host itself uses a function."""

    MOUNTED = "mounted"
    SWAP = "swap"
    STACKED = "stacked"
    """A block device that others are made of (LVM, RAID, dm-crypt)."""
    NETWORK = "network"
    """An interface that is up, or is part of a bridge or bond."""
    CONSOLE = "console"
    """The boot display or an active console."""
    BRIDGE = "bridge"
    """A bridge or port with functions behind it."""


@dataclass(frozen=True, slots=True)
class HostUse:
    """One use by the host; `detail` for people: `nvme0n1p1 on /`, `eth0 is up`."""

    kind: UseKind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One function as the kernel shows it.

    Attributes:
        vendor, device, subsystem_vendor, subsystem_device: ids, 16 bits each.
        class_code: 24 bits: class, subclass, programming interface.
        driver: bound now; None for none.
        driver_override: None where it is not set.
        node: NUMA node; None where the firmware does not say.
        group: IOMMU group; None without an IOMMU.
        parent: the bridge or port above; None on a root bus.
        bridge: whether it is a bridge or port itself (header type 1).
        pf: of a VF, its PF; None for any other.
        vf_index: of a VF, its number on the PF, from 0.
        vfs: of a PF, its VFs by number.
        vfs_max: of a PF, how many it can have (`sriov_totalvfs`); 0 for any other.
        resets: reset methods that the kernel would try, in order; empty where it has none.
        acs: of a port or multi-function device, whether ACS isolates what is behind it; None
            where it has no such capability to read.
        uses: by the host itself; empty when it may be assigned.
        interfaces: names of its network interfaces and block devices, for people.
        settings: of a VF of a NIC, what its PF keeps for it now: what a plan puts back; None
            where no PF keeps any.
        limit: of a port, MT/s that the link below it is held to, though both ends can do more; 0
            for no limit, None where that is not told.
        fatal_errors: how many fatal ones it has reported since the host booted, for a root port
            also those that reached it; None where nothing counts them (no AER).
        badge: which slice of an offload card it says to be; None where it does not say.
    """

    address: PciAddress
    vendor: int = 0
    device: int = 0
    subsystem_vendor: int = 0
    subsystem_device: int = 0
    class_code: int = 0
    driver: str | None = None
    driver_override: str | None = None
    node: int | None = None
    group: int | None = None
    parent: PciAddress | None = None
    bridge: bool = False
    pf: PciAddress | None = None
    vf_index: int | None = None
    vfs: tuple[PciAddress, ...] = ()
    vfs_max: int = 0
    link: Link = Link()
    resets: tuple[str, ...] = ()
    acs: bool | None = None
    uses: tuple[HostUse, ...] = ()
    interfaces: tuple[str, ...] = ()
    settings: VfSettings | None = None
    limit: int | None = None
    fatal_errors: int | None = None
    badge: Badge | None = None

    @property
    def ids(self) -> str:
        """`8086:10ca`."""
        return f"{self.vendor:04x}:{self.device:04x}"


@dataclass(frozen=True, slots=True)
class DeviceNews:
    """That something about the host's functions or their uses has changed.

    Attributes:
        functions: it is about these only; None where it may be about any.
        at: monotonic seconds: who reads later than this sees it.
    """

    functions: frozenset[PciAddress] | None
    at: float


@dataclass(frozen=True, slots=True)
class VfSettings:
    """What a PF sets for one of its VFs; None leaves that setting alone.

    Attributes:
        mac: lower case with colons.
        vlan: 0 for none.
        trust, spoofchk: on or off.
        rate: Mbit/s, 0 for no limit.
    """

    mac: str | None = None
    vlan: int | None = None
    trust: bool | None = None
    spoofchk: bool | None = None
    rate: int | None = None

    def __str__(self) -> str:
        """`mac=52:54:00:00:00:01,vlan=7,trust=on`; empty when nothing is set."""

        def word(value: object) -> str:
            return ("on" if value else "off") if isinstance(value, bool) else str(value)

        values = {name: getattr(self, name) for name in self.__slots__}
        return ",".join(f"{k}={word(v)}" for k, v in values.items() if v is not None)

    def __bool__(self) -> bool:
        return bool(str(self))

    @classmethod
    def parse(cls, text: str, *, field: str = "settings") -> Self:
        """The reverse of `str`.

        Raises:
            InvalidValueError: an unknown name, or a value out of range.
        """
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            parse = _SETTINGS.get(name)
            if parse is None:
                raise InvalidValueError(field, text, f"has no setting {name!r}")
            try:
                values[name] = parse(value)
            except ValueError:
                raise InvalidValueError(f"{field}.{name}", value, "is out of range") from None
        return cls(**values)


def _parse_mac(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", text.lower()) or int(text[:2], 16) & 1:
        raise ValueError(text)  # a multicast address is nobody's
    return text.lower()


def _parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


def _parse_vlan(text: str) -> int:
    if not 0 <= int(text) <= 4094:
        raise ValueError(text)
    return int(text)


def _parse_rate(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


_SETTINGS: Final = {
    "mac": _parse_mac, "vlan": _parse_vlan, "trust": _parse_switch, "spoofchk": _parse_switch,
    "rate": _parse_rate,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """Which functions are in a pool: those that meet every condition that is given.

    Attributes:
        addresses: exact ones.
        ids: `vendor:device` in lower-case hexadecimal.
        class_prefix: of the six hexadecimal digits of the class, such as `0200`.
        pf: VFs of this PF only.
        vfs: True for VFs only, False for others only, None for both.
        driver: the one that is bound while no guest has it.
    """

    addresses: frozenset[PciAddress] = frozenset()
    ids: frozenset[str] = frozenset()
    class_prefix: str = ""
    pf: PciAddress | None = None
    vfs: bool | None = None
    driver: str = ""


@dataclass(frozen=True, slots=True)
class DevicePool:
    """`[[device]]` of the configuration, or all functions that are slices with one capability.

    Attributes:
        slices: it is of slices; functions with a badge are in no other pool.
        settings: what a grant sets up on a VF; `mac` None leaves the one that it has.
        vf_count: how many VFs each PF of the pool is given when the agent starts and it has none;
            None leaves that to the operator. Never changed while a VF is in use.
        nvme_queues: queue and interrupt resources of each NVMe VF; None leaves them alone.
        one_time_use: a function that a guest had is quarantined until somebody releases it.
        link_speed: MT/s that the port above is limited to while a guest has it; None for no limit.
        vfio_driver: under which vfio opens it: vfio-pci, or a variant of a vendor's.
        profile: what that driver is to make of a function that a guest gets; None for nothing.
    """

    capability: str
    match: Match
    settings: VfSettings = VfSettings()
    vf_count: int | None = None
    nvme_queues: int | None = None
    one_time_use: bool = False
    link_speed: int | None = None
    slices: bool = False
    vfio_driver: str = VFIO_PCI
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found before a function was prepared for a guest: the way back.

    Attributes:
        driver: empty for none; None for a function that nothing was changed of.
        settings: of a VF, those that the pool's settings replaced.
        siblings: drivers of the other functions of its group that no guest holds.
        port: whose link is limited while a guest has it; None where none is.
        speed: MT/s that it is limited to.
        fatal_errors: what `policy.faults` counted; None where nothing counts.
        profile: that is set while a guest has it, and what is set afterwards; None where none is.
        vfio_driver: under which the guest was given it.
    """

    driver: str | None = None
    settings: VfSettings = VfSettings()
    siblings: tuple[tuple[PciAddress, str], ...] = ()
    port: PciAddress | None = None
    speed: int = 0
    fatal_errors: int | None = None
    profile: Profile | None = None
    vfio_driver: str = VFIO_PCI

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "driver": self.driver, "settings": str(self.settings),
            "siblings": dict(self.siblings), "port": self.port, "speed": self.speed,
            "fatal_errors": self.fatal_errors,
            "profile": self.profile.to_json() if self.profile else None,
            "vfio_driver": self.vfio_driver,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Found:
        """The reverse of `to_json`; an older agent knew less."""
        siblings = tuple((PciAddress(a), driver) for a, driver in data["siblings"].items())
        port = PciAddress(data["port"]) if data["port"] else None
        settings = VfSettings.parse(data["settings"])
        profile = Profile.from_json(data["profile"]) if data.get("profile") else None
        return cls(
            data["driver"], settings, siblings, port, data["speed"], data.get("fatal_errors"),
            profile, data.get("vfio_driver", VFIO_PCI),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeldFunction:
    """A function that a guest holds, by the capability that it was granted for.

    Attributes:
        slice: key of the slice of an offload card that it is; empty for any other function.
    """

    capability: str
    address: PciAddress
    found: Found = Found()
    slice: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        body = {"capability": self.capability, "address": self.address}
        return body | {"found": self.found.to_json(), "slice": self.slice}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeldFunction:
        """The reverse of `to_json`."""
        found = Found.from_json(data["found"]) if "found" in data else Found()
        return cls(data["capability"], PciAddress(data["address"]), found, data.get("slice", ""))


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A function whose state is not certain: given to nobody until an operator releases it.

    Attributes:
        why: what happened.
        remedy: the way out, for the operator.
        since: UNIX seconds.
        found: the way back to how it was before a guest had it, where no plan went that way.
        condemned: it stays also when it went that way: something is wrong with itself.
    """

    address: PciAddress
    why: str
    remedy: str
    since: float
    found: Found = Found()
    condemned: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        return {
            "address": self.address, "why": self.why, "remedy": self.remedy, "since": self.since,
            "found": self.found.to_json(), "condemned": self.condemned,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quarantine:
        """The reverse of `to_json`."""
        return cls(
            PciAddress(data["address"]), data["why"], data["remedy"], data["since"],
            Found.from_json(data["found"]), data.get("condemned", False),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GuestDevice:
    """A `<hostdev>` of a guest as libvirt shows it.

    Attributes:
        alias: libvirt's name for it; empty in a persistent definition.
        managed: whether libvirt binds the driver itself.
        guest_address: where the guest sees it; None where libvirt does not say.
    """

    address: PciAddress
    alias: str = ""
    managed: bool = False
    guest_address: PciAddress | None = None

    @property
    def ours(self) -> bool:
        """Whether this agent attached it."""
        return self.alias.startswith(OUR_ALIAS)


OUR_ALIAS: Final = "ua-virtfabric-"


def alias_of(address: PciAddress) -> str:
    """The alias under which this agent attaches a function; libvirt wants `ua-` before it."""
    return OUR_ALIAS + address.replace(":", "-").replace(".", "-")


@dataclass(frozen=True)
class DeviceInventory:
    """All functions of a host and the pools made of them. An empty one is a host without any.

    Attributes:
        functions: by address.
        pools: in the order of the configuration; a function is in the first that matches it.
        slices: which of them are slices of offload cards, as the cards confirmed.
        doubts: why a function that says to be one cannot be given to anybody now.
    """

    functions: Mapping[PciAddress, PciFunction] = field(default_factory=dict)
    pools: tuple[DevicePool, ...] = ()
    slices: Mapping[PciAddress, SliceFunction] = field(default_factory=dict)
    doubts: Mapping[PciAddress, str] = field(default_factory=dict)

    @cached_property
    def badged(self) -> dict[PciAddress, Badge]:
        """What functions say of themselves."""
        return {a: one.badge for a, one in self.functions.items() if one.badge is not None}

    @cached_property
    def groups(self) -> dict[int, tuple[PciFunction, ...]]:
        """Functions by IOMMU group."""
        groups: dict[int, list[PciFunction]] = {}
        for one in self.functions.values():
            if one.group is not None:
                groups.setdefault(one.group, []).append(one)
        return {group: tuple(members) for group, members in groups.items()}

    def group_of(self, address: PciAddress) -> Iterator[PciFunction]:
        """The other functions of its IOMMU group."""
        own = self.functions.get(address)
        if own is not None and own.group is not None:
            yield from (one for one in self.groups[own.group] if one.address != address)

    def above(self, address: PciAddress) -> Iterator[PciFunction]:
        """The bridges and ports above it, nearest first."""
        own = self.functions.get(address)
        while own is not None and own.parent is not None:
            own = self.functions.get(own.parent)
            if own is not None:
                yield own

    def behind(self, port: PciAddress) -> Iterator[PciFunction]:
        """Every function below a bridge or port, at any depth."""
        for one in self.functions.values():
            if any(bridge.address == port for bridge in self.above(one.address)):
                yield one
