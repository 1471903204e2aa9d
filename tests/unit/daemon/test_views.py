"""What `host` and `status` show of pCPUs that nobody may use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))

from host_data import guest_id, load_host, make_guest, snapshot_of

from virtfabric.cli.tables import pcpu_map
from virtfabric.daemon.views import host_view
from virtfabric.model.amounts import Amounts
from virtfabric.model.policy import Smt
from virtfabric.model.units import MIB


@pytest.mark.parametrize(
    ("smt", "order", "kept"),
    [
        (Smt.PREFER, (2, 3), []),
        (Smt.REQUIRE, (2, 6, 3), [7]),
        (Smt.ISOLATE, (2, 3), [6, 7]),
    ],
)
def test_siblings_kept_empty_say_beside_whom(
    smt: Smt, order: tuple[int, ...], kept: list[int]
) -> None:
    guest = make_guest(1, dedicated=True, smt=smt, name="db")
    held = Amounts.of(cpu=1000 * len(order), memory=128 * MIB)
    host = host_view(snapshot_of(load_host("smt-4x2"), [guest], {guest_id(1): (held, order)}))
    shown = {c["cpu"]: c for c in host["cpus"]}
    assert [n for n, cpu in shown.items() if cpu["isolated_by"] == "db"] == kept
    for number in kept:
        assert (shown[number]["role"], shown[number]["guest"]) == ("dedicated", None)
    assert not [n for n, cpu in shown.items() if cpu["role"] == "unmanaged-part"]
    text = [row[-1] for row in pcpu_map(host, []).rows]
    assert ("kept empty for db" in text) == bool(kept)
