"""A simulated host's slots: each slice of a card that shows badges is a function there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.adapters.simulated.devices import SimulatedFunction
from virtfabric.model.badge import Badge
from virtfabric.model.device import PciAddress, PciFunction

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.model.adapter import AdapterBooks, SliceId
    from virtfabric.protocol.messages import Message

_PORTS: Final = 64


class SlicedCard(Protocol):
    """A card that decides, with what its functions are to show."""

    @property
    def books(self) -> AdapterBooks:
        """Slices as they are now."""

    def badge(self, name: SliceId) -> str:
        """What a slice's function shows; empty for none."""

    def handle(self, message: Message) -> list[Message]:
        """The answers to a message."""

    def tick(self) -> list[Message]:
        """Let time pass; what the card tells by itself."""


class PluggedCard:
    """Implements `cardwire.Brain`; functions come and go as the real ones would.

    Attributes:
        card: which decides.
        is_plugging: False: what is granted does not appear.
    """

    def __init__(self, card: SlicedCard, host: SimulatedHost, domain: int) -> None:
        """Plug what is granted; each card wants a PCI domain of its own."""
        self.card = card
        self._host = host
        self._domain = domain
        self._seats: dict[str, PciAddress] = {}
        self.is_plugging = True
        self.follow()

    def handle(self, message: Message) -> list[Message]:
        """Implements `cardwire.Brain`."""
        answers = self.card.handle(message)
        self.follow()
        return answers

    def tick(self) -> list[Message]:
        """Implements `cardwire.Brain`."""
        told = self.card.tick()
        self.follow()
        return told

    def follow(self) -> None:
        """Plug and unplug what is to be."""
        slices = self.card.books.slices
        for name in self._seats.keys() - slices.keys():
            self._host.remove_function(self._seats.pop(name))
        for name, one in slices.items():
            code = self.card.badge(name)
            if name not in self._seats and code and self.is_plugging:
                badge = Badge(self.card.books.adapter.serial, name, code)
                self._plug(name, badge, 0x108000 if one.seat.capability else 0x120000)

    def unplug_all(self) -> None:
        """The card has lost its power."""
        while self._seats:
            self._host.remove_function(self._seats.popitem()[1])

    def _plug(self, name: str, badge: Badge, class_code: int) -> None:
        taken = self._seats.values()
        places = (PciAddress(f"{self._domain:04x}:{port:02x}:00.0") for port in range(_PORTS))
        address = next(place for place in places if place not in taken)
        group = 1000 * self._domain + address.parts[1]
        shown = PciFunction(
            address, 0xF0CA, 0x0C02, class_code=class_code, group=group, node=0, resets=("flr",),
            badge=badge,
        )  # fmt: skip
        self._seats[name] = address
        self._host.devices.plug(SimulatedFunction(shown))
