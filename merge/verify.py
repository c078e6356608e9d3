"""The proof of a merge that trusts none of it: logits of the merged model beside those of base and live adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

# Several scripts, digits, code and a think/answer turn, so that different rows of the embedding take part.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "12345 + 67890 = 80235",
    "今天天气很好，我们去公园散步。",
    "<think>\nTwo and two.\n</think>\n<answer>\n4\n</answer>",
)
_EXACT = 1e-5  # of the largest logit, or absolute for small ones


class VerificationError(ArithmeticError):
    """The merged model does not say what base and adapters say; the message holds the difference."""


def compare(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    merged: Path,
    *,
    exact: bool,
    prompts: Path | None = None,
    trust_remote_code: bool = False,
) -> float:
    """The largest difference of logits, computed in fp32 on the CPU; it is printed with the adapters' own effect.

    ``merged`` is a folder with a tokenizer, unless the model has none: then fixed token numbers are used. Raises
    VerificationError above 1e-5 when the merge is ``exact`` (stored in fp32), or when a logit is not finite; ValueError
    when there are no prompts or the live model cannot hold all adapters at once.
    """
    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts else list(PROMPTS)
    if not any(texts):
        raise ValueError(f"--prompts {prompts}: holds no prompt")
    model = _load(base, trust_remote_code)
    batches = _tokens(merged, [text for text in texts if text], int(model.get_input_embeddings().weight.shape[0]))
    before = _logits(model, batches)
    wanted = _logits(_live(model, adapters, weights), batches)
    del model
    got = _logits(_load(merged, trust_remote_code), batches)
    difference = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
    effect = max(float((a - b).abs().max()) for a, b in zip(before, wanted, strict=True))
    largest = max(float(logits.abs().max()) for logits in wanted)
    print(
        f"verify: logits of {len(batches)} prompts differ by at most {difference:.2e} from base + live adapter, which moves "
        f"them by {effect:.2e}; the largest is {largest:.2e}"
    )
    if not all(logits.isfinite().all() for logits in got):
        raise VerificationError("--verify: the merged model gives logits that are not finite")
    if exact and difference > _EXACT * max(1.0, largest):
        raise VerificationError(
            f"--verify: the logits differ by {difference:.2e}, more than {_EXACT:.0e}; nothing was published"
        )
    return difference


def _load(folder: Path, trust_remote_code: bool) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
    ).eval()


def _live(model: Any, adapters: Sequence[Path], weights: Sequence[float]) -> Any:
    """The base with all adapters active at once, each times its weight."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    live = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        live.load_adapter(folder, adapter_name=name)
    if live.modules_to_save and (len(adapters) > 1 or weights[0] != 1):
        raise ValueError("--verify: PEFT has no live model of several adapters, or a weighted one, with whole modules")
    cast("Any", live.base_model).set_adapter(names)
    for module in live.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return live.eval()


def _tokens(folder: Path, texts: Sequence[str], vocabulary: int) -> list[torch.Tensor]:
    """Each prompt as token numbers [1, length]."""
    if not (folder / "tokenizer_config.json").is_file():
        print("verify: the model has no tokenizer; fixed token numbers are used as prompts")
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (1, 16), generator=generator) for _ in texts]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


def _logits(model: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids).logits for ids in batches]
