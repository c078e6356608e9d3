"""``finebridge report OUTPUT_DIR``: what a run did, as a page that stands alone (report.html) and as curves (loss.png).

Training writes both at its end, also when it was stopped or diverged. Everything comes from files of the folder: the
newest Trainer's state, ``run.json`` and the checkpoints. Nothing is fetched, no script runs, all text is escaped.
"""

import argparse
import json
import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..storage.manifest import ManifestError, read, steps
from ..storage.publish import write_bytes, write_text
from .curves import draw
from .record import read_record, span

PAGE_NAME, PICTURE_NAME = "report.html", "loss.png"
_STATE_NAME = "trainer_state.json"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
table { border-collapse: collapse } th, td { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
th { font-weight: normal; color: var(--dim); overflow-wrap: normal } td.n { text-align: right; white-space: nowrap }
pre { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0;
  padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: 1.5rem 0 0 }
"""

Table = Iterable[Sequence[Any]]


class ReportError(ValueError):
    """There is nothing to report on; the message says where it was looked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of an output folder anew; 0. Raises ReportError."""
    parser = argparse.ArgumentParser(
        "finebridge report", description="write report.html and loss.png of a run anew", allow_abbrev=False
    )
    parser.add_argument("output_dir", type=Path, help="the --output_dir of the training")
    print("report: " + ", ".join(map(str, build(parser.parse_args(argv).output_dir))))
    return 0


def build(output_dir: Path) -> list[Path]:
    """Write the page, and the picture when anything was logged; their paths. Raises ReportError."""
    state = _newest_state(output_dir)
    launches = read_record(output_dir)
    if state is None and not launches:
        raise ReportError(
            f"{output_dir}: neither {_STATE_NAME} nor run.json there; is it the --output_dir of a training?"
        )
    series = series_of((state or {}).get("log_history", ()))
    picture = draw(series) if series else b""
    written = [output_dir / PAGE_NAME, output_dir / PICTURE_NAME][: 1 + bool(picture)]
    write_text(written[0], page(output_dir, state or {}, launches, series, picture))
    if picture:
        write_bytes(written[1], picture)
    return written


def series_of(history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Logged numbers by name as (step, value); what is not finite is left out of the curves, as is the closing entry."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        if "train_runtime" in entry:
            continue
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((int(entry["step"]), float(value)))
    return series


def _newest_state(output_dir: Path) -> dict[str, Any] | None:
    """The Trainer's state with the most steps, of the folder itself or of a checkpoint (a killed run has only those)."""
    found: list[dict[str, Any]] = []
    for folder in (output_dir, *(path for _, path in steps(output_dir))):
        try:
            found.append(json.loads((folder / _STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return max(found, key=lambda state: int(state.get("global_step", 0)), default=None)


def page(
    output_dir: Path,
    state: Mapping[str, Any],
    launches: Sequence[Mapping[str, Any]],
    series: Mapping[str, Sequence[tuple[int, float]]],
    picture: bytes,
) -> str:
    """The whole page."""
    last = launches[-1] if launches else {}
    image = f'<img alt="curves" src="data:image/png;base64,{b64encode(picture).decode()}">' if picture else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    title = f"finebridge: {output_dir.resolve().name}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        _table(_summary(state, launches, series)),
        image or "<p>Nothing was logged.</p>",
    ]
    sections: dict[str, Table] = {
        "Data": _data(last.get("data", {})),
        "Checkpoints": _checkpoints(output_dir),
        "Arguments that are not at their default": last.get("arguments", {}).items(),
        "Versions": last.get("tools", {}).items(),
    }
    for heading, rows in sections.items():
        if table := _table(rows):
            parts += [f"<h2>{heading}</h2>", table]
    parts += [f"<h2>{'Command' if len(launches) == 1 else 'Commands, the last one first'}</h2>"] if launches else []
    for launch in reversed(launches):
        parts += [_table(_launch(launch)), f"<pre>{escape(str(launch.get('command')))}</pre>"]
    return "\n".join([*parts, "</body>\n</html>\n"])


def _summary(
    state: Mapping[str, Any],
    launches: Sequence[Mapping[str, Any]],
    series: Mapping[str, Sequence[tuple[int, float]]],
) -> Iterator[tuple[str, str]]:
    """How it ended and what it reached."""
    last = launches[-1] if launches else {}
    yield "outcome", str(last.get("outcome", "not known"))
    done, planned = int(state.get("global_step", 0)), int(state.get("max_steps", 0))
    epoch = state.get("epoch")
    yield "steps", f"{done:,} of {planned:,}" + (f", epoch {epoch:.2f}" if epoch else "")
    if seconds := sum(launch.get("seconds") or 0 for launch in launches):
        more = f" in {len(launches)} launches" if len(launches) > 1 else ""
        yield "time", f"{span(seconds)}{more}, with evaluation and saving"
    for name, label in (("loss", "loss"), ("eval_loss", "evaluation loss"), ("eval_accuracy", "evaluation accuracy")):
        if points := series.get(name):
            best = (max if name == "eval_accuracy" else min)(points, key=lambda point: point[1])
            yield label, f"{points[-1][1]:.4f} at step {points[-1][0]:,}; best {best[1]:.4f} at step {best[0]:,}"
    ends: dict[str, Any] = next((e for e in reversed(state.get("log_history", [])) if "train_runtime" in e), {})
    speed = {**{name: points[-1][1] for name, points in series.items()}, **ends}
    if "tokens_per_second" in speed:
        which = "all steps of the last launch" if "tokens_per_second" in ends else "the last log line"
        trained = speed.get("trained_tokens_per_second", 0)
        yield (
            "throughput",
            f"{speed['tokens_per_second']:,.0f} real tokens a second, {trained:,.0f} with loss ({which})",
        )
        yield "padding", f"{speed.get('padding_share', 0):.1%} of the places computed"
    if "mfu" in speed:
        yield "MFU", f"{speed['mfu']:.1%} of the dense bf16 peak"
    if memory := series.get("memory_gib"):
        yield "memory", f"at most {max(value for _, value in memory):.2f} GiB a rank"
    for name in ("model", "device", "ranks", "host"):
        if name in last:
            yield name, str(last[name])


def _data(data: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
    """A line a data set: what was prepared, what of it is used."""
    if data:
        yield ("", "rows", "rejected", "samples", "tokens", "with loss", "used", "over long", "packs", "files")
    for use, told in data.items():
        rejects: Mapping[str, int] = told.get("rejects", {})
        codes = f" ({', '.join(f'{code} {number:,}' for code, number in rejects.items())})" if rejects else ""
        tokens, loss = told.get("tokens"), told.get("loss_tokens")
        share = f" ({loss / tokens:.1%})" if tokens and loss else ""
        yield (
            use, told.get("rows"), f"{sum(rejects.values()):,}{codes}" if "rejects" in told else None, told.get("samples"),
            tokens, None if loss is None else f"{loss:,}{share}", told.get("used"), told.get("over_long"),
            told.get("packs"), ", ".join(told.get("files", ())),
        )  # fmt: skip


def _checkpoints(output_dir: Path) -> Iterator[Sequence[Any]]:
    """Every checkpoint that lies there, newest first, with its size by its manifest."""
    for number, (_, path) in enumerate(steps(output_dir)):
        if not number:
            yield ("folder", "size", "made")
        try:
            manifest = read(path)
            size = sum(int(entry["size"]) for entry in manifest["files"].values())
            yield path.name, f"{size / 1e6:,.1f} MB", manifest.get("created", "")
        except ManifestError as error:
            yield path.name, "not whole", str(error)


def _launch(launch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = launch.get("seconds")
    yield "started", f"{launch.get('started')} in {launch.get('folder')}"
    if restart := launch.get("restart"):
        yield "restart", f"{restart['number']} of {restart['of']}, as {restart['cause']}"
    yield "outcome", f"{launch.get('outcome')}" + (f" after {span(seconds)}" if seconds is not None else "")


def _table(rows: Table) -> str:
    """Rows of cells; the first cell of each is a heading, numbers stand to the right, None is a dash."""
    lines: list[str] = []
    for first, *others in rows:
        cells = "".join(
            f'<td class="n">{cell:,}</td>'
            if isinstance(cell, int)
            else f"<td>{'-' if cell is None else escape(str(cell))}</td>"
            for cell in others
        )
        lines.append(f"<tr><th>{escape(str(first))}</th>{cells}</tr>")
    return f"<table>\n{chr(10).join(lines)}\n</table>" if lines else ""
