"""`[cards]` of the configuration: which offload cards there are, and who this host is to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.configvalues import check_parsed, check_path, check_seconds, check_text
from virtfabric.model.card import ARBITER_ANSWER_S, Carded, Fallback
from virtfabric.model.device import PciAddress
from virtfabric.model.errors import ConfigError
from virtfabric.protocol.messages import Role
from virtfabric.trust.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from virtfabric.configvalues import Check, Source

CREDENTIALS: Final = Path("/etc/virtfabric/card-host")


@dataclass(frozen=True, slots=True)
class CardConfig:
    """`[[cards.card]]`: one card, and the way to it: one of both.

    Attributes:
        socket: where it listens.
        mailbox: its management function on this host.
    """

    serial: str
    socket: Path | None = None
    mailbox: PciAddress | None = None

    @property
    def way(self) -> str:
        """As it is in the configuration."""
        return str(self.socket or self.mailbox)


@dataclass(frozen=True, slots=True)
class CardsConfig:
    """`[cards]`.

    Attributes:
        credentials: directory with this host's certificate and key, and the authority's
            certificate, as `virtfabric card provision --host` makes it.
        arbiter: serial number of the card that decides about this host's CPU and memory (*carded*
            mode); empty: the agent does.
        fallback: what is done while it does not.
        answer_s: in which it has to answer.
        idle_after_s: how long nobody may use a slice before it is idle; 0: for ever.
    """

    cards: tuple[CardConfig, ...] = ()
    credentials: Path = CREDENTIALS
    arbiter: str = ""
    fallback: Fallback = Fallback.OWN
    answer_s: float = ARBITER_ANSWER_S
    idle_after_s: float = 600.0

    def carded(self, serials: Collection[str]) -> Carded | None:
        """Which card decides, of those that there are; None where the agent does.

        Raises:
            ConfigError: there is no such card.
        """
        if not self.arbiter:
            return None
        if self.arbiter not in serials:
            known = ", ".join(sorted(serials)) or "none"
            raise ConfigError(
                f"cards.arbiter = {self.arbiter!r} is none of the cards",
                advice=f"there are {known}",
            )
        return Carded(self.arbiter, self.fallback, self.answer_s)


def _serial(value: Any) -> str:
    identity: Identity = check_parsed(value, lambda text: Identity.of(Role.CARD, text))
    return identity.serial


def _address(value: Any) -> PciAddress:
    address: PciAddress = check_parsed(value, PciAddress.parse)
    return address


_CARD: Final[Mapping[str, Check]] = {
    "serial": _serial, "socket": check_path, "mailbox": _address,
}  # fmt: skip
KEYS: Final[Mapping[str, Check]] = {
    "credentials": check_path,
    "arbiter": lambda value: "" if value == "" else _serial(value),
    "fallback": lambda value: Fallback(check_text(value, choices=tuple(Fallback))),
    "answer_s": partial(check_seconds, least=0.05, most=30),
    "idle_after_s": partial(check_seconds, least=0, most=30 * 86400),
    "card": lambda value: value,
}


def read_cards(source: Source, value: Any, others: Sequence[CardConfig]) -> list[CardConfig]:
    """The cards of one file.

    Args:
        source: the file.
        value: what it has under `cards.card`.
        others: cards read before: none may be there twice.

    Raises:
        ConfigError: names file, key and value.
    """
    cards: list[CardConfig] = []
    for number, entry in enumerate(source.tables("cards.card", value), 1):
        place = f"cards.card[{number}]"
        values = source.table(place, entry, _CARD)
        if "serial" not in values:
            raise source.fail(place, entry, "has no serial")
        if ("socket" in values) == ("mailbox" in values):
            raise source.fail(place, entry, "needs socket or mailbox, one of both")
        card = CardConfig(**values)
        for other in (*others, *cards):
            if card.serial == other.serial:
                raise source.fail(f"{place}.serial", card.serial, "is there twice")
            if card.way == other.way:
                name = "socket" if card.socket else "mailbox"
                raise source.fail(f"{place}.{name}", card.way, "is that of another card")
        cards.append(card)
    return cards
