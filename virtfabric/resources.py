"""Where hooks/, xml_templates/ and vagrant/topologies/ are: in a checkout or a wheel."""

from __future__ import annotations

from pathlib import Path

from virtfabric.model.errors import InstallationError

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str, *, checkout: str = "") -> Path:
    for candidate in (_PACKAGE / "_shipped" / name, _PACKAGE.parent / (checkout or name)):
        if candidate.is_dir():
            return candidate
    raise InstallationError(
        f"{name}/ is neither in the installed package nor beside it", advice="reinstall virtfabric"
    )


def xml_template_dir() -> Path:
    """The Jinja2 templates of libvirt elements.

    Raises:
        InstallationError: the package was installed without them.
    """
    return _shipped("xml_templates")


def hooks_dir() -> Path:
    """The scripts that libvirt runs.

    Raises:
        InstallationError: the package was installed without them.
    """
    return _shipped("hooks")


def topologies_dir() -> Path:
    """The lab topologies and their JSON Schema.

    Raises:
        InstallationError: the package was installed without them.
    """
    return _shipped("topologies", checkout="vagrant/topologies")
