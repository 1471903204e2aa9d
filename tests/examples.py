"""How many examples a property test looks at: all in `make test`, a share of them in `make check`.

`VIRTFABRIC_EXAMPLES` is the share, 1 by default.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings

SHARE: Final = float(os.environ.get("VIRTFABRIC_EXAMPLES", "1"))
WHOLE: Final = SHARE >= 1
"""Only then it says something how often what is rare came about."""


def examples(number: int) -> int:
    """So many of `number`, and never none."""
    return max(3, round(number * SHARE))


# no time limit for an example either: machines are busy
settings.register_profile("share", max_examples=examples(100), deadline=None)
settings.load_profile("share")
