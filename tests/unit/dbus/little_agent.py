"""A small agent with fixed answers, real jobs and real notices; also a program: ADDRESS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time

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

DB, BATCH = "0b9c0d3e-0000-4000-8000-000000000001", "0b9c0d3e-0000-4000-8000-000000000002"
GIB = 1 << 30


class SystemClock:
    def now(self):
        return time.time()

    def monotonic(self):
        return time.monotonic()


def _guest(uuid, name, priority, placement, cpus):
    return {
        "uuid": uuid, "name": name, "state": "running", "managed": True, "policy_error": "",
        "priority": priority, "placement": placement,
        "cpu": {
            "reservation": 1000, "grant": 2000, "limit": 4000, "floor": 1000, "vcpus_online": 2,
            "vcpus_max": 4, "quota": -1,
        },
        "memory": {
            "reservation": GIB // 2, "grant": GIB, "limit": 4 * GIB, "floor": GIB // 2,
            "current": GIB, "mechanism": "virtio-mem",
        },
        "cpus": cpus, "busy": False, "job": None, "residues": [],
    }  # fmt: skip


GUESTS = [_guest(BATCH, "batch", 10, "shared", ""), _guest(DB, "db", 90, "dedicated", "2-3")]
HOST = {
    "host_id": "h1",
    "cpus": [
        {
            "cpu": n, "node": n // 2, "socket": 0, "core": n // 2,
            "siblings": [n // 2 * 2, n // 2 * 2 + 1],
            "role": "dedicated" if n > 1 else "pool", "guest": "db" if n > 1 else None,
            "vcpu": n - 2 if n > 1 else None, "isolated_by": None,
        }
        for n in range(4)
    ],
    "pool": "0-1", "housekeeping": "0",
    "memory": [
        {"node": n, "total": 8 * GIB, "free": 4 * GIB, "grantable": 2 * GIB} for n in (0, 1)
    ],
    "capacity": {"cpu_milli": 4000, "memory": 6 * GIB, "reserve": GIB // 4},
    "free": {"cpu": 1000, "memory": GIB}, "unmanaged": ["legacy"],
}  # fmt: skip
GRANT = {
    "id": "g1", "guest": DB, "name": "db", "amounts": {"cpu": 1000}, "request": "r1",
    "since": 1.7e9, "expires": None,
}  # fmt: skip
LOAN = {
    "id": "l1", "grant": "g1", "victim": BATCH, "victim_name": "batch", "borrower": DB,
    "borrower_name": "db", "amounts": {"cpu": 1000}, "since": 1.7e9,
}  # fmt: skip
PORTS = {
    "free": 1,
    "ports": [
        {
            "index": 1, "model": "pcie-root-port", "address": "0000:00:02.0", "hotplug": True,
            "free": False, "users": ["hostdev 0000:3b:10.1"],
        },
        {
            "index": 2, "model": "pcie-root-port", "address": "0000:00:02.1", "hotplug": True,
            "free": True, "users": [],
        },
    ],
}  # fmt: skip
POLICY = {
    "priority": 90, "admission": "lax", "drift": "report",
    "cpu": {
        "reservation": 1000, "limit": 4000, "shares": 100, "placement": "dedicated",
        "smt": "prefer",
    },
    "memory": {
        "reservation": GIB // 2, "limit": None, "shares": 100, "tiers": ["dram"],
        "escalate": "press", "growth": "virtio-mem",
    },
    "devices": [],
}  # fmt: skip
DEVICE = {
    "address": "0000:3b:10.1", "ids": "8086:10ca", "class": "020000", "driver": "vfio-pci",
    "node": 0, "group": 12, "pf": "0000:3b:00.0", "vfs": [], "vfs_max": 0,
    "link": {"speed": 8000, "width": 4, "speed_max": 8000, "width_max": 4}, "resets": ["flr"],
    "acs": None, "uses": [], "capability": "net.vf", "holder": None,
    "quarantine": {
        "address": "0000:3b:10.1", "why": "it could not be reset", "remedy": "power cycle it",
        "since": 1.7e9, "found": {},
    },
    "obstacles": [], "shares": [], "interfaces": [], "parent": None, "bridge": False,
}  # fmt: skip
RECORD = {
    "sequence": 1, "at": 1.7e9, "kind": "request.granted", "subjects": ["r1"], "body": {},
    "mac": "aa",
}  # fmt: skip
DIFFERENCE = {
    "guest": DB, "name": "db", "what": "vcpu 0 affinity", "intended": "2", "found": "0-3",
    "policy": "report",
}  # fmt: skip
RESULT = {
    "request": "r1", "grant": "g1", "delta": {"cpu": 1000},
    "paid": [{"guest": BATCH, "name": "batch", "amounts": {"cpu": 1000}}], "returned": [],
    "residues": [], "considered": ["batch: pays 1"], "steps": ["batch: cap at 1 CPU"],
    "took_s": 0.1, "agent_s": 0.01,
}  # fmt: skip
PLAN = {
    "decision": {
        "request": "r1", "guest": DB, "generation": 17, "delta": {"cpu": 1000}, "from_free": {},
        "takes": [{"victim": BATCH, "amounts": {"cpu": 1000}}], "returns": [], "holdings": {},
        "considered": [
            {
                "guest": BATCH, "name": "batch", "resource": "cpu", "verdict": "pays",
                "priority": 10, "held": 2000, "floor": 1000, "pays": 1000,
            }
        ],
    },
    "steps": [{"text": "batch: cap at 1 CPU", "data": {"kind": "set-quota"}}],
    "offers": [{"text": "beside its node", "chosen": True}], "generation": 17,
    "devices": [
        {
            "guest": DB, "name": "db", "capability": "net.vf", "address": "0000:3b:10.1",
            "shares": [
                {
                    "address": "0000:3b:10.2", "what": "group", "driver": "vfio-pci",
                    "holder": "batch", "uses": [],
                }
            ],
        }
    ],
}  # fmt: skip


MEMORY = {
    "nodes": [
        {
            "node": 1, "tier": "cxl", "cpus": "", "total": 268435456, "free": 268435456,
            "offlinable": True, "why_not_offlinable": "", "distances": {"0": 20, "1": 10},
            "huge_pages": [
                {"size": 2097152, "total": 8, "free": 3, "reserved": 1, "made": {"db": 4}}
            ], "bandwidth": 0,
            "latency": 0, "region": "region0",
        }
    ],
    "windows": [
        {
            "name": "decoder0.0", "base": "0x150000000", "size": 2147483648, "free": 1879048192,
            "ram": True, "pmem": True, "ways": 1, "granularity": 0, "targets": ["port1"],
        }
    ],
    "regions": [
        {
            "name": "region0", "window": "0x150000000", "base": "0x150000000",
            "size": 268435456, "mode": "ram", "ways": 1, "granularity": 0, "members": ["0x100"],
            "committed": True, "ours": False, "problems": [],
            "dax": [
                {
                    "name": "dax0.0", "size": 268435456, "node": 1, "state": "online",
                    "movable": True,
                }
            ],
        }
    ],
    "memdevs": [
        {
            "name": "mem0", "serial": "0x100", "ram": 268435456, "pmem": 0, "node": 0,
            "address": "0000:41:00.0", "port": "port1", "firmware": "1", "health": "ok",
            "poison": [{"offset": 0, "length": 64, "source": "Internal"}], "region": "region0",
            "usable": True, "problems": [],
        }
    ],
    "ports": [
        {
            "name": "port1", "kind": "host bridge", "parent": None, "device": "pci0000:40",
            "decoders": 4,
        }
    ],
    "quarantine": [
        {
            "subject": "0x100", "fault": "poison", "why": "memdev 0x100 is poisoned: 64B at 0x0",
            "since": 1.0, "region": "CXL region of 0x100 in window 0x150000000", "nodes": [1],
            "remedy": "when it is sane: virtfabric memory release 0x100",
        }
    ],
    "problems": ["memdev 0x100 (mem0): poisoned 64B at 0x0 (internal)"],
}  # fmt: skip


PLAN_OF_REGION = {"steps": [{"text": "host: create it", "data": {}}], "generation": 17}


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
