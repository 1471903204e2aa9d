"""The conformance suite: does a card keep to docs/card-protocol.md? For makers of cards.

Each check visits the card anew, expects what the document says, and leaves nothing behind. The card
must be in nobody's use. It imports nothing of the emulated card.
"""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.cardlink.visitor import FailedCheckError, Visitor
from virtfabric.model.errors import CardLostError, VirtfabricError
from virtfabric.protocol import messages as m
from virtfabric.trust.authority import issue, make_authority
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity
from virtfabric.trust.store import identity_of_pem, read_credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.protocol.messages import Message

PREFIX: Final = "conformance/"
"""Of the request keys that the suite uses."""


class Outcome(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """One check: what the card has to do, and whether it does."""

    area: str
    name: str
    outcome: Outcome
    detail: str = ""

    def to_json(self) -> dict[str, str]:
        """For `--json`."""
        return {
            "area": self.area, "name": self.name, "outcome": self.outcome.value,
            "detail": self.detail,
        }  # fmt: skip


class SkippedCheckError(VirtfabricError):
    """The card does not have what the check needs."""


@dataclass(slots=True)
class Bench:
    """A card under test."""

    path: Path
    serial: str
    host: str
    context: ssl.SSLContext
    old: ssl.SSLContext
    """The same host, which speaks nothing newer than TLS 1.2."""
    image: tuple[Path, str] | None = None
    requests: int = 0

    def visit(self, context: ssl.SSLContext | None = None) -> Visitor:
        """A link on which nothing was said yet."""
        return Visitor(self.path, context or self.context, self.host, self.serial)

    def meet(self) -> Visitor:
        """A link on which both have greeted."""
        visitor = self.visit()
        if not visitor.is_open:
            raise FailedCheckError(f"no session: {visitor.ended_by}")
        visitor.greet()
        return visitor

    def key(self) -> str:
        """A request key that was not used yet."""
        self.requests += 1
        now = datetime.datetime.now(datetime.UTC)
        return f"{PREFIX}{now:%Y%m%dT%H%M%S%f}/{self.requests}"

    def stranger(self) -> ssl.SSLContext:
        """A host of an authority that the card does not know."""
        now = datetime.datetime.now(datetime.UTC)
        identity = Identity.of(m.Role.HOST, self.host)
        return make_context(
            issue(make_authority("a stranger", now), identity, now, days=1), server=False
        )


@dataclass(frozen=True, slots=True)
class Check:
    """A check: `area`, what the card has to do, and how to see whether it does."""

    area: str
    name: str
    run: Callable[[Bench], None]


def run_suite(
    path: Path, directory: Path, serial: str, *, image: tuple[Path, str] | None = None
) -> list[Result]:
    """Run all checks.

    Args:
        path: the card's socket.
        directory: a host's credentials.
        serial: of the card.
        image: a signed image with its manifest beside it, and the capability that it is for.

    Raises:
        InvalidValueError: the credentials cannot be used.
        CardLostError: nobody listens at `path`.
    """
    # imported here: the checks are registered with what this module defines
    from virtfabric.adapters.cardlink.conformancechecks import CHECKS
    from virtfabric.adapters.cardlink.conformancehosts import HOST_CHECKS

    credentials = read_credentials(directory)
    host = identity_of_pem(credentials.certificate).serial
    old = make_context(credentials, server=False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    bench = Bench(path, serial, host, make_context(credentials, server=False), old, image)
    with bench.visit():
        pass  # that somebody listens at all is not one failure for each check
    results = [_run(check, bench) for check in (*CHECKS, *HOST_CHECKS)]
    return [*results, _clean_up(bench)]


def _run(check: Check, bench: Bench) -> Result:
    try:
        check.run(bench)
    except SkippedCheckError as why:
        return Result(check.area, check.name, Outcome.SKIPPED, str(why))
    except FailedCheckError as problem:
        return Result(check.area, check.name, Outcome.FAILED, f"it {problem}")
    except CardLostError as error:
        return Result(check.area, check.name, Outcome.FAILED, str(error))
    return Result(check.area, check.name, Outcome.PASSED)


def _clean_up(bench: Bench) -> Result:
    """What checks left that failed half-way."""
    area, name = "end", "nothing is left of the checks"
    try:
        with bench.meet() as visitor:
            forget_all(visitor)
            slices = [report.slice for report in _inventory(visitor).slices]
            left = [one for one in slices if one.request.startswith(PREFIX)]
    except (FailedCheckError, CardLostError) as error:
        return Result(area, name, Outcome.FAILED, str(error))
    outcome = Outcome.FAILED if left else Outcome.PASSED
    return Result(area, name, outcome, ", ".join(one.id for one in left))


def forget_all(visitor: Visitor) -> None:
    """End all slices and promises of the suite."""
    told = _inventory(visitor)
    for promise in told.reservations:
        if promise.slice.request.startswith(PREFIX):
            visitor.ask(m.Abort(promise.id))
    for report in told.slices:
        if report.slice.request.startswith(PREFIX):
            visitor.ask(m.Release(report.slice.id))


def _inventory(visitor: Visitor) -> m.Inventory:
    told: m.Inventory = answered(visitor.ask(m.InventoryRequest()), m.Inventory)
    return told


def answered(answer: Message, kind: type[Any]) -> Any:
    """The answer, if it is of this kind.

    Raises:
        FailedCheckError
    """
    if isinstance(answer, kind):
        return answer
    said = type(answer).__name__
    if isinstance(answer, m.Error):
        said = f"error {answer.code} ({answer.reason or answer.detail})"
    raise FailedCheckError(f"answered {said}, not {kind.__name__}")
