"""Node that summarises the maps of one model over the labels of every atlas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids import names
from bids_gacelle.bids.dataset import bids_uri
from bids_gacelle.bids.output import write_json, write_tsv
from bids_gacelle.bids.series import Atlas, Series, series_from_json
from bids_gacelle.bids.sidecar import TABLE_COLUMNS, table_sidecar
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER, Step
from bids_gacelle.interfaces.collect import reference_image
from bids_gacelle.interfaces.fit import FittedInputSpec, build_model, load_fit
from bids_gacelle.interfaces.provenance import fit_record
from bids_gacelle.interfaces.units import map_units
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.grids import load_volumes, same_grid
from bids_gacelle.spatial.rois import integer_labels, read_lookup, roi_statistics, tissue_of

NO_ESTIMATE = 4 | 8 | 32
"""Flags of voxels that do not count in a ROI."""


class _RoiInputSpec(FittedInputSpec):
    written = traits.Dict(desc="the maps are written first: they do not depend on a table")


class _RoiOutputSpec(TraitedSpec):
    tables = traits.Dict(desc="files: tables written, relative to the output folder; problems")


class RoiStatistics(Step):
    """One long table per atlas: a row for every label and parameter."""

    input_spec = _RoiInputSpec
    output_spec = _RoiOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Compute and write the tables of all atlases."""
        series = series_from_json(self.inputs.series)
        reference = reference_image(self.inputs.collected)
        mask = np.load(self.inputs.mask["file"])
        datasets = self.inputs.run["datasets"]
        model, _ = build_model(self.inputs.model, settings, self.inputs.prepared)
        record = fit_record(
            series,
            model,
            settings,
            datasets,
            self.inputs.fitted,
            self.inputs.collected["digests"],
        )
        files: list[str] = []
        problems: list[str] = []
        for atlas in series.atlases:
            try:
                rows = self._rows(model, atlas, reference, mask)
            except InputError as error:  # the maps are good without this table
                LOGGER.error("sub-%s %s: %s", series.subject, series.label, error)
                problems.append(f"no ROI table for the atlas {atlas.name}: {error}")
                continue
            path = names.table_path(series, model=self.inputs.model, atlas=atlas.name)
            write_tsv(settings.output_dir / path, rows, tuple(TABLE_COLUMNS))
            units = {name: unit.unit for name, unit in map_units(model).items()}
            segmentation = bids_uri(atlas.image, datasets)
            about = table_sidecar(record, segmentation=segmentation, units=units)
            write_json(settings.output_dir / path.with_suffix(".json"), about)
            files += [str(path), str(path.with_suffix(".json"))]
        return {"tables": {"files": files, "problems": problems}}

    def _rows(
        self, model: Any, atlas: Atlas, reference: Any, mask: np.ndarray
    ) -> list[dict[str, Any]]:
        labels = _labels(atlas, reference)
        lookup = read_lookup(Path(atlas.table) if atlas.table else None, labels)
        fit = load_fit(self.inputs.fitted)
        valid = scatter((fit["flags"] & NO_ESTIMATE) == 0, mask, False)
        rows, units = [], map_units(model)
        for parameter in (*model.parameters, *model.derived):
            key, unit = parameter.name, units[parameter.name]
            statistics = roi_statistics(
                scatter(fit[f"map_{key}"] * np.float32(unit.factor), mask, np.nan),
                labels,
                lookup,
                std=scatter(fit[f"std_{key}"] * np.float32(unit.factor), mask, np.nan),
                valid=valid,
            )
            if parameter in model.parameters:
                close = np.isclose(fit[f"map_{key}"][:, None], parameter.bounds, atol=1e-6).any(1)
                bound = scatter(close.astype(np.float32), mask, np.nan)
                for row, share in zip(
                    statistics, roi_statistics(bound, labels, lookup, valid=valid), strict=True
                ):
                    row["at_bound"] = share["mean"]
            about = {"model": model.name, "param": key, "unit": unit.unit}
            rows += [{**row, **about, "hemi": hemisphere(str(row["name"]))} for row in statistics]
        return rows


def tissue_voxels(
    series: Series, reference: Any, mask: np.ndarray
) -> tuple[str, dict[str, np.ndarray]]:
    """The voxels of white matter, grey matter and CSF, where a segmentation names them.

    Returns
    -------
    str
        Name of the segmentation: the first that names the most of the three; "" if none does.
    dict
        By tissue, (voxels of the mask,) bool; empty if no segmentation names any.
    """
    best: tuple[str, dict[str, np.ndarray]] = ("", {})
    for atlas in series.atlases:
        try:
            labels = _labels(atlas, reference)
            lookup = read_lookup(Path(atlas.table) if atlas.table else None, labels)
        except InputError:  # said by `RoiStatistics`
            continue
        inside = labels[mask]
        found = {
            tissue: np.isin(inside, [i for i, name in lookup if tissue_of(name) == tissue])
            for tissue in ("white matter", "grey matter", "CSF")
        }
        found = {tissue: voxels for tissue, voxels in found.items() if voxels.any()}
        if len(found) > len(best[1]):
            best = atlas.name, found
    return best


def scatter(values: np.ndarray, mask: np.ndarray, fill: Any) -> np.ndarray:
    """Values of the voxels of a mask, put back on the grid."""
    grid = np.full(mask.shape, fill, dtype=values.dtype)
    grid[mask] = values
    return grid


def hemisphere(name: str) -> str:
    """``L`` or ``R`` from a name such as ``Left-Thalamus``, ``ctx-lh-insula``, ``LH_Vis``."""
    parts = re.split(r"[-_\s]+", name.lower())
    for side, words in {"L": ("left", "lh", "l"), "R": ("right", "rh", "r")}.items():
        if any(word in parts for word in words):
            return side
    return ""


def _labels(atlas: Atlas, reference: Any) -> np.ndarray:
    [(image, data)] = load_volumes([atlas.image])
    if not same_grid(image, reference):
        raise InputError(f"{atlas.image} is not on the grid of the maps; resample it to them")
    return integer_labels(data.reshape(data.shape[:3]), atlas.image)
