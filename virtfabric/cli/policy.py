"""`policy show|set|clear`: what a guest's owner wants for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.arguments import checked
from virtfabric.cli.screen import print_json, print_lines
from virtfabric.cli.session import DONE, ask, await_job
from virtfabric.cli.tables import outcome_lines, plan_lines, policy_lines
from virtfabric.daemon.intake import parse_policy_changes, parse_wish
from virtfabric.model.policy import Admission, DriftAction, Escalation, Growth, Placement, Smt
from virtfabric.model.want import DEVICE

if TYPE_CHECKING:
    import argparse

    Json = dict[str, Any]

_FIELDS = (
    "priority", "cpu", "memory", "tiers", "escalate", "growth", "shares", "placement", "smt",
    "admission",
    "drift",
)  # fmt: skip


def _wish(text: str) -> tuple[str, str]:
    """`net.vf`, `net.vf:2`, `net.vf:2:reclaimable`, `net.vf:0`: key and value of a change.

    A capability alone asks for one.
    """
    capability, _, wish = text.partition(":")
    key, value = f"{DEVICE}{capability}", wish if ":" in text else "1"
    parse_wish(key, value, None)
    return key, value


DEVICE_WISH: Final = checked(_wish)


def _show(args: argparse.Namespace) -> int:
    shown = ask(args, "ShowPolicy", args.guest)
    if args.json:
        print_json(shown)
    else:
        print_lines(policy_lines(shown))
    return DONE


def _set(args: argparse.Namespace) -> int:
    changes = {f: getattr(args, f) for f in _FIELDS if getattr(args, f) is not None}
    wishes = args.device or ()
    if not changes and not wishes:
        options = ", ".join(f"--{f}" for f in (*_FIELDS, "device"))
        args.parser.error(f"give at least one of {options}")
    if len(dict(wishes)) < len(wishes):
        args.parser.error("one --device for each capability: net.vf:2, not net.vf twice")
    changes |= dict(wishes)
    parse_policy_changes(None, changes)  # what is malformed is found before anything is sent
    if args.dry_run:
        return _tell_plan(args, ask(args, "PlanPolicy", args.guest, changes))
    return _finish(args, ask(args, "SetPolicy", args.guest, changes))


def _tell_plan(args: argparse.Namespace, answer: Json) -> int:
    if args.json:
        print_json(answer)
        return DONE
    print_lines(policy_lines(answer))
    print_lines([f"note: {text}" for text in answer["notes"]])
    if answer["plan"] is None:
        print_lines([f"{answer['name']} does not run: its metadata alone would be written"])
    else:
        print_lines(plan_lines(answer["name"], answer["plan"]))
    return DONE


def _clear(args: argparse.Namespace) -> int:
    return _finish(args, ask(args, "ClearPolicy", args.guest))


def _finish(args: argparse.Namespace, answer: Json) -> int:
    """See the re-placement of a running guest through."""
    job = await_job(args, answer["job"]) if answer.get("job") else None
    if args.json:
        print_json(answer | {"result": job["result"] if job else None})
        return DONE
    print_lines(policy_lines(answer))
    print_lines([f"note: {text}" for text in answer.get("notes", ())])
    if job and job["result"]:
        print_lines(outcome_lines("placement", job["result"]))
    return DONE


def _add_set(actions: Any) -> None:
    parser = actions.add_parser(
        "set",
        help="change fields; what is not named stays",
        description="Change a guest's policy; a running guest follows at once.",
        example="virtfabric policy set db --priority 90 --cpu 1:4 --memory 512M:4G "
        "--device net.vf:2:reclaimable",
    )
    parser.add_argument("guest", help="name or UUID")
    parser.add_argument("--priority", metavar="N", help="0 to 100; a higher one may reclaim")
    parser.add_argument("--cpu", metavar="RES:LIMIT", help="in CPUs, like 1:4 or 500m:2")
    parser.add_argument("--memory", metavar="RES:LIMIT", help="like 512M:4G")
    parser.add_argument("--tiers", metavar="TIERS", help="kinds of memory it may have: dram,cxl")
    parser.add_argument("--shares", metavar="N", help="share of what is contended, 100 is normal")
    parser.add_argument(
        "--device", type=DEVICE_WISH, action="append", metavar="CAP[:N][:reclaimable|:kept]",
        help="PCIe functions: net.vf (one), net.vf:2, net.vf:reclaimable (a higher priority may "
        "take them), net.vf:kept, net.vf:0 (no more); may be repeated",
    )  # fmt: skip
    for name, kind, text in (
        ("growth", Growth, "what is plugged for memory of another node: a DIMM stays for good"),
        ("placement", Placement, "pCPUs of its own, or the shared pool"),
        ("smt", Smt, "what a dedicated guest wants of SMT siblings"),
        ("admission", Admission, "whether it may start while the agent is away"),
        ("drift", DriftAction, "what happens to changes made beside the agent"),
        ("escalate", Escalation, "whether it gives memory that it says it cannot spare"),
    ):
        parser.add_argument(f"--{name}", choices=[k.value for k in kind], help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    parser.set_defaults(run=_set, parser=parser)


def add_parsers(subparsers: Any) -> None:
    """Register the command."""
    text = "show or change what a guest is entitled to"
    parser = subparsers.add_parser(
        "policy", help=text, description=text, example="virtfabric policy show db"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|set|clear")
    for name, run, about in (
        ("show", _show, "show a guest's policy"),
        ("clear", _clear, "make a guest unmanaged; its pins and caps are lifted"),
    ):
        action = actions.add_parser(
            name, help=about, description=about, example=f"virtfabric policy {name} db"
        )
        action.add_argument("guest", help="name or UUID")
        action.set_defaults(run=run)
    _add_set(actions)
