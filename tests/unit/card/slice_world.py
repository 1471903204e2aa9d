"""Small adapters and what is asked of them: so small that everything can be tried."""

from hypothesis import strategies as st

from virtfabric.model.adapter import Adapter, AdapterBooks, AdapterId, SliceSpec
from virtfabric.model.units import MIB, Bytes

AES, ZSTD = "crypto.aes", "compress.zstd"
SITES = ("node:0", "node:1")


def adapter(serial="card-0", *, cores=4, memory=6, lanes=4, keys=4, bandwidth=100, site="node:0",
            accelerators=None):  # fmt: skip
    units = {AES: 2, ZSTD: 1} if accelerators is None else accelerators
    return Adapter(
        AdapterId(serial), cores, Bytes(memory * MIB), lanes, keys, bandwidth, units, site
    )


def books(serial="card-0", **amounts):
    return AdapterBooks(adapter(serial, **amounts))


def spec(**amounts):
    memory = Bytes(amounts.pop("memory", 0) * MIB)
    return SliceSpec(memory=memory, **amounts)


@st.composite
def adapters(draw, serial="card-0"):
    return adapter(
        serial,
        cores=draw(st.integers(0, 4)), memory=draw(st.integers(0, 5)),
        lanes=draw(st.sampled_from([0, 1, 2, 3, 4, 8])), keys=draw(st.integers(1, 4)),
        bandwidth=draw(st.sampled_from([0, 50, 100])), site=draw(st.sampled_from(SITES)),
        accelerators=draw(st.sampled_from([{}, {AES: 1}, {AES: 2, ZSTD: 1}])),
    )  # fmt: skip


@st.composite
def specs(draw):
    capability = draw(st.sampled_from(["", "", AES, ZSTD]))
    found = spec(
        cores=draw(st.integers(0, 4)), memory=draw(st.integers(0, 5)),
        contiguous=draw(st.booleans()), lanes=draw(st.sampled_from([0, 0, 1, 2, 4])),
        capability=capability, units=draw(st.integers(1, 2)) if capability else 0,
        keys=draw(st.sampled_from([1, 1, 1, 2])), priority=draw(st.sampled_from([10, 50, 90])),
        bandwidth=draw(st.sampled_from([None, None, 40, 100])),
        reclaimable=draw(st.sampled_from([True, True, False])),
    )  # fmt: skip
    if not (found.cores or found.memory or found.lanes or found.units):
        found = spec(cores=1)
    return found.check()
