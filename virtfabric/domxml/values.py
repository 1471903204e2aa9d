"""Numbers, sizes and sets in libvirt's XML; an error names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from lxml import etree

_UNITS: Final = {
    "b": 1, "bytes": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip


def read_int(text: str | None, field: str) -> int:
    """A whole number.

    Raises:
        InvalidValueError: it is none.
    """
    try:
        return int(text or "")
    except ValueError:
        raise InvalidValueError(field, text, "is not a number") from None


def read_size(element: etree._Element | None, field: str, *, attribute: str | None = None) -> Bytes:
    """An amount with libvirt's `unit` (KiB when it is not given); an absent element is 0.

    Raises:
        InvalidValueError: no number, or a unit that libvirt does not know.
    """
    if element is None:
        return Bytes(0)
    unit = element.get("unit", "KiB")
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise InvalidValueError(f"{field}.unit", unit, "is not a unit of memory")
    text = element.text if attribute is None else element.get(attribute)
    return Bytes(read_int(text, field) * factor)


def read_cpus(element: etree._Element | None, attribute: str, field: str) -> CpuSet:
    """A set of pCPUs or nodes in an attribute; empty where there is none.

    Raises:
        InvalidValueError: not such a list.
    """
    text = None if element is None else element.get(attribute)
    return CpuSet() if text is None else CpuSet.parse(text, field=field)
