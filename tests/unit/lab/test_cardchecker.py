"""The judge of the card demo says no to what is wrong, each thing by itself."""

import dataclasses

import pytest

from demo import cardchecker as judge
from demo import cardsight

FUNCTION = judge.Function("card0", "slice-1", "vfio-pci", "29", 16)
INSIDE = judge.Inside(3, 2, (), ())
GUEST = judge.GuestSight(7, True, ("0000:02:00.0",), ("29",), {"0000:02:00.0": INSIDE})
SIGHT = judge.Sight({"0000:02:00.0": FUNCTION}, {"db": GUEST})
CONSOLE = """\
VFREADY
VFDEV card 0000:02:00.0
VFAES 0000:02:00.0 state=0
VFAES 0000:02:00.0 state=3
VFAES 0000:02:00.0 round=1 good
VFDEV card 0000:03:00.0
VFAES 0000:03:00.0 round=1 bad sealed
VFAES 0000:02:00.0 attack wrong-key=31 passed=0 fault=2 fault-key=4
VFAES 0000:02:00.0 round=2 good
VFDEV card 0000:04:00.0
VFDEV gone card 0000:04:00.0
VFAES 0000:04:00.0 round=9 good
VFAES 0000:02:00.0 round=3 go"""


def but(**guest):
    return dataclasses.replace(SIGHT, guests={"db": dataclasses.replace(GUEST, **guest)})


def inside(**values):
    return but(inside={"0000:02:00.0": dataclasses.replace(INSIDE, **values)})


def verdicts(findings):
    return [ok for ok, _ in findings]


def test_what_is_right_is_right():
    assert verdicts(judge.expect_holds(SIGHT, "db", ["card0"])) == [True, True]
    assert judge.expect_inside(SIGHT, "db", 1)[0]
    assert judge.expect_encrypts(SIGHT, "db", 1)[0]
    assert judge.expect_same_processes(SIGHT, SIGHT)[0]
    assert judge.expect_unchanged(SIGHT, SIGHT)[0]


@pytest.mark.parametrize(
    "seen",
    [
        but(hostdevs=()),  # an executor that does nothing
        but(groups=()),
        dataclasses.replace(
            SIGHT, functions={"0000:02:00.0": dataclasses.replace(FUNCTION, driver="")}
        ),
        dataclasses.replace(
            SIGHT, functions={"0000:02:00.0": dataclasses.replace(FUNCTION, card="card1")}
        ),
        dataclasses.replace(SIGHT, guests={"db": GUEST, "other": GUEST}),
    ],
)
def test_a_function_that_is_not_the_guests_alone_is_told(seen):
    assert not all(verdicts(judge.expect_holds(seen, "db", ["card0"])))


@pytest.mark.parametrize(
    "seen", [inside(state=0), inside(good=0), inside(bad=("x",)), but(inside={})]
)
def test_a_guest_that_does_not_encrypt_well_is_told(seen):
    assert not judge.expect_encrypts(seen, "db", 1)[0]


def test_a_guest_that_stands_still_or_was_started_again_is_told():
    assert not judge.expect_goes_on(SIGHT, SIGHT, "db")[0]
    assert judge.expect_goes_on(inside(good=3), SIGHT, "db")[0]
    assert not judge.expect_same_processes(but(pid=8), SIGHT)[0]
    assert not judge.expect_unchanged(but(hostdevs=()), SIGHT)[0]
    assert not judge.expect_none(SIGHT)[0]


def attacks(*lines):
    return judge.expect_attacks_refused(inside(attacks=lines), "db")


def test_an_attack_that_passed_or_was_not_tried_is_told():
    all_three = (
        "attack wrong-key=31 passed=0 fault=2", "attack other-memory=255 passed=0",
        "attack outside=2 passed=0 dma-refused=2",
    )  # fmt: skip
    assert verdicts(attacks(*all_three)) == [True] * 3
    assert verdicts(attacks(*all_three[:2])) == [True, True, False]
    assert not all(verdicts(attacks(all_three[0].replace("passed=0", "passed=1"), *all_three[1:])))


def test_what_a_guests_console_says(tmp_path, monkeypatch):
    (tmp_path / "db-console.log").write_text(CONSOLE)
    monkeypatch.setattr(cardsight.sight, "CONSOLES", tmp_path)
    ready, found = cardsight.look_at_console("db")
    assert ready
    assert found == {
        "0000:02:00.0": {
            "state": 3, "good": 2, "bad": [],
            "attacks": ["attack wrong-key=31 passed=0 fault=2 fault-key=4"],
        },
        "0000:03:00.0": {"state": -1, "good": 0, "bad": ["round=1 bad sealed"], "attacks": []},
    }  # fmt: skip
    assert cardsight.look_at_console("nobody") == (False, {})
