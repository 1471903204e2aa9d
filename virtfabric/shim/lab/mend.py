"""A defect of QEMU's TCG that hangs KVM guests in a lab, mended in the copy in the cache.

Seen with QEMU 11.1.2 (upstream's source has it still): VMRUN with an event to inject
(`helper_vmrun`, SVM_EVTINJ_TYPE_INTR) writes the vector to `exception_index`, then delivers the
interrupt itself, and leaves the vector there. If a kick without an interrupt (another vCPU's
exclusive work, a change of the memory map, a thread that was preempted between the two) stops that
vCPU before its next VMEXIT, the loop delivers the same vector again, whether the guest takes
interrupts or not: a timer's handler is entered in itself and waits for its own lock, for ever
(seen: `tick_periodic` in `tick_periodic` at `jiffies_lock`, both of a guest's vCPUs, IF=0). The
write is of no use, as the delivery has the vector as an argument: here it becomes a NOP.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_WRITE: Final = re.compile(
    rb"\x44\x89\xab[\s\S]{4}"  # error_code
    rb"(\x89\xb3[\s\S]{4})"  # exception_index, from the register that is the argument too
    rb"\xc7\x83[\s\S]{4}\x00{4}"  # exception_is_int = 0
    rb"\x48\xc7\x83[\s\S]{4}\xff{4}"  # exception_next_eip = -1
)
"""As GCC compiled it for Debian forky (x86-64); any other code is left as it is."""
_NOP: Final = b"\x66\x0f\x1f\x44\x00\x00"


def mend(code: bytes) -> bytes | None:
    """The same program without the write; None where it is not found, or more than once."""
    found = list(_WRITE.finditer(code))
    if len(found) != 1:
        return None
    start, end = found[0].span(1)
    return code[:start] + _NOP + code[end:]


def mend_file(path: Path) -> bool:
    """Mend a QEMU in place; False where there is nothing known to mend."""
    mended = mend(path.read_bytes())
    if mended is None:
        return False
    path.write_bytes(mended)
    return True
