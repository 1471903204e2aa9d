"""Whether a document has the shape that the JSON Schema describes, told by the path in it.

Owns nothing but the translation of the schema's findings; what the shape cannot say is `checks`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.errors import InstallationError, InvalidValueError
from virtfabric.resources import topologies_dir

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

SCHEMA: Final = "topology-1.schema.json"
_ADVICE: Final = "docs/lab.md describes every key"
_HINTS: Final = {
    "^[a-z][a-z0-9-]{0,30}$": "is not an id: a letter, then up to 30 letters, digits or dashes",
    "^[1-9][0-9]{0,8}(KiB|MiB|GiB|TiB)$": "is not a size like 512MiB or 4GiB",
    "^0x[0-9a-f]{1,16}$": "is not a serial number like 0x100",
    "^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$": "is not a unicast MAC address in lower case",
}


def check_shape(document: object) -> None:
    """Check a parsed JSON document against the schema.

    Raises:
        InvalidValueError: the first deviation, by its path (`cxl.windows[0].size`).
        InstallationError: jsonschema, or the schema itself, is not installed.
    """
    found = sorted(_validator().iter_errors(document), key=lambda e: [str(p) for p in e.path])
    if found:
        raise _translate(found[0])


def format_path(steps: Iterable[str | int]) -> str:
    """`cxl.windows[0].targets[1]`; "topology" for the document itself."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".") or "topology"


@cache
def _validator() -> Draft202012Validator:
    try:
        from jsonschema import Draft202012Validator as Validator
        from jsonschema import validators
    except ImportError as error:
        raise InstallationError(
            "the lab needs jsonschema", advice="pip install 'virtfabric[lab]'"
        ) from error
    extend: Any = validators.extend  # untyped
    strict = extend(
        Validator,
        {"pattern": _check_pattern},
        type_checker=Validator.TYPE_CHECKER.redefine("integer", _is_integer),
    )
    validator: Draft202012Validator = strict(json.loads((topologies_dir() / SCHEMA).read_text()))
    return validator


def _is_integer(_: object, instance: object) -> bool:
    # 2.0 is an integer to JSON Schema, but nothing that `range` or QEMU takes
    return isinstance(instance, int) and not isinstance(instance, bool)


def _check_pattern(
    _: Draft202012Validator, pattern: str, instance: object, __: object
) -> Iterator[ValidationError]:
    # Python's `$` also matches before a line end at the very end; JSON Schema's (ECMA) does not
    from jsonschema.exceptions import ValidationError as Deviation

    if isinstance(instance, str) and not re.fullmatch(pattern, instance):
        yield Deviation(f"{instance!r} does not match {pattern!r}")


def _translate(error: ValidationError) -> InvalidValueError:
    steps = list(error.absolute_path)
    value: Any = error.instance
    rule: Any = error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "additionalProperties":
            key = next(key for key in value if key not in schema["properties"])
            return InvalidValueError(
                format_path([*steps, key]), value[key], "is an unknown key", advice=_ADVICE
            )
        case "required":
            key = next(key for key in rule if key not in value)
            return InvalidValueError(format_path([*steps, key]), None, "is missing", advice=_ADVICE)
        case "pattern":
            fallback = f"does not match {rule}"
            return InvalidValueError(format_path(steps), value, _HINTS.get(str(rule), fallback))
        case "maxItems" | "minItems":
            word = "more than" if error.validator == "maxItems" else "fewer than"
            problem = f"entries are {word} {rule}"
            return InvalidValueError(format_path(steps), len(value), problem)
        case "type":
            problem = f"is not {_article(str(rule))}"
        case "minimum" | "maximum":
            word = "below" if error.validator == "minimum" else "above"
            problem = f"is {word} {rule}"
        case "enum" | "const":
            problem = f"is not {json.dumps(rule)}"
        case _:
            problem = f"is against {error.validator} {rule!r}"
    return InvalidValueError(format_path(steps), value, problem, advice=_ADVICE)


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"
