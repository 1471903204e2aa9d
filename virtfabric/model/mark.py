"""The mark of the pins that this agent set on a running guest, to tell them from the operator's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Collection

MARK_NAMESPACE: Final = "urn:virtfabric:placement:1"
_ENTRY: Final = re.compile(r"(emulator|[0-9]{1,5})=([0-9,-]+)(?:/([0-9,-]+))?")


@dataclass(frozen=True, slots=True)
class MarkedPin:
    """One pin of ours.

    Attributes:
        vcpu: its number, None for the emulator threads.
        cpus: the pCPUs that the agent chose.
        instead: those that the operator's definition has; empty where it has no such pin.
    """

    vcpu: int | None
    cpus: CpuSet
    instead: CpuSet = CpuSet()

    def __str__(self) -> str:
        what = "emulator" if self.vcpu is None else str(self.vcpu)
        return f"{what}={self.cpus}" + (f"/{self.instead}" if self.instead else "")


@dataclass(frozen=True, slots=True)
class PinMark:
    """All pins of ours on one guest; false where there are none. Prints as `0=2 1=3/2-3`."""

    pins: tuple[MarkedPin, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pins)

    def __str__(self) -> str:
        return " ".join(map(str, self.pins))

    @classmethod
    def parse(cls, text: str, *, field: str = "mark") -> Self:
        """Read what it prints.

        Raises:
            InvalidValueError: not that.
        """
        pins = []
        for part in text.split():
            match = _ENTRY.fullmatch(part)
            if match is None:
                raise InvalidValueError(field, text, "is not a list of pins")
            cpus, instead = (CpuSet.parse(t or "", field=field) for t in match.group(2, 3))
            vcpu = None if match[1] == "emulator" else int(match[1])
            pins.append(MarkedPin(vcpu, cpus, instead))
        return cls(tuple(pins))

    def find(self, vcpu: int | None, cpus: CpuSet) -> MarkedPin | None:
        """The entry for this very pin; None for one that somebody else set."""
        return next((p for p in self.pins if p.vcpu == vcpu and p.cpus == cpus), None)

    def only(self, vcpus: Collection[int | None]) -> PinMark:
        """Without the entries of other vCPUs."""
        return PinMark(tuple(p for p in self.pins if p.vcpu in vcpus))


NO_MARK: Final = PinMark()
