"""A plan: exact ordered steps as data, each with what it undoes to.

Every step names the value it expects to find (`before`) and the one it brings about (`after`), so
its undo is the same step with the two exchanged, and both are safe to repeat. A step type has a
versioned encoding, and one handler in an adapter; nothing here executes anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from virtfabric.model.adapter import SliceSpec
from virtfabric.model.amounts import Amounts, Tier
from virtfabric.model.card import HeldSlice
from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence
from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.device import PciAddress, VfSettings
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Presence,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.hugepages import MakeHugePages
from virtfabric.model.ids import GuestId
from virtfabric.model.mark import PinMark
from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory
from virtfabric.model.profile import ProfileFile
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from virtfabric.model.device import HeldFunction
    from virtfabric.model.hugepages import HeldPages
    from virtfabric.model.ids import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeVirtioMem(Step):
    """Ask a virtio-mem device for another size (bytes); `after` is reached within `tolerance`.

    Source: https://libvirt.org/formatdomain.html#memory-devices, `<requested>`.
    """

    kind: ClassVar[str] = "resize-virtio-mem"
    needs_guest: ClassVar[bool] = True
    alias: str
    before: int
    after: int
    tolerance: int = 4 << 20
    deadline_s: float = 30.0
    tier: str = "dram"

    def describe(self) -> str:
        """One line for a person."""
        tier = "" if self.tier == Tier.DRAM else f" ({self.tier.upper()})"
        change = f"{Bytes(self.before)} -> {Bytes(self.after)}"
        return f"{self.name}: virtio-mem {self.alias}{tier} {change}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetBalloon(Step):
    """Bring a balloon guest to another amount of memory (bytes)."""

    kind: ClassVar[str] = "set-balloon"
    needs_guest: ClassVar[bool] = True
    before: int
    after: int
    tolerance: int = 1 << 20
    deadline_s: float = 30.0

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: balloon {Bytes(self.before)} -> {Bytes(self.after)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVcpuCount(Step):
    """Plug or unplug vCPUs (count online)."""

    kind: ClassVar[str] = "set-vcpu-count"
    needs_guest: ClassVar[bool] = True
    before: int
    after: int
    deadline_s: float = 30.0

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: vCPUs online {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinVcpu(Step):
    """Let one vCPU run on these pCPUs. Applying to a vCPU that is not plugged is a no-op."""

    kind: ClassVar[str] = "pin-vcpu"
    vcpu: int
    before: CpuSet
    after: CpuSet

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: vCPU {self.vcpu} on pCPU {self.before or 'any'} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinEmulator(Step):
    """Let the emulator threads run on these pCPUs."""

    kind: ClassVar[str] = "pin-emulator"
    before: CpuSet
    after: CpuSet

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: emulator on pCPU {self.before or 'any'} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetQuota(Step):
    """Cap the whole guest: milli-CPU, -1 is uncapped (libvirt's `global_quota`)."""

    kind: ClassVar[str] = "set-quota"
    before: int
    after: int

    def describe(self) -> str:
        """One line for a person."""

        def word(value: int) -> str:
            return "none" if value < 0 else f"{MilliCpu(value)} CPU"

        return f"{self.name}: cap {word(self.before)} -> {word(self.after)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetShares(Step):
    """Weight of the guest in policy shares (100 is the kernel's default)."""

    kind: ClassVar[str] = "set-shares"
    before: int
    after: int

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: shares {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetNodeset(Step):
    """Pull a movable (`restrictive`) guest's memory to these NUMA nodes."""

    kind: ClassVar[str] = "set-nodeset"
    before: CpuSet
    after: CpuSet

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: memory on node {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkPins(Step):
    """Say in the live metadata which of the guest's pins are this agent's.

    It follows the pins that it tells of. When a crash comes in between, the mark and the pins both
    are those of before once the transaction is undone; until then, the new pins count as the
    operator's, which is the side to err on.
    """

    kind: ClassVar[str] = "mark-pins"
    before: PinMark
    after: PinMark

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: mark of our pins {self.before or 'none'} -> {self.after or 'none'}"


class Definition(StrEnum):
    """Which of a guest's two definitions."""

    LIVE = "live"
    CONFIG = "config"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPolicy(Step):
    """Write the policy metadata of one definition: XML as text, empty for none."""

    kind: ClassVar[str] = "set-policy"
    definition: Definition
    before: str
    after: str

    def describe(self) -> str:
        """One line for a person."""
        what = "removed" if not self.after else "changed" if self.before else "set"
        return f"{self.name}: policy in the {self.definition} definition {what}"


STEP_TYPES: dict[str, type[Step]] = {
    t.kind: t
    for t in (
        ResizeVirtioMem, SetBalloon, SetVcpuCount, PinVcpu, PinEmulator, SetQuota, SetShares,
        SetNodeset, MarkPins, SetPolicy, BindDriver, SetUpVf, AttachFunction, ResetFunction,
        LimitLink, CreateRegion, OnlineMemory, AttachMemory, DetachMemory, AttachDimm,
        MakeHugePages, SetProfile, BringSlice, AssignSlice,
    )
}  # fmt: skip


def _parse_text(text: str, *, field: str) -> str:
    return text


def _word_parser(words: type[StrEnum]) -> Callable[..., StrEnum]:
    def parse(text: str, *, field: str) -> StrEnum:
        if text not in tuple(words):
            raise InvalidValueError(field, text, "is not known")
        return words(text)

    return parse


_PARSERS: dict[type[Step], Callable[..., Any]] = {
    PinVcpu: CpuSet.parse, PinEmulator: CpuSet.parse, SetNodeset: CpuSet.parse,
    MarkPins: PinMark.parse, SetPolicy: _parse_text, BindDriver: _parse_text,
    SetUpVf: VfSettings.parse, AttachFunction: _word_parser(Presence),
    DetachMemory: _word_parser(Presence), CreateRegion: _word_parser(RegionPresence),
    OnlineMemory: _word_parser(MemoryUse), SetProfile: _parse_text,
    BringSlice: _word_parser(SlicePresence), AssignSlice: _parse_text,
}  # fmt: skip
"""Of `before` and `after`, where the journal has text for them and no integer."""


def parse_step(data: Mapping[str, Any]) -> Step:
    """Read a step from its journal encoding.

    Raises:
        InvalidValueError: unknown kind or version, or a field missing or of the wrong type.
    """
    kind = STEP_TYPES.get(str(data.get("kind")))
    if kind is None:
        raise InvalidValueError("step.kind", data.get("kind"), "is not a known step type")
    if data.get("version") != kind.version:
        raise InvalidValueError("step.version", data.get("version"), f"of {kind.kind} is unknown")
    body = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    for name in ("before", "after"):
        body[name] = _parse_value(kind, name, body.get(name))
    body |= _parse_place(kind, body)
    body["guest"] = GuestId.parse(str(body.get("guest")), field="step.guest")
    try:
        return kind(**body)
    except TypeError as error:
        raise InvalidValueError("step", dict(data), f"is incomplete: {error}") from None


def _parse_place(kind: type[Step], body: Mapping[str, Any]) -> dict[str, Any]:
    """What a step is about, where that is more than an integer or a name."""
    parsed: dict[str, Any] = {}
    if kind is SetPolicy:
        if body.get("definition") not in tuple(Definition):
            raise InvalidValueError("step.definition", body.get("definition"), "is not known")
        parsed["definition"] = Definition(body["definition"])
    if "address" in body:
        parsed["address"] = PciAddress.parse(str(body["address"]), field="step.address")
    if "file" in body:
        parsed["file"] = ProfileFile.parse(str(body["file"]), field="step.file")
    if issubclass(kind, CreateRegion | OnlineMemory):
        parsed |= _parse_region(body)
    if issubclass(kind, BringSlice):
        parsed |= _parse_slice(body)
    return parsed


def _parse_slice(body: Mapping[str, Any]) -> dict[str, Any]:
    spec, victims = body.get("spec"), body.get("victims")
    if not isinstance(spec, dict):
        raise InvalidValueError("step.spec", spec, "is missing or of the wrong type")
    if not isinstance(victims, list):
        raise InvalidValueError("step.victims", victims, "is missing or of the wrong type")
    try:
        ousted = tuple(HeldSlice.from_json(one) for one in victims)
    except (KeyError, TypeError) as error:
        raise InvalidValueError("step.victims", victims, f"is incomplete: {error}") from None
    return {"spec": SliceSpec.from_json(spec), "victims": ousted}


def _parse_region(body: Mapping[str, Any]) -> dict[str, Any]:
    members = body.get("members")
    if not isinstance(members, list) or not members:
        raise InvalidValueError("step.members", members, "is missing or of the wrong type")
    try:
        window = int(str(body.get("window")), 16)
    except ValueError:
        raise InvalidValueError("step.window", body.get("window"), "is not an address") from None
    serials = tuple(Serial.parse(str(one), field="step.members") for one in members)
    return {"window": window, "members": serials}


def _parse_value(kind: type[Step], name: str, value: object) -> object:
    parse = _PARSERS.get(kind)
    if not isinstance(value, str if parse else int):
        raise InvalidValueError(f"step.{name}", value, "is missing or of the wrong type")
    return parse(value, field=f"step.{name}") if parse else value


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to place a decision, with why it was preferred or not. Lower cost wins.

    Attributes:
        cost: (unmet locality, cores broken, vCPUs moved, first pCPU), compared in this order; of
            functions as `policy.functions` says.
        order: pCPU of each vCPU, for the guest the offer is about; empty in one of functions.
    """

    guest: GuestId
    order: tuple[int, ...]
    cost: tuple[int, ...]
    why: str
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """For audit and clients."""
        return {
            "guest": self.guest, "order": list(self.order), "cost": list(self.cost),
            "why": self.why, "chosen": self.chosen,
        }  # fmt: skip


class LayoutUse(StrEnum):
    """What a plan does with the layout: which pCPUs are whose, and which are the pool."""

    NONE = "none"
    RELIES = "relies"
    """It pins somebody by it."""
    CHANGES = "changes"

    def clashes(self, other: LayoutUse) -> bool:
        """Whether two such plans must not run side by side."""
        both = {self, other}
        return LayoutUse.CHANGES in both and LayoutUse.NONE not in both

    def joined(self, other: LayoutUse) -> LayoutUse:
        """The use of a plan that does both."""
        both = {self, other}
        strictest_first = (LayoutUse.CHANGES, LayoutUse.RELIES, LayoutUse.NONE)
        return next(use for use in strictest_first if use in both)


@dataclass(frozen=True, slots=True)
class Plan:
    """Exact ordered steps for one snapshot of the host.

    Attributes:
        generation: of the snapshot it was made from; a stale plan cannot be committed.
        steps: in order of application, those that need a guest first.
        orders: pCPU order afterwards of each guest whose order changes.
        offers: what was compared.
        functions: PCIe functions afterwards of each guest whose functions change.
        retired: functions that a guest had once and nobody gets again until an operator releases
            them (`one_time_use`).
        node_needs: memory that it takes of single nodes (`memory@node:2`), beyond what it frees
            there: no other plan may count on that meanwhile. Huge pages, too, by their pools.
        pages: huge pages afterwards of each guest whose pages change.
    """

    request: RequestId
    generation: int
    steps: tuple[Step, ...]
    orders: dict[GuestId, tuple[int, ...]] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()
    functions: dict[GuestId, tuple[HeldFunction, ...]] = field(default_factory=dict)
    retired: tuple[PciAddress, ...] = ()
    node_needs: Amounts = Amounts()
    pages: dict[GuestId, tuple[HeldPages, ...]] = field(default_factory=dict)

    @property
    def guests(self) -> frozenset[GuestId]:
        """Every guest that a step touches."""
        return frozenset(step.guest for step in self.steps)

    @property
    def addresses(self) -> frozenset[PciAddress]:
        """Every PCIe function that it moves, prepares or reserves: no other plan may meanwhile."""
        steps = (BindDriver, SetUpVf, SetProfile, AttachFunction, ResetFunction)
        touched = {step.address for step in self.steps if isinstance(step, steps)}
        held = {one.address for functions in self.functions.values() for one in functions}
        return frozenset(touched | held)

    @property
    def layout_use(self) -> LayoutUse:
        """What it does with the layout of the host's pCPUs."""
        if self.orders:
            return LayoutUse.CHANGES
        pins = any(isinstance(step, PinVcpu | PinEmulator) for step in self.steps)
        return LayoutUse.RELIES if pins else LayoutUse.NONE

    def without(self, guests: Collection[GuestId]) -> Plan:
        """The same plan, with no step that touches one of these guests."""
        return replace(self, steps=tuple(s for s in self.steps if s.guest not in guests))
