"""A stranger on the line: no crash, no hang, no unbounded memory, whatever comes.

`make check` takes some thousand frames; `VIRTFABRIC_FRAMES=1000000 pytest tests/unit/protocol`
takes a million and prints how long that took. Whatever went wrong once is in `corpus/`.
"""

import json
import os
import time
from pathlib import Path
from random import Random

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_data import FRAMES, MESSAGES, hello, split

from virtfabric.protocol.codec import KINDS, encode
from virtfabric.protocol.conversation import MAX_OUTGOING, Conversation
from virtfabric.protocol.frames import HEADER_SIZE, MAX_FRAME, Frame
from virtfabric.protocol.messages import Message, Role

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
NAMES = (
    "role", "serial", "versions", "spec", "qos", "priority", "cores", "memory", "slice", "seat",
    "keys", "readings", "values", "adapter", "accelerators", "victims", "reservation", "digest",
    "size", "code", "would_fit",
)  # fmt: skip
GREETING = encode(hello(Role.HOST, "H-1"), 1)


def talk(pieces, card=None):
    """Feed a card; what it understood. Whatever comes, these hold."""
    card = card or Conversation(hello(Role.CARD, "C-1"))
    understood = []
    for piece in pieces:
        understood += card.receive(piece)
        assert len(card._decoder._buffer) <= MAX_FRAME
        assert len(card._outgoing) <= MAX_OUTGOING
        card.outgoing()
    assert all(isinstance(received.message, Message) for received in understood)
    return understood


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=9), st.booleans())
@settings(max_examples=examples(100), deadline=None)
def test_noise(noise, cuts, greeted):
    talk(split(GREETING * greeted + noise, cuts))


@st.composite
def damaged(draw):
    """A right frame with something wrong, numbered rightly by whoever sends it."""
    number = draw(st.integers(2, 4))
    data = bytearray(encode(draw(MESSAGES), number))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(2, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([0, 0, 0, 1, 7]))
    return bytes(data[: len(data) - cut])


@given(st.lists(damaged(), max_size=5), st.lists(st.integers(0, 9000), max_size=9))
@settings(max_examples=examples(100), deadline=None)
def test_damaged_frames(frames, cuts):
    talk(split(GREETING + b"".join(frames), cuts))


@st.composite
def bodies(draw):
    """JSON that is nearly right: the field names of real messages with any values."""
    names = st.sampled_from(NAMES)
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=5), st.floats()
    )
    value = draw(
        st.recursive(
            leaves,
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)
            ),
            max_leaves=12,
        )
    )
    return json.dumps(value).encode()


@given(st.sampled_from(KINDS), bodies())
@settings(max_examples=examples(150), deadline=None)
def test_bodies_of_the_wrong_shape_are_refused_and_the_link_lives(kind, body):
    card = Conversation(hello(Role.CARD, "C-1"))
    talk([GREETING, Frame(1, kind.code, 2, 0, body).encode()], card)
    understood = talk([Frame(1, 0x10, 3, 0, b"{}").encode()], card)
    assert card.is_closed or len(understood) == 1


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_corpus(path, size):
    data = bytes.fromhex(path.read_text())
    pieces = [data[n : n + size] for n in range(0, len(data), size)]
    talk(pieces)
    talk([GREETING, *pieces])


def mutated(draw, seeds, number):
    """A frame of the corpus, damaged as fuzzers do, mostly with its number right."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        place = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + draw.randrange(8)] = b""
            case 2:
                data[place:place] = draw.randbytes(draw.randrange(8))
            case _:
                data[place] = draw.choice(b'{}[]",:0-9\x00\xff')
        if not data:
            return b"V"
    if draw.random() < 0.9 and len(data) >= HEADER_SIZE:
        data[:3] = b"VF\x01"
        data[4:8] = number.to_bytes(4)
        data[12:16] = max(0, len(data) - HEADER_SIZE - int.from_bytes(data[16:20]) % 4).to_bytes(4)
        data[16:20] = (len(data) - HEADER_SIZE - int.from_bytes(data[12:16])).to_bytes(4)
    return bytes(data)


def test_very_many_frames():
    """Mutations of real frames, most of them whole, at a card that goes on as long as it can."""
    frames, seed = FRAMES or examples(4000), int(os.environ.get("VIRTFABRIC_FRAMES_SEED", "1"))
    draw = Random(seed)
    seeds = [bytes.fromhex(path.read_text()) for path in CORPUS]
    card, number, understood, ended = None, 0, 0, 0
    began, slowest = time.monotonic(), 0.0
    for _ in range(frames):
        if card is None or card.is_closed:
            ended += card is not None
            card, number = Conversation(hello(Role.CARD, "C-1")), 1
            talk([GREETING], card)
        number += 1
        data = mutated(draw, seeds, number)
        at = time.monotonic()
        understood += len(talk([data], card))
        slowest = max(slowest, time.monotonic() - at)
        if card._decoder.held:
            # unfinished: a longer one was announced; give it what it waits for
            talk([bytes(MAX_FRAME)], card)
    took = time.monotonic() - began
    print(f"{frames} frames, {understood} understood, {ended} ended, {took:.0f} s, "
          f"slowest {slowest * 1e3:.1f} ms, seed {seed}")  # fmt: skip
    assert understood > frames // 50, "too few came through to prove anything"
    assert ended > frames // 100
