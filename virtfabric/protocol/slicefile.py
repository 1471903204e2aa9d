"""Slice files: TOML text <-> slices. Pure; the form is that of the wire, with sizes as text.

version = 1

[[slice]]
name = "aes-for-db"
cores = 2
memory = "512MiB"        # contiguous = true: in one piece
lanes = 4                # width of its link: 1, 2, 4, 8, 16 or 32
capability = "crypto.aes"
units = 1
keys = 1

[slice.qos]
priority = 70            # 0 to 100
bandwidth = 10000        # Mbit/s, 0 for no limit
reclaimable = true
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.adapterforms import read_adapter, read_spec
from virtfabric.protocol.fields import Fields

if TYPE_CHECKING:
    from virtfabric.model.adapter import Adapter, SliceSpec

FILE_VERSION: Final = 1
MAX_TEXT: Final = 1 << 20
"""Characters; a slice has 300."""
MAX_SLICES: Final = 1024


def parse_slices(text: str) -> tuple[SliceSpec, ...]:
    """Read a slice file: one or more `[[slice]]`.

    Raises:
        InvalidValueError: not TOML, or names the field (`slice[0].qos.priority`) and the value.
    """
    fields = _parse(text)
    entries = fields.tables("slice", most=MAX_SLICES)
    specs = tuple(read_spec(entry) for entry in entries)
    fields.finish()
    if not specs:
        raise InvalidValueError("slice", [], "has no entry")
    names = [spec.name for spec in specs if spec.name]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidValueError("slice.name", name, "is there twice")
    return specs


def parse_adapter(text: str) -> Adapter:
    """Read an adapter file, `[adapter]`: what an emulated card has.

    Raises:
        InvalidValueError: not TOML, or names the field and the value.
    """
    fields = _parse(text)
    adapter = read_adapter(fields.table("adapter"))
    fields.finish()
    return adapter


def _parse(text: str) -> Fields:
    if len(text) > MAX_TEXT:
        raise InvalidValueError("file", len(text), f"characters are more than {MAX_TEXT}")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidValueError("file", text[:40], f"is not TOML: {error}") from None
    fields = Fields(document, units=True)
    version = fields.number("version")
    if version != FILE_VERSION:
        raise InvalidValueError("version", version, f"is not {FILE_VERSION}")
    return fields
