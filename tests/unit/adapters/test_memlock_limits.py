"""RLIMIT_MEMLOCK and capabilities, as the kernel prints them."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.pci.memlock import read_lock_limit
from virtfabric.model.errors import GuestGoneError, HypervisorError
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from pathlib import Path

QEMU, DAEMON = 41, 42
HEAD = "Limit                     Soft Limit           Hard Limit           Units     \n"
NONE, IPC_LOCK, SYS_RESOURCE = "0000000000000000", "0000000000004000", "0000000001000000"


def write(proc: Path, pid: int, *, soft: str = "8388608", capabilities: str = NONE) -> None:
    (proc / str(pid)).mkdir(parents=True)
    row = f"Max locked memory         {soft:<21}unlimited            bytes     \n"
    (proc / str(pid) / "limits").write_text(HEAD + row)
    (proc / str(pid) / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")


def test_the_soft_limit_counts(tmp_path: Path) -> None:
    write(tmp_path, QEMU)
    write(tmp_path, DAEMON)
    limit = read_lock_limit(QEMU, DAEMON, proc=tmp_path)
    assert (limit.soft, limit.raisable, limit.exempt) == (Bytes(8 << 20), False, False)


def test_capabilities_of_each(tmp_path: Path) -> None:
    write(tmp_path, QEMU, soft="unlimited", capabilities=IPC_LOCK)
    write(tmp_path, DAEMON, capabilities=SYS_RESOURCE)
    limit = read_lock_limit(QEMU, DAEMON, proc=tmp_path)
    assert (limit.soft, limit.raisable, limit.exempt) == (None, True, True)


def test_this_very_process() -> None:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = read_lock_limit(os.getpid(), os.getpid())
    assert limit.soft == (None if soft == resource.RLIM_INFINITY else soft)


def test_a_qemu_that_ended(tmp_path: Path) -> None:
    write(tmp_path, DAEMON)
    with pytest.raises(GuestGoneError, match="41"):
        read_lock_limit(QEMU, DAEMON, proc=tmp_path)


def test_a_daemon_that_ended(tmp_path: Path) -> None:
    write(tmp_path, QEMU)
    with pytest.raises(HypervisorError, match="daemon 42"):
        read_lock_limit(QEMU, DAEMON, proc=tmp_path)


def test_a_file_that_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, QEMU, soft="")
    write(tmp_path, DAEMON)
    (tmp_path / str(QEMU) / "limits").write_text(HEAD)
    with pytest.raises(HypervisorError, match="max locked memory"):
        read_lock_limit(QEMU, DAEMON, proc=tmp_path)
