"""Persistent definitions of guests: `ports.DefinitionEditor`.

The one place that defines a guest of a user's. It decides nothing about what is in the XML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.model.errors import StaleDefinitionError
from virtfabric.ports import Definitions

if TYPE_CHECKING:
    from virtfabric.adapters.libvirt.connection import LibvirtConnection
    from virtfabric.model.ids import GuestId

# Without SECURE libvirt leaves passwords out, and defining what it printed would remove them.
_PERSISTENT: Final = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE


class LibvirtDefinitions:
    """Implements `ports.DefinitionEditor`."""

    def __init__(self, connection: LibvirtConnection) -> None:
        """Work through this connection."""
        self._connection = connection

    def read_definitions(self, guest: GuestId) -> Definitions:
        """Both.

        Raises:
            GuestGoneError, HypervisorGoneError, HypervisorError
        """
        with self._connection.domain(guest) as dom:
            live = dom.XMLDesc(0) if dom.isActive() else None
            return Definitions(live, _read(dom) if dom.isPersistent() else None)

    def replace_definition(self, guest: GuestId, before: str, after: str) -> None:
        """Make `after` the persistent definition of a guest that has `before`.

        libvirt has no call that compares and defines at once: what somebody else defines within
        the few milliseconds between the two is lost.

        Raises:
            StaleDefinitionError: somebody changed it meanwhile; nothing was done.
            GuestGoneError, HypervisorGoneError, HypervisorError
        """
        with self._connection.domain(guest) as dom:
            if not dom.isPersistent() or _read(dom) != before:
                raise StaleDefinitionError(
                    f"the persistent definition of {dom.name()} changed meanwhile",
                    advice="ask again",
                )
            dom.connect().defineXML(after)


def _read(dom: Any) -> str:
    return str(dom.XMLDesc(_PERSISTENT))
