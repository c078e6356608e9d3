"""What the answers of the nodes mean, without any node."""

import pytest
from finebridge.finetune.findings import Row, clock, judge, judge_links, table
from finebridge.finetune.node_job import Job
from finebridge.finetune.node_probe import Asked, Report


def report(**words: object) -> Report:
    has = {"versions": {"Python": "3.11.7", "torch": "2.13.0"}, "code": {"a.py": "1"}}
    return Report(
        **{"installed": has, "visible": 0, "interfaces": {"eth0": ["10.0.0.1"]}, "leads": "eth0", "shares": 0, **words}
    )


JOB = Job("m", [], {}, [("a", 8), ("b", 8), ("c", 8)], "a", 29500, "/", "logs", 1.0)
ASKED = Asked({}, [], "/out", "mark", 1.0)


def wrong(reports: list[Report]) -> list[Row]:
    return [row for row in judge(JOB, ASKED, dict(enumerate(reports)), {"a.py": "1"}) if row.advice]


def test_the_odd_one_is_told_not_the_others() -> None:
    other = report(installed={"versions": {"Python": "3.11.7", "torch": "2.11.0"}, "code": {"a.py": "1"}})
    assert wrong([report()] * 3) == []
    (row,) = wrong([other, report(), report()])
    assert (row.node, row.check, row.found) == (0, "version", "torch 2.11.0, not 2.13.0")
    (row,) = wrong(
        [report(), report(installed={"versions": {"Python": "3.11.7", "torch": "2.13.0"}, "code": {}}), report()]
    )
    assert (row.node, row.check, row.found) == (1, "code", "finebridge's files differ: a.py")


def test_disks_of_one_device_share_their_room() -> None:
    both = [{"flag": flag, "path": f"/{flag}", "need": 60, "disk": 1, "free": 100, "writable": True} for flag in "xy"]
    (row,) = wrong([report(room=both), report(), report()])
    assert row.found == "--x /x, --y /y: 0.1 kB free, at least 0.1 kB needed"
    apart = [{**both[0]}, {**both[1], "disk": 2}]
    assert wrong([report(room=apart), report(), report()]) == []
    (row,) = wrong([report(room=[{**both[0], "writable": False}]), report(), report()])
    assert row.found == "--x /x cannot be written there"


@pytest.mark.parametrize(
    ("words", "check", "found"),
    [
        ({"folder": "No such file"}, "folder", "/: No such file"),
        ({"master": "Name or service not known"}, "name", "a does not resolve there"),
        ({"port": "taken by process 7: x"}, "port", "29500: taken by process 7: x"),
        ({"gpu_error": "driver mismatch"}, "GPU", "nvidia-smi: driver mismatch"),
        ({"named": {"NCCL_SOCKET_IFNAME": ["ib"]}}, "interface", "NCCL_SOCKET_IFNAME names ib"),
        ({"named": {"NCCL_SOCKET_IFNAME": ["=eth"]}}, "interface", "NCCL_SOCKET_IFNAME names eth,"),
        ({"shares": 1}, "shared", "--output_dir /out"),
    ],
)
def test_what_a_node_says_of_itself(words: dict[str, object], check: str, found: str) -> None:
    well = report(visible=8)
    rows = wrong([well, report(visible=8, **words), well])
    assert [(row.node, row.check) for row in rows] == [(1, check)]
    assert found in rows[0].found
    assert wrong([well, report(visible=8, named={"NCCL_SOCKET_IFNAME": ["et"]}), well]) == []


def test_the_way_to_a_node_and_back_is_no_clock_that_is_wrong() -> None:
    assert not clock(0, 6.0, 2.0).advice
    assert clock(0, 8.0, 2.0).found == "8 s ahead of this machine's"
    assert clock(0, -61.0, 0.1).found == "61 s behind this machine's"


def spoken(speeds: dict[tuple[int, int], float]) -> dict[int, list[dict[str, object]]]:
    """What nodes tell of an all-reduce that went well."""
    return {
        node: [{"met": True}]
        + [{"pair": list(pair), "speed": speed} for pair, speed in speeds.items() if pair[0] == node]
        + [{"done": True, "speed": 1e9}]
        for node in range(3)
    }


def test_links() -> None:
    every = {(0, 1): 2e9, (1, 2): 2e9, (2, 0): 2e9}
    assert not any(row.advice for row in judge_links(JOB, spoken(every), "eth0", False))
    (row,) = [row for row in judge_links(JOB, spoken({**every, (1, 2): 1e8, (2, 0): 2e8}), "eth0", True) if row.advice]
    assert (row.node, row.found) == (2, "0.2 GB/s to its neighbours, 2 GB/s elsewhere")
    assert "NCCL_SOCKET_IFNAME" in row.advice
    all_slow = judge_links(JOB, spoken(dict.fromkeys(every, 5e6)), "eth0", False)
    assert [row.node for row in all_slow if row.advice] == [0, 1, 2]
    away = {
        0: [{"failed": "wait", "why": "timed out"}],
        1: [{"failed": "wait", "why": "timed out"}],  # for node 2
        2: [{"failed": "connect", "why": "no route"}],
    }
    (row,) = judge_links(JOB, away, "eth0", False)
    assert (row.node, row.found) == (2, "no way to a port 29500: no route")
    taken = {0: [{"failed": "listen", "why": "in use"}], 1: [{"failed": "connect", "why": "timed out"}]}
    (row,) = judge_links(JOB, taken, "eth0", False)
    assert (row.node, row.check, row.found) == (0, "port", "29500: in use")
    rows = judge_links(JOB, {**spoken(every), 1: [{"met": True}, {"failed": "link", "why": "refused"}]}, "eth0", False)
    assert {(row.found, row.check) for row in rows} == {("gloo: refused", "network")}


def test_equal_rows_are_one() -> None:
    text = table([Row(0, "x", "well"), Row(1, "x", "well"), Row(1, "y", "bad", "mend it")], ["one", "two"])
    lines = text.splitlines()
    assert lines[1].split() == ["two", "y", "bad", "mend", "it"]
    assert lines[2].split() == ["all", "2", "x", "well", "-"]
