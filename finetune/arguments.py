"""What a run can be told beside the flags of training: its stages, processes, and the Megatron checkpoints at its ends."""

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from ..train.arguments import as_word, own_value
from ..train.hf_flags import ArgumentsError
from .launch import STOP_GRACE

_RUN_ONLY = "run"
_TRAINING = "training"


def _arg(default: Any, text: str, verb: str = _RUN_ONLY) -> Any:
    return field(default=default, metadata={"help": text, "verb": verb})


@dataclass(kw_only=True)
class RunArguments:
    """The flags of ``finebridge run`` that are the launcher's own; ranks never see them. Raises ArgumentsError."""

    stage: Literal["sft", "pretrain"] = _arg("sft", "what is trained on: conversations, or plain text")
    dry_run: bool = _arg(
        False,
        "check everything and print the plan, with several nodes their commands; nothing is made but hashes",
        _TRAINING,
    )
    overwrite_output_dir: bool = _arg(False, "remove the checkpoints that another run left in --output_dir")
    export_hf: bool = _arg(True, "leave the trained model alone in OUTPUT_DIR/hf-STEP, with LoRA merged into its base")
    save_dtype: Literal["bf16", "fp16", "fp32"] | None = _arg(
        None, "of the weights in hf-STEP with LoRA; default: that of the base"
    )
    output_prefix: str | None = _arg(
        None, "leave the tokens under this prefix too, as MindSpeed-LLM and Megatron-LM read them"
    )
    enable_hf2mg_convert: bool = _arg(
        False, "leave the model that is trained as a Megatron checkpoint too, made once for --tp, --pp, --ep"
    )
    model_type_hf: str | None = _arg(None, "its family by MindSpeed-LLM's name; default: told by its config.json")
    mg_cache_dir: str | None = _arg(None, "where that lies; default: megatron_cache_tpNppNepN in the model's folder")
    tp: int = _arg(1, "its tensor parallel size")
    pp: int = _arg(1, "its pipeline parallel size")
    vpp: int | None = _arg(None, "its virtual chunks a pipeline stage")
    ep: int = _arg(1, "its expert parallel size")
    etp: int | None = _arg(None, "its tensor parallel size of experts; default: --tp")
    num_layer_list: str | None = _arg(None, "its layers in each pipeline stage, for example 3,4,4,3")
    ckpt_format: Literal["torch", "torch_dist"] = _arg("torch", "its format")
    dialect: Literal["mcore", "mcore-local", "mindspeed", "pai"] = _arg("mcore", "whose names its tensors have")
    nproc_per_node: int | None = _arg(
        None, "processes on this machine; default: one a GPU, or NODE_IP_LIST / HOST_GPU_NUM", _TRAINING
    )
    stop_grace: float = _arg(
        STOP_GRACE, "seconds after SIGTERM in which the ranks save a checkpoint and end", _TRAINING
    )
    max_restarts: int = _arg(
        0,
        "start all ranks again from the newest whole checkpoint so often when one dies or hangs, or a node is lost",
        _TRAINING,
    )
    elastic: bool = _arg(
        False,
        "with --max_restarts: without a node that cannot be reached any more, with the same global batch",
        _TRAINING,
    )
    hf_config: str | None = _arg(
        None, "folder of config.json and tokenizer of a Megatron checkpoint that has none beside it", _TRAINING
    )
    converted_weights_dir: str | None = _arg(
        None, "where the conversion of a Megatron checkpoint is kept; default: OUTPUT_DIR/converted_weights", _TRAINING
    )
    export_mcore: str | None = _arg(
        None,
        "leave a Megatron checkpoint too, OUTPUT_DIR/mcore-STEP: tp=2,pp=2,format=torch; keys are the flags of finebridge "
        "convert",
        _TRAINING,
    )

    def __post_init__(self) -> None:
        if self.nproc_per_node is not None and self.nproc_per_node < 1:
            raise ArgumentsError(f"--nproc_per_node {self.nproc_per_node}: a positive number is expected")
        if not 0 <= self.stop_grace < float("inf"):
            raise ArgumentsError(f"--stop_grace {self.stop_grace:g}: a number of seconds is expected")
        if self.max_restarts < 0:
            raise ArgumentsError(f"--max_restarts {self.max_restarts}: a number from 0 on is expected")
        if self.elastic and not self.max_restarts:
            raise ArgumentsError("--elastic says how a run starts again; it needs --max_restarts N")
        if not self.enable_hf2mg_convert and (given := [name for name in _MCORE if self.given(name)]):
            raise ArgumentsError(
                f"--{given[0]} is for --enable_hf2mg_convert; a trained model's layout: --export_mcore"
            )

    def given(self, name: str) -> bool:
        """Whether a flag differs from its default."""
        return getattr(self, name) != RUN_FLAGS[name].default

    def convert_words(self, model: str) -> list[str]:
        """The command line of ``finebridge convert`` that ``--enable_hf2mg_convert`` stands for."""
        words = ["--enable_hf2mg_convert", "--load", model, "--ckpt_format", self.ckpt_format]
        words += ["--hf_config", self.hf_config] if self.hf_config else []
        for name in _MCORE:
            if name != "ckpt_format" and self.given(name):
                words += [f"--{name}", str(getattr(self, name))]
        return words


RUN_FLAGS: dict[str, "Field[Any]"] = {entry.name: entry for entry in fields(RunArguments)}
# What describes the Megatron checkpoint of --enable_hf2mg_convert, under the names of finebridge convert.
_MCORE = ("model_type_hf", "mg_cache_dir", "tp", "pp", "vpp", "ep", "etp", "num_layer_list", "ckpt_format", "dialect")
# Megatron-LM's and MindSpeed-LLM's names.
OTHER_NAMES = {
    "mg_save_dir": "mg_cache_dir",
    "tensor_model_parallel_size": "tp",
    "target_tensor_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "target_pipeline_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "target_expert_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "hf_cfg_dir": "hf_config",
}


def take(values: dict[str, Any], verb: str) -> RunArguments:
    """Take the launcher's own flags out of ``values``. Raises ArgumentsError, also for one that is not for this verb."""
    for other, name in OTHER_NAMES.items():
        if other in values:
            values[name] = values.pop(other)
    if verb != _RUN_ONLY:
        only = [name for name in values if name in RUN_FLAGS and RUN_FLAGS[name].metadata["verb"] == _RUN_ONLY]
        if refused := [
            name for name in only if name != "overwrite_output_dir"
        ]:  # which the Hunyuan scripts always give
            raise ArgumentsError(f"--{refused[0]} is for finebridge run; finebridge {verb} is the training alone")
    given = [
        name for name in RUN_FLAGS if name in values and not (verb != _RUN_ONLY and name == "overwrite_output_dir")
    ]
    return RunArguments(
        **{name: own_value(name, as_word(name, values.pop(name)), RUN_FLAGS[name].type) for name in given}
    )
