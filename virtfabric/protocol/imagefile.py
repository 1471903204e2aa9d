"""Manifest files: what a signer said of an image, beside its bytes. Pure; fields as `configure`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.codec import form_of_manifest, read_manifest
from virtfabric.protocol.fields import parse_json

if TYPE_CHECKING:
    from virtfabric.model.image import ImageManifest

SUFFIX: Final = ".manifest"
VERSION: Final = 1
MAX_TEXT: Final = 4096


def format_manifest(manifest: ImageManifest, signature: str) -> str:
    """The text of `IMAGE.manifest`."""
    form = {"version": VERSION, **form_of_manifest(manifest), "signature": signature}
    return json.dumps(form, indent=2) + "\n"


def parse_manifest(data: bytes) -> tuple[ImageManifest, str]:
    """Manifest and signature.

    Raises:
        InvalidValueError: names the field.
    """
    if len(data) > MAX_TEXT:
        raise InvalidValueError("manifest", len(data), f"bytes are more than {MAX_TEXT}")
    fields = parse_json(data)
    fields.number("version", least=VERSION, most=VERSION)
    manifest, signature = read_manifest(fields)
    fields.finish()
    return manifest, signature
