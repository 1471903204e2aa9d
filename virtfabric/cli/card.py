"""`virtfabric card`: one card."""

from __future__ import annotations

from typing import Any

from virtfabric.cli import provisioning


def add_parsers(subparsers: Any) -> None:
    """Register `card` and its commands."""
    card = subparsers.add_parser(
        "card",
        help="an offload card: who it is, what it is programmed with",
        description="Offload cards: see docs/card.md.",
        example="virtfabric card show C-1",
    )
    commands = card.add_subparsers(dest="card_command", metavar="COMMAND", required=True)
    provisioning.add_parsers(commands)
