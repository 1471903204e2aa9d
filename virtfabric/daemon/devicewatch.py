"""What happens to PCIe functions beside this agent, and which wishes for them are open.

Functions that leave their guest or the host by surprise are taken out of the books; what a guest's
policy asks for is tried again whenever something may have become free. Chooses nothing: who gets
what is the arbiter's decision, as for any request.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.api import JobState
from virtfabric.daemon.custody import DEVICE, condemned, forfeited, quarantined
from virtfabric.daemon.homeward import homeward, user_of
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.model.capability import device_key
from virtfabric.model.device import DeviceNews, PciAddress, alias_of
from virtfabric.model.errors import Refusal, VirtfabricError
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.pools import is_bound_for_guests, pool_of
from virtfabric.policy.wishes import unmet_wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.errands import Errands
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.undertaking import Caps
    from virtfabric.model.decision import Decision
    from virtfabric.model.device import Found, HeldFunction, Quarantine
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.want import Want
    from virtfabric.ports import AuditLog, Clock, Journal

log = logging.getLogger(__name__)

KEY = "devices"
"""Of the errands here; those about one guest go by its UUID."""


class DeviceWatch:
    """Looks after functions and wishes. Thread-safe: all of it is done in errands."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        jobs: Jobs,
        notices: Notices,
        journal: Journal,
        audit: AuditLog,
        clock: Clock,
        errands: Errands,
        await_plans: Callable[[GuestId], None],
    ) -> None:
        """Wire it; `await_plans` waits until no plan works on a guest."""
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._notices = notices
        self._journal = journal
        self._audit = audit
        self._clock = clock
        self._errands = errands
        self._await_plans = await_plans
        self._looking = threading.Event()
        self._hearing = threading.Lock()
        self._heard: list[DeviceNews] = []
        self._satisfying = threading.Event()
        self._quarantine: dict[PciAddress, Quarantine] = {}
        self._telling = threading.Lock()
        self._tried: set[PciAddress] = set()
        self._unmet: set[str] = set()
        conductor.tell_moves(self.satisfy_soon)

    # -- being told -------------------------------------------------------------------------

    def look_soon(self, news: DeviceNews | None = None) -> None:
        """Something about the host's functions may have changed; from any thread, never waits.

        None: nobody tells what.
        """
        with self._hearing:
            self._heard.append(news or DeviceNews(None, self._clock.monotonic()))
        self._once(self._looking, self._look)

    def satisfy_soon(self) -> None:
        """Functions moved, or a guest came: wishes may be met now; never waits."""
        self._once(self._satisfying, self._satisfy)

    def _once(self, queued: threading.Event, work: Callable[[], None]) -> None:
        """Queue it, unless it is queued already and has not begun."""
        if queued.is_set():
            return
        queued.set()

        def run() -> None:
            queued.clear()
            work()

        self._errands.put(KEY, run)

    # -- looking ----------------------------------------------------------------------------

    def start(self) -> None:
        """See what became of the functions in the books while nobody looked."""
        self._see(DeviceNews(None, self._clock.monotonic()))

    def _look(self) -> None:
        """What was heard since the last time concerns all of it at once."""
        with self._hearing:
            heard, self._heard = self._heard, []
        told = [news.functions for news in heard if news.functions is not None]
        functions = frozenset[PciAddress]().union(*told)
        if heard and (functions or len(told) < len(heard)):
            about = functions if len(told) == len(heard) else None
            self._see(DeviceNews(about, max(news.at for news in heard)))

    def _see(self, news: DeviceNews) -> None:
        """Read functions anew: some are gone from their guests, some had a fatal error.

        What this agent did itself is news as well: mostly its plan has read it back by now.
        """
        self._observatory.refresh_devices(news.functions, settings=(), since=news.at)
        self._condemn()
        there = self._observatory.devices.functions
        for guest, holding in self._ledger.view().books.holdings.items():
            for function in holding.functions:
                if function.address not in there:
                    lose = partial(self._vanished, guest, function.address)
                    self._errands.put(guest, lose)
        self._satisfy()

    def _condemn(self) -> None:
        books, inventory = self._ledger.view().books, self._observatory.devices
        now = self._clock.now()
        if condemned(books, inventory, now) != books:
            self._ledger.commit(
                None, lambda books: condemned(books, inventory, now), self._journal.store_books
            )

    def _vanished(self, guest: GuestId, address: PciAddress) -> None:
        self._await_plans(guest)
        self._observatory.refresh_devices([address], settings=())
        self._observatory.refresh([guest])
        if address not in self._observatory.devices.functions:
            self._lose(guest, address, "it is gone from the host", doubtful=False)

    def _return_strays(self) -> None:
        """What is bound for guests, has a way back and no guest goes home; tried once each.

        Of what is gone from the host, only what was done around it.
        """
        snapshot = self._observatory.snapshot()
        for address, entry in snapshot.books.quarantine.items():
            function, found = snapshot.devices.functions.get(address), entry.found
            if function is None:
                stray = _has_surroundings(found)
            else:
                stray = _has_way_back(found) and is_bound_for_guests(
                    snapshot.devices, function, found
                )
            if stray and address not in self._tried and not user_of(snapshot, entry):
                self._send_home(entry)

    # -- functions that left their guest -----------------------------------------------------

    def removed(self, guest: GuestId, alias: str) -> None:
        """libvirt says that a guest's device is gone: by our hand, the guest's or by accident."""
        self._await_plans(guest)
        self._observatory.refresh([guest])
        state = self._observatory.guest(guest)
        books = self._ledger.view().books
        for address in books.quarantine:
            if alias_of(address) == alias:
                self._tried.discard(address)
                self.satisfy_soon()
        holding = books.holdings.get(guest)
        attached = {d.address for d in state.devices} if state else set()
        for function in holding.functions if holding else ():
            gone = alias_of(function.address) == alias and function.address not in attached
            if gone and state is not None and state.active:
                why = f"{state.name} let go of it, which nobody here asked for"
                self._lose(guest, function.address, why, doubtful=True)
        self._settle_residues(guest)

    def _lose(self, guest: GuestId, address: PciAddress, why: str, *, doubtful: bool) -> None:
        """Take a function out of a guest's holding; in quarantine first, if it has a way back."""
        holding = self._ledger.view().books.holdings.get(guest)
        held = {f.address: f for f in holding.functions} if holding else {}
        function = held.get(address)
        if function is None:
            return
        now = self._clock.now()
        homeless = doubtful or _has_surroundings(function.found)

        def change(books: Books) -> Books:
            books = forfeited(books, guest, function, now)
            if homeless:
                books = quarantined(books, address, why, now, function.found)
            return books

        self._ledger.commit(None, change, self._journal.store_books)
        self._tell_loss(guest, function, why)
        self._tell_quarantine()
        entry = self._ledger.view().books.quarantine.get(address)
        if doubtful and entry is not None:
            self._send_home(entry)
        self.satisfy_soon()

    def _tell_loss(self, guest: GuestId, function: HeldFunction, why: str) -> None:
        state = self._observatory.guest(guest)
        name = state.name if state else guest
        body = {
            "guest": guest, "name": name, "address": function.address,
            "capability": function.capability, "why": why,
        }  # fmt: skip
        self._audit.append("device.lost", [guest, function.address], body)
        self._notices.publish("device.lost", body)
        self._notices.alert(
            f"lost {guest} {function.address}",
            f"guest {name} lost {function.address} ({function.capability}): {why}",
        )

    def _is_for_one_use(self, address: PciAddress) -> bool:
        pool = pool_of(self._observatory.devices, address)
        return pool is not None and pool.one_time_use

    def _send_home(self, entry: Quarantine) -> None:
        """Where all of it is done and verified, its state is certain again, if it is sane."""
        self._tried.add(entry.address)
        lift = not (entry.condemned or self._is_for_one_use(entry.address))
        work = homeward(entry, "virtfabricd", lift=lift)
        job = self._conduct(work)
        job.ended.wait()
        if job.state is not JobState.DONE:
            log.warning("%s: %s", work.title, (job.error or {}).get("detail", ""))

    def _settle_residues(self, guest: GuestId) -> None:
        """A guest that let go late of what an undo left with it owes it no more."""
        state = self._observatory.guest(guest)
        books = self._ledger.view().books
        if not any(r.guest == guest and r.what == DEVICE for r in books.residues):
            return
        holding = books.holdings.get(guest)
        held = {f.address for f in holding.functions} if holding else set()
        kept = [d for d in state.devices if d.ours and d.address not in held] if state else []
        if kept:
            return

        def change(books: Books) -> Books:
            left = tuple(r for r in books.residues if (r.guest, r.what) != (guest, DEVICE))
            return replace(books, residues=left)

        self._ledger.commit(None, change, self._journal.store_books)

    # -- a guest that stopped by itself -------------------------------------------------------

    def paused(self, guest: GuestId) -> None:
        """A guest with functions does not run: an error of one of them stops it (fatal AER)."""
        state = self._observatory.guest(guest)
        holding = self._ledger.view().books.holdings.get(guest)
        topic = f"paused {guest}"
        if state is None or holding is None or not holding.claims or not state.halted:
            self._notices.settle(topic)
            return
        self.look_soon()
        functions = ", ".join(f.address for f in holding.claims)
        self._audit.append(
            "device.guest-halted", [guest, *(f.address for f in holding.claims)],
            {"guest": guest, "name": state.name, "functions": functions},
        )  # fmt: skip
        self._notices.alert(
            topic,
            f"guest {state.name} was stopped by an error while it had {functions}: look for AER "
            "errors in dmesg; `virsh reset` or `virsh destroy` ends it, then "
            "`virtfabric devices` says whether the function is sane",
        )

    # -- wishes ------------------------------------------------------------------------------

    def _satisfy(self) -> None:
        """Try what policies ask for and guests do not have, the highest priority first."""
        self._tell_quarantine()
        self._return_strays()
        for guest, wants in unmet_wishes(self._observatory.snapshot()).items():
            state = self._observatory.guest(guest)
            if state is not None:
                self._conduct(self._wish(state, wants)).ended.wait()
        self._tell_unmet()

    def _wish(self, guest: GuestState, wants: Mapping[str, Want]) -> Undertaking:
        request = Request(
            new_request(), guest.uuid, AGENT, Origin.AGENT, partial=True, devices=wants
        )

        def decide(snapshot: HostSnapshot, caps: Caps) -> Decision | Refusal:
            return choose_allocation(snapshot, request, caps=caps)

        return Undertaking(
            request.id,
            f"{', '.join(wants)} for {guest.name}, as its policy asks",
            self._conductor.place_decision(request.deadline_s),
            decide,
            deadline_s=request.deadline_s,
            body={"asked": request.to_json(), "name": guest.name, "origin": "agent"},
        )

    def _tell_unmet(self) -> None:
        """An alert for each guest that lacks functions, until it has them or stops."""
        holdings = self._ledger.view().books.holdings
        unmet: dict[str, str] = {}
        for guest in self._observatory.guests.values():
            holding = holdings.get(guest.uuid)
            if holding is None or guest.policy is None or not guest.active:
                continue
            for wish in guest.policy.devices:
                held = holding.amounts[device_key(wish.capability)]
                if held < wish.count:
                    unmet[f"wish {guest.uuid} {wish.capability}"] = (
                        f"guest {guest.name} has {held} of the {wish.count} {wish.capability} that "
                        "its policy asks for; it gets more when they are free (virtfabric devices)"
                    )
        for topic in self._unmet - unmet.keys():
            self._notices.settle(topic)
        for topic, text in unmet.items():
            self._notices.alert(topic, text)
        self._unmet = set(unmet)

    def _conduct(self, work: Undertaking) -> Job:
        return self._jobs.start(
            work.title, lambda _, progress: summary(work, self._conductor.conduct(work, progress))
        )

    def _tell_quarantine(self) -> None:
        """An alert for each function in quarantine, an audit record for each that came or went."""
        with self._telling:
            found = self._ledger.view().books.quarantine
            for address, entry in found.items():
                known = self._quarantine.get(address)
                if known is not None and known.why == entry.why:
                    continue
                self._record("device.quarantined", entry)
                text = f"{address} is in quarantine: {entry.why}; {entry.remedy}"
                self._notices.alert(f"quarantine {address}", text)
            for address in self._quarantine.keys() - found.keys():
                self._record("device.freed", self._quarantine[address])
                self._notices.settle(f"quarantine {address}")
                self._tried.discard(address)
            self._quarantine = dict(found)

    def _record(self, kind: str, entry: Quarantine) -> None:
        body: dict[str, Any] = {"address": entry.address, "why": entry.why}
        try:
            self._audit.append(kind, [entry.address], body)
        except VirtfabricError as error:
            log.error("%s of %s cannot be recorded: %s", kind, entry.address, error)
        self._notices.publish(kind, body)


def _has_way_back(found: Found) -> bool:
    """Whether anything was changed of the function itself that can be changed back."""
    return found.driver is not None or found.profile is not None


def _has_surroundings(found: Found) -> bool:
    """Whether anything beside the function itself was prepared for its guest: port, group."""
    return found.port is not None or bool(found.siblings)
