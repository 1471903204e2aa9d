"""From the configuration to cards on their sockets; and the agent's own simulated ones."""

from contextlib import ExitStack

import pytest
from card_process import Served, write_card
from slice_world import spec
from trust_data import CARD, HOST, credentials

from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.machines import small_host
from virtfabric.composecards import open_cards, simulated_cards
from virtfabric.configcards import CardConfig, CardsConfig
from virtfabric.model.adapter import Reservation
from virtfabric.model.errors import CardError, CardLostError, ConfigError
from virtfabric.trust.store import write_credentials


def config_of(place, *served):
    cards = tuple(CardConfig(s.description.adapter.serial, s.socket) for s in served)
    return CardsConfig(cards, place / "host")


def test_two_cards_on_their_sockets(tmp_path):
    write_credentials(tmp_path / "host", credentials(HOST))
    served = [Served(write_card(tmp_path, serial)) for serial in ("C-1", "C-2")]
    cards = open_cards(config_of(tmp_path, *served))
    try:
        cards.start()
        assert cards.host == "host-a"
        for serial in ("C-1", "C-2"):
            promise = cards.reach(serial).reserve(spec(cores=1), request="host-a/r/0")
            assert isinstance(promise, Reservation)
        assert {v.books.adapter.serial for v in cards.views().values()} == {"C-1", "C-2"}
        news = []
        cards.follow(news.append)
        assert sorted((n.serial, n.kind) for n in news) == [
            ("C-1", "connected"), ("C-2", "connected")
        ]  # fmt: skip
        with pytest.raises(CardError, match="no card 'C-9'"):
            cards.reach("C-9")
        served[0].stop()
    finally:
        cards.close()
        for one in served:
            one.stop()
    with pytest.raises(CardLostError):
        cards.reach("C-2").refresh()


def test_credentials_that_cannot_be_used_stop_the_start(tmp_path):
    config = CardsConfig((CardConfig("C-1", tmp_path / "sock"),), tmp_path / "host")
    with pytest.raises(ConfigError, match=r"cards\.credentials"):
        open_cards(config)
    write_credentials(tmp_path / "host", credentials(CARD))
    with pytest.raises(ConfigError, match="are those of card C-1"):
        open_cards(config)


def test_the_simulated_agent_has_two_cards(tmp_path):
    with ExitStack() as stack:
        cards = simulated_cards(tmp_path, stack, small_host(SystemClock()))
        cards.start()
        assert list(cards.views()) == ["SIM-1", "SIM-2"]
        assert isinstance(cards.reach("SIM-1").reserve(spec(cores=1), request="x"), Reservation)
