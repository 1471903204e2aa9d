"""The card's flash: power may go at any byte."""

import resource
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.shim.firmware.statelog import StateDamagedError, StateError, StateLog


def states(count):
    return [{"n": n, "text": "x" * 40 * n} for n in range(1, count + 1)]


def written(path, count=3, **options):
    log = StateLog(path, **options)
    ends = []
    for state in states(count):
        log.append(state)
        ends.append(path.stat().st_size)
    log.close()
    return ends


def reopened(path):
    log = StateLog(path)
    log.close()
    return log.state


def test_a_new_card_has_no_state(tmp_path):
    assert reopened(tmp_path / "flash") is None
    assert (tmp_path / "flash").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fill", [b"", b"\0" * 50], ids=["cut", "zeros behind"])
def test_power_lost_at_any_byte_leaves_the_last_whole_record(tmp_path, fill):
    path = tmp_path / "flash"
    ends = written(path)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length] + (fill if length in (0, *ends) else b""))
        whole = [state for state, end in zip(states(3), ends, strict=True) if end <= length]
        assert reopened(path) == (whole[-1] if whole else None), length
        log = StateLog(path)
        log.append({"after": length})
        log.close()
        assert reopened(path) == {"after": length}


def test_a_last_record_of_the_right_length_and_wrong_bytes_was_not_written(tmp_path):
    path = tmp_path / "flash"
    ends = written(path)
    data = bytearray(path.read_bytes())
    data[ends[1] + 30 :] = bytes(len(data) - ends[1] - 30)
    path.write_bytes(data)
    assert reopened(path) == states(3)[1]


def test_damage_before_the_end_is_not_guessed_away(tmp_path):
    path = tmp_path / "flash"
    ends = written(path)
    data = path.read_bytes()
    for place in (0, 30, ends[0] + 2, ends[0] + 30):
        wrong = bytearray(data)
        wrong[place] ^= 0x40
        path.write_bytes(wrong)
        with pytest.raises(StateDamagedError, match="flash"):
            StateLog(path)
        assert path.read_bytes() == bytes(wrong), "evidence was destroyed"


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_noise_is_damage_or_nothing(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("flash") / "flash"
    path.write_bytes(noise)
    with suppress(StateDamagedError):
        assert reopened(path) is None


def test_a_full_file_is_begun_anew_whole(tmp_path):
    path = tmp_path / "flash"
    sizes = written(path, 60, rotate=6000)
    assert max(sizes) <= 6000
    assert reopened(path) == states(60)[-1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["flash"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "flash"
    written(path)
    log = StateLog(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(StateError, match="flash"):
            log.append({"too": "large"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.state == states(3)[-1]
    assert reopened(path) == states(3)[-1]
    log.append({"now": "it fits"})
    log.close()
    assert reopened(path) == {"now": "it fits"}
