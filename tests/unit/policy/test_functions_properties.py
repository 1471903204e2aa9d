"""Functions over many decisions: judged by a simulated host, and by what books must hold.

Short and always the same; `VIRTFABRIC_FUNCTION_LIVES=5000` searches through so many other lives,
and prints the seed to begin with again (`VIRTFABRIC_FUNCTION_SEED`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Final

import pytest
from examples import WHOLE, examples
from function_lives import live

from virtfabric.model.errors import Reason

LIVES: Final = int(os.environ.get("VIRTFABRIC_FUNCTION_LIVES", str(examples(120))))
FIRST: Final = int(
    os.environ.get(
        "VIRTFABRIC_FUNCTION_SEED",
        str(time.time_ns()) if "VIRTFABRIC_FUNCTION_LIVES" in os.environ else "0",
    )
)
LEAST: Final = {
    "takes": 25, "returns": 18, "wishes": 30, "pulls": 8, "grabbed": 8, "vanished": 20,
    "profiles": 100,
    Reason.STRANDS_MEMORY: 20, Reason.NO_CAPACITY: 40, Reason.DEVICE_IN_USE: 30,
    Reason.NO_FREE_PORT: 10, Reason.ABOVE_LIMIT: 20, Reason.BELOW_FLOOR: 15,
}  # fmt: skip
"""How often in 100 lives at least: what never happens proves nothing."""


PINNED: Final = (701551, 9000629)
"""In these a limit of a link outlived the functions that it was for."""


@pytest.mark.parametrize("seed", PINNED)
def test_a_life_that_went_wrong_once(seed: int) -> None:
    live(seed, Counter())


def test_functions_are_never_lost_leaked_or_shared() -> None:
    seen: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + LIVES):
        try:
            live(seed, seen)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    rare = {what: seen[what] for what, least in LEAST.items() if seen[what] * 100 < least * LIVES}
    assert not rare or not WHOLE, f"in {LIVES} lives from {FIRST}: {dict(seen)}"
