"""Which function is which slice: believed only if the card that it names says the same."""

from dataclasses import replace

import pytest

from virtfabric.cli.devicetables import device_table
from virtfabric.daemon.deviceviews import function_view
from virtfabric.model.adapter import Adapter, AdapterBooks, Seat, Slice, SliceSpec
from virtfabric.model.badge import Badge
from virtfabric.model.card import CardCondition, CardView
from virtfabric.model.device import DeviceInventory, DevicePool, Match, PciAddress, PciFunction
from virtfabric.model.units import Bytes
from virtfabric.policy.badges import join_slices
from virtfabric.policy.pools import members, obstacles, pool_of

A, B, NIC = (PciAddress(f"0000:0{bus}:00.0") for bus in (1, 2, 3))
CODES = {"C-1": "1" * 32, "C-2": "2" * 32}


def card(serial, code=None, **more):
    adapter = Adapter(serial, 8, Bytes(0), 8, 8, 1000, {"crypto.aes": 4})
    one = Slice(
        "slice-1", SliceSpec(capability="crypto.aes", units=1),
        Seat(keys=(1,), capability="crypto.aes", units=(0,)), "", "host-a/r/0",
    )  # fmt: skip
    view = CardView(
        serial, CardCondition.CONNECTED, books=AdapterBooks(adapter, {one.id: one}),
        badges={one.id: code or CODES[serial]},
    )  # fmt: skip
    return replace(view, **more)


def function(address, serial=None, name="slice-1", code=None):
    badge = Badge(serial, name, code or CODES[serial]) if serial else None
    return PciFunction(address, 0xF0CA, 0x0C02, class_code=0x108000, group=1, badge=badge)


def join(*functions, cards=("C-1", "C-2"), pools=()):
    known = {one.serial: one for one in (card(c) if isinstance(c, str) else c for c in cards)}
    return join_slices(DeviceInventory({f.address: f for f in functions}, pools), known)


def test_a_function_is_the_slice_that_its_card_confirms():
    inventory = join(function(A, "C-1"), function(B, "C-2"), function(NIC))
    assert {a: str(one) for a, one in inventory.slices.items()} == {
        A: "slice-1 of card C-1", B: "slice-1 of card C-2",
    }  # fmt: skip
    assert [one.address for one in members(inventory, "crypto.aes")] == [A, B]
    assert inventory.slices[A].key == "host-a/r/0"
    assert obstacles(inventory, A) == ()


@pytest.mark.parametrize(
    ("functions", "cards", "why"),
    [
        ([function(A, "C-1", code="2" * 32)], ["C-1", "C-2"], "which that card does not confirm"),
        ([function(A, "C-1", "slice-7")], ["C-1"], "which that card does not confirm"),
        ([function(A, "C-1")], ["C-2"], "which is not in the configuration"),
        ([function(A, "C-1")], [card("C-1", condition=CardCondition.DISTRUSTED)], "is distrusted"),
        ([function(A, "C-1")], [card("C-1", books=None)], "that card is connected"),
        ([function(A, "C-1")], [card("C-1", badges={})], "which that card does not confirm"),
        ([function(A, "C-1"), function(B, "C-1")], ["C-1"], "another function shows the badge"),
        # the same badge under another card's name: then neither is believed
        ([function(A, "C-1"), function(B, "C-2", code="1" * 32)], ["C-1", "C-2"], "another funct"),
    ],
)
def test_what_is_not_believed_is_in_no_pool_and_says_why(functions, cards, why):
    everything = DevicePool("crypto.aes", Match(class_prefix="1080"))
    inventory = join(*functions, cards=cards, pools=(everything,))
    assert inventory.slices == {}
    for one in functions:
        assert pool_of(inventory, one.address) is None
        assert any(why in text for text in obstacles(inventory, one.address))


def test_a_card_cannot_take_hold_of_what_is_not_its_own():
    """It tells the badge of another card's function, or of one that has none, as its slice's."""
    thief = card("C-2", code="1" * 32)
    inventory = join(function(A, "C-1"), function(NIC), cards=("C-1", thief))
    assert [str(one) for one in inventory.slices.values()] == ["slice-1 of card C-1"]
    assert inventory.slices.keys() == {A}


def test_it_shows():
    inventory = join(function(A, "C-1"), function(B, "C-2", code="f" * 32))
    shown = [function_view(inventory, one) for one in inventory.functions.values()]
    assert shown[0]["slice"] == {
        "card": "C-1", "slice": "slice-1", "key": "host-a/r/0", "for": "",
    }  # fmt: skip
    assert shown[1]["slice"] is None
    first, second = device_table(shown).rows
    assert first[7:] == ("crypto.aes, slice-1 of C-1", "free", "")
    assert second[7:9] == ("-", "not assignable")
    assert second[9].startswith("says that it is slice-1 of card C-2")


def test_a_card_that_is_lost_keeps_its_functions_and_they_are_given_to_nobody():
    inventory = join(function(A, "C-1"), cards=[card("C-1", condition=CardCondition.LOST)])
    assert inventory.slices[A].card == "C-1"
    assert obstacles(inventory, A) == ("card C-1 is lost",)


def test_pools_of_the_configuration_have_no_slices_and_slices_no_others():
    everything = DevicePool("any.thing", Match(class_prefix="10"))
    inventory = join(function(A, "C-1"), function(NIC), pools=(everything,))
    assert members(inventory, "any.thing") == (inventory.functions[NIC],)
    assert pool_of(inventory, A).capability == "crypto.aes"
    assert join(function(NIC), pools=(everything,)).pools == (everything,)
