"""Outliers over the steps of a training run, as one SVG. Needs matplotlib, the ``report`` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.reporting.plots import _STYLE, BLUE, GREY, ORANGE, _figure, _svg

PANELS = {
    "kurtosis": "kurtosis of outputs, each linear",
    "max_ratio": "max / median channel of inputs",
    "outlier_channels": "outlier channels, all inputs",
    "weight_ratio": "largest weight / RMS",
}
_COLOURS = (BLUE, ORANGE, "#2da44e", "#8250df", GREY)


def over_training(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each run's rows ({"step", "layers": {name: figures}}) in four panels: the worst layer, and the median one dashed;
    of outlier channels their sum."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        canvas = _figure(9.0, 5.0)
        canvas.subplots_adjust(left=0.07, right=0.98, top=0.94, bottom=0.09, wspace=0.2, hspace=0.35)
        for index, (key, title) in enumerate(PANELS.items()):
            axes = canvas.add_subplot(2, 2, index + 1)
            for place, (name, rows) in enumerate(runs.items()):
                colour = _COLOURS[place % len(_COLOURS)]
                steps = [row["step"] for row in rows]
                values = [sorted(figures[key] for figures in row["layers"].values()) for row in rows]
                if key == "outlier_channels":
                    axes.plot(steps, [sum(v) for v in values], color=colour, label=name)
                else:
                    axes.plot(steps, [v[-1] for v in values], color=colour, label=name)
                    axes.plot(steps, [v[len(v) // 2] for v in values], color=colour, linestyle="--", linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel("step")
            if index == 0 and len(runs) > 1:
                axes.legend(frameon=False, fontsize=7)
        return _svg(canvas)
