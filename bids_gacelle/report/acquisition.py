"""Pictures of a diffusion acquisition, and of signals and fits of whole tissues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bids_gacelle.report import text
from bids_gacelle.report.figures import (
    GROUP_COLOURS,
    GROUP_MARKERS,
    PLOT_FAINT,
    PLOT_INK,
    WIDTH,
    Drawing,
    new_figure,
    plain_axes,
    render,
)

MOST_SHELLS = 24
"""Shells whose directions are drawn."""

FEW, EVEN = 12, 0.03
"""Fewer directions, or a greater ||mean(g g^T) - I/3||, are pointed out."""

_SHELLS_WIDTH = 452.0
_BALL = 122.0
_ROW = 152.0


def draw_acquisition(shells: Sequence[dict[str, Any]], *, density: float, alt: str) -> Drawing:
    """Plot b against Delta at the left, the directions of every shell at the right.

    Parameters
    ----------
    shells : the manifest's ``gradients``: b, group, n_directions, unevenness, directions and,
        where known, big_delta, small_delta, echo_time
    """
    if not shells:
        raise ValueError("no shells")
    colours = group_colours([str(shell.get("group") or "") for shell in shells])
    shown = list(shells[:MOST_SHELLS])
    across = int((WIDTH - _SHELLS_WIDTH) // _BALL)
    rows = -(-len(shown) // across)
    height = max(300.0, 34 + rows * _ROW)
    figure = new_figure(WIDTH, height, density, "white")
    _shell_plot(figure, shells, colours, height)
    for n, shell in enumerate(shown):
        row, column = divmod(n, across)
        left, top = _SHELLS_WIDTH + column * _BALL, 30 + row * _ROW
        box = (left / WIDTH, 1 - (top + 104) / height, 104 / WIDTH, 104 / height)
        _hemisphere(figure.add_axes(box), shell, colours[str(shell.get("group") or "")])
        centre = (left + 52) / WIDTH
        words = [f"b {text.number(shell['b'], 3)}, n {len(shell['directions'])}"]
        uneven = text.finite(shell.get("unevenness"))
        words.append("" if uneven is None else f"unevenness {_small(uneven)}")
        poor = (len(shell["directions"]) < FEW, uneven is not None and uneven > EVEN)
        for k, line in enumerate(words):
            y = 1 - (top + 113 + 13 * k) / height
            weight = "bold" if poor[k] else "normal"
            figure.text(centre, y, line, fontweight=weight, **_LABEL)
    figure.text(
        _SHELLS_WIDTH / WIDTH,
        1 - 13 / height,
        "Directions of each shell (b in ms/µm², n directions), antipodes folded onto half a sphere"
        + (f"; {MOST_SHELLS} of {len(shells)} shells" if len(shells) > len(shown) else ""),
        fontsize=10.5,
        color=PLOT_INK,
        va="center",
    )
    return render(figure, alt)


def _small(value: float) -> str:
    return "< 0.001" if value < 0.001 else text.number(value, 2)


def group_colours(groups: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each group of measurements, by the order they come in."""
    return {
        group: (GROUP_COLOURS[n % len(GROUP_COLOURS)], GROUP_MARKERS[n % len(GROUP_MARKERS)])
        for n, group in enumerate(dict.fromkeys(groups))
    }


def folded(directions: np.ndarray) -> np.ndarray:
    """Project directions (n, 3) to the unit disc (n, 2), antipodes being the same.

    Lambert's azimuthal projection of the half z >= 0: equal areas stay equal, so that even
    directions look even.
    """
    g = np.asarray(directions, float)
    g = np.where(g[:, 2:] < 0, -g, g)
    # the point at polar angle t lies at root(2) sin(t / 2) = root(1 - z) from the centre
    beside = np.hypot(g[:, 0], g[:, 1])
    radius = np.sqrt(np.clip(1 - g[:, 2], 0, None))
    return g[:, :2] * (radius / np.where(beside > 0, beside, 1.0))[:, None]


def _hemisphere(axes: Any, shell: dict[str, Any], style: tuple[str, str]) -> None:
    angle = np.linspace(0, 2 * np.pi, 181)
    for degrees in (30, 60, 90):
        radius = np.sqrt(2) * np.sin(np.radians(degrees) / 2)
        width = 0.9 if degrees == 90 else 0.5
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="#b8c0c8", lw=width)
    for line in ([-1, 1], [0, 0]), ([0, 0], [-1, 1]):
        axes.plot(*line, color="#d5dae0", lw=0.5)
    x, y = folded(np.asarray(shell["directions"], float)).T
    size = 3.4 if len(x) <= 64 else 2.4
    axes.plot(x, y, ls="none", marker="o", ms=size, mfc=style[0], mec="none", zorder=3)
    axes.set_xlim(-1.04, 1.04)
    axes.set_ylim(-1.04, 1.04)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _shell_plot(
    figure: Any,
    shells: Sequence[dict[str, Any]],
    colours: dict[str, tuple[str, str]],
    height: float,
) -> None:
    legend = sorted({str(s.get("group") or "") for s in shells}, key=list(colours).index)
    legend = legend if legend != [""] else []
    keys = 15 * -(-len(legend) // 2)
    tall = min(height, 400.0) - 72 - keys  # the row of hemispheres at the right may be longer
    below = height - 26 - tall
    box = (62, below, _SHELLS_WIDTH - 110, tall)
    axes = _axes(figure, box, WIDTH, height)
    timed = all(text.finite(s.get("big_delta")) is not None for s in shells)
    labels: dict[tuple[float, float], list[str]] = {}
    for shell in shells:
        x, y = float(shell["b"]), float(shell["big_delta"]) if timed else 0.0
        colour, marker = colours[str(shell.get("group") or "")]
        axes.plot(x, y, ls="none", marker=marker, ms=7, mfc=colour, mec="white", mew=0.6)
        labels.setdefault((x, y), []).append(str(len(shell["directions"])))
    right = 1.1 * max(x for x, _ in labels)
    axes.set_xlim(0, right)
    _count(axes, labels, 26 * right / box[2])
    heights = [y for _, y in labels]
    pad = 0.25 * (np.ptp(heights) or max(heights) or 1.0)
    axes.set_ylim(min(heights) - pad, max(heights) + pad)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=_STEPS))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=_STEPS))
    style = {"fontsize": 10.5, "color": PLOT_INK}
    axes.set_xlabel("b (ms/µm²)", labelpad=2, **style)
    axes.set_ylabel("Δ (ms)" if timed else "Δ not known", **style)
    if not timed:
        axes.set_yticks([])
    head = "Shells, with the number of directions"
    figure.text(62 / WIDTH, 1 - 13 / height, head, va="center", **style)
    if legend:
        figure.legend(
            handles=[_key(colours[group], group) for group in legend],
            loc="lower left",
            bbox_to_anchor=(54 / WIDTH, (below - 46 - keys) / height),
            ncols=2,
            **_LEGEND,
        )


def _axes(
    figure: Figure, box: tuple[float, float, float, float], width: float, height: float
) -> Any:
    """Add axes in a box of pixels: left, bottom, width, height."""
    left, bottom, across, up = box
    return plain_axes(figure, (left / width, bottom / height, across / width, up / height))


def _count(axes: Any, labels: dict[tuple[float, float], list[str]], room: float) -> None:
    """Write the numbers of directions above their points, below where the last one is in the way.

    `room` is what a number needs on the axis of b.
    """
    style = {"fontsize": 9.5, "color": PLOT_INK, "ha": "center", "textcoords": "offset points"}
    ends = {(y, side): -np.inf for _, y in labels for side in (1, -1)}
    for (x, y), counts in sorted(labels.items()):
        side = 1 if x - ends[y, 1] > room or x - ends[y, -1] <= room else -1
        ends[y, side] = x
        va = "bottom" if side > 0 else "top"
        axes.annotate(" + ".join(counts), (x, y), (0, 5 * side), va=va, **style)


_LABEL: dict[str, Any] = {"fontsize": 9.5, "color": PLOT_INK, "ha": "center", "va": "center"}
_STEPS = [1, 2, 2.5, 5, 10]
_LEGEND: dict[str, Any] = {
    "fontsize": 9.5,
    "frameon": False,
    "labelcolor": PLOT_INK,
    "handletextpad": 0.2,
    "columnspacing": 1.2,
    "labelspacing": 0.25,
}


def _key(style: tuple[str, str], label: str) -> Line2D:
    colour, marker = style
    return Line2D([], [], color=colour, marker=marker, ls="none", ms=6, label=label)


def draw_decays(
    tissues: Sequence[dict[str, Any]],
    plot: dict[str, Any],
    *,
    density: float,
    alt: str,
    log: bool = False,
) -> Drawing:
    """Plot the signals of tissues: medians with quartiles, and the medians of the fits.

    Parameters
    ----------
    tissues : the manifest's ``decay.tissues``: name, n_voxels, n_shown, median, q25, q75, fit,
        curves
    plot : the manifest's ``plot``: x, x_label, y_label, groups
    log : on one logarithmic axis for all, from 1 down; else each from 0 up
    """
    if not tissues:
        raise ValueError("no tissue has enough voxels with an estimate")
    x = np.asarray(plot["x"], float)
    names = [str(g) for g in plot.get("groups") or [""] * x.size]
    styles = group_colours(names)
    legend = list(styles) != [""]
    across = min(WIDTH / len(tissues), 620.0)
    width = across * len(tissues)
    columns = int((width - 60) // (40 + 6.2 * max(map(len, styles))))
    columns = min(max(columns, 1), len(styles))
    rows = -(-len(styles) // columns) if legend else 0
    foot, head, height = 46.0 + 17 * rows, 26.0, 336.0 + 17 * rows
    figure = new_figure(width, height, density, "white")
    panels = []
    for n, tissue in enumerate(tissues):
        box = (n * across + 62, foot, across - 76, height - foot - head)
        axes = _axes(figure, box, width, height)
        _decay(axes, tissue, x, names, styles, apart=log)
        count = f"{text.count(tissue['n_voxels'])} voxels"
        if tissue["n_shown"] < tissue["n_voxels"]:
            count += f" ({text.count(tissue['n_shown'])} of them drawn)"
        figure.text(
            (n * across + 62) / width,
            1 - 12 / height,
            f"{str(tissue['name'])[:1].upper()}{str(tissue['name'])[1:]}, {count}",
            fontsize=10.5,
            color=PLOT_INK,
            va="center",
        )
        axes.set_xlabel(text.axis_label(plot.get("x_label") or ""), fontsize=10.5, color=PLOT_INK)
        panels.append(axes)
    _scale(panels, tissues, log=log)
    panels[0].set_ylabel(
        text.axis_label(plot.get("y_label") or "signal"), fontsize=10.5, color=PLOT_INK
    )
    if legend:
        handles = [_key(styles[group], group) for group in styles]
        style = {"bbox_to_anchor": (54 / width, 0), **_LEGEND}
        figure.legend(handles=handles, loc="lower left", ncols=columns, **style)
    return render(figure, alt)


def _decay(
    axes: Any,
    tissue: dict[str, Any],
    x: np.ndarray,
    names: list[str],
    styles: dict[str, tuple[str, str]],
    *,
    apart: bool,
) -> None:
    median, q25, q75, fit = (np.asarray(tissue[k], float) for k in ("median", "q25", "q75", "fit"))
    if not x.shape == median.shape == q25.shape == q75.shape == fit.shape:
        raise ValueError(f"{x.size} abscissae, {median.size} medians, {fit.size} fitted points")
    curves = {str(curve.get("group") or ""): curve for curve in tissue.get("curves") or []}
    # bars of one b stand side by side; echoes of two flip angles are far apart anyway
    step = min(0.008, 0.025 / len(styles)) * np.ptp(x) if apart and len(styles) > 1 else 0.0
    for n, (group, (colour, marker)) in enumerate(styles.items()):
        chosen = np.array([name == group for name in names])
        order = np.argsort(x[chosen], kind="stable")
        line = (x[chosen][order], fit[chosen][order])
        if group in curves:
            curve = curves[group]
            line = (np.asarray(curve["x"], float), np.asarray(curve["y"], float))
        axes.plot(*line, color=colour, lw=1.4, zorder=2)
        at = x[chosen] + step * (n - (len(styles) - 1) / 2)
        axes.vlines(at, q25[chosen], q75[chosen], color=colour, lw=1.2, alpha=0.7, zorder=1)
        style = {"ls": "none", "marker": marker, "ms": 5, "mec": colour, "mew": 1.1}
        axes.plot(at, median[chosen], mfc="white", zorder=3, **style)
    axes.set_xlim(0, 1.07 * float(x.max()))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))


def _scale(panels: Sequence[Any], tissues: Sequence[dict[str, Any]], *, log: bool) -> None:
    """Set the axes of the signals: one for all panels if logarithmic, else each its own."""
    if log:
        # down to the lower quartiles, but not to those that noise takes to 0
        low = max(0.85 * min(min(tissue["q25"]) for tissue in tissues), 2e-3)
        for axes in panels:
            axes.set_yscale("log")
            axes.set_ylim(low, 1.1)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.number(value, 2)))
        return
    for axes, tissue in zip(panels, tissues, strict=True):
        top = max(*tissue["q75"], *tissue["fit"])
        low = min(0.0, *tissue["q25"], *tissue["fit"])
        axes.set_ylim(low - 0.04 * top * (low < 0), 1.06 * top)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.axhline(0, color=PLOT_FAINT, lw=0.6, zorder=0)
