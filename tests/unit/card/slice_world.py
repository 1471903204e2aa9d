"""Small adapters and what is asked of them: so small that everything can be tried."""

from random import Random

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


def draw_adapter(draw, serial="card-0"):
    """A card that can hold some slices."""
    return adapter(
        serial,
        cores=draw.choice([4, 4, 4, 3, 3, 2, 0]), memory=draw.choice([5, 5, 5, 4, 4, 3, 0]),
        lanes=draw.choice([4, 8, 8, 3, 0]), keys=draw.choice([7, 6, 5, 2]),
        bandwidth=draw.choice([100, 100, 50]), site=draw.choice(SITES),
        accelerators=draw.choice([{AES: 2, ZSTD: 1}, {AES: 1}, {}]),
    )  # fmt: skip


def draw_spec(draw):
    """A slice; of most a card holds two or three, so that the next ones have to push."""
    capability = draw.choice(["", "", "", "", AES, AES, ZSTD])
    found = spec(
        cores=draw.choice([0, 1, 1, 1, 2, 2, 3, 5]), memory=draw.choice([0, 1, 1, 1, 2, 2, 3, 6]),
        contiguous=draw.random() < 0.25, lanes=draw.choice([0, 0, 0, 0, 1, 2, 4]),
        capability=capability, units=draw.choice([1, 1, 2]) if capability else 0,
        keys=draw.choice([1, 1, 1, 1, 2]), priority=draw.choice([10, 10, 50, 50, 90, 90]),
        bandwidth=draw.choice([None, None, None, None, 40, 100]), reclaimable=draw.random() < 0.9,
    )  # fmt: skip
    if not (found.cores or found.memory or found.lanes or found.units):
        found = spec(cores=1)
    return found.check()


SEEDS = st.integers(0, 2**32 - 1)
"""Amounts come of seeds: hypothesis draws each single value small, and nothing would be scarce."""


def specs():
    return SEEDS.map(lambda seed: draw_spec(Random(seed)))


def adapters():
    return SEEDS.map(lambda seed: draw_adapter(Random(seed)))
