"""The report's plots as inline SVG, the same bytes every time. Needs matplotlib, the ``report`` extra."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8b98a5"
MOST_CHANNELS = 600  # more than the plot is wide in pixels; runs of channels are merged by their extremes
_STYLE: Any = {
    "svg.hashsalt": "qcompile",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def layer_bars(layers: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of each layer in dB, in the order of the graph; the five lowest are named."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        canvas = _figure(9.0, 2.8)
        canvas.subplots_adjust(left=0.06, right=0.99, top=0.95, bottom=0.18)
        axes = canvas.add_subplot()
        heights = [x["sqnr_db"] if x["sqnr_db"] is not None else math.nan for x in layers]
        lowest = set(sorted(range(len(layers)), key=lambda i: _low(heights[i]))[:5])
        axes.bar(
            range(len(layers)), heights, color=[ORANGE if i in lowest else BLUE for i in range(len(layers))]
        )
        axes.set_xlabel("linear layer, in graph order (orange: the five lowest)")
        axes.set_ylabel("SQNR, dB")
        axes.margins(x=0.01)
        return _svg(canvas)


def _low(height: float) -> float:
    return math.inf if math.isnan(height) else height


def channel_ranges(before: Sequence[Any], after: Sequence[Any] | None) -> str:
    """Smallest and largest value of each channel, before (left) and after (right). Each: (minima, maxima).

    Without ``after`` (an analysis changes nothing) there is one plot.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        canvas = _figure(7.0, 2.2)
        canvas.subplots_adjust(left=0.07, right=0.99, top=0.86, bottom=0.22, wspace=0.16)
        shown = [("now", before)] if after is None else [("before", before), ("after", after)]
        for index, (title, pair) in enumerate(shown):
            axes = canvas.add_subplot(1, len(shown), index + 1)
            low, high = _merged(np.asarray(pair, dtype=np.float64))
            axes.fill_between(
                np.arange(len(low)), low, high, step="mid", color=(GREY, BLUE)[index], linewidth=0
            )
            axes.set_title(f"{title}: {float(low.min()):.3g} .. {float(high.max()):.3g}")
            axes.set_xlabel("channel" if len(pair[0]) <= MOST_CHANNELS else "channel (runs merged)")
            axes.margins(x=0.0)
        return _svg(canvas)


def _merged(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2, C) minima and maxima, with runs of neighbouring channels merged where there are too many."""
    run = max(1, math.ceil(pair.shape[1] / MOST_CHANNELS))
    starts = np.arange(0, pair.shape[1], run)
    return np.minimum.reduceat(pair[0], starts), np.maximum.reduceat(pair[1], starts)


def search_curves(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Loss over the threshold t, one small plot a site, with the chosen t marked."""
    import matplotlib

    columns = 4
    rows = math.ceil(len(curves) / columns)
    with matplotlib.rc_context(_STYLE):
        canvas = _figure(9.0, 1.5 * rows)
        canvas.subplots_adjust(left=0.05, right=0.99, top=1 - 0.25 / (1.5 * rows), bottom=0.25 / (1.5 * rows))
        canvas.subplots_adjust(wspace=0.25, hspace=0.55)
        for index, (site, curve) in enumerate(curves.items()):
            axes = canvas.add_subplot(rows, columns, index + 1)
            _curve(axes, curve)
            axes.set_title(_short(site), fontsize=7)
        return _svg(canvas)


def _curve(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = sorted((t, x) for t, x in zip(curve["t"], curve["loss"], strict=True) if None not in (t, x))
    axes.plot(
        [t for t, _ in points], [x for _, x in points], color=BLUE, linewidth=1, marker=".", markersize=2
    )
    if curve.get("best") is not None:
        axes.axvline(curve["best"], color=ORANGE, linewidth=1)
    axes.tick_params(labelsize=6)


def _short(site: str, most: int = 34) -> str:
    return site if len(site) <= most else "…" + site[1 - most :]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _svg(canvas: Figure) -> str:
    """The figure as an <svg> element, fit for inlining; its metadata, which holds the date, is cut out."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
