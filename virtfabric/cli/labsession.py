"""What every `virtfabric lab` command has: the module that owns labs, and errors told in a line."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import note
from virtfabric.model.errors import InstallationError, VirtfabricError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_NEEDED: Final = {"jsonschema": "jsonschema", "qemu.qmp": "qemu.qmp"}


def load_labs() -> Any:
    """The module that owns labs; imported late, for other commands need none of it.

    Raises:
        InstallationError: the extra `lab` is not installed.
    """
    for module, package in _NEEDED.items():
        if find_spec(module.partition(".")[0]) is None:
            raise InstallationError(
                f"labs need {package}", advice="pip install 'virtfabric[lab]'"
            )  # fmt: skip
    return import_module("virtfabric.shim.lab.lab")


class Teller:
    """Tells each step with the seconds since the command began."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, line: str) -> None:
        """One step."""
        note(f"{time.monotonic() - self._since:6.1f} s  {line}")


def told(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What a failed tool or lab said comes before the error itself."""

    def wrapped(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except VirtfabricError as error:
            for line in getattr(error, "log", ()):
                note(line)
            raise
        except BrokenPipeError:
            raise  # of standard output
        except OSError as error:
            raise _explain(error) from error

    return wrapped


def _explain(error: OSError) -> VirtfabricError:
    """What this machine does not let labs have, and what to do: most of it is files."""
    place = import_module("virtfabric.shim.lab.place")
    # a write does not tell of which file: nearly all that labs write is there
    path = error.filename or place.labs_root()
    failed: VirtfabricError = place.LabError(
        f"{path}: {error.strerror or error}",
        advice="labs need root, or directories that you may write to, with room: "
        "$VIRTFABRIC_LABS (/run/virtfabric-labs) and $VIRTFABRIC_CACHE (~/.cache/virtfabric)",
    )
    return failed
