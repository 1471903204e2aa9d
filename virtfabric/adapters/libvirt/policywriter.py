"""Policy metadata of guests: `ports.PolicyWriter`, and the handler of the step that writes it.

Touches no other part of a definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtSetting
from virtfabric.domxml.policy import bare_policy, format_bare_policy
from virtfabric.model.errors import VerificationError
from virtfabric.model.plan import Definition, SetPolicy
from virtfabric.model.policy import POLICY_NAMESPACE

if TYPE_CHECKING:
    from virtfabric.adapters.libvirt.connection import LibvirtConnection
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy

_PREFIX: Final = "virtfabric"
_FLAGS: Final = {
    Definition.LIVE: libvirt.VIR_DOMAIN_AFFECT_LIVE,
    Definition.CONFIG: libvirt.VIR_DOMAIN_AFFECT_CONFIG,
}


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
            _write(dom, text, flags)


class PolicyHandler(LibvirtSetting[SetPolicy]):
    """Carries out `SetPolicy`. Of a guest that has stopped only the live definition is gone."""

    step_type = SetPolicy

    def put(self, step: SetPolicy) -> None:
        """Write the metadata, or remove it."""
        with self.host.connection.domain(step.guest) as dom:
            _write(dom, step.after or None, _FLAGS[step.definition])

    def check(self, step: SetPolicy) -> None:
        """The definition has it."""
        with self.host.connection.domain(step.guest) as dom:
            found = _read(dom, _FLAGS[step.definition])
        if found != step.after:
            raise VerificationError(
                f"{step.describe()}: {step.after or 'none'} expected, {found or 'none'} found"
            )


def _write(dom: Any, text: str | None, flags: int) -> None:
    dom.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, _PREFIX, POLICY_NAMESPACE, flags)


def _read(dom: Any, flags: int) -> str:
    try:
        text = dom.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, POLICY_NAMESPACE, flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            raise
        return ""
    return bare_policy(text)
