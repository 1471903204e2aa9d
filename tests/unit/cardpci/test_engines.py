"""Engines that really compute, through the ring: published vectors, and anything a guest may send.

AES: McGrew and Viega, "The Galois/Counter Mode of Operation", appendix B, as NIST published it with
the proposal for SP 800-38D; the numbers of the cases are theirs.
"""

import struct
import zlib

import pytest
import zstandard
from card_rig import Rig
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slice_driver import COMPRESS, DATA, DECOMPRESS, OPEN, RAM, SEAL, SIZE, SliceDriver
from slice_world import AES, ZSTD, spec

from virtfabric.model.units import MIB

OK, NO_ROOM, BAD_DATA, FORGED, ACCESS = 0, 6, 7, 8, 5

KEY = "feffe9928665731c6d6a8f9467308308"
IV = "cafebabefacedbaddecaf888"
MORE = "feedfacedeadbeeffeedfacedeadbeefabaddad2"
PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
SEALED_128 = (
    "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e"
    "21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091473f5985"
)
SEALED_256 = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
)
VECTORS = [
    # case, key, nonce, additional data, plain text, cipher text, tag
    (1, "00" * 16, "00" * 12, "", "", "", "58e2fccefa7e3061367f1d57a4e7455a"),
    (2, "00" * 16, "00" * 12, "", "00" * 16, "0388dace60b6a392f328c2b971b2fe78",
     "ab6e47d42cec13bdf53a67b21257bddf"),
    (3, KEY, IV, "", PLAIN, SEALED_128, "4d5c2af327cd64a62cf35abd2ba6fab4"),
    (4, KEY, IV, MORE, PLAIN[:120], SEALED_128[:120], "5bc94fbc3221a5db94fae95ae7121a47"),
    (7, "00" * 24, "00" * 12, "", "", "", "cd33b28ac773f74ba00ed1f312572435"),
    (13, "00" * 32, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    (14, "00" * 32, "00" * 12, "", "00" * 16, "cea7403d4d606b6e074ec5d3baf39d18",
     "d0d1c8a799996bf0265b98b5d48ab919"),
    (16, KEY * 2, IV, MORE, PLAIN[:120], SEALED_256, "76fc6ece0f4e1768cddf8853bb2d551b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("card"), accelerators={AES: 2, ZSTD: 1})
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def aes(rig):
    return SliceDriver(rig.connect(rig.aes()))


@pytest.fixture(scope="module")
def zstd(rig):
    name = rig.make("r-zstd", spec(cores=1, capability=ZSTD, units=1))
    rig.program(name, ZSTD)
    return SliceDriver(rig.connect(name))


def with_secret(driver, secret):
    start, _ = driver.piece()
    assert driver.store(start, secret)[0] == OK
    return {"card": (start, len(secret))}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"case-{vector[0]}")
def test_known_answers(aes, vector):
    secret, nonce, more, plain, sealed, tag = map(bytes.fromhex, vector[1:])
    card = with_secret(aes, secret)
    assert aes.compute(SEAL, plain, parameter=nonce + more, **card) == (OK, sealed + tag)
    assert aes.compute(OPEN, sealed + tag, parameter=nonce + more, **card) == (OK, plain)


def test_what_was_changed_does_not_come_out(aes):
    card = with_secret(aes, bytes.fromhex(KEY))
    parameter = bytes.fromhex(IV + MORE)
    _, sealed = aes.compute(SEAL, b"secret", parameter=parameter, **card)
    for place in range(len(sealed)):
        forged = bytearray(sealed)
        forged[place] ^= 1
        assert aes.compute(OPEN, bytes(forged), parameter=parameter, **card) == (FORGED, b"")
    assert aes.compute(OPEN, sealed, parameter=parameter + b"x", **card) == (FORGED, b"")
    assert aes.compute(OPEN, sealed, parameter=parameter, **with_secret(aes, bytes(16))) == (
        FORGED, b"",
    )  # fmt: skip


def test_what_makes_no_sense_is_refused(aes):
    card = with_secret(aes, bytes(32))
    start, _ = aes.piece()
    nonce = bytes(12)
    assert aes.compute(SEAL, b"x", parameter=nonce, card=(start, 15))[0] == BAD_DATA
    assert aes.compute(SEAL, b"x", parameter=nonce)[0] == BAD_DATA
    assert aes.compute(SEAL, b"x", parameter=nonce[:11], **card)[0] == BAD_DATA
    assert aes.compute(OPEN, bytes(15), parameter=nonce, **card)[0] == BAD_DATA
    assert aes.compute(SEAL, b"x", parameter=nonce, **card, room=16)[0] == NO_ROOM
    assert aes.compute(SEAL, b"x", parameter=nonce, **card, room=17)[0] == OK
    assert aes.compute(SEAL, b"x", parameter=nonce, **card, key=99)[0] == ACCESS
    assert aes.compute(COMPRESS, b"x")[0] == 3


def test_a_megabyte_through_aes(aes):
    card = with_secret(aes, bytes(range(32)))
    plain = bytes(range(256)) * 4096
    status, sealed = aes.compute(SEAL, plain[:-16], parameter=bytes(12), **card)
    assert status == OK
    assert len(sealed) == MIB
    assert aes.compute(OPEN, sealed, parameter=bytes(12), **card, room=MIB) == (OK, plain[:-16])


def test_compressed_comes_back_and_is_zstandard(zstd):
    plain = b"".join(b"line %d\n" % n for n in range(50_000))
    for level in (b"", b"\1", b"\x13"):
        status, packed = zstd.compute(COMPRESS, plain, parameter=level)
        assert status == OK
        assert len(packed) < len(plain) / 3
        assert zstandard.ZstdDecompressor().decompress(packed) == plain
        assert zstd.compute(DECOMPRESS, packed, room=len(plain)) == (OK, plain)
    assert zstd.compute(DECOMPRESS, packed, room=len(plain) - 1)[0] == NO_ROOM
    assert zstd.compute(COMPRESS, plain, room=100)[0] == NO_ROOM
    assert zstd.compute(COMPRESS, plain, parameter=b"\0")[0] == BAD_DATA
    assert zstd.compute(COMPRESS, plain, parameter=b"\x14")[0] == BAD_DATA
    assert zstd.compute(COMPRESS, plain, parameter=b"\1\1")[0] == BAD_DATA
    assert zstd.compute(DECOMPRESS, zlib.compress(plain))[0] == BAD_DATA
    assert zstd.compute(DECOMPRESS, b"")[0] == BAD_DATA
    assert zstd.compute(DECOMPRESS, packed[:-1], room=len(plain))[0] == BAD_DATA


def test_a_bomb_takes_no_more_than_there_is_room_for(zstd):
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 100_000
    assert zstd.compute(DECOMPRESS, bomb, room=MIB)[0] == NO_ROOM
    # the same without a promise of its size
    press = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    unsized = press.compress(bytes(1 << 24)) + press.flush()
    assert zstd.compute(DECOMPRESS, unsized, room=MIB)[0] == NO_ROOM
    press = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    small = press.compress(b"small") + press.flush()
    assert zstd.compute(DECOMPRESS, small, room=MIB) == (OK, b"small")
    assert zstd.compute(DECOMPRESS, small[:-1], room=MIB)[0] == BAD_DATA


@settings(
    max_examples=examples(200), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.binary(max_size=3000), st.binary(max_size=40), st.sampled_from([16, 24, 32]))
def test_whatever_is_sealed_opens(aes, plain, more, size):
    card = with_secret(aes, bytes(range(size)))
    parameter = bytes(12) + more
    status, sealed = aes.compute(SEAL, plain, parameter=parameter, **card)
    assert (status, len(sealed)) == (OK, len(plain) + 16)
    assert aes.compute(OPEN, sealed, parameter=parameter, **card) == (OK, plain)


PLACES = st.one_of(
    st.sampled_from([0, RAM, RAM + SIZE - 1, RAM + SIZE, (1 << 64) - 1, DATA]),
    st.integers(0, (1 << 64) - 1),
)
LENGTHS = st.one_of(st.sampled_from([0, 1, 16, 4096, MIB, MIB + 1, (1 << 32) - 1]),
                    st.integers(0, 5000))  # fmt: skip
DESCRIPTORS = st.builds(
    struct.Struct("<HHIQQQQIIIIII").pack,
    st.one_of(st.sampled_from([0, 1, 2, 0x10, 0x11, 0x20, 0x21, 0x30, 0x31]),
              st.integers(0, 65535)),
    st.sampled_from([0, 0, 1, 2]), st.sampled_from([0, 1, 2, 3, (1 << 32) - 1]),
    PLACES, PLACES, PLACES, PLACES, LENGTHS, LENGTHS, LENGTHS, LENGTHS,
    st.integers(0, (1 << 32) - 1), st.sampled_from([0, 0, 0, 1]),
)  # fmt: skip


@settings(
    max_examples=examples(300), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.one_of(DESCRIPTORS, st.binary(min_size=64, max_size=64)), st.booleans())
def test_any_descriptor_is_completed(aes, zstd, data, packs):
    driver = zstd if packs else aes
    driver.poke(driver.ring + 64 * (driver.sent % driver.entries), data)
    driver.sent += 1
    driver.ring_doorbell()
    status, written, _ = driver.wait()
    assert status <= 8
    assert written == 0 or status == OK
    assert driver.status == 1
