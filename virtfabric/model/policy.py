"""What a guest's owner wants for it: reservation, limit, shares, priority.

It travels in libvirt metadata (`domxml.policy` reads and writes it); a guest without one is
unmanaged: counted as used, never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from virtfabric.model.units import Bytes, MilliCpu

POLICY_NAMESPACE: Final = "urn:virtfabric:policy:1"
DEFAULT_SHARES: Final = 100


class Placement(StrEnum):
    """How a guest uses pCPUs."""

    DEDICATED = "dedicated"
    SHARED = "shared"


class Smt(StrEnum):
    """What a dedicated guest wants of SMT siblings."""

    PREFER = "prefer"
    """Whole cores where they are to be had."""
    REQUIRE = "require"
    """Whole cores or nothing; the guest's own vCPUs fill the siblings."""
    ISOLATE = "isolate"
    """One vCPU a core; the siblings stay empty (of managed guests)."""


class Growth(StrEnum):
    """By which kind of device memory comes to a guest that has none on the node yet."""

    VIRTIO_MEM = "virtio-mem"
    DIMM = "dimm"
    """For a guest that has no virtio-mem driver. It is not expected to give one back."""


class Admission(StrEnum):
    """What happens at start when the agent is away or the policy is invalid."""

    LAX = "lax"
    STRICT = "strict"


class DriftAction(StrEnum):
    """What the agent does about a change that somebody made beside it."""

    REPORT = "report"
    REPAIR = "repair"


class Escalation(StrEnum):
    """How far it goes when a guest's memory is called home and nobody has enough to spare."""

    NO = "no"
    """Never beyond what the guest itself tells that it can spare."""
    PRESS = "press"
    """It is asked for all that is above its floor, and keeps what it does not let go in time."""


@dataclass(frozen=True, slots=True)
class CpuPolicy:
    """CPU entitlement in milli-CPU. `limit` None means the guest's maximum of vCPUs."""

    reservation: MilliCpu = MilliCpu(0)
    limit: MilliCpu | None = None
    shares: int = DEFAULT_SHARES
    placement: Placement = Placement.SHARED
    smt: Smt = Smt.PREFER


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """Memory entitlement in bytes. `limit` None means what the guest's mechanism can reach.

    The reservation is of DRAM, the limit of all tiers together.
    """

    reservation: Bytes = Bytes(0)
    limit: Bytes | None = None
    shares: int = DEFAULT_SHARES
    tiers: tuple[str, ...] = ("dram",)
    escalate: Escalation = Escalation.PRESS
    growth: Growth = Growth.VIRTIO_MEM


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """PCIe functions wanted by capability."""

    capability: str
    count: int = 1
    reclaimable: bool = False


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """A guest's whole policy, version 1 of the metadata schema."""

    priority: int = 50
    admission: Admission = Admission.LAX
    drift: DriftAction = DriftAction.REPORT
    cpu: CpuPolicy = field(default_factory=CpuPolicy)
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    devices: tuple[DevicePolicy, ...] = ()
