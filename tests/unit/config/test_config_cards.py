"""`[cards]` of the configuration."""

from pathlib import Path

import pytest

from virtfabric.config import load_config
from virtfabric.configcards import CREDENTIALS, CardConfig
from virtfabric.model.card import Carded, Fallback
from virtfabric.model.device import PciAddress
from virtfabric.model.errors import ConfigError

TWO = """
[cards]
credentials = "/etc/x"
[[cards.card]]
serial = "C-1"
socket = "/run/c1.sock"
[[cards.card]]
serial = "C-2"
socket = "/run/c2.sock"
"""


@pytest.fixture
def load(tmp_path):
    def read(*texts):
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.toml").write_text(text)
        return load_config(tmp_path).cards

    return read


def test_without_a_section_there_is_none(load):
    cards = load("")
    assert (cards.cards, cards.credentials) == ((), CREDENTIALS)


def test_cards_of_several_files_add_up(load):
    third = '[[cards.card]]\nserial = "C-3"\nsocket = "/run/c3.sock"\n'
    cards = load(TWO, third)
    assert cards.credentials == Path("/etc/x")
    assert [card.serial for card in cards.cards] == ["C-1", "C-2", "C-3"]
    assert cards.cards[0] == CardConfig("C-1", Path("/run/c1.sock"))


def test_the_way_to_a_card_may_be_its_mailbox(load):
    cards = load('[[cards.card]]\nserial = "C-1"\nmailbox = "0000:01:00.0"\n')
    assert cards.cards == (CardConfig("C-1", mailbox=PciAddress("0000:01:00.0")),)
    twice = '[[cards.card]]\nserial = "C-2"\nmailbox = "0000:01:00.0"\n'
    with pytest.raises(ConfigError, match=r"cards.card\[1\].mailbox = '0000:01:00.0' is that of"):
        load('[[cards.card]]\nserial = "C-1"\nmailbox = "0000:01:00.0"\n', twice)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('serial = "C-1"', 'serial = "C 1"', "cards.card[1].serial = 'C 1' is not 1 to 64"),
        ('serial = "C-2"', 'serial = "C-1"', "cards.card[2].serial = 'C-1' is there twice"),
        ("/run/c2.sock", "/run/c1.sock", "cards.card[2].socket"),
        ("/run/c1.sock", "c1.sock", "is not an absolute path"),
        ('socket = "/run/c1.sock"', "", "needs socket or mailbox, one of both"),
        ('"/run/c1.sock"', '"/run/c1.sock"\nmailbox = "0000:01:00.0"', "one of both"),
        ('socket = "/run/c1.sock"', 'mailbox = "01:00"', "cards.card[1].mailbox"),
        ("credentials", "credential", "did you mean credentials?"),
        ("[[cards.card]]", "[cards.card]", "is not a list of tables"),
    ],
)
def test_what_is_wrong_is_named(load, old, new, problem):
    text = TWO.replace(old, new, 1)
    if new == "[cards.card]":
        text = text[: text.rindex("[[cards.card]]")]
    with pytest.raises(ConfigError) as error:
        load(text)
    assert problem in str(error.value)


def test_a_card_that_decides(load):
    text = 'arbiter = "C-2"\nfallback = "refuse"\nanswer_s = 0.5'
    cards = load(TWO.replace('credentials = "/etc/x"', text))
    assert cards.carded({"C-1", "C-2"}) == Carded("C-2", Fallback.REFUSE, 0.5)
    assert load(TWO).carded({"C-1"}) is None
    with pytest.raises(ConfigError, match="'C-2' is none of the cards"):
        cards.carded({"C-1"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('arbiter = "C 2"', "cards.arbiter = 'C 2' is not 1 to 64"),
        ('fallback = "yes"', "cards.fallback = 'yes'"),
        ("answer_s = 0", "cards.answer_s = 0"),
    ],
)
def test_what_is_wrong_with_a_card_that_decides(load, line, problem):
    with pytest.raises(ConfigError) as caught:
        load(TWO.replace('credentials = "/etc/x"', line))
    assert problem in str(caught.value)
