"""The one XML parser: nothing is fetched, expanded or executed for a document from outside.

Owns the parser's settings. It does not know what a document means.
"""

from __future__ import annotations

from typing import Final

from lxml import etree

from virtfabric.model.errors import InvalidValueError

_MAX_CHARS: Final = 4 << 20
"""A domain of libvirt's with hundreds of devices has some 200 KiB."""


def parse_xml(text: str, *, what: str) -> etree._Element:
    """Read one document; `what` names it in errors ("domain XML", "policy").

    Raises:
        InvalidValueError: not well-formed, too large, or it brings a DOCTYPE.
    """
    if len(text) > _MAX_CHARS:
        raise InvalidValueError(what, _excerpt(text), f"is larger than {_MAX_CHARS} characters")
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False
    )
    try:
        # As bytes: lxml refuses text that carries an encoding declaration of its own.
        root = etree.fromstring(_without_declaration(text).encode(), parser)
    except (etree.XMLSyntaxError, UnicodeEncodeError) as error:
        raise InvalidValueError(what, _excerpt(text), f"is not well-formed XML: {error}") from None
    if root.getroottree().docinfo.doctype:
        raise InvalidValueError(what, _excerpt(text), "has a DOCTYPE, which is not taken")
    return root


def _without_declaration(text: str) -> str:
    text = text.lstrip("\ufeff \t\r\n")
    return text.partition("?>")[2] if text.startswith("<?xml ") else text


def _excerpt(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
