"""A rank of the real command that saves every model twice: as finebridge does, and by the Trainer's own ``save_model``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """``finebridge.train.sft.main``; the Trainer's own save lies in ``OUTPUT_DIR/stock``."""
    from finebridge.train import sft
    from finebridge.train.saving import SavingTrainer
    from transformers import Trainer

    ours = SavingTrainer._write_model

    def both(self: Any, folder: Path, ledger: Any) -> None:
        ours(self, folder, ledger)
        Trainer.save_model(self, str(Path(self.args.output_dir) / "stock"), _internal_call=True)

    SavingTrainer._write_model = both  # pyright: ignore[reportAttributeAccessIssue]
    return sft.main(argv)


def small_disk(argv: Sequence[str]) -> int:
    """``finebridge.train.sft.main`` where only a thousand bytes are free."""
    from finebridge.train import sft, space

    space.free_bytes = lambda _: 1000
    return sft.main(argv)
