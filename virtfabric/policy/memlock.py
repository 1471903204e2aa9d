"""How much memory QEMU must be able to lock for the functions of a guest, and whether it may.

vfio pins all memory of the guest (with a virtual IOMMU once for each function, in the worst case),
and the kernel counts it against RLIMIT_MEMLOCK of the QEMU process. libvirt raises that limit when
it attaches a function, if it is allowed to; a `<hard_limit>` of the guest it takes as the limit.

Source: libvirt 9.0, qemuDomainGetMemLockLimitBytes; Linux 6.1, drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import GIB, Bytes

IO_SPACE: Final = Bytes(GIB)
"""What libvirt adds for the memory-mapped regions of the functions themselves."""


@dataclass(frozen=True, slots=True)
class LockLimit:
    """RLIMIT_MEMLOCK of a QEMU process, and what may become of it; None is unlimited.

    Attributes:
        soft: what the kernel holds it to.
        raisable: whether libvirt's daemon may raise it (CAP_SYS_RESOURCE).
        exempt: whether the process itself is held to no limit (CAP_IPC_LOCK).
    """

    soft: Bytes | None
    raisable: bool = True
    exempt: bool = False


def lock_needed(memory_max: Bytes, functions: int, *, viommu: bool = False) -> Bytes:
    """Bytes that QEMU must be able to lock so that a guest can have so many functions.

    Args:
        memory_max: the most memory the guest can have, all its memory devices plugged in full.
        functions: all of vfio: PCI and mediated, and NVMe disks of `<disk type='nvme'>`.
        viommu: whether the guest has a virtual IOMMU: each function has its own address space then.
    """
    if functions <= 0:
        return Bytes(0)
    return Bytes(memory_max * (functions if viommu else 1) + IO_SPACE)


def check_lock(
    name: str, needed: Bytes, limit: LockLimit, *, hard_limit: Bytes | None = None
) -> Refusal | None:
    """Whether a guest's QEMU may lock so much; None when it may.

    Args:
        name: of the guest, for the message.
        needed: see `lock_needed`.
        limit: of its process.
        hard_limit: the guest's `<memtune><hard_limit>`, which libvirt uses instead of `needed`.
    """
    if limit.exempt:
        return None
    if hard_limit is not None and limit.raisable:
        if hard_limit >= needed:
            return None
        return _refuse(
            f"{name} must lock {needed} for its functions, and its <hard_limit> allows "
            f"{hard_limit}: raise it with `virsh memtune {name} --hard-limit {_kib(needed)}`, "
            "or remove it"
        )
    if limit.raisable or limit.soft is None or limit.soft >= needed:
        return None
    return _refuse(
        f"{name} must lock {needed} for its functions, its QEMU may lock {limit.soft}, and libvirt "
        "may not raise that: give libvirt's daemon CAP_SYS_RESOURCE, or LimitMEMLOCK="
        f"{int(needed)} in its unit and start the guest anew"
    )


def _kib(amount: Bytes) -> int:
    return -(-amount // 1024)


def _refuse(detail: str) -> Refusal:
    return Refusal(Reason.MEMORY_LOCK_LIMIT, detail)
