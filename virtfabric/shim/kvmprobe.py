"""Does KVM really run a guest here?

Owns the answer, measured by booting the guest image and kept until the next boot of the host.
A /dev/kvm that opens, answers and is listed by `virsh capabilities` may still never run a guest
(seen in nested VMs whose outer hypervisor hides the processor's virtualization: QEMU starts, the
vCPU makes no progress, nothing is printed), so nothing less than a booted guest counts. A ROM of
nine bytes is not enough: it prints there, while a kernel does not get anywhere.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from virtfabric.shim.guestimage import READY_LINE, guest_cache
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from virtfabric.shim.guestimage import GuestImage
    from virtfabric.shim.guestxml import DomainType

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MEMORY_MIB = 160
# The version is of level 5 (notice). More would cost a minute in an emulated host, where a guest
# leaves for its host twice a character, at 0.5 ms.
_FIRST_WORD = "loglevel=6 earlyprintk=serial"


def probe_kvm(
    image: GuestImage,
    *,
    first_s: float = 10.0,
    timeout_s: float = 90.0,
    cache: Path | None = None,
    fresh: bool = False,
) -> bool:
    """Whether a KVM guest of `image` reaches its userland.

    The answer is cached for this boot of the host.

    Args:
        image: what is booted.
        first_s: how long its kernel may take to say the first word.
        timeout_s: how long it may take to its userland; a nested host that is itself emulated
            needs 15 s.
        cache: where the answer is kept; None for the guest images' own.
        fresh: measure again.
    """
    answer = (cache or guest_cache()) / f"kvm-{_BOOT_ID.read_text().strip()}"
    if answer.exists() and not fresh:
        return answer.read_text() == "yes"
    works = os.access("/dev/kvm", os.R_OK | os.W_OK) and _boots(image, first_s, timeout_s)
    answer.parent.mkdir(parents=True, exist_ok=True)
    for stale in answer.parent.glob("kvm-*"):
        stale.unlink(missing_ok=True)
    answer.write_text("yes" if works else "no")
    return works


def choose_domain_type(image: GuestImage) -> DomainType:
    """What a guest of the shim is on this host: KVM where it runs one, else emulated."""
    return "kvm" if probe_kvm(image) else "qemu"


def can_nest(modules: Path = Path("/sys/module")) -> bool:
    """Whether a KVM guest here can have KVM guests of its own: KVM's parameter `nested`."""
    found = (modules / name / "parameters" / "nested" for name in ("kvm_intel", "kvm_amd"))
    return any(path.exists() and path.read_text().strip() in {"1", "Y"} for path in found)


def _boots(image: GuestImage, first_s: float, timeout_s: float) -> bool:
    try:
        qemu = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-cpu", "host"),
                *("-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
                *("-serial", "stdio", "-kernel", str(image.kernel), "-initrd", str(image.initrd)),
                *("-append", image.cmdline.replace("quiet", _FIRST_WORD)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return False
    try:
        output = cast("IO[bytes]", qemu.stdout)
        # the kernel's first word tells a slow host from one that gets nowhere
        return _prints(output, b"Linux version", first_s) and _prints(
            output, READY_LINE.encode(), timeout_s
        )
    finally:
        qemu.kill()
        qemu.communicate()


def _prints(output: IO[bytes], wanted: bytes, timeout_s: float) -> bool:
    seen = b""
    deadline = time.monotonic() + allow(timeout_s)
    while wanted not in seen:
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(output.fileno(), 4096) if ready else b""
        if not chunk:
            return False
        seen += chunk
    return True
