"""What demos in a nested lab have in common: commands shown and noted, options, the lab's life.

It knows no act. Exit code 0 only if every check passed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from typing import TYPE_CHECKING, NoReturn

from demo.checker import Verdicts
from demo.labhost import AGENT_LOG, LabError, LabHost
from demo.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from demo.checker import Finding

REFUSED = 3
"""Exit code of a command that was refused."""
_TRIES = 3
"""As often it is played where the emulator keeps failing."""


class LabPlay:
    """A demo: `acts` says what is played."""

    host: type[LabHost] = LabHost

    def __init__(self, lab: LabHost, stage: Stage, *, patience_s: float) -> None:
        """`patience_s`: how long kernel and guests may take to show what a command reported."""
        self.lab = lab
        self.stage = stage
        self.verdicts = Verdicts()
        self.patience_s = patience_s
        self.grants: list[str] = []

    @property
    def acts(self) -> tuple[Callable[[], None], ...]:
        """In their order."""
        raise NotImplementedError

    def run(self, words: str, code: int = 0) -> str:
        """A `virtfabric` command in the lab, shown with its output; its exit code is a finding."""
        done = self.lab.run(f"COLUMNS=150 virtfabric {words}")
        self.stage.command(f"virtfabric {words}", done)
        ok = done.returncode == code
        found = "" if ok else f", found {done.returncode}"
        self.note((ok, f"the command's exit code is {code}{found}"))
        return done.stdout + done.stderr

    def note(self, *findings: Finding) -> None:
        """Takes findings down and shows them."""
        for finding in findings:
            self.verdicts.add(finding)
        self.stage.findings(findings)

    def allocate(self, words: str) -> None:
        """Has a grant made, and keeps its id."""
        self.run(f"allocate {words} --deadline 300")
        grants = [grant["id"] for grant in self.lab.cli_json("grants")]
        self.grants += [grant for grant in grants if grant not in self.grants]

    def play(self, *, keep_going: bool = False) -> None:
        """All acts; ends after the first act with a failed check, unless `keep_going`."""
        for act in self.acts:
            act()
            if self.verdicts.failed and not keep_going:
                self.stage.say("A check failed: the demo ends here.")
                return


def parse(argv: Sequence[str] | None, *, topology: str, about: str) -> argparse.Namespace:
    """The options of a demo in a lab."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--keep", action="store_true", help="leave the lab up, as the demo ended")
    parser.add_argument("--quiet", action="store_true", help="headings and findings only")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failed check")
    parser.add_argument(
        "--lab", default=topology, metavar="NAME",
        help="the lab's name; one that is up already is used, and left up (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S",
        help="seconds that kernel and guests may take to show a change (default: %(default)g)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _stop(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def play(kind: type[LabPlay], argv: Sequence[str] | None, *, topology: str, about: str) -> int:
    """Plays a demo in a lab of this topology; 0 only if every check passed."""
    args = parse(argv, topology=topology, about=about)
    signal.signal(signal.SIGTERM, _stop)
    # a shell that started us in the background has SIGINT ignored, and that is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stage = Stage(quiet=args.quiet)
    began = time.monotonic()
    for left in reversed(range(_TRIES)):
        demo = kind(kind.host(args.lab, topology), stage, patience_s=args.patience)
        faults = _play(demo, keep_going=args.keep_going, keep=args.keep)
        if not faults or not left:
            break
        stage.say(
            f"The emulator under the lab has failed: {'; '.join(faults)}. That says nothing of "
            "what the demo shows (docs/lab.md), so all of it is played again, in a new lab."
        )
    if args.keep:
        stage.say(f"the lab is up: virtfabric lab shell {args.lab}")
    count, failed = len(demo.verdicts.findings), len(demo.verdicts.failed)
    took, code = time.monotonic() - began, demo.verdicts.exit_code
    stage.end(f"{count - failed} of {count} checks passed, in {took:.0f} s", ok=not code)
    return code


def _play(demo: LabPlay, *, keep_going: bool, keep: bool) -> list[str]:
    """What of the emulator has failed, where a check did."""
    try:
        try:
            demo.stage.say(f"bringing up the lab {demo.lab.name} (half a minute, if it is built)")
            demo.stage.output(demo.lab.start())
            demo.play(keep_going=keep_going)
        except (LabError, subprocess.TimeoutExpired) as error:
            demo.note((False, f"the demo broke off: {error}"))
        if not demo.verdicts.failed:
            return []
        # first: nothing else can be asked of a lab that hangs
        faults = [] if keep else demo.lab.find_faults()
        if not faults:
            _tell_log(demo)
        return faults
    except KeyboardInterrupt:
        demo.note((False, "interrupted"))
        return []
    finally:
        if not keep:
            demo.lab.stop()


def _tell_log(demo: LabPlay) -> None:
    demo.stage.end("the end of the agent's log:", ok=False)
    demo.stage.output(demo.lab.run(f"tail -n 40 {AGENT_LOG}").stdout)
