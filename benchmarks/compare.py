"""What several ways of one thing cost beside one another: models to do it on, fresh processes, medians, a CSV.

A script gives its ways to ``run``. They run in turn, each time in a process of its own: that imports what the way needs,
removes what the way before wrote, syncs, reads what the ways read, and only then begins, so that every way starts with the
same free memory, the same page cache and nothing to be written back. Wall and CPU seconds are of the work, those of imports
stand beside them. Memory is the peak of the process's anonymous memory, seen from outside every 5 ms, whatever the process
does meanwhile; mapped files are not counted, as the system may take them back at any time.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from load_memory import MIB, memory
from results import add_rows, circumstances

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16},
    "0.5GB": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 15, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 64},
    "1.5GB": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128},
    "8GB": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 19, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
FIGURES = ("wall_s", "cpu_s", "import_wall_s", "import_cpu_s", "peak_anonymous_mib")


class Way(NamedTuple):
    """What is done with a folder that holds ``base``, its result being ``out``; the modules that are imported before.

    ``check`` looks at the result, outside what is measured.
    """

    work: Callable[[Path], object]
    modules: Sequence[str] = ()
    check: Callable[[Path], object] | None = None


def copy(folder: Path) -> None:
    """The base's folder, copied."""
    shutil.copytree(folder / "base", folder / "out")


def copy_fsync(folder: Path) -> None:
    """The same, and on the device when it ends."""
    copy(folder)
    for path in [*(folder / "out").iterdir(), folder / "out"]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


COPIES = {"copy": Way(copy), "copy_fsync": Way(copy_fsync)}


def build(name: str, folder: Path) -> Any:
    """Write ``base``, a model with random bf16 weights in files of at most 2 GB; the model without storage.

    No more than one file is in memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", vocab_size=32000, tie_word_embeddings=False, **MODELS[name])
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder / "base")
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(_shards(model.state_dict()), 1):
        weight_map |= dict.fromkeys(shapes, f"model-{number:05d}.safetensors")
        save_random(shapes, torch.bfloat16, folder / "base" / f"model-{number:05d}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return model


def _shards(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{}]
    for key, tensor in tensors.items():
        if sum(other.nbytes for other in parts[-1].values()) + tensor.nbytes > 2 * 10**9:
            parts.append({})
        parts[-1][key] = tensor
    return parts


def save_random(shapes: Mapping[str, Any], dtype: Any, path: Path) -> None:
    """A safetensors file of random matrices and the ones of norms, in the shapes of these tensors."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    made = {key: torch.ones(tensor.shape, dtype=dtype) for key, tensor in shapes.items()}
    for tensor in made.values():
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
    save_file(made, path, {"format": "pt"})


def run(
    csv: Path, ways: Mapping[str, Way], prepare: Callable[[str, Path], object], *, beside: Sequence[str],
    models: Sequence[str], peer: tuple[str, Sequence[str]] = ("", ()), argv: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """The command line: measure the ways on every model, print, add lines to the CSV.

    ``prepare`` writes what a model's ways read; ``beside`` names the ways that all are compared with; ``models`` are
    measured unless told; ``peer`` is another interpreter and packages of it whose versions are noted. The script
    that calls this is the one that is run again for every measurement.
    """
    parser = argparse.ArgumentParser(Path(sys.argv[0]).name, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models, help="default %(default)s")
    parser.add_argument("--large", action="store_true", help="the model of 8 GB too")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write; default a temporary folder. Not one in memory")
    parser.add_argument("--csv", type=Path, default=csv, help="the file to add to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        _one(ways[args.one[0]], Path(args.one[1]))
        return
    common = circumstances(("torch", "transformers", "peft", "safetensors", "xxhash"), *peer)
    for name in dict.fromkeys([*args.models, *["8GB"] * args.large]):
        with tempfile.TemporaryDirectory(dir=args.out) as work:
            prepare(name, Path(work))
            size = sum(path.stat().st_size for path in (Path(work) / "base").iterdir())
            medians = _medians(ways, args.rounds, Path(work))
        rows = [
            {
                **common,
                "model": name,
                "bytes": size,
                "rounds": args.rounds,
                "way": way,
                **_rounded(medians, way, beside),
            }
            for way in ways
        ]
        for row in rows:
            print({key: value for key, value in row.items() if key not in (*common, "bytes", "rounds")}, flush=True)
        add_rows(args.csv, rows)


def _one(way: Way, folder: Path) -> None:
    """One measurement, in this process: print its seconds as JSON."""
    imports = _seconds(lambda: [importlib.import_module(module) for module in way.modules])
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    for path in folder.rglob("*"):
        _read(path)
    work = _seconds(lambda: way.work(folder))
    print("RESULT " + json.dumps(dict(zip(FIGURES, (*work, *imports), strict=False))))


def _read(path: Path) -> None:
    """Have a file in the page cache, where it fits: the way before may have driven it out."""
    if path.is_file():
        with path.open("rb") as stream:
            while stream.read(2**20):
                pass


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _measure(way: str, folder: Path) -> dict[str, float]:
    """One measurement, in a process of its own, whose memory is looked at from here."""
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(
            [sys.executable, sys.argv[0], "--one", way, str(folder)], stdout=told, stderr=subprocess.STDOUT
        )
        peak = 0
        while child.poll() is None:
            peak = max(peak, memory(child.pid)[0])
            time.sleep(0.005)
        told.seek(0)
        text = told.read()
    if child.returncode:
        sys.exit(f"error: {way} failed\n{text}")
    return {**json.loads(text.rpartition("RESULT ")[2]), "peak_anonymous_mib": peak / MIB}


def _medians(ways: Mapping[str, Way], rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Each way's figures, the ways being measured in turn."""
    told: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, results in told.items():
            results.append(_measure(way, folder))
            if check := ways[way].check:
                check(folder)
    return {
        way: {figure: statistics.median(each[figure] for each in results) for figure in FIGURES}
        for way, results in told.items()
    }


def _rounded(medians: Mapping[str, Mapping[str, float]], way: str, beside: Sequence[str]) -> dict[str, float]:
    """A way's figures, and what they are to those of the ways ``beside``."""
    own = medians[way]
    figures = {figure: round(own[figure], 2) for figure in FIGURES}
    for other in beside:
        figures[f"wall_to_{other}"] = round(own["wall_s"] / medians[other]["wall_s"], 2)
        figures[f"cpu_to_{other}"] = round(own["cpu_s"] / medians[other]["cpu_s"], 2)
    last = beside[-1]
    return {**figures, f"peak_to_{last}": round(own["peak_anonymous_mib"] / medians[last]["peak_anonymous_mib"], 3)}
