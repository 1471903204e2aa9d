"""What every step of a plan is: data with the value it expects and the one it brings about."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from virtfabric.model.adapter import SliceSpec
from virtfabric.model.card import HeldSlice
from virtfabric.model.device import VfSettings
from virtfabric.model.mark import PinMark
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from virtfabric.model.ids import GuestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Base of all steps.

    Attributes:
        guest, name: whose hardware changes (the name is for people only).
        optional: failing leaves a residue instead of undoing the plan (a vCPU that will not
            leave although its time has been taken already).
    """

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs_guest: ClassVar[bool] = False

    guest: GuestId
    name: str = ""
    optional: bool = False

    def inverse(self) -> Self:
        """The step that undoes this one."""
        return replace(self, before=self.after, after=self.before)  # type: ignore[attr-defined, call-arg]

    def to_json(self) -> dict[str, Any]:
        """Versioned encoding: sets, marks and settings as text, slices as tables, else integers."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        body = {k: _plain(v) for k, v in values.items()}
        return {"kind": self.kind, "version": self.version, **body}

    def describe(self) -> str:
        """One line for a person."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.describe()


def _plain(value: object) -> object:
    if isinstance(value, CpuSet | PinMark | VfSettings):
        return str(value)
    if isinstance(value, SliceSpec | HeldSlice):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value
