"""Hot-added and hot-removed CXL memory is noticed (umockdev)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BED = Path(__file__).parent / "memory_bed.py"


def test_hot_plug_events_of_cxl_dax_and_memory() -> None:
    done = subprocess.run(
        ["umockdev-wrapper", sys.executable, str(BED)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["seen"] == {
        "memdev": [["0x100"], [], []],
        "region": [["0x100"], ["region0"], []],
        "dax": [["0x100"], ["region0"], ["online"]],
        "block": [["0x100"], ["region0"], ["partly online"]],
        "removed": [[], ["region0"], ["partly online"]],
    }
    assert told["threads"] == ["memory"]
    assert told["of_others"] is False
    assert told["after_close"] == 0
