"""Node that writes the maps of one fit, and what the report needs to know about them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle import __version__
from bids_gacelle.bids import names, sidecar
from bids_gacelle.bids.output import write_image, write_json, write_tsv
from bids_gacelle.bids.series import series_from_json
from bids_gacelle.interfaces import provenance
from bids_gacelle.interfaces.base import Step, StepInputSpec
from bids_gacelle.interfaces.collect import reference_image
from bids_gacelle.interfaces.fit import build_model, load_fit
from bids_gacelle.interfaces.rois import scatter
from bids_gacelle.settings import Settings

OUTSIDE = 1
"""Flag of voxels outside the mask."""


class _WriteInputSpec(StepInputSpec):
    model = traits.Str(mandatory=True)
    collected = traits.Dict(mandatory=True)
    mask = traits.Dict(mandatory=True)
    prepared = traits.Dict(mandatory=True)
    fitted = traits.Dict(mandatory=True)
    tables = traits.List(traits.Str)


class _WriteOutputSpec(TraitedSpec):
    outputs = traits.List(traits.Str, desc="files written, relative to the output folder")


class WriteMaps(Step):
    """Maps, standard deviations, flags, NRMSE and mask with sidecars; then the manifest."""

    input_spec = _WriteInputSpec
    output_spec = _WriteOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Write everything; the manifest comes last: it never promises what is not there."""
        self._settings = settings
        self._series = series_from_json(self.inputs.series)
        self._mask = np.load(self.inputs.mask["file"])
        self._reference = reference_image(self.inputs.collected)
        self._fit = load_fit(self.inputs.fitted)
        self._model, _ = build_model(self.inputs.model, settings, self.inputs.prepared)
        datasets = self.inputs.run["datasets"]
        self._record = provenance.fit_record(
            self._series, self._model, settings, datasets, self.inputs.fitted
        )
        self._written: list[str] = list(self.inputs.tables)
        maps = [self._write_parameter(p) for p in (*self._model.parameters, *self._model.derived)]
        manifest = {"maps": maps, **self._write_quality(), **self._describe(datasets)}
        self._write_json(names.manifest_path(self._series, model=self._model.name), manifest)
        done = {"outputs": self._written, **self._job(), **self.inputs.fitted["settings"]}
        label = "_".join(self._job().values()).replace(" ", "-")
        write_json(Path(self.inputs.run["done"]) / f"{label}.json", done)
        return {"outputs": self._written}

    def _job(self) -> dict[str, str]:
        series = self._series
        return {
            "subject": series.subject,
            "session": series.session,
            "series": series.label,
            "model": self._model.name,
        }

    def _key(self) -> str:
        return "/".join(list(self._job().values())[:3])

    def _write_parameter(self, parameter: Any) -> dict[str, Any]:
        """Write a parameter's map and standard deviation; its entry of the manifest."""
        written = {}
        for statistic, key in (("", f"map_{parameter.name}"), ("std", f"std_{parameter.name}")):
            path = names.map_path(
                self._series,
                model=self._model.name,
                parameter=parameter.name,
                statistic=statistic,
                suffix=parameter.suffix,
                bare=self._model.bare_names,
                datatype=self._model.datatype,
            )
            values = scatter(self._fit[key], self._mask, np.nan)
            about = sidecar.map_sidecar(
                self._record,
                parameter=parameter.name,
                description=parameter.description,
                unit=parameter.unit,
                statistic=statistic,
            )
            self._write_image(path, values, about, keep_nan=bool(statistic))
            written[statistic] = str(path)
        return {
            "name": parameter.name,
            "label": parameter.description,
            "unit": parameter.unit,
            "file": written[""],
            "std": written["std"],
            "window": None if parameter.window is None else list(parameter.window),
            "colormap": parameter.colormap,
            "bounds": [float(b) if np.isfinite(b) else None for b in parameter.bounds],
            "at_bound": self.inputs.fitted["settings"]["at_bound"].get(parameter.name),
        }

    def _write_quality(self) -> dict[str, Any]:
        """Write NRMSE, flags, mask and the reference image; their entries of the manifest."""
        series, model = self._series, self._model
        nrmse = names.nrmse_path(series, model=model.name)
        self._write_image(
            nrmse,
            scatter(self._fit["nrmse"], self._mask, np.nan),
            sidecar.map_sidecar(
                self._record,
                parameter="nrmse",
                description="Root mean square residual over root mean square signal",
                unit="1",
            ),
        )
        flags = scatter(self._fit["flags"], self._mask, np.uint8(OUTSIDE))
        flag_path = names.flag_path(series, model=model.name)
        self._write_image(flag_path, flags, sidecar.flag_sidecar(self._record), dtype=np.uint8)
        table = names.flag_path(series, model=model.name, extension=".tsv")
        write_tsv(self._settings.output_dir / table, names.flag_rows(), ("index", "name"))
        self._written.append(str(table))
        mask_path = names.mask_path(series, model=model.name)
        about = sidecar.mask_sidecar(self._record, origin=self.inputs.mask["origin"])
        self._write_image(mask_path, self._mask.astype(np.uint8), about, dtype=np.uint8)
        reference = names.reference_path(series)
        picture = np.asarray(self._reference.dataobj, dtype=np.float32)
        self._write_image(reference, picture, None)
        label = self.inputs.collected["reference_label"]
        return {
            "nrmse": str(nrmse),
            "flags": str(flag_path),
            "flag_counts": flag_counts(self._fit["flags"]),
            "mask": {
                "file": str(mask_path),
                "origin": self.inputs.mask["origin"],
                "source": ", ".join(self.inputs.mask["sources"]),
            },
            "reference": {"file": str(reference), "label": label},
        }

    def _describe(self, datasets: dict[str, str]) -> dict[str, Any]:
        """The words of the manifest."""
        series, model, fitted = self._series, self._model, self.inputs.fitted
        inputs = provenance.listed_inputs(series, datasets)
        return {
            "schema": 1,
            **self._job(),
            "title": model.title,
            "description": model.description,
            "version": __version__,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "n_voxels": self.inputs.mask["n_voxels"],
            "inputs": [{"role": r, "file": uri, "path": path} for r, uri, path in inputs],
            "acquisition": provenance.acquisition(series, model),
            "plot": fitted["plot"],
            "examples": fitted["examples"],
            "warnings": [
                *self.inputs.run["warnings"].get(self._key(), []),
                *self.inputs.collected["warnings"],
                *self.inputs.prepared["warnings"],
            ],
            "methods": provenance.methods_text(series, model, fitted, self.inputs.mask),
            "references": provenance.model_references(model.name),
            "tables": list(self.inputs.tables),
            "fit": fitted["settings"],
            "fit_hash": self._record.fit_hash,
            "preprocessed": series.preprocessed or series.kind != "dwi",
        }

    def _write_image(
        self,
        path: PurePosixPath,
        values: np.ndarray,
        about: dict[str, Any] | None,
        *,
        dtype: Any = np.float32,
        keep_nan: bool = False,
    ) -> None:
        target = self._settings.output_dir / path
        image = self._reference
        write_image(target, values, image.affine, image, dtype, keep_nan=keep_nan)
        self._written.append(str(path))
        if about is not None:
            self._write_json(PurePosixPath(str(path).replace(".nii.gz", ".json")), about)

    def _write_json(self, path: PurePosixPath, data: dict[str, Any]) -> None:
        write_json(self._settings.output_dir / path, data)
        self._written.append(str(path))


def flag_counts(flags: np.ndarray) -> dict[str, int]:
    """Voxels of the mask with each flag, by meaning; a voxel with two flags counts twice."""
    counts = {names.FLAGS[0]: int((flags == 0).sum())}
    for bit, meaning in names.FLAGS.items():
        if bit > OUTSIDE:
            counts[meaning] = int(((flags & bit) > 0).sum())
    return counts
