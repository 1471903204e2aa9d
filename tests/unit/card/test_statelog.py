"""The card's flash: power may go at any byte."""

import resource
from contextlib import contextmanager, suppress

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
    for length in (0, *range(ends[0], len(data) + 1)):
        path.write_bytes(data[:length] + (fill if length in (0, *ends) else b""))
        whole = [state for state, end in zip(states(3), ends, strict=True) if end <= length]
        assert reopened(path) == (whole[-1] if whole else None), length
        log = StateLog(path)
        log.append({"after": length})
        log.close()
        assert reopened(path) == {"after": length}


def test_the_first_record_is_there_whole_or_not_at_all(tmp_path):
    """It takes the file's place, as all later first ones do: one that is not whole is damage."""
    path = tmp_path / "flash"
    log = StateLog(path)
    with small_files(10), pytest.raises(StateError):
        log.append({"n": 1})
    assert path.read_bytes() == b""
    log.append({"n": 1})
    log.close()
    data = path.read_bytes()
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(StateDamagedError):
            StateLog(path)
        assert path.read_bytes() == data[:length], "evidence was destroyed"


def test_the_only_record_is_not_guessed_away(tmp_path):
    """Else a card would begin blank, and grant again what its guests have."""
    path = tmp_path / "flash"
    written(path, 1)
    data = path.read_bytes()
    for place in range(len(data)):
        wrong = bytearray(data)
        wrong[place] ^= 0x10
        path.write_bytes(wrong)
        with pytest.raises(StateDamagedError):
            StateLog(path)


def test_any_sector_of_a_last_record_may_be_missing(tmp_path):
    """File systems write them in any order; those that are missing are zeros."""
    path = tmp_path / "flash"
    log = StateLog(path)
    first, second = {"n": 1, "text": "x" * 300}, {"n": 2, "text": "y" * 3000}
    log.append(first)
    end = path.stat().st_size
    log.append(second)
    log.close()
    data = path.read_bytes()
    for sector in (8, 16, 64, 512):
        for start in range(end - end % sector, len(data), sector):
            torn = bytearray(data)
            torn[max(start, end) : start + sector] = bytes(
                len(torn[max(start, end) : start + sector])
            )
            path.write_bytes(torn)
            assert reopened(path) == first, (sector, start)
            assert path.stat().st_size == end


def test_damage_in_the_middle_is_damage_wherever_it_is(tmp_path):
    """A length that was changed must not make the rest look like one torn record."""
    path = tmp_path / "flash"
    ends = written(path)
    data = path.read_bytes()
    for place in range(ends[1]):
        for bit in (0x01, 0x80):
            wrong = bytearray(data)
            wrong[place] ^= bit
            path.write_bytes(wrong)
            with pytest.raises(StateDamagedError):
                StateLog(path)


def test_what_is_left_of_a_failed_write_is_no_damage_later(tmp_path, monkeypatch):
    path = tmp_path / "flash"
    written(path)
    log = StateLog(path)

    def fail(*_):
        raise OSError(5, "no")

    with monkeypatch.context() as patch:
        patch.setattr("virtfabric.shim.firmware.statelog.os.fsync", fail)
        patch.setattr("virtfabric.shim.firmware.statelog.os.ftruncate", fail)
        with pytest.raises(StateError):
            log.append({"long": "x" * 500})
    log.append({"now": "short"})
    log.close()
    assert reopened(path) == {"now": "short"}


@contextmanager
def small_files(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
    with small_files(path.stat().st_size + 10), pytest.raises(StateError, match="flash"):
        log.append({"too": "large"})
    assert log.state == states(3)[-1]
    assert reopened(path) == states(3)[-1]
    log.append({"now": "it fits"})
    log.close()
    assert reopened(path) == {"now": "it fits"}
