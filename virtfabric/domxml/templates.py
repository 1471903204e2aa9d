"""The Jinja2 environment of `xml_templates/`. Templates format; they decide nothing."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from virtfabric.resources import xml_template_dir

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> Environment:
    # an eighth of the agent's start, and the client imports this as well
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(xml_template_dir()),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def load_templates() -> None:
    """Read and compile all of them now, so that no request is the first to do so.

    Raises:
        InstallationError: as for `render`.
    """
    environment = _environment()
    for name in environment.list_templates():
        environment.get_template(name)


def render(template: str, /, **values: object) -> str:
    """The text of one element, with every value escaped.

    Raises:
        InstallationError: the package was installed without its templates.
    """
    return _environment().get_template(template).render(**values)
