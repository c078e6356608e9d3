"""What a conversion costs: each direction of ``finebridge convert`` beside a plain copy of the same bytes.

    python benchmarks/bridge_speed.py [--models 0.5GB 1.5GB] [--rounds N] [--out FOLDER]

The models of ``compare.py``. The ways: a copy of the model's folder, without and with every file flushed to the device, and
the conversions Hugging Face to ``torch_dist`` and to ``torch`` (TP 1) and back, which hash and flush what they write.
``compare.py`` tells how they are measured; medians of the rounds are added to ``bridge_speed.csv``, a ratio is to the row of
that way.
"""

from functools import partial
from pathlib import Path

import compare
from compare import Way


def convert(source: str, out: str, flags: list[str], folder: Path) -> None:
    """The user's command."""
    from finebridge.bridge.convert_cli import main

    main(["--load", str(folder / source), "--save", str(folder / out), *flags])


def prepare(name: str, folder: Path) -> None:
    """Write the model in all three forms."""
    compare.build(name, folder)
    for form in ("torch_dist", "torch"):
        convert("base", form, ["--to", "mcore", "--ckpt_format", form], folder)


def _way(source: str, *flags: str) -> Way:
    return Way(partial(convert, source, "out", list(flags)), ["finebridge.bridge.convert"])


WAYS = {
    **compare.COPIES,
    "hf_to_torch_dist": _way("base", "--to", "mcore"),
    "torch_dist_to_hf": _way("torch_dist", "--to", "hf"),
    "hf_to_torch": _way("base", "--to", "mcore", "--ckpt_format", "torch"),
    "torch_to_hf": _way("torch", "--to", "hf"),
}


if __name__ == "__main__":
    compare.run(Path(__file__).with_suffix(".csv"), WAYS, prepare, beside=[*compare.COPIES], models=["1.5GB"])
