"""Who is calling: the bus vouches for user id, groups and process of each connection."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from dbus_next.constants import MessageType

from virtfabric.daemon.api import Caller
from virtfabric.model.errors import Reason, Refusal, RefusedError
from virtfabric.model.request import Principal

if TYPE_CHECKING:
    from virtfabric.dbus.link import Link

KEPT: Final = 1024


def caller_of(uid: int, gids: list[int] | None, pid: int) -> Caller:
    """Name and groups of a user; may ask NSS, so not for the event loop.

    Args:
        uid: as the bus says.
        gids: as the bus says (dbus-daemon 1.14 does); None where it does not, then the user
            database is asked.
        pid: as the bus says, 0 for unknown.
    """
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return Caller(Principal(f"uid:{uid}", uid), uid, frozenset(gids or ()), pid)
    if gids is None:
        gids = os.getgrouplist(user.pw_name, user.pw_gid)
    return Caller(Principal(user.pw_name, uid), uid, frozenset(gids), pid)


class Callers:
    """Callers by unique name. A bus never gives a unique name twice, so entries do not go stale."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Caller] = OrderedDict()

    async def find(self, link: Link, sender: str) -> Caller:
        """Who is behind a unique name.

        Raises:
            RefusedError: NOT_ALLOWED, the bus does not say (the caller has left already).
            UnreachableError: the bus does not answer.
        """
        known = self._known.get(sender)
        if known is not None:
            self._known.move_to_end(sender)
            return known
        reply = await link.call_bus("GetConnectionCredentials", "s", sender)
        facts: dict[str, Any] = {}
        if reply.message_type is MessageType.METHOD_RETURN:
            facts = {name: variant.value for name, variant in reply.body[0].items()}
        if "UnixUserID" not in facts:
            raise RefusedError(Refusal(Reason.NOT_ALLOWED, f"the bus does not say who {sender} is"))
        caller = await asyncio.to_thread(
            caller_of, facts["UnixUserID"], facts.get("UnixGroupIDs"), facts.get("ProcessID", 0)
        )
        caller = replace(caller, bus_name=sender)
        self._known[sender] = caller
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return caller

    def forget(self, name: str) -> None:
        """A connection left the bus."""
        self._known.pop(name, None)

    def clear(self) -> None:
        """The bus restarted: names begin anew."""
        self._known.clear()
