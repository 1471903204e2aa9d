"""Small frames that would be more than a machine holds, once they are read."""

import json

import pytest
from host_wire_data import guests, hosts
from hypothesis import given, settings

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ledger import Books
from virtfabric.model.units import CpuSet
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import decode, encode
from virtfabric.protocol.fields import MAX_LISTED
from virtfabric.protocol.frames import Frame, FrameDecoder

PICTURE = 0x40


def picture(change):
    """What becomes of a picture of one guest when its body is changed."""
    found = []

    @given(hosts(), guests(0))
    @settings(max_examples=1, database=None)
    def run(host, guest):
        data = encode(m.HostPicture("p", 0, 1, host, (guest,), Books()), 1)
        (frame,) = FrameDecoder().feed(data)
        body = json.loads(frame.body)
        change(body)
        found.append(Frame(1, PICTURE, 1, 0, json.dumps(body).encode()))

    run()
    return decode(found[-1])


@pytest.mark.timeout(20)
def test_lists_of_cpus_are_bounded_together():
    def change(body):
        body["guests"][0]["affinity"] = [f"{n}-65535" for n in range(4096)]

    with pytest.raises(InvalidValueError, match=f"one too many: {MAX_LISTED} numbers") as caught:
        picture(change)
    assert caught.value.field == "guests[0].affinity"


def test_the_same_list_is_there_once():
    def change(body):
        body["guests"][0]["affinity"] = ["0-65535"] * 4096

    (guest,) = picture(change).guests
    first, *others = guest.vcpu_affinity.values()
    assert len(first) == 65536
    assert all(other is first for other in others)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [
    ",".join(["0-65535"] * 8000), "0-65535,^0-65535", ",".join(map(str, range(11_000))),
], ids=["again and again", "there and not", "one by one"])  # fmt: skip
def test_one_list_is_short_work(text):
    def change(body):
        body["guests"][0]["numa_nodes"] = text

    if "^" in text or "-" in text:
        with pytest.raises(InvalidValueError) as caught:
            picture(change)
        assert caught.value.field == "guests[0].numa_nodes"
    else:
        assert picture(change).guests[0].numa_nodes == CpuSet(range(11_000))


def test_a_cpu_is_of_one_node():
    def change(body):
        body["host"]["nodes"] = [
            {"node": n, "tier": "dram", "memory": 0, "cpus": "0-65535"} for n in range(4096)
        ]

    with pytest.raises(InvalidValueError) as caught:
        picture(change)
    assert caught.value.field == "host.nodes[1].cpus"
