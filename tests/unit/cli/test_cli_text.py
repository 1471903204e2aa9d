"""The pure parts of the command: arguments and tables."""

from __future__ import annotations

import argparse

import pytest

from virtfabric.cli import main
from virtfabric.cli.arguments import join_signed, parse_since
from virtfabric.cli.screen import Table, clean, format_plain
from virtfabric.cli.session import exit_code
from virtfabric.cli.tables import outcome_lines
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    UnreachableError,
    VirtfabricError,
)


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


def test_results_may_lack_what_does_not_apply():
    assert outcome_lines("repair", {"steps": ["pin"]}) == ["repair: done", "  step: pin"]
    shown = outcome_lines("db", {"delta": {}, "grant": None})
    assert shown == ["db: nothing"]


@pytest.mark.parametrize("command", main.MODULE_OF)
def test_a_command_that_is_loaded_alone_is_the_same_command(command: str) -> None:
    def help_of(parser: main.CommandParser) -> str:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        return str(commands.choices[command].format_help())

    assert help_of(main.build_parser(command)) == help_of(main.build_parser())
