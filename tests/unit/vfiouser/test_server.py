"""The server over its real socket, spoken to by a client that shares no code with it."""

import errno
import mmap
import os
import resource
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from plain import DONE, REFUSED, Reverser
from vfio_client import (
    CONFIG,
    DMA_MAP,
    GET_INFO,
    IRQ_INFO,
    MSI,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    VERSION,
    Client,
    Event,
    Memory,
    VfioError,
    held,
)

from virtfabric.shim.vfiouser.server import FunctionServer

PAGE = 4096


@pytest.fixture
def function():
    return Reverser()


@pytest.fixture
def told():
    return []


@pytest.fixture
def server(tmp_path, function, told):
    server = FunctionServer(tmp_path / "f.sock", function, report=told.append)
    yield server
    server.close()


@pytest.fixture
def client(server):
    with Client(server.path) as client:
        yield client


def refused(call, *args, **more):
    with pytest.raises(VfioError) as error:
        call(*args, **more)
    return error.value.errno


def reverse(client, address, length):
    client.write(0, 0, struct.pack("<QI", address, length))
    client.put(12, 1)
    return client.get(16)


# -- what it says of itself -------------------------------------------------------------------


def test_the_clients_version_is_echoed(server):
    for minor in (0, 1, 3):
        with Client(server.path, greet=False) as client:
            major, same, able = client.greet(minor=minor)
            assert (major, same) == (0, minor)
            assert able["max_dma_maps"] == 65535
            assert able["max_data_xfer_size"] == 1 << 20


def test_a_stranger_to_the_protocol_is_refused(server):
    with Client(server.path, greet=False) as client:
        assert refused(client.ask, GET_INFO) == errno.EINVAL
        assert refused(client.greet, major=1) == errno.EINVAL
        assert refused(client.greet, text=b"{\0") == errno.EINVAL
        assert refused(client.greet, text=b"[" * 200_000 + b"\0") == errno.EINVAL
        assert refused(client.greet, text=b"7\0") == errno.EINVAL
        client.greet(text=b"")
        assert refused(client.greet) == errno.EINVAL
        assert refused(client.ask, 99) == errno.ENOTSUP


def test_the_device_its_regions_and_interrupts(client, function):
    assert struct.unpack("<IIII", client.ask(GET_INFO)) == (16, 3, 9, 5)
    assert client.region_info(0) == (3, PAGE, 0)
    assert client.region_info(1) == (0, 0, 0)
    assert client.region_info(CONFIG) == (3, 4096, 0)
    for index, vectors in enumerate((0, 1, 0, 0, 0)):
        answer = client.ask(IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        assert struct.unpack("<IIII", answer) == (16, 9, index, vectors)
    assert refused(client.region_info, 9) == errno.EINVAL
    assert refused(client.ask, IRQ_INFO, struct.pack("<IIII", 16, 0, 5, 0)) == errno.EINVAL


def test_a_region_in_memory_is_the_devices_own(client, function):
    assert client.region_info(2) == (7, 1 << 20, 0)
    (fd,) = client.fds
    with mmap.mmap(fd, 1 << 20) as seen:
        seen[5:10] = b"hello"
    os.close(fd)
    assert os.pread(function.fd, 5, 5) == b"hello"


def test_configuration_space(client):
    assert [client.config(at) for at in (0, 2, 0x2C, 0x2E)] == [0xF0CA, 0x1234, 0xF0CA, 7]
    assert client.config(8, "<I") >> 8 == 0x120000
    assert client.config(0x3D, "<B") == 0, "no interrupt pin"
    express = client.capability(0x10)
    assert client.config(express + 2) == 0x0002, "version 2, endpoint"
    assert client.config(express + 4, "<I") & 1 << 28, "FLR"
    for link in (express + 0x0C, express + 0x12):
        assert client.config(link) >> 4 & 0x3F == 4
        assert client.config(link) & 0xF == 4
    msi = client.capability(5)
    assert client.config(msi + 2) == 0x0080
    assert client.capability(0x11) == 0, "no MSI-X"
    assert client.config(client.capability(1) + 2) & 7 == 3
    acs = client.extended(0x0D)
    assert client.config(acs + 4, "<I") == 0
    assert client.config(acs + 3, "<B") >> 4 == 0 == client.config(acs + 2) >> 4


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_the_link_is_as_wide_as_it_is_told(tmp_path, width):
    server = FunctionServer(tmp_path / "w.sock", Reverser(width=width))
    with Client(server.path) as client:
        assert client.config(client.capability(0x10) + 0x12) >> 4 & 0x3F == width
    server.close()


def test_bars_are_sized_as_firmware_sizes_them(client):
    client.set_config(0x10, 0xFFFFFFFF, "<I")
    assert client.config(0x10, "<I") == 0xFFFFF000
    client.set_config(0x18, 0xFFFFFFFFFFFFFFFF, "<Q")
    assert client.config(0x18, "<Q") == 0xFFFFFFFFFFF0000C
    client.set_config(0x10, 0xFEBF1234, "<I")
    assert client.config(0x10, "<I") == 0xFEBF1000


def test_what_is_read_only_stays(client):
    before = client.read(CONFIG, 0, 4096)
    client.write(CONFIG, 0, b"\xff" * 4)
    client.write(CONFIG, 0x2C, b"\xff" * 4)
    client.write(CONFIG, 0x100, b"\xff" * 8)
    client.write(CONFIG, client.capability(0x10), b"\xff" * 8)
    assert client.read(CONFIG, 0, 4096) == before


# -- resets -----------------------------------------------------------------------------------


def test_a_function_level_reset(client, function):
    client.guest(0, PAGE)
    client.enable()
    client.set_config(0x10, 0xFEBF1000, "<I")
    client.put(0, 77)
    control = client.capability(0x10) + 8
    client.set_config(control, 0x2810 & ~0x8000)
    assert function.resets == 0
    client.set_config(control, 0x2810 | 0x8000)
    assert function.resets == 1
    assert client.config(4) == 0
    assert client.config(0x10, "<I") == 0
    assert client.config(control) == 0x2810, "the bit reads as zero"
    assert client.get(0) == 0
    assert reverse(client, 0, 8) == REFUSED, "bus mastering went with it"
    client.enable()
    assert reverse(client, 0, 8) == DONE, "what is mapped stays"


def test_the_upper_byte_of_the_control_alone_resets_as_well(client, function):
    client.set_config(client.capability(0x10) + 9, 0x80, "<B")
    assert function.resets == 1


def test_a_reset_by_the_client(client, function):
    client.put(0, 77)
    client.ask(RESET)
    assert (client.get(0), function.resets) == (0, 1)


# -- DMA --------------------------------------------------------------------------------------


def test_dma_moves_the_guests_bytes(client):
    memory = client.guest(0x10000, 2 * PAGE)
    client.enable()
    memory.bytes[4090:4100] = bytes(range(10))
    assert reverse(client, 0x10000 + 4090, 10) == DONE
    assert memory.bytes[4090:4100] == bytes(range(9, -1, -1))


@pytest.mark.parametrize(
    ("address", "length"),
    [(0xFFFF, 2), (0x10FFF, 2), (0x11000, 1), (0, 1), ((1 << 64) - 1, 1), (0x10000, PAGE + 1)],
)
def test_dma_beside_the_mapping_is_refused_and_changes_nothing(client, address, length):
    memory = client.guest(0x10000, PAGE)
    client.enable()
    memory.bytes[:] = before = os.urandom(PAGE)
    assert reverse(client, address, length) == REFUSED
    assert memory.bytes[:] == before


def test_dma_goes_on_from_one_mapping_into_the_next(client):
    memory = Memory(3 * PAGE)
    client.map(0, PAGE, memory.fd, 2 * PAGE)
    client.map(PAGE, PAGE, memory.fd, 0)
    client.enable()
    memory.bytes[3 * PAGE - 1] = 1
    memory.bytes[0] = 2
    assert reverse(client, PAGE - 1, 2) == DONE
    assert (memory.bytes[3 * PAGE - 1], memory.bytes[0]) == (2, 1)
    assert reverse(client, 2 * PAGE - 1, 2) == REFUSED


def test_dma_needs_bus_mastering_and_power(client):
    client.guest(0, PAGE)
    client.enable(master=False)
    assert reverse(client, 0, 8) == REFUSED
    client.enable()
    power = client.capability(1) + 4
    client.set_config(power, 3)
    assert reverse(client, 0, 8) == REFUSED
    client.set_config(power, 0)
    assert reverse(client, 0, 8) == DONE


def test_a_mapping_may_be_for_one_direction(client):
    memory = Memory(2 * PAGE)
    client.map(0, PAGE, memory.fd, 0, flags=1)
    client.map(PAGE, PAGE, memory.fd, PAGE, flags=2)
    client.enable()
    assert reverse(client, 0, 8) == REFUSED
    assert reverse(client, PAGE, 8) == REFUSED


def test_what_comes_without_a_file_is_not_reached(client):
    client.map(0, PAGE)
    client.enable()
    assert reverse(client, 0, 8) == REFUSED


def test_a_file_cut_short_by_the_client_refuses_and_kills_nobody(client):
    memory = client.guest(0, 4 * PAGE)
    client.enable()
    os.ftruncate(memory.fd, 0)
    assert reverse(client, 2 * PAGE, 8) == REFUSED
    assert client.config(0) == 0xF0CA


def test_unmapped_is_unreachable_at_once(client):
    memory = Memory(4 * PAGE)
    for page in range(4):
        client.map(page * PAGE, PAGE, memory.fd, page * PAGE)
    client.enable()
    client.unmap(PAGE, 2 * PAGE)
    assert [reverse(client, page * PAGE, 8) for page in range(4)] == [DONE, REFUSED, REFUSED, DONE]
    client.unmap(0, 0, flags=2)
    assert reverse(client, 0, 8) == REFUSED
    client.map(0, 4 * PAGE, memory.fd)
    assert refused(client.unmap, 0, PAGE) == errno.EINVAL
    assert refused(client.unmap, PAGE, 4 * PAGE) == errno.EINVAL
    assert reverse(client, 0, 8) == DONE


def test_bad_mappings_are_refused_and_leave_the_good(client):
    memory = client.guest(0x10000, 2 * PAGE)
    for address, size in ((0x10000, PAGE), (0xF000, 2 * PAGE), (0x11000, 2 * PAGE), (0, 1 << 40)):
        assert refused(client.map, address, size) == errno.EEXIST
    assert refused(client.map, (1 << 64) - PAGE, 2 * PAGE) == errno.EINVAL
    assert refused(client.map, 0, 0) == errno.EINVAL
    assert refused(client.map, 0, 3 * PAGE, memory.fd) == errno.EINVAL, "beyond the file"
    assert refused(client.map, 0, PAGE, memory.fd, (1 << 64) - PAGE) == errno.EINVAL
    reading, _ = os.pipe()
    assert refused(client.map, 0, PAGE, reading) == errno.EINVAL
    with Path("/proc/self/exe").open("rb") as file:
        assert refused(client.map, 0, PAGE, file.fileno()) == errno.EACCES
    both = struct.pack("<IIQQQ", 32, 3, 0, 0, PAGE)
    assert refused(client.ask, DMA_MAP, both, (memory.fd, memory.fd)) == errno.EINVAL
    assert refused(client.ask, DMA_MAP, both, (memory.fd,) * 20) == errno.EINVAL
    client.enable()
    assert reverse(client, 0x10000, 2 * PAGE) == DONE
    assert reverse(client, 0, 8) == REFUSED


def test_many_mappings_of_one_file_hold_one_descriptor(client, function):
    memory = Memory(PAGE)
    before = held(memory.fd)
    for page in range(500):
        client.map(page * PAGE, PAGE, memory.fd)
    assert held(memory.fd) == before + 1
    client.enable()
    assert reverse(client, 499 * PAGE, 8) == DONE
    client.unmap(0, 500 * PAGE)
    assert held(memory.fd) == before


# -- interrupts -------------------------------------------------------------------------------


def test_an_interrupt_comes_through_the_eventfd(client):
    event = client.eventfd()
    client.guest(0, PAGE)
    client.enable(msi=False)
    reverse(client, 0, 8)
    assert event.wait(0) == 0, "MSI is off"
    client.enable()
    reverse(client, 0, 8)
    reverse(client, 0, 8)
    assert event.wait(0) == 2
    other = client.eventfd()
    reverse(client, 0, 8)
    assert (event.wait(0), other.wait(0)) == (0, 1)
    client.irqs(1 | 32, MSI, 0, 0)
    reverse(client, 0, 8)
    assert other.wait(0) == 0


def test_a_vector_can_be_raised_and_silenced_by_the_client(client):
    event = client.eventfd()
    client.irqs(1 | 32, MSI, 0, 1)
    assert event.wait(0) == 1
    client.irqs(4 | 32, MSI, 0, 1)
    client.irqs(1 | 32, MSI, 0, 1)
    assert event.wait(0) == 0


def test_bad_vectors_are_refused(client):
    event = Event()
    assert refused(client.irqs, 4 | 32, MSI, 1, 1, (event.fd,)) == errno.EINVAL
    assert refused(client.irqs, 4 | 32, MSI, 0, 0xFFFFFFFF, (event.fd,)) == errno.EINVAL
    assert refused(client.irqs, 4 | 32, MSI, 0xFFFFFFFF, 2, (event.fd,)) == errno.EINVAL
    assert refused(client.irqs, 4 | 32, 2, 0, 1, (event.fd,)) == errno.EINVAL
    assert refused(client.irqs, 4 | 32, 5, 0, 1, (event.fd,)) == errno.EINVAL
    assert refused(client.irqs, 4 | 8, MSI, 0, 1, (event.fd,)) == errno.ENOTSUP
    assert refused(client.irqs, 4 | 32, MSI, 0, 1, (event.fd, event.fd)) == errno.EINVAL
    _, writing = os.pipe()
    assert refused(client.irqs, 4 | 32, MSI, 0, 1, (writing,)) == errno.EBADF


def test_an_eventfd_that_is_full_does_not_hold_the_device(client):
    event = client.eventfd()
    os.set_blocking(event.fd, True)
    os.eventfd_write(event.fd, (1 << 64) - 2)
    client.guest(0, PAGE)
    client.enable()
    os.set_blocking(event.fd, False)
    assert reverse(client, 0, 8) == DONE


# -- broken clients ---------------------------------------------------------------------------


def test_reads_and_writes_beside_a_region_are_refused(client):
    for region, offset, size in (
        (0, PAGE, 4), (0, PAGE - 2, 4), (1, 0, 4), (8, 0, 1), (42, 0, 1),
        (CONFIG, 4095, 2), (0, (1 << 64) - 2, 4), (0, 0, (1 << 20) + 1),
    ):  # fmt: skip
        body = struct.pack("<QII", offset, region, size)
        assert refused(client.ask, REGION_READ, body) == errno.EINVAL
    assert refused(client.ask, REGION_WRITE, struct.pack("<QII", 0, 0, 8) + b"1234") == errno.EINVAL
    assert refused(client.ask, REGION_READ, b"short") == errno.EINVAL
    assert refused(client.ask, SET_IRQS, b"") == errno.EINVAL


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff" * 64,
        struct.pack("<HHIII", 1, REGION_READ, 15, 0, 0),
        struct.pack("<HHIII", 1, REGION_READ, 1 << 31, 0, 0),
        struct.pack("<HHIII", 1, REGION_READ, 32, 1, 0),  # an answer that nobody asked for
        struct.pack("<HHIII", 1, VERSION, 100, 0, 0) + b"cut off",
        b"\x01",
    ],
)
def test_after_a_broken_message_the_next_client_is_served(server, function, told, junk):
    with Client(server.path) as client:
        event = client.eventfd()
        client.guest(0, PAGE)
        client.sock.sendall(junk)
        client.sock.shutdown(socket.SHUT_WR)
        with pytest.raises((EOFError, ConnectionError)):
            client.take()
    assert function.gone.wait(10)
    assert len(told) == 1
    with Client(server.path) as client:
        client.enable()
        assert reverse(client, 0, 8) == REFUSED, "memory of the other is gone"
        assert event.wait(0) == 0, "and its eventfd"


def test_a_second_client_is_turned_away_and_the_first_stays(server, client):
    with Client(server.path, greet=False) as second, pytest.raises((EOFError, OSError)):
        second.greet()
    assert client.config(0) == 0xF0CA


def test_a_process_without_descriptors_left_serves_again_when_it_has(server, told):
    with socket.socket(socket.AF_UNIX) as early:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            early.connect(str(server.path))
            until = time.monotonic() + 10
            while not told:
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in told[0]
    with Client(server.path) as client:
        assert client.config(0) == 0xF0CA


def test_requests_sent_ahead_keep_their_own_descriptors(client):
    memories = [Memory(PAGE) for _ in range(30)]
    for page, memory in enumerate(memories):
        memory.bytes[0] = page + 1
        client.post(
            DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, page * PAGE, PAGE), (memory.fd,)
        )  # fmt: skip
    assert [client.take()[2] for _ in memories] == [0] * 30
    client.enable()
    for page, memory in enumerate(memories):
        assert reverse(client, page * PAGE, 2) == DONE
        assert memory.bytes[:2] == bytes([0, page + 1])


def test_no_reply_where_none_is_wanted(client):
    client.post(REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"abcd", flags=0x10)
    client.post(REGION_READ, b"junk", flags=0x10)
    assert client.read(0, 0, 4) == b"abcd"


def test_closing_ends_a_client_that_says_nothing(tmp_path, function):
    server = FunctionServer(tmp_path / "f.sock", function)
    client = Client(server.path)
    ended = threading.Thread(target=server.close)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()
    assert not server.path.exists()
    with pytest.raises((EOFError, OSError)):
        client.get(0)
    server.close()


def test_the_socket_is_its_owners_alone(server):
    assert server.path.stat().st_mode & 0o777 == 0o600
