"""Documents of the API (docs/dbus-api.md) -> tables and lines; pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from virtfabric.cli.screen import Table
from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.units import Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Json = dict[str, Any]


def clock_text(at: float | None) -> str:
    """Local date and time; `-` for none."""
    if at is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def amounts_text(amounts: Mapping[str, int]) -> str:
    """`cpu 1.5, memory 64MiB`."""
    return str(Amounts.from_json(amounts))


def _cpu(value: int | None) -> str:
    return "-" if value is None else str(MilliCpu(value))


def _residue(residue: Json) -> str:
    if residue["what"].startswith("memory"):
        return f"{_memory(residue['amount'])} {Key.parse(residue['what']).words}"
    if residue["what"] == "device":
        return f"{residue['amount']} PCIe function(s)"
    return f"{MilliCpu(residue['amount'])} vCPU"


def _memory(value: int | None) -> str:
    return "-" if value is None else Bytes(value).rounded()


def _exact_memory(value: int | None) -> str:
    return "-" if value is None else str(Bytes(value))


def _entitlement(part: Json, *, memory: bool) -> str:
    show = _memory if memory else _cpu
    return " / ".join(show(part[k]) for k in ("reservation", "grant", "limit"))


def pcpu_map(host: Json, guests: list[Json]) -> Table:
    """Who is where: one row per node, role and guest."""
    groups: dict[tuple[int, str, str, str], list[Json]] = {}
    for cpu in host["cpus"]:
        kept_empty_for = cpu.get("isolated_by") or ""
        key = (cpu["node"], cpu["role"], cpu["guest"] or "", kept_empty_for)
        groups.setdefault(key, []).append(cpu)
    floating = ", ".join(
        g["name"] for g in guests if g["placement"] == "shared" and g["state"] != "shutoff"
    )
    rows = []
    for (node, role, guest, isolated), cpus in groups.items():
        who = floating if role == "pool" else ""
        if guest:
            vcpus = CpuSet(c["vcpu"] for c in cpus if c["vcpu"] is not None)
            who = f"{guest} (vCPU {vcpus})"
        elif isolated:
            who = f"kept empty for {isolated}"
        rows.append((str(node), str(CpuSet(c["cpu"] for c in cpus)), role, who))
    return Table("pCPUs", ("node", "pCPUs", "role", "who"), tuple(rows))


def cpu_table(host: Json) -> Table:
    """Every pCPU with its place in the machine."""
    rows = [
        (
            str(c["cpu"]), str(c["node"]), str(c["socket"]), str(c["core"]),
            str(CpuSet(c["siblings"])), c["role"], c["guest"] or "",
            "" if c["vcpu"] is None else str(c["vcpu"]),
        )
        for c in host["cpus"]
    ]  # fmt: skip
    columns = ("pCPU", "node", "socket", "core", "siblings", "role", "guest", "vCPU")
    return Table("pCPUs", columns, tuple(rows))


def memory_table(host: Json) -> Table:
    """Memory by node; the kind of each where the host has more than one."""
    names = ("total", "free", "grantable")
    tiered = any(m.get("tier", "dram") != "dram" for m in host["memory"])
    rows = [
        (
            str(m["node"]), *((m["tier"].upper(),) if tiered else ()),
            *(_memory(m[n]) for n in names), *((_offlinable(m),) if tiered else ()),
        )
        for m in host["memory"]
    ]  # fmt: skip
    columns = ("node", "tier", *names, "offlinable") if tiered else ("node", *names)
    return Table("memory", columns, tuple(rows), frozenset(names))


def _offlinable(part: Json) -> str:
    return _yes(part, "offlinable")


def _yes(part: Json, word: str) -> str:
    return "yes" if part[word] else f"no: {part[f'why_not_{word}'] or 'not told'}"


def held_memory_table(guests: list[Json]) -> Table | None:
    """What can be taken back of each guest's memory; None where all of it is DRAM."""
    parts = [(g["name"], part) for g in guests for part in g["memory"].get("parts", ())]
    if all(part["tier"] == "dram" for _, part in parts):
        return None
    rows = [
        (
            name, part["what"], part["tier"].upper(), str(CpuSet(part["nodes"])) or "any",
            _memory(part["size"]), _yes(part, "reclaimable"), _yes(part, "offlinable"),
        )
        for name, part in parts
    ]  # fmt: skip
    columns = ("guest", "what", "tier", "node", "size", "reclaimable", "offlinable")
    return Table("memory of guests", columns, tuple(rows), frozenset({"size"}))


def capacity_lines(host: Json) -> list[str]:
    """What the agent may grant, and what of it is free."""
    capacity, free = host["capacity"], host["free"]
    lines = [
        f"capacity: CPU {_cpu(capacity['cpu_milli'])}, {_cpu(free['cpu'])} free; memory "
        f"{_memory(capacity['memory'])}, {_memory(free['memory'])} free "
        f"(reserve {_memory(capacity['reserve'])})",
        f"shared pool: {host['pool'] or 'none'}; housekeeping: {host['housekeeping'] or 'none'}",
    ]
    if capacity.get("cxl"):
        lines.insert(1, f"CXL memory: {_memory(capacity['cxl'])}, {_memory(free['cxl'])} free")
    for number, why in host.get("withheld", {}).items():
        lines.append(f"node {number}: nothing of it is granted: {why}")
    if host["unmanaged"]:
        lines.append(f"unmanaged guests running: {', '.join(host['unmanaged'])}")
    return lines


def _far_remarks(far: Json | None) -> list[str]:
    if far is None or not (far["grant"] or far["current"]):
        return []
    granted = "" if far["grant"] is None else f" of {_memory(far['grant'])} granted"
    return [f"CXL memory {_memory(far['current'])}{granted}"]


def _remarks(guest: Json) -> str:
    found = []
    if guest["policy_error"]:
        found.append(f"invalid policy: {guest['policy_error']}")
    elif not guest["managed"]:
        found.append("unmanaged")
    if guest["busy"]:
        found.append("changing")
    if guest["job"]:
        found.append(f"busy: {guest['job']}")
    found += _far_remarks(guest["memory"].get("cxl"))
    found += [f"still holds {_residue(r)}" for r in guest["residues"]]
    for device in guest.get("devices", ()):
        if not device["attached"]:
            found.append(f"{device['address']} is reserved, not attached")
        elif not device["ours"]:
            found.append(f"{device['address']} was attached by somebody else")
    return "; ".join(found)


def _functions(devices: Iterable[Json]) -> str:
    """`net.vf 0000:3b:10.1, 0000:3b:10.2`."""
    by_capability: dict[str, list[str]] = {}
    for device in devices:
        by_capability.setdefault(device["capability"] or "by hand", []).append(device["address"])
    return "; ".join(f"{c} {', '.join(a)}" for c, a in by_capability.items()) or "-"


def guest_table(guests: list[Json]) -> Table:
    """Guests with reservation / grant / limit."""
    rows = [
        (
            g["name"], g["state"], "-" if g["priority"] is None else str(g["priority"]),
            g["placement"] or "-", _entitlement(g["cpu"], memory=False),
            f"{g['cpu']['vcpus_online']}/{g['cpu']['vcpus_max']}", g["cpus"] or "-",
            _entitlement(g["memory"], memory=True), _memory(g["memory"]["current"]),
            _functions(g.get("devices", ())), _remarks(g),
        )
        for g in guests
    ]  # fmt: skip
    columns = (
        "guest", "state", "prio", "placement", "CPU res/grant/limit", "vCPUs", "pCPUs",
        "memory res/grant/limit", "current", "devices", "remarks",
    )  # fmt: skip
    return Table("guests", columns, tuple(rows), frozenset({"prio", "vCPUs", "current"}))


def grant_table(grants: list[Json]) -> Table:
    """Open grants."""
    rows = [
        (g["id"], g["name"], amounts_text(g["amounts"]), clock_text(g["since"]),
         clock_text(g["expires"]), g["request"])
        for g in grants
    ]  # fmt: skip
    columns = ("grant", "guest", "amounts", "since", "until", "request")
    return Table("grants", columns, tuple(rows))


def loan_table(loans: list[Json]) -> Table:
    """Open loans."""
    rows = [
        (loan["id"], loan["victim_name"], loan["borrower_name"], amounts_text(loan["amounts"]),
         clock_text(loan["since"]), loan["grant"])
        for loan in loans
    ]  # fmt: skip
    return Table("loans", ("loan", "from", "to", "amounts", "since", "grant"), tuple(rows))


def job_table(jobs: list[Json]) -> Table:
    """Running and recent jobs."""
    rows = [
        (j["id"], j["state"], f"{j['fraction']:.0%}", j.get("title", ""),
         (j["error"] or {}).get("detail") or j["text"])
        for j in jobs
    ]  # fmt: skip
    columns = ("job", "state", "done", "title", "text")
    return Table("jobs", columns, tuple(rows), frozenset({"done"}))


def drift_table(differences: list[Json]) -> Table:
    """Intended against found."""
    rows = [
        (d["name"], d["what"], str(d["intended"]), str(d["found"]), d["policy"])
        for d in differences
    ]
    columns = ("guest", "what", "intended", "found", "policy")
    return Table("drift", columns, tuple(rows), empty="none, everything is as intended")


def audit_table(records: list[Json]) -> Table:
    """Audit records."""
    rows = [
        (str(r["sequence"]), clock_text(r["at"]), r["kind"], " ".join(r["subjects"]))
        for r in records
    ]
    return Table("audit", ("#", "at", "kind", "subjects"), tuple(rows), frozenset({"#"}))


def policy_lines(shown: Json) -> list[str]:
    """A guest's policy."""
    policy = shown["policy"]
    if shown["policy_error"]:
        return [f"{shown['name']}: invalid policy: {shown['policy_error']}", shown["xml"]]
    if policy is None:
        return [f"{shown['name']}: unmanaged (no policy)"]
    cpu, memory = policy["cpu"], policy["memory"]
    lines = [
        f"{shown['name']}: priority {policy['priority']}, admission {policy['admission']}, "
        f"drift {policy['drift']}",
        f"  cpu     reservation {_cpu(cpu['reservation'])}, limit {_cpu(cpu['limit'])}, shares "
        f"{cpu['shares']}, {cpu['placement']}, smt {cpu['smt']}",
        f"  memory  reservation {_exact_memory(memory['reservation'])}, limit "
        f"{_exact_memory(memory['limit'])}, shares {memory['shares']}, "
        f"tiers {','.join(memory['tiers'])}, escalate {memory['escalate']}, "
        f"growth {memory['growth']}",
    ]
    return lines + [
        f"  device  {d['capability']} x {d['count']}"
        + (", reclaimable" if d["reclaimable"] else "")
        for d in policy["devices"]
    ]


def _named(entries: list[Json], verb: str) -> list[str]:
    return [f"  {e['name']} {verb} {amounts_text(e['amounts'])}" for e in entries]


def outcome_lines(subject: str, result: Json) -> list[str]:
    """What a job changed and who paid."""
    lines = []
    if "delta" in result:
        lines.append(f"{subject}: {amounts_text(result['delta'])}")
    else:
        lines.append(f"{subject}: done")
    if result.get("grant"):
        lines.append(f"  grant {result['grant']}")
    if result.get("decided_by"):
        lines.append(f"  decided by {result['decided_by']}")
    lines += _named(result.get("paid") or [], "paid")
    lines += _named(result.get("returned") or [], "got back")
    lines += [f"  step: {s}" for s in result.get("steps") or []]
    lines += [f"  considered: {c}" for c in result.get("considered") or []]
    lines += [
        f"  residue: {r.get('name', r['guest'])} has {_residue(r)} {r.get('detail', '')}".rstrip()
        for r in result.get("residues") or []
    ]
    if "took_s" in result:
        agent = result.get("agent_s", 0.0)
        lines.append(f"  took {result['took_s']:.2f} s, {agent:.3f} s of it the agent's own")
    return lines


def _blast_lines(device: Json) -> list[str]:
    """Who would notice that a function changes hands: what each shares with it."""
    lines = [f"  {device['name']} would get {device['address']} ({device['capability']})"]
    for other in device["shares"]:
        who = other["holder"] or "; ".join(other["uses"]) or other["driver"] or "no driver"
        lines.append(f"    shares the {other['what']} with {other['address']} ({who})")
    return lines if device["shares"] else [*lines, "    shares nothing with any other function"]


def plan_lines(subject: str, plan: Json) -> list[str]:
    """What `--dry-run` prints: decision, and exactly the steps."""
    decision = plan["decision"]
    names = {c["guest"]: c["name"] for c in decision["considered"]}
    lines = [f"{subject}: {amounts_text(decision['delta'])} (dry run, nothing changed)"]
    if decision.get("by"):
        lines.append(f"  decided by {decision['by']}")
    if decision["from_free"]:
        lines.append(f"  from free capacity: {amounts_text(decision['from_free'])}")
    lines += [
        f"  {names.get(t['victim'], t['victim'])} would pay {amounts_text(t['amounts'])}"
        for t in decision["takes"]
    ]
    lines += [
        f"  {names.get(r['victim'], r['victim'])} would get back {amounts_text(r['amounts'])}"
        for r in decision["returns"]
    ]
    for reclaim in decision.get("reclaim", ()):
        lines += [f"  would ask {part['text']}" for part in reclaim["parts"]]
        lines += [f"  {note}" for note in reclaim["notes"]]
    lines += [
        f"  considered: {c['name']} (priority {c['priority']}): "
        f"{Key.parse(c['resource']).words}: {c['verdict']}"
        for c in decision["considered"]
    ]
    lines += [f"  offer: {o['text']}" for o in plan["offers"] if o.get("text")]
    for device in plan.get("devices") or ():
        lines += _blast_lines(device)
    lines.append(f"  steps at generation {plan['generation']}:")
    return lines + [f"  {n}. {s['text']}" for n, s in enumerate(plan["steps"], 1)]
