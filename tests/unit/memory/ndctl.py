"""`FakeNdctl`: `cxl` and `daxctl` on a laid-out machine: they change files as the kernel would.

Written from what the lab showed (ndctl 81, Linux 6.12). It shares no code with what it is to test.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.model.errors import CxlError

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from machine import Machine

BLOCK = 128 << 20


class FakeNdctl:
    """A `Tool`.

    Attributes:
        ran: the commands so far.
        stuck: blocks of memory that do not go offline.
        broken: a command that begins with this fails, after half of its work.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ran: list[str] = []
        self.stuck: set[int] = set()
        self.broken = "nothing"
        blocks = machine.sys / "devices/system/memory"
        blocks.mkdir(exist_ok=True)
        (blocks / "block_size_bytes").write_text(f"{BLOCK:x}\n")

    def __call__(
        self,
        command: Sequence[str],
        *,
        deadline_s: float,
        cancelled: threading.Event | None = None,
    ) -> str:
        assert deadline_s > 0
        words = [w for w in command if not w.startswith("--")]
        options = dict(w[2:].split("=") for w in command if w.startswith("--") and "=" in w)
        flags = {w for w in command if w.startswith("--") and "=" not in w}
        self.ran.append(" ".join(command))
        assert "--force" not in flags, command
        match words[:2]:
            case ["cxl", "create-region"]:
                self._create(options, words[2:])
            case ["cxl", "enable-region"]:
                self._enable(self.machine.device(words[2]))
            case ["cxl", "disable-region"]:
                self._disable(words[2])
            case ["cxl", "destroy-region"]:
                self._destroy(words[2])
            case ["daxctl", "offline-memory"]:
                self._offline(words[2])
            case ["daxctl", "online-memory"]:
                self._online(words[2], "Normal" if "--no-movable" in flags else "Movable")
            case other:
                raise AssertionError(other)
        return ""

    def _fail(self, command: str) -> None:
        if command.startswith(self.broken):
            raise CxlError(f"{command}: Device or resource busy")

    def _create(self, options: dict[str, str], memdevs: list[str]) -> None:
        machine, decoder = self.machine, options["decoder"]
        window = machine.device(decoder)
        free = (n for n in range(9) if not self._bus("cxl", f"region{n}").is_symlink())
        number = next(free)
        home = window / f"region{number}"
        home.mkdir()
        self._link("cxl", home)
        base = int((window / "start").read_text(), 0)
        self._write(home, interleave_ways=options["ways"], mode="ram", commit="0",
                    interleave_granularity=options["granularity"],
                    size=hex(int(options["size"])), resource=hex(base))  # fmt: skip
        self._fail("create-region")
        for position, memdev in enumerate(memdevs):
            self._write(home, **{f"target{position}": self._decoder_of(memdev)})
        self._enable(home)

    def _enable(self, home: Path) -> None:
        """The decoders are committed, and the driver makes memory of it."""
        machine, number = self.machine, int(home.name.removeprefix("region"))
        self._write(home, commit="1")
        size, base = (int((home / name).read_text(), 0) for name in ("size", "resource"))
        dax = home / f"dax_region{number}" / f"dax{number}.0"
        dax.mkdir(parents=True)
        self._write(dax, size=str(size), resource=hex(base), target_node=str(number + 1))
        self._link("dax", dax)
        (dax / "driver").symlink_to(machine.sys / "bus/dax/drivers/kmem")
        self._online(dax.name, "Movable")  # the kernel does it by itself

    def _decoder_of(self, memdev: str) -> str:
        for endpoint in (self.machine.sys / "bus/cxl/devices").glob("endpoint*"):
            if (endpoint / "uport").readlink().name == memdev:
                return endpoint.name.replace("endpoint", "decoder") + ".0"
        raise CxlError(f"no active memdevs found: {memdev}")

    def _disable(self, region: str) -> None:
        self._fail("disable-region")
        for dax in self.machine.device(region).glob("dax_region*/dax*"):
            assert not self._numbers(dax.name, "online"), "the kernel oopses here"
            self._bus("dax", dax.name).unlink()
            shutil.rmtree(dax.parent)

    def _destroy(self, region: str) -> None:
        self._fail("destroy-region")
        home = self.machine.device(region)
        assert not list(home.glob("dax_region*")), "the kernel oopses here"
        self._bus("cxl", region).unlink()
        shutil.rmtree(home)

    def _offline(self, dax: str) -> None:
        for number in self._numbers(dax, "online"):
            if number in self.stuck:
                raise CxlError(f"{dax}: Failed to offline memory block {number}: EBUSY")
            self._write(self._block(number), state="offline", valid_zones="Normal Movable")

    def _online(self, dax: str, zone: str) -> None:
        for number in self._numbers(dax):
            block = self._block(number)
            block.mkdir(exist_ok=True)
            state = block / "state"
            if not state.exists() or state.read_text() == "offline\n":
                self._write(block, state="online", valid_zones=zone)

    def _numbers(self, dax: str, state: str = "") -> list[int]:
        home = self.machine.device(dax)
        base, size = (int((home / name).read_text(), 0) for name in ("resource", "size"))
        numbers = range(base // BLOCK, (base + size) // BLOCK)
        return [n for n in numbers if not state or self._state(n) == state]

    def _state(self, number: int) -> str:
        return (self._block(number) / "state").read_text().strip()

    def _block(self, number: int) -> Path:
        return self.machine.sys / f"devices/system/memory/memory{number}"

    def _bus(self, bus: str, name: str) -> Path:
        return self.machine.sys / "bus" / bus / "devices" / name

    def _link(self, bus: str, home: Path) -> None:
        link = self._bus(bus, home.name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../..") / home.relative_to(self.machine.sys))

    def _write(self, home: Path, **files: str) -> None:
        for name, text in files.items():
            (home / name).write_text(f"{text}\n")
