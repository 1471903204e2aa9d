"""What every journal keeps: in memory and in SQLite."""

import threading

import pytest

from virtfabric.adapters.simulated.records import MemoryJournal
from virtfabric.adapters.sqlite.journal import SqliteJournal
from virtfabric.model.amounts import Amounts
from virtfabric.model.device import HeldFunction, PciAddress, Quarantine
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId, TransactionId
from virtfabric.model.ledger import Books, Grant, Holding, Loan, Residue
from virtfabric.model.plan import (
    Definition,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.model.units import CpuSet
from virtfabric.ports import StepState, TransactionState

GUEST = GuestId("00000000-0000-4000-8000-000000000010")
OTHER = GuestId("00000000-0000-4000-8000-000000000020")
TXN = TransactionId("txn-1")
STEPS = [
    ResizeVirtioMem(
        guest=GUEST, name="db ü\n", alias="ua", before=0, after=2 << 20, deadline_s=1.5
    ),
    SetBalloon(guest=GUEST, before=1 << 30, after=1 << 29),
    SetVcpuCount(guest=GUEST, before=1, after=2, optional=True),
    PinVcpu(guest=GUEST, vcpu=0, before=CpuSet(), after=CpuSet([0, 1, 5])),
    PinEmulator(guest=GUEST, before=CpuSet([0]), after=CpuSet([1])),
    SetQuota(guest=GUEST, before=-1, after=1500),
    SetShares(guest=GUEST, before=100, after=50),
    SetNodeset(guest=GUEST, before=CpuSet([0]), after=CpuSet([1])),
    SetPolicy(guest=GUEST, definition=Definition.CONFIG, before="", after="<policy></policy>"),
]
OWN, VF = PciAddress("0000:3b:10.1"), PciAddress("0000:3b:10.0")
BOOKS = Books(
    7,
    {
        GUEST: Holding(GUEST, Amounts.of(cpu=2000, memory=1 << 30), (3, 2)),
        OTHER: Holding(OTHER, Amounts.of(cpu=500), functions=(HeldFunction("net.vf", OWN),)),
    },
    {
        GrantId("g1"): Grant(
            GrantId("g1"), GUEST, Amounts.of(cpu=1000), RequestId("r1"), 5.25, 700.0
        ),
        GrantId("g2"): Grant(GrantId("g2"), OTHER, Amounts.of(memory=4096), RequestId("r2"), 6.0),
    },
    {
        LoanId("l1"): Loan(
            LoanId("l1"), GrantId("g1"), OTHER, GUEST, Amounts.of(cpu=1000), 5.25
        )
    },
    (Residue(GUEST, "memory", 4 << 20, 9.0, "stuck"), Residue(OTHER, "vcpu", 1000, 8.0)),
    {VF: Quarantine(VF, "its reset failed", "power cycle", 7.5)},
)  # fmt: skip


@pytest.fixture(params=["memory", "sqlite"])
def journal(request, tmp_path):
    made = MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "journal.db")
    yield made
    made.shut()


def test_a_transaction_goes_its_way(journal):
    journal.begin(TXN, {"request": {"cpu": [1, None]}, "why": "ü"}, 12.5)
    assert journal.extend(TXN, STEPS[:3]) == 0
    assert journal.extend(TXN, STEPS[3:]) == 3
    journal.mark(TXN, 0, StepState.APPLYING)
    journal.mark(TXN, 0, StepState.VERIFIED)
    journal.mark(TXN, 7, StepState.SKIPPED)
    (found,) = journal.open_transactions()
    assert found == journal.transaction(TXN)
    assert [s.step for s in found.steps] == STEPS
    assert [s.index for s in found.steps] == list(range(len(STEPS)))
    planned = StepState.PLANNED
    states = [StepState.VERIFIED, *[planned] * 6, StepState.SKIPPED, planned]
    assert [s.state for s in found.steps] == states
    assert (found.created, found.body["why"], found.outcome) == (12.5, "ü", None)
    journal.close(TXN, TransactionState.COMMITTED, {"grant": "g1"}, BOOKS)
    assert journal.open_transactions() == ()
    ended = journal.transaction(TXN)
    assert ended.state is TransactionState.COMMITTED
    assert ended.outcome == {"grant": "g1"}
    assert journal.load_books() == BOOKS


def test_open_ones_come_oldest_first(journal):
    for name in ("z", "a", "m"):
        journal.begin(TransactionId(name), {}, 1.0)
    journal.close(TransactionId("a"), TransactionState.REFUSED, {}, None)
    assert [t.id for t in journal.open_transactions()] == ["z", "m"]


def test_books_are_replaced_whole(journal):
    assert journal.load_books() == Books()
    journal.store_books(BOOKS)
    assert journal.load_books() == BOOKS
    fewer = Books(8, {OTHER: Holding(OTHER, Amounts.of(cpu=1), (1,))})
    journal.store_books(fewer)
    assert journal.load_books() == fewer
    journal.store_books(BOOKS)
    assert journal.load_books() == BOOKS
    journal.store_books(Books(9))
    assert journal.load_books() == Books(9)


def test_closing_without_books_keeps_them(journal):
    journal.store_books(BOOKS)
    journal.begin(TXN, {}, 1.0)
    journal.close(TXN, TransactionState.UNDONE, {"error": "x"}, None)
    assert journal.load_books() == BOOKS


def test_what_makes_no_sense_changes_nothing(journal):
    journal.begin(TXN, {}, 1.0)
    journal.extend(TXN, STEPS[:1])
    before = journal.transaction(TXN)
    gone = TransactionId("nope")
    for call in (
        lambda: journal.begin(TXN, {}, 2.0),
        lambda: journal.begin(gone, {"x": object()}, 2.0),
        lambda: journal.extend(gone, STEPS),
        lambda: journal.mark(gone, 0, StepState.APPLIED),
        lambda: journal.mark(TXN, 1, StepState.APPLIED),
        lambda: journal.mark(TXN, -1, StepState.APPLIED),
        lambda: journal.close(gone, TransactionState.UNDONE, {}, BOOKS),
        lambda: journal.close(TXN, TransactionState.OPEN, {}, BOOKS),
        lambda: journal.close(TXN, TransactionState.UNDONE, {"x": object()}, BOOKS),
    ):
        with pytest.raises(InvalidValueError):
            call()
    assert journal.open_transactions() == (before,)
    assert journal.transaction(gone) is None
    assert journal.load_books() == Books()


def test_ended_is_ended(journal):
    journal.begin(TXN, {}, 1.0)
    journal.extend(TXN, STEPS[:1])
    journal.close(TXN, TransactionState.COMMITTED, {}, None)
    for call in (
        lambda: journal.extend(TXN, STEPS),
        lambda: journal.mark(TXN, 0, StepState.UNDONE),
        lambda: journal.close(TXN, TransactionState.UNDONE, {}, None),
    ):
        with pytest.raises(InvalidValueError):
            call()


def test_threads_do_not_mix(journal):
    def work(number: int) -> None:
        for n in range(8):
            txn = TransactionId(f"{number}-{n}")
            journal.begin(txn, {}, 1.0)
            journal.extend(txn, STEPS[:2])
            journal.mark(txn, 1, StepState.APPLIED)
            books = Books(number, {GUEST: Holding(GUEST, Amounts.of(cpu=number * 100 + n))})
            journal.close(txn, TransactionState.COMMITTED, {"n": n}, books)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.open_transactions() == ()
    for number in range(4):
        for n in range(8):
            found = journal.transaction(TransactionId(f"{number}-{n}"))
            assert found.outcome == {"n": n}
            assert [s.state for s in found.steps] == [StepState.PLANNED, StepState.APPLIED]
    assert journal.load_books().holdings[GUEST].amounts.cpu % 100 == 7
