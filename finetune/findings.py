"""What the answers of the nodes mean: a row for all that was looked at, with what to do where something is wrong."""

import re
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..storage.installed import Installed, differences, different_code
from .node_job import Job
from .node_probe import Asked, Report

_CLOCK = (
    5.0  # seconds that a clock may differ: more than any network takes, less than what confuses logs and certificates
)
_IN_USE = 0.1  # the share of a GPU's memory that others may have
_SLOW_LINK, _TOO_SLOW = 8, 10**7  # how many times slower than the others; bytes a second that no training can live with
_WIDTHS = (22, 12, 44, 62)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``advice`` is empty when all is well. ``node`` is the number of one of the job's nodes."""

    node: int
    check: str
    found: str
    advice: str = ""


def judge(job: Job, asked: Asked, reports: Mapping[int, Report], code: Mapping[str, str]) -> list[Row]:
    """What the nodes have; ``code`` are the hashes of this machine's finebridge."""
    rows: list[Row] = []
    wanted = _wanted(reports, code)
    made = [report.shares for report in reports.values() if report.shares is not None]
    shares = _common(made) if made else 0
    gpus = any(report.gpus or report.gpu_error for report in reports.values())
    for node, report in reports.items():
        rows += _installed(node, report.installed, wanted)
        rows += _start(node, report, job)
        rows += _gpu(node, report, job.nodes[node], needed=gpus)
        rows += _network(node, report)
        rows += _disk(node, report)
        if report.shares is not None:
            found = f"--output_dir {asked.output}"
            advice = f"choose a folder that all nodes share; {job.nodes[shares][0]} has another one"
            rows += [Row(node, "shared", found, "" if report.shares == shares else advice)]
    for flag, paths in asked.paths.items():
        for path in paths:
            rows += _path(f"--{flag} {path}", {node: report.paths[path] for node, report in reports.items()})
    return rows


def clock(node: int, offset: float, uncertain: float) -> Row:
    """How far a node's clock is from this machine's, in seconds, half the way to it and back being ``uncertain``."""
    if abs(offset) - uncertain <= _CLOCK:
        return Row(node, "clock", f"within {_CLOCK:.0f} s of this machine's")
    found = f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
    return Row(node, "clock", found, "set the clocks by NTP (chronyc tracking, timedatectl); date shows who is wrong")


def judge_links(job: Job, words: Mapping[int, Sequence[Mapping[str, Any]]], leads: str, gpu: bool) -> list[Row]:
    """What the all-reduce tells, of nodes that all came to it. ``leads`` is the interface between them."""
    every, backend = range(len(job.nodes)), "nccl" if gpu else "gloo"
    variable = "NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME"
    failed = {node: told for node in every for told in words.get(node, ()) if "failed" in told}
    if failed.get(0, {}).get("failed") == "listen":
        return [Row(0, "port", f"{job.port}: {failed[0]['why']}", "give another --master_port")]
    away = [node for node in every[1:] if failed.get(node, {}).get("failed") == "connect"]
    if away:
        advice = "all ports between the nodes must be open (a firewall?); is --master_addr what this node can reach?"
        return [
            Row(node, "network", f"no way to {job.master} port {job.port}: {failed[node]['why']}", advice)
            for node in away
        ]
    done = [told for node in every for told in words.get(node, ()) if "done" in told]
    if len(done) < len(every):
        why = next((told["why"] for told in failed.values()), "the exchange of data did not end in time")
        advice = f"all ports between the nodes must be open; export {variable}={leads or 'the interface between them'}"
        silent = [node for node in every if not any("met" in told for told in words.get(node, ()))]
        return [Row(node, "network", f"{backend}: {why}", advice) for node in silent or every]
    pairs = [(told["pair"], float(told["speed"])) for node in every for told in words[node] if "pair" in told]
    best = {node: max(speed for pair, speed in pairs if node in pair) for node in every}
    usual = statistics.median_high(best.values())
    links = dict.fromkeys((_speed(min(best.values())), _speed(usual)))
    speeds = f"{backend}: all-reduce {_speed(done[0]['speed'])}, links {' to '.join(links)}"
    rows: list[Row] = []
    for node, speed in best.items():
        slow = speed < usual / _SLOW_LINK
        found = f"{_speed(speed)} to its neighbours" + (f", {_speed(usual)} elsewhere" if slow else "")
        advice = f"look at its cable and port (ethtool {leads}), and at {variable}, which may name a slow interface"
        rows.append(Row(node, "link", found, advice) if slow or speed < _TOO_SLOW else Row(node, "link", speeds))
    return rows


def table(rows: Iterable[Row], hosts: Sequence[str]) -> str:
    """The rows as text, equal ones of several nodes as one, what is wrong first."""
    merged: dict[tuple[str, str, str], list[int]] = {}
    for row in sorted(rows, key=lambda row: not row.advice):
        merged.setdefault((row.check, row.found, row.advice), []).append(row.node)
    lines = [_line("node", "check", "found", "what to do")]
    for (check, found, advice), nodes in merged.items():
        lines.append(_line(_names(sorted(nodes), hosts), check, found, advice or "-"))
    return "\n".join(lines)


def _wanted(reports: Mapping[int, Report], code: Mapping[str, str]) -> Installed:
    """What most nodes have, of two the first; the code is that of the launching side, which tells them what to do."""
    every = [report.installed["versions"] for report in reports.values()]
    names = dict.fromkeys(name for versions in every for name in versions)
    return {
        "versions": {name: _common(versions.get(name, "") for versions in every) for name in names},
        "code": dict(code),
    }


def _installed(node: int, has: Installed, wanted: Installed) -> list[Row]:
    changed = different_code(has["code"], wanted["code"])
    rows = [
        Row(node, "code", text, "bring the same code to all nodes (git pull there), or share one folder")
        for text in changed
    ]
    rows += [
        Row(node, "version", text, f"install the same there ({sys.executable} -m pip install), or share one folder")
        for text in differences(has, wanted)
        if text not in changed
    ]
    return rows or [Row(node, "version", f"{summary(has)}; {len(has['code'])} files of code")]


def summary(has: Installed) -> str:
    """The versions that people ask for."""
    return ", ".join(f"{name} {has['versions'][name]}" for name in ("Python", "torch") if has["versions"].get(name))


def _start(node: int, report: Report, job: Job) -> list[Row]:
    """What the launcher of the ranks needs."""
    rows: list[Row] = []
    if report.folder:
        rows.append(
            Row(node, "folder", f"{job.folder}: {report.folder}", "every node needs the same working directory")
        )
    if report.master:
        found = f"{job.master} does not resolve there: {report.master}"
        rows.append(Row(node, "name", found, "give the first node's address, or --master_addr"))
    if report.port:
        rows.append(Row(node, "port", f"{job.port}: {report.port}", "end that, or give another --master_port"))
    return rows


def _gpu(node: int, report: Report, named: tuple[str, int], *, needed: bool) -> list[Row]:
    host, slots = named
    if report.gpu_error:
        advice = "the driver does not work there; nvidia-smi must list the GPUs"
        return [Row(node, "GPU", f"nvidia-smi: {report.gpu_error}", advice)]
    if needed and slots > report.visible:
        advice = f"write {host}:{report.visible} (--nproc_per_node), or look for the others with nvidia-smi there"
        return [Row(node, "GPU", f"{slots} processes, but {report.visible} GPUs", advice)]
    rows: list[Row] = []
    for number, gpu in enumerate(report.gpus[:slots]):
        if gpu["used"] > _IN_USE * gpu["total"]:
            users = ", ".join(gpu["users"]) or "a process that cannot be seen from there"
            found = f"GPU {number}: {gpu['used'] / 1024:.0f} of {gpu['total'] / 1024:.0f} GiB in use by {users}"
            rows.append(Row(node, "GPU memory", found, "end that process or wait for it, or choose other GPUs"))
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu["name"] for gpu in report.gpus).items())
    return rows or [Row(node, "GPU", names or "none")]


def _network(node: int, report: Report) -> list[Row]:
    rows: list[Row] = []
    usable = [name for name, addresses in report.interfaces.items() if addresses]
    for variable, names in report.named.items():
        for name in names:
            plain = name.removeprefix("=")
            if not any(has == plain if name[0] == "=" else has.startswith(plain) for has in usable):
                found = f"{variable} names {plain}, which is not there or has no address"
                way = (
                    f"{report.leads} leads to the other nodes"
                    if report.leads
                    else "none is known to lead to the others"
                )
                advice = f"{way}; there are {', '.join(usable)}: export {variable}={report.leads or 'one of them'}"
                rows.append(Row(node, "interface", found, advice))
    return rows or [Row(node, "interface", report.leads or "not known")]


def _disk(node: int, report: Report) -> list[Row]:
    rows: list[Row] = []
    disks: dict[int, list[dict[str, Any]]] = {}
    for entry in report.room:
        disks.setdefault(entry["disk"], []).append(entry)
        if not entry["writable"]:
            found = f"--{entry['flag']} {entry['path']} cannot be written there"
            rows.append(Row(node, "disk", found, "give its folder to this user, or choose another"))
    for entries in disks.values():
        need, free = sum(entry["need"] for entry in entries), entries[0]["free"]
        flags = ", ".join(f"--{entry['flag']} {entry['path']}" for entry in entries)
        if need > free:
            found = f"{flags}: {_size(free)} free, at least {_size(need)} needed"
            rows.append(Row(node, "disk", found, "make room there, or choose another disk"))
        elif not rows:
            rows.append(Row(node, "disk", f"{flags}: room for {_size(need)}"))
    return rows


def _path(name: str, seen: Mapping[int, Mapping[str, Any]]) -> list[Row]:
    """One file or folder on all nodes."""
    there = {node: look for node, look in seen.items() if "error" not in look}
    advice = "bring it there under the same path, or to a folder that all share"
    rows = [Row(node, "data", f"{name}: {look['error']}", advice) for node, look in seen.items() if "error" in look]
    same = _common(look["hash"] for look in there.values()) if there else ""
    for node, look in there.items():
        if look["hash"] == same:
            rows.append(Row(node, "data", f"{name}: {_size(look['size'])}"))
            continue
        usual = next(other for other in there.values() if other["hash"] == same)
        found = f"{name} is not what the other nodes have: {_content(look)}, there {_content(usual)}"
        rows.append(Row(node, "data", found, "copy it anew, or use a folder that all share"))
    return rows


def _content(look: Mapping[str, Any]) -> str:
    return f"{look['files']} files, {look['size']:,} bytes, {look['hash'][:6]}"


def _common(values: Iterable[_T]) -> _T:
    """The most frequent value, of equally frequent ones the first."""
    return Counter(values).most_common(1)[0][0]


def _size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def _speed(count: float) -> str:
    return f"{count / 10**9:.2g} GB/s"


def _names(nodes: Sequence[int], hosts: Sequence[str]) -> str:
    if len(nodes) == len(hosts) > 1:
        return f"all {len(hosts)}"
    return ", ".join(hosts[node] for node in nodes)


def _line(*cells: str) -> str:
    """A row of columns, as many lines as its longest cell needs."""
    columns = [
        textwrap.wrap(re.sub(r"\s+", " ", cell), width) or [""] for cell, width in zip(cells, _WIDTHS, strict=True)
    ]
    height = max(map(len, columns))
    filled = [column + [""] * (height - len(column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True))
        for line in zip(*filled, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)
