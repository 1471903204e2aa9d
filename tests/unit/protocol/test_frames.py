"""Frames and bodies: any split, bounded, clear about what is wrong."""

import json
import struct

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_data import BY_TYPE, MESSAGES, split

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.codec import BY_CODE, KINDS, decode, encode
from virtfabric.protocol.fields import parse_json
from virtfabric.protocol.frames import (
    HEADER_SIZE,
    MAX_BODY,
    MAX_FRAME,
    MAX_TAIL,
    Frame,
    FrameDecoder,
)
from virtfabric.protocol.messages import Done, Heartbeat


def test_every_kind_has_a_strategy_and_a_number_of_its_own():
    assert {kind.type for kind in KINDS} == set(BY_TYPE)
    assert len(BY_CODE) == len(KINDS)


@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(0, 100_000), max_size=20))
@settings(max_examples=examples(60), deadline=None)
def test_messages_survive_any_split(messages, cuts):
    stream = b"".join(encode(message, number, 7) for number, message in enumerate(messages, 1))
    decoder = FrameDecoder()
    frames = [frame for piece in split(stream, cuts) for frame in decoder.feed(piece)]
    assert [decode(frame) for frame in frames] == messages
    assert [frame.number for frame in frames] == list(range(1, len(messages) + 1))
    assert decoder.held == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_of_message_comes_back(kind):
    @given(BY_TYPE[kind.type])
    @settings(max_examples=8, deadline=None)
    def run(message):
        (frame,) = FrameDecoder().feed(encode(message, 1))
        assert frame.kind == kind.code
        assert decode(frame) == message

    run()


def test_bytes_one_at_a_time_are_held_and_no_more():
    data = encode(Heartbeat(7), 1)
    decoder = FrameDecoder()
    for place, byte in enumerate(data[:-1], 1):
        assert list(decoder.feed(bytes([byte]))) == []
        assert decoder.held == place
    assert len(list(decoder.feed(data[-1:]))) == 1


def test_what_a_caller_left_comes_with_the_next_bytes():
    decoder = FrameDecoder()
    first = next(decoder.feed(encode(Heartbeat(1), 1) + encode(Heartbeat(2), 2)))
    assert first.number == 1
    assert [frame.number for frame in decoder.feed(b"")] == [2]


def test_the_largest_frame_passes_and_a_larger_one_is_not_waited_for():
    frame = Frame(1, 1, 1, 0, b"b" * MAX_BODY, b"t" * MAX_TAIL)
    assert list(FrameDecoder().feed(frame.encode())) == [frame]
    assert len(frame.encode()) == MAX_FRAME
    for lengths, field in (((MAX_BODY + 1, 0), "body"), ((0, 0xFFFFFFFF), "tail")):
        header = struct.pack(">2sBBIIII", b"VF", 1, 1, 1, 0, *lengths)
        with pytest.raises(InvalidValueError) as caught:
            list(FrameDecoder().feed(header))
        assert caught.value.field == field
    with pytest.raises(InvalidValueError, match="body"):
        Frame(1, 1, 1, 0, b"b" * (MAX_BODY + 1)).encode()


def test_whole_frames_before_a_broken_one_are_not_lost():
    decoder = FrameDecoder()
    frames = decoder.feed(encode(Done(), 1) + b"GET / HTTP/1.1")
    assert next(frames).number == 1
    with pytest.raises(InvalidValueError, match="magic"):
        next(frames)
    with pytest.raises(InvalidValueError, match="magic"):
        list(decoder.feed(encode(Done(), 2)))
    assert decoder.held <= MAX_FRAME


def test_a_wrong_start_needs_no_whole_header():
    with pytest.raises(InvalidValueError, match="magic"):
        list(FrameDecoder().feed(b"X"))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not a table"), (b"{", "not JSON"),
        (b"null", "not a table"), (b'{"a":1,"a":2}', "twice"), (b'{"a":1.5}', "whole number"),
        (b'{"a":NaN}', "whole number"), (b'{"a":' + b"9" * 5000 + b"}", "whole number"),
        (b"[" * 100_000, "nested"), (b'{"a":' * 40_000, "nested"),
    ],
)  # fmt: skip
def test_a_body_is_one_plain_object(body, problem):
    with pytest.raises(InvalidValueError, match=problem):
        parse_json(body)


@pytest.mark.timeout(20)
def test_a_large_body_with_a_name_twice_holds_nobody():
    """A frame of a peer is refused in milliseconds, whatever is in it."""
    names = [*range(10_000, 99_999), 99_999, 99_999]
    body = ("{" + ",".join(f'"{name}":0' for name in names) + "}").encode()
    assert len(body) < MAX_BODY
    with pytest.raises(InvalidValueError, match=r"99999: .* is there twice"):
        parse_json(body)


def body_of(kind, **changes):
    """A body that is right but for the changes (`spec__qos__priority=101`)."""
    message = {
        "hello": {"role": "card", "serial": "C", "software": "s", "boot": "b", "versions": [1]},
        "allocation-request": {"request": "r", "spec": {"cores": 1, "qos": {}}},
        "configure": {
            "slice": "s", "name": "n", "capability": "crypto.aes", "size": 1, "digest": "0" * 64,
            "not_after": 1, "signature": "0" * 128,
        },
        "telemetry": {"at_ms": 1, "readings": [{"subject": "s", "values": {"a": 1}}]},
        "grant": {
            "generation": 1,
            "slice": {"id": "s", "spec": {"cores": 1}, "seat": {
                "cores": [0], "memory": [], "lanes": [], "keys": [1], "units": [], "bandwidth": 0,
            }},
        },
    }[kind]  # fmt: skip
    for path, value in changes.items():
        table, *names = [message, *path.split("__")]
        for name in names[:-1]:
            table = table[int(name) if isinstance(table, list) else name]
        if value is None:
            del table[names[-1]]
        else:
            table[names[-1]] = value
    return json.dumps(message).encode()


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("hello", {"role": "king"}, "role"),
        ("hello", {"serial": ""}, "serial"),
        ("hello", {"serial": None}, "serial"),
        ("hello", {"serial": "\ud800"}, "serial"),
        ("hello", {"versions": [-1]}, "versions"),
        ("hello", {"versions": 1}, "versions"),
        ("hello", {"colour": "red"}, "colour"),
        ("allocation-request", {"spec__cores": -1}, "spec.cores"),
        ("allocation-request", {"spec__cores": True}, "spec.cores"),
        ("allocation-request", {"spec__cores": 0}, "spec.cores"),
        ("allocation-request", {"spec__lanes": 3}, "spec.lanes"),
        ("allocation-request", {"spec__memory": "1GiB"}, "spec.memory"),
        ("allocation-request", {"spec__capability": "AES!"}, "spec.capability"),
        ("allocation-request", {"spec__units": 2}, "spec.capability"),
        ("allocation-request", {"spec__keys": 0}, "spec.keys"),
        ("allocation-request", {"spec__qos__priority": 101}, "spec.qos.priority"),
        ("allocation-request", {"spec__qos__priorty": 1}, "spec.qos.priorty"),
        ("allocation-request", {"spec__qos": []}, "spec.qos"),
        ("configure", {"digest": "g" * 64}, "digest"),
        ("configure", {"digest": "0" * 63}, "digest"),
        ("configure", {"signature": "A" * 128}, "signature"),
        ("configure", {"name": "a\nb"}, "name"),
        ("configure", {"size": 0}, "size"),
        ("telemetry", {"readings__0__values": []}, "readings[0].values"),
        ("telemetry", {"readings__0__values": {"a": -1}}, "readings[0].values.a"),
        ("telemetry", {"readings__0__values": {"\n": 1}}, "readings[0].values"),
        ("grant", {"slice__seat__memory": [[1]]}, "slice.seat.memory"),
        ("grant", {"slice__seat__memory": [[0, 0]]}, "slice.seat.memory"),
        ("grant", {"slice__seat__keys": ["1"]}, "slice.seat.keys"),
    ],
)
def test_the_error_names_the_field(kind, changes, field):
    code = next(k.code for k in KINDS if k.name == kind)
    decode(Frame(1, code, 1, 0, body_of(kind)))
    with pytest.raises(InvalidValueError) as caught:
        decode(Frame(1, code, 1, 0, body_of(kind, **changes)))
    assert caught.value.field == field


def test_a_tail_is_for_images_only():
    with pytest.raises(InvalidValueError, match="tail"):
        decode(Frame(1, 4, 1, 0, b"{}", b"x"))


def test_a_header_is_what_the_document_says():
    data = encode(Heartbeat(7), 0x01020304, 5)
    assert data[:HEADER_SIZE].hex(" ", 4) == "56460102 01020304 00000005 0000000a 00000000"
    assert data[HEADER_SIZE:] == b'{"beat":7}'
