"""Before any rank is started: are all nodes there, alike and able to talk? What is wrong is told at once, in one table.

Two questions go to all nodes in parallel, in the way in which the run would start there: what each has and sees
(``node_probe.py``), then an all-reduce over those that answered (``link_probe.py``). Nothing is left on any node.
"""

import glob
import json
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from ..storage.installed import installed
from ..train.arguments import read_flags
from .advice import advice
from .connect import Launcher, Ssh, Start, starts
from .findings import Row, clock, judge, judge_links, summary, table
from .launch import say
from .node_job import Job
from .node_probe import Asked, Report, look

Mode = Literal["only", "on", "off"]
EXIT_UNFIT = 2
_LIMIT = 15.0  # seconds for all of it, when torch is imported as fast as it should be
_ANSWER, _CONNECT = 10.0, 5  # seconds in which a node answers, and ssh connects
_LINKS = 10.0  # seconds for the all-reduce, at least half of it
_IMPORT = 60.0  # seconds for torch: from a cold network disk it takes its time, which is no fault
_END = 3.0  # seconds in which a probe that has answered ends
# The flags whose values every node reads.
_READ = (
    "model_name_or_path",
    "tokenizer_name_or_path",
    "config_name",
    "train_data_file",
    "eval_data_file",
    "init_from_checkpoint",
    "resume_from_checkpoint",
    "chat_template",
    "deepspeed",
)


@dataclass(slots=True)
class Preflight:
    """The check of a job's nodes. ``here`` and ``launcher`` are those of the run; ``room`` is as in ``Asked``."""

    job: Job
    output_dir: str
    here: int | None
    launcher: Launcher
    ssh: Ssh
    room: Sequence[tuple[str, str, int]] = ()
    links: bool = True
    answer: float = _ANSWER
    rows: list[Row] = field(default_factory=list[Row])
    reports: dict[int, Report] = field(default_factory=dict[int, Report])

    def run(self, *, only: bool) -> int:
        """0 when all is well, else 2; what is wrong is told, with ``only`` also what is well. Raises NodesError."""
        began = time.monotonic()
        asked = self._asked()
        self._ask(asked)
        self.rows += judge(self.job, asked, self.reports, installed()["code"])
        names = [
            f"--{flag} {value}: a name on the Hub, which each node looks up" for flag, value in named(self.job.argv)
        ]
        self.rows += [Row(node, "data", name) for name in names for node in self.reports]
        if self.links:
            self._measure(max(_LINKS / 2, min(_LINKS, _LIMIT - (time.monotonic() - began))))
        return self._tell(time.monotonic() - began, only=only)

    def run_here(self, *, only: bool) -> int:
        """``run`` for this node alone, where the others are started by hand; they compare themselves when they meet."""
        began, asked = time.monotonic(), self._asked()
        number = self.here or 0
        self.reports[number] = look(self.job, number, asked)
        self.rows += judge(self.job, asked, self.reports, installed()["code"])
        return self._tell(time.monotonic() - began, only=only)

    def _asked(self) -> Asked:
        output = str(Path(self.output_dir).absolute())
        mark = f".preflight-{secrets.token_hex(8)}"
        room = [(flag, str(Path(path).absolute()), need) for flag, path, need in self.room]
        if not any(flag == "output_dir" for flag, _, _ in room):
            room.insert(0, ("output_dir", output, 0))
        return Asked(read_paths(self.job.argv), room, output, mark, self.answer)

    def _tell(self, seconds: float, *, only: bool) -> int:
        wrong = [row for row in self.rows if row.advice]
        hosts = [host for host, _ in self.job.nodes]
        show = print if only else say
        if only or wrong:
            show(table(self.rows if only else wrong, hosts))
        count = f"{len(hosts)} nodes" if len(hosts) > 1 else "1 node"
        if wrong:
            show(
                f"preflight: {len(wrong)} problem{'s' * (len(wrong) > 1)} on {count}, {seconds:.1f} s; nothing was started"
            )
            return EXIT_UNFIT
        alone = f"node {self.here} of " if len(self.reports) < len(hosts) else ""
        links = next((f"{row.found}, " for row in self.rows if row.check == "link"), "")
        has = summary(next(iter(self.reports.values())).installed)
        show(f"preflight: {alone}{count}, all well: {has}, {links}{seconds:.1f} s")
        return 0

    def _ways(self, job: Job, here: int | None, module: str) -> list[Start]:
        """How the nodes are asked: pdsh's by ssh, each with words of its own, and with pdsh's words for ssh."""
        if self.launcher != "pdsh":
            return starts(job, here, self.launcher, replace(self.ssh, patience=_CONNECT), module)
        more = tuple(os.environ.get("PDSH_SSH_ARGS_APPEND", "").split())
        return starts(job, here, "ssh", replace(self.ssh, patience=_CONNECT, more=more), module)

    def _ask(self, asked: Asked) -> None:
        """Ask every node what it has; those that do not answer become rows."""
        job = replace(self.job, argv=[json.dumps(asdict(asked))], mark=_mark())
        talk = _Talk(job, self._ways(job, self.here, "finebridge.finetune.node_probe"))
        spoken: dict[int, float] = {}
        try:
            for number, words, when in talk.hear(time.monotonic() + self.answer):
                node = int(words.get("node", -1))
                if "ready" in words:
                    spoken[node] = time.time()
                    talk.speak(number, node)
                elif "time" in words:
                    half = (when - spoken[node]) / 2
                    self.rows.append(clock(node, words["time"] - spoken[node] - half, half))
                elif "report" in words:
                    self.reports[node] = Report(**words["report"])
                    talk.answered.add(number)
                    if len(self.reports) == len(job.nodes):
                        break
        finally:
            talk.close()
        self.reports = dict(sorted(self.reports.items()))
        for node in range(len(job.nodes)):
            if node not in self.reports:
                reached = "it was reached, but gave no answer" if node in spoken else "no answer"
                self.rows.append(self._silent(talk, node, f"{reached} within {self.answer:.0f} s"))

    def _silent(self, talk: "_Talk", node: int, silence: str) -> Row:
        """Why a node did not answer."""
        code, said = talk.end_of(node)
        if code is None:
            return Row(
                node, "answer", silence, "something hangs there: a network disk, a stopped process? log in and look"
            )
        if known := advice(said):
            return Row(node, *known)
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), f"exit code {code}")
        return Row(node, "start", last, f"a process that runs {sys.executable} must start there; try it by hand")

    def _measure(self, limit: float) -> None:
        """The all-reduce over the nodes that answered."""
        nodes = list(self.reports)
        unnamed = self.launcher == "srun" and len(nodes) < len(self.job.nodes)  # which would start all of them
        bound_to_fail = any(row.check == "interface" and row.advice for row in self.rows)
        if len(nodes) < 2 or unnamed or bound_to_fail:  # noqa: PLR2004 - a link has two ends
            return
        gpu = all(report.gpus for report in self.reports.values())
        first = nodes[0] == 0 and not self.reports[0].port and not any(r.master for r in self.reports.values())
        words = [json.dumps({"gpu": gpu, "limit": limit})]
        job = replace(self.job, argv=words, mark=_mark(), nodes=[self.job.nodes[node] for node in nodes])
        if not first:
            job = replace(job, master=job.nodes[0][0], port=self.reports[nodes[0]].free_port)
        here = nodes.index(self.here) if self.here in nodes else None
        talk = _Talk(job, self._ways(job, here, "finebridge.finetune.link_probe"))
        heard: dict[int, list[dict[str, Any]]] = {}
        ready = dict.fromkeys(range(len(nodes)), False)
        try:
            for number, news, _ in talk.hear(time.monotonic() + _IMPORT):
                if news:
                    ready[int(news["node"])], talk.at[int(news["node"])] = True, number
                if not news or all(ready.values()):
                    break
            if all(ready.values()):
                for node in ready:
                    talk.speak(talk.at[node], node)
                for _, news, _ in talk.hear(time.monotonic() + limit + 1):
                    heard.setdefault(int(news.get("node", -1)), []).append(news)
        finally:
            talk.close()
        if all(ready.values()):
            leads = next((report.leads for report in self.reports.values()), "")
            self.rows += [replace(row, node=nodes[row.node]) for row in judge_links(job, heard, leads, gpu)]
        for node, came in ready.items():
            if not came:
                row = self._silent(talk, node, f"torch was not imported within {_IMPORT:.0f} s")
                self.rows.append(replace(row, node=nodes[node], check="torch"))


class _Talk:
    """The probes on all nodes: what they write behind the job's mark is heard, what is said reaches them as lines."""

    def __init__(self, job: Job, ways: Sequence[Start]) -> None:
        self._mark = job.mark.encode()
        self._ways = ways
        self.at: dict[int, int] = {}  # node -> its start
        self.answered: set[int] = set()  # starts that have nothing to do but to end
        self._news: queue.SimpleQueue[tuple[int, dict[str, Any] | None, float]] = queue.SimpleQueue()
        self._said = [tempfile.TemporaryFile() for _ in ways]  # noqa: SIM115 - closed by ``close``
        self._texts = [""] * len(ways)
        self._codes: list[int | None] = [None] * len(ways)
        self._open = len(ways)
        self._processes = [self._start(way, said) for way, said in zip(ways, self._said, strict=True)]
        for number, process in enumerate(self._processes):
            threading.Thread(target=self._read, args=(number, process), daemon=True).start()
        for process in self._processes:
            self._write(process, job.encode())

    def _start(self, way: Start, said: IO[bytes]) -> subprocess.Popen[bytes]:
        env = {**os.environ, **way.env}
        return subprocess.Popen(  # noqa: S603 - an argument list, no shell
            way.command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )

    def hear(self, until: float) -> Iterator[tuple[int, dict[str, Any], float]]:
        """The number of a start, what one of its nodes tells, and when that came; nothing is told by one that has ended.

        It goes on until all have ended, or ``until``.
        """
        while self._open and (left := until - time.monotonic()) > 0:
            try:
                number, words, when = self._news.get(timeout=left)
            except queue.Empty:
                return
            self._open -= words is None
            yield number, words or {}, when

    def speak(self, number: int, node: int) -> None:
        """Say a node's number to it."""
        self._write(self._processes[number], str(node))

    def close(self) -> None:
        """End all probes: those that have answered do so themselves when they see the end of their input."""
        ended = [process.poll() for process in self._processes]
        for process in self._processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        until = time.monotonic() + _END
        for number, process in enumerate(self._processes):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()) if number in self.answered else 0.0)
            if process.poll() is None:
                process.kill()
                process.wait()
            self._codes[number] = ended[number]
            with self._said[number] as said:
                said.seek(0)
                self._texts[number] = said.read().decode(errors="replace")

    def end_of(self, node: int) -> tuple[int | None, str]:
        """The exit code of a node's start, None when it had not ended by itself, and its errors."""
        number = next(number for number, way in enumerate(self._ways) if node in way.nodes)
        return self._codes[number], self._texts[number]

    def _write(self, process: subprocess.Popen[bytes], text: str) -> None:
        if process.stdin is not None:
            with suppress(OSError):  # one that has ended is found by its end
                process.stdin.write(f"{text}\n".encode())
                process.stdin.flush()

    def _read(self, number: int, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is not None:
            for line in process.stdout:
                _, mark, words = line.partition(self._mark)
                if mark:
                    with suppress(ValueError):  # cut short
                        self._news.put((number, json.loads(words), time.time()))
        process.wait()
        self._news.put((number, None, 0.0))


def read_paths(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> the files and folders that a run reads, absolute. A name that is none here is one on the Hub, or shipped."""
    values = read_flags(list(argv))
    found: dict[str, list[str]] = {}
    for flag in _READ:
        parts = [part.strip() for part in str(values.get(flag, "")).split(",")]
        files = [file for part in parts if part for file in _files(part)]
        if files:
            found[flag] = list(dict.fromkeys(files))
    return found


def named(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Flag and value of a model or tokenizer that is no path here."""
    values, found = read_flags(list(argv)), read_paths(argv)
    flags = ("model_name_or_path", "tokenizer_name_or_path")
    return [(flag, str(values[flag])) for flag in flags if flag in values and flag not in found]


def _files(name: str) -> list[str]:
    """What a value names: itself, what fits its ``*``, or Megatron's pair of token files."""
    pair = [f"{name}.bin", f"{name}.idx"]
    several = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else pair  # noqa: PTH207 - may begin at the root
    found = [name] if Path(name).exists() else several
    return [str(Path(path).absolute()) for path in found if Path(path).exists()]


def _mark() -> str:
    return f"\x1e{secrets.token_hex(8)} "
