"""Builds the links to offload cards; a part of `compose`, loaded only where there are cards."""

from __future__ import annotations

import uuid
from secrets import token_bytes
from typing import TYPE_CHECKING, Final

from virtfabric import __version__
from virtfabric.adapters.cardlink.doors import MailboxDoor, SocketDoor
from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.adapters.cardlink.link import WitnessedCard
from virtfabric.adapters.cardlink.streamwire import StreamWire
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.cardbus import PluggedCard
from virtfabric.adapters.simulated.cardwire import SimulatedWire
from virtfabric.model.adapter import Adapter, AdapterId
from virtfabric.model.errors import ConfigError, InvalidValueError
from virtfabric.model.units import GIB, Bytes
from virtfabric.protocol.messages import Hello, Role
from virtfabric.shim.firmware.firmware import Firmware
from virtfabric.shim.firmware.programming import EmulatedPort
from virtfabric.shim.firmware.statelog import StateLog
from virtfabric.trust.context import make_context
from virtfabric.trust.store import identity_of_pem, read_credentials

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from virtfabric.adapters.cardlink.doors import Door
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.configcards import CardConfig, CardsConfig

SOFTWARE: Final = f"virtfabricd {__version__}"


def open_cards(config: CardsConfig) -> CardFleet:
    """Links to all cards of the configuration; nothing is opened before `start`.

    Raises:
        ConfigError: this host's credentials cannot be used.
    """
    try:
        credentials = read_credentials(config.credentials)
        identity = identity_of_pem(credentials.certificate)
        context = make_context(credentials, server=False)
    except InvalidValueError as error:
        raise ConfigError(
            f"cards.credentials: {error}",
            advice=error.advice or "virtfabric card provision --host ID --out DIR makes them",
        ) from error
    if identity.role != Role.HOST:
        raise ConfigError(f"cards.credentials: {config.credentials} are those of {identity}")
    hello = Hello(Role.HOST, identity.serial, SOFTWARE, uuid.uuid4().hex[:16], ())
    links = [
        WitnessedCard(AdapterId(card.serial), StreamWire(_door(card), card.serial, context, hello))
        for card in config.cards
    ]
    return CardFleet(identity.serial, links)


def _door(card: CardConfig) -> Door:
    if card.mailbox is not None:
        return MailboxDoor(card.mailbox, card.serial)
    assert card.socket is not None
    return SocketDoor(card.socket)


def simulated_cards(directory: Path, stack: ExitStack, host: SimulatedHost) -> CardFleet:
    """Two small cards in this process, to try the commands on; they take no image.

    Their slices are functions of the simulated host.
    """
    links = []
    for number in (1, 2):
        adapter = Adapter(
            AdapterId(f"SIM-{number}"), cores=8, memory=Bytes(4 * GIB), lanes=16, keys=15,
            bandwidth=100_000, accelerators={"crypto.aes": 4}, site="node:0",
        )  # fmt: skip
        flash = StateLog(directory / f"{adapter.serial}.flash")
        stack.callback(flash.close)
        firmware = Firmware(
            adapter, flash, clock=SystemClock(), port=EmulatedPort(), secret=token_bytes(32)
        )
        brain = PluggedCard(firmware, host, domain=number)
        links.append(WitnessedCard(adapter.serial, SimulatedWire(adapter.serial, brain)))
    return CardFleet("simulated", links)
