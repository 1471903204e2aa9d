"""The topologies that come with virtfabric, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.errors import InvalidValueError
from virtfabric.resources import topologies_dir
from virtfabric.shim.topology.text import parse_topology

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology


def shipped_topologies() -> tuple[str, ...]:
    """Their names, in alphabetical order.

    Raises:
        InstallationError: the package was installed without them.
    """
    files = topologies_dir().glob("*.json")
    return tuple(sorted(file.stem for file in files if not file.name.endswith(".schema.json")))


def read_shipped_topology(name: str) -> Topology:
    """Read one of them.

    Raises:
        InvalidValueError: no such topology.
        InstallationError: the package was installed without them.
    """
    if name not in shipped_topologies():
        known = ", ".join(shipped_topologies())
        raise InvalidValueError("topology", name, "is not shipped", advice=f"there are {known}")
    return parse_topology((topologies_dir() / f"{name}.json").read_text())
