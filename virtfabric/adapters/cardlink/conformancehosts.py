"""The checks of *carded* mode in the conformance suite: small hosts, and decisions about them.

Every decision is held to `policy.proposals`, as the agent does. A card without an arbiter skips
them all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.cardlink.conformance import Check, SkippedCheckError, answered
from virtfabric.adapters.cardlink.visitor import expect
from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Course, Proposal
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, VirtioMem
from virtfabric.model.host import Capacity, HostTopology, NumaNode, Pcpu
from virtfabric.model.ids import GuestId, HostId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu
from virtfabric.model.want import Mode, Want
from virtfabric.policy.proposals import check_proposal
from virtfabric.protocol import messages as m
from virtfabric.protocol.hostpicture import split_picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.cardlink.conformance import Bench
    from virtfabric.adapters.cardlink.visitor import Visitor

HOST_CHECKS: Final[list[Check]] = []
_LOW, _HIGH = (GuestId(f"00000000-0000-4000-8000-00000000000{n}") for n in "12")
_CPUS: Final = 4
_RESERVED: Final = MilliCpu(1000)


def _check(name: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        HOST_CHECKS.append(Check("carded", name, run))
        return run

    return register


def _host(low: int, high: int, *, priority: int = 90) -> HostSnapshot:
    """Four CPUs, 8 GiB and two guests with this many thousandths of a CPU and 1 GiB each."""
    cpus = CpuSet(range(_CPUS))
    node = NumaNode(0, cpus, Bytes(8 * GIB), Bytes(0))
    topology = HostTopology(
        HostId("conformance"), {0: node}, {n: Pcpu(n, 0, 0, n, CpuSet((n,))) for n in cpus}
    )
    guests = {_LOW: _guest(_LOW, "low", 10), _HIGH: _guest(_HIGH, "high", priority)}
    holdings = {
        guest: Holding(guest, Amounts.of(cpu=cpu, memory=GIB))
        for guest, cpu in ((_LOW, low), (_HIGH, high))
    }
    capacity = Capacity(cpus, CpuSet((0,)), {0: Bytes(8 * GIB)}, Bytes(0), Bytes(0))
    return HostSnapshot(1, topology, capacity, guests, Books(1, holdings))


def _guest(uuid: GuestId, name: str, priority: int) -> GuestState:
    device = VirtioMem("m", 0, Bytes(4 * GIB), Bytes(2 * MIB), Bytes(GIB // 2), Bytes(GIB // 2))
    return GuestState(
        uuid, name, RunState.RUNNING, vcpus_max=8, boot_memory=Bytes(GIB // 2),
        memory_current=Bytes(GIB), memory_max=Bytes(4 * GIB + GIB // 2),
        mechanism=MemoryMechanism.VIRTIO_MEM, virtio_mem=(device,),
        policy=GuestPolicy(priority, cpu=CpuPolicy(_RESERVED), memory=MemoryPolicy()),
    )  # fmt: skip


def _show(visitor: Visitor, host: HostSnapshot) -> str:
    """Its name; skips where the card decides for nobody."""
    parts = split_picture(host)
    for part in parts:
        answer = visitor.ask(part)
        if isinstance(answer, m.Error) and answer.reason == Reason.NOT_ALLOWED:
            raise SkippedCheckError("it has no arbiter")
        answered(answer, m.Done)
    return parts[0].picture


def _ask(visitor: Visitor, picture: str, cpu: Want, **more: Any) -> m.HostDecision | m.HostRefusal:
    asked = m.HostRequest(
        picture, "conformance-1", _HIGH, cpu, None, None, partial=False, **{"caps": {}} | more
    )
    answer = visitor.ask(asked)
    if not isinstance(answer, m.HostRefusal):
        answer = answered(answer, m.HostDecision)
    said = (answer.picture, answer.request)
    expect(said == (picture, "conformance-1"), f"answered about {said}")
    return answer


def _decided(visitor: Visitor, host: HostSnapshot, cpu: Want) -> m.HostDecision:
    """What it decides, which has to be such as may be done."""
    answer = _ask(visitor, _show(visitor, host), cpu)
    if isinstance(answer, m.HostRefusal):
        expect(False, f"refused what fits: {answer.reason}: {answer.detail}")  # noqa: FBT003
        raise AssertionError("unreachable")
    request = Request(RequestId(answer.request), _HIGH, AGENT, Origin.CARD, cpu=cpu)
    found = check_proposal(host, request, Proposal("it", answer.delta, answer.takes))
    if isinstance(found, Refusal):
        expect(False, f"decided what cannot be: {found.detail}")  # noqa: FBT003
    return answer


def _more(milli: int) -> Want:
    return Want(Mode.BY, milli)


@_check("decides on free capacity")
def _free(bench: Bench) -> None:
    with bench.meet() as visitor:
        _decided(visitor, _host(1000, 1000), _more(1500))


@_check("takes from a lower priority, above its reservation")
def _takes(bench: Bench) -> None:
    with bench.meet() as visitor:
        decision = _decided(visitor, _host(3000, 1000), _more(2000))
        paid = {take.victim: take.amounts.cpu for take in decision.takes}
        expect(paid == {_LOW: 2000}, f"has {paid} pay")


@_check("takes nothing from an equal priority, nor below a reservation")
def _spares(bench: Bench) -> None:
    with bench.meet() as visitor:
        for host, cpu in (
            (_host(3000, 1000, priority=10), _more(1000)), (_host(3000, 1000), _more(2500)),
        ):  # fmt: skip
            answer = _ask(visitor, _show(visitor, host), cpu)
            expect(isinstance(answer, m.HostRefusal), "granted what nobody may pay")
            assert isinstance(answer, m.HostRefusal)
            expect(answer.reason == Reason.NO_CAPACITY, f"refused it as {answer.reason}")


@_check("has a busy guest pay nothing")
def _busy(bench: Bench) -> None:
    with bench.meet() as visitor:
        host = replace(_host(3000, 1000), busy=frozenset((_LOW,)))
        answer = _ask(visitor, _show(visitor, host), _more(1000))
        expect(isinstance(answer, m.HostRefusal), "took from a busy guest")


@_check("takes no more than a guest can spare")
def _caps(bench: Bench) -> None:
    with bench.meet() as visitor:
        picture = _show(visitor, _host(3000, 1000))
        answer = _ask(visitor, picture, _more(1000), caps={_LOW: Amounts.of(cpu=400)})
        expect(isinstance(answer, m.HostRefusal), "took more than it can spare")


@_check("refuses a request about another picture as stale")
def _stale(bench: Bench) -> None:
    with bench.meet() as visitor:
        _show(visitor, _host(1000, 1000))
        asked = m.HostRequest(
            "another", "conformance-1", _HIGH, _more(1), None, None, partial=False, caps={}
        )
        answer = answered(visitor.ask(asked), m.Error)
        expect(answer.reason == Reason.STALE, f"refused it as {answer.reason or answer.code}")


@_check("refuses a part of a picture out of its turn, and takes the whole one afterwards")
def _turn(bench: Bench) -> None:
    with bench.meet() as visitor:
        host = _host(1000, 1000)
        _show(visitor, host)
        (part,) = split_picture(host)
        late = replace(part, picture="late", part=1, parts=3, host=None)
        answer = answered(visitor.ask(late), m.Error)
        expect(answer.code == m.ErrorCode.REFUSED, f"answered {answer.code}")
        _decided(visitor, host, _more(1000))


@_check("hears what became of a decision")
def _outcome(bench: Bench) -> None:
    with bench.meet() as visitor:
        decision = _decided(visitor, _host(1000, 1000), _more(1000))
        for course in Course:
            answered(visitor.ask(m.HostOutcome(decision.request, course, "")), m.Done)
