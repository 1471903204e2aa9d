"""A guest's policy as libvirt metadata: text <-> `GuestPolicy`.

Owns the metadata's form. `policy-1.rng` beside this file says what is valid; nothing here judges
whether a host can hold what a policy asks for.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from lxml import etree

from virtfabric.domxml.parse import parse_xml
from virtfabric.domxml.templates import render
from virtfabric.model.capability import parse_capability
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.policy import (
    DEFAULT_SHARES,
    POLICY_NAMESPACE,
    Admission,
    CpuPolicy,
    DevicePolicy,
    DriftAction,
    Escalation,
    Growth,
    GuestPolicy,
    MemoryPolicy,
    Placement,
    Smt,
)
from virtfabric.model.units import GIB, KIB, MIB, Bytes, MilliCpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_E = TypeVar("_E", bound=StrEnum)

POLICY_TAG: Final = f"{{{POLICY_NAMESPACE}}}policy"
_ATTRIBUTES: Final[Mapping[str, frozenset[str]]] = {
    "policy": frozenset({"version", "priority", "admission", "drift"}),
    "cpu": frozenset({"reservation", "limit", "shares", "placement", "smt"}),
    "memory": frozenset({"reservation", "limit", "shares", "tiers", "escalate", "growth"}),
    "device": frozenset({"capability", "count", "reclaimable"}),
}


def parse_policy(source: etree._Element | str) -> GuestPolicy:
    """Read a policy element; what it leaves out has the defaults of `GuestPolicy`.

    Raises:
        InvalidValueError: not valid by the schema, or a limit below its reservation; `field` is
            dotted (`cpu.reservation`, `policy.priority`).
    """
    element = parse_xml(source, what="policy") if isinstance(source, str) else source
    schema = _schema()
    if not schema.validate(element):
        _explain(element, str(schema.error_log.last_error or "is not valid"))
    return _read(element)


@cache
def _schema_text() -> bytes:
    return resources.files("virtfabric.domxml").joinpath("policy-1.rng").read_bytes()


def _schema() -> etree.RelaxNG:
    # A validator keeps the errors of its last run, so each call has its own.
    return etree.RelaxNG(etree.fromstring(_schema_text()))


def _explain(element: etree._Element, problem: str) -> NoReturn:
    """Say which field is wrong: libxml2's own message often names the element only."""
    if element.tag != POLICY_TAG:
        raise InvalidValueError("policy", element.tag, f"is not {{{POLICY_NAMESPACE}}}policy")
    if element.get("version") != "1":
        raise InvalidValueError("policy.version", element.get("version"), "is not 1")
    _check_names(element)
    _read(element)
    raise InvalidValueError("policy", etree.tostring(element, encoding="unicode")[:80], problem)


def _check_names(element: etree._Element) -> None:
    seen: set[str] = set()
    for part in (element, *element.iterchildren(etree.Element)):
        name = _local_name(part)
        known = _ATTRIBUTES.get(name)
        if known is None or (part is not element and name == "policy"):
            raise InvalidValueError("policy", f"<{name}>", "is not an element of a policy")
        if name in seen and name != "device":
            raise InvalidValueError("policy", f"<{name}>", "is there twice")
        seen.add(name)
        for attribute, value in part.attrib.items():
            if attribute not in known:
                raise InvalidValueError(f"{name}.{attribute}", value, "is not a field of a policy")


def _local_name(element: etree._Element) -> str:
    return etree.QName(element).localname


def _read(element: etree._Element) -> GuestPolicy:
    parts: dict[str, list[etree._Element]] = {}
    for child in element.iterchildren(etree.Element):
        parts.setdefault(_local_name(child), []).append(child)
    return GuestPolicy(
        priority=_number(element, "policy", "priority", 50, 0, 100),
        admission=_word(element, "policy", "admission", Admission.LAX),
        drift=_word(element, "policy", "drift", DriftAction.REPORT),
        cpu=_read_cpu(parts["cpu"][0]) if "cpu" in parts else CpuPolicy(),
        memory=_read_memory(parts["memory"][0]) if "memory" in parts else MemoryPolicy(),
        devices=_read_devices(parts.get("device", ())),
    )


def _read_cpu(element: etree._Element) -> CpuPolicy:
    reservation = MilliCpu.parse(element.get("reservation", "0"), field="cpu.reservation")
    text = element.get("limit")
    limit = None if text is None else MilliCpu.parse(text, field="cpu.limit")
    _check_order("cpu.limit", text, limit, reservation)
    return CpuPolicy(
        reservation=reservation,
        limit=limit,
        shares=_number(element, "cpu", "shares", DEFAULT_SHARES, 1, 10_000),
        placement=_word(element, "cpu", "placement", Placement.SHARED),
        smt=_word(element, "cpu", "smt", Smt.PREFER),
    )


def _read_memory(element: etree._Element) -> MemoryPolicy:
    reservation = Bytes.parse(element.get("reservation", "0"), field="memory.reservation")
    text = element.get("limit")
    limit = None if text is None else Bytes.parse(text, field="memory.limit")
    _check_order("memory.limit", text, limit, reservation)
    tiers = tuple(element.get("tiers", "dram").split(","))
    if not set(tiers) <= {"dram", "cxl"}:
        raise InvalidValueError("memory.tiers", element.get("tiers"), "knows dram and cxl only")
    return MemoryPolicy(
        reservation=reservation,
        limit=limit,
        shares=_number(element, "memory", "shares", DEFAULT_SHARES, 1, 10_000),
        tiers=tiers,
        escalate=_word(element, "memory", "escalate", Escalation.PRESS),
        growth=_word(element, "memory", "growth", Growth.VIRTIO_MEM),
    )


def _read_devices(elements: Iterable[etree._Element]) -> tuple[DevicePolicy, ...]:
    devices: dict[str, DevicePolicy] = {}
    for device in map(_read_device, elements):
        if device.capability in devices:
            raise InvalidValueError("device.capability", device.capability, "is there twice")
        devices[device.capability] = device
    return tuple(devices.values())


def _read_device(element: etree._Element) -> DevicePolicy:
    capability = parse_capability(element.get("capability", ""), field="device.capability")
    reclaimable = element.get("reclaimable", "no")
    if reclaimable not in ("yes", "no"):
        raise InvalidValueError("device.reclaimable", reclaimable, "is neither yes nor no")
    return DevicePolicy(
        capability=capability,
        count=_number(element, "device", "count", 1, 1, 64),
        reclaimable=reclaimable == "yes",
    )


def _check_order(field: str, text: str | None, limit: int | None, reservation: int) -> None:
    if limit is not None and limit < reservation:
        raise InvalidValueError(field, text, "is below the reservation")


def _number(
    element: etree._Element, part: str, name: str, default: int, low: int, high: int
) -> int:
    text = element.get(name)
    if text is None:
        return default
    field = f"{part}.{name}"
    # int() alone would take 1_0 and digits of other scripts.
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text) < 10):
        raise InvalidValueError(field, text, f"is not a number from {low} to {high}")
    if not low <= int(text) <= high:
        raise InvalidValueError(field, text, f"is not within {low} to {high}")
    return int(text)


def _word(element: etree._Element, part: str, name: str, default: _E) -> _E:
    text = element.get(name)
    if text is None:
        return default
    kind = type(default)
    try:
        return kind(text)
    except ValueError:
        words = ", ".join(word.value for word in kind)
        raise InvalidValueError(f"{part}.{name}", text, f"is not one of {words}") from None


def format_policy(policy: GuestPolicy) -> str:
    """The canonical element: all spelt out but limits, escalation and growth that nobody set."""
    cpu, memory = policy.cpu, policy.memory
    return render(
        "policy.xml.j2",
        priority=policy.priority,
        admission=policy.admission.value,
        drift=policy.drift.value,
        cpu=_given(
            ("reservation", _format_cpu(cpu.reservation)),
            ("limit", None if cpu.limit is None else _format_cpu(cpu.limit)),
            ("shares", cpu.shares),
            ("placement", cpu.placement.value),
            ("smt", cpu.smt.value),
        ),
        memory=_given(
            ("reservation", _format_size(memory.reservation)),
            ("limit", None if memory.limit is None else _format_size(memory.limit)),
            ("shares", memory.shares),
            ("tiers", ",".join(memory.tiers)),
            # what an older agent does not know is not said unless it is wanted
            ("escalate", None if memory.escalate is Escalation.PRESS else memory.escalate.value),
            ("growth", None if memory.growth is Growth.VIRTIO_MEM else memory.growth.value),
        ),
        devices=[
            _given(
                ("capability", device.capability),
                ("count", device.count),
                ("reclaimable", "yes" if device.reclaimable else "no"),
            )
            for device in policy.devices
        ],
    )


def format_bare_policy(policy: GuestPolicy) -> str:
    """The same without its namespace, as virDomainSetMetadata wants it.

    libvirt declares prefix and namespace itself (`virXMLInjectNamespace`) and fails when the
    element declares that prefix already.
    """
    return bare_policy(etree.fromstring(format_policy(policy)))


def bare_policy(source: etree._Element | str) -> str:
    """The element without its namespace and indentation, all else as somebody wrote it.

    Args:
        source: as libvirt has it, valid or not; a text may be without the namespace.
    """
    element = parse_xml(source, what="policy") if isinstance(source, str) else source
    return etree.tostring(_bare(element), encoding="unicode")


def _bare(element: etree._Element) -> etree._Element:
    name = etree.QName(element)
    own = name.namespace in (None, POLICY_NAMESPACE)
    bare = etree.Element(name.localname if own else element.tag, dict(element.attrib))
    bare.text = (element.text or "").strip() or None
    bare.extend(_bare(child) for child in element.iterchildren(etree.Element))
    return bare


def parse_bare_policy(text: str) -> GuestPolicy:
    """Read what `format_bare_policy` wrote.

    Raises:
        InvalidValueError: as `parse_policy`.
    """
    element = parse_xml(text, what="policy")
    for part in element.iter(etree.Element):
        name = etree.QName(part)
        if name.namespace is None:
            part.tag = f"{{{POLICY_NAMESPACE}}}{name.localname}"
    return parse_policy(element)


def _given(*pairs: tuple[str, object]) -> Iterable[tuple[str, object]]:
    return [pair for pair in pairs if pair[1] is not None]


def _format_size(size: int) -> str:
    """In whole units: what is written must read back as the same amount, everywhere."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(int(size))


def _format_cpu(milli: int) -> str:
    return str(milli // 1000) if milli % 1000 == 0 else f"{int(milli)}m"
