"""docs/card-protocol.md says what the code does: kinds, senders, fields, limits, codes."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from wire_data import BY_TYPE

from virtfabric.protocol.codec import KINDS, encode
from virtfabric.protocol.fields import parse_json
from virtfabric.protocol.frames import HEADER_SIZE, MAX_BODY, MAX_TAIL, FrameDecoder
from virtfabric.protocol.messages import ErrorCode, EventKind, Heartbeat

TEXT = (Path(__file__).parents[3] / "docs" / "card-protocol.md").read_text()
ROWS = {
    int(code, 16): (name, senders, set(re.findall("`([a-z_]+)`", body)))
    for code, name, senders, body in re.findall(
        r"^\| (0x[0-9a-f]{2}) \| `([a-z-]+)` \| (card|host|both) \| (.*?) \| ", TEXT, re.MULTILINE
    )
}


def test_the_table_has_every_kind():
    assert set(ROWS) == {kind.code for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_of_the_table(kind):
    name, senders, fields = ROWS[kind.code]
    assert name == kind.name
    assert senders == ("both" if len(kind.senders) == 2 else "".join(kind.senders))

    @given(BY_TYPE[kind.type])
    @settings(max_examples=1)
    def run(message):
        (frame,) = FrameDecoder().feed(encode(message, 1))
        assert set(parse_json(frame.body)._document) <= fields, "a field is not documented"

    run()


def test_codes_and_limits():
    for word in (*ErrorCode, *EventKind):
        assert f"`{word}`" in TEXT
    assert f"length of the body, at most {MAX_BODY} " in TEXT
    assert f"length of the tail, at most {MAX_TAIL} " in TEXT


def test_the_frame_that_is_shown():
    data = encode(Heartbeat(7), 2)
    assert data[:HEADER_SIZE].hex(" ").replace(" ", "") in TEXT.replace(" ", "")
