"""The subject page: everything a person needs to believe the maps or not, in one file.

A pure function of the files under the output folder and its arguments: no clock, no machine
state. What is missing or cannot be drawn is named on the page, and the rest goes on.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np

from bids_gacelle import __version__
from bids_gacelle.report import acquisition, figures, geometry, tables, text
from bids_gacelle.report.figures import Drawing
from bids_gacelle.report.geometry import View, Volume

SIZE_LIMIT = 15_000_000
"""Bytes a page may have; pictures become coarser until it holds."""

DENSITY = 1.6
"""Picture pixels per CSS pixel, to stay sharp on fine screens and on paper."""

_HALF = 604.0
_THIRD = 400.0
_HISTOGRAM = 180.0
_UNUSABLE = 4
_NO_SD: dict[str, Any] = {"missing": "No standard deviation was written for this quantity."}


# What a template may ask of a manifest, and of a map in it, that leaves something out.
_MANIFEST: dict[str, Any] = dict.fromkeys(
    ("title", "description", "created", "n_voxels", "maps", "flag_counts", "version")
)
_MAP: dict[str, Any] = dict.fromkeys(("at_bound", "bounds"))


def build_subject_report(
    out_dir: Path,
    subject: str,
    manifests: list[dict[str, Any]],
    status: list[dict[str, Any]],
    run: dict[str, Any],
) -> Path:
    """Write ``out_dir/sub-<subject>.html``, a self-contained page, atomically.

    Parameters
    ----------
    out_dir
        Root of the output dataset; the manifests' paths are relative to it.
    subject
        Label without ``sub-``.
    manifests
        One per series and model that was fitted, as read from ``*_manifest.json``.
    status
        One per series and model that was planned: ``session series model status reason seconds``
        with ``status`` one of ``ok``, ``failed``, ``skipped``.
    run
        ``command config_toml run_id version log_tail``, each optional.

    Returns
    -------
    Path of the page.
    """
    out_dir, density, page = Path(out_dir), DENSITY, b""
    for _ in range(5):
        builder = _Builder(out_dir, density)
        page = _render(builder, subject, manifests, status, run)
        if len(page) <= SIZE_LIMIT:
            break
        room = SIZE_LIMIT - (len(page) - builder.picture_bytes)
        density *= 0.85 * max(room / max(builder.picture_bytes, 1), 0.1) ** 0.5
    path = out_dir / f"sub-{subject}.html"
    _write_atomically(path, page)
    return path


def _write_atomically(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes it private; the page is for everybody
        os.replace(name, path)  # noqa: PTH105 - the one call that is atomic on every system
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _render(
    builder: _Builder,
    subject: str,
    manifests: list[dict[str, Any]],
    status: list[dict[str, Any]],
    run: dict[str, Any],
) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bids_gacelle.report"),
        autoescape=True,
        finalize=text.clean,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "unit": text.unit,
        "number": text.number,
        "count": text.count,
        "percent": text.percent,
        "seconds": text.seconds,
        "doi": lambda doi: (
            "https://doi.org/"
            + quote(re.sub(r"^(https?://(dx\.)?doi\.org/|doi:)", "", str(doi)), "/()")
        ),
    }
    context = _context(builder, subject, manifests, status, run)
    # Surrogates cannot be encoded; the finalizer has replaced them everywhere but in the template.
    return environment.get_template("subject.html.jinja").render(context).encode("utf-8")


def _context(
    builder: _Builder,
    subject: str,
    manifests: list[dict[str, Any]],
    status: list[dict[str, Any]],
    run: dict[str, Any],
) -> dict[str, Any]:
    manifests = [_MANIFEST | manifest for manifest in manifests]
    run = dict.fromkeys(("command", "config_toml", "run_id", "version", "log_tail"), "") | run
    entries = _entries(manifests, status)
    labels = sorted({e["session"] for e in entries}, key=text.natural)
    sessions = [
        builder.session(label, [e for e in entries if e["session"] == label]) for label in labels
    ]
    devices = dict.fromkeys(
        str(m["fit"]["device"]) for m in manifests if (m.get("fit") or {}).get("device")
    )
    spent = [s for s in (text.finite(e["seconds"]) for e in entries) if s is not None]
    failed = sum(e["status"] == "failed" for e in entries)
    skipped = sum(e["status"] == "skipped" for e in entries)
    if not entries:
        overall = ("failed", "nothing was fitted")
    elif failed:
        overall = ("failed", f"{failed} of {len(entries)} fits failed")
    elif builder.problems:
        overall = ("incomplete", f"{len(builder.problems)} expected pieces are missing")
    elif skipped:
        overall = ("skipped", f"{skipped} of {len(entries)} fits skipped")
    else:
        overall = ("ok", "all fits finished")
    return {
        "subject": subject,
        "run": run,
        "version": run.get("version") or __version__,
        "overall": overall,
        "entries": entries,
        "sessions": sessions,
        "labels": [label for label in labels if label],
        "devices": list(devices),
        "total_seconds": sum(spent) if spent else None,
        "methods": _methods(manifests),
        "references": _references(manifests),
        "problems": builder.problems,
        "unfinished": [e for e in entries if e["status"] != "ok"],
        "versions": _versions(manifests, run),
        "roi_titles": tables.ROI_TITLES,
        "roi_first": tables.ROI_FIRST,
        "roi_rest": tables.ROI_REST,
    }


def _entries(
    manifests: list[dict[str, Any]], status: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Join what was planned with what was written, in the order of the plan."""
    by_key = {_key(m): m for m in manifests}
    planned = {_key(s): s for s in status}
    entries = []
    for n, key in enumerate([*planned, *(k for k in by_key if k not in planned)]):
        state, manifest = planned.get(key, {}), by_key.get(key)
        session, series, model = key
        slug = re.sub(r"[^a-z0-9]+", "-", f"{session} {series} {model}".lower()).strip("-")
        seconds = state.get("seconds")
        entries.append(
            {
                "id": f"fit-{n + 1}-{slug}",
                "session": session,
                "series": series,
                "model": model,
                "status": state.get("status") or "ok",
                "reason": state.get("reason") or "",
                "seconds": ((manifest or {}).get("fit") or {}).get("seconds")
                if seconds is None
                else seconds,
                "manifest": manifest,
                "ok_share": _ok_share(manifest),
            }
        )
    return entries


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return (
        str(entry.get("session") or ""),
        str(entry.get("series") or ""),
        str(entry.get("model") or ""),
    )


def _ok_share(manifest: dict[str, Any] | None) -> float | None:
    counts = (manifest or {}).get("flag_counts") or {}
    total = text.finite((manifest or {}).get("n_voxels"))
    return counts["ok"] / total if total and "ok" in counts else None


def _methods(manifests: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(m["methods"]) for m in manifests if m.get("methods")))


def _references(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {
        str(r.get("key") or r.get("text")): r for m in manifests for r in m.get("references") or []
    }
    return [found[key] for key in sorted(found)]


def _versions(manifests: list[dict[str, Any]], run: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {"command", "config_toml", "log_tail", "run_id", "version"}
    rows = [("bids_gacelle (this page)", str(run.get("version") or __version__))]
    for manifest in manifests:
        session, series, model = _key(manifest)
        where = f"{'ses-' + session + ' ' if session else ''}{series}, {model}"
        rows.append(
            (
                f"maps of {where}",
                f"{manifest.get('version', 'n/a')}, written {manifest.get('created', 'n/a')}",
            )
        )
    return rows + [
        (str(k), str(v))
        for k, v in run.items()
        if k not in shown and isinstance(v, str | int | float)
    ]


@dataclass
class _Builder:
    """Draws what the page shows and collects what it could not."""

    out_dir: Path
    density: float
    problems: list[str] = field(default_factory=list)
    picture_bytes: int = 0

    # Missing pieces: every part of the page is made inside `attempt`, so that none can take the
    # others with it.

    def attempt(self, what: str, make: Callable[[], Any]) -> dict[str, Any]:
        """``{"value": ...}``, or ``{"missing": sentence}`` when it cannot be made."""
        try:
            return {"value": make()}
        except FileNotFoundError as error:
            name = Path(str(error.filename or error)).name
            sentence = f"Expected but missing: {what} (no file {name})."
        except _Absent as error:
            sentence = f"Expected but missing: {what} ({error})."
        except Exception as error:  # whatever a broken file provokes must not cost the page
            sentence = f"Could not be drawn: {what} ({type(error).__name__}: {error})."
        if sentence not in self.problems:
            self.problems.append(sentence)
        return {"missing": sentence}

    def picture(self, what: str, make: Callable[[], Drawing]) -> dict[str, Any]:
        """Encode a figure as a data URI with size and alternative text, or say why not."""

        def encode() -> dict[str, Any]:
            drawing = make()
            uri = "data:image/png;base64," + base64.b64encode(drawing.png).decode("ascii")
            self.picture_bytes += len(uri)
            return {
                "uri": uri,
                "width": drawing.width,
                "height": drawing.height,
                "alt": drawing.alt,
            }

        return self.attempt(what, encode)

    def load(self, relative: str | None, what: str) -> Volume:
        if not relative:
            raise _Absent(f"no {what} was written")
        return geometry.load_volume(self.out_dir / relative)

    def load_like(self, relative: str | None, what: str, grid: Volume) -> Volume:
        """Load an image that has to lie on the grid of another."""
        volume = self.load(relative, what)
        if volume.data.shape != grid.data.shape:
            raise ValueError(
                f"{what} is {volume.data.shape}, the mask is {grid.data.shape} voxels"
            )
        return volume

    def values(self, relative: str | None, what: str, grid: _Grid) -> np.ndarray:
        """Load a map with NaN where the input was unusable; files may hold 0 there."""
        data = self.load_like(relative, what, grid.mask).data
        return np.where(grid.unusable, np.nan, data)

    # The parts of a session.

    def session(self, label: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        where = f"ses-{label} " if label else ""
        for entry in entries:
            if entry["manifest"] is None and entry["status"] == "ok":
                name = f"{where}{entry['series']}, {entry['model']}"
                self.problems.append(
                    f"Expected but missing: results of {name} (reported ok, no manifest)."
                )
        fitted = [e["manifest"] for e in entries if e["manifest"] is not None]
        by_series: dict[str, list[dict[str, Any]]] = {}
        for manifest in fitted:
            by_series.setdefault(str(manifest.get("series", "")), []).append(manifest)
        models = []
        for entry in entries:
            manifest = entry["manifest"]
            name = f"{where}{entry['series']} {entry['model']}"
            body = self.model(manifest, name) if manifest is not None else None
            models.append(entry | {"body": body})
        return {
            "label": label,
            "id": re.sub(r"[^A-Za-z0-9]+", "-", f"ses-{label}") if label else "results",
            "title": f"Session {label}" if label else "Results",
            "inputs": [self.inputs(series, group) for series, group in by_series.items()],
            "masks": self.masks(fitted, where),
            "models": models,
            "rois": [self.rois(m, where) for m in fitted],
        }

    def inputs(self, series: str, group: list[dict[str, Any]]) -> dict[str, Any]:
        files = {
            (i.get("role", ""), i.get("file", "")): i for m in group for i in m.get("inputs") or []
        }
        seen: dict[str, list[dict[str, Any]]] = {}
        for manifest in group:
            entries = manifest.get("acquisition") or []
            if entries not in seen.values():
                seen[str(manifest.get("model", ""))] = entries
        warnings = dict.fromkeys(str(w) for m in group for w in m.get("warnings") or [])
        raw_dwi = series.startswith("dwi") and not all(m.get("preprocessed", True) for m in group)
        return {
            "series": series,
            "files": list(files.values()),
            "acquisitions": [
                {
                    "model": model if len(seen) > 1 else "",
                    "values": tables.acquisition_values(entries),
                    "lists": tables.acquisition_lists(entries),
                }
                for model, entries in seen.items()
            ],
            # The page has its own, stronger words for raw diffusion images.
            "warnings": [w for w in warnings if not (raw_dwi and "without preprocessing" in w)],
            "unprocessed": raw_dwi,
            "shells": self.shells(series, group),
        }

    def shells(self, series: str, group: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Draw the shells and directions of a series; None where there are none."""
        found = next((m["gradients"] for m in group if m.get("gradients")), None)
        if found is None:
            return None
        alt = (
            f"Acquisition of {series}: b against diffusion time of {len(found)} shells, and the "
            "directions of each on half a sphere"
        )
        return self.picture(
            f"acquisition of {series}",
            lambda: acquisition.draw_acquisition(found, density=self.density, alt=alt),
        )

    def masks(self, fitted: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        """Draw one outline per distinct mask and reference image of the session."""
        shown: dict[tuple[str, str], dict[str, Any]] = {}
        for manifest in fitted:
            mask, reference = manifest.get("mask") or {}, manifest.get("reference") or {}
            # a mask made from the image has no source: it is the same for all models of a series
            found = mask.get("source") or (mask.get("origin"), manifest.get("n_voxels"))
            key = (str(found), str(manifest.get("series", "")))
            if key in shown:
                shown[key]["models"].append(str(manifest.get("model", "")))
                continue
            label = str(reference.get("label") or "reference image")
            what = f"{where}{manifest.get('series', '')} mask over {label}"

            def draw(
                mask: dict[str, Any] = mask,
                reference: dict[str, Any] = reference,
                what: str = what,
            ) -> Drawing:
                return self._mask_drawing(mask, reference, what)

            shown[key] = {
                "series": str(manifest.get("series", "")),
                "models": [str(manifest.get("model", ""))],
                "label": label,
                "origin": str(mask.get("origin") or "unknown"),
                "source": str(mask.get("source") or mask.get("file") or ""),
                "n_voxels": manifest.get("n_voxels"),
                "figure": self.picture(what, draw),
            }
        return list(shown.values())

    def _mask_drawing(self, mask: dict[str, Any], reference: dict[str, Any], what: str) -> Drawing:
        volume = self.load(mask.get("file"), "mask")
        image = self.load_like(reference.get("file"), "reference image", volume)
        bright = np.nan_to_num(image.data)
        view = geometry.choose_view(volume, surround=bright > 0.12 * np.percentile(bright, 99))
        alt = f"Outline of the {what}, axial, coronal and sagittal slices"
        return figures.draw_mask(image, volume.data > 0, view, density=self.density, alt=alt)

    def model(self, manifest: dict[str, Any], name: str) -> dict[str, Any]:
        """Draw everything about one fit."""
        loaded = self.attempt(f"mask of {name}", lambda: self._grid(manifest))
        parameters, quality = [], {}
        if "value" in loaded:
            grid = loaded["value"]
            parameters = [self.parameter(p, grid, name) for p in manifest.get("maps") or []]
            quality = self.quality(manifest, grid, name)
        if not manifest.get("maps"):
            self.problems.append(
                f"Expected but missing: maps of {name} (the manifest lists none)."
            )
        return {
            "manifest": manifest,
            "loaded": loaded,
            "parameters": parameters,
            "quality": quality,
            "decay": self.decay(manifest, name),
            "adequacy": self.adequacy(manifest, name),
            "counts": _counts(manifest),
            "facts": _facts(manifest.get("fit") or {}),
            "examples": [self.example(e, manifest, name) for e in manifest.get("examples") or []],
        }

    def decay(self, manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
        """Draw signal and fit of whole tissues; None for fits that do not tell them."""
        found = manifest.get("decay")
        if not found:
            return None
        named = ", ".join(str(t.get("name")) for t in found.get("tissues") or [])
        drawn = self.picture(
            f"signal and fit of {name}",
            lambda: acquisition.draw_decays(
                found.get("tissues") or [],
                manifest.get("plot") or {},
                density=self.density,
                log=bool(found.get("log")),
                alt=f"Median signal with quartiles and median fit of {name} in {named}",
            ),
        )
        return {**found, "figure": drawn}

    def adequacy(self, manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
        """Tabulate what the protocol was expected to tell, and what it told."""
        found = (manifest.get("fit") or {}).get("adequacy")
        if not found:
            return None
        rows = self.attempt(
            f"expected standard deviations of {name}",
            lambda: tables.adequacy_rows(found["expected"], manifest.get("obtained_sd") or {}),
        )
        return {"snr": None, "assumed": False, "sentences": []} | found | {"rows": rows}

    def _grid(self, manifest: dict[str, Any]) -> _Grid:
        mask = self.load((manifest.get("mask") or {}).get("file"), "mask")
        unusable = np.zeros(mask.data.shape, bool)
        with contextlib.suppress(Exception):  # `quality` says what is wrong with the flag map
            flags = self.load_like(manifest.get("flags"), "flag map", mask).data
            unusable = (flags.astype(np.uint8) & _UNUSABLE) > 0
        return _Grid(mask, mask.data > 0, geometry.choose_view(mask), unusable)

    def parameter(self, item: dict[str, Any], grid: _Grid, name: str) -> dict[str, Any]:
        """Draw map, standard deviation and their histograms for one parameter."""
        symbol, cmixf = str(item.get("name", "")), str(item.get("unit", ""))
        label, what = str(item.get("label") or symbol), f"{symbol} of {name}"
        result: dict[str, Any] = {
            "name": symbol,
            "label": label,
            "unit": text.unit(cmixf),
            "item": _MAP | item,
            "bounds_text": text.interval(item.get("bounds"), cmixf),
        }

        def load(kind: str, relative: str | None) -> dict[str, Any]:
            return self.attempt(f"{kind} of {what}", lambda: self.values(relative, kind, grid))

        loaded = load("map", item.get("file"))
        spread = load("SD map", item["std"]) if item.get("std") else _NO_SD
        result |= {"map": loaded, "histogram": loaded, "sd": spread, "sd_histogram": spread}
        limit, height = np.inf, _HISTOGRAM
        if "value" in loaded:
            limit = self._map(result, loaded["value"], grid, what)
        if "value" in spread:
            some = spread["value"][grid.inside]
            window = (0.0, figures.nice_limit(some[np.isfinite(some)]))
            result["sd"] = self._scalar(
                f"SD of {what}", spread["value"], grid, window, cmixf, limit=limit
            )
            if "value" in result["sd"]:  # the two histograms beside it end where it ends
                height = max(height, result["sd"]["value"]["height"] / 2)
            result["sd_histogram"] = self._histogram(
                f"SD of {what}", some, window, text.with_unit(f"SD of {symbol}", cmixf), height
            )
        if "value" in loaded:
            result["histogram"] = self._histogram(
                what,
                loaded["value"][grid.inside],
                result["window"],
                text.with_unit(symbol, cmixf),
                height,
                item.get("bounds"),
            )
        return result

    def _map(self, result: dict[str, Any], values: np.ndarray, grid: _Grid, what: str) -> float:
        """Add the map and its window to ``result``; return the scale it is drawn at."""
        item, readable = result["item"], result["unit"]
        window, fixed = _window(item, values[grid.inside])
        shown = f"{text.number(window[0])} to {text.number(window[1])} {readable}".strip()
        colours = str(item.get("colormap") or "viridis")
        result |= {"window": window, "fixed": fixed, "window_text": shown}
        drawn = self.attempt(
            f"map of {what}",
            lambda: figures.map_figure(
                values,
                grid.inside,
                grid.view,
                window=window,
                colormap=colours,
                unit=readable,
                width=figures.WIDTH,
                density=self.density,
            ),
        )
        result["map"] = drawn
        if "missing" in drawn:
            return float("inf")
        alt = f"{result['label']} ({what}) in axial, coronal and sagittal slices, window {shown}"
        result["map"] = self.picture(
            f"map of {what}", lambda: figures.draw_map(drawn["value"], colours, alt)
        )
        return float(drawn["value"].scale)

    def _histogram(
        self,
        what: str,
        values: np.ndarray,
        window: tuple[float, float],
        label: str,
        height: float,
        bounds: list[Any] | None = None,
    ) -> dict[str, Any]:
        return self.picture(
            f"histogram of {what}",
            lambda: figures.draw_histogram(
                values,
                window,
                label=label,
                width=_HALF,
                height=height,
                density=self.density,
                alt=f"Histogram of {what} within the mask",
                bounds=[b for b in map(text.finite, bounds or ()) if b is not None],
            ),
        )

    def _scalar(
        self,
        what: str,
        values: np.ndarray,
        grid: _Grid,
        window: tuple[float, float],
        cmixf: str,
        *,
        limit: float = np.inf,
        side: float = figures.SIDE,
    ) -> dict[str, Any]:
        """Draw a map of a spread or an error, at half the width of the page."""

        def draw() -> Drawing:
            drawn = figures.map_figure(
                values,
                grid.inside,
                grid.view.fewer(3),
                window=window,
                colormap="magma",
                unit=text.unit(cmixf),
                width=_HALF,
                density=self.density,
                side=side,
                limit=limit,
            )
            shown = f"{text.number(window[0])} to {text.number(window[1])} {text.unit(cmixf)}"
            return figures.draw_map(drawn, "magma", f"{what} in slices, window {shown}".strip())

        return self.picture(what, draw)

    def quality(self, manifest: dict[str, Any], grid: _Grid, name: str) -> dict[str, Any]:
        """Draw the NRMSE map with its histogram, and the flag map."""
        what = f"NRMSE of {name}"
        error = self.attempt(what, lambda: self.values(manifest.get("nrmse"), "NRMSE map", grid))
        result: dict[str, Any] = {"nrmse": error, "nrmse_histogram": error}
        if "value" in error:
            some = error["value"][grid.inside]
            window = (0.0, figures.nice_limit(some[np.isfinite(some)]))
            result["nrmse"] = self._scalar(
                what, error["value"], grid, window, "1", side=figures.QUALITY_SIDE
            )
            result["nrmse_histogram"] = self._histogram(
                what, some, window, "NRMSE", 1.4 * _HISTOGRAM
            )

        def flags() -> Drawing:
            volume = self.load_like(manifest.get("flags"), "flag map", grid.mask)
            return figures.draw_flags(
                np.nan_to_num(volume.data),
                grid.inside,
                grid.view.fewer(3),
                width=_HALF,
                density=self.density,
                alt=f"Flags of {name} in slices; the counts are in the table",
            )

        result["flags"] = self.picture(f"flag map of {name}", flags)
        return result

    def example(
        self, example: dict[str, Any], manifest: dict[str, Any], name: str
    ) -> dict[str, Any]:
        label = str(example.get("label", ""))
        voxel = ", ".join(str(v) for v in example.get("voxel") or [])
        units = {str(m.get("name")): str(m.get("unit", "")) for m in manifest.get("maps") or []}
        deviations = example.get("std") or {}
        return {
            "label": label,
            "voxel": voxel,
            "nrmse": text.number(example.get("nrmse"), 3),
            "values": [
                {
                    "name": key,
                    "text": text.estimate(value, deviations.get(key)),
                    "unit": text.unit(units.get(key, "")),
                }
                for key, value in (example.get("values") or {}).items()
            ],
            "figure": self.picture(
                f"{label} example voxel of {name}",
                lambda: figures.draw_example(
                    example,
                    manifest.get("plot") or {},
                    width=_THIRD,
                    density=self.density,
                    alt=f"Data, fit and residual of the {label} voxel ({voxel}) of {name}",
                ),
            ),
        }

    def rois(self, manifest: dict[str, Any], where: str) -> dict[str, Any]:
        model, series = str(manifest.get("model", "")), str(manifest.get("series", ""))
        units = {
            str(m.get("name")): text.unit(str(m.get("unit", "")))
            for m in manifest.get("maps") or []
        }

        def read(relative: str) -> dict[str, Any]:
            atlas = re.search(r"_atlas-([A-Za-z0-9]+)", relative)
            name = atlas[1] if atlas else Path(relative).stem
            rows = self.attempt(
                f"ROI table {name} of {where}{series} {model}",
                lambda: [_roi_row(r, units) for r in tables.read_rois(self.out_dir / relative)],
            )
            return rows | {"name": name, "file": relative}

        found = [read(str(relative)) for relative in manifest.get("tables") or []]
        return {"model": model, "series": series, "tables": found}


class _Grid(NamedTuple):
    """Where the maps of a fit lie: the mask, the slices shown, the voxels without an estimate."""

    mask: Volume
    inside: np.ndarray
    view: View
    unusable: np.ndarray


class _Absent(Exception):
    """A manifest does not name a file that every fit should have."""


def _roi_row(row: dict[str, str], units: dict[str, str]) -> dict[str, Any]:
    hemi = row.get("hemi") or ""
    return {
        "index": row["index"],
        "name": row["name"],
        "hemi": "" if hemi == "n/a" else hemi,
        "param": row["param"],
        "unit": units.get(row["param"], ""),
        "first": tables.roi_cells(row, tables.ROI_FIRST),
        "rest": tables.roi_cells(row, tables.ROI_REST),
    }


def _window(item: dict[str, Any], values: np.ndarray) -> tuple[tuple[float, float], bool]:
    """Return the display window, and whether it is the fixed one of the parameter."""
    given = [text.finite(end) for end in item.get("window") or ()]
    if len(given) == 2 and given[0] is not None and given[1] is not None:
        return (given[0], given[1]), True
    return (0.0, figures.nice_limit(values[np.isfinite(values)], 99.5)), False


def _counts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    colours = {name: colour for _, name, colour in figures.FLAGS}
    total = text.finite(manifest.get("n_voxels")) or 0
    return [
        {
            "name": name,
            "n": n,
            "share": n / total if total else None,
            "colour": colours.get(name, ""),
        }
        for name, n in (manifest.get("flag_counts") or {}).items()
    ]


def _facts(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """List the settings of a fit as label and text; nested ones are shown elsewhere."""
    formats: dict[str, Callable[[Any], str]] = {
        "seconds": text.seconds,
        "n_voxels": text.count,
        "voxels_per_second": text.count,
    }
    facts = []
    for key, value in fit.items():
        if isinstance(value, dict | list):
            continue
        shown = "none" if value is None else formats[key](value) if key in formats else str(value)
        facts.append((key.replace("_", " "), shown))
    return facts
