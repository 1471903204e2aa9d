"""`make demo`: the agent on a real libvirtd with real guests, and a checker that believes nobody.

Sets up a private host, plays seven acts with the product's own commands, has each judged by
`checker` from kernel, libvirt and guest, and tears everything down. Exit code 0 only if every check
passed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import checker, scenario
from demo.checker import MIB, Observation, Verdicts
from demo.host import AGENT, Host, HostError
from demo.stage import Stage
from virtfabric.shim.cache import BuildError
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.sandbox_process import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from demo.checker import Finding

Seen = dict[str, Observation]
_REFUSED = 3


class Demo:
    """The seven acts."""

    def __init__(self, host: Host, stage: Stage, *, patience_s: float) -> None:
        """`patience_s`: how long kernel and guests may take to show what a command reported."""
        self.host = host
        self.stage = stage
        self.verdicts = Verdicts()
        self._patience_s = patience_s
        self._first: Seen = {}
        self._grant = ""

    # -- tools ------------------------------------------------------------------------------------

    def run(self, words: str) -> subprocess.CompletedProcess[str]:
        """A `virtfabric` command line, shown with its output."""
        done = self.host.cli(*shlex.split(words))
        self.stage.command(f"virtfabric {words}", done)
        return done

    def note(self, *findings: Finding) -> None:
        """Takes findings down and shows them."""
        for finding in findings:
            self.verdicts.add(finding)
        self.stage.findings(findings)

    def judge(self, expect: Callable[[Seen], list[Finding]], before: Seen | None = None) -> Seen:
        """Looks, after each guest has spoken again, until all is right or patience ends."""
        deadline = time.monotonic() + self._patience_s * checker.PATIENCE
        seen = self.host.observe_all(fresh=True)
        while not all(ok for ok, _ in expect(seen)) and time.monotonic() < deadline:
            checker.wait_for_news(map(self.host.console, seen), lines=1)
            seen = self.host.observe_all()
        self.stage.compare(before, seen)
        self.note(*expect(seen))
        return seen

    def expect_code(self, done: subprocess.CompletedProcess[str], code: int) -> None:
        """The command's exit code is a finding, too."""
        ok = done.returncode == code
        found = "" if ok else f", found {done.returncode}"
        self.note((ok, f"the command's exit code is {code}{found}"))

    # -- acts -------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Agent, then three guests, started by virsh so that libvirt's hooks ask the agent."""
        corner = checker.format_cpu_list(scenario.CORNER)
        self.stage.act(
            "Three guests in a corner of this machine",
            f"A private libvirtd; the agent may grant pCPUs {corner} (2000m) and "
            f"{scenario.MEMORY} MiB.",
            "Each guest carries its policy in its libvirt metadata: batch has priority 10, web 50, "
            "database 90.",
        )
        self.stage.command("cat /etc/virtfabric/demo.toml")
        self.stage.output(self.host.write_config(scenario.config()))
        self.stage.command("virtfabricd &")
        self.host.start_agent()
        for guest in scenario.GUESTS:
            self.host.define(guest)
            done = self.host.start_guest(guest.name)
            self.stage.command(f"virsh start {guest.name}", done)
            if done.returncode:
                raise HostError(f"virsh start {guest.name}: {done.stderr}")
        self.host.wait_ready()
        self._first = self.judge(self._expect_start)
        self.run("status")

    def _expect_start(self, seen: Seen) -> list[Finding]:
        findings = scenario.expect_shares(seen, scenario.START, seen)
        for name, now in seen.items():
            whole = scenario.START[name].memory
            memory = now.report.memory / MIB if now.report else 0
            # The guest's kernel keeps some 50 MiB for itself; the rest has to be there.
            ok = whole - 64 < memory <= whole
            findings.append((ok, f"{name}: its own MemTotal is {memory:.0f} of {whole} MiB"))
        return findings

    def act_allocate(self) -> None:
        """Batch pays, web does not."""
        cpu, memory = scenario.ASKED_CPU, scenario.ASKED_MEMORY
        self.stage.act(
            "The database asks for more than is free",
            f"Free are {scenario.FREE_CPU}m of CPU and {scenario.FREE_MEMORY} MiB. It asks for "
            f"+{cpu}m and +{memory} MiB:",
            "batch, the guest of the lowest priority, pays the rest. web could, too, and must not.",
        )
        before = self.host.observe_all()
        done = self.run(f"allocate database --cpu +{cpu}m --memory +{memory}M")
        self.expect_code(done, 0)
        self._remember_grant()

        def expect(seen: Seen) -> list[Finding]:
            unhurt = checker.expect_same(seen["web"], before["web"])
            shares = scenario.expect_shares(seen, scenario.AFTER_ALLOCATE, self._first)
            return [*shares, unhurt]

        self.judge(expect, before)
        self.run("loans")

    def _remember_grant(self) -> None:
        grants = self.host.cli_json("grants")
        mine = [grant["id"] for grant in grants if grant["name"] == "database"]
        self._grant = mine[-1] if mine else ""

    def act_refuse(self) -> None:
        """A request that cannot be had changes nothing."""
        self.stage.act(
            "A request that cannot be had",
            f"batch and web have 100m each above their reservations: +{scenario.TOO_MUCH_CPU}m is "
            "refused,",
            "with the reason, and nothing changes.",
        )
        before = self.host.observe_all()
        done = self.run(f"allocate database --cpu +{scenario.TOO_MUCH_CPU}m")
        self.expect_code(done, _REFUSED)
        said = done.stdout + done.stderr
        self.note(("no-capacity" in said, "it names the reason no-capacity"))
        self.judge(lambda seen: [checker.expect_same(seen[n], before[n]) for n in seen], before)

    def act_crash(self) -> None:
        """SIGKILL in mid-transaction; the next start undoes what was half done."""
        cpu, memory = scenario.CRASH_CPU, scenario.CRASH_MEMORY
        self.stage.act(
            "The agent dies in mid-transaction",
            f"batch starts to give up {memory} MiB, which takes its kernel a moment. Meanwhile the "
            "agent is killed",
            "with SIGKILL, and started again.",
        )
        before = self.host.observe_all(fresh=True)
        words = f"allocate database --cpu +{cpu}m --memory +{memory}M"
        self.stage.command(f"virtfabric {words} &")
        client = self.host.start_cli(*words.split())
        began = checker.wait_until(lambda: self._has_begun(before), self._patience_s)
        self.stage.command("kill -9 $(pidof virtfabricd)")
        self.host.kill_agent(signal.SIGKILL)
        self.stage.output(*reversed(client.communicate(timeout=60 * checker.PATIENCE)))
        half_done = self.host.observe_all()
        self.stage.say("What the dead agent left behind:")
        self.stage.compare(before, half_done)
        same = all(checker.expect_same(half_done[n], before[n])[0] for n in before)
        self.note((began and not same, "the agent died with a transaction half done"))
        self.stage.command("virtfabricd &")
        self.host.start_agent()
        self.stage.say("After its recovery, against what was there before the request:")
        self.judge(lambda seen: [checker.expect_same(seen[n], before[n]) for n in seen], half_done)

    def _has_begun(self, before: Seen) -> bool:
        root = checker.read_live_xml(self.host.place, "batch")
        return checker.read_requested(root) != before["batch"].requested

    def act_release(self) -> None:
        """The loans go home."""
        self.stage.act(
            "The database gives it back", "The grant ends, and what batch had lent goes home."
        )
        before = self.host.observe_all()
        self.expect_code(self.run(f"release {self._grant}"), 0)
        shares = scenario.released_shares(unplugs=self.host.unplugs)
        self.judge(lambda seen: scenario.expect_shares(seen, shares, self._first), before)
        self.run("loans")

    def act_dedicated(self) -> None:
        """A pCPU of its own."""
        self.stage.act(
            "The database gets a pCPU to itself",
            "Its policy becomes `dedicated`: the shared pool shrinks to the other pCPU at once.",
        )
        before = self.host.observe_all()
        self.expect_code(self.run("policy set database --placement dedicated"), 0)

        def expect(seen: Seen) -> list[Finding]:
            alone = checker.expect_apart(seen["database"], [seen["batch"], seen["web"]])
            wanted = scenario.dedicated_shares(seen, unplugs=self.host.unplugs)
            return [alone, *scenario.expect_shares(seen, wanted, self._first)]

        self.judge(expect, before)

    def act_story(self) -> None:
        """From the audit log alone."""
        self.stage.act("The story of the grant, from the audit log")
        done = self.run(f"explain {self._grant}")
        self.expect_code(done, 0)
        told = all(name in done.stdout for name in ("database", "batch"))
        self.note((told, "the story names borrower and victim"))
        self.expect_code(self.run("audit --verify"), 0)

    def play(self, *, keep_going: bool = False) -> None:
        """All acts; ends after the first act with a failed check, unless `keep_going`."""
        acts = (
            self.set_up, self.act_allocate, self.act_refuse, self.act_crash, self.act_release,
            self.act_dedicated, self.act_story,
        )  # fmt: skip
        for act in acts:
            act()
            if self.verdicts.failed and not keep_going:
                self.stage.say("A check failed: the demo ends here.")
                return


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep logs and configuration")
    parser.add_argument("--quiet", action="store_true", help="headings and findings only")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failed check")
    parser.add_argument(
        "--agent-command",
        default=shlex.join(AGENT),
        metavar="COMMAND",
        help="what to start in place of virtfabricd",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=15.0,
        metavar="S",
        help="seconds that kernel and guests may take to show a change (default: %(default)g)",
    )
    return parser.parse_args(argv)


def _stop(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the demo; 0 only if every check passed."""
    args = _parse(argv)
    if os.geteuid() != 0:
        sys.exit("demo: needs root (it makes namespaces and starts guests)")
    signal.signal(signal.SIGTERM, _stop)
    # a shell that started us in the background has SIGINT ignored, and that is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stage = Stage(quiet=args.quiet)
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="virtfabric-demo-"))
    host = Host(
        f"demo{os.getpid()}", root, keep=args.keep, agent_command=shlex.split(args.agent_command)
    )
    demo = Demo(host, stage, patience_s=args.patience)
    code = _play(demo, keep_going=args.keep_going)
    if args.keep:
        stage.say(f"logs and configuration are in {root}")
    count, failed = len(demo.verdicts.findings), len(demo.verdicts.failed)
    took = time.monotonic() - began
    stage.end(f"{count - failed} of {count} checks passed, in {took:.0f} s", ok=not code)
    return code


def _play(demo: Demo, *, keep_going: bool) -> int:
    try:
        ensure_guest_image(report=demo.stage.say)
        try:
            demo.host.start()
            demo.play(keep_going=keep_going)
            if demo.verdicts.failed:
                _tell_log(demo)
        except (HostError, SandboxError, checker.CheckerError, subprocess.TimeoutExpired) as error:
            demo.note((False, f"the demo broke off: {error}"))
            _tell_log(demo)
    except BuildError as error:
        demo.note((False, f"guest image: {error}"))
    except KeyboardInterrupt:
        demo.note((False, "interrupted"))
    finally:
        demo.host.stop()
    return demo.verdicts.exit_code


def _tell_log(demo: Demo) -> None:
    demo.stage.end("the end of the agent's log:", ok=False)
    demo.stage.output(demo.host.read_agent_log(40))


if __name__ == "__main__":
    sys.exit(main())
