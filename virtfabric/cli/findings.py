"""What one check of `doctor` found, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check. `mend` is empty where there is nothing to do."""

    name: str
    verdict: Verdict
    detail: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        """For `--json`."""
        return {
            "check": self.name, "verdict": self.verdict.value,
            "detail": self.detail, "mend": self.mend,
        }  # fmt: skip
