"""A slice's function from the guest's side: real sockets, real memory, real eventfds."""

import random
import re
import struct
import threading
import time

import pytest
from card_rig import Rig
from slice_driver import (
    COMPRESS,
    DATA,
    DECOMPRESS,
    DMA_READ,
    DMA_REFUSED,
    DMA_WRITTEN,
    FAULT,
    IRQ_MASK,
    IRQ_STATUS,
    LOAD,
    PAGE,
    RAM,
    RECEIVE,
    RING,
    SEAL,
    SEND,
    SIZE,
    STATE,
    STORE,
    SliceDriver,
    text,
)
from slice_world import AES, ZSTD, spec
from vfio_client import CONFIG, RESET

from virtfabric.adapters.pci.configspace import choose_recorded, find_acs, parse_badge
from virtfabric.model.badge import Badge
from virtfabric.model.units import MIB
from virtfabric.protocol import messages as m
from virtfabric.shim.cardpci.dma import Channel

(OK, BAD_DESCRIPTOR, UNKNOWN, NOT_READY, DMA_BAD, ACCESS, NO_ROOM, BAD_DATA, FORGED) = range(9)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, accelerators={AES: 2, ZSTD: 1, "net.vf": 2})
    yield rig
    rig.close()


@pytest.fixture
def driver(rig):
    return SliceDriver(rig.connect(rig.aes()))


def until(condition, timeout=20):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- who it is --------------------------------------------------------------------------------


def test_its_configuration_space_shows_the_badge_that_the_card_tells(rig):
    names = [rig.make(f"r-{number}", spec(cores=1)) for number in range(2)]
    told = {r.slice.id: r.badge for r in rig.ask(m.InventoryRequest()).slices}
    assert len(set(told.values())) == 2
    for name in names:
        config = rig.connect(name).read(CONFIG, 0, 4096)
        assert parse_badge(config) == Badge("C-1", name, told[name])
        assert find_acs(config) == 0x100
        assert parse_badge(b"".join(choose_pieces(config))) == Badge("C-1", name, told[name])
    assert parse_badge(rig.connect("management").read(CONFIG, 0, 4096)) is None


def choose_pieces(config):
    """What a record of the machine keeps, zeros between."""
    at = 0
    for offset, piece in sorted(choose_recorded(config).items()):
        yield bytes(offset - at) + piece
        at = offset + len(piece)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0x108, 0x24), (0x10C, 0), (0x10E, 0x02), (0x110, 2), (0x10F, 0x08), (0x124, 0),
     (0x125, 0x20), (0x164, 0xFF), (0x166, 0x0A)],
)  # fmt: skip
def test_a_badge_that_cannot_be_read_is_none(rig, offset, value):
    config = bytearray(rig.connect(rig.make("r-1", spec(cores=1))).read(CONFIG, 0, 4096))
    assert parse_badge(bytes(config))
    config[offset] = value
    assert parse_badge(bytes(config)) is None
    assert parse_badge(bytes(config[:0x108])) is None


def test_a_slice_says_who_it_is(rig):
    name = rig.make("r-1", spec(cores=2, memory=3, lanes=4, keys=2, bandwidth=50), holder="guest")
    client = rig.connect(name)
    assert client.read(0, 0, 8) == b"VFCS" + struct.pack("<I", 0x10000)
    assert text(client.read(0, 0x40, 64)) == "C-1"
    assert text(client.read(0, 0x80, 64)) == name
    assert text(client.read(0, 0xC0, 64)) == ""
    assert client.config(0) == 0xF0CA
    assert client.config(2) == 0x0C02
    seat = rig.bench.card.books.slices[name].seat
    assert client.get(0x34) == 2
    seen = []
    for number in range(3):
        client.put(0x38, number)
        seen.append(client.get(0x3C))
    assert seen == [*seat.keys, 0xFFFFFFFF]
    assert client.get(0x100) == 1
    assert (client.get64(0x108), client.get64(0x110)) == seat.memory[0]
    client.put(0x104, 1)
    assert (client.get64(0x108), client.get64(0x110)) == ((1 << 64) - 1, 0)
    assert [client.get(at) for at in (0x118, 0x11C, 0x120)] == [2, 0, 50]


@pytest.mark.parametrize(("lanes", "width"), [(0, 16), (1, 1), (2, 2), (8, 8)])
def test_the_lanes_granted_are_the_width_of_its_link(rig, lanes, width):
    client = rig.connect(rig.make("r-1", spec(cores=1, lanes=lanes)))
    express = client.capability(0x10)
    assert client.config(express + 0x0C) >> 4 & 0x3F == width
    assert client.config(express + 0x12) >> 4 & 0x3F == width


def test_its_class_follows_what_it_is_for(rig):
    for number, (capability, wanted) in enumerate(
        [(AES, 0x108000), (ZSTD, 0x120000), ("net.vf", 0x028000)]
    ):
        name = rig.make(f"r-{number}", spec(cores=1, capability=capability, units=1))
        assert rig.connect(name).config(8, "<I") >> 8 == wanted


def test_registers_are_whole_words(rig):
    client = rig.connect(rig.make("r-1", spec(cores=1)))
    assert client.read(0, 1, 4) == client.read(0, 0, 2) + b"\xff\xff" == b"\xff" * 4
    assert client.read(0, 0x2C0, 8) == b"\xff" * 8
    client.write(0, 0x14, b"\1\0")
    assert client.get(IRQ_MASK) == 0
    client.put(0, 7)
    assert client.read(0, 0, 4) == b"VFCS"


def test_programming_shows_and_interrupts(rig):
    name = rig.make("r-1", spec(cores=1, capability=AES, units=1))
    client = rig.connect(name)
    driver = SliceDriver(client)
    client.put(IRQ_MASK, 4)
    assert client.get(STATE) == 0
    assert driver.compute(SEAL, b"", parameter=bytes(12))[0] == NOT_READY
    rig.program(name)
    assert client.get(STATE) == 3
    assert driver.event.wait() == 1
    assert client.get(IRQ_STATUS) == 4
    client.put(IRQ_STATUS, 4)
    assert client.get(IRQ_STATUS) == 0
    assert text(client.read(0, 0xC0, 64)) == AES


# -- DMA --------------------------------------------------------------------------------------


def test_what_is_stored_in_the_card_comes_back_by_dma_and_is_counted(driver):
    start, size = driver.piece()
    assert size == MIB
    data = bytes(range(256)) * 1000
    assert driver.store(start + 100, data) == (OK, len(data))
    counts = [driver.client.get64(at) for at in (DMA_READ, DMA_WRITTEN)]
    assert counts == [64 + len(data), 16]
    target = DATA + 0x200000
    assert driver.do(
        LOAD, key=driver.key(), target=(target, len(data)), card=(start + 100, len(data))
    ) == (OK, len(data))
    assert driver.peek(target, len(data)) == data
    counts = [driver.client.get64(at) for at in (DMA_READ, DMA_WRITTEN)]
    assert counts == [128 + len(data), 32 + len(data)]
    assert driver.client.get(DMA_REFUSED) == 0


@pytest.mark.parametrize("address", [0, RAM - 8, RAM + SIZE - 8, (1 << 64) - 8])
def test_dma_outside_the_guest_is_refused_and_seen(driver, address):
    start, _ = driver.piece()
    driver.client.put(IRQ_MASK, 8)
    before = driver.client.get64(DMA_READ)
    assert driver.do(STORE, key=driver.key(), source=(address, 16), card=(start, 0)) == (DMA_BAD, 0)
    client = driver.client
    assert client.get(FAULT) == 1
    assert client.get64(0x28) == (RAM + SIZE if address == RAM + SIZE - 8 else address)
    assert client.get(0x30) == client.get(DMA_REFUSED) == 1
    assert client.get64(DMA_READ) == before + 64
    assert driver.event.wait() == 1
    assert driver.store(start, b"more") == (OK, 4), "the queue goes on"
    written = client.get64(DMA_WRITTEN)
    load = driver.do(LOAD, key=driver.key(), target=(address, 16), card=(start, 16))
    assert load == (DMA_BAD, 0)
    assert client.get64(DMA_WRITTEN) == written + 16, "the completion, nothing else"
    assert (client.get(0x30), client.get(DMA_REFUSED)) == (2, 2)
    client.put(FAULT, 0xFFFFFFFF)
    assert client.get(FAULT) == 0


def test_the_host_hears_of_refused_dma(rig, driver):
    start, _ = driver.piece()
    for _ in range(3):
        assert driver.do(STORE, key=driver.key(), source=(0, 16), card=(start, 0)) == (DMA_BAD, 0)
    rig.runner.ask(lambda: None)  # the card looks at its functions whenever it has done something
    rig.runner.ask(rig.bench.card.tick)
    events = [event for event in rig.events if event.what == "dma-refused"]
    assert {event.slice for event in events} == {"slice-1"}
    assert sum(int(event.detail.split()[0]) for event in events) == 3


def test_telemetry_has_the_counts(rig, driver):
    start, _ = driver.piece()
    driver.store(start, bytes(1000))
    rig.runner.ask(lambda: None)
    (told,) = (
        t for t in rig.runner.ask(lambda: rig.bench.pass_time(2)) if isinstance(t, m.Telemetry)
    )
    figures = {reading.subject: reading.values for reading in told.readings}
    assert figures["slice-1"] == {"dma_read": 1064, "dma_written": 16, "dma_refused": 0}


def test_a_ring_outside_the_guest_stops_the_queue(driver):
    driver.stop()
    driver.ring = RAM + SIZE
    driver.client.put64(driver.at, driver.ring)
    driver.client.put(driver.at + 0x14, 1)
    driver.client.put(driver.at + 0x1C, 1)
    until(lambda: driver.status == 2)
    assert driver.client.get(FAULT) == 1
    assert driver.client.get64(0x28) == RAM + SIZE
    driver.ring = RING
    driver.stop()
    driver.start()
    assert driver.do(0) == (OK, 0)


@pytest.mark.parametrize(("ring", "done", "entries"), [
    (RAM + 1, RAM, 8), (RAM, RAM + 8, 8), (RAM, RAM, 0), (RAM, RAM, 3), (RAM, RAM, 2048),
])  # fmt: skip
def test_rings_that_cannot_be_do_not_start(driver, ring, done, entries):
    driver.stop()
    assert driver.status == 0
    driver.client.put64(driver.at, ring)
    driver.client.put64(driver.at + 8, done)
    driver.client.put(driver.at + 0x10, entries)
    driver.client.put(driver.at + 0x14, 1)
    assert driver.status == 2
    assert driver.client.get(FAULT) == 3


def test_a_doorbell_beyond_the_ring_stops_the_queue(driver):
    driver.client.put(driver.at + 0x1C, 9)
    assert driver.status == 2
    assert driver.client.get(FAULT) == 4


def test_a_queue_that_does_not_run_counts_nothing(driver):
    driver.stop()
    for doorbell in (1, 8, 2**32 - 1):
        driver.client.put(driver.at + 0x1C, doorbell)
        assert [driver.client.get(driver.at + at) for at in (0x18, 0x1C, 0x20)] == [0, 0, 0]
    driver.start()
    assert driver.do(0) == (OK, 0)


def test_the_ring_goes_round(driver):
    for number in range(3 * driver.entries):
        driver.describe(0, cookie=number)
        if number % 3 == 2:
            driver.ring_doorbell()
            assert [driver.wait(n + 1)[2] for n in range(number - 2, number + 1)] == [
                number - 2, number - 1, number,
            ]  # fmt: skip
    assert driver.client.get(driver.at + 0x20) == 24


def test_bus_mastering_off_is_no_dma(driver):
    driver.client.set_config(4, 2)
    driver.describe(0)
    driver.ring_doorbell()
    until(lambda: driver.status == 2)
    assert driver.client.get(DMA_REFUSED) == 1


def test_an_interrupt_comes_with_the_descriptors_that_want_it(driver):
    driver.client.put(IRQ_MASK, 1)
    driver.do(0)
    assert driver.client.get(IRQ_STATUS) == 0
    driver.do(0, flags=1)
    assert driver.event.wait() == 1
    driver.do(0, flags=1)
    assert driver.event.wait(0) == 0, "the cause waits to be cleared"
    driver.client.put(IRQ_STATUS, 1)
    driver.do(0, flags=1)
    assert driver.event.wait() == 1
    driver.client.put(IRQ_STATUS, 1)
    driver.client.put(IRQ_MASK, 0)
    driver.do(0, flags=1)
    assert driver.event.wait(0) == 0
    driver.client.put(IRQ_MASK, 1)
    assert driver.event.wait() == 1, "it was waiting behind the mask"


@pytest.mark.parametrize(
    "more",
    [{"flags": 2}, {"reserved": 1}, {"source": (DATA, MIB + 1)}, {"target": (DATA, MIB + 1)},
     {"card": (0, MIB + 1)}, {"parameter": (DATA, 4097)}],
)  # fmt: skip
def test_bad_descriptors_are_refused_each(driver, more):
    assert driver.do(STORE, **more) == (BAD_DESCRIPTOR, 0)
    assert driver.do(0x77) == (UNKNOWN, 0)
    assert driver.do(0) == (OK, 0)


# -- protection -------------------------------------------------------------------------------


def test_a_wrong_key_faults_visibly(rig, driver):
    other = rig.make("r-2", spec(cores=1, memory=1))
    seat = rig.bench.card.books.slices[other].seat
    start, _ = driver.piece()
    theirs = seat.memory[0].start
    cases = [(seat.keys[0], theirs), (seat.keys[0], start), (driver.key(), theirs), (0, start),
             (77, start), (driver.key(), start + MIB - 8), (driver.key(), 1 << 60)]  # fmt: skip
    for key, address in cases:
        assert driver.store(address, b"0123456789abcdef", key) == (ACCESS, 0)
    client = driver.client
    assert (client.get(FAULT), client.get(0x24), client.get64(0x28)) == (2, *cases[0])
    assert client.get(0x30) == len(cases)
    rig.runner.ask(rig.bench.card.tick)
    events = [event for event in rig.events if event.what == "access-fault"]
    assert {event.slice for event in events} == {"slice-1"}, "who did it, not whose key it was"
    more = [re.search(r"\(and (\d+) more\)", event.detail) for event in events]
    assert sum(1 + (int(found[1]) if found else 0) for found in more) == len(cases)
    theirs_driver = SliceDriver(rig.connect(other))
    target = DATA + 0x200000
    theirs_driver.do(LOAD, key=seat.keys[0], target=(target, 16), card=(theirs, 16))
    assert theirs_driver.peek(target, 16) == bytes(16), "nothing was written there"


def test_memory_of_a_slice_that_ended_is_scrubbed(rig):
    name = rig.make("r-1", spec(cores=1, memory=16))
    driver = SliceDriver(rig.connect(name))
    assert driver.store(0, b"secret") == (OK, 6)
    rig.release(name)
    other = SliceDriver(rig.connect(rig.make("r-2", spec(cores=1, memory=16))))
    target = DATA + 0x200000
    assert other.do(LOAD, key=other.key(), target=(target, 6), card=(0, 6)) == (OK, 6)
    assert other.peek(target, 6) == bytes(6)


def test_what_a_guest_stored_is_not_there_for_the_next(rig):
    name = rig.make("r-1", spec(cores=1, memory=1), holder="guest")
    driver = SliceDriver(rig.connect(name))
    start, _ = driver.piece()
    target = DATA + 0x200000

    def stored():
        assert driver.do(LOAD, key=driver.key(), target=(target, 6), card=(start, 6)) == (OK, 6)
        return driver.peek(target, 6)

    assert driver.store(start, b"secret") == (OK, 6)
    rig.ask(m.Assign(name, "guest"))
    assert stored() == b"secret", "it has it already"
    rig.ask(m.Assign(name, ""))
    assert stored() == bytes(6)


def test_a_slice_that_grows_keeps_its_function_and_what_it_holds(rig):
    name = rig.make("r-1", spec(cores=1, memory=1, contiguous=True), holder="guest")
    driver = SliceDriver(rig.connect(name))
    start, _ = driver.piece()
    driver.store(start, b"kept")
    rig.make("r-2", spec(cores=2, memory=4, contiguous=True), slice=name)
    assert driver.piece() == (start, 4 * MIB)
    assert driver.client.get(0x118) == 2
    target = DATA + 0x200000
    driver.do(LOAD, key=driver.key(), target=(target, 4), card=(start, 4))
    assert driver.peek(target, 4) == b"kept"
    assert driver.store(start + 3 * MIB, b"new") == (OK, 3)


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_slice_that_grows_before_or_between_its_pieces_keeps_what_it_holds(rig, ended):
    """Neighbours are one piece then, which begins elsewhere, or is longer than what came."""
    beside = [rig.make(f"b-{n}", spec(cores=1, memory=1)) for n in range(5)]
    rig.make("rest", spec(cores=1, memory=11))
    for name in (beside[1], beside[3]):
        rig.release(name)
    name = rig.make("r-1", spec(cores=1, memory=2), holder="guest")
    driver = SliceDriver(rig.connect(name))
    pieces = [driver.piece(n) for n in (0, 1)]
    assert pieces == [(MIB, MIB), (3 * MIB, MIB)]
    for start, _ in pieces:
        assert driver.store(start, b"kept") == (OK, 4)
    rig.release(beside[2 * ended])
    rig.make("r-2", spec(cores=1, memory=3), slice=name)
    target = DATA + 0x200000
    for start, _ in pieces:
        driver.do(LOAD, key=driver.key(), target=(target, 4), card=(start, 4))
        assert driver.peek(target, 4) == b"kept", hex(start)


def test_what_another_left_is_not_seen_while_a_slice_grows(rig):
    """Between the grant and the next look at the firmware, when memory becomes zeros."""
    name = rig.make("r-1", spec(cores=1, memory=1, contiguous=True), holder="guest")
    other = rig.make("r-2", spec(cores=1, memory=1))
    driver, theirs = (SliceDriver(rig.connect(one)) for one in (name, other))
    start, _ = theirs.piece()
    theirs.store(start, b"secret")
    target = DATA + 0x200000
    seen = []

    def release_and_grow():
        rig.bench.ask(m.Release(other))
        rig.bench.make("r-3", spec(cores=1, memory=2, contiguous=True), slice=name)
        seen.append(driver.do(LOAD, key=driver.key(), target=(target, 6), card=(start, 6)))

    rig.runner.ask(release_and_grow)
    assert driver.piece() == (0, 2 * MIB)
    assert b"secret" not in driver.peek(target, 6), seen
    assert driver.do(LOAD, key=driver.key(), target=(target, 6), card=(start, 6)) == (OK, 6)
    assert driver.peek(target, 6) == bytes(6)


# -- ends -------------------------------------------------------------------------------------


def flr(client):
    client.set_config(client.capability(0x10) + 8, 0x8000)


@pytest.mark.parametrize("reset", [flr, lambda client: client.ask(RESET)])
def test_a_reset_stops_all_and_forgets_all_but_the_slice(driver, reset):
    start, _ = driver.piece()
    driver.store(start, b"kept")
    driver.store(1 << 60, b"fault")
    driver.client.put(IRQ_MASK, 0xF)
    client = driver.client
    reset(client)
    for at in (IRQ_MASK, IRQ_STATUS, FAULT, 0x30, 0x200, 0x208, 0x210, 0x214, 0x218, 0x21C, 0x220):
        assert client.get(at) == 0, hex(at)
    assert client.get(STATE) == 3
    assert client.get64(DMA_READ) == 2 * 64 + 9
    client.enable()
    driver.start()
    target = DATA + 0x200000
    driver.do(LOAD, key=driver.key(), target=(target, 4), card=(start, 4))
    assert driver.peek(target, 4) == b"kept", "the card's memory is the slice's, not the function's"


@pytest.mark.parametrize("end", ["unmap", "flr", "stop", "master"])
def test_nothing_is_written_after_an_end_in_mid_flight(rig, end):
    """Memory that was taken away belongs to somebody else from the answer on."""
    name = rig.make("r-1", spec(cores=1, memory=1))
    driver = SliceDriver(rig.connect(name), entries=1024)
    start, _ = driver.piece()
    driver.store(start, b"\xab" * 65536)
    key, target = driver.key(), DATA + 0x200000
    for _ in range(1000):
        driver.describe(LOAD, key=key, target=(target, 65536), card=(start, 65536))
    driver.ring_doorbell()
    client = driver.client
    until(lambda: client.get(driver.at + 0x20) >= 5)
    match end:
        case "unmap":
            client.unmap(RAM, SIZE)
        case "flr":
            flr(client)
        case "stop":
            driver.stop()
        case "master":
            client.set_config(4, 2)
    driver.ram.bytes[:] = bytes(SIZE)
    moved = client.get64(DMA_WRITTEN)
    if end in ("unmap", "master"):
        until(lambda: driver.status == 2)
        assert client.get(FAULT) == 1
    assert moved < 1000 * 65536, "it was in mid-flight"
    for _ in range(20):
        client.get(STATE)
    assert not any(driver.ram.bytes[:])
    assert client.get64(DMA_WRITTEN) == moved


def test_nothing_of_before_shows_after_a_reset_in_mid_flight(rig):
    driver = SliceDriver(rig.connect(rig.make("r-1", spec(cores=1, memory=1))), entries=1024)
    client = driver.client
    for _ in range(10):
        client.put(IRQ_MASK, 0xF)
        for _ in range(1000):
            driver.describe(STORE, key=99, source=(DATA, 8), flags=1)
        driver.ring_doorbell()
        until(lambda: client.get(driver.at + 0x20) >= 5)
        flr(client)
        for _ in range(20):
            assert [client.get(at) for at in (IRQ_STATUS, FAULT, 0x30, 0x220)] == [0] * 4
        driver.event.wait(0)
        client.enable()
        assert driver.event.wait(0) == 0
        driver.start()


def test_a_store_that_was_stopped_does_not_reach_the_next_holder(rig, monkeypatch):
    """Its bytes were read before the stop, and it would be carried out after the scrubbing."""
    name = rig.make("r-1", spec(cores=1, memory=1), holder="guest")
    driver = SliceDriver(rig.connect(name))
    start, _ = driver.piece()
    has_read, goes_on = threading.Event(), threading.Event()
    read = Channel.read

    def slow(channel, address, size):
        data = read(channel, address, size)
        if data == b"secret":
            has_read.set()
            assert goes_on.wait(20)
        return data

    monkeypatch.setattr(Channel, "read", slow)
    driver.poke(DATA, b"secret")
    driver.describe(STORE, key=driver.key(), source=(DATA, 6), card=(start, 0))
    driver.ring_doorbell()
    assert has_read.wait(20)
    flr(driver.client)
    rig.ask(m.Assign(name, ""))
    goes_on.set()
    driver.client.enable()
    driver.start()
    target = DATA + 0x200000
    assert driver.do(LOAD, key=driver.key(), target=(target, 6), card=(start, 6)) == (OK, 6)
    assert driver.peek(target, 6) == bytes(6)


def test_a_slice_that_ends_goes_silent_and_is_taken_out(rig, driver):
    assert rig.slots.next()[:2] == ("plug", "management")
    assert rig.slots.next()[:2] == ("plug", "slice-1")
    path = rig.runner.device.sockets["slice-1"]
    rig.ask(m.Assign("slice-1", ""))
    rig.release("slice-1")
    assert rig.slots.next() == ("unplug", "slice-1")
    assert "slice-1" not in rig.runner.device.sockets
    until(lambda: not path.exists())
    with pytest.raises((OSError, EOFError)):
        driver.client.get(STATE)


def test_other_lanes_are_another_function(rig):
    name = rig.make("r-1", spec(cores=1, lanes=4))
    rig.slots.next()
    first = rig.slots.next()
    rig.slots.free.clear()
    rig.make("r-2", spec(cores=1, lanes=8), slice=name)
    assert rig.slots.next() == ("unplug", name)
    assert first[2].exists(), "the machine may still look at it"
    rig.slots.free.set()
    verb, same, path = rig.slots.next()
    assert (verb, same) == ("plug", name)
    assert path != first[2]
    client = rig.connect(name)
    assert client.config(client.capability(0x10) + 0x12) >> 4 & 0x3F == 8


def test_what_cannot_be_plugged_is_told_and_serves_nevertheless(rig):
    rig.slots.fails = True
    name = rig.make("r-1", spec(cores=1))
    assert rig.connect(name).config(0) == 0xF0CA
    until(lambda: rig.told)
    assert rig.told == [f"{name} was not plugged: no free port"]


def test_a_function_that_cannot_be_served_is_told_once(rig):
    """The path of its socket is too long for a Unix socket."""
    rig.runner.device._directory = rig.path / ("x" * 100)
    name = rig.make("r-1", spec(cores=1))
    for _ in range(3):
        rig.runner.ask(lambda: None)
    (told,) = rig.told
    assert told.startswith(f"{name} has no function: ")
    assert name not in rig.runner.device.sockets
    rig.release(name)
    rig.runner.device._directory = rig.path
    assert rig.connect(rig.make("r-2", spec(cores=1))).config(0) == 0xF0CA


def test_after_loss_of_power_the_slices_are_there_again(rig):
    name = rig.aes()
    rig.runner.close()
    rig.bench.cut_power()
    rig.run("boot-2")
    client = rig.connect(name)
    assert client.get(STATE) == 3
    assert text(client.read(0, 0xC0, 64)) == AES


def test_a_bandwidth_limit_is_kept(rig):
    name = rig.make("r-1", spec(cores=1, memory=1, bandwidth=80))
    driver = SliceDriver(rig.connect(name))
    start, _ = driver.piece()
    before = time.monotonic()
    for _ in range(5):
        driver.store(start, bytes(MIB))
    # 5 MiB at 10 MB/s; a tenth of a second may be saved up, and the last one is not waited for
    assert time.monotonic() - before > 4 * MIB / 10e6 - 0.1


def test_a_bandwidth_limit_is_kept_by_what_fails(rig):
    """Bytes that were read are moved, whatever comes of them."""
    name = rig.make("r-1", spec(cores=1, memory=1, bandwidth=80))
    driver = SliceDriver(rig.connect(name))
    before = time.monotonic()
    for _ in range(5):
        assert driver.store(0, bytes(MIB), key=99) == (ACCESS, 0)
    assert time.monotonic() - before > 4 * MIB / 10e6 - 0.1


def test_whoever_asks_is_answered_while_it_computes(rig):
    """QEMU gives up on a function that does not answer within five seconds, for good."""
    name = rig.make("r-1", spec(cores=1, capability=ZSTD, units=1))
    rig.program(name, ZSTD)
    driver = SliceDriver(rig.connect(name))
    driver.poke(DATA, random.Random(1).randbytes(MIB))
    driver.poke(RING + 0x8000, b"\x13")
    for _ in range(3):
        driver.describe(COMPRESS, source=(DATA, MIB), target=(DATA + 2 * MIB, MIB),
                        parameter=(RING + 0x8000, 1))  # fmt: skip
    driver.ring_doorbell()
    slowest = 0.0
    asked = 0
    while driver.client.get(driver.at + 0x20) < 3:
        before = time.monotonic()
        driver.client.get(STATE)
        slowest = max(slowest, time.monotonic() - before)
        asked += 1
    # one that waited for an operation would hear an answer or two for each of them
    assert asked > 50
    assert slowest < 3.0


# -- frames -----------------------------------------------------------------------------------


def net(rig, number):
    name = rig.make(f"r-{number}", spec(cores=1, capability="net.vf", units=1))
    rig.program(name, "net.vf")
    client = rig.connect(name)
    sender = SliceDriver(client)
    receiver = SliceDriver(client, 1, ram=sender.ram)
    return sender, receiver, client.read(0, 0x140, 8)[:6]


def test_frames_go_from_slice_to_slice(rig):
    (send_a, receive_a, mac_a), (_, receive_b, mac_b) = net(rig, 1), net(rig, 2)
    assert mac_a != mac_b
    assert mac_a[0] & 3 == mac_b[0] & 3 == 2
    for to in (mac_b, b"\xff" * 6):
        receive_b.describe(RECEIVE, target=(DATA + PAGE, 2048))
        receive_b.ring_doorbell()
        frame = to + mac_a + b"\x88\xb5" + bytes(range(100))
        send_a.poke(DATA, frame)
        assert send_a.do(SEND, source=(DATA, len(frame))) == (OK, 0)
        assert receive_b.wait()[:2] == (OK, len(frame))
        assert receive_b.peek(DATA + PAGE, len(frame)) == frame
    send_a.poke(DATA, mac_b + mac_b + bytes(60))
    assert send_a.do(SEND, source=(DATA, 72)) == (BAD_DATA, 0), "in another's name"
    assert send_a.do(SEND, source=(DATA, 13)) == (BAD_DATA, 0)
    frame = b"\x02\0\0\0\0\1" + mac_a + bytes(60)
    send_a.poke(DATA, frame)
    assert send_a.do(SEND, source=(DATA, 72)) == (OK, 0), "to nobody"
    receive_a.describe(RECEIVE, target=(DATA, 2048))
    receive_a.ring_doorbell()
    assert send_a.do(0) == (OK, 0)
    assert receive_a.client.get(receive_a.at + 0x20) == 0


def test_frames_for_which_there_is_no_room_are_counted(rig):
    (send_a, _, mac_a), (_, receive_b, mac_b) = net(rig, 1), net(rig, 2)
    send_a.poke(DATA, mac_b + mac_a + bytes(60))
    for _ in range(260):
        assert send_a.do(SEND, source=(DATA, 72)) == (OK, 0)
    assert receive_b.client.get(0x148) == 4


def test_a_slice_for_something_else_has_no_frames(driver):
    assert driver.do(SEND, source=(DATA, 64)) == (NOT_READY, 0)
    assert driver.do(RECEIVE, target=(DATA, 64)) == (NOT_READY, 0)
    assert driver.do(DECOMPRESS) == (NOT_READY, 0)
    assert driver.client.read(0, 0x140, 8) == bytes(8)
