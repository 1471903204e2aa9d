"""The card's management function: a mailbox in registers, and its window of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.shim.cardpci import maps
from virtfabric.shim.cardpci.mailbox import WINDOW, Mailbox, Window
from virtfabric.shim.cardpci.maps import MailboxCause
from virtfabric.shim.cardpci.registers import RegisterFile
from virtfabric.shim.vfiouser import config as pci
from virtfabric.shim.vfiouser.function import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.shim.firmware.desk import Desk
    from virtfabric.shim.vfiouser.function import Bus

_REGISTERS, _WINDOW = 0, 2
_OPEN, _CLOSE = 1, 2
_INDICES: Final = ("TX_HEAD", "TX_TAIL", "RX_HEAD", "RX_TAIL")


class ManagementFunction:
    """Implements `shim.vfiouser.function.PciFunction`."""

    def __init__(
        self, desk: Desk, *, serial: str, boot: int, width: int, wake: Callable[[], None]
    ) -> None:
        """Begin.

        Args:
            desk: of the firmware; only `pump` speaks to it.
            serial: of the card.
            boot: see the register.
            width: of its link, lanes.
            wake: has `pump` called on the firmware's thread, soon.
        """
        self.config = pci.ConfigSpace(
            maps.identify_management(),
            [pci.Bar(_REGISTERS, maps.BAR_SIZE), pci.Bar(_WINDOW, WINDOW, wide=True)],
            [pci.power_management(), pci.message_interrupts(), pci.express_endpoint(width),
             pci.access_control()],
        )  # fmt: skip
        self._window = Window()
        self.regions: Mapping[int, Region] = {
            _REGISTERS: Region(maps.BAR_SIZE), _WINDOW: Region(WINDOW, self._window.fd),
        }  # fmt: skip
        self._mailbox = Mailbox(desk, self._window)
        self._registers = RegisterFile(maps.MANAGEMENT)
        self._registers.put("BOOT", boot)
        self._registers.put_text("SERIAL", serial)
        self._wake = wake
        self._bus: Bus | None = None
        self._shown = self._look()

    def pump(self) -> None:
        """Move bytes between the window and the desk; on the firmware's thread."""
        more = self._mailbox.pump()
        before, now = self._shown, self._look()
        self._shown = now
        cause = MailboxCause(0)
        for name, meaning in (
            ("RX_HEAD", MailboxCause.RECEIVED), ("TX_TAIL", MailboxCause.ROOM),
            ("STATUS", MailboxCause.CHANGED), ("SESSION", MailboxCause.CHANGED),
        ):  # fmt: skip
            if now[name] != before[name]:
                cause |= meaning
        self._cause(cause)
        if more:
            self._wake()

    def close(self) -> None:
        """Give the window back; nobody may use the function any more."""
        self._mailbox.close()
        self._window.close()

    def plug(self, bus: Bus) -> None:
        """Implements `PciFunction`: as after a power-on."""
        self.config.reset()
        self.reset()
        self._bus = bus

    def unplug(self) -> None:
        """Implements `PciFunction`."""
        self._bus = None
        self.reset()

    def reset(self) -> None:
        """Implements `PciFunction`: no session; the card itself goes on."""
        self._mailbox.close()
        self._registers.reset()
        self._wake()

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Implements `PciFunction`."""
        if region == _WINDOW:
            return self._window.memory[offset : offset + count]
        for name, value in self._look().items():
            self._registers.put(name, value)
        return self._registers.read(offset, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Implements `PciFunction`."""
        if region == _WINDOW:
            self._window.memory[offset : offset + len(data)] = data
            return
        for name in self._registers.write(offset, data):
            self._written(name, self._registers.get(name))

    def _written(self, name: str, value: int) -> None:
        match name, value:
            case "TX_HEAD", _:
                self._mailbox.host_put(value)
            case "RX_TAIL", _:
                self._mailbox.host_took(value)
            case "CONTROL", 1:
                self._mailbox.open()
            case "CONTROL", 2:
                self._mailbox.close()
            case "IRQ_MASK", _:
                self._interrupt(self._registers.get("IRQ_STATUS"))
                return
            case _:
                return
        self._wake()

    def _look(self) -> dict[str, int]:
        at = self._mailbox.indices
        return {
            "STATUS": self._mailbox.status, "SESSION": self._mailbox.sessions,
            "TX_HEAD": at.tx_head, "TX_TAIL": at.tx_tail,
            "RX_HEAD": at.rx_head, "RX_TAIL": at.rx_tail,
        }  # fmt: skip

    def _cause(self, cause: MailboxCause) -> None:
        self._interrupt(self._registers.raise_bits("IRQ_STATUS", cause))

    def _interrupt(self, causes: int) -> None:
        bus = self._bus
        if bus is not None and causes & self._registers.get("IRQ_MASK"):
            bus.interrupt()
