"""What a guest needs to compute through cards: a program, and the word that starts it.

Owns packing both as an archive that follows the guest image's own initrd (the kernel unpacks one
after the other).
"""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def build_archive() -> bytes:
    """The archive, compressed. Needs gcc."""
    # the shim imports what plain users of the rest need not have installed
    from virtfabric.shim.cpio import PROGRAM, format_cpio

    with tempfile.TemporaryDirectory(prefix="virtfabric-vfaes-") as scratch:
        program = Path(scratch) / "vfaes"
        argv = ["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program)]
        subprocess.run([*argv, str(HERE / "vfaes.c")], check=True)
        members = [
            ("bin/vfaes", PROGRAM, program.read_bytes()),
            ("uevent", PROGRAM, (HERE / "uevent").read_bytes()),
        ]
    return gzip.compress(format_cpio(members), 6, mtime=0)
