"""A small agent with fixed answers, real jobs and real notices; also a program: ADDRESS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time

from little_answers import (
    BATCH,
    CARD,
    DB,
    DEVICE,
    DIFFERENCE,
    GIB,
    GRANT,
    GUESTS,
    HELD,
    HOST,
    LOAN,
    MEMORY,
    PLAN,
    PLAN_OF_REGION,
    POLICY,
    PORTS,
    RECORD,
    RESULT,
    SLICE,
)

from virtfabric.daemon.jobs import Jobs
from virtfabric.daemon.notices import Notices
from virtfabric.dbus.service import Service
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    StepCancelledError,
    VirtfabricError,
)


class SystemClock:
    def now(self):
        return time.time()

    def monotonic(self):
        return time.monotonic()


class LittleAgent:
    def __init__(self):
        self.notices = Notices(SystemClock())
        self.jobs_ = Jobs(self.notices)
        self.callers = []
        self.let_go = threading.Event()
        self.hanging = threading.Semaphore(0)

    def _see(self, caller):
        self.callers.append(caller)

    def _known(self, guest):
        if guest not in ("db", DB, "batch", BATCH):
            raise RefusedError(Refusal(Reason.UNKNOWN_GUEST, f"there is no guest {guest!r}"))

    def status(self, caller):
        self._see(caller)
        return {
            "host": HOST, "guests": GUESTS, "grants": [GRANT], "loans": [LOAN], "generation": 17,
            "alerts": ["a thing to look at"],
        }  # fmt: skip

    def host(self, caller):
        self._see(caller)
        return HOST

    def guests(self, caller):
        self._see(caller)
        return GUESTS

    def grants(self, caller):
        self._see(caller)
        return [GRANT]

    def loans(self, caller):
        self._see(caller)
        return [LOAN]

    def devices(self, caller):
        self._see(caller)
        return [DEVICE]

    def cards(self, caller):
        self._see(caller)
        return [CARD]

    def card(self, caller, serial):
        self._see(caller)
        if serial != CARD["serial"]:
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"there is no card {serial!r}"))
        return CARD | {"slice_list": [SLICE], "readings": {"adapter": {"cores": 6}}}

    def card_trust(self, caller, serial):
        return self.card(caller, serial)

    def slices(self, caller):
        self._see(caller)
        return [SLICE]

    def slices_plan(self, caller, text, options):
        self._see(caller)
        return PLAN_OF_REGION | {"options": options}

    def slices_create(self, caller, text, options):
        self._see(caller)
        result = {"slices": [HELD], "steps": ["card C-1: grant slice aes"]}
        return {"job": self.jobs_.start("slice aes", lambda *_: result).id}

    def slice_plan_end(self, caller, name):
        self._see(caller)
        return PLAN_OF_REGION | {"slice": name}

    def slice_destroy(self, caller, name):
        self._see(caller)
        return {"job": self.jobs_.start(f"end of slice {name}", lambda *_: {"steps": []}).id}

    def slice_program(self, caller, name, path):
        self._see(caller)

        result = {"slice": name, "image": path, "parts": 1}
        return {"job": self.jobs_.start(f"image for {name}", lambda *_: result).id}

    def memory(self, caller):
        self._see(caller)
        return MEMORY

    def device_release(self, caller, address):
        self._see(caller)
        if address != DEVICE["address"]:
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"{address} is not in quarantine"))
        return {"job": self.jobs_.start("release", lambda *_: {"steps": ["reset"]}).id}

    def memory_release(self, caller, subject):
        self._see(caller)
        if subject != "0x100":
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"{subject} is not in quarantine"))
        return {
            "job": self.jobs_.start(
                "release", lambda *_: {"subject": subject, "was": "poisoned"}
            ).id
        }

    def region_plan(self, caller, wants):
        self._see(caller)
        return PLAN_OF_REGION | {"wants": wants}

    def region_create(self, caller, wants):
        self._see(caller)
        if wants["window"] != "decoder0.0":
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"there is no window {wants['window']}"))
        return {"job": self.jobs_.start("region", lambda *_: {"steps": ["create"]}).id}

    def region_plan_end(self, caller, name):
        self._see(caller)
        return PLAN_OF_REGION | {"region": name}

    def region_destroy(self, caller, name):
        self._see(caller)
        return {"job": self.jobs_.start(f"end of {name}", lambda *_: {"steps": ["end"]}).id}

    def reclaim_plan(self, caller, wants):
        self._see(caller)
        return {
            "resource": "memory@tier:cxl", "node": 1, "asked": GIB, "planned": GIB // 2,
            "short": GIB // 2, "parts": [{"text": "db: 512MiB by virtio-mem v0 within 30 s"}],
            "notes": [], "empty": [{"name": "web", "alias": "v1"}],
            "others": ["stray: 512MiB stay: it is unmanaged, and never touched"], "wants": wants,
        }  # fmt: skip

    def reclaim(self, caller, wants):
        self._see(caller)
        out = 0 if "size" in wants else GIB // 2
        result = {
            "request": "r9", "node": int(wants["node"]), "asked": GIB, "freed": GIB - out,
            "out": out, "guests": [{"text": "db: 512MiB of 512MiB came home"}],
            "detached": [{"name": "web", "alias": "v1"}],
            "kept": ["db: detach empty virtio-mem v0: the guest keeps it"], "others": [],
        }  # fmt: skip
        return {"job": self.jobs_.start("called home", lambda *_: result).id}

    def _policy(self, job=None):
        return {
            "uuid": DB, "name": "db", "managed": True, "policy_error": "", "policy": POLICY,
            "xml": "<policy/>", "job": job,
        }  # fmt: skip

    def policy_show(self, caller, guest):
        self._see(caller)
        self._known(guest)
        return self._policy()

    def policy_set(self, caller, guest, changes):
        self._see(caller)
        self._known(guest)
        if changes.get("priority") == "99":
            raise InvalidValueError("priority", "99", "is above the ceiling")
        return self._policy(self.jobs_.start("placement", lambda *_: {"steps": []}).id)

    def policy_plan(self, caller, guest, changes):
        self._see(caller)
        self._known(guest)
        plan = PLAN if "device:net.vf" in changes else None
        return self._policy() | {"notes": ["a note"], "plan": plan}

    def policy_clear(self, caller, guest):
        self._see(caller)
        self._known(guest)
        return self._policy() | {"policy": None, "managed": False, "xml": ""}

    def ports(self, caller, guest):
        self._see(caller)
        self._known(guest)
        return {"uuid": DB, "name": "db", "live": PORTS, "persistent": PORTS}

    def ports_add(self, caller, guest, count):
        answer = self.ports(caller, guest)
        if count > 8:
            raise RefusedError(Refusal(Reason.NO_CAPACITY, f"{count} more root ports do not fit"))
        return answer | {"added": list(range(3, 3 + count))}

    def allocate(self, caller, guest, wants):
        self._see(caller)
        self._known(guest)
        if wants.get("cpu") == "+64":
            raise RefusedError(
                Refusal(
                    Reason.NO_CAPACITY, "64 more CPUs are not to be had", {"cpu": 1000}, ("web",)
                )
            )
        work = {"slow": self._slow, "bad": self._bad, "defect": self._defect}.get(wants.get("key"))
        job = self.jobs_.start(f"allocation for {guest}", work or self._quick, uid=caller.uid)
        return {"job": job.id, "request": "r1"}

    def _quick(self, _job, progress):
        self.notices.publish("grant.made", GRANT)
        return RESULT

    def _slow(self, job, progress):
        n = 0
        while not self.let_go.is_set():
            n += 1
            self.notices.publish(
                "job.progress", {"job": job.id, "fraction": min(0.9, n / 100), "text": f"step {n}"}
            )
            if job.cancelled.wait(0.01):
                raise StepCancelledError("cancelled while memory moved")
        return RESULT

    def _bad(self, _job, progress):
        raise VirtfabricError("libvirt said no", advice="ask it again")

    def _defect(self, _job, progress):
        raise RuntimeError("secret path /usr/lib/x.py")

    def plan(self, caller, guest, wants):
        self._see(caller)
        self._known(guest)
        return PLAN

    def release(self, caller, grant):
        self._see(caller)
        if caller.uid != 0:
            detail = f"{caller.principal} (uid {caller.uid}, gids {sorted(caller.gids)}) may not"
            raise RefusedError(Refusal(Reason.NOT_ALLOWED, detail))
        return {"job": self.jobs_.start("release", self._quick, uid=caller.uid).id}

    def explain(self, caller, subject):
        self._see(caller)
        if subject == "wait":
            self.hanging.release()
            assert self.let_go.wait(10)
        if subject == "defect":
            raise ZeroDivisionError("secret path /usr/lib/y.py")
        return {"subject": subject, "lines": ["root asked", "batch paid"], "records": [RECORD]}

    def audit(self, caller, since, subject):
        self._see(caller)
        return [RECORD | {"body": {"since": since, "subject": subject}}]

    def audit_verify(self, caller, head):
        self._see(caller)
        broken = head == "ff"
        return {
            "whole": not broken, "records": 1, "head": "aa", "problem": "cut off" if broken else "",
        }  # fmt: skip

    def drift(self, caller):
        self._see(caller)
        return [DIFFERENCE]

    def drift_repair(self, caller):
        self._see(caller)
        return {"job": self.jobs_.start("repair", lambda *_: {"steps": ["pin"]}).id}

    def job(self, caller, job):
        self._see(caller)
        return self.jobs_.get(job).to_json()

    def jobs(self, caller):
        self._see(caller)
        return [j.to_json() for j in self.jobs_.all()]

    def job_cancel(self, caller, job):
        self._see(caller)
        found = self.jobs_.get(job)
        found.cancelled.set()
        return found.to_json()

    def health(self, caller):
        self._see(caller)
        return {
            "version": "0.1.0", "libvirt": {"uri": "x:///", "version": "9.0.0", "connected": True},
            "state_dir": "/x", "uptime_s": 1.0, "generation": 17, "alerts": [], "residues": [],
        }  # fmt: skip

    def subscribe(self, listener):
        return self.notices.subscribe(listener)

    def close(self):
        self.let_go.set()
        self.jobs_.close()


async def serve(address):
    agent = LittleAgent()
    service = Service(agent, address)
    await service.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    await service.close()
    agent.close()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1]))
