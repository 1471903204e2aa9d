"""The topologies that come with virtfabric, by name; or a file of one's own."""

from __future__ import annotations

from pathlib import Path
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


def read_topology(text: str) -> tuple[str, Topology]:
    """A shipped topology's name, or the path of a file: its title, and the topology.

    Raises:
        InvalidValueError: there is none, or it is wrong; names the path in the JSON.
    """
    if "/" not in text and not text.endswith(".json"):
        return text, read_shipped_topology(text)
    try:
        return Path(text).stem, parse_topology(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValueError("topology", text, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 from byte {error.start} on"
        raise InvalidValueError("topology", text, wrong) from error
