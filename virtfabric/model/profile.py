"""Profiles: what a vendor's driver is to make of a function, written to a file in its directory.

With the vendor-specific VFIO framework (NVIDIA vGPU on VFs, Linux 6.8 and later) a VF stays with
the vendor's own driver, which reads from such a file which profile the VF is to be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping

_FILE: Final = re.compile(r"([A-Za-z0-9_-]+)/([A-Za-z0-9_-]+)")
_OTHERS: Final = re.compile(r"driver|subsystem|iommu|iommu_group|physfn|virtfn\d*|firmware_node")
"""Links of a function to what is not its own."""


class ProfileFile(str):
    """DIRECTORY/NAME below the function itself, `nvidia/current_vgpu_type`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str, *, field: str = "file") -> Self:
        """Read one.

        Raises:
            InvalidValueError: another form, or a directory that is not the function's own.
        """
        match = _FILE.fullmatch(text)
        if match is None:
            raise InvalidValueError(
                field, text, "is not DIRECTORY/NAME below the function",
                advice="write it like nvidia/current_vgpu_type",
            )  # fmt: skip
        if _OTHERS.fullmatch(match[1]):
            raise InvalidValueError(
                field, text, f"leads out of the function's own directory: {match[1]} is a link"
            )
        return cls(text)


@dataclass(frozen=True, slots=True)
class Profile:
    """What is written for a guest, and what afterwards.

    Attributes:
        file: where.
        value: while a guest has the function.
        none: when none has it.
    """

    file: ProfileFile
    value: str
    none: str

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {"file": self.file, "value": self.value, "none": self.none}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The reverse of `to_json`.

        Raises:
            InvalidValueError: not the name of such a file.
        """
        file = ProfileFile.parse(data["file"], field="profile.file")
        return cls(file, str(data["value"]), str(data["none"]))
