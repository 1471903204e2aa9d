"""`explain`: the story of a request, told from the audit records alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import Amounts, Key, format_amount
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.ports import AuditRecord


def _amounts(data: Mapping[str, int] | None) -> str:
    return str(Amounts.from_json(data or {}))


def _amount(consideration: Mapping[str, Any], field: str) -> str:
    return format_amount(Key.parse(consideration["resource"]), consideration[field])


def _names(decision: Mapping[str, Any]) -> dict[str, str]:
    return {c["guest"]: c["name"] for c in decision.get("considered", [])}


def _decision_lines(decision: Mapping[str, Any], names: Mapping[str, str]) -> Iterable[str]:
    free = _amounts(decision["from_free"])
    by = f" by {decision['by']}" if decision.get("by") else ""
    yield f"  decided{by}: {_amounts(decision['delta'])}; from free capacity {free}"
    for take in decision["takes"]:
        who = names.get(take["victim"], take["victim"])
        yield f"  {who} pays {_amounts(take['amounts'])}"
    for back in decision["returns"]:
        who = names.get(back["victim"], back["victim"])
        yield f"  loan {back['loan']}: {_amounts(back['amounts'])} goes home to {who}"
    for plan in decision.get("reclaim", ()):
        yield from _reclaim_lines(plan)
    for one in decision["considered"]:
        yield (
            f"  considered {one['name']} for {Key.parse(one['resource']).words}: {one['verdict']} "
            f"(priority {one['priority']}, held {_amount(one, 'held')}, "
            f"floor {_amount(one, 'floor')})"
        )


def _reclaim_lines(plan: Mapping[str, Any]) -> Iterable[str]:
    where = "" if plan["node"] is None else f" of node {plan['node']}"
    what = f"{Key.parse(plan['resource']).words}{where}"
    yield f"  calling home {Bytes(plan['asked'])} of {what}"
    for part in plan["parts"]:
        yield f"    asks {part['text']}"
    for note in plan["notes"]:
        yield f"    {note}"
    if plan["short"]:
        yield f"    {Bytes(plan['short'])} of it are not to be had"


def _replanned(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body.get('title')}: decided anew with what was given"
    if body.get("decision"):
        names = _names(body["decision"]) | body.get("names", {})
        yield from _decision_lines(body["decision"], names)
    for step in body.get("steps", []):
        yield f"  step: {step}"


def _begun(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body.get('title')}: plan of {len(body.get('steps', []))} steps ({body.get('txn')})"
    if body.get("decision"):
        names = _names(body["decision"]) | body.get("names", {})
        yield from _decision_lines(body["decision"], names)
    for offer in body.get("offers", []):
        chosen = " (chosen)" if offer["chosen"] else ""
        place = f" pCPU {offer['order']}" if offer["order"] else ""
        yield f"  offer{place}: {offer['why']}{chosen}"
    for step in body.get("steps", []):
        yield f"  step: {step}"


def _committed(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body.get('title')}: done and verified in {body.get('took_s')} s"
    if body.get("grant"):
        grant = body["grant"]
        yield f"  grant {grant['id']}: {_amounts(grant['amounts'])}"
    for loan in body.get("loans", []):
        yield f"  loan opened: {loan}"
    for one in body.get("reclaimed", []):
        yield f"  {one['text']}"
    for text in body.get("skipped", []):
        yield f"  left undone: {text}"
    for residue in body.get("residues", []):
        yield f"  residue: {_what(residue)} {_residue(residue)} ({residue['detail']})"
    for name, parts in body.get("memory", {}).items():
        for part in parts:
            yield f"  {name} has {part}"


def _what(residue: Mapping[str, Any]) -> str:
    return Key.parse(residue["what"]).words


def _residue(residue: Mapping[str, Any]) -> str:
    match residue["what"]:
        case "memory" | "memory@tier:cxl":
            return str(Bytes(residue["amount"]))
        case "vcpu":
            return str(residue["amount"] // 1000)
        case _:
            return str(residue["amount"])


def _called_home(body: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"{body['title']} by {body['by']}: {Bytes(body['freed'])} of {Bytes(body['asked'])} came, "
        f"{Bytes(body['out'])} still out"
    )
    for one in body["guests"]:
        yield f"  {one['text']}"
    for one in body["detached"]:
        yield f"  {one['name']}: {one['alias']} is detached"
    for text in body["kept"]:
        yield f"  left undone: {text}"
    for text in body["others"]:
        yield f"  {text}"


def _refused(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body.get('title')}: refused, {body.get('reason')}: {body.get('detail')}"
    for line in body.get("considered", []):
        yield f"  considered {line}"


def _rejected(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['card']} decided, and it was rejected: {body['why']}"


def _undone(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body.get('title')}: undone, because {body.get('why')}"
    for line in body.get("undone", []):
        yield f"  undone: {line}"
    for line in body.get("not_undone", []):
        yield f"  could not undo yet: {line}"


def _lost(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['name']} lost {body['address']} ({body['capability']}): {body['why']}"


def _quarantined(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['address']} went to quarantine: {body['why']}"


def _freed(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['address']} left quarantine, where it was because {body['why']}"


def _device_released(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['by']} let {body['address']} out of quarantine"


def _memory_quarantined(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['subject']} went to quarantine: {body['text']}"


def _memory_released(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['by']} let {body['subject']} out of quarantine, where it was: {body['why']}"


def _halted(body: Mapping[str, Any]) -> Iterable[str]:
    yield f"{body['name']} was stopped by an error while it had {body['functions']}"


def _returned(body: Mapping[str, Any]) -> Iterable[str]:
    was, now = body["was"], body["now"]
    yield f"{body['name']} let go late: {_what(was)} {_residue(was)} -> {_residue(now)}"


_TELLERS = {
    "plan.begun": _begun,
    "plan.replanned": _replanned,
    "plan.committed": _committed,
    "memory.called-home": _called_home,
    "request.refused": _refused,
    "decision.rejected": _rejected,
    "plan.undone": _undone,
    "plan.recovered": _undone,
    "residue.returned": _returned,
    "device.lost": _lost,
    "device.quarantined": _quarantined,
    "device.freed": _freed,
    "device.released": _device_released,
    "device.guest-halted": _halted,
    "memory.quarantined": _memory_quarantined,
    "memory.released": _memory_released,
}


def _plain(record: AuditRecord) -> Iterable[str]:
    words = ", ".join(f"{k} {v}" for k, v in record.body.items() if v not in (None, "", [], {}))
    yield f"{record.kind}: {words}"


def tell(records: Iterable[AuditRecord]) -> list[str]:
    """One or more lines per record, each event headed by its time (UTC)."""
    lines: list[str] = []
    for record in records:
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        teller = _TELLERS.get(record.kind)
        told = list(teller(record.body) if teller else _plain(record))
        lines += [f"{at}  {told[0]}", *(f"{'':21}{line}" for line in told[1:])]
    return lines
