"""Rows and what of them is trained as one HTML page that stands alone: no script, nothing is fetched, all text escaped."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from .token_view import Piece, visible

_STYLE = """
:root { color-scheme: light dark; --loss: #d3f2d9; --line: #2a8745; --wrong: #b3261e; --told: #8a5a00; --dim: #777;
        --control: #6b3fa0 }
@media (prefers-color-scheme: dark) {
  :root { --loss: #17472a; --line: #58c27d; --wrong: #ff8a80; --told: #f0b95b; --dim: #999;
          --control: #c9a7ff }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere } p { margin: .3rem 0 }
pre { font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0;
      padding: .6rem .8rem; border: 1px solid #8884; border-radius: 6px; unicode-bidi: isolate }
b { font-weight: normal; background: var(--loss); border-bottom: 2px solid var(--line) }
pre:hover :is(b, span) { box-shadow: inset 1px 0 0 #8889 }
pre :is(b, span):hover { outline: 2px solid var(--line) }
i { color: var(--control) }
u { color: var(--dim); text-decoration: none; user-select: none }
.wrong { color: var(--wrong) } .told { color: var(--told) }
"""
_LEGEND = (
    "<p><b>Coloured tokens carry loss</b>, the others are only read. <i>Control tokens</i> stand in italics. "
    "Point at a text to see where its tokens begin, at a token for its place and id.</p>"
)


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample: how long it is and what becomes of it in words (``notes`` may be empty), and its tokens."""

    heading: str
    notes: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class RowView:
    """One row of a file: its samples, or why it is rejected; ``notes`` tell what was done to it."""

    origin: str
    rejected: str
    notes: str
    samples: tuple[SampleView, ...]


def page(title: str, subtitle: str, rows: Iterable[RowView]) -> str:
    """The whole page."""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(title)}</h1>\n<p>{_text(subtitle)}</p>",
            _LEGEND,
            *(part for row in rows for part in _row(row)),
            "</body>\n</html>\n",
        )
    )


def _row(row: RowView) -> Iterator[str]:
    yield f"<h2>{_text(row.origin)}</h2>"
    if row.rejected:
        yield f'<p class="wrong">{_text(row.rejected)}</p>'
    if row.notes:
        yield f'<p class="told">{_text(row.notes)}</p>'
    for sample in row.samples:
        yield f"<p>{_text(sample.heading)}</p>"
        if sample.notes:
            yield f'<p class="told">{_text(sample.notes)}</p>'
        yield "<pre>" + "".join(map(_piece, sample.pieces)) + "</pre>"


def _piece(piece: Piece) -> str:
    tag = "b" if piece.trained else "span"
    numbers = " ".join(map(str, piece.ids))
    control, shown = (", a control token", "<i>{}</i>") if piece.control else ("", "{}")
    text = shown.format(_text(piece.text))
    return f'<{tag} title="token {piece.position}, id {numbers}{control}">{text}</{tag}>'


def _text(text: str) -> str:
    return escape(visible(text)).replace("\n", "<u>↵</u>\n")
