"""The curves of a run as one picture."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

Series = Mapping[str, Sequence[tuple[int, float]]]

# Title of a panel -> the logged values in it, with their names in the legend. A panel without values is left out.
_PANELS: dict[str, dict[str, str]] = {
    "loss": {"loss": "training", "eval_loss": "evaluation"},
    "tokens a second": {"tokens_per_second": "real tokens", "trained_tokens_per_second": "with loss"},
    "learning rate": {"learning_rate": ""},
    "gradient norm": {"grad_norm": ""},
    "accuracy of tokens": {"eval_accuracy": "evaluation"},
    "router loss": {"aux_loss": ""},
    "MFU": {"mfu": ""},
}
_INKS = ("#2a6fbb", "#d1662b")
_FEW = 40  # points up to which each is marked
_PANEL_INCHES = (5.5, 2.9)
_DPI = 110


def draw(series: Series) -> bytes:
    """A PNG with a panel for each kind of value that was logged, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {title: values for title, values in _PANELS.items() if any(series.get(name) for name in values)}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, values) in enumerate(panels.items(), 1):
        axes: Any = figure.add_subplot(rows, columns, place)
        for (name, label), ink in zip(values.items(), _INKS, strict=False):
            if points := series.get(name):
                steps, heights = zip(*points, strict=True)
                mark = "o" if len(points) <= _FEW else ""
                axes.plot(steps, heights, color=ink, marker=mark, markersize=3, linewidth=1.4, label=label or None)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if title in ("tokens a second", "gradient norm", "MFU"):
            axes.set_ylim(bottom=0)
        if any(values.values()):
            axes.legend(fontsize=8, frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()
