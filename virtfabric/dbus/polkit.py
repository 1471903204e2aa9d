"""Asks polkit whether a caller may; answers "not here" where polkit does not run.

Called from worker threads (`daemon.authority`): each question has a short-lived connection of its
own, so that it never waits for the service's. Only callers that are not root are asked about.

Source: polkit(8), interface org.freedesktop.PolicyKit1.Authority, method CheckAuthorization.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from dbus_next import Message, MessageType, Variant

from virtfabric.dbus.link import Link
from virtfabric.model.errors import UnreachableError

if TYPE_CHECKING:
    from virtfabric.daemon.api import Caller

log = logging.getLogger(__name__)

NAME: Final = "org.freedesktop.PolicyKit1"
PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"
TIMEOUT_S: Final = 5.0
_ABSENT: Final = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
)


class Polkit:
    """`daemon.authority.Polkit` over a bus; `address` None is the system bus."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def __call__(self, caller: Caller, action: str) -> bool | None:
        """Whether polkit authorises the caller; None where it does not run.

        A caller without a bus connection cannot be asked about and is not authorised by polkit.
        An answer that does not come, or makes no sense, is a no.
        """
        if not caller.bus_name:
            return None
        try:
            return asyncio.run(self._ask(caller.bus_name, action))
        except UnreachableError as error:
            log.warning("polkit does not answer about %s: %s", action, error)
            return False

    async def _ask(self, bus_name: str, action: str) -> bool | None:
        link = await Link.connect(self._address, lambda _message: None, timeout_s=TIMEOUT_S)
        try:
            subject = ["system-bus-name", {"name": Variant("s", bus_name)}]
            reply = await link.call(
                Message(
                    destination=NAME,
                    path=PATH,
                    interface=INTERFACE,
                    member="CheckAuthorization",
                    signature="(sa{sv})sa{ss}us",
                    # flags 0: no dialogue; a service does not wait for a person
                    body=[subject, action, {}, 0, ""],
                ),
                timeout_s=TIMEOUT_S,
            )
        finally:
            await link.close()
        if reply.message_type is MessageType.ERROR:
            if reply.error_name in _ABSENT:
                return None
            log.warning("polkit about %s: %s", action, reply.error_name)
            return False
        return reply.signature == "(bba{ss})" and bool(reply.body[0][0])
