"""Every picture of the report: slices of maps, histograms, fits of single voxels.

Drawn with matplotlib's object-oriented interface (no global figure state), written as palette
PNGs without metadata: the same input gives the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from bids_gacelle.report import geometry, text
from bids_gacelle.report.geometry import CAPTION, LETTERS, Panel, View, Volume

BACKGROUND = "#14161a"
INK = "#e8eaed"
FAINT = "#9aa0a8"
NO_VALUE = "#4cc9f0"
OUTLINE = "#ffb000"
WIDTH = 1216.0
"""CSS pixels across the page's content."""

# Bits of a flag map from the most to the least serious; a voxel shows the first that applies.
FLAGS = (
    (4, "unusable input", "#d55e00"),
    (8, "not converged", "#cc79a7"),
    (32, "excluded by a plausibility rule", "#f0e442"),
    (2, "a parameter at a bound", "#e69f00"),
    (16, "several minima of similar depth", "#56b4e9"),
    (0, "ok", "#4b5563"),
)
GROUP_COLOURS = (
    "#1f6f8b",
    "#d1495b",
    "#6a4c93",
    "#2a9d5c",
    "#c77d00",
    "#555555",
    "#0081a7",
    "#b5179e",
)
GROUP_MARKERS = "osD^vPX*"


class Drawing(NamedTuple):
    """A finished picture: PNG bytes, size in CSS pixels, and words for who cannot see it."""

    png: bytes
    width: int
    height: int
    alt: str


def render(figure: Figure, alt: str, colours: Sequence[Any] = ()) -> Drawing:
    """Rasterise a figure to an 8-bit palette PNG.

    ``colours`` are the colours that must come out exactly (those of a colour map); with none the
    palette is chosen from the picture.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    if colours:
        palette = Image.new("P", (1, 1))
        dark, light = np.array(to_rgb(BACKGROUND)), np.array(to_rgb(INK))
        greys = [tuple(dark + (light - dark) * t) for t in np.linspace(0, 1, 40)]
        flat = [round(255 * c) for colour in [*colours, *greys] for c in to_rgb(colour)]
        palette.putpalette((flat + flat[-3:] * 256)[:768])
        indexed = picture.quantize(palette=palette, dither=Image.Dither.NONE)
    else:
        indexed = picture.quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    indexed.save(buffer, format="PNG", compress_level=7)
    width, height = figure.get_size_inches() * 72
    return Drawing(buffer.getvalue(), round(width), round(height), alt)


def new_figure(width: float, height: float, density: float, background: str) -> Figure:
    """Make an empty figure measured in CSS pixels: at 72 dpi a point is one of them."""
    return Figure(figsize=(width / 72, height / 72), dpi=72 * density, facecolor=background)


class Mosaic(NamedTuple):
    """A figure of slices before it is rasterised, and where each slice lies on it."""

    figure: Figure
    panels: list[Panel]
    width: float
    height: float
    scale: float

    def label(self, x: float, y: float, label: str, **given: Any) -> None:
        """Write text at CSS pixel (x, y) from the top left corner."""
        style: dict[str, Any] = {"fontsize": 9.5, "color": FAINT, "va": "center"} | given
        self.figure.text(x / self.width, 1 - y / self.height, label, **style)


Paint = Callable[[geometry.Plane, int], np.ndarray]
MARGIN = 10.0
QUALITY_SIDE = 128.0
"""Room for the legend of the flags; the NRMSE map beside them leaves the same."""
SIDE = 84.0
FOOT = 18.0


def mosaic(
    view: View,
    paint: Paint,
    *,
    width: float,
    density: float,
    side: float = SIDE,
    height: float = 560.0,
    limit: float = np.inf,
) -> Mosaic:
    """Slices in three planes with orientation letters, the slice numbers and the convention.

    ``paint`` gives the colours of one slice, (rows, columns, 3) uint8. ``side`` is left free at
    the right, for a colour bar or a legend; ``limit`` bounds the scale (CSS pixels per mm).
    """
    panels, scale, used = geometry.arrange(view, width - side - 2 * MARGIN, height, limit)
    used = max(used, 96.0 if side else 0.0)
    total = used + MARGIN + FOOT
    figure = new_figure(width, total, density, BACKGROUND)
    result = Mosaic(
        figure, [p._replace(x=p.x + MARGIN, y=p.y + 3) for p in panels], width, total, scale
    )
    pixels = (round(figure.bbox.height), round(figure.bbox.width))
    canvas = np.empty((*pixels, 3), np.uint8)
    canvas[:] = np.round(255 * np.array(to_rgb(BACKGROUND)))
    for panel in result.panels:
        _place(canvas, paint(panel.plane, panel.position), panel, density)
        _annotate(result, panel, view)
    figure.add_artist(_Raster(canvas))
    result.label(MARGIN, total - FOOT / 2 - 1, _convention(view, width))
    return result


class _Raster(Artist):
    """Pixels put on the figure as they are, below everything else (no resampling)."""

    zorder = -1

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
        self._rows = np.concatenate([pixels, opaque], axis=-1)[::-1].copy()  # bottom row first

    def draw(self, renderer: RendererBase) -> None:
        renderer.draw_image(renderer.new_gc(), 0, 0, self._rows)


def _place(canvas: np.ndarray, image: np.ndarray, panel: Panel, density: float) -> None:
    """Nearest-neighbour enlargement: each voxel stays a rectangle of its true proportions."""
    left, top, width, height = (
        round(density * v) for v in (panel.x, panel.y, panel.width, panel.height)
    )
    height, width = max(height, 1), max(width, 1)
    rows = ((np.arange(height) + 0.5) * image.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * image.shape[1] / width).astype(int)
    target = canvas[top : top + height, left : left + width]
    target[:] = image[rows][:, columns][: target.shape[0], : target.shape[1]]


def _annotate(target: Mosaic, panel: Panel, view: View) -> None:
    name = view.grid.stored_index(panel.plane.cut, panel.position)
    strip = panel.height < 30
    above = f"{panel.plane.name.upper()}   {name}" if panel.first else name
    narrow = panel.width < 34  # two letters would meet, or even change sides
    if panel.first and strip:
        above += f"   ({LETTERS[panel.plane.up][1]} up)"
    if panel.first and narrow:
        above += f"   ({LETTERS[panel.plane.across][0]} left)"
    target.label(panel.x, panel.y - CAPTION / 2, above, fontsize=9.5)
    if not panel.first:
        return
    style = {
        "color": "white",
        "fontweight": "bold",
        "fontsize": 11,
        "path_effects": [withStroke(linewidth=2, foreground="black")],
    }
    middle_x, middle_y = panel.x + panel.width / 2, panel.y + panel.height / 2
    low, high = LETTERS[panel.plane.across]
    if not narrow:
        target.label(panel.x + 3, middle_y, low, ha="left", **style)
        target.label(panel.x + panel.width - 3, middle_y, high, ha="right", **style)
    if not strip:
        low, high = LETTERS[panel.plane.up]
        target.label(middle_x, panel.y + 7, high, ha="center", **style)
        target.label(middle_x, panel.y + panel.height - 6, low, ha="center", **style)


def _convention(view: View, width: float) -> str:
    short = width < 760
    words = "Neurological view: subject's left is on the left"
    if not short:
        words += " of the image; i j k count voxels of the file from 0"
    if view.grid.tilt > 1:
        words += f"  ·  oblique {view.grid.tilt:.0f}°"
        words += "" if short else ", letters name the nearest axis"
    return words


# -- maps ------------------------------------------------------------------------------------


def colour_map(name: str) -> Colormap:
    """Return a perceptually uniform colour map by name (viridis when unknown), in 176 steps."""
    known = (
        name if name in ("viridis", "magma", "gray", "cividis", "plasma", "inferno") else "viridis"
    )
    return mpl.colormaps[known].resampled(176)


def nice_limit(values: np.ndarray, share: float = 98.0) -> float:
    """Choose a round upper end for a window that holds ``share`` percent of the values.

    It ends at six times the median if that comes first.
    """
    if not values.size:
        return 1.0
    # A long tail (cerebrospinal fluid, mostly) would leave the rest of the brain in the dark.
    top = min(float(np.percentile(values, share)), 6 * float(np.median(values)) or np.inf)
    if not top > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(top))
    return float(
        next(
            step
            for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
            if step * power >= top * (1 - 1e-6)
        )
        * power
    )


def map_figure(
    volume: np.ndarray,
    mask: np.ndarray,
    view: View,
    *,
    window: tuple[float, float],
    colormap: str,
    unit: str,
    width: float,
    density: float,
    side: float = SIDE,
    limit: float = np.inf,
) -> Mosaic:
    """Draw one scalar map in a fixed window: dark outside the mask, ``NO_VALUE`` where NaN."""
    colours, norm = colour_map(colormap), Normalize(*window, clip=True)
    table = (255 * colours(np.arange(colours.N))[:, :3]).round().astype(np.uint8)
    special = [np.round(255 * np.array(to_rgb(c))) for c in (NO_VALUE, BACKGROUND)]

    def paint(plane: geometry.Plane, index: int) -> np.ndarray:
        values, inside = view.section(volume, plane, index), view.section(mask, plane, index)
        usable = np.isfinite(values)
        position = np.asarray(norm(np.where(usable, values, window[0])))
        image = table[np.minimum((position * colours.N).astype(int), colours.N - 1)]
        image[~usable] = special[0]
        image[~inside] = special[1]
        return image

    result = mosaic(view, paint, width=width, density=density, side=side, limit=limit)
    values = volume[mask]
    some = values[np.isfinite(values)]
    ends = (bool((some < window[0]).any()), bool((some > window[1]).any()))
    _colour_bar(
        result, colours, Normalize(*window), unit, ends, side=side, missing=some.size < values.size
    )
    return result


def _colour_bar(
    target: Mosaic,
    colours: Colormap,
    norm: Normalize,
    unit: str,
    ends: tuple[bool, bool],
    *,
    side: float,
    missing: bool,
) -> None:
    left = target.width - side + 12
    top, bottom = 30.0, target.height - FOOT - (36 if missing else 16)
    bottom = min(bottom, top + 280)
    box = (
        left / target.width,
        1 - bottom / target.height,
        11 / target.width,
        (bottom - top) / target.height,
    )
    axes = target.figure.add_axes(box)
    extend = {
        (False, False): "neither",
        (True, False): "min",
        (False, True): "max",
        (True, True): "both",
    }
    bar = target.figure.colorbar(
        ScalarMappable(norm, colours),
        cax=axes,
        extend=extend[ends],
        extendfrac=0.04,
        drawedges=False,
    )
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.number(value, 3)))
    bar.ax.tick_params(labelsize=10, colors=INK, length=3, width=0.6, pad=2)
    target.label(left, 13, unit or "no unit", color=INK, fontsize=10.5)
    if missing:
        _swatch(target, left, bottom + 24, NO_VALUE, "no value")


def _swatch(
    target: Mosaic, x: float, y: float, colour: str, label: str, size: float = 9.0
) -> None:
    patch = Rectangle(
        (x / target.width, 1 - (y + size / 2) / target.height),
        size / target.width,
        size / target.height,
        transform=target.figure.transFigure,
        facecolor=colour,
        edgecolor="none",
    )
    target.figure.add_artist(patch)
    target.label(x + size + 5, y, label, color=INK)


def draw_map(mosaic_: Mosaic, colormap: str, alt: str) -> Drawing:
    """Rasterise a ``map_figure`` with its exact colours."""
    colours = colour_map(colormap)
    return render(mosaic_.figure, alt, [*colours(np.arange(colours.N))[:, :3], NO_VALUE])


def draw_flags(
    flags: np.ndarray,
    mask: np.ndarray,
    view: View,
    *,
    width: float,
    density: float,
    alt: str,
    limit: float = np.inf,
) -> Drawing:
    """Map where the fit is not to be trusted and why: the most serious flag of each voxel."""
    worst = np.full(flags.shape, len(FLAGS) - 1, np.uint8)
    for n, (bit, _, _) in reversed(list(enumerate(FLAGS[:-1]))):
        worst[(flags.astype(np.uint8) & bit) > 0] = n
    inside = mask & ((flags.astype(np.uint8) & 1) == 0)
    table = (255 * np.array([to_rgb(c) for *_, c in FLAGS])).round().astype(np.uint8)
    background = np.round(255 * np.array(to_rgb(BACKGROUND))).astype(np.uint8)

    def paint(plane: geometry.Plane, index: int) -> np.ndarray:
        image = table[view.section(worst, plane, index)]
        image[~view.section(inside, plane, index)] = background
        return image

    result = mosaic(view, paint, width=width, density=density, side=QUALITY_SIDE, limit=limit)
    left, y = result.width - QUALITY_SIDE + 12, 22.0
    for _, name, colour in FLAGS:
        lines = textwrap.wrap(name, 18)
        _swatch(result, left, y, colour, lines[0])
        for extra in lines[1:]:
            y += 13
            result.label(left + 14, y, extra, color=INK)
        y += 22
    return render(result.figure, alt, [c for *_, c in FLAGS])


def draw_mask(
    reference: Volume, mask: np.ndarray, view: View, *, density: float, alt: str
) -> Drawing:
    """Outline the mask, voxel by voxel, over the image it was made for."""
    values = reference.data[np.isfinite(reference.data)]
    low, high = np.percentile(values, [1, 99.5]) if values.size else (0.0, 1.0)
    grey = colour_map("gray")
    table = (255 * grey(np.arange(grey.N))[:, :3]).round().astype(np.uint8)

    def paint(plane: geometry.Plane, index: int) -> np.ndarray:
        image = np.nan_to_num(view.section(reference.data, plane, index), nan=low)
        position = np.clip((image - low) / max(high - low, 1e-30), 0, 1)
        return table[(position * (grey.N - 1)).round().astype(int)]

    result = mosaic(view, paint, width=WIDTH, density=density, side=0.0, height=520.0)
    segments = []
    for panel in result.panels:
        edges = mask_edges(view.section(mask, panel.plane, panel.position))
        rows, columns = view.section(mask, panel.plane, panel.position).shape
        if len(edges):
            edges = edges / [columns, rows] * [panel.width, panel.height] + [panel.x, panel.y]
            segments.append(edges / [result.width, result.height] * [1, -1] + [0, 1])
    lines = LineCollection(
        list(np.concatenate(segments)) if segments else [],
        colors=OUTLINE,
        linewidths=0.9,
        capstyle="round",
        transform=result.figure.transFigure,
    )
    result.figure.add_artist(lines)
    shades = [tuple(np.array(to_rgb(OUTLINE)) * t) for t in np.linspace(0.3, 1, 16)]
    return render(result.figure, alt, [*grey(np.arange(grey.N))[:, :3], *shades])


def mask_edges(inside: np.ndarray) -> np.ndarray:
    """Find the border of a mask as line segments (n, 2 ends, 2) in (column, row) units."""
    padded = np.pad(inside.astype(bool), 1)
    rows, columns = np.nonzero(padded[1:, :] != padded[:-1, :])
    flat = np.stack([np.stack([columns - 1, rows], -1), np.stack([columns, rows], -1)], 1)
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([np.stack([columns, rows - 1], -1), np.stack([columns, rows], -1)], 1)
    return np.concatenate([flat, upright]).astype(float)


# -- plots -----------------------------------------------------------------------------------

PLOT_INK = "#24292f"
PLOT_FAINT = "#7a828c"
BAR = "#4a7fa5"
BEYOND = "#d1495b"


def plain_axes(figure: Figure, box: Sequence[float]) -> Any:
    """Add axes with a left and a lower line only; `box` is left, bottom, width, height."""
    axes = figure.add_axes(tuple(box))  # type: ignore[arg-type]
    axes.set_facecolor("white")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PLOT_FAINT)
        axes.spines[side].set_linewidth(0.7)
    axes.tick_params(labelsize=10, colors=PLOT_INK, length=3, width=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: text.number(value, 4)))
    return axes


def draw_histogram(
    values: np.ndarray,
    window: tuple[float, float],
    *,
    label: str,
    width: float,
    density: float,
    alt: str,
    bounds: Sequence[float] = (),
    height: float = 180.0,
) -> Drawing:
    """Count values in the mask: display window shaded, bounds dashed, the rest in edge bars."""
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no voxel has a value")
    span = window[1] - window[0]
    low, high = window[0] - 0.06 * span, window[1] + 0.06 * span
    figure = new_figure(width, height, density, "white")
    axes = plain_axes(figure, (52 / width, 38 / height, 1 - 66 / width, 1 - 76 / height))
    edges = np.linspace(*window, 81)
    axes.axvspan(*window, color="#eef3f7", lw=0, zorder=0)
    axes.stairs(np.histogram(values, edges)[0], edges, fill=True, color=BAR, lw=0, zorder=2)
    axes.set_ylim(bottom=0)
    notes = []
    below, above = float(np.mean(values < window[0])), float(np.mean(values > window[1]))
    for share, start, word in ((below, low, "below"), (above, window[1], "above")):
        if share:
            axes.bar(start, share * values.size, 0.06 * span, align="edge", color=BEYOND, zorder=2)
            notes.append(f"{text.percent(share)} {word} the window")
    median = float(np.median(values))
    axes.axvline(median, color=PLOT_INK, lw=1.2, zorder=3)
    for bound in bounds:
        if low <= bound <= high:
            axes.axvline(bound, color="#c2600a", lw=1.6, ls=(0, (3, 2)), zorder=3)
        else:
            notes.append(f"bound {text.number(bound)} outside the plot")
    q1, q3 = np.percentile(values, [25, 75])
    head = (
        f"median {text.number(median, 3)}, quartiles {text.number(q1, 3)} and {text.number(q3, 3)}"
    )
    lines = textwrap.wrap("  ·  ".join([head, *notes]), int(width / 6))
    for n, line in enumerate(lines[:2]):
        figure.text(
            52 / width, 1 - (11 + 13 * n) / height, line, fontsize=10, color=PLOT_INK, va="center"
        )
    axes.set_xlim(low, high)
    axes.set_xlabel(label, fontsize=10.5, color=PLOT_INK, labelpad=2)
    axes.set_ylabel("voxels", fontsize=10.5, color=PLOT_INK)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return render(figure, alt)


def draw_example(
    example: dict[str, Any],
    plot: dict[str, Any],
    *,
    width: float,
    density: float,
    alt: str,
    height: float = 330.0,
) -> Drawing:
    """Plot one voxel: measured points and fitted signal above, measured minus fitted below."""
    x, data, fitted = (np.asarray(v, float) for v in (plot["x"], example["data"], example["fit"]))
    if not x.shape == data.shape == fitted.shape:
        raise ValueError(
            f"{x.size} abscissae, {data.size} data points and {fitted.size} fitted points"
        )
    names = [str(g) for g in plot.get("groups") or [""] * x.size]
    groups = list(dict.fromkeys(names))
    figure = new_figure(width, height, density, "white")
    left, across = 76 / width, 1 - 88 / width
    lower, split = 44 / height, 116 / height
    residual_axes = plain_axes(figure, (left, lower, across, split - lower))
    axes = plain_axes(figure, (left, split + 14 / height, across, 1 - split - 28 / height))
    curves = {str(curve.get("group") or ""): curve for curve in example.get("curves") or []}
    for n, group in enumerate(groups):
        chosen = np.array([name == group for name in names])
        colour = GROUP_COLOURS[n % len(GROUP_COLOURS)]
        marker = GROUP_MARKERS[n % len(GROUP_MARKERS)]
        order = np.argsort(x[chosen], kind="stable")
        line = (x[chosen][order], fitted[chosen][order])
        if group in curves:
            curve = curves[group]
            line = (np.asarray(curve["x"], float), np.asarray(curve["y"], float))
        axes.plot(*line, color=colour, lw=1.4, zorder=2)
        style = {"ls": "none", "marker": marker, "ms": 5, "mec": colour, "mew": 1.1, "zorder": 3}
        axes.plot(x[chosen], data[chosen], mfc="white", label=group, **style)
        residual_axes.vlines(x[chosen], 0, (data - fitted)[chosen], color=colour, lw=1)
        residual_axes.plot(x[chosen], (data - fitted)[chosen], mfc=colour, **(style | {"ms": 3.5}))
    _finish_example(axes, residual_axes, data - fitted, plot, legend=groups != [""])
    return render(figure, alt)


def _finish_example(
    axes: Any,
    residual_axes: Any,
    residual: np.ndarray,
    plot: dict[str, Any],
    *,
    legend: bool,
) -> None:
    drawn = np.concatenate([np.asarray(line.get_xdata(), float) for line in axes.lines])
    pad = 0.03 * (np.ptp(drawn) or 1.0)
    for each in (axes, residual_axes):
        each.set_xlim(drawn.min() - pad, drawn.max() + pad)
        each.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelbottom=False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.08)
    axes.set_ylabel(
        text.axis_label(plot.get("y_label") or "signal"), fontsize=10.5, color=PLOT_INK
    )
    if legend:
        columns = 1 if len(axes.get_legend_handles_labels()[1]) < 6 else 2
        axes.legend(
            fontsize=9.5, frameon=False, labelcolor=PLOT_INK, handletextpad=0.3, ncols=columns
        )
    top = 1.25 * float(np.nanmax(np.abs(residual), initial=0)) or 1.0
    residual_axes.set_ylim(-top, top)
    residual_axes.axhline(0, color=PLOT_FAINT, lw=0.8, zorder=1)
    residual_axes.yaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    residual_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.number(value, 2)))
    residual_axes.set_ylabel("residual", fontsize=10.5, color=PLOT_INK)
    residual_axes.set_xlabel(
        text.axis_label(plot.get("x_label") or ""), fontsize=10.5, color=PLOT_INK
    )
