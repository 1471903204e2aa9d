"""Whatever a driver writes into registers and configuration space: answered, and a reset helps."""

import pytest
from card_rig import Rig
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mailbox_driver import MailboxDriver
from slice_driver import DATA, DONE, RAM, RING, SEAL, SIZE, SliceDriver
from vfio_client import CONFIG, RESET

EMPTY_TAG = "58e2fccefa7e3061367f1d57a4e7455a"
"""Of AES-GCM's first published case: nothing, encrypted with nothing but zeros."""
VALUES = st.one_of(
    st.integers(0, 16), st.sampled_from([RING, DONE, DATA, RAM + SIZE, 0x10000, 0x8000_0000]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
WRITES = st.lists(
    st.tuples(
        st.one_of(
            st.tuples(st.just(0), st.integers(0, 0x280 // 4).map(lambda n: 4 * n)),
            st.tuples(st.just(0), st.integers(0, 4088)),
            st.tuples(st.just(CONFIG), st.integers(0, 0x110)),
        ),
        st.one_of(VALUES.map(lambda value: value.to_bytes(4, "little")), st.binary(max_size=8)),
    ),
    max_size=40,
)
SETTINGS = settings(
    max_examples=examples(200), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("card"))
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def driver(rig):
    return SliceDriver(rig.connect(rig.aes()))


@pytest.fixture(scope="module")
def mailbox(rig):
    return MailboxDriver(rig.connect("management"))


def write(client, writes):
    for (region, offset), data in writes:
        client.write(region, offset, data)
        assert len(client.read(region, offset, len(data))) == len(data)


@SETTINGS
@given(WRITES)
def test_a_slice(driver, writes):
    write(driver.client, writes)
    driver.client.ask(RESET)
    assert driver.client.read(0, 0, 4) == b"VFCS"
    driver.client.enable()
    driver.start()
    start, _ = driver.piece()
    assert driver.store(start, bytes(16))[0] == 0
    status, tag = driver.compute(SEAL, b"", parameter=bytes(12), card=(start, 16))
    assert (status, tag.hex()) == (0, EMPTY_TAG)


@SETTINGS
@given(WRITES)
def test_the_mailbox(mailbox, writes):
    write(mailbox.client, writes)
    mailbox.client.ask(RESET)
    mailbox.open()
    mailbox.send(b"\x16\x03\x01\x00\x05hello")
    mailbox.until(lambda: mailbox.receive()[:1] == b"\x15")
