"""CXL memory tried without any: the command beside `virtfabricd --simulate`, as in docs/memory.md.

One agent for all of them: each test leaves it as it found it.
"""

from __future__ import annotations

import json

import pytest

from virtfabric.cli.main import main


@pytest.fixture
def run(simulated, capsys):
    def call(*args):
        code = main(["--bus", simulated, *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def found(run, *args):
    code, out, err = run(*args, "--json")
    assert code == 0, err
    return json.loads(out)


def test_what_there_is(run):
    code, out, _ = run("memory")
    assert code == 0
    for words in ("region0", "0x1000000000", "0x103", "cxl"):
        assert words in out
    memory = found(run, "memory")
    assert [(n["node"], n["tier"], n["region"]) for n in memory["nodes"]] == [
        (0, "dram", None), (1, "cxl", "region0"),
    ]  # fmt: skip
    assert [m["region"] for m in memory["memdevs"]] == ["region0", None, None, None]


def test_cxl_memory_for_a_guest_and_back(run):
    code, out, err = run("allocate", "cache", "--memory", "+512M", "--tier", "cxl")
    assert code == 0, err
    assert "CXL memory 512MiB" in out
    code, _, err = run("memory", "region", "destroy", "region0")
    assert code == 3
    assert "guests use it: cache has 512MiB" in err
    (grant,) = found(run, "grants")
    assert run("release", grant["id"])[0] == 0
    code, out, _ = run("memory", "region", "destroy", "region0")
    assert (code, out.splitlines()[0]) == (0, "region0 is gone")
    code, _, err = run("allocate", "cache", "--memory", "+512M", "--tier", "cxl")
    assert code == 3
    assert "no memory of tier cxl" in err
    code, out, err = run(
        "memory", "region", "create", "--window", "0x1000000000", "--memdev", "0x100"
    )
    assert (code, out.splitlines()[:2]) == (
        0, ["region0: 1GiB", "  node 1: 1GiB may be granted"],
    ), err  # fmt: skip


def test_memory_of_a_node_called_home_before_its_region_goes(run):
    assert run("allocate", "cache", "--memory", "+512M", "--tier", "cxl")[0] == 0
    code, out, _ = run("memory", "reclaim", "1", "--detach", "--dry-run")
    assert (code, out.splitlines()) == (
        0,
        [
            "node 1: 512MiB of 512MiB can be asked for (dry run, nothing changed)",
            "  cache: 512MiB by virtio-mem ua-virtfabric-cxl1 (node 1) within 30 s, then the "
            "device is detached",
        ],
    )
    code, out, _ = run("memory", "reclaim", "1", "--size", "128M")
    assert code == 0
    assert out.splitlines()[0] == "node 1: 128MiB of 128MiB came home"
    code, out, err = run("memory", "reclaim", "1", "--detach", "--deadline", "20s")
    assert (code, out.splitlines()) == (
        0,
        [
            "node 1: 384MiB of 384MiB came home", "  cache: 384MiB of 384MiB came home",
            "  cache: ua-virtfabric-cxl1 is detached",
        ],
    ), err  # fmt: skip
    assert found(run, "grants") == []
    assert found(run, "memory", "reclaim", "1")["result"]["asked"] == 0
    code, _, err = run("memory", "reclaim", "0")
    assert (code, "node: 0 is of DRAM; the CXL nodes of the host are: 1" in err) == (3, True)
    code, _, err = run("memory", "reclaim", "one")
    assert (code, "node" in err) == (2, True)


def test_a_region_of_two_memdevs(run):
    members = ("--memdev", "0x102", "--memdev", "0x101")
    create = ("memory", "region", "create", "--window", "decoder0.2", *members)
    code, out, _ = run(*create, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "host: create CXL region of 0x101, 0x102 in window 0x3000000000, 2GiB",
        "host: memory of CXL region of 0x101, 0x102 in window 0x3000000000 offline -> movable",
    ]
    assert len(found(run, "memory")["regions"]) == 1
    code, out, err = run(*create)
    assert code == 0, err
    assert out.splitlines()[:2] == ["region1: 2GiB", "  node 2: 2GiB may be granted"]
    assert "CXL memory 2GiB" in run("allocate", "cache", "--memory", "+2G", "--tier", "cxl")[1]
    (grant,) = found(run, "grants")
    assert run("release", grant["id"])[0] == 0
    code, out, err = run("memory", "region", "destroy", "region1", "--json")
    assert code == 0, err
    assert json.loads(out)["result"]["region"] == "region1"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--memdev", "0x100"), 3, "memdev 0x100 is part of region0"),
        (("--memdev", "zero"), 2, "write it like 0x100"),
        (("--memdev", "0x102", "--ways", "2"), 2, "but 1 memdevs are named"),
        (("--memdev", "0x102", "--size", "9G"), 3, "its share would be 9GiB"),
    ],
)
def test_what_cannot_be_says_why(run, options, code, words):
    found_code, _, err = run("memory", "region", "create", "--window", "decoder0.1", *options)
    assert (found_code, words in err) == (code, True), err
