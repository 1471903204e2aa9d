"""Which huge pages this agent made: a file for each pool, in a directory that a reboot empties.

Pages of a pool cannot be told apart, so what is ours is a number for each guest. It holds as long
as the pool has the size that we left it with: where somebody set another one, all of it is theirs
from then on. What is about to be done is written down first, so that after a crash in between the
pool's own size says how far it came.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from virtfabric.model.errors import HugePagesError
from virtfabric.model.ids import GuestId
from virtfabric.model.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from virtfabric.model.hugepages import PoolKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Intent:
    """A change under way: for whom, and the pool's size before and after it."""

    guest: GuestId
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What is ours of one pool.

    Attributes:
        left: the pool's size when we last changed it.
        made: pages by guest, as they were before `intent`.
    """

    left: int
    made: Mapping[GuestId, int] = field(default_factory=dict)
    intent: Intent | None = None

    def settled(self, size: int) -> Tally:
        """What is ours of a pool that has this size now."""
        intent = self.intent
        if intent is None:
            return self if size == self.left else Tally(size)
        if not min(intent.start, intent.end) <= size <= max(intent.start, intent.end):
            return Tally(size)
        return Tally(intent.start, self.made).moved(intent.guest, size)

    def begun(self, guest: GuestId, end: int) -> Tally:
        """A change to this size begins."""
        return replace(self, intent=Intent(guest, self.left, end))

    def moved(self, guest: GuestId, size: int) -> Tally:
        """The pool has this size, by what we did for the guest."""
        count = self.made.get(guest, 0) + size - self.left
        made = {g: n for g, n in {**self.made, guest: count}.items() if n > 0}
        return Tally(size, made)

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        body: dict[str, Any] = {"left": self.left, "made": dict(self.made)}
        if self.intent is not None:
            body["intent"] = [self.intent.guest, self.intent.start, self.intent.end]
        return body

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """The reverse of `to_json`."""
        made = {GuestId(g): int(n) for g, n in data["made"].items()}
        guest, start, end = data.get("intent") or ("", 0, 0)
        intent = Intent(GuestId(guest), int(start), int(end)) if guest else None
        return cls(int(data["left"]), made, intent)


class Tallies:
    """The tallies of one boot."""

    def __init__(self, directory: Path) -> None:
        """Nothing is touched before a call."""
        self._directory = directory
        self._void: set[PoolKey] = set()

    @contextlib.contextmanager
    def alone(self, pool: PoolKey) -> Iterator[None]:
        """Nobody else changes this pool meanwhile: no other thread, and no other agent either.

        Raises:
            HugePagesError: the directory cannot be written.
        """
        with self._failing():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path(pool).with_suffix(".lock")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self, pool: PoolKey, size: int) -> Tally:
        """What is ours of a pool that has this size now; nothing where it makes no sense."""
        try:
            found = Tally.from_json(json.loads(self._path(pool).read_text()))
        except FileNotFoundError:
            return Tally(size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not to be read (%s): none of its pages count as ours", pool, error)
            return Tally(size)
        settled = found.settled(size)
        self._tell(pool, found, settled)
        return settled

    def _tell(self, pool: PoolKey, found: Tally, settled: Tally) -> None:
        """Once, that pages which were ours are not any more: nobody gives them back now."""
        if not found.made or settled.made:
            self._void.discard(pool)
        elif pool not in self._void:
            self._void.add(pool)
            log.warning(
                "%s: somebody set it to %d pages (we left %d, %d of them ours): it is theirs now",
                pool, settled.left, found.left, sum(found.made.values()),
            )  # fmt: skip

    def write(self, pool: PoolKey, tally: Tally) -> None:
        """Replace it as a whole.

        Raises:
            HugePagesError: it cannot be written; it is as it was.
        """
        path = self._path(pool)
        fresh = path.with_suffix(".new")
        with self._failing():
            fresh.write_text(json.dumps(tally.to_json()))
            fresh.replace(path)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HugePagesError(f"{self._directory}: {error.strerror}") from error

    def _path(self, pool: PoolKey) -> Path:
        return self._directory / f"node{pool.node}-{pool.page // KIB}kB.json"
