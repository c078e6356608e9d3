"""Shared parts of the tests: tiny real tokenizers and models, and ranks that run the real trainer."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: small tensors gain nothing from threads, and ranks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # spawned ranks import the helper modules by name
sys.path.insert(1, str(ROOT / "tests" / "distributed"))

from rank_runner import RankRunner  # noqa: E402 - found through the line above

CONTROL_TOKENS = {
    "hunyuan_dense": [
        "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "<｜hy_pad｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>",
        "<｜hy_place▁holder▁no▁3｜>",
    ],
    "hunyuan_a13b": ["<|startoftext|>", "<|eos|>", "<|pad|>", "<|extra_0|>", "<|extra_4|>"],
    "hy3": [
        f"<｜{name}:opensource｜>"
        for name in ("hy_begin_of_sentence", "hy_eos", "hy_pad", "hy_User", "hy_Assistant", "reasoning_mode")
    ],
    "qwen3": ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"],
    "chatml": ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"],
}  # fmt: skip
PLAIN_TOKENS = {"hy3": ["<think:opensource>", "</think:opensource>"], "qwen3": ["<think>", "</think>"]}


def train_tokenizer(template: str) -> Any:
    """A byte-level BPE tokenizer with the control tokens of one shipped template: (bos, eos, pad, others)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = CONTROL_TOKENS[template]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the answer to what you think is an answer\n\n<think>\n</think>\n<answer>"] * 3, trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=control[0], eos_token=control[1], pad_token=control[2]
    )
    tokenizer.add_tokens(PLAIN_TOKENS.get(template, []))
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers_by_template() -> dict[str, Any]:
    return {name: train_tokenizer(name) for name in CONTROL_TOKENS}


def messages_file(path: Path, count: int = 24) -> Path:
    """A small training file; answers differ in length, so that batches are padded."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            answer = f"<think>\n\n</think>\n<answer>\n{2 * number}{'!' * (number % 7)}\n</answer>"
            row = [
                {"role": "user", "content": f"/no_think{number}+{number}="},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": row}) + "\n")
    return path


TINY = {
    "hunyuan_v1_dense": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    "hunyuan_v1_moe": {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_experts": 4, "moe_topk": 2,
    },
    "qwen3": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    "qwen3_moe": {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def tiny_model(model_type: str, tokenizer: Any, **changes: Any) -> Any:
    """A model of a transformers type with random weights, fp32, about 20 k parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TINY[model_type],
        **changes,
    )
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def zero_settings(name: str, folder: Path) -> Path:
    """A shipped DeepSpeed setting with the persistence threshold at 0: a tiny model is never partitioned otherwise."""
    from finebridge.ds_configs.resolve import FOLDER

    settings = json.loads((FOLDER / f"{name}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    return path


def load_weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of saved tiny models by model type, each with the Hunyuan dense tokenizer and template beside it."""
    folder = tmp_path_factory.mktemp("models")

    def get(model_type: str) -> Path:
        from finebridge.data_tools.templates import ChatTemplate

        target = folder / model_type
        if not target.exists():
            tokenizer = train_tokenizer("hunyuan_dense")
            ChatTemplate(tokenizer, "hunyuan_dense")
            tiny_model(model_type, tokenizer).save_pretrained(target)
            tokenizer.save_pretrained(target)
        return target

    return get


@pytest.fixture(scope="session")
def listed_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its own code, its experts in a list, and a router that starves ranks; see remote_moe.py."""
    from finebridge.data_tools.templates import ChatTemplate
    from remote_moe import write_listed_moe

    tokenizer = train_tokenizer("hunyuan_dense")
    ChatTemplate(tokenizer, "hunyuan_dense")
    return write_listed_moe(tmp_path_factory.mktemp("listed") / "listed_moe", tokenizer)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return messages_file(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def ranks() -> RankRunner:
    """Runs the real ``finebridge.train.sft`` on one or more gloo ranks; see RankRunner."""
    return RankRunner()


@pytest.fixture
def zero(tmp_path: Path) -> Callable[..., Path]:
    """Shipped ZeRO settings by stage, every parameter partitioned: a tiny model would not be by default."""

    def make(stage: int | str, name: str = "no_offload") -> Path:
        from finebridge.ds_configs.resolve import FOLDER

        settings = json.loads((FOLDER / f"ds_zero{stage}_{name}.json").read_text())
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = tmp_path / f"zero{stage}_{name}.json"
        path.write_text(json.dumps(settings))
        return path

    return make


@pytest.fixture
def history() -> Callable[[Path], list[dict[str, Any]]]:
    """The logged steps of a finished run."""

    def read(output_dir: Path) -> list[dict[str, Any]]:
        state = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))
        return [entry for entry in state["log_history"] if "loss" in entry]

    return read


@pytest.fixture(scope="session")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faults/inject.c, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the fault injector needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("inject") / "inject.so"
    source = ROOT / "tests" / "faults" / "inject.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def trials(injector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Callable[..., Any]]]:
    """``trials("script.py")`` starts a script of this folder under the injector; what it gives asks it, by JSON lines."""
    children: list[subprocess.Popen[str]] = []

    def start(script: str) -> Callable[..., Any]:
        log = tmp_path_factory.mktemp("trials") / "log"
        with log.open("w") as stream:
            child = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
                env={**os.environ, "LD_PRELOAD": str(injector)},
            )  # fmt: skip
        children.append(child)
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(**request: Any) -> Any:
            print(json.dumps(request), file=child.stdin, flush=True)
            answer = child.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
            assert answer, log.read_text()[-3000:]
            return json.loads(answer)

        return ask

    yield start
    for child in children:
        child.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        child.wait(30)
