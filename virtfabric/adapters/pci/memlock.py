"""What a process may lock, from /proc. Reads only; `policy.memlock` says what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from virtfabric.model.errors import GuestGoneError, HypervisorError
from virtfabric.model.units import Bytes
from virtfabric.policy.memlock import LockLimit

_ROW: Final = "Max locked memory"
# Bits as in include/uapi/linux/capability.h
_CAP_IPC_LOCK: Final = 14
_CAP_SYS_RESOURCE: Final = 24


def read_lock_limit(pid: int, raiser: int | None, *, proc: Path = Path("/proc")) -> LockLimit:
    """RLIMIT_MEMLOCK of a QEMU process, and whether `raiser` may raise it.

    Args:
        pid: of QEMU.
        raiser: of libvirt's daemon, which attaches the function; None where it is not known: it
            may be allowed to.
        proc: the kernel's view of both.

    Raises:
        GuestGoneError: QEMU has ended.
        HypervisorError: the daemon has ended, or /proc cannot be read.
    """
    try:
        soft = _read_soft(proc / str(pid) / "limits")
        exempt = _has(proc / str(pid) / "status", _CAP_IPC_LOCK)
    except (FileNotFoundError, ProcessLookupError):
        raise GuestGoneError(f"QEMU process {pid} has ended") from None
    except OSError as error:
        raise HypervisorError(f"{proc}/{pid}: {error.strerror}") from error
    try:
        raisable = raiser is None or _has(proc / str(raiser) / "status", _CAP_SYS_RESOURCE)
    except OSError as error:
        raise HypervisorError(f"libvirt's daemon {raiser}: {error.strerror}") from error
    return LockLimit(soft, raisable=raisable, exempt=exempt)


def _read_soft(limits: Path) -> Bytes | None:
    """Max locked memory         8388608              8388608              bytes."""
    row = next((row for row in limits.read_text().splitlines() if row.startswith(_ROW)), "")
    word = row.removeprefix(_ROW).split()[:1]
    if word == ["unlimited"]:
        return None
    if not word or not word[0].isdecimal():
        raise HypervisorError(f"{limits} does not tell {_ROW.lower()}: {row!r}")
    return Bytes(int(word[0]))


def _has(status: Path, capability: int) -> bool:
    """Whether a process has a capability in effect."""
    for row in status.read_text().splitlines():
        name, _, value = row.partition(":")
        if name == "CapEff":
            return bool(int(value.strip(), 16) >> capability & 1)
    raise HypervisorError(f"{status} does not tell capabilities")
