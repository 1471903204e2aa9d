"""What the agent of these tests answers, in the shape that docs/dbus-api.md tells."""

from __future__ import annotations

DB, BATCH = "0b9c0d3e-0000-4000-8000-000000000001", "0b9c0d3e-0000-4000-8000-000000000002"
GIB = 1 << 30


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

CARD = {
    "serial": "C-1", "condition": "connected", "why": "", "boot": "b1", "software": "card 1",
    "adapter": {
        "cores": 8, "memory": 4 * GIB, "lanes": 16, "keys": 15, "bandwidth": 100000,
        "accelerators": {"crypto.aes": 4}, "site": "node:0",
    },
    "free": {"cores": 6, "memory": 3 * GIB, "lanes": 12, "accelerators": {"crypto.aes": 3}},
    "slices": 1, "promises": 0, "generation": 7,
}  # fmt: skip
SPEC = {
    "name": "aes", "cores": 2, "memory": GIB, "contiguous": False, "lanes": 4,
    "capability": "crypto.aes", "units": 1, "keys": 1,
    "qos": {"priority": 70, "bandwidth": 0, "reclaimable": True},
}  # fmt: skip
SLICE = {
    "id": "slice-1", "holder": DB, "request": "h1/req-1/0", "spec": SPEC, "seat": {},
    "card": "C-1", "known": True, "wish": "req-1.0", "holder_name": "db", "phase": "ready",
    "image": "aes-1",
}  # fmt: skip
HELD = {
    "key": "h1/req-1/0", "card": "C-1", "slice": "slice-1", "wish": "req-1.0",
    "part": {"name": "aes"}, "holder": DB,
}  # fmt: skip
