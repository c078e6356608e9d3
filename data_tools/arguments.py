"""What the data stage can be told; the names are those of the Hunyuan scripts where they had one."""

from dataclasses import dataclass, field
from typing import Literal

from .schema import DataError
from .thinking import ThinkMode

MaskCompat = Literal["none", "hunyuan"]
OverLong = Literal["drop", "truncate", "error"]


@dataclass(kw_only=True)
class DataArguments:
    """Where the rows are and how they become tokens.

    Raises DataError for values that contradict each other.
    """

    train_data_file: str | None = field(
        default=None, metadata={"help": "training data: .jsonl files, comma-separated, globs allowed"}
    )
    eval_data_file: str | None = field(default=None, metadata={"help": "held-out data, same form"})
    max_seq_length: int = field(default=2048, metadata={"help": "longest sample in tokens; see --over_long"})
    over_long: OverLong = field(
        default="drop",
        metadata={
            "help": "samples over --max_seq_length: drop (counted and listed), truncate (cuts the answer's end), error"
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "a shipped template's name or a .jinja file; default: the tokenizer's own"}
    )
    think_mode: ThinkMode = field(
        default="keep", metadata={"help": "keep the data's thinking, or make it fast (/no_think), slow or mixed"}
    )
    mask_compat: MaskCompat = field(
        default="none",
        metadata={"help": "hunyuan: the token that opens the answer carries loss too, as in Tencent's scripts"},
    )
    max_bad_ratio: float = field(
        default=0.05, metadata={"help": "stop when more than this share of the rows is rejected; 0 is strict"}
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
        if not 0 <= self.max_bad_ratio <= 1:
            raise DataError(f"--max_bad_ratio {self.max_bad_ratio}: a share between 0 and 1 is expected")
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise DataError(f"--preprocessing_num_workers {self.preprocessing_num_workers}: at least 1 is needed")
        if self.use_dummy_data and self.train_data_file:
            raise DataError("--use_dummy_data and --train_data_file exclude each other")
