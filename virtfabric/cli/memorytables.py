"""The document of `memory` (docs/dbus-api.md) -> tables and lines; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.cli.screen import Table
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]


def memory_tables(memory: Json) -> list[Table]:
    """Nodes always; what is CXL's only where there is any."""
    tables = [_nodes(memory["nodes"])]
    if memory["windows"] or memory["memdevs"]:
        tables += [
            _windows(memory["windows"]), _regions(memory["regions"]), _memdevs(memory["memdevs"])
        ]  # fmt: skip
    return tables


def problem_lines(memory: Json) -> list[str]:
    """What is wrong, in words."""
    held = [f"quarantine: {q['why']}; to do: {q['remedy']}" for q in memory["quarantine"]]
    return held + [f"problem: {text}" for text in memory["problems"]]


def _nodes(nodes: list[Json]) -> Table:
    rows = tuple(
        (
            str(n["node"]), n["tier"], n["cpus"] or "-", _size(n["total"]), _size(n["free"]),
            _huge_pages(n) or "-", _speed(n) or "-", "yes" if n["offlinable"] else "no",
            n["why_not_offlinable"],
        )
        for n in nodes
    )  # fmt: skip
    columns = (
        "node", "tier", "CPUs", "total", "free", "huge pages", "speed", "offlinable", "why not",
    )  # fmt: skip
    return Table("nodes", columns, rows, frozenset({"node", "total", "free"}))


def _windows(windows: list[Json]) -> Table:
    rows = tuple(
        (
            w["base"], _size(w["size"]), _size(w["free"]),
            "+".join(kind for kind in ("ram", "pmem") if w[kind]), _interleaving(w),
            ", ".join(w["targets"]), w["name"],
        )
        for w in windows
    )  # fmt: skip
    columns = ("window", "size", "free", "for", "interleaved", "bridges", "decoder")
    return Table("windows", columns, rows, frozenset({"size", "free"}))


def _regions(regions: list[Json]) -> Table:
    rows = tuple(
        (
            r["name"], r["window"] or "-", _size(r["size"]), r["mode"],
            _interleaving(r), ", ".join(m or "?" for m in r["members"]) or "-",
            _nodes_of(r), _state(r), "virtfabric" if r["ours"] else "by hand",
        )
        for r in regions
    )  # fmt: skip
    columns = (
        "region", "window", "size", "mode", "interleaved", "memdevs", "node", "state", "made",
    )  # fmt: skip
    return Table("regions", columns, rows, frozenset({"size"}))


def _memdevs(memdevs: list[Json]) -> Table:
    rows = tuple(
        (
            m["serial"] or "?", m["name"], m["address"] or "-", m["port"] or "-",
            _size(m["ram"]) if m["ram"] else "-", _size(m["pmem"]) if m["pmem"] else "-",
            m["region"] or "-", m["health"] or "-", str(len(m["poison"])), "; ".join(m["problems"]),
        )
        for m in memdevs
    )  # fmt: skip
    columns = (
        "serial", "memdev", "function", "port", "ram", "pmem", "region", "health", "poisoned",
        "not used because",
    )  # fmt: skip
    return Table("memdevs", columns, rows, frozenset({"ram", "pmem", "poisoned"}))


def memory_tree_lines(memory: Json) -> list[str]:
    """Nodes, windows with their regions, then ports with the memdevs behind them."""
    lines = [_node_line(node) for node in memory["nodes"]]
    for window in memory["windows"]:
        lines.append(_window_line(window))
        regions = [r for r in memory["regions"] if r["window"] == window["base"]]
        lines += [f"   {_region_line(region)}" for region in regions]
    known = {port["name"] for port in memory["ports"]}
    lost = [r for r in memory["regions"] if r["window"] is None]
    lines += [_region_line(region) for region in lost]
    for top in (port for port in memory["ports"] if port["parent"] not in known):
        lines += _branch(memory, top, "", "")
    lines += [_memdev_line(m) for m in memory["memdevs"] if m["port"] not in known]
    return lines


def _branch(memory: Json, port: Json, corner: str, lead: str) -> Iterator[str]:
    yield f"{lead}{corner}{port['kind']} {port['name']}  {port['device']}"
    further = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[corner]
    memdevs = [m for m in memory["memdevs"] if m["port"] == port["name"]]
    ports = [p for p in memory["ports"] if p["parent"] == port["name"]]
    left = len(memdevs) + len(ports)
    for memdev in memdevs:
        left -= 1
        yield f"{further}{'├─ ' if left else '└─ '}{_memdev_line(memdev)}"
    for below in ports:
        left -= 1
        yield from _branch(memory, below, "├─ " if left else "└─ ", further)


def _node_line(node: Json) -> str:
    words = [
        f"node {node['node']}", node["tier"],
        f"{_size(node['free'])} of {_size(node['total'])} free",
        f"CPUs {node['cpus']}" if node["cpus"] else "no CPUs", _huge_pages(node), _speed(node),
        f"of {node['region']}" if node["region"] else "",
        "offlinable" if node["offlinable"] else f"not offlinable: {node['why_not_offlinable']}",
    ]  # fmt: skip
    return "  ".join(filter(None, words))


def _window_line(window: Json) -> str:
    kinds = "+".join(kind for kind in ("ram", "pmem") if window[kind])
    words = [
        f"window {window['base']}", f"{_size(window['free'])} of {_size(window['size'])} free",
        kinds, _interleaving(window), f"over {', '.join(window['targets'])}",
    ]  # fmt: skip
    return "  ".join(filter(None, words))


def _region_line(region: Json) -> str:
    words = [
        region["name"], _size(region["size"]), region["mode"], _interleaving(region),
        f"memdevs {', '.join(m or '?' for m in region['members']) or 'none'}",
        f"node {_nodes_of(region)}", _state(region), "" if region["ours"] else "made by hand",
    ]  # fmt: skip
    return "  ".join(filter(None, words))


def _memdev_line(memdev: Json) -> str:
    amounts = [f"{_size(memdev[kind])} {kind}" for kind in ("ram", "pmem") if memdev[kind]]
    words = [
        memdev["serial"] or "?", memdev["name"], memdev["address"] or "", *amounts,
        memdev["region"] or "free",
        f"health {memdev['health']}" if memdev["health"] else "",
        f"{len(memdev['poison'])} poisoned" if memdev["poison"] else "",
        "" if memdev["usable"] else f"not used: {'; '.join(memdev['problems'])}",
    ]  # fmt: skip
    return "  ".join(filter(None, words))


def _interleaving(part: Json) -> str:
    return f"{part['ways']} x {part['granularity']}B" if part["ways"] > 1 else ""


def _nodes_of(region: Json) -> str:
    return ", ".join(str(d["node"]) for d in region["dax"] if d["node"] is not None) or "-"


def _state(region: Json) -> str:
    states = [d["state"] + (", movable" if d["movable"] else "") for d in region["dax"]]
    return "; ".join(states) or ("committed" if region["committed"] else "not committed")


def _huge_pages(node: Json) -> str:
    """`8 x 2MiB, 3 free (1 promised), 4 made for db`."""
    return "; ".join(_pool(pages) for pages in node["huge_pages"] if pages["total"])


def _pool(pages: Json) -> str:
    parts = [f"{pages['total']} x {Bytes(pages['size'])}", f"{pages['free']} free"]
    if pages["reserved"]:
        parts[-1] += f" ({pages['reserved']} promised)"
    parts += [f"{count} made for {name}" for name, count in pages["made"].items()]
    return ", ".join(parts)


def _speed(node: Json) -> str:
    told = [f"{node['bandwidth']} MB/s" if node["bandwidth"] else "",
            f"{node['latency']} ns" if node["latency"] else ""]  # fmt: skip
    return ", ".join(filter(None, told))


def _size(amount: int) -> str:
    return Bytes(amount).rounded()
