"""What people ask about offload cards: slices made and ended over all of them, and programmed.

A slice is made as a plan: every part reserved, then every part granted, or nothing. It decides
nothing: `policy.sliceplans` chooses, and the card does as well; where they disagree, it is planned
anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.cardviews import card_view, plan_texts, slice_view, slices_view
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.model.card import HeldSlice, SignedImage
from virtfabric.model.errors import (
    CardError,
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    VirtfabricError,
)
from virtfabric.model.ids import GuestId
from virtfabric.policy.sliceplans import SlicePlan, SliceWish, plan_release, plan_slices
from virtfabric.policy.sliceusers import find_users
from virtfabric.protocol.codec import MAX_IMAGE
from virtfabric.protocol.imagefile import SUFFIX, parse_manifest
from virtfabric.protocol.slicefile import parse_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.idleslices import IdleSlices
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.undertaking import Outcome
    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.ports import AuditLog, Card, Cards

    Json = dict[str, Any]

log = logging.getLogger(__name__)

WORDS: Final = ("guest", "reclaim")
ATTEMPTS: Final = 3
"""Plans for one request, as others may change the cards between a plan and its promises."""
PROGRAM_S: Final = 600.0
"""For one image. The largest of today take minutes over a slow configuration port."""


class CardDesk:
    """Shows cards, and starts the jobs."""

    def __init__(
        self, *, cards: Cards, observatory: Observatory, ledger: Ledger, conductor: Conductor,
        jobs: Jobs, audit: AuditLog, settle_soon: Callable[[], None],
        arbiter: Callable[[], Json], idle: IdleSlices,
    ) -> None:  # fmt: skip
        """Wire it; nothing is asked yet.

        `settle_soon` has cards brought to what the books say; it must not block. `arbiter` says who
        decides about the host, as `daemon.arbitration` shows it.
        """
        self._arbiter = arbiter
        self._idle = idle
        self._settle_soon = settle_soon
        self._cards = cards
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._audit = audit

    # -- reading ------------------------------------------------------------------------------

    def show(self) -> list[Json]:
        """Every card, as last told of."""
        arbiter = self._arbiter()
        return [card_view(view, arbiter) for view in self._cards.views().values()]

    def show_card(self, serial: str) -> Json:
        """One card, with its slices and what it measures.

        Raises:
            RefusedError: there is no such card.
        """
        view = self._find_card(serial).view()
        held = self._ledger.view().books.slices
        slices, idle = view.books.slices.values() if view.books else (), self._idle.idle()
        return card_view(view, self._arbiter()) | {
            "slice_list": [
                slice_view(view, one, held.get(one.request), self._name_of, idle) for one in slices
            ],
            "readings": {subject: dict(values) for subject, values in view.readings.items()},
        }  # fmt: skip

    def slices(self) -> list[Json]:
        """Every slice of every card."""
        held = self._ledger.view().books.slices
        return slices_view(self._cards.views(), held, self._name_of, self._idle.idle())

    def _name_of(self, holder: str) -> str:
        found = self._observatory.find(holder)
        return found.name if found else holder

    # -- making -------------------------------------------------------------------------------

    def preview_create(self, text: str, options: Mapping[str, str]) -> Json:
        """The exact steps; nothing changed.

        Raises:
            RefusedError, InvalidValueError
        """
        return self._preview(self._creation(self._wishes(text, options), "").work)

    def create(self, text: str, options: Mapping[str, str], *, uid: int, by: str) -> Job:
        """Start the job that makes the slices of a file: all of them, or none.

        Raises:
            RefusedError, InvalidValueError: nothing was begun.
        """
        wishes = self._wishes(text, options)
        self._observatory.glance_at_devices()  # who uses what might have to make way
        self._preview(self._creation(wishes, by).work)
        names = ", ".join(wish.spec.name or "without a name" for wish in wishes)
        title = f"slice {names}"

        def run(_: Job, progress: Progress) -> Json:
            for attempt in range(ATTEMPTS):
                making = self._creation(wishes, by)
                try:
                    outcome = self._conduct(making.work, progress)
                except RefusedError as error:
                    if error.refusal.reason is not Reason.STALE or attempt + 1 == ATTEMPTS:
                        raise
                    log.info("planning anew: %s", error)
                    continue
                return summary(making.work, outcome) | {"slices": making.made}
            raise AssertionError("unreachable")

        return self._jobs.start(title, run, uid=uid)

    def _wishes(self, text: str, options: Mapping[str, str]) -> tuple[SliceWish, ...]:
        for name in options:
            if name not in WORDS:
                known = ", ".join(WORDS)
                raise InvalidValueError(name, options[name], f"is not known; known: {known}")
        reclaim = options.get("reclaim", "yes")
        if reclaim not in ("yes", "no"):
            raise InvalidValueError("reclaim", reclaim, "is not yes or no")
        guest = self._guest(options["guest"]) if "guest" in options else None
        holder = guest.uuid if guest else ""
        near = tuple(f"node:{node}" for node in guest.numa_nodes) if guest else ()
        return tuple(
            SliceWish(spec, holder, near, reclaim=reclaim == "yes") for spec in parse_slices(text)
        )

    def _guest(self, name: str) -> GuestState:
        found = self._observatory.find(name)
        if found is None:
            raise RefusedError(Refusal(Reason.UNKNOWN_GUEST, f"there is no guest {name!r}"))
        return found

    def _creation(self, wishes: Sequence[SliceWish], by: str) -> _Making:
        making = _Making(self._cards, wishes, new_request(), self._idle.takeable)
        names = [wish.spec.name for wish in wishes]
        making.work = Undertaking(
            making.request, f"slices {', '.join(filter(None, names))}".rstrip(), making.place,
            settle_books=making.settle, body={"slices": names, "by": by},
        )  # fmt: skip
        return making

    # -- ending -------------------------------------------------------------------------------

    def preview_destroy(self, name: str) -> Json:
        """The exact steps; nothing changed.

        Raises:
            RefusedError
        """
        return self._preview(self._ending(self._parts_of(name), ""))

    def destroy(self, name: str, *, uid: int, by: str) -> Job:
        """Start the job that ends a slice, all its parts.

        Raises:
            RefusedError: there is no such slice, or somebody uses it.
        """
        self._observatory.glance_at_devices()  # who uses it
        work = self._ending(self._parts_of(name), by)
        self._preview(work)

        def run(_: Job, progress: Progress) -> Json:
            outcome = self._conduct(work, progress)
            return summary(work, outcome) | {"slice": name}

        return self._jobs.start(f"end of slice {name}", run, uid=uid)

    def _ending(self, parts: Sequence[HeldSlice], by: str) -> Undertaking:
        request, keys = new_request(), {one.key for one in parts}

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
            now = [one for key, one in snapshot.books.slices.items() if key in keys]
            if not now:
                return Refusal(Reason.UNKNOWN_ID, "the slice is gone meanwhile")
            user = _user_of(snapshot, now)
            if user:
                return Refusal(Reason.DEVICE_IN_USE, f"{now[0].part.name or now[0].wish}: {user}")
            return plan_release(now, request, snapshot.generation)

        def settle(books: Books) -> Books:
            kept = {key: one for key, one in books.slices.items() if key not in keys}
            return replace(books, slices=kept)

        wish = parts[0].part.name or parts[0].wish
        body = {"slice": wish, "parts": [one.to_json() for one in parts], "by": by}
        return Undertaking(request, f"end of slice {wish}", place, settle_books=settle, body=body)

    def _parts_of(self, name: str) -> tuple[HeldSlice, ...]:
        """The parts of a slice of ours, by its id, its name, or one part as `CARD/SLICE`.

        Raises:
            RefusedError: there is none, or several have the name.
        """
        held = tuple(self._ledger.view().books.slices.values())
        found = [one for one in held if name in (one.wish, one.part.name)]
        wishes = {one.wish for one in found}
        if not found:
            part = next((one for one in held if name == f"{one.card}/{one.slice}"), None)
            wishes = {part.wish} if part else set()
        if len(wishes) > 1:
            detail = f"several slices are called {name!r}: {', '.join(sorted(wishes))}"
            raise RefusedError(Refusal(Reason.INVALID_ARGUMENT, detail))
        if not wishes:
            known = ", ".join(sorted({one.part.name or one.wish for one in held})) or "none"
            detail = f"this host has no slice {name!r}; it has: {known}"
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, detail))
        return tuple(one for one in held if one.wish in wishes)

    # -- programming --------------------------------------------------------------------------

    def program(self, name: str, path: str, *, uid: int, by: str) -> Job:
        """Start the job that programs all parts of a slice that have accelerators.

        Raises:
            RefusedError, InvalidValueError: nothing was begun.
        """
        parts = [one for one in self._parts_of(name) if one.part.units]
        if not parts:
            detail = f"{name} has no accelerators that an image could program"
            raise RefusedError(Refusal(Reason.INVALID_ARGUMENT, detail))
        image = read_image(Path(path))
        about = {
            "slice": name, "image": image.manifest.name, "digest": image.manifest.digest, "by": by,
        }  # fmt: skip

        def run(_: Job, progress: Progress) -> Json:
            subjects = [name, *(one.key for one in parts)]
            for number, one in enumerate(parts):
                share = _Share(progress, one.card, number, len(parts))
                try:
                    self._load(one, image, share)
                except VirtfabricError as error:
                    why = {"card": one.card, "why": str(error)}
                    self._audit.append("slice.not-programmed", subjects, about | why)
                    raise
            self._audit.append("slice.programmed", subjects, about)
            return {"slice": name, "image": image.manifest.name, "parts": len(parts)}

        return self._jobs.start(f"image {image.manifest.name} for slice {name}", run, uid=uid)

    def _load(self, part: HeldSlice, image: SignedImage, share: _Share) -> None:
        card = self._cards.reach(part.card)
        refusal = card.program(part.slice, image, share, deadline_s=PROGRAM_S)
        if refusal is not None:
            raise RefusedError(refusal)

    def trust(self, serial: str, *, by: str) -> Json:
        """Believe a card again, and connect to it.

        Raises:
            RefusedError: there is no such card.
        """
        card = self._find_card(serial)
        was = card.view()
        self._audit.append("card.trusted", [serial], {"card": serial, "was": was.why, "by": by})
        card.trust()
        return card_view(card.view(), self._arbiter())

    def _find_card(self, serial: str) -> Card:
        found = self._cards.find(serial)
        if found is None:
            known = ", ".join(self._cards.views()) or "none"
            detail = f"there is no card {serial!r} in the configuration; there are: {known}"
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, detail))
        return found

    def _conduct(self, work: Undertaking, progress: Progress) -> Outcome:
        try:
            return self._conductor.conduct(work, progress)
        except VirtfabricError:
            self._settle_soon()  # what an undo made again has another id
            raise

    def _preview(self, work: Undertaking) -> Json:
        answer = self._conductor.consider(work)
        if isinstance(answer, Refusal):
            raise RefusedError(answer)
        _, _, plan = answer
        return {"steps": plan_texts(plan.steps), "generation": plan.generation}


class _Making:
    """Slices on their way: planned, perhaps more than once, then in the books."""

    work: Undertaking

    def __init__(
        self, cards: Cards, wishes: Sequence[SliceWish], request: RequestId,
        takeable: Callable[[], Sequence[str]],
    ) -> None:  # fmt: skip
        self._takeable = takeable
        self._cards = cards
        self._wishes = wishes
        self.request = request
        self._plan: SlicePlan | None = None
        self.made: list[Json] = []

    def place(self, snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
        answer = plan_slices(
            snapshot.cards, snapshot.books.slices, self._wishes, host=self._cards.host,
            request=self.request, generation=snapshot.generation, idle=self._takeable(),
            kept=find_users(snapshot),
        )  # fmt: skip
        if isinstance(answer, Refusal):
            return answer
        self._plan = answer
        return answer.plan

    def settle(self, books: Books) -> Books:
        """With what was made, under the ids that the cards gave it.

        Raises:
            CardError: a part is gone already; another host's had priority.
        """
        assert self._plan is not None
        views = self._cards.views()
        made: dict[str, HeldSlice] = {}
        for part in self._plan.parts:
            on_it = views[part.card].books
            slices = on_it.slices.values() if on_it else ()
            found = next((one for one in slices if one.request == part.key), None)
            if found is None:
                what = f"slice {part.spec.name or part.wish}"
                raise CardError(f"card {part.card}: {what} ended before all of it was made")
            made[part.key] = HeldSlice(
                part.key, part.card, found.id, part.wish, part.spec, part.holder
            )
        self.made = [one.to_json() for one in made.values()]
        kept = {key: one for key, one in books.slices.items() if key not in self._plan.ends}
        return replace(books, slices=kept | made)


def _user_of(snapshot: HostSnapshot, parts: Sequence[HeldSlice]) -> str:
    """Who keeps a slice from ending, in words; empty for nobody."""
    users = find_users(snapshot)
    for one in parts:
        holder = snapshot.guests.get(GuestId(one.holder))
        if holder is not None and holder.active:
            return f"{holder.name} has it, and runs"
        if one.key in users:
            return users[one.key]
    return ""


class _Share:
    """The progress of one part as a share of the whole job's."""

    def __init__(self, progress: Progress, card: str, number: int, total: int) -> None:
        self._progress, self._card = progress, card
        self._number, self._total = number, total
        self.cancelled = progress.cancelled

    def progress(self, fraction: float, text: str) -> None:
        done = (self._number + fraction) / self._total
        self._progress.progress(done, f"card {self._card}: {text}")


def read_image(path: Path) -> SignedImage:
    """An image with the manifest beside it.

    Raises:
        InvalidValueError: not there, no image file, or not the bytes that the manifest names.
    """
    manifest, signature = parse_manifest(_read(path.with_name(path.name + SUFFIX), 4096))
    data = _read(path, MAX_IMAGE)
    if len(data) != manifest.size or hashlib.sha256(data).hexdigest() != manifest.digest:
        raise InvalidValueError("image", str(path), "is not what its manifest was made for")
    return SignedImage(manifest, signature, data)


def _read(path: Path, most: int) -> bytes:
    """A regular file of at most so many bytes: an absolute path, no link at its end."""
    if not path.is_absolute():
        raise InvalidValueError("image", str(path), "is not an absolute path")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidValueError("image", str(path), "is not a regular file")
            data = file.read(most + 1)
    except OSError as error:
        raise InvalidValueError("image", str(path), f"cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise InvalidValueError("image", str(path), f"has more than {most} bytes")
    return data
