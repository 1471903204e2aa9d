"""Handler of the step that marks this agent's pins in a guest's live metadata.

Owns a namespace of its own there; the policy beside it, and the persistent definition, are never
touched.
"""

from __future__ import annotations

from typing import Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtSetting, has_code
from virtfabric.domxml.mark import format_bare_mark, parse_mark
from virtfabric.model.errors import HypervisorError, VerificationError
from virtfabric.model.mark import MARK_NAMESPACE, NO_MARK, PinMark
from virtfabric.model.plan import MarkPins

_PREFIX: Final = "placement"
_ELEMENT: Final = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE


class MarkHandler(LibvirtSetting[MarkPins]):
    """Carries out `MarkPins`."""

    step_type = MarkPins

    def put(self, step: MarkPins) -> None:
        """Write the mark, or remove it; libvirt sends one METADATA_CHANGE event."""
        text = format_bare_mark(step.after) if step.after else None
        with self.host.connection.domain(step.guest) as dom:
            dom.setMetadata(_ELEMENT, text, _PREFIX, MARK_NAMESPACE, _LIVE)

    def check(self, step: MarkPins) -> None:
        """libvirt has this mark in the live definition."""
        found = self._read(step)
        if found != step.after:
            raise VerificationError(f"{step.name}: a mark {step.after} expected, {found} found")

    def _read(self, step: MarkPins) -> PinMark:
        try:
            with self.host.connection.domain(step.guest) as dom:
                return parse_mark(dom.metadata(_ELEMENT, MARK_NAMESPACE, _LIVE))
        except HypervisorError as error:
            if not has_code(error, libvirt.VIR_ERR_NO_DOMAIN_METADATA):
                raise
            return NO_MARK
