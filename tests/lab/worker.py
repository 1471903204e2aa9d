"""The one process in a lab that carries out orders (`carry_out.py`), and how tests give them."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from running_lab import RunningLab


def start_worker(lab: RunningLab) -> None:
    """Whoever holds the pipe open keeps it waiting."""
    script = "/opt/virtfabric/checkout/tests/lab/carry_out.py"
    lab.run(
        "mkfifo /tmp/orders; (sleep infinity > /tmp/orders) > /dev/null 2>&1 < /dev/null & "
        f"python3 {script} < /tmp/orders > /tmp/answers 2> /tmp/carry_out.log & disown -a"
    )
    lab.wait("grep -qs ready /tmp/answers", timeout_s=120)


def carry_out(lab: RunningLab, *orders: tuple[str, Any]) -> list[dict[str, Any]]:
    """Have the process carry out orders; what came of each."""
    given = [json.dumps([verb, a.to_json() if hasattr(a, "to_json") else a]) for verb, a in orders]
    before = int(lab.run("wc -l < /tmp/answers"))
    lab.run(f"printf '%s\\n' {' '.join(map(shlex.quote, given))} > /tmp/orders")
    wanted = before + len(given)
    lab.wait(f"[ $(wc -l < /tmp/answers) -ge {wanted} ]", timeout_s=180)
    answers = lab.run(f"tail -n +{before + 1} /tmp/answers").splitlines()
    print(*answers, sep="\n")
    return [json.loads(line) for line in answers]


def done(answers: list[dict[str, Any]]) -> list[Any]:
    """The results, when nothing failed."""
    assert not [answer for answer in answers if "error" in answer], answers
    return [answer["result"] for answer in answers]
