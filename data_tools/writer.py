"""Encoded chunks to the files of a prepared dataset, with bounded memory."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .duplicates import Seen, without_duplicates
from .encoder import EncodedChunk
from .indexed import IndexedWriter
from .schema import Kind

DIGESTS_NAME = "digests.bin"  # with --deduplicate: 16 bytes a sample, the hash of what its row says


class DatasetWriter:
    """A context manager that takes chunks in order; the block's normal end writes indices and ``report.json``."""

    def __init__(self, folder: Path, files: Sequence[Path], kind: Kind, *, deduplicate: bool = False) -> None:
        self.folder, self.files, self.kind = folder, list(files), kind
        self._seen = Seen() if deduplicate else None
        if deduplicate:
            self._digests = (folder / DIGESTS_NAME).open("wb")
        self._tokens = IndexedWriter(folder / "text_document")
        self._spans = IndexedWriter(folder / "spans_document")
        self._rows = (folder / "rows.npy").open("wb")
        self._listed = (folder / "rejects.jsonl").open("w", encoding="utf-8")
        self._total = Counter(rows=0, samples=0, tokens=0, loss_tokens=0, neutralised=0, shortened=0)
        self._rejects: Counter[str] = Counter()
        self._terminators: set[int] = set()
        self._write_header()

    def add(self, numbered: tuple[int, EncodedChunk]) -> None:
        """Append a chunk of the file with that number."""
        number, chunk = numbered
        if self._seen is not None:
            chunk = without_duplicates(chunk, number, self._seen, lambda file: str(self.files[file]))
        self._total["rows"] += chunk.rows
        self._total["neutralised"] += chunk.neutralised
        self._total["shortened"] += chunk.shortened
        for line, offset, code, detail in chunk.rejects:
            self._rejects[code] += 1
            entry = {"file": str(chunk.file), "line": line, "offset": offset, "code": code, "detail": detail}
            self._listed.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if not len(chunk.lengths):
            return
        self._tokens.add_many(chunk.ids, chunk.lengths)
        self._spans.add_many(chunk.spans.reshape(-1), chunk.span_counts * 2)
        self._rows.write(np.stack([np.full_like(chunk.lines, number), chunk.lines], axis=1).tobytes())
        if self._seen is not None:
            self._digests.write(chunk.digests.tobytes())
        starts = np.repeat(np.cumsum(chunk.lengths, dtype=np.int64) - chunk.lengths, chunk.span_counts)
        self._terminators.update(np.unique(chunk.ids[starts + chunk.spans[:, 1] - 1]).tolist())
        self._total["samples"] += len(chunk.lengths)
        self._total["tokens"] += int(chunk.ids.size)
        self._total["loss_tokens"] += int((chunk.spans[:, 1] - chunk.spans[:, 0]).sum(dtype=np.int64))

    def __enter__(self) -> Self:
        self._tokens.__enter__()
        self._spans.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._tokens.__exit__(kind, error, where)
        self._spans.__exit__(kind, error, where)
        if kind is None:
            self._write_header()  # numpy leaves room in it for the final count
        self._rows.close()
        self._listed.close()
        if self._seen is not None:
            self._digests.close()
        if kind is not None:
            return
        report: dict[str, Any] = {
            "kind": self.kind,
            **self._total,
            "rejects": dict(self._rejects.most_common()),
            "files": [str(file) for file in self.files],
            "terminators": sorted(self._terminators) if self.kind != "document" else [],  # generation must stop at them
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "report.json").write_text(text, encoding="utf-8")

    def _write_header(self) -> None:
        self._rows.seek(0)
        layout = {"descr": "<i8", "fortran_order": False, "shape": (self._total["samples"], 2)}
        np.lib.format.write_array_header_1_0(self._rows, layout)


def describe(report: Mapping[str, Any]) -> str:
    """One line on what a prepared dataset holds."""
    line = (
        f"{report['rows']:,} rows -> {report['samples']:,} samples, {report['tokens']:,} tokens, "
        f"{report['loss_tokens']:,} with loss"
    )
    if report["rejects"]:
        line += ", rejected: " + ", ".join(f"{code} {count:,}" for code, count in report["rejects"].items())
    if report["neutralised"]:
        line += f"; control tokens written as plain text in {report['neutralised']:,} rows"
    if report.get("shortened"):  # datasets made of other systems' files have no such count
        line += (
            f"; {report['shortened']:,} conversations over --max_seq_length split or cut at their turns (--over_long)"
        )
    return line
