"""Functions over many decisions: judged by a simulated host, and by what books must hold.

Short and always the same; with `VIRTFABRIC_FUNCTION_LIVES=5000` a long search through other lives
each time.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Final

from function_lives import live, worlds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LONG: Final = "VIRTFABRIC_FUNCTION_LIVES"
LIVES = settings(
    max_examples=int(os.environ.get(LONG, "150")), derandomize=LONG not in os.environ,
    deadline=None, database=None, print_blob=True,
    phases=[Phase.generate],  # shrinking takes minutes suppress_health_check=list(HealthCheck),
)  # fmt: skip
LEAST: Final[dict[str, int]] = {}
"""How often it must have happened in 100 lives: what never happens proves nothing."""


def test_functions_are_never_lost_leaked_or_shared() -> None:
    seen: Counter[str] = Counter()
    lives = 0

    @LIVES
    @given(st.data())
    def search(data: st.DataObject) -> None:
        nonlocal lives
        lives += 1
        live(data.draw(worlds()), data, seen)

    search()
    print(lives, dict(seen))
    rare = {what: seen[what] for what, least in LEAST.items() if seen[what] * 100 < least * lives}
    assert not rare, f"in {lives} lives: {dict(seen)}"
