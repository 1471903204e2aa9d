"""`virtfabric lab`: nested labs, from image to fault. Local: it needs no agent."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.labsession import Teller, load_labs, told
from virtfabric.cli.screen import Table, note, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, FAILED
from virtfabric.model.errors import InvalidValueError, VirtfabricError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from virtfabric.shim.lab.faults import Fault
    from virtfabric.shim.lab.lab import Status
    from virtfabric.shim.lab.place import Place
    from virtfabric.shim.topology.model import Topology

_DEFAULT: Final = "small"


def _read_topology(text: str) -> tuple[str, Topology]:
    """A shipped topology's name, or the path of a file: its title, and the topology.

    Raises:
        InvalidValueError: there is none, or it is wrong; names the path in the JSON.
    """
    shipped = import_module("virtfabric.shim.topology.shipped")
    found: tuple[str, Topology] = shipped.read_topology(text)
    return found


def _build(args: argparse.Namespace) -> int:
    load_labs()
    tell = Teller()
    image = import_module("virtfabric.shim.lab.image")
    guest = import_module("virtfabric.shim.guestimage")
    outer = import_module("virtfabric.shim.lab.outer")
    needs = import_module("virtfabric.shim.topology.needs").device_needs
    built = image.ensure_lab_image(tell, again=args.again)
    guest.ensure_guest_image(report=tell)
    if args.topology:
        outer.choose_outer(needs(_read_topology(args.topology)[1]), tell, again=args.again)
    if args.json:
        print_json({"disk": str(built.disk), "kernel": str(built.kernel)})
    else:
        print(f"lab image: {built.disk.parent}")
    return DONE


def _up(args: argparse.Namespace) -> int:
    labs = load_labs()
    title, topology = _read_topology(args.topology)
    status = labs.up(
        topology,
        name=args.name or title,
        title=title,
        report=Teller(),
        boot_s=args.timeout,
        keep=args.keep,
    )
    if args.json:
        print_json(_to_json(status))
    else:
        print(f"lab {status.name} is ready: virtfabric lab shell {status.name}")
    return DONE


def _down(args: argparse.Namespace) -> int:
    labs = load_labs()
    if args.all:
        return _down_all(labs, as_json=args.json)
    gone = [args.lab] if labs.down(args.lab) else []
    if args.json:
        print_json({"down": gone})
    else:
        print_lines([f"lab {name} is down" for name in gone] or ["there was no such lab"])
    return DONE


def _down_all(labs: Any, *, as_json: bool) -> int:
    """One that cannot be ended keeps no other up."""
    gone: list[str] = []
    failed: dict[str, str] = {}
    for name in [lab.name for lab in labs.read_labs()]:
        try:
            labs.down(name)
        except (VirtfabricError, OSError) as error:
            failed[name] = str(error)
        else:
            gone.append(name)
    for why in failed.values():
        note(f"virtfabric: {why}")
    if as_json:
        print_json({"down": gone, "failed": failed})
    elif gone or not failed:
        print_lines([f"lab {name} is down" for name in gone] or ["there was no lab"])
    return FAILED if failed else DONE


def _list(args: argparse.Namespace) -> int:
    found = load_labs().read_labs()
    shipped = import_module("virtfabric.shim.topology.shipped")
    topologies = {
        name: shipped.read_shipped_topology(name) for name in shipped.shipped_topologies()
    }
    if args.json:
        told = {name: topology.description for name, topology in topologies.items()}
        print_json({"labs": [_to_json(lab) for lab in found], "topologies": told})
        return DONE
    rows = tuple(
        (lab.name, lab.record.topology if lab.record else "?", str(lab.state), str(lab.pid or ""))
        for lab in found
    )
    shapes = tuple((name, topology.description) for name, topology in topologies.items())
    print_tables(
        [
            Table("labs", ("lab", "topology", "state", "pid"), rows, frozenset({"pid"})),
            Table("topologies", ("topology", "what it is"), shapes),
        ]
    )
    return DONE


def _find_place(name: str) -> Place:
    """The place of a lab that exists, if only what is left of it.

    Raises:
        InvalidValueError: there is none.
    """
    place: Place = import_module("virtfabric.shim.lab.place").place_of(name)
    if not place.directory.exists():
        raise InvalidValueError("lab", name, "does not exist", advice="virtfabric lab list")
    return place


def _status(args: argparse.Namespace) -> int:
    labs = load_labs()
    place = _find_place(args.lab)
    status = labs.read_status(place)
    faults = labs.find_faults(status) if args.probe else None
    if args.json:
        print_json(_to_json(status) | ({} if faults is None else {"faults": faults}))
        return DONE
    lines = [f"lab {status.name}: {status.state}", f"directory: {place.directory}"]
    if status.record:
        lines += [
            f"topology: {status.record.topology}",
            f"carried by: {status.record.qemu}, {status.record.accel}, pid {status.pid}",
            f"ssh: 127.0.0.1 port {status.record.port}",
        ]
    lines += ["boot:", *(f"  {line}" for line in status.told)]
    if status.last_words:
        lines += ["its QEMU said last:", *(f"  {line}" for line in status.last_words)]
    if faults is not None:
        lines += ["the emulator:", *(f"  {line}" for line in faults or ["nothing hangs"])]
    if faults:
        lines.append(f"way out: virtfabric lab down {status.name}, and up (docs/lab.md says why)")
    print_lines(lines)
    return DONE


def _to_json(status: Status) -> dict[str, Any]:
    record = status.record
    return {
        "name": status.name, "state": status.state, "pid": status.pid, "told": list(status.told),
        "topology": record.topology if record else None, "port": record.port if record else None,
        "qemu": record.qemu if record else None, "accel": record.accel if record else None,
        "last_words": list(status.last_words),
    }  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    remote = load_labs().connect(args.lab)
    if not args.json:
        argv = remote.format_argv(["/bin/bash", "-c", " ".join(args.command)])
        return subprocess.run(argv, check=False).returncode
    done = remote.run(" ".join(args.command))
    print_json({"exit": done.returncode, "stdout": done.stdout, "stderr": done.stderr})
    return int(done.returncode)


def _shell(args: argparse.Namespace) -> int:
    return subprocess.run(
        load_labs().connect(args.lab).format_argv([], terminal=True), check=False
    ).returncode


def _copy(args: argparse.Namespace) -> int:
    if args.source.startswith(":") == args.target.startswith(":"):
        raise InvalidValueError(
            "copy", f"{args.source} {args.target}", "needs one path in the lab (:/path)"
        )  # fmt: skip
    argv = load_labs().connect(args.lab).format_copy(args.source, args.target)
    return DONE if subprocess.run(argv, check=False).returncode == 0 else FAILED


def _qmp(args: argparse.Namespace) -> int:
    load_labs()
    monitor = import_module("virtfabric.shim.lab.monitor")
    place = _find_place(args.lab)
    if args.hmp:
        print(monitor.execute_human(place, args.command).rstrip().replace("\r", ""))
        return DONE
    try:
        arguments = json.loads(args.arguments)
    except ValueError as error:
        raise InvalidValueError("arguments", args.arguments, f"is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidValueError(
            "arguments", args.arguments, "is no JSON object", advice='such as {"id": "mem1"}'
        )
    print_json(monitor.execute_all(place, [(args.command, arguments)])[0])
    return DONE


def _card(args: argparse.Namespace) -> int:
    labs = load_labs()
    done = labs.switch_card(args.lab, args.card, labs.Power(args.power))
    if args.json:
        print_json({"card": args.card, "power": args.power, "done": done})
    else:
        print(done)
    return DONE


def _fault(args: argparse.Namespace) -> int:
    labs = load_labs()
    faults = import_module("virtfabric.shim.lab.faults")
    if args.list:
        _list_faults(faults.FAULTS.values(), as_json=args.json)
        return DONE
    if not args.lab or not args.fault:
        raise InvalidValueError("fault", "", "needs LAB and FAULT, or --list")
    fault = faults.find_fault(args.fault)
    done = faults.inject_fault(fault, labs.read_scene(args.lab), args.target)
    if args.json:
        print_json({"fault": fault.name, "done": done, "seen": fault.seen})
    else:
        print_lines([*done.splitlines(), f"the host sees: {fault.seen}"])
    return DONE


def _list_faults(faults: Iterable[Fault], *, as_json: bool) -> None:
    if as_json:
        print_json([{"fault": f.name, "does": f.does, "seen": f.seen} for f in faults])
        return
    rows = tuple((f.name, f.does, f.target) for f in faults)
    print_tables([Table("faults", ("fault", "what breaks", "target"), rows)])


def _console(args: argparse.Namespace) -> int:
    load_labs()
    place = _find_place(args.lab)
    if args.log:
        text = place.console_log.read_text(errors="replace") if place.console_log.exists() else ""
        sys.stdout.write(text)
        return DONE
    note(f"console of lab {args.lab}; Ctrl-] leaves it")
    import_module("virtfabric.shim.lab.console").attach_console(place)
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `lab` and its commands."""
    lab = subparsers.add_parser(
        "lab",
        help="nested labs: emulated hosts with NUMA, IOMMU, SR-IOV and CXL",
        description="Emulated hosts that run libvirt, KVM guests and this agent; see docs/lab.md.",
    )
    commands = lab.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int], example: str) -> Any:
        parser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", example=example
        )
        parser.set_defaults(run=told(run))
        return parser

    build = add(
        "build", "build the image (once; kept in the cache)", _build, "virtfabric lab build"
    )
    build.add_argument("topology", nargs="?", metavar="TOPOLOGY", help="also the QEMU it needs")
    build.add_argument("--again", action="store_true", help="build it anew")

    up = add("up", "bring up a lab", _up, "virtfabric lab up cxl --name mine")
    up.add_argument(
        "topology", nargs="?", default=_DEFAULT, metavar="TOPOLOGY",
        help=f"a shipped one (virtfabric lab list) or a file.json (default: {_DEFAULT})",
    )  # fmt: skip
    up.add_argument("--name", help="the lab's name (default: the topology's)")
    up.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="to be ready (default: 300)"
    )
    up.add_argument("--keep", action="store_true", help="leave a lab that fails to come up")

    add("list", "labs and topologies", _list, "virtfabric lab list")

    def add_for_lab(
        name: str, text: str, run: Callable[[argparse.Namespace], int], example: str
    ) -> Any:
        parser = add(name, text, run, example)
        parser.add_argument("lab", metavar="LAB")
        return parser

    status = add_for_lab(
        "status", "what one lab is doing", _status, "virtfabric lab status cxl --probe"
    )
    status.add_argument(
        "--probe", action="store_true",
        help="see also whether a processor of it, or of a guest in it, hangs; takes seconds",
    )  # fmt: skip
    add_for_lab("shell", "a root shell in a lab", _shell, "virtfabric lab shell cxl")
    import argparse as words

    run = add_for_lab(
        "run", "run a shell command in a lab, with its exit code", _run,
        "virtfabric lab run --json cxl 'cxl list -M -u'",
    )  # fmt: skip
    run.add_argument(
        "command", nargs=words.REMAINDER, metavar="CMD",
        help="all that follows LAB, options too: --json of this command stands before LAB",
    )  # fmt: skip
    copy = add_for_lab(
        "copy", "copy files into or out of a lab", _copy, "virtfabric lab copy cxl :/var/log/x ."
    )
    copy.add_argument("source", metavar="FROM", help=":/path is in the lab")
    copy.add_argument("target", metavar="TO")
    qmp = add_for_lab(
        "qmp", "ask the lab's QEMU", _qmp, "virtfabric lab qmp cxl query-memory-devices"
    )
    qmp.add_argument("command", metavar="COMMAND")
    qmp.add_argument("arguments", nargs="?", default="{}", metavar="JSON")
    qmp.add_argument("--hmp", action="store_true", help="COMMAND is of the human monitor")
    card = add_for_lab(
        "card", "cut an offload card off from power, or give it power", _card,
        "virtfabric lab card card card1 off",
    )  # fmt: skip
    card.add_argument("card", metavar="CARD", help="its id in the topology")
    card.add_argument(
        "power", choices=["off", "on", "replace"],
        help="off: it dies without a word; replace: another one, that knows nothing, in its place",
    )  # fmt: skip
    fault = add(
        "fault", "break something in a lab, for real", _fault, "virtfabric lab fault cxl cxl-poison"
    )
    fault.add_argument("lab", nargs="?", metavar="LAB")
    fault.add_argument("fault", nargs="?", metavar="FAULT")
    fault.add_argument("--target", help="what it is done to (default: the first there is)")
    fault.add_argument("--list", action="store_true", help="every fault, and what it does")
    console = add_for_lab(
        "console", "the serial console (Ctrl-] leaves it)", _console, "virtfabric lab console cxl"
    )
    console.add_argument("--log", action="store_true", help="print what it has said so far")
    down = add("down", "end a lab; nothing of it stays", _down, "virtfabric lab down cxl")
    which = down.add_mutually_exclusive_group(required=True)
    which.add_argument("lab", nargs="?", metavar="LAB")
    which.add_argument("--all", action="store_true", help="every lab")
