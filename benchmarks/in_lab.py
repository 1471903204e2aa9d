"""A measurement in a nested lab, again in a new one where the emulator has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from demo.labhost import LabError

if TYPE_CHECKING:
    from collections.abc import Callable

    from demo.labhost import LabHost

Figures = TypeVar("Figures")
TRIES = 3


def measure_in_lab(lab: LabHost, measure: Callable[[LabHost], Figures]) -> Figures:
    """What `measure` found in the lab, which is up meanwhile.

    Raises:
        LabError: it failed in a lab that is sound, or three labs have fallen over.
    """
    for left in reversed(range(TRIES)):
        lab.start()
        try:
            return measure(lab)
        except LabError:
            faults = lab.find_faults()
            if not faults or not left:
                raise
            print(f"the emulator has failed ({'; '.join(faults)}): once more, in a new lab")
        finally:
            lab.stop()
    raise AssertionError("unreachable")
