"""The flags that say what is trained and how, beyond what ``TrainingArguments`` says. Nothing here imports torch."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..storage.manifest import steps
from ..storage.megatron_folder import is_megatron
from ..storage.space import parse_size
from .drift import allowed_names
from .hf_flags import ArgumentsError
from .masters import MasterWeights

Normalization = Literal["token", "sequence", "batch"]
SpikePolicy = Literal["warn", "stop", "off"]

ADAPTER_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _arg(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class ModelArguments:
    """What is trained and how, beyond what ``TrainingArguments`` says. Raises ArgumentsError on contradictions."""

    model_name_or_path: str | None = _arg(None, "folder (or Hub name) of the model to fine-tune")
    tokenizer_name_or_path: str | None = _arg(None, "folder of the tokenizer; default: the model's")
    trust_remote_code: bool = _arg(False, "run the .py files that come with the model or tokenizer; read them first")
    cache_dir: str | None = _arg(None, "where downloads from the Hub are kept")
    use_flash_attn: bool = _arg(False, "only a FlashAttention kernel will do; an error where none is proven")
    use_lora: bool = _arg(False, "train a LoRA adapter; only the adapter is saved")
    lora_rank: int = _arg(64, "rank of the adapter")
    lora_alpha: float = _arg(8, "the adapter's update is scaled by lora_alpha / lora_rank")
    lora_dropout: float = _arg(0.0, "dropout before the adapter")
    lora_target: str = _arg("q_proj,k_proj,v_proj,o_proj", "modules to adapt, comma-separated, or all-linear")
    lora_experts: bool = _arg(False, "adapt the experts of MoE blocks too, fused or in a list; found by structure")
    train_attention_params_only: bool = _arg(False, "train only parameters whose name contains self_attn")
    train_only: str | None = _arg(None, "train only parameters whose name matches, comma-separated: *self_attn*,*norm*")
    freeze: str | None = _arg(None, "do not train parameters whose name matches, comma-separated: *embed_tokens*")
    make_moe_param_leaf_module: bool | None = _arg(
        None, "ZeRO-3: fetch each MoE block as a whole (leaf module); default: yes when the model has such blocks"
    )
    router_aux_loss_coef: float | None = _arg(
        None, "add the routers' balancing loss times this; 0 leaves it out; default: as the model's config says"
    )
    allow_missing: str | None = _arg(
        None, "weights that the checkpoint may lack (made at random), comma-separated patterns"
    )
    allow_unexpected: str | None = _arg(None, "tensors of the checkpoint that may go unused, comma-separated patterns")
    master_weights: MasterWeights = _arg(  # noqa: RUF009 - it makes a field
        "fp32",
        "with --bf16: fp32 masters beside bf16 weights, or none, with bf16_stochastic rounding or bf16_kahan sums",
    )
    fp8: bool = _arg(False, "multiply the decoder's matrices in fp8 (torchao; GPUs from compute capability 8.9 on)")
    loss_normalization: Normalization = _arg(  # noqa: RUF009 - it makes a field
        "token", "mean of a step's loss over its tokens, over its samples' means, or over its micro-batches' means"
    )
    loss_spike_policy: SpikePolicy = _arg(  # noqa: RUF009 - it makes a field
        "warn", "what to do when a loss is far over the last 50: warn, stop or off"
    )
    loss_spike_factor: float = _arg(3.0, "a loss over this many times the median of the last 50 steps is a spike")
    early_stopping_patience: int | None = _arg(
        None, "stop when --metric_for_best_model (eval_loss) has not improved for so many evaluations"
    )
    early_stopping_threshold: float = _arg(0.0, "how much better counts as improved")
    init_from_checkpoint: str | None = _arg(
        None, "start a new run from the weights (or the LoRA adapter) of this checkpoint folder, nothing else of it"
    )
    allow_drift: str | None = _arg(
        None,
        "names, comma-separated: resume although these differ from the checkpoint's run; a refused resume tells them",
    )
    tokens_per_micro_batch: str | None = _arg(
        None,
        "packed rows: cut a step's rows into micro-batches of at most so many tokens; the step stays the same; auto is 16384 on "
        "GPUs (default when --per_device_train_batch_size is not given)",
    )
    compile_layers: bool | None = _arg(
        None, "compile decoder layers where packed rows allow it; default: on CUDA GPUs, false leaves it out"
    )
    peak_tflops: float | None = _arg(
        None, "dense bf16 TFLOP/s of one device, which MFU is a share of; default: the maker's figure where it is known"
    )
    memory_budget_gib: float | None = _arg(
        None, "GiB of device memory that --gradient_checkpointing auto may fill; default: the device's, less 5 %"
    )
    min_lr: float = _arg(0.0, "absolute floor of the learning rate; must lie below --learning_rate")
    max_shard_size: str = _arg("5GB", "largest weight file of a checkpoint; each rank writes some of them")
    heartbeat_timeout: float = _arg(
        50.0, "seconds after which a rank that says nothing, or keeps the others waiting, ends the run; 0 is off"
    )
    config_name: str | None = _arg(
        None, "build a NEW model with random weights from this config.json, or of this transformers model type"
    )
    model_max_length: int | None = _arg(None, "only for --config_name: max_position_embeddings of the new model")
    hidden_size: int = _arg(2048, "only for --config_name")
    num_layers: int = _arg(24, "only for --config_name")
    num_attention_heads: int = _arg(16, "only for --config_name")
    num_key_value_heads: int = _arg(16, "only for --config_name")
    intermediate_size: int = _arg(8192, "only for --config_name")
    max_position_embeddings: int = _arg(2048, "only for --config_name; --model_max_length wins")
    vocab_size: int = _arg(
        50257, "only for --config_name, at least the tokenizer's; when not given the tokenizer's size"
    )
    type_vocab_size: int = _arg(1, "accepted and unused, as in the original")
    layer_norm_eps: float = _arg(1e-5, "only for --config_name: epsilon of the norms")
    moe_topk: int = _arg(4, "only for --config_name: experts a token goes to")
    num_experts: int = _arg(8, "only for --config_name: experts in an MoE block")
    num_shared_expert: int = _arg(1, "only for --config_name")
    use_cla: bool = _arg(False, "only for --config_name: cross-layer attention")
    cla_share_factor: int = _arg(2, "only for --config_name")
    use_mixed_mlp_moe: bool = _arg(False, "only for --config_name: a shared expert beside the routed ones")
    use_qk_norm: bool = _arg(False, "only for --config_name")
    tie_word_embeddings: bool = _arg(True, "only for --config_name")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "tokenizer_name_or_path"):
            check_model_path(f"--{name}", getattr(self, name))
        if self.model_name_or_path and self.config_name:
            raise ArgumentsError("--model_name_or_path (pretrained) and --config_name (a new model) exclude each other")
        if not (self.model_name_or_path or self.config_name):
            raise ArgumentsError("--model_name_or_path is missing: the folder of the model to fine-tune")
        if self.config_name and not self.tokenizer_name_or_path:
            raise ArgumentsError(
                "--config_name needs --tokenizer_name_or_path: a new model has no tokenizer of its own"
            )
        if self.use_lora and (self.train_only or self.freeze):
            flag = "train_only" if self.train_only else "freeze"
            raise ArgumentsError(f"--{flag} and --use_lora exclude each other: only the adapter is trained")
        if self.lora_experts and not self.use_lora:
            raise ArgumentsError("--lora_experts needs --use_lora")
        if self.train_only and self.train_attention_params_only:
            raise ArgumentsError("--train_attention_params_only is --train_only *self_attn*; give one of them")
        allowed_names(self.allow_drift)
        self._check_numbers()

    def _check_numbers(self) -> None:
        try:
            parse_size(self.max_shard_size)
        except ValueError as error:
            raise ArgumentsError(f"--max_shard_size: {error}") from None
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ArgumentsError("--lora_rank and --lora_alpha must be positive, --lora_dropout in [0, 1)")
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise ArgumentsError(f"--router_aux_loss_coef {self.router_aux_loss_coef:g}: 0 or more is expected")
        if self.loss_spike_factor <= 1:
            raise ArgumentsError(f"--loss_spike_factor {self.loss_spike_factor:g} must be over 1")
        tokens = self.tokens_per_micro_batch
        if tokens is not None and tokens != "auto" and not (tokens.isdecimal() and int(tokens)):
            raise ArgumentsError(f"--tokens_per_micro_batch {tokens}: a number of tokens, or auto, is expected")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ArgumentsError("--early_stopping_patience must be at least 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ArgumentsError(f"--peak_tflops {self.peak_tflops:g}: a positive number is expected")
        if self.memory_budget_gib is not None and not self.memory_budget_gib > 0:
            raise ArgumentsError(f"--memory_budget_gib {self.memory_budget_gib:g}: a positive number is expected")
        if not 0 <= self.heartbeat_timeout < float("inf"):
            raise ArgumentsError("--heartbeat_timeout: seconds are expected, 0 turns the watch off")


# Flags that describe a new model (--config_name); a pretrained one has its own config.
ARCHITECTURE = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings", "vocab_size": "vocab_size", "layer_norm_eps": "rms_norm_eps",
    "moe_topk": "moe_topk", "num_experts": "num_experts", "num_shared_expert": "num_shared_expert", "use_cla": "use_cla",
    "cla_share_factor": "cla_share_factor", "use_mixed_mlp_moe": "use_mixed_mlp_moe", "use_qk_norm": "use_qk_norm",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip


def check_model_path(flag: str, value: str | None, *, hub: bool = True) -> None:
    """Refuse a local path that does not exist and a folder that holds no model; with ``hub`` ``owner/name`` may be there.

    Raises ArgumentsError.
    """
    if value is None:
        return
    path = Path(value)
    if path.is_dir():
        if flag == "--tokenizer_name_or_path" or (path / "config.json").is_file():
            return
        if flag == "--model_name_or_path" and is_megatron(path):
            return  # the launcher converts it
        if (path / ADAPTER_CONFIG).is_file():
            raise ArgumentsError(
                f"{flag} {value}: an adapter; name its base here, and the adapter to --init_from_checkpoint"
            )
        inside = [folder for _, folder in steps(path)]
        hint = f"; did you mean {inside[0]}?" if inside else "; the folder of a model is expected"
        raise ArgumentsError(f"{flag} {value}: no config.json there{hint}")
    if path.exists():
        raise ArgumentsError(f"{flag} {value}: a file; the folder that holds it is expected")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    beside = len(path.parts) > 1 and path.parent.is_dir()  # a mistyped folder, not a name on the Hub
    if not hub or not _HUB_NAME.fullmatch(value) or offline or beside:
        raise ArgumentsError(f"{flag} {value}: no such folder (the current folder is {Path.cwd()})")
