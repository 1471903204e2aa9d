"""The pure parts of the command: arguments and tables."""

from __future__ import annotations

import argparse
import os
import select
import signal

import pytest

from virtfabric.cli import main
from virtfabric.cli.arguments import join_signed
from virtfabric.cli.screen import Table, clean, format_plain
from virtfabric.cli.session import Interrupt, exit_code
from virtfabric.cli.tables import (
    capacity_lines,
    guest_table,
    held_memory_table,
    memory_table,
    outcome_lines,
)
from virtfabric.cli.trail import parse_since
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    UnreachableError,
    VirtfabricError,
)
from virtfabric.model.units import GIB, MIB


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (["--cpu", "-1"], ["--cpu=-1"]),
        (["--memory", "-64M", "db"], ["--memory=-64M", "db"]),
        (["--cpu", "--memory", "-1G"], ["--cpu", "--memory=-1G"]),
        (["--cpu", "+1"], ["--cpu", "+1"]),
        (["--key", "-1"], ["--key", "-1"]),
        (["--cpu"], ["--cpu"]),
    ],
)
def test_signed_amounts_are_joined_to_their_option(given, joined):
    assert join_signed(given) == joined


def test_since_takes_ages_seconds_and_dates():
    assert parse_since("10m", 1_000_000) == 1_000_000 - 600
    assert parse_since("1234.5", 1_000_000) == 1234.5
    assert parse_since("2026-01-31T12:00:00+00:00", 0) == 1769860800
    assert parse_since("2h", 60) == 0
    with pytest.raises(InvalidValueError, match="--since"):
        parse_since("-5m", 0)


def test_control_characters_of_guests_do_not_reach_the_terminal():
    assert clean("a\x1b[31mb\n") == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}"
    table = Table("t", ("name", "n"), (("evil\x1b]0;x\x07", "1"),), frozenset({"n"}))
    assert "\x1b" not in format_plain(table)


def test_plain_tables_align_and_say_when_empty():
    table = Table("t", ("name", "n"), (("a", "1"), ("long", "22")), frozenset({"n"}))
    assert format_plain(table) == "t:\nname   n\na      1\nlong  22"
    assert format_plain(Table("loans", ("a",), ())) == "loans: none"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VirtfabricError("x"), 1),
        (InvalidValueError("f", "v", "p"), 2),
        (RefusedError(Refusal(Reason.INVALID_ARGUMENT, "x")), 2),
        (RefusedError(Refusal(Reason.NO_CAPACITY, "x")), 3),
        (RefusedError(Refusal(Reason.NOT_ALLOWED, "x")), 3),
        (RefusedError(Refusal(Reason.CANCELLED, "x")), 1),
        (UnreachableError("x"), 4),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_a_second_interrupt_ends_the_command_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert select.select([interrupt], [], [], 0)[0] == []
        os.kill(os.getpid(), signal.SIGINT)
        assert select.select([interrupt], [], [], 0)[0] == [interrupt]
        assert interrupt.awake
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_results_may_lack_what_does_not_apply():
    assert outcome_lines("repair", {"steps": ["pin"]}) == ["repair: done", "  step: pin"]
    shown = outcome_lines("db", {"delta": {}, "grant": None})
    assert shown == ["db: nothing"]


def _host(*, tiered):
    nodes = [
        {
            "node": 0,
            "total": 8 * GIB,
            "free": GIB,
            "grantable": 4 * GIB,
            "tier": "dram",
            "offlinable": False,
            "why_not_offlinable": "block memory0 is of ZONE_NORMAL",
        }
    ]
    if tiered:
        nodes.append(
            {
                "node": 1,
                "total": 2 * GIB,
                "free": GIB,
                "grantable": 2 * GIB,
                "tier": "cxl",
                "offlinable": True,
                "why_not_offlinable": "",
            }
        )
    return {
        "memory": nodes, "pool": "0-3", "housekeeping": "0", "unmanaged": [],
        "capacity": {"cpu_milli": 4000, "memory": 4 * GIB, "reserve": 0, "cxl": tiered * 2 * GIB},
        "free": {"cpu": 4000, "memory": GIB, "cxl": tiered * GIB},
    }  # fmt: skip


def test_memory_of_a_host_with_one_kind_is_shown_as_ever():
    host = _host(tiered=False)
    assert memory_table(host).columns == ("node", "total", "free", "grantable")
    assert not any("CXL" in line for line in capacity_lines(host))


def test_memory_of_a_host_with_cxl_says_what_can_be_taken_back():
    host = _host(tiered=True)
    assert memory_table(host).rows == (
        ("0", "DRAM", "8GiB", "1GiB", "4GiB", "no: block memory0 is of ZONE_NORMAL"),
        ("1", "CXL", "2GiB", "1GiB", "2GiB", "yes"),
    )
    assert capacity_lines(host)[1] == "CXL memory: 2GiB, 1GiB free"
    withheld = {"1": "libvirt does not know it: restart libvirtd (guests run on)"}
    assert (
        "node 1: nothing of it is granted: libvirt does not know it: restart libvirtd "
        "(guests run on)"
    ) in capacity_lines(host | {"withheld": withheld})


def _guest(*parts, far=None):
    memory = {
        "reservation": None,
        "grant": None,
        "limit": None,
        "current": GIB,
        "cxl": far,
        "parts": list(parts),
    }
    return {
        "name": "db", "state": "running", "priority": 90, "placement": "shared",
        "cpu": {"reservation": 0, "grant": 0, "limit": 0, "vcpus_online": 1, "vcpus_max": 1},
        "cpus": "", "memory": memory, "policy_error": "", "managed": True, "busy": False,
        "job": None, "residues": [
            {"what": "memory@tier:cxl", "amount": 4 * MIB}, {"what": "memory", "amount": MIB},
        ],
    }  # fmt: skip


def _part(tier, nodes, why_not_reclaimable="", why_not_offlinable=""):
    return {
        "what": "virtio-mem vm0", "size": GIB, "tier": tier, "nodes": nodes,
        "reclaimable": not why_not_reclaimable, "why_not_reclaimable": why_not_reclaimable,
        "offlinable": not why_not_offlinable, "why_not_offlinable": why_not_offlinable,
    }  # fmt: skip


def test_returnability_is_shown_where_there_is_more_than_dram():
    dram = _part("dram", [], "the guest booted with it", "it is bound to no node")
    assert held_memory_table([_guest(dram)]) is None
    table = held_memory_table([_guest(dram, _part("cxl", [1]))])
    assert table is not None
    assert table.rows == (
        ("db", "virtio-mem vm0", "DRAM", "any", "1GiB", "no: the guest booted with it",
         "no: it is bound to no node"),
        ("db", "virtio-mem vm0", "CXL", "1", "1GiB", "yes", "yes"),
    )  # fmt: skip


def test_remarks_name_the_tier():
    far = {"grant": GIB, "limit": GIB, "floor": 0, "current": 512 * MIB}
    remarks = guest_table([_guest(far=far)]).rows[0][-1]
    assert remarks == (
        "CXL memory 512MiB of 1GiB granted; still holds 4MiB CXL memory; still holds 1MiB memory"
    )


@pytest.mark.parametrize("command", main.MODULE_OF)
def test_a_command_that_is_loaded_alone_is_the_same_command(command: str) -> None:
    def help_of(parser: main.CommandParser) -> str:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        return str(commands.choices[command].format_help())

    assert help_of(main.build_parser(command)) == help_of(main.build_parser())
