"""The files that the devices of a Vagrant machine keep their content in.

Owns where they are, their size, and who may open them: we, and the user that libvirt runs QEMU as.
libvirt does not know of them, for they stand in `<qemu:commandline>`: it gives them to nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cache import BuildError, cache_root
from virtfabric.shim.topology.arguments import backing_files

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology

QEMU_CONF: Final = Path("/etc/libvirt/qemu.conf")
_DEBIANS_USER: Final = "libvirt-qemu"
_USER = re.compile(r"""^\s*user\s*=\s*["']([^"'\n]*)["']""", re.MULTILINE)


def choose_state(title: str, settings: Path) -> Path:
    """The directory of one machine's files; one of the same title in another checkout has its own.

    Args:
        title: the topology's.
        settings: where the Vagrantfile of that checkout finds what the machine is made of.
    """
    checkout = hashlib.sha256(os.fsencode(settings.resolve())).hexdigest()[:8]
    return cache_root() / "lab" / "vagrant" / f"{title}-{checkout}"


def read_qemu_user(conf: Path = QEMU_CONF) -> int | None:
    """The user that libvirt's system daemon runs QEMU as; None if this machine has none.

    Only root may read `conf`: for others, it is Debian's own.
    """
    try:
        found = _USER.search(conf.read_text())
    except OSError:
        found = None
    name = found[1] if found else _DEBIANS_USER
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_uid
    number = name.removeprefix("+")
    return int(number) if number.isdecimal() else None


def write_backing_files(topology: Topology, state: Path, qemu_user: int | None) -> None:
    """Make the files of a machine that is off: what has its size stays, else there is a new one.

    Raises:
        BuildError: they cannot be made, or not be kept from others.
    """
    for file in backing_files(topology, state):
        try:
            state.mkdir(parents=True, exist_ok=True)
            if not file.path.exists() or file.path.stat().st_size != file.size:
                file.path.unlink(missing_ok=True)
                file.path.touch(0o600)
                os.truncate(file.path, file.size)
            _admit(file.path, qemu_user)
        except OSError as error:
            raise BuildError(
                f"{file.path}, for libvirt's QEMU: {error.strerror}",
                advice="VIRTFABRIC_CACHE names a directory of yours on a file system with ACLs",
            ) from error


def _admit(path: Path, user: int | None) -> None:
    """Lets the owner and a user read and write, and nobody else."""
    path.chmod(0o600)
    if user is None or user == path.stat().st_uid:
        return
    # entries of tag, permissions and id, as in linux/posix_acl_xattr.h: owner, the user, the
    # group, the mask, others
    entries = ((0x01, 6, -1), (0x02, 6, user), (0x04, 0, -1), (0x10, 6, -1), (0x20, 0, -1))
    acl = b"".join(struct.pack("<HHI", tag, may, who & 0xFFFFFFFF) for tag, may, who in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + acl)
