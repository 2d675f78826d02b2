"""Node that summarises the maps of one model over the labels of every atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids import names
from bids_gacelle.bids.output import write_json, write_tsv
from bids_gacelle.bids.series import Atlas, Series, series_from_json
from bids_gacelle.engine import get_model
from bids_gacelle.interfaces.base import LOGGER, Step, StepInputSpec
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.grids import load_volumes, same_grid
from bids_gacelle.spatial.rois import COLUMNS, read_lookup, roi_statistics

NO_ESTIMATE = 4 | 8 | 32
"""Flags of voxels that do not count in a ROI."""


class _RoiInputSpec(StepInputSpec):
    model = traits.Str(mandatory=True)
    collected = traits.Dict(mandatory=True)
    mask = traits.Dict(mandatory=True)
    fitted = traits.Dict(mandatory=True)


class _RoiOutputSpec(TraitedSpec):  # type: ignore[misc]
    tables = traits.List(traits.Str, desc="tables written, relative to the output folder")


class RoiStatistics(Step):
    """One long table per atlas: a row for every label and parameter."""

    input_spec = _RoiInputSpec
    output_spec = _RoiOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Compute and write the tables of all atlases."""
        series = series_from_json(self.inputs.series)
        reference = nib.load(self.inputs.collected["reference"])
        mask = np.load(self.inputs.mask["file"])
        tables = []
        for atlas in series.atlases:
            labels = _labels(atlas, series, reference)
            if labels is None:
                continue
            rows = self._rows(atlas, labels, mask)
            path = names.table_path(series, model=self.inputs.model, atlas=atlas.name)
            write_tsv(settings.output_dir / path, rows, TABLE_COLUMNS)
            sidecar = _sidecar(atlas, get_model(self.inputs.model))
            write_json(settings.output_dir / path.with_suffix(".json"), sidecar)
            tables.append(str(path))
        return {"tables": tables}

    def _rows(self, atlas: Atlas, labels: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
        lookup = read_lookup(Path(atlas.table) if atlas.table else None, labels)
        model = get_model(self.inputs.model)
        fit = np.load(self.inputs.fitted["file"])
        valid = scatter((fit["flags"] & NO_ESTIMATE) == 0, mask, False)
        rows = []
        for key in [k.removeprefix("map_") for k in fit if k.startswith("map_")]:
            statistics = roi_statistics(
                scatter(fit[f"map_{key}"], mask, np.nan),
                labels,
                lookup,
                std=scatter(fit[f"std_{key}"], mask, np.nan),
                valid=valid,
            )
            for row in statistics:
                extra = {"hemi": hemisphere(str(row["name"])), "model": model.name, "param": key}
                rows.append({**row, **extra})
        return rows


TABLE_COLUMNS = ("index", "name", "hemi", "model", "param", *COLUMNS[2:])


def scatter(values: np.ndarray, mask: np.ndarray, fill: Any) -> np.ndarray:
    """Values of the voxels of a mask, put back on the grid."""
    grid = np.full(mask.shape, fill, dtype=values.dtype)
    grid[mask] = values
    return grid


def hemisphere(name: str) -> str:
    """``L`` or ``R`` from a label name such as ``Left-Thalamus``, ``ctx-lh-insula``, ``LH_Vis``."""
    parts = name.replace("_", "-").lower().split("-")
    for side, words in {"L": ("left", "lh", "l"), "R": ("right", "rh", "r")}.items():
        if any(word in parts for word in words):
            return side
    return ""


def _labels(atlas: Atlas, series: Series, reference: Any) -> np.ndarray | None:
    volumes, image = load_volumes([Path(atlas.image)])
    if same_grid(image, reference):
        return np.rint(volumes[0]).astype(np.int32)
    LOGGER.warning(
        "sub-%s %s: atlas %s is left out, it is not on the grid of the maps (%s).",
        series.subject,
        series.label,
        atlas.name,
        atlas.image,
    )
    return None


def _sidecar(atlas: Atlas, model: type) -> dict[str, Any]:
    units = {p.name: p.unit for p in (*model.parameters, *model.derived)}
    described = "; ".join(f"{k}: {u}" for k, u in units.items())
    of_values = {"Description": f"In the unit of the parameter ({described})"}
    counts = {
        "n_voxels": {"Description": "Voxels of the label"},
        "n_valid": {"Description": "Voxels of the label that have an estimate"},
        "coverage": {"Description": "n_valid / n_voxels", "Units": "1"},
        "cov": {"Description": "Coefficient of variation, std / |mean|", "Units": "1"},
        "weighted_mean": {
            "Description": "Mean weighted by 1/sd^2, over voxels whose sd is known. " + described
        },
    }
    keys = ("mean", "std", "median", "iqr", "q05", "q95", "min", "max")
    return {
        "index": {"Description": "Label in the segmentation"},
        "name": {"Description": "Name of the label"},
        "hemi": {"Description": "Hemisphere read from the name", "Levels": {"L": "left", "R": "right"}},
        "model": {"Description": "Signal model"},
        "param": {"Description": "Parameter of the model", "Units": described},
        **{k: of_values for k in keys},
        **counts,
        "Segmentation": {"Description": atlas.name},
    }
