"""Documents of `devices` (docs/dbus-api.md) -> tables and lines; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]

_CLASSES: Final = {
    "0106": "SATA", "0107": "SAS", "0108": "NVMe", "01": "storage", "0200": "Ethernet",
    "0207": "InfiniBand", "02": "network", "03": "display", "0403": "audio", "04": "multimedia",
    "0502": "CXL memory", "05": "memory", "0600": "host bridge", "0604": "port", "06": "bridge",
    "0805": "SD", "08": "system", "0b": "processor", "0c03": "USB", "0c05": "SMBus",
    "0c": "serial bus", "10": "encryption", "12": "accelerator",
}  # fmt: skip
"""By the first digits of the class; the longest that fits is the name (PCI Code and ID 1.11)."""


def device_table(functions: list[Json]) -> Table:
    """Every function that is not a bridge, by address."""
    rows = tuple(
        (
            f["address"], f["ids"], _class_text(f), ", ".join(f["interfaces"]) or "-",
            f["driver"] or "-", _number(f["node"]), _number(f["group"]),
            _purpose(f) or "-", _state(f), "; ".join(_reasons(f)),
        )
        for f in functions
        if not f["bridge"]
    )  # fmt: skip
    columns = (
        "function", "ids", "class", "interfaces", "driver", "node", "group", "capability", "state",
        "why",
    )  # fmt: skip
    return Table("devices", columns, rows, frozenset({"node", "group"}))


def device_tree_lines(functions: list[Json]) -> list[str]:
    """Ports with what is behind them, and below each function why it cannot be assigned."""
    known = {f["address"] for f in functions}
    children: dict[str | None, list[Json]] = {}
    for function in functions:
        parent = function["parent"]
        # One whose port was not told stands at the top: nothing is left out.
        children.setdefault(parent if parent in known else None, []).append(function)
    return list(_branch(children, None, ""))


def _branch(children: dict[str | None, list[Json]], parent: str | None, lead: str) -> Iterator[str]:
    below = children.get(parent, [])
    for function in below:
        last = function is below[-1]
        corner, further = ("", "") if parent is None else ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield f"{lead}{corner}{_line(function)}"
        has_children = function["address"] in children
        for reason in [] if function["bridge"] else _reasons(function):
            yield f"{lead}{further}{'│' if has_children else ' '}    {reason}"
        yield from _branch(children, function["address"], lead + further)


def _line(function: Json) -> str:
    words = [function["address"], _class_text(function), function["ids"], *function["interfaces"]]
    if function["bridge"]:
        words += [_link_text(function["link"]), _acs_text(function)]
    else:
        words.append(function["driver"] or "no driver")
    if function["node"] is not None:
        words.append(f"node {function['node']}")
    if function["group"] is not None:
        words.append(f"group {function['group']}")
    if function["pf"]:
        words.append(f"VF of {function['pf']}")
    elif function["vfs_max"]:
        words.append(f"PF with {len(function['vfs'])} of {function['vfs_max']} VFs")
    if not function["bridge"]:
        purpose = _purpose(function)
        words += [f"[{purpose}]" if purpose else "", _state(function)]
    return "  ".join(filter(None, words))


def _state(function: Json) -> str:
    if function["quarantine"]:
        return "quarantined"
    if function["holder"]:
        return f"with {function['holder']}"
    if function["obstacles"]:
        return "not assignable"
    return "free" if function["capability"] else "in no pool"


def _reasons(function: Json) -> list[str]:
    """Why the next guest cannot have it, beside that one has it already."""
    quarantine = function["quarantine"]
    found = [f"{quarantine['why']}; {quarantine['remedy']}"] if quarantine else []
    # A guest's own function is bound to vfio-pci as it should be: what the host says is no news.
    return found if function["holder"] else found + function["obstacles"]


def _class_text(function: Json) -> str:
    code = function["class"]
    return _CLASSES.get(code[:4]) or _CLASSES.get(code[:2]) or f"class {code}"


def _link_text(link: Json) -> str:
    """`8 of 16 GT/s x4`; empty where there is no link."""
    if not link["speed"]:
        return ""
    slower = f"{link['speed'] / 1000:g} of " if link["speed"] < link["speed_max"] else ""
    return f"{slower}{max(link['speed'], link['speed_max']) / 1000:g} GT/s x{link['width']}"


def _acs_text(function: Json) -> str:
    return {True: "ACS isolates", False: "ACS does not isolate", None: ""}[function["acs"]]


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _purpose(function: Json) -> str:
    """Its capability, and the slice of a card that it is."""
    one = function.get("slice")
    words = [function["capability"], one and f"{one['slice']} of {one['card']}"]
    return ", ".join(filter(None, words))
