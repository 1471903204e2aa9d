"""Memory by tier and node over many decisions: no byte granted twice, none lost, none stranded.

Short and always the same; `VIRTFABRIC_TIER_LIVES=5000` searches through so many other lives, and
prints the seed to begin with again (`VIRTFABRIC_TIER_SEED`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Final

from examples import WHOLE, examples
from tier_lives import live

from virtfabric.model.errors import Reason

LIVES: Final = int(os.environ.get("VIRTFABRIC_TIER_LIVES", str(examples(150))))
FIRST: Final = int(
    os.environ.get(
        "VIRTFABRIC_TIER_SEED",
        str(time.time_ns()) if "VIRTFABRIC_TIER_LIVES" in os.environ else "0",
    )
)
LEAST: Final = {
    "grows on cxl": 100, "takes of cxl": 10, "returns of cxl": 7, "attached": 60, "at once": 30,
    "meddled": 50, "called home": 20, "in quarantine": 40, "detached": 20,
    Reason.STRANDS_MEMORY: 20,
    Reason.NO_CAPACITY: 20, Reason.NO_MECHANISM: 100, Reason.NOT_ALLOWED: 50,
    Reason.INVALID_ARGUMENT: 20, Reason.ABOVE_LIMIT: 20, Reason.BELOW_FLOOR: 50,
}  # fmt: skip
"""How often in 100 lives at least: what never happens proves nothing."""


def test_no_byte_is_granted_twice_or_lost() -> None:
    seen: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + LIVES):
        try:
            live(seed, seen)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    rare = {what: seen[what] for what, least in LEAST.items() if seen[what] * 100 < least * LIVES}
    assert not rare or not WHOLE, f"in {LIVES} lives from {FIRST}: {dict(seen)}"
