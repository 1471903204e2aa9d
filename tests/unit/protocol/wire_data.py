"""Messages of every kind, for hypothesis; and splits of bytes."""

import os
from itertools import pairwise

from host_wire_data import HOST_MESSAGES
from hypothesis import strategies as st

from virtfabric.model.adapter import Adapter, Extent, Reservation, Seat, Slice, SliceSpec
from virtfabric.model.errors import Reason
from virtfabric.model.image import ImageManifest, Phase
from virtfabric.model.units import MIB, Bytes
from virtfabric.protocol import messages as m

FRAMES = int(os.environ.get("VIRTFABRIC_FRAMES", "0"))
"""How many frames a long run takes; 0 for the quick profile of `make check`."""

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
BADGES = st.sampled_from(["", "0123456789abcdef" * 2])
MAYBE = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = st.text("abcdefghij", min_size=1, max_size=6)
CAPABILITIES = st.builds("{}.{}".format, WORDS, WORDS)
NUMBERS = st.integers(0, (1 << 63) - 1)
FIGURES = st.dictionaries(WORDS, NUMBERS, max_size=4)
HEX = "0123456789abcdef"


@st.composite
def specs(draw):
    capability = draw(st.one_of(st.just(""), CAPABILITIES))
    return SliceSpec(
        cores=draw(st.integers(1, 64)), memory=Bytes(draw(st.integers(0, 4096)) * MIB),
        contiguous=draw(st.booleans()), lanes=draw(st.sampled_from([0, 1, 4, 16])),
        capability=capability, units=draw(st.integers(1, 9)) if capability else 0,
        keys=draw(st.integers(1, 9)), priority=draw(st.integers(0, 100)),
        bandwidth=draw(st.one_of(st.none(), st.integers(1, 10**6))),
        reclaimable=draw(st.booleans()), name=draw(MAYBE),
    )  # fmt: skip


LIST = st.lists(st.integers(0, 63), max_size=5).map(tuple)
SEATS = st.builds(
    Seat, LIST, st.lists(st.builds(Extent, NUMBERS.map(lambda n: n % (1 << 50)),
                                   st.integers(1, 1 << 50)), max_size=3).map(tuple),
    LIST, LIST, st.one_of(st.just(""), CAPABILITIES), LIST, st.integers(0, 10**7),
)  # fmt: skip
SLICES = st.builds(Slice, NAMES, specs(), SEATS, MAYBE, MAYBE)
RESERVATIONS = st.builds(
    Reservation, NAMES, SLICES, st.lists(NAMES, max_size=3).map(tuple), st.booleans()
)
ADAPTERS = st.builds(
    Adapter, NAMES, st.integers(0, 1024), st.integers(0, 1 << 50).map(Bytes), st.integers(0, 64),
    st.integers(0, 1024), st.integers(0, 10**7),
    st.dictionaries(CAPABILITIES, st.integers(0, 1024), max_size=3), NAMES,
)  # fmt: skip
VERSIONS = st.lists(st.integers(0, 255), max_size=4).map(tuple)
MANIFESTS = st.builds(
    ImageManifest, NAMES.filter(str.isprintable), CAPABILITIES, st.integers(1, 1 << 30),
    st.text(HEX, min_size=64, max_size=64), NUMBERS,
)  # fmt: skip

BY_TYPE = {
    m.Hello: st.builds(m.Hello, st.sampled_from(m.Role), NAMES, NAMES, NAMES, VERSIONS),
    m.Heartbeat: st.builds(m.Heartbeat, NUMBERS),
    m.Error: st.builds(m.Error, st.sampled_from(m.ErrorCode), MAYBE, MAYBE,
                       st.sampled_from(["", *Reason]).map(str), FIGURES, VERSIONS, st.booleans()),
    m.Done: st.builds(m.Done),
    m.InventoryRequest: st.builds(m.InventoryRequest),
    m.Inventory: st.builds(
        m.Inventory, ADAPTERS,
        st.lists(st.builds(m.SliceReport, SLICES, st.sampled_from(Phase), MAYBE, BADGES),
                 max_size=3).map(tuple),
        st.lists(RESERVATIONS, max_size=3).map(tuple), NUMBERS),
    m.Telemetry: st.builds(
        m.Telemetry, NUMBERS, st.lists(st.builds(m.Reading, NAMES, FIGURES), max_size=3).map(tuple)
    ),
    m.Event: st.builds(m.Event, st.sampled_from(m.EventKind), NUMBERS, MAYBE, MAYBE),
    m.AllocationRequest: st.builds(
        m.AllocationRequest, NAMES, specs(), MAYBE, MAYBE, st.booleans()),
    m.Decision: st.builds(
        m.Decision, NAMES, SLICES, st.lists(NAMES, max_size=3).map(tuple), NUMBERS),
    m.Commit: st.builds(m.Commit, NAMES),
    m.Abort: st.builds(m.Abort, NAMES),
    m.Grant: st.builds(m.Grant, SLICES, NUMBERS),
    m.Assign: st.builds(m.Assign, NAMES, MAYBE),
    m.Release: st.builds(m.Release, NAMES),
    m.Configure: st.builds(
        m.Configure, NAMES, MANIFESTS, st.text(HEX, min_size=128, max_size=128)),
    m.ImageData: st.builds(m.ImageData, NAMES, NUMBERS, st.binary(max_size=300)),
    m.Progress: st.builds(m.Progress, NAMES, st.sampled_from(Phase), NUMBERS, NUMBERS, MAYBE),
}  # fmt: skip
BY_TYPE |= HOST_MESSAGES
MESSAGES = st.one_of(*BY_TYPE.values())


def split(data, cuts):
    places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


def hello(role=m.Role.CARD, serial="C-1", versions=(1,)):
    return m.Hello(role, serial, "test 1", "boot-1", versions)
