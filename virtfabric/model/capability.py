"""Names of capabilities, and the coordinates of amounts that count functions by them."""

from __future__ import annotations

import re
from typing import Final

from virtfabric.model.amounts import Key, ResourceClass
from virtfabric.model.errors import InvalidValueError

_CAPABILITY: Final = re.compile(r"[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+")
MAX_CAPABILITY: Final = 64
"""Characters; the schema of policies has the same bounds."""
_RESOURCE: Final = "device:"


def parse_capability(text: str, *, field: str = "capability") -> str:
    """A dotted capability such as `net.vf`.

    Raises:
        InvalidValueError: not in that form.
    """
    if not _CAPABILITY.fullmatch(text):
        raise InvalidValueError(field, text, "is not dotted like net.vf")
    if len(text) > MAX_CAPABILITY:
        raise InvalidValueError(field, text, f"has more than {MAX_CAPABILITY} characters")
    return text


def device_key(capability: str) -> Key:
    """The coordinate of amounts that counts functions with this capability."""
    return Key(ResourceClass(f"{_RESOURCE}{capability}"))


def capability_of(key: Key) -> str | None:
    """The capability that a coordinate counts; None for any other coordinate."""
    return key.resource[len(_RESOURCE) :] if key.resource.startswith(_RESOURCE) else None
