"""What the data stage can be told; the names are those of the Hunyuan scripts where they had one."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .schema import DataError
from .thinking import EnableThinking, ThinkMode

DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "instruction", "pai", "prompt_response", "preference", "text"
]
MaskCompat = Literal["none", "hunyuan"]
OverLong = Literal["drop", "split_turns", "truncate_context", "truncate", "error"]


@dataclass(kw_only=True)
class DataArguments:
    """Where the rows are and how they become tokens.

    Raises DataError for values that contradict each other.
    """

    train_data_file: str | None = field(
        default=None,
        metadata={
            "help": "training data: .jsonl, .json, .parquet, .arrow, .csv or .txt (also .gz, .zst), folders, "
            "comma-separated, globs allowed; a mixture of sources (.yaml); for pretraining Megatron's .bin/.idx too"
        },
    )
    eval_data_file: str | None = field(default=None, metadata={"help": "held-out data, same form"})
    max_seq_length: int = field(default=2048, metadata={"help": "longest sample in tokens; see --over_long"})
    over_long: OverLong = field(
        default="drop",
        metadata={
            "help": "samples over --max_seq_length: drop (counted and listed), split_turns (several samples of whole "
            "exchanges), truncate_context (the last whole exchanges that fit), truncate (cuts the answer's end), error"
        },
    )
    data_format: DataFormat = field(
        default="auto",
        metadata={
            "help": "what the rows are; auto: told by the columns of each file's first row (instruction, input and output "
            "are then read as alpaca)"
        },
    )
    map_keys: str | None = field(
        default=None, metadata={"help": """names of the columns as JSON, for example {"prompt": "question"}"""}
    )
    handler_name: str | None = field(
        default=None,
        metadata={"help": "MindSpeed-LLM's name for --data_format, for example AlpacaStyleInstructionHandler"},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "share rows of --max_seq_length tokens among samples, which never read one another; batch sizes then "
            "count rows, so fewer steps make an epoch"
        },
    )
    cross_document_attention: bool = field(
        default=False,
        metadata={
            "help": "pretraining: documents in a row of --max_seq_length tokens read those before them, as in Megatron-LM; "
            "default: they are kept apart"
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "a shipped template's name or a .jinja file; default: the tokenizer's own"}
    )
    think_mode: ThinkMode = field(
        default="keep", metadata={"help": "keep the data's thinking, or make it fast (/no_think), slow or mixed"}
    )
    enable_thinking: EnableThinking | None = field(
        default=None,
        metadata={
            "help": "for templates with this switch: true (turns without a thought learn an empty one), false (no thoughts), "
            "none (each turn as it is)"
        },
    )
    append_eod: bool = field(
        default=False, metadata={"help": "pretraining text: end each document with the end-of-text token"}
    )
    mask_compat: MaskCompat = field(
        default="none",
        metadata={"help": "hunyuan: the token that opens the answer carries loss too, as in Tencent's scripts"},
    )
    deduplicate: bool = field(
        default=False,
        metadata={"help": "leave out rows that say the same as an earlier one (white space and loss flags aside)"},
    )
    decontaminate: str | None = field(
        default=None,
        metadata={"help": "evaluation files: rows that share 13 words in a row with a text of theirs are left out"},
    )
    drop_repetitive: bool = field(
        default=False,
        metadata={"help": "leave out rows with an answer that repeats itself, by Gopher's rules (50 words or more)"},
    )
    min_chars: int | None = field(
        default=None, metadata={"help": "leave out rows with fewer characters in all turns together"}
    )
    max_chars: int | None = field(
        default=None, metadata={"help": "leave out rows with more characters in all turns together"}
    )
    max_rejects: float | None = field(
        default=None,
        metadata={
            "help": "stop when more than this share of the rows is rejected; default: 0.05, and 0 for rows that cannot be "
            "read at all"
        },
    )
    prepared_data_dir: str | None = field(
        default=None, metadata={"help": "where tokenised data is kept and reused; default: OUTPUT_DIR/prepared_data"}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "tokenising processes; default: one a core for large files"}
    )
    use_dummy_data: bool = field(
        default=False, metadata={"help": "1000 random samples of --max_seq_length tokens, all with loss (speed tests)"}
    )
    model_size: Literal["0.5B", "1.8B", "4B", "7B"] | None = field(
        default=None, metadata={"help": "accepted and not needed: the chat template says which tokens mark an answer"}
    )
    complex_data: str | None = field(default=None, metadata={"help": "accepted and unused, as in the original"})

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:  # noqa: PLR2004 - one token to read, one to predict
            raise DataError(f"--max_seq_length {self.max_seq_length}: at least 2 tokens are needed")
        if self.max_rejects is not None and not 0 <= self.max_rejects <= 1:
            raise DataError(f"--max_rejects {self.max_rejects}: a share between 0 and 1 is expected")
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise DataError(f"--preprocessing_num_workers {self.preprocessing_num_workers}: at least 1 is needed")
        for name in ("min_chars", "max_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name} {value}: at least 1 is needed")
        if (self.min_chars or 0) > (self.max_chars or math.inf):
            raise DataError(f"--min_chars {self.min_chars} is over --max_chars {self.max_chars}")
        if self.use_dummy_data and self.train_data_file:
            raise DataError("--use_dummy_data and --train_data_file exclude each other")
