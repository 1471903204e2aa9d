"""A card in a process of its own, that can be killed: `ivshmem_card.py DIRECTORY`.

Tells the path of its ivshmem socket, and then runs until its input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[up]) for up in (0, 1))

from card_machine import Rig


def main() -> None:
    rig = Rig(Path(sys.argv[1]))
    print(rig.runner.device.ivshmem, flush=True)
    sys.stdin.read()
    rig.close()


if __name__ == "__main__":
    main()
