"""Tells an emulator that has failed from software in the lab that has.

TCG's virtualization loses or repeats an interrupt now and then (docs/lab.md): a processor of the
lab, or of a guest in it, then hangs for good, or falls over. What is found here is none of the
doing of what runs in the lab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator

_SAMPLES: Final = 4
_CPU_S: Final = 60
"""A processor of a busy lab runs everything it is given well within a few seconds."""
_ANSWER_S: Final = 200.0
_NEAR: Final = 4096
"""Bytes that a loop on one lock may take; whatever does work goes further."""
_INTERRUPTS: Final = 1 << 9  # RFLAGS.IF
_LOOK: Final = rf"""
cd /var/log/libvirt/qemu
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    [ "$(cat $cpu/online 2> /dev/null || echo 1)" = 1 ] || continue
    n=${{cpu##*cpu}}
    echo "cpu $n"
    timeout {_CPU_S} taskset -c $n true > /dev/null 2>&1 && echo "answers $n" &
done
wait
grep -ls 'shutting down, reason=shutdown' *.log | sed 's/\.log$//; s/^/ended /'
dmesg | grep -aE 'detected stalls|soft lockup' | head -n 1 | sed 's/^/stalled - /'
for console in *-console.log; do
    grep -aE 'detected stalls|soft lockup' "$console" 2> /dev/null | tail -n 1 | tr -d '\r' |
        sed "s/^/stalled ${{console%-console.log}} /"
done
for guest in $(timeout 60 virsh -q list --name); do
    for n in $(seq {_SAMPLES}); do
        timeout 30 virsh qemu-monitor-command "$guest" --hmp 'info registers -a' |
            grep -aoE '^CPU#[0-9]+|^RIP=.*' | paste -d ' ' - - | sed "s/^/vcpu $guest /"
        read -rt 1 <> <(:)
    done
done
:
"""


class Shell(Protocol):
    """Root's shell in a lab: `Remote`, or the ssh of another kind of machine."""

    def run(
        self, command: str, *, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of bash; LabError when it does not answer in time."""
        ...


def find_faults(remote: Shell) -> list[str]:
    """What of a running lab has hung or fallen over, in words; some seconds for each guest.

    A guest that ended by itself counts: libvirt tells a triple fault as a shutdown.
    """
    try:
        return read_faults(remote.run(_LOOK, timeout_s=_ANSWER_S).stdout)
    except LabError as error:
        return [f"the lab does not answer: {error}"]


def read_faults(text: str) -> list[str]:
    """What `find_faults` makes of what its look has printed."""
    rows = [words for line in text.splitlines() if (words := line.split())]
    cpus = {row[1] for row in rows if row[0] == "cpu"}
    answers = {row[1] for row in rows if row[0] == "answers"}
    faults = [
        f"processor {cpu} of the lab runs nothing any more ({_CPU_S} s)"
        for cpu in sorted(cpus - answers, key=int)
    ]
    for row in rows:
        if row[0] == "ended":
            why = "if nobody told it to, it fell over (libvirt: shutting down, reason=shutdown)"
            faults.append(f"guest {row[1]} ended by itself: {why}")
        elif row[0] == "stalled":
            whose = "the lab's kernel" if row[1] == "-" else f"guest {row[1]}"
            faults.append(f"{whose} says: {' '.join(row[2:])}")
    samples: dict[tuple[str, str], list[dict[str, int]]] = {}
    for row in rows:
        if row[0] == "vcpu" and len(row) > 3:
            samples.setdefault((row[1], row[2].removeprefix("CPU#")), []).append(_registers(row))
    faults += [
        f"vCPU {number} of guest {guest} spins at {hex(seen[0]['RIP'])} and takes no interrupts"
        for (guest, number), seen in samples.items()
        if _spins(seen)
    ]
    return faults


def _registers(row: Iterable[str]) -> dict[str, int]:
    return dict(_numbers(row))


def _numbers(row: Iterable[str]) -> Iterator[tuple[str, int]]:
    for word in row:
        name, _, value = word.partition("=")
        if name in ("RIP", "RFL", "HLT") and value:
            yield name, int(value, 16)


def _spins(seen: list[dict[str, int]]) -> bool:
    """Running whenever looked at, in one small place, with interrupts off."""
    if len(seen) < _SAMPLES or not all({"RIP", "RFL", "HLT"} <= one.keys() for one in seen):
        return False
    places = [one["RIP"] for one in seen]
    runs = all(not one["HLT"] and not one["RFL"] & _INTERRUPTS for one in seen)
    return runs and max(places) - min(places) < _NEAR
