"""Show what of each row is trained, token by token.

    finebridge data preview data.jsonl --tokenizer_name_or_path MODEL [--chat_template NAME] [--count 3]

Text with loss is green and stands in {{ }}, so that it can be told apart without colours too.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from .arguments import DataArguments
from .preprocess import RowEncoder
from .readers import read_lines, resolve_files
from .schema import TokenizedSample
from .thinking import THINK_MODES
from .tokenizer_files import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line of the preview; names are those of training."""
    result = argparse.ArgumentParser("finebridge data preview", allow_abbrev=False)
    result.add_argument("file", help="a .jsonl file of messages")
    result.add_argument("--tokenizer_name_or_path", "--model_name_or_path", dest="tokenizer", required=True)
    result.add_argument("--chat_template", help="a shipped template's name or a .jinja file; default: the tokenizer's")
    result.add_argument("--think_mode", choices=THINK_MODES, default="keep")
    result.add_argument("--mask_compat", choices=("none", "hunyuan"), default="none")
    result.add_argument("--count", type=int, default=3, help="rows to show (default 3)")
    result.add_argument("--trust_remote_code", action="store_true", help="run the tokenizer's own .py files")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Print the first rows; exit code 0. Raises DataError."""
    args = parser().parse_args(argv)
    files = resolve_files([args.file])
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    encoder = RowEncoder(
        tokenizer,
        DataArguments(chat_template=args.chat_template, think_mode=args.think_mode, mask_compat=args.mask_compat),
    )
    console = Console(highlight=False, soft_wrap=True)
    for number, (origin, line) in enumerate(row for file in files for row in read_lines(file)):
        if number == args.count:
            break
        row = encoder(origin, line)
        if row.reject:
            console.print(Text(f"{origin}: rejected, {row.reject[0]}: {row.reject[1]}", style="red"))
        if row.neutralised:
            console.print(Text(f"{origin}: control tokens in its text are encoded as plain text", style="yellow"))
        for sample in row.samples:
            trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
            console.print(Text(f"{origin}: {sample.ids.size} tokens, {trained} with loss", style="bold"))
            console.print(token_view(tokenizer, sample))
    return 0


def token_view(tokenizer: object, sample: TokenizedSample) -> Text:
    """A sample's text with every stretch that carries loss in ``{{ }}`` and green."""
    decode = tokenizer.decode  # type: ignore[attr-defined] - any tokenizer of transformers
    view = Text()
    position = 0
    for start, end in sample.spans.tolist():
        view.append(decode(sample.ids[position:start].tolist()))
        view.append("{{" + decode(sample.ids[start:end].tolist()) + "}}", style="green")
        position = end
    view.append(decode(sample.ids[position:].tolist()))
    return view
