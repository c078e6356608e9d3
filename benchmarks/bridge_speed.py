"""What a conversion costs: each direction of ``finebridge convert`` beside a plain copy of the same bytes, and mbridge's.

    python benchmarks/bridge_speed.py [--models 0.5GB 1.5GB] [--rounds N] [--out FOLDER]

The models of ``compare.py``. The ways: a copy of the model's folder, without and with every file flushed to the device, and
the conversions Hugging Face to ``torch_dist`` and to ``torch`` (TP 1) and back, which hash and flush what they write. When
MBRIDGE_PYTHON names an interpreter that has mbridge, its two ways run in turn with them (``mbridge_way.py``), and what it
wrote must be the same model. ``compare.py`` tells how they are measured; medians of the rounds are added to
``bridge_speed.csv``, a ratio is to the row of that way.
"""

import os
import sys
from functools import partial
from pathlib import Path

import compare
from compare import Way

HERE = Path(__file__).resolve().parent
MBRIDGE = os.environ.get("MBRIDGE_PYTHON", "")


def convert(source: str, out: str, flags: list[str], folder: Path) -> None:
    """The user's command."""
    from finebridge.bridge.convert_cli import main

    main(["--load", str(folder / source), "--save", str(folder / out), *flags])


def prepare(name: str, folder: Path) -> None:
    """Write the model in all three forms."""
    compare.build(name, folder)
    for form in ("torch_dist", "torch"):
        convert("base", form, ["--to", "mcore", "--ckpt_format", form], folder)


def mbridge(way: str, folder: Path) -> None:
    """Become the interpreter that has mbridge, which tells its own seconds and reads what we wrote."""
    os.chdir(folder)
    words = [MBRIDGE, "-W", "ignore", str(HERE / "mbridge_way.py"), way, "base", "out", "torch_dist/release"]
    os.execv(MBRIDGE, words)  # noqa: S606 - no shell


def same(folder: Path) -> None:
    """End when what was written is another model than the base."""
    from finebridge.bridge.convert_cli import main

    if main(["verify", str(folder / "out"), str(folder / "base"), "--hf_config", str(folder / "base")]):
        sys.exit(f"error: {folder / 'out'} is another model")


def _way(source: str, *flags: str) -> Way:
    return Way(partial(convert, source, "out", list(flags)), ["finebridge.bridge.convert"])


WAYS = {
    **compare.COPIES,
    "hf_to_torch_dist": _way("base", "--to", "mcore"),
    "torch_dist_to_hf": _way("torch_dist", "--to", "hf"),
    "hf_to_torch": _way("base", "--to", "mcore", "--ckpt_format", "torch"),
    "torch_to_hf": _way("torch", "--to", "hf"),
}
PEERS = {f"mbridge_{way}": Way(partial(mbridge, way), check=same) for way in ("to_torch_dist", "to_hf")}


if __name__ == "__main__":
    if not MBRIDGE:
        print("mbridge is left out: MBRIDGE_PYTHON is not set")
    compare.run(
        Path(__file__).with_suffix(".csv"), {**WAYS, **(PEERS if MBRIDGE else {})}, prepare, beside=[*compare.COPIES],
        models=["1.5GB"], peer=(MBRIDGE, ("mbridge", "megatron-core", "transformers")),
    )  # fmt: skip
