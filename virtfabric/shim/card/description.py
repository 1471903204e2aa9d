"""What an emulated card is, as a TOML file: its parts, its state, who it is, where hosts find it.

version = 1

[adapter]
serial = "C-1"
cores = 8
memory = "16GiB"
lanes = 16
keys = 64
bandwidth = 100000            # Mbit/s
site = "node:0"

[adapter.accelerators]
"crypto.aes" = 4              # units by capability

[card]
socket = "C-1.sock"
state = "C-1.flash"           # survives loss of power
credentials = "C-1"           # directory made by `virtfabric card provision`
signers = ["images.pub"]      # whose images it takes

Paths that are not absolute are taken from the directory of the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.adapterforms import read_adapter
from virtfabric.protocol.fields import Fields
from virtfabric.protocol.messages import Role
from virtfabric.trust.identity import Identity

if TYPE_CHECKING:
    from virtfabric.model.adapter import Adapter

VERSION: Final = 1
MAX_FILE: Final = 64 << 10
_MAX_SOCKET: Final = 107
"""Bytes of a Unix socket's path (unix(7), sun_path without its final zero)."""


@dataclass(frozen=True, slots=True)
class CardDescription:
    """One card.

    Attributes:
        credentials: directory of its certificate, key and authority.
        signers: files with public keys (PEM).
    """

    adapter: Adapter
    socket: Path
    state: Path
    credentials: Path
    signers: tuple[Path, ...] = ()


def read_description(path: Path) -> CardDescription:
    """Read a card's description.

    Raises:
        InvalidValueError: the file cannot be read, or names the field (`adapter.cores`) and value.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidValueError("file", str(path), f"cannot be read: {error.strerror}") from error
    return parse_description(data, path.absolute().parent)


def parse_description(data: bytes, directory: Path) -> CardDescription:
    """The same, of a file's content.

    Raises:
        InvalidValueError
    """
    if len(data) > MAX_FILE:
        raise InvalidValueError("file", len(data), f"bytes are more than {MAX_FILE}")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidValueError("file", data[:40], f"is not TOML: {error}") from None
    fields = Fields(document, units=True)
    fields.number("version", least=VERSION, most=VERSION)
    adapter = read_adapter(fields.table("adapter"))
    Identity.of(Role.CARD, adapter.serial)
    card = fields.table("card")
    description = CardDescription(
        adapter,
        _path(card, "socket", directory),
        _path(card, "state", directory),
        _path(card, "credentials", directory),
        tuple(directory / name for name in card.texts("signers", ())),
    )
    card.finish()
    fields.finish()
    if len(bytes(description.socket)) > _MAX_SOCKET:
        raise card.fail("socket", f"is longer than {_MAX_SOCKET} bytes as a path")
    return description


def _path(fields: Fields, name: str, directory: Path) -> Path:
    return directory / Path(fields.text(name))
