"""Attention that keeps packed samples apart, and the proof on the model that is about to train.

==================== ===== ==== =================================================================================
implementation       CPU   CUDA how it learns where samples begin (transformers 5.23)
==================== ===== ==== =================================================================================
packed (ours)        tests yes  ``cu_seq_lens_*`` and ``max_length_*``; the work is that of the samples alone
sdpa, eager          yes   yes  a block mask from ``position_ids``; its size is the square of the row's tokens
flex_attention       no    yes  a sparse block mask from ``position_ids``; torch has no backward pass for the CPU
flash_attention_2/3  no    yes  as packed
==================== ===== ==== =================================================================================

On CUDA devices ``packed_attention`` takes the model's place where it can; the others are what the model came with.
Whatever is used, the proof below is made on the model of the run.

The masks are built only when the batch has no ``attention_mask`` and the model no cache
(``transformers.masking_utils._preprocess_mask_arguments``); with either, samples read one another and nothing says so.
What else mixes tokens (linear attention, state spaces, convolutions) mostly knows no borders. No list of names can hold
all that, so the model itself is asked before the first step.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..data_tools.collator import FlatteningCollator
from ..data_tools.dataset import Item
from . import runtime
from .moe import moe_blocks
from .packed_attention import NAME, AttentionError

_KEPT, _OTHER = 11, 7  # tokens: odd, so that no border falls together with a kernel's block
_STRAYING = 0.2  # of the largest value: above what rounding in bf16 adds up to over all layers
_ROUNDING = 0.05  # of the largest value: above what bf16 rounding moves in one MoE block


def takes_borders(model: Any) -> bool:
    """Whether the model's attention is told the samples' borders by ``cu_seq_lens_*``, as it gets no mask.

    True for FlashAttention and for implementations that transformers makes no mask for.
    """
    name = str(model.config._attn_implementation)  # noqa: SLF001 - transformers has no public name for it
    return "flash" in name or name not in ALL_MASK_ATTENTION_FUNCTIONS


def check_trainable(model: Any, device: torch.device, say: Callable[[str], None] = print) -> None:
    """Refuse an implementation that cannot train on this device, and tell of a slow one. Raises AttentionError."""
    name = str(model.config._attn_implementation)  # noqa: SLF001
    if name == "flex_attention" and device.type == "cpu":
        raise AttentionError("flex_attention has no backward pass on a CPU; use sdpa, which is the default")
    if name in ("sdpa", "eager") and device.type != "cpu":
        say(
            f"attention: {name} looks at the whole row for every token of a packed row and masks the other samples; "
            "better is for CUDA GPUs and models that follow the contract of FlashAttention in transformers"
        )


def check_isolation(model: Any, device: torch.device, cure: str = "leave --packing out") -> None:
    """Prove that no sample of a pack reads another one: change the others and compare this one's outputs bit by bit.

    Two forward passes of one row of 25 tokens, through the collator that training uses. Every rank must call it: under
    ZeRO-3 a forward is collective. The model comes back in the mode it had; no random number is drawn.
    Raises AttentionError, which advises the ``cure``.
    """
    name = f"{type(model).__name__} with {model.config._attn_implementation}"  # noqa: SLF001
    vocabulary = int(model.config.get_text_config().vocab_size)
    logits: list[torch.Tensor] = []
    passed: list[list[torch.Tensor]] = [[], []]  # what the MoE blocks made of the kept sample, in both passes
    for shift in (0, 1):
        with at_rest(model, passed[shift]):
            try:
                output = _outputs(model, device, _row(vocabulary, shift))
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                raise AttentionError(f"packing: {name} does not take packed samples ({error}); {cure}") from error
        logits.append(_kept(output.logits))
    if not bool(torch.isfinite(logits[0]).all()):
        raise AttentionError(f"packing: {name} gives outputs that are not finite numbers, so nothing can be proven")
    moved = float((logits[0] - logits[1]).abs().max())
    if torch.equal(*logits):  # then the blocks were given the same, too
        moved = max((_share(*pair) for pair in zip(*passed, strict=True)), default=0.0)
        moved = moved if moved > _ROUNDING else 0.0
    if moved:
        raise AttentionError(
            f"packing: in {name} packed samples read one another (one sample's outputs moved by {moved:.2g} when only the "
            f"others were changed); {cure}"
        )


class IsolationProof(TrainerCallback):
    """Runs ``check_isolation`` when the engine stands and before the first step, on every rank alike."""

    def __init__(self, cure: str, *, only_flash: bool = False) -> None:
        self.cure, self.only_flash = cure, only_flash

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Prove it; where our own attention fails, go back to what the model came with. Raises AttentionError."""
        failure = None
        try:
            check_isolation(model, args.device, self.cure)
        except AttentionError as error:
            failure = error
        if not any(told := runtime.gather(failure and str(failure))):
            told = runtime.gather(_strays(model, args.device))
        why = next(filter(None, told), None)
        if why is None:
            return
        if self.only_flash or model.config._attn_implementation != NAME:  # noqa: SLF001
            raise failure or AttentionError(f"packing: {why}; {self.cure}")
        before = model.attention_before
        runtime.say(f"attention: {before} in place of our own: {why}")
        model.set_attn_implementation(before)
        check_isolation(model, args.device, self.cure)


def _row(vocabulary: int, shift: int) -> Item:
    """A pack of three samples; ``shift`` changes every token of the first and the last one."""
    rng = np.random.default_rng(0)
    lengths = np.array([_OTHER, _KEPT, _OTHER])
    ids = rng.integers(0, vocabulary, int(lengths.sum()))
    others = np.repeat([True, False, True], lengths)
    ids[others] = (ids[others] + shift * (1 + vocabulary // 3)) % vocabulary
    return {"input_ids": ids, "labels": ids.copy(), "lengths": lengths}


def _outputs(model: Any, device: torch.device, pack: Item) -> Any:
    """What the model makes of a pack, through the collator that training uses."""
    inputs = FlatteningCollator(borders=takes_borders(model))([pack])
    del inputs["labels"]
    return model(**{key: _on(device, value) for key, value in inputs.items()})


def _strays(model: Any, device: torch.device) -> str | None:
    """Why our own attention is not what the model came with; None when both give the same up to rounding.

    Compared is a sample within a pack, by ours, with the same alone, by the model's own: that may not keep samples apart.
    A model whose layers ask for something by a mask alone would lose it without a mask.
    """
    if model.config._attn_implementation != NAME:  # noqa: SLF001
        return None
    pack = _row(int(model.config.get_text_config().vocab_size), 0)
    ids = pack["input_ids"][_OTHER : _OTHER + _KEPT]
    with at_rest(model, []):
        ours = _kept(_outputs(model, device, pack).logits)
        model.set_attn_implementation(model.attention_before)
        try:
            alone = _outputs(model, device, {"input_ids": ids, "labels": ids, "lengths": np.array([_KEPT])}).logits[0]
        finally:
            model.set_attn_implementation(NAME)
    off = _share(ours, alone)
    return f"with it outputs are {off:.2g} away from those with {model.attention_before}" if off > _STRAYING else None


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _kept(values: torch.Tensor) -> torch.Tensor:
    """The rows of the sample in the middle, shape [11, width], of values with one row a token."""
    return values.reshape(-1, values.shape[-1])[_OTHER : _OTHER + _KEPT]


def _share(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((one.float() - other.float()).abs().max() / one.float().abs().max().clamp_min(1e-30))


@contextmanager
def at_rest(model: nn.Module, passed: list[torch.Tensor] | None = None) -> Generator[None]:
    """No dropout, no gradients, random numbers as they were, and with ``passed`` MoE blocks that hand on what they are given.

    An expert works on the tokens that all samples route to it. How many they are changes the shape of its matrix product
    and with that its rounding, though no sample reads another. So a block's own output for the kept sample goes into
    ``passed``, to be compared up to rounding, and everything else can be compared bit by bit. A block with a
    convolution is none of these: it mixes tokens, and its three-dimensional weight only looks like experts.
    """
    accelerator = torch.accelerator.current_accelerator()
    devices = [torch.accelerator.current_device_index()] if accelerator else []

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        cast("list[torch.Tensor]", passed).append(_kept(made))
        return (given, *output[1:]) if isinstance(output, tuple) else given

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"))
        for block in moe_blocks(model).values() if passed is not None else ():
            if not any(isinstance(part, nn.Conv1d) for part in block.modules()):
                stack.callback(block.register_forward_hook(hand_on, with_kwargs=True).remove)
        stack.callback(model.train, model.training)
        model.eval()
        yield
