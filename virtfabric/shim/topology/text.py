"""Topology files: JSON text <-> `Topology`. What `parse_topology` returns has passed all checks."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, TypeVar

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import GIB, KIB, MIB, Bytes, CpuSet
from virtfabric.shim.topology.checks import check_topology
from virtfabric.shim.topology.model import (
    Card,
    Cpu,
    Cxl,
    CxlPort,
    CxlSwitch,
    Edu,
    HostBridge,
    Igb,
    Node,
    Nvme,
    NvmeVfs,
    PciBridge,
    RootPort,
    Topology,
    Type3,
    Window,
)
from virtfabric.shim.topology.shape import check_shape, format_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

Document = dict[str, Any]
_Steps = tuple[str | int, ...]

MAX_TEXT: Final = 1 << 20
"""Characters; the shipped ones have a few thousand."""
_UNITS: Final = (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1))


def parse_topology(text: str) -> Topology:
    """Read a topology file.

    Raises:
        InvalidValueError: not JSON, not of the schema's shape, or impossible; `field` is the path
            in the JSON (`cxl.windows[0].targets[1]`).
    """
    document = _parse_json(text)
    check_shape(document)
    topology = _read(document)
    check_topology(topology)
    return topology


def format_topology(topology: Topology) -> str:
    """The file of a topology, ending in a newline; what has its default is left out."""
    document: Document = {"version": 1} | _fields(topology)
    functions = {kind: document.pop(kind) for kind in ("igb", "nvme", "edu") if kind in document}
    if functions:
        document["functions"] = functions
    # the order that a reader expects: what plugs into the ports after the ports
    ordered = {key: document[key] for key in _ORDER if key in document}
    return json.dumps(ordered, indent=2) + "\n"


def format_size(size: int) -> str:
    """An amount in the largest unit that holds it exactly, as topology files and QEMU users do."""
    unit, factor = next((unit, factor) for unit, factor in _UNITS if size % factor == 0)
    return f"{size // factor}{unit}"


_ORDER: Final = (
    "version", "description", "cpu", "memory", "nodes", "distances", "iommu", "bridges", "ports",
    "pci_bridges", "functions", "cards", "cxl",
)  # fmt: skip


def _fields(thing: object) -> Document:
    assert dataclasses.is_dataclass(thing)
    document: Document = {}
    for entry in dataclasses.fields(thing):
        value = getattr(thing, entry.name)
        made = entry.default_factory
        default = entry.default if made is dataclasses.MISSING else made()
        if value != default:
            document[entry.name] = _plain(entry.name, value)
    return document


def _plain(name: str, value: object) -> object:
    match value:
        case Bytes():
            return format_size(value)
        case CpuSet():
            return str(value)
        case tuple():
            return [_plain(name, entry) for entry in value]
        case int() if name == "serial":
            return f"{value:#x}"
        case None | bool() | int() | str():
            return value
        case _:
            return _fields(value)


def _parse_json(text: str) -> object:
    if len(text) > MAX_TEXT:
        raise InvalidValueError("topology", len(text), f"characters are more than {MAX_TEXT}")
    try:
        document = json.loads(text, object_pairs_hook=_read_pairs)
        repeated = next(_find_repeated(document, ()), None)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError("topology", text[:40], f"is not JSON: {error}") from None
    if repeated:
        steps, value = repeated
        raise InvalidValueError(format_path(steps), value, "is a key that is there twice")
    return document


@dataclasses.dataclass(frozen=True, slots=True)
class _Repeated:
    """Stands for an object with a key that is there twice."""

    key: str
    value: object


def _read_pairs(pairs: list[tuple[str, Any]]) -> Document | _Repeated:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    return _Repeated(key, document[key])


def _find_repeated(value: Any, steps: _Steps) -> Iterator[tuple[_Steps, object]]:
    match value:
        case _Repeated():
            yield (*steps, value.key), value.value
        case dict():
            for key, entry in value.items():
                yield from _find_repeated(entry, (*steps, key))
        case list():
            for number, entry in enumerate(value):
                yield from _find_repeated(entry, (*steps, number))


def _read(document: Any) -> Topology:
    functions = document.get("functions", {})
    distances = document.get("distances")
    return Topology(
        description=document.get("description", ""),
        cpu=Cpu(**document["cpu"]),
        memory=_size(document, "memory", ""),
        nodes=_each(document, "nodes", _node),
        distances=None if distances is None else tuple(tuple(row) for row in distances),
        iommu=document.get("iommu", True),
        bridges=_each(document, "bridges", lambda raw, _: HostBridge(**raw)),
        ports=_each(document, "ports", lambda raw, _: RootPort(**raw)),
        pci_bridges=_each(document, "pci_bridges", lambda raw, _: PciBridge(**raw)),
        igb=_each(functions, "igb", lambda raw, _: Igb(**raw), "functions."),
        nvme=_each(functions, "nvme", _nvme, "functions."),
        edu=_each(functions, "edu", lambda raw, _: Edu(**raw), "functions."),
        cards=_each(
            document, "cards", lambda raw, _: Card(**raw | {"slices": tuple(raw["slices"])})
        ),
        cxl=_cxl(document["cxl"]) if "cxl" in document else None,
    )


def _each(
    document: Document, key: str, read: Callable[[Document, str], _T], path: str = ""
) -> tuple[_T, ...]:
    return tuple(
        read(raw, f"{path}{key}[{number}].") for number, raw in enumerate(document.get(key, ()))
    )


def _size(raw: Document, key: str, path: str) -> Bytes | None:
    return Bytes.parse(raw[key], field=path + key) if key in raw else None


def _sizes(raw: Document, path: str, *keys: str) -> Document:
    return {key: Bytes.parse(raw[key], field=path + key) for key in keys if key in raw}


def _node(raw: Document, path: str) -> Node:
    cpus = CpuSet.parse(raw.get("cpus", ""), field=f"{path}cpus")
    return Node(**raw | _sizes(raw, path, "memory") | {"cpus": cpus})


def _nvme(raw: Document, path: str) -> Nvme:
    vfs = NvmeVfs(**raw["vfs"]) if "vfs" in raw else None
    return Nvme(**raw | _sizes(raw, path, "size") | {"vfs": vfs})


def _type3(raw: Document, path: str) -> Type3:
    sizes = _sizes(raw, path, "volatile", "persistent", "label_area")
    return Type3(**raw | sizes | {"serial": int(raw["serial"], 16)})


def _window(raw: Document, path: str) -> Window:
    sizes = _sizes(raw, path, "size", "granularity")
    return Window(**raw | sizes | {"targets": tuple(raw["targets"])})


def _cxl(raw: Document) -> Cxl:
    return Cxl(
        bridges=_each(raw, "bridges", lambda entry, _: HostBridge(**entry)),
        ports=_each(raw, "ports", lambda entry, _: CxlPort(**entry)),
        switches=_each(
            raw,
            "switches",
            lambda entry, _: CxlSwitch(**entry | {"downstream": tuple(entry["downstream"])}),
        ),
        devices=_each(raw, "devices", _type3, "cxl."),
        windows=_each(raw, "windows", _window, "cxl."),
    )
