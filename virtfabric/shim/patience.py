"""How long to wait on this machine: one factor on every deadline of tests and demo.

A lab that is emulated is some twelve times slower than its host; what is waited for is the same.
`VIRTFABRIC_PATIENCE` is 1 where it is not set. It never reaches the product: what the agent, the
hook and the client wait for is theirs.
"""

from __future__ import annotations

import os
from typing import Final

PATIENCE: Final = float(os.environ.get("VIRTFABRIC_PATIENCE", "1"))


def allow(seconds: float) -> float:
    """A deadline that was chosen on a quick machine, for this one."""
    return seconds * PATIENCE
