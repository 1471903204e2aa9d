"""`ports`: the PCIe ports of a guest, and more of them for its next boot.

Adding ports edits a guest's persistent definition, which nothing else here does but for policy
metadata: only on an operator's explicit word, and only where it reads back as the former one and
the new ports. A port cannot be added to a running guest.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from virtfabric.domxml.pciports import (
    Extension,
    add_ports,
    check_extension,
    free_ports,
    read_ports,
)
from virtfabric.model.errors import (
    Reason,
    Refusal,
    RefusedError,
    StaleDefinitionError,
    VerificationError,
)
from virtfabric.policy.portbudget import describe_shortage, missing_ports

if TYPE_CHECKING:
    from virtfabric.domxml.pciports import Port
    from virtfabric.model.guest import GuestState
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.ports import AuditLog, DefinitionEditor

    Json = dict[str, Any]

log = logging.getLogger(__name__)


class PortDesk:
    """Shows ports and adds them."""

    def __init__(self, editor: DefinitionEditor, audit: AuditLog) -> None:
        self._editor = editor
        self._audit = audit

    def show(self, guest: GuestState) -> Json:
        """As documented in docs/dbus-api.md."""
        found = self._editor.read_definitions(guest.uuid)
        return {
            "uuid": guest.uuid, "name": guest.name,
            "live": _side(found.live), "persistent": _side(found.persistent),
        }  # fmt: skip

    def add(self, guest: GuestState, count: int, *, by: str) -> Json:
        """Add root ports to the persistent definition; what `show` answers, and `added`.

        Raises:
            InvalidValueError: `count` is below 1.
            RefusedError: NO_MECHANISM, NO_CAPACITY or STALE; nothing was changed.
            VerificationError: libvirt made something else of it; the former definition is back.
        """
        before = self._editor.read_definitions(guest.uuid).persistent
        if before is None:
            raise RefusedError(
                Refusal(
                    Reason.NO_MECHANISM,
                    f"{guest.name} is transient: it has no definition to start from again",
                )
            )
        answer = add_ports(before, count)
        if isinstance(answer, Refusal):
            raise RefusedError(answer)
        about = {"guest": guest.uuid, "name": guest.name, "by": by, "ports": list(answer.indexes)}
        self._audit.append("ports.adding", [guest.uuid], about)
        try:
            self._replace(guest, before, answer)
        except Exception as error:
            self._audit.append("ports.failed", [guest.uuid], about | {"why": str(error)})
            raise
        self._audit.append("ports.added", [guest.uuid], about)
        return self.show(guest) | {"added": list(answer.indexes)}

    def warn(self, guest: GuestState, policy: GuestPolicy) -> list[str]:
        """What is to be known about ports where this becomes the policy of a guest."""
        if not policy.devices:
            return []
        found = self._editor.read_definitions(guest.uuid)
        if found.persistent is not None:
            missing = missing_ports(policy, free_ports(found.persistent))
            if missing:
                return [describe_shortage(guest.name, missing)]
        if found.live is None:
            return []
        plugged = sum(device.ours for device in guest.devices)
        missing = missing_ports(policy, free_ports(found.live), plugged=plugged)
        if not missing:
            return []
        if found.persistent is None:
            return [describe_shortage(guest.name, missing)]
        return [
            f"{guest.name} has too few PCIe root ports now ({missing}); its next start brings them"
        ]

    def _replace(self, guest: GuestState, before: str, wanted: Extension) -> None:
        try:
            self._editor.replace_definition(guest.uuid, before, wanted.xml)
        except StaleDefinitionError as error:
            raise RefusedError(Refusal(Reason.STALE, f"{error}; ask again")) from error
        now = self._editor.read_definitions(guest.uuid).persistent
        wrong = "it is gone" if now is None else check_extension(before, now, wanted.indexes)
        if not wrong:
            return
        log.error("definition of %s after adding ports: %s; taking it back", guest.name, wrong)
        if now is not None:
            self._editor.replace_definition(guest.uuid, now, before)
        raise VerificationError(
            f"libvirt's definition of {guest.name} is not the former one with more ports: {wrong}; "
            "the former one is back",
            advice="add the ports with virsh edit",
        )


def _side(text: str | None) -> Json | None:
    if text is None:
        return None
    ports = read_ports(text)
    return {"free": sum(p.free for p in ports), "ports": [_port(p) for p in ports]}


def _port(port: Port) -> Json:
    return {
        "index": port.index, "model": port.model, "address": port.address,
        "hotplug": port.hotplug, "free": port.free, "users": list(port.users),
    }  # fmt: skip
