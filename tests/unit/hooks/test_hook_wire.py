"""The hook's wire format: any split, bounded, clear about what is wrong."""

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.hook import (
    MAX_HEADER,
    MAX_NAME,
    MAX_XML,
    HookCode,
    HookDecoder,
    HookOperation,
    HookReply,
    HookRequest,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
REQUESTS = st.builds(HookRequest, st.sampled_from(HookOperation), TEXT, TEXT)
REPLIES = st.builds(HookReply, st.sampled_from(HookCode), TEXT, TEXT)


def split(data, cuts):
    places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


@given(REQUESTS, st.lists(st.integers(0, 10_000), max_size=12))
def test_a_request_survives_any_split(request_, cuts):
    decoder = HookDecoder()
    answers = [decoder.feed(piece) for piece in split(request_.encode(), cuts)]
    assert answers[-1] == request_
    assert all(answer is None for answer in answers[:-1])


@given(REPLIES)
def test_a_reply_comes_back(reply):
    assert HookReply.decode(reply.encode()) == reply


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=5))
def test_noise_is_an_error_or_unfinished(noise, cuts):
    decoder = HookDecoder()
    # Nothing but the one error that names a field may come out.
    with suppress(InvalidValueError):
        for piece in split(noise, cuts):
            assert decoder.feed(piece) is None or noise.startswith(b"VF1 ")


@given(st.binary(max_size=300))
def test_noise_is_no_reply(noise):
    with pytest.raises(InvalidValueError):
        HookReply.decode(b"?" + noise)
    with suppress(InvalidValueError):
        HookReply.decode(noise)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"VF1 prepare 1 %d\n" % (MAX_XML + 1), "xml"),
        (b"VF1 prepare %d 1\n" % (MAX_NAME + 1), "name"),
        (b"VF1 explode 1 1\n", "operation"),
        (b"VF2 prepare 1 1\n", "header"),
        (b"VF1 prepare -1 1\n", "header"),
        (b"x" * MAX_HEADER, "header"),
        (b"VF1 prepare 1 1\nabc", "request"),
        (b"VF1 prepare 1 1\n\xffa", "name"),
        (b"VF1 prepare 1 1\na\xff", "xml"),
    ],
)
def test_the_error_names_the_field(data, field):
    with pytest.raises(InvalidValueError) as caught:
        HookDecoder().feed(data)
    assert caught.value.field == field


def test_the_largest_request_passes():
    request = HookRequest(HookOperation.RESTORE, "n" * MAX_NAME, "x" * MAX_XML)
    assert HookDecoder().feed(request.encode()) == request
