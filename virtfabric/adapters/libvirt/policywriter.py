"""Policy metadata of guests: `ports.PolicyWriter`. Touches no other part of a definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import libvirt

from virtfabric.domxml.policy import format_bare_policy
from virtfabric.model.policy import POLICY_NAMESPACE

if TYPE_CHECKING:
    from virtfabric.adapters.libvirt.connection import LibvirtConnection
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy

_PREFIX: Final = "virtfabric"


class LibvirtPolicyWriter:
    """Implements `ports.PolicyWriter`."""

    def __init__(self, connection: LibvirtConnection) -> None:
        """Write through this connection."""
        self._connection = connection

    def write_policy(self, guest: GuestId, policy: GuestPolicy | None) -> None:
        """Set the policy in the live and the persistent definition, None removes it.

        Raises:
            GuestGoneError, HypervisorError
        """
        text = None if policy is None else format_bare_policy(policy)
        with self._connection.domain(guest) as dom:
            flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if dom.isActive() else 0
            if dom.isPersistent():
                flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
            dom.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, _PREFIX, POLICY_NAMESPACE, flags
            )
