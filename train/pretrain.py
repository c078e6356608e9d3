"""Pretraining, from new or from trained weights: one rank of a run. All but the data is as in ``sft.py``.

Started by ``finebridge pretrain`` or ``bash train/pretrain.sh``, or by any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT:  ``torchrun --nproc_per_node 8 -m finebridge.train.pretrain --config_name ...``
"""

from collections.abc import Sequence

from . import sft


def main(argv: Sequence[str] | None = None) -> int:
    """Train on plain text: raw, prepared, or Megatron's ``.bin/.idx``; exit codes as ``sft.main``."""
    return sft.main(argv, kind="document")


if __name__ == "__main__":
    sft.leave(main())
