"""The steps that move PCIe functions: driver, VF settings, profile, attach, reset, link speed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from virtfabric.model.step import Step

if TYPE_CHECKING:
    from virtfabric.model.device import PciAddress, VfSettings
    from virtfabric.model.profile import ProfileFile


@dataclass(frozen=True, slots=True, kw_only=True)
class BindDriver(Step):
    """Bring a PCI function to another driver; empty for none. Through `driver_override`.

    Also of a function that only shares an IOMMU group with the one the guest gets.
    Source: Documentation/ABI/testing/sysfs-bus-pci.
    """

    kind: ClassVar[str] = "bind-driver"
    address: PciAddress
    before: str
    after: str

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.name}: {self.address} driver {self.before or 'none'} -> {self.after or 'none'}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUpVf(Step):
    """Set what a PF keeps for one VF (`address`): MAC, VLAN, trust, spoof check, rate."""

    kind: ClassVar[str] = "set-up-vf"
    address: PciAddress
    before: VfSettings
    after: VfSettings

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: VF {self.address} {self.before or 'as it is'} -> {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetProfile(Step):
    """Say which profile a vendor's driver makes of a function: text in a file of its directory.

    Only where the file has one of the two values; a third is somebody else's.
    """

    kind: ClassVar[str] = "set-profile"
    address: PciAddress
    file: ProfileFile
    before: str
    after: str

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: {self.address} profile {self.file} {self.before} -> {self.after}"


class Presence(StrEnum):
    """Whether a guest has a function."""

    ABSENT = "absent"
    ATTACHED = "attached"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachFunction(Step):
    """Give a running guest a PCI function that a vfio driver holds, or take it away.

    Taking it away needs the guest; a request to the guest is made once and cannot be withdrawn.
    """

    kind: ClassVar[str] = "attach-function"
    needs_guest: ClassVar[bool] = True
    address: PciAddress
    before: Presence
    after: Presence
    deadline_s: float = 30.0

    def describe(self) -> str:
        """One line for a person."""
        word = "attach" if self.after is Presence.ATTACHED else "detach"
        return f"{self.name}: {word} {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetFunction(Step):
    """Reset a function that left a guest, so that the next one finds nothing of it.

    Always optional: a function that cannot be reset is quarantined, and the plan goes on. The
    numbers mean nothing but that there is nothing to undo.
    """

    kind: ClassVar[str] = "reset-function"
    address: PciAddress
    before: int = 0
    after: int = 0
    optional: bool = True

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: reset {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitLink(Step):
    """Limit the speed of the link below a port (MT/s; 0 for none): all behind it is slower.

    Source: the kernel's PCIe bandwidth controller (Linux 6.13), a cooling device for each port.
    """

    kind: ClassVar[str] = "limit-link"
    address: PciAddress
    before: int
    after: int

    def describe(self) -> str:
        """One line for a person."""

        def word(value: int) -> str:
            return f"{value / 1000:g} GT/s" if value else "no limit"

        return f"{self.name}: link below {self.address} {word(self.before)} -> {word(self.after)}"
