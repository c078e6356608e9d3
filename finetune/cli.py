"""The command ``finebridge``, a verb a stage. Importing it is light: each verb imports what it needs when it runs."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from .. import __version__
from ..storage.space import EXIT_DISK_FULL, is_disk_full

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

_HELP = f"""finebridge {__version__}: fine-tune Hugging Face language models, HF Trainer on DeepSpeed

usage: finebridge VERB ...          finebridge VERB --help tells more

  run [recipe.yaml] [key=value] [--flag value]
                      the whole way: raw data and any weights to a trained, merged, exported model; what stands is reused,
                      --dry_run shows the plan. The word may be left out
  sft [recipe.yaml] [key=value] [--flag value]
                      the training alone: supervised, full or LoRA, on this machine's GPUs or its CPU
  pretrain [recipe.yaml] [key=value] [--flag value]
                      the same on plain text or Megatron's .bin/.idx, for new models (--config_name) or trained ones
  plan MODEL --gpus N --gpu_memory GIB [--flag value]
                      what each ZeRO stage needs and takes, and which flags to use; needs no GPU and no weights
  report OUTPUT_DIR   write report.html and loss.png of a run anew
  merge               merge a LoRA adapter into its base model, offline; merge extract
  convert             checkpoints between Hugging Face and Megatron-Core; convert inspect|verify
  checkpoint verify PATH ...
                      prove that checkpoints, merges or prepared data are whole
  checkpoint consolidate CHECKPOINT
                      full weights from the fp32 masters of ZeRO
  data build FILE     tokenise data once, ahead of training
  data check FILE     prove the masks and show statistics, before any GPU is used
  data preview FILE   show what of each row is trained, token by token
  data sample MIXTURE the rows that a mixture of sources takes, written to a dated folder
  data export|import  files of MindSpeed-LLM, Pai-Megatron-Patch, AutoAlign and Megatron-LM
  cache list|verify|prune
                      prepared data, converted weights and leftovers: look at them, prove them, remove them
  nodes setup         does ssh reach all nodes without a password? What is missing is shown as commands
  example             the built-in example: a tiny model learns arithmetic, then answers

bash finetune/finetune.sh without arguments runs the example, with arguments: finebridge ARGUMENTS
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; exit code 0, 2 for bad input, or that of the first rank that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in _VERBS and (
        words[0].startswith("--") or words[0].endswith((".yaml", ".yml")) or "=" in words[0]
    ):
        words.insert(0, "run")
    verb = _VERBS.get(words[0])
    if verb is None:
        print(f"error: unknown verb {words[0]!r}; known are {', '.join(_VERBS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        return verb(words[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:  # a folder that cannot be written, a disk that is full
        print(f"error: {error.filename or words[0]}: {error.strerror or error}", file=sys.stderr)
        return EXIT_DISK_FULL if is_disk_full(error) else EXIT_BAD_INPUT


def _run(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        return _train_help("run")
    from .run import run

    _stop_like_ctrl_c()
    return run(words)


def _sft(words: list[str]) -> int:
    return _train("sft", words)


def _pretrain(words: list[str]) -> int:
    return _train("pretrain", words)


def _train(verb: str, words: list[str]) -> int:
    """Check everything that can be checked without torch, then start the ranks."""
    if words and words[0] in ("-h", "--help"):
        return _train_help(verb)
    from .run import train

    _stop_like_ctrl_c()
    return train(verb, words)


def _train_help(verb: str) -> int:
    from ..train.arguments import HF_DEFAULTS, own_flags
    from ..train.hf_flags import hf_flags
    from .arguments import RUN_FLAGS
    from .cluster import NODE_FLAGS

    print(f"finebridge {verb} [recipe.yaml ...] [key=value ...] [--flag value ...]\n")
    for name, entry in RUN_FLAGS.items():
        if verb == "run" or entry.metadata["verb"] != "run":
            print(f"  --{name} (default {entry.default})\n      {entry.metadata['help']}")
    for name, text in NODE_FLAGS.items():
        if name not in RUN_FLAGS:
            print(f"  --{name} {text}")
    for name, (kind, default, text) in own_flags().items():
        plain = kind.removeprefix("<class '").removesuffix("'>").replace("typing.", "")
        print(f"  --{name} ({plain}, default {default})\n      {text}")
    print("\nand every flag of transformers' TrainingArguments:")
    for flag in hf_flags().values():
        print(f"  --{flag.name} (default {HF_DEFAULTS.get(flag.name, flag.default)})", flush=True)
    return 0


def _plan(words: list[str]) -> int:
    from .plan import main as plan

    return plan(words)


def _merge(words: list[str]) -> int:
    _stop_like_ctrl_c()
    if words[:1] == ["extract"]:
        from ..merge.extract import main as extract

        return extract(words[1:])
    from ..merge.merge_lora import main as merge

    return merge(words)


def _convert(words: list[str]) -> int:
    from ..bridge.convert_cli import main as convert

    _stop_like_ctrl_c()
    return convert(words)


def _checkpoint(words: list[str]) -> int:
    from ..train.checkpoint_cli import main as checkpoint

    return checkpoint(words)


def _report(words: list[str]) -> int:
    from ..train.report import main as report

    return report(words)


def _data(words: list[str]) -> int:
    verb = _DATA_VERBS.get(words[0]) if words else None
    usage = f"finebridge data {'|'.join(_DATA_VERBS)} ...; each tells more with --help"
    if words and words[0] in ("-h", "--help"):
        print(usage)
        return 0
    if verb is None:
        raise ValueError(usage)
    module, name = verb
    _stop_like_ctrl_c()
    return import_module(f"..data_tools.{module}", __package__).__dict__[name](words[1:])


def _cache(words: list[str]) -> int:
    from .cache import main as cache

    _stop_like_ctrl_c()
    return cache(words)


def _nodes(words: list[str]) -> int:
    from .setup_nodes import main as nodes

    return nodes(words)


def _stop_like_ctrl_c() -> None:
    """From now on SIGTERM does what Ctrl-C does: nothing half-written stays."""
    with suppress(ValueError):  # not in a thread that is not the first one
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _example(words: list[str]) -> int:
    from .example import main as example

    return example(words)


_DATA_VERBS = {
    "build": ("build", "main"),
    "check": ("check", "main"),
    "preview": ("preview", "main"),
    "sample": ("sample", "main"),
    "export": ("layouts_cli", "export_main"),
    "import": ("layouts_cli", "import_main"),
}
_VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "sft": _sft,
    "pretrain": _pretrain,
    "plan": _plan,
    "report": _report,
    "merge": _merge,
    "convert": _convert,
    "checkpoint": _checkpoint,
    "data": _data,
    "cache": _cache,
    "nodes": _nodes,
    "example": _example,
}


if __name__ == "__main__":
    sys.exit(main())
