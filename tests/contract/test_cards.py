"""The card contract, over the simulated wire and over a socket with TLS."""

import sys
from pathlib import Path

import pytest

from tests.contract.card_contract import CardBed, CardContract, News

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "card"))
from card_bed import NEVER, SIGNER
from card_process import Served, write_card
from card_wires import link_to, power_on, simulated_card, start_brain

from virtfabric.trust.images import describe_image, sign_image


class _Bed(CardBed):
    def __init__(self, place):
        self.place = place
        self.news = News()
        self.others = []

    def signed(self, data, name="aes-1", capability="crypto.aes", not_after=NEVER):
        manifest = describe_image(name, capability, data, not_after)
        return manifest, sign_image(SIGNER, manifest)


class _SimulatedBed(_Bed):
    def __init__(self, place):
        super().__init__(place)
        self.brain = start_brain(place)
        self.card, self.wire = simulated_card(self.brain)
        self.card.watch(self.news)

    def other_host(self):
        other, _ = simulated_card(self.brain)
        other.watch(News())
        return other

    def cut_power(self):
        self.brain.close()
        self.wire.lose("the card is gone")

    def power_on(self):
        self.brain = start_brain(self.place)
        power_on(self.wire, self.brain)

    def close(self):
        self.card.close()
        self.brain.close()


class _SocketBed(_Bed):
    def __init__(self, place):
        super().__init__(place)
        self.path = write_card(place)
        self.served = Served(self.path)
        self.card = link_to(self.served.socket, "host-a")
        self.card.watch(self.news)
        self.news.wait("connected")

    def other_host(self):
        other = link_to(self.served.socket, "host-b")
        news = News()
        other.watch(news)
        news.wait("connected")
        self.others.append(other)
        return other

    def cut_power(self):
        self.served.stop()

    def power_on(self):
        self.served = Served(self.path)

    def close(self):
        for card in (self.card, *self.others):
            card.close()
        self.served.stop()


@pytest.fixture(params=[_SimulatedBed, _SocketBed], ids=["simulated", "socket"])
def bed(request, tmp_path):
    bed = request.param(tmp_path)
    yield bed
    bed.close()


class TestCards(CardContract):
    pass
