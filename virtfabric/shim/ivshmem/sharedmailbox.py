"""One host's mailbox where registers are shared memory: they are looked at when the host rings.

Everything here is on the firmware's thread. Each register has one writer, so that no change is
lost; the card believes nothing that it wrote itself, as the host may have changed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.shim.cardpci.mailbox import Mailbox, Window
from virtfabric.shim.cardpci.maps import MailboxStatus
from virtfabric.shim.cardpci.registers import TEXT_SIZE, WORD
from virtfabric.shim.ivshmem import maps

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.shim.firmware.desk import Desk

_GONE: Final = MailboxStatus(0)


class SharedMailbox:
    """The mailbox of `shim.cardpci` in memory that a host shares, with a bell each way."""

    def __init__(self, desk: Desk, *, serial: str, boot: int, ring: Callable[[], None]) -> None:
        """Begin, without a session.

        Args:
            desk: of the firmware.
            serial: of the card.
            boot: see the register.
            ring: rings the host.

        Raises:
            OSError: no memory.
        """
        self._window = Window(maps.SIZE)
        self.memory = self._window.fd
        # words, as a host may look between two bytes
        self._words = memoryview(self._window.memory)[maps.REGISTERS :].cast("I")
        self._mailbox = Mailbox(desk, self._window)
        self._ring = ring
        self._wanted = 0
        self._closed = False
        self._shown: dict[str, int] = {}
        for one in maps.SHARED:
            if one.words == 1:
                self._put(one.name, one.reset or 0)
        self._put("BOOT", boot)
        at = maps.REGISTERS + maps.SHARED.by_name["SERIAL"].offset
        text = serial.encode()[:TEXT_SIZE]
        self._window.memory[at : at + len(text)] = text
        self._show()

    def rung(self) -> None:
        """The host rang: take what it wrote."""
        if self._closed:
            return
        wanted = self._get("WANTED")
        if wanted != self._wanted:
            self._wanted = wanted
            if wanted:
                self._mailbox.open()
            else:
                self._mailbox.close()
        elif MailboxStatus.OPEN in self._mailbox.status:
            # the indices of a session that is over say nothing
            self._mailbox.host_put(self._get("TX_HEAD"))
            self._mailbox.host_took(self._get("RX_TAIL"))

    def pump(self) -> bool:
        """Move bytes, show what has changed and ring; True if there may be more at once."""
        if self._closed:
            return False
        more = self._mailbox.pump()
        if self._show():
            self._ring()
        return more

    def close(self) -> None:
        """The host went, or the card goes; safe to repeat."""
        if self._closed:
            return
        self._mailbox.close()
        self._mailbox.pump()
        self._put("STATUS", _GONE)
        self._ring()
        self._closed = True
        self._words.release()
        self._window.close()

    def _show(self) -> bool:
        """Write what the host may see now; whether that is new.

        All of it each time, as the host may have changed it. What is in a ring is there before its
        index, and the status before whose it is.
        """
        at = self._mailbox.indices
        now: dict[str, int] = {
            "TX_TAIL": at.tx_tail, "RX_HEAD": at.rx_head,
            "STATUS": self._mailbox.status, "SESSION": self._wanted,
        }  # fmt: skip
        for name, value in now.items():
            self._put(name, value)
        before, self._shown = self._shown, now
        return now != before

    def _get(self, name: str) -> int:
        return self._words[maps.SHARED.by_name[name].offset // WORD]

    def _put(self, name: str, value: int) -> None:
        self._words[maps.SHARED.by_name[name].offset // WORD] = value
