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
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast

from virtfabric.shim.guestimage import READY_LINE, guest_cache
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from virtfabric.shim.guestimage import GuestImage
    from virtfabric.shim.guestxml import DomainType

_QEMU: Final = "qemu-system-x86_64"
_DEVICE: Final = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_WORDS: Final = {"yes": True, "no": False}
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
    device: Path = _DEVICE,
) -> bool:
    """Whether a KVM guest of `image` reaches its userland.

    The answer is cached for this boot of the host, if a guest was really started: a missing QEMU
    or a device without access may be mended the next moment.

    Args:
        image: what is booted.
        first_s: how long its kernel may take to say the first word.
        timeout_s: how long it may take to its userland; a nested host that is itself emulated
            needs 15 s.
        cache: where the answer is kept; None for the guest images' own.
        device: KVM's.
    """
    answer = (cache or guest_cache()) / f"kvm-{_BOOT_ID.read_text().strip()}"
    with suppress(FileNotFoundError):
        told = answer.read_text()
        if told in _WORDS:
            return _WORDS[told]
    if not os.access(device, os.R_OK | os.W_OK) or shutil.which(_QEMU) is None:
        return False
    works = _boots(image, first_s, timeout_s)
    if works is not None:
        _keep_answer(answer, "yes" if works else "no")
    return bool(works)


def _keep_answer(answer: Path, text: str) -> None:
    """Whole or not at all, for others read it meanwhile; those of earlier boots go."""
    answer.parent.mkdir(parents=True, exist_ok=True)
    for stale in answer.parent.glob("kvm-*"):
        if not stale.name.startswith(answer.name):
            stale.unlink(missing_ok=True)
    fresh = answer.with_name(f"{answer.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.rename(answer)


def choose_domain_type(image: GuestImage) -> DomainType:
    """What a guest of the shim is on this host: KVM where it runs one, else emulated."""
    return "kvm" if probe_kvm(image) else "qemu"


def can_nest(modules: Path = Path("/sys/module")) -> bool:
    """Whether a KVM guest here can have KVM guests of its own: KVM's parameter `nested`."""
    found = (modules / name / "parameters" / "nested" for name in ("kvm_intel", "kvm_amd"))
    return any(path.exists() and path.read_text().strip() in {"1", "Y"} for path in found)


def _boots(image: GuestImage, first_s: float, timeout_s: float) -> bool | None:
    """None where QEMU ended without a word of the guest's kernel, such as without memory for it."""
    qemu = subprocess.Popen(
        [
            *(_QEMU, "-machine", "q35", "-accel", "kvm", "-cpu", "host"),
            *("-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", image.cmdline.replace("quiet", _FIRST_WORD)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        output = cast("IO[bytes]", qemu.stdout)
        # the kernel's first word tells a slow host from one that gets nowhere
        first = _prints(output, b"Linux version", first_s)
        return first and bool(_prints(output, READY_LINE.encode(), timeout_s))
    finally:
        qemu.kill()
        qemu.communicate()


def _prints(output: IO[bytes], wanted: bytes, timeout_s: float) -> bool | None:
    """None where the output ended before."""
    seen = b""
    deadline = time.monotonic() + allow(timeout_s)
    while wanted not in seen:
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        chunk = os.read(output.fileno(), 4096)
        if not chunk:
            return None
        seen += chunk
    return True
