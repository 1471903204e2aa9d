"""The conformance suite: the emulated card passes, and cards with a fault fail where it is."""

import ssl
from dataclasses import replace

import pytest
from card_bed import BITS, signed
from card_process import Served, write_card
from trust_data import HOST, credentials

from virtfabric.adapters.cardlink import conformancechecks
from virtfabric.adapters.cardlink.conformance import Outcome, run_suite
from virtfabric.cli.main import main
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import CardLostError
from virtfabric.model.policy import CpuPolicy
from virtfabric.model.units import MilliCpu
from virtfabric.policy import slicing
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.protocol import conversation
from virtfabric.protocol.imagefile import format_manifest
from virtfabric.shim.firmware import firmware, hostdesk
from virtfabric.shim.firmware.firmware import Firmware
from virtfabric.trust.store import write_credentials


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(firmware, "PROMISE_S", 0.5)
    write_credentials(tmp_path / "host", credentials(HOST))
    (tmp_path / "aes.img").write_bytes(BITS)
    (tmp_path / "aes.img.manifest").write_text(format_manifest(*signed()))
    return tmp_path


@pytest.fixture
def suite(place):
    """Run it against a card that is started now."""

    def run():
        served = Served(write_card(place))
        try:
            image = (place / "aes.img", "crypto.aes")
            results = run_suite(served.socket, place / "host", "C-1", image=image)
        finally:
            served.stop()
        return {one.name: one for one in results}

    return run


def test_the_emulated_card_passes(suite):
    results = suite()
    assert {n: r.detail for n, r in results.items() if r.outcome is not Outcome.PASSED} == {}
    assert len(results) >= 30


def _always(value):
    return lambda *_args, **_more: value


def _without_numbers(take):
    def careless(self, frame):
        self._heard = frame.number - 1
        return take(self, frame)

    return careless


def _mutants():
    take = conversation.Conversation._take
    return {
        "refuses an image that nobody signed": (firmware, "is_signed", _always(True)),
        "ends a link on which a frame is replayed":
            (conversation.Conversation, "_take", _without_numbers(take)),
        "ends a link on which a frame is missing":
            (conversation.Conversation, "_take", _without_numbers(take)),
        "takes a promise back by itself when nobody commits it":
            (Firmware, "_expire", _always(None)),
        "lets a higher priority take from a strictly lower one, at the commit":
            (slicing, "_reclaim", _always(None)),
        "answers a repeated request as the first time, also after its grant":
            (Firmware, "_known", _always(None)),
        "gives nobody what it promised to another, and all of it back when aborted":
            (Firmware._HANDLERS, firmware.m.Abort, _always([firmware.m.Done()])),
        "ends a link with a hello in another's name":
            (conversation.Conversation, "_agree", _agree_with_anybody),
        "promises, grants and ends a slice; its generation grows with each":
            (Firmware._HANDLERS, firmware.m.Release, _always([firmware.m.Done()])),
    }  # fmt: skip


def _arbiters():
    return {
        "takes nothing from an equal priority, nor below a reservation":
            (hostdesk, "choose_allocation", _without_reservations),
        "has a busy guest pay nothing":
            (hostdesk, "choose_allocation", _without_regard("busy", frozenset())),
        "takes no more than a guest can spare":
            (hostdesk, "choose_allocation", _without_caps),
        "decides on free capacity":
            (hostdesk, "choose_allocation", _without_regard("pending", Amounts.of(cpu=4000))),
        "refuses a request about another picture as stale":
            (hostdesk.HostDesk._HANDLERS, firmware.m.HostRequest, _whatever_picture),
    }  # fmt: skip


def _without_caps(host, asked, caps):
    return choose_allocation(host, asked)


def _without_regard(name, value):
    return lambda host, asked, caps: choose_allocation(
        replace(host, **{name: value}), asked, caps=caps
    )


def _without_reservations(host, asked, caps):
    guests = {
        uuid: replace(guest, policy=replace(guest.policy, cpu=CpuPolicy(MilliCpu(0))))
        for uuid, guest in host.guests.items()
    }
    return choose_allocation(replace(host, guests=guests), asked, caps=caps)


def _whatever_picture(desk, asked, host):
    frame = desk._frame(host)
    return _DECIDE(desk, replace(asked, picture=frame.name), host)


_DECIDE = hostdesk.HostDesk._decide


def _agree_with_anybody(self, hello, number):
    self._proved = None
    return _AGREE(self, hello, number)


_AGREE = conversation.Conversation._agree


@pytest.mark.parametrize("name", sorted(_mutants()))
def test_a_card_with_a_fault_fails_where_it_is(suite, monkeypatch, name):
    where, what, fault = _mutants()[name]
    set_ = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    set_(where, what, fault)
    monkeypatch.setattr("virtfabric.adapters.cardlink.visitor.ANSWER_S", 0.5)
    results = suite()
    assert results[name].outcome is Outcome.FAILED, results[name]
    passed = [r for r in results.values() if r.outcome is Outcome.PASSED]
    assert len(passed) >= 10, "the whole card is broken"


@pytest.mark.parametrize("name", sorted(_arbiters()))
def test_an_arbiter_with_a_fault_fails_where_it_is(suite, monkeypatch, name):
    where, what, fault = _arbiters()[name]
    set_ = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    set_(where, what, fault)
    monkeypatch.setattr(conformancechecks, "CHECKS", [])  # they have their own cards with faults
    results = suite()
    assert results[name].outcome is Outcome.FAILED, results[name]
    assert sum(r.outcome is Outcome.PASSED for r in results.values()) >= 4, "all of it is broken"


def test_a_card_without_an_arbiter_skips_its_checks(suite, monkeypatch):
    no = firmware.m.Error(firmware.m.ErrorCode.REFUSED, "it has none", reason="not-allowed")
    monkeypatch.setitem(hostdesk.HostDesk._HANDLERS, firmware.m.HostPicture, _always(no))
    monkeypatch.setattr(conformancechecks, "CHECKS", [])
    results = [one for one in suite().values() if one.area == "carded"]
    assert len(results) == 8
    assert {one.outcome for one in results} == {Outcome.SKIPPED}


def test_a_card_that_speaks_tls_1_2_fails(place):
    served = Served(write_card(place))
    served.card.desk._context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        results = {r.name: r for r in run_suite(served.socket, place / "host", "C-1")}
    finally:
        served.stop()
    assert results["speaks nothing older than TLS 1.3"].outcome is Outcome.FAILED
    assert results["loads a signed image, and runs it"].outcome is Outcome.SKIPPED


def test_the_command_prints_a_table_and_its_exit_code_says_whether_all_passed(
    place, monkeypatch, capsys
):
    served = Served(write_card(place))
    words = ["card", "conformance", str(served.socket), "--serial", "C-1"]
    words += ["--credentials", str(place / "host")]
    try:
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "0 failed" in said
        assert "skipped" in said
        monkeypatch.setattr(firmware, "is_signed", _always(True))
        assert main([*words, "--json"]) == 1
    finally:
        served.stop()


def test_nobody_there_is_said_once(place):
    with pytest.raises(CardLostError, match="No such file"):
        run_suite(place / "none.sock", place / "host", "C-1")
