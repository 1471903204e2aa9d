"""docs/card-protocol.md says what the card does: a hardware team builds from that text alone."""

import re
from pathlib import Path

import pytest

from virtfabric.shim.cardpci import maps
from virtfabric.shim.cardpci.descriptors import Operation, Status
from virtfabric.shim.ivshmem import maps as shared

TEXT = (Path(__file__).parents[3] / "docs" / "card-protocol.md").read_text()


def section(title, until):
    return TEXT.split(f"#### {title}\n", 1)[1].split(f"#### {until}", 1)[0]


def rows(text):
    lines = re.findall(r"^\| (0x[0-9a-f]{3} \|.*) \|$", text, re.MULTILINE)
    return [tuple(cell.strip() for cell in line.split("|")) for line in lines]


@pytest.mark.parametrize(
    ("registers", "text"),
    [(maps.MANAGEMENT, section("Management, BAR 0", "The mailbox")),
     (maps.SLICE, section("A slice, BAR 0", "Queues")),
     (shared.SHARED, section("Registers in shared memory", "Bells"))],
    ids=["management", "slice", "ivshmem"],
)  # fmt: skip
def test_every_register_is_there_and_no_other(registers, text):
    def reset(value):
        return "-" if value is None else f"{value:#x}" if value else "0"

    assert rows(text) == [
        (f"0x{r.offset:03x}", f"`{r.name}`", r.access, str(32 * r.words), reset(r.reset), r.meaning)
        for r in registers
    ]


@pytest.mark.parametrize("registers", [maps.MANAGEMENT, maps.SLICE, shared.SHARED])
def test_registers_do_not_overlap(registers):
    assert len(registers.by_offset) == sum(one.words for one in registers)
    assert all(one.offset % 4 == 0 for one in registers)
    assert max(registers.by_offset) < maps.BAR_SIZE


def test_operations_and_statuses_are_there():
    for one in Operation:
        assert f"| 0x{one:02x} | {one.name} |" in TEXT
    for one in Status:
        assert f"| {one} | {one.name} |" in TEXT
