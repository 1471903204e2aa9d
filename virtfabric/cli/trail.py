"""Commands about what happened: explain, audit, drift, watch."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import clean, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, FAILED, ask, run_job
from virtfabric.cli.tables import audit_table, clock_text, drift_table, outcome_lines
from virtfabric.dbus.client import AgentClient
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.want import parse_duration

if TYPE_CHECKING:
    import argparse

    from virtfabric.dbus.client import Heard


_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]+)?")


def parse_since(text: str, now: float) -> float:
    """`10m` (ago), UNIX seconds, or a date and time as ISO 8601 has it (local without a zone).

    Raises:
        InvalidValueError: none of these.
    """
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError):
        pass
    try:
        return max(0.0, now - parse_duration(text, field="--since"))
    except InvalidValueError:
        raise InvalidValueError(
            "--since", text, "is not a time", advice="like 10m, 2026-01-31T12:00 or UNIX seconds"
        ) from None


def _explain(args: argparse.Namespace) -> int:
    story = ask(args, "Explain", args.id)
    if args.json:
        print_json(story)
    else:
        print_lines(story["lines"])
    return DONE


def _audit(args: argparse.Namespace) -> int:
    if args.head is not None and not args.verify:
        args.parser.error("--head goes with --verify")
    if args.verify:
        return _verify(args)
    since = parse_since(args.since, time.time()) if args.since else 0.0
    records = ask(args, "Audit", since, args.subject)
    if args.json:
        print_json(records)
    else:
        print_tables([audit_table(records)])
    return DONE


def _verify(args: argparse.Namespace) -> int:
    verdict = ask(args, "VerifyAudit", args.head or "")
    if args.json:
        print_json(verdict)
    elif verdict["whole"]:
        print_lines([f"the chain of {verdict['records']} records is whole", verdict["head"]])
    else:
        print_lines([f"the chain is broken: {verdict['problem']}"])
    return DONE if verdict["whole"] else FAILED


def _drift(args: argparse.Namespace) -> int:
    if args.repair:
        job = run_job(args, "RepairDrift")
        if args.json:
            print_json(job)
        else:
            print_lines(outcome_lines("repair", job["result"] or {}))
        return DONE
    differences = ask(args, "Drift")
    if args.json:
        print_json(differences)
    else:
        print_tables([drift_table(differences)])
    return DONE


def _happening(heard: Heard) -> dict[str, Any] | None:
    """An event for `watch`; None for signals that repeat another."""
    if heard.member == "Notice":
        return {"kind": heard.body[0], **json.loads(heard.body[1])}
    if heard.member == "Progress":
        job = heard.path.rpartition("/")[2]
        fraction, text = heard.body
        now = time.time()
        return {"kind": "job.progress", "at": now, "job": job, "fraction": fraction, "text": text}
    return None


def _happening_text(event: dict[str, Any]) -> str:
    rest = {k: v for k, v in event.items() if k not in ("kind", "at", "job", "text", "fraction")}
    parts = [clock_text(event.get("at")), event["kind"], str(event.get("job", ""))]
    if "fraction" in event:
        parts.append(f"{event['fraction']:.0%}")
    if event.get("text"):
        parts.append(str(event["text"]))
    if event["kind"] == "job.done":
        error = event.get("error") or {}
        parts.append(f"{event['state']} {error.get('detail', '')}".rstrip())
    elif rest:
        parts.append(json.dumps(rest))
    return clean("  ".join(p for p in parts if p))


def _watch(args: argparse.Namespace) -> int:
    try:
        with AgentClient.connected(args.bus) as client:
            for heard in client.signals():
                event = _happening(heard)
                if event is not None:
                    # one line an event, also as JSON, and at once: somebody is reading along
                    print(json.dumps(event) if args.json else _happening_text(event), flush=True)
    except KeyboardInterrupt:
        pass  # the way to end it
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register the commands."""
    text = "tell the story of a request, grant, loan, transaction or guest from the audit log"
    parser = subparsers.add_parser(
        "explain", help=text, description=text, example="virtfabric explain g-1f2e3d4c"
    )
    parser.add_argument(
        "id", help="of a request, grant, loan, transaction, or a job that is kept; or a guest"
    )
    parser.set_defaults(run=_explain)

    text = "list the audit log, or check that nothing in it was changed"
    parser = subparsers.add_parser(
        "audit", help=text, description=text, example="virtfabric audit --since 10m --subject db"
    )
    parser.add_argument("--since", metavar="T", help="10m (ago), 2026-01-31T12:00, UNIX seconds")
    parser.add_argument("--subject", default="", metavar="ID", help="only what is about this id")
    parser.add_argument("--verify", action="store_true", help="check the chain; 1 if it is broken")
    parser.add_argument("--head", metavar="H", help="a head from the system log it must contain")
    parser.set_defaults(run=_audit, parser=parser)

    text = "show what differs from what the agent set up, or mend it"
    parser = subparsers.add_parser(
        "drift", help=text, description=text, example="virtfabric drift --repair"
    )
    parser.add_argument("--repair", action="store_true", help="mend it")
    parser.set_defaults(run=_drift)

    text = "print events as they come; Ctrl-C ends it"
    parser = subparsers.add_parser(
        "watch", help=text, description=text, example="virtfabric watch --json"
    )
    parser.set_defaults(run=_watch)
