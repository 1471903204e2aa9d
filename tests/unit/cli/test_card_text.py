"""What commands say of cards that are to decide."""

import pytest

from virtfabric.cli.cardtables import arbiter_lines, card_lines, card_table, slice_table
from virtfabric.cli.tables import outcome_lines, plan_lines

CARD = {
    "serial": "C-1", "condition": "connected", "why": "", "boot": "b", "software": "s 1",
    "adapter": None, "free": None, "slices": 0, "promises": 0, "generation": None,
    "arbiter": True, "deciding": True,
}  # fmt: skip


def arbiter(**changes):
    shown = {"mode": "carded", "card": "C-1", "fallback": "own", "deciding": True, "why": ""}
    return shown | changes


@pytest.mark.parametrize(
    ("shown", "lines"),
    [
        (arbiter(mode="own", card=None), []),
        (arbiter(), ["card C-1 decides about CPU and memory"]),
        (
            arbiter(deciding=False, why="it is lost"),
            ["card C-1 is to decide about CPU and memory and does not (it is lost): the agent "
             "decides by itself"],
        ),
        (
            arbiter(deciding=False, why="it is lost", fallback="refuse"),
            ["card C-1 is to decide about CPU and memory and does not (it is lost): allocations "
             "are refused"],
        ),
    ],
)  # fmt: skip
def test_status_says_who_decides(shown, lines):
    assert arbiter_lines(shown) == lines


def test_cards_say_which_one_decides():
    away = CARD | {"deciding": False, "condition": "lost"}
    other = CARD | {"serial": "C-2", "arbiter": False, "deciding": False}
    links = [row[:2] for row in card_table([CARD, away, other]).rows]
    assert links == [("C-1", "connected, decides"), ("C-1", "lost"), ("C-2", "connected")]
    assert "  decides about CPU and memory of this host" in card_lines(CARD)
    assert "  is to decide about CPU and memory of this host, and does not" in card_lines(away)
    assert not [line for line in card_lines(other) if "decide" in line]


def test_an_outcome_and_a_plan_say_who_decided():
    assert "  decided by card C-1" in outcome_lines("db", {"delta": {}, "decided_by": "card C-1"})
    assert not [line for line in outcome_lines("db", {"delta": {}}) if "decided" in line]
    decision = {"considered": [], "delta": {}, "from_free": {}, "takes": [], "returns": []}
    plan = {"decision": decision | {"by": "card C-1"}, "steps": [], "offers": [], "generation": 1}
    assert "  decided by card C-1" in plan_lines("db", plan | {"devices": []})


def test_an_idle_slice_says_so():
    spec = {"name": "a", "cores": 1, "memory": 0, "lanes": 0, "units": 0, "capability": "",
            "qos": {"priority": 50}}  # fmt: skip
    one = {"card": "C-1", "id": "slice-1", "spec": spec, "wish": "w", "holder_name": "",
           "known": True, "phase": "blank", "image": "", "idle_s": 720}  # fmt: skip
    (row,) = slice_table([one]).rows
    assert "nobody, idle 12 min" in row
    (row,) = slice_table([one | {"idle_s": None, "holder_name": "db"}]).rows
    assert "db" in row
