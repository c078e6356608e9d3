"""One run as its flags describe it: what all stages need to know, and what a stage of the plan is."""

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..storage.publish import write_text
from ..train.arguments import build
from ..train.hf_flags import hf_value
from . import cluster
from .arguments import take
from .export import parse_export
from .launch import gpu_count
from .ledger import Ledger
from .preflight import read_paths
from .recipe import to_argv
from .restart import Course, Restarts
from .weights import start_of

_BESIDE = 20 * 10**6  # logs, tokenizer, states of random numbers: bytes at most, as a rule


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of the plan: what it makes of what, whether that stands, the command that does it alone, and how it is done.

    ``do`` verifies what stands and makes what does not; it returns the exit code of a command that failed, else None or 0.
    """

    stage: str
    what: str
    stands: bool
    do: Callable[[], int | None]
    command: str = ""

    def __str__(self) -> str:
        told = f"plan: {self.stage:<8}{'reuse' if self.stands else 'make '}  {self.what}"
        return f"{told}\n{'':<21}{self.command}" if self.command and not self.stands else told


class Job:
    """The checked flags of a run, the weights it starts from and the export it ends with. Raises ValueError for bad input.

    ``values`` are raw values by flag name, those of the launcher are taken out; ``verb`` is ``run``, ``sft`` or ``pretrain``.
    """

    def __init__(self, values: dict[str, Any], verb: str) -> None:
        self.run = take(values, verb)
        self.verb = self.run.stage if verb == "run" else verb
        values["dry_run"] = self.run.dry_run  # a flag of both; taken out again here
        self.where = cluster.take(values, os.environ, self.run.nproc_per_node, gpu_count)
        self.values = values
        self.args = build(values, "document" if self.verb == "pretrain" else "chat")
        self.output_dir = Path(self.args.hf["output_dir"])
        data = self.args.data
        self.cache = Path(data.prepared_data_dir) if data.prepared_data_dir else self.output_dir / "prepared_data"
        self.start = start_of(self.args, self.run)
        self.saves = str(hf_value(self.args.hf, "save_strategy")) != "no"
        self.export = parse_export(self.run.export_mcore) if self.run.export_mcore else None
        self.ledger = Ledger(self.output_dir, self.cache)
        self._check()

    def _check(self) -> None:
        model = self.args.model
        named = model.model_name_or_path or model.config_name
        if self.run.enable_hf2mg_convert and (self.start.model is None or self.start.megatron):
            raise ValueError(f"--enable_hf2mg_convert is from a Hugging Face folder, which {named} is not")
        if self.run.save_dtype and not model.use_lora:
            raise ValueError("--save_dtype is for LoRA; weights that were trained keep the dtype of the checkpoint")
        if self.run.output_prefix and self.args.data.use_dummy_data:
            raise ValueError("--output_prefix needs data; --use_dummy_data has none")
        if self.export and not self.saves:
            raise ValueError("--export_mcore needs a checkpoint; leave --save_strategy no out")
        if self.export and model.use_lora and self.start.model is None:
            raise ValueError(f"--export_mcore with --use_lora needs a folder as --model_name_or_path, not {named}")
        if self.run.max_restarts:
            self._check_restarts()

    def _check_restarts(self) -> None:
        where = self.where
        if where.remote and (where.by_hand or where.here is None):
            raise ValueError(
                "--max_restarts: it is for a launching machine that is one of the nodes (LOCAL_IP says which) and starts the "
                "others; whoever starts each node (--no_ssh) starts it again"
            )
        if self.run.elastic and not where.remote:
            raise ValueError("--elastic is for several nodes; this run has one")
        if self.run.elastic and where.here != 0:
            raise ValueError("--elastic: start the run on the first of the nodes, the one that cannot be left out")
        if self.args.hf.get("save_only_model"):
            raise ValueError("--max_restarts goes on from checkpoints with all state; leave --save_only_model out")

    @property
    def told_by_init(self) -> dict[str, str]:
        """The flags that ``--init_from_checkpoint`` stands for, when a run goes on from a checkpoint of its own."""
        model = self.args.model
        if not model.init_from_checkpoint:
            return {}
        names = ("use_lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target") if model.use_lora else ()
        return {name: str(getattr(model, name)) for name in ("model_name_or_path", *names)}

    @property
    def ranks(self) -> int:
        """How many there are, on all nodes."""
        return self.where.processes

    def preflight(self) -> int:
        """Check the nodes before work that costs time, their links too; 0 when all is well. Raises NodesError."""
        hidden = (
            ("load", "model_name_or_path") if self.start.megatron else ()
        )  # only this machine reads what it converts
        words = to_argv({name: value for name, value in self.values.items() if name not in hidden})
        code = self.where.check(words, str(self.output_dir), self._room())
        self.where = replace(self.where, measured=True)
        return code

    def start_ranks(self, argv: Sequence[str]) -> int:
        """Start the ranks of the training, here or on all nodes, and wait for them; the exit code. Raises NodesError."""
        module, out, grace = f"finebridge.train.{self.verb}", str(self.output_dir), self.run.stop_grace
        if not self.run.max_restarts:
            return self.where.run(module, argv, out, grace, self._room())
        hf = self.args.hf
        split = (
            int(hf_value(hf, "per_device_train_batch_size")),
            int(hf_value(hf, "gradient_accumulation_steps")),
        )
        course = Course(argv, self.output_dir, self.ranks, split, self.told_by_init)
        if not self.run.dry_run:
            course.check()
        restarts = Restarts(self.run.max_restarts, self.run.elastic, course)
        return self.where.run(module, argv, out, grace, self._room(), restarts)

    def _room(self) -> list[tuple[str, str, int]]:
        """What will be written: flag, path, and bytes, at least. The ranks reckon anew when they have the model."""
        trained = self.start.model if self.saves and not self.args.model.use_lora else None
        weights = sum(path.stat().st_size for path in trained.glob("*.safetensors")) if trained else 0
        states = (
            0 if self.args.hf.get("save_only_model") else 3 * weights
        )  # fp32 weights and Adam's two, of 32-bit ones
        read = read_paths(to_argv(self.values))
        rows = [Path(path) for flag in ("train_data_file", "eval_data_file") for path in read.get(flag, ())]
        tokens = 0 if self.cache.is_dir() else sum(path.stat().st_size for path in rows if path.is_file())
        return [
            ("output_dir", str(self.output_dir), weights + states + _BESIDE),
            ("prepared_data_dir", str(self.cache), tokens),
        ]

    @property
    def step(self) -> int | str:
        """The step at which the run ends, where its flags tell."""
        steps = self.args.hf.get("max_steps", 0)
        return steps if steps > 0 and not self.args.model.early_stopping_patience else "STEP"

    def say(self, text: str) -> None:
        """A line for the user, at once."""
        print(text, flush=True)

    def note_done(self, artifact: Path, recipe: str) -> None:
        """Leave the resolved recipe beside an artifact that has none; hidden, for the folder of a model is read as a whole."""
        path = artifact.with_name(f".{artifact.name}.recipe.yaml")
        if not path.exists():
            with suppress(OSError):  # a place that is only read, in which somebody else made it
                write_text(path, recipe)


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def command(verb: str, words: Sequence[str]) -> str:
    """A command line that can be pasted."""
    return f"finebridge {verb} {shlex.join(words)}"
