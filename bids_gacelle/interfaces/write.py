"""Node that writes the maps of one fit, and what the report needs to know about them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle import __version__
from bids_gacelle.bids import names, sidecar
from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.output import write_image, write_json, write_text, write_tsv
from bids_gacelle.bids.schemes import scheme_text
from bids_gacelle.bids.series import Series, Sourced, series_from_json
from bids_gacelle.engine import Parameter
from bids_gacelle.interfaces import provenance
from bids_gacelle.interfaces.base import Step
from bids_gacelle.interfaces.collect import reference_image
from bids_gacelle.interfaces.fit import FittedInputSpec, build_model, load_fit
from bids_gacelle.interfaces.plots import ALL_VOXELS, decays, gradient_table, obtained_sd
from bids_gacelle.interfaces.prepare import fallback, scheme_from_json
from bids_gacelle.interfaces.rois import scatter, tissue_voxels
from bids_gacelle.interfaces.units import MapUnit, map_units
from bids_gacelle.settings import Settings

OUTSIDE = 1
"""Flag of voxels outside the mask."""

QUALITY = {
    "nrmse": "Root mean square residual over root mean square signal",
    "chi2": "Reduced chi-square: squared residuals over noise variance and degrees of freedom",
}


TOTAL_FIELD = Parameter(
    "freqBKG",
    "Hz",
    "Field offset: the estimate from the echoes and the correction that was fitted",
    window=(-100.0, 100.0),
    colormap="RdBu_r",
)
"""What the maps of models of complex signals hold of the field, mean over flip angles."""

INITIAL_PHASE = Parameter(
    "pini",
    "rad",
    "Phase at echo time 0: the estimate from the echoes and the correction that was fitted",
    window=(-np.pi, np.pi),
    colormap="twilight",
)


class _WriteOutputSpec(TraitedSpec):
    written = traits.Dict(desc="outputs: files relative to the output folder; maps, ...: manifest")


class WriteMaps(Step):
    """Maps, standard deviations, flags, NRMSE, chi-square and mask, each with its sidecar."""

    input_spec = FittedInputSpec
    output_spec = _WriteOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Write the files; what an earlier run said of them goes first, as it holds no longer."""
        self._settings = settings
        self._series = series_from_json(self.inputs.series)
        self._mask = np.load(self.inputs.mask["file"])
        self._reference = reference_image(self.inputs.collected)
        self._fit = load_fit(self.inputs.fitted)
        self._model, _ = build_model(self.inputs.model, settings, self.inputs.prepared)
        self._record = provenance.fit_record(
            self._series,
            self._model,
            settings,
            self.inputs.run["datasets"],
            self.inputs.fitted,
            self.inputs.collected["digests"],
        )
        self._written: list[str] = []
        for path in earlier_records(settings.output_dir, self._series, self._model.name):
            path.unlink(missing_ok=True)
        if (scheme := scheme_file(settings, self._series)) is not None:
            write_text(settings.output_dir / scheme, _scheme(self._series))
            self._written.append(str(scheme))
        parameters = (*self._model.parameters, *self._model.derived)
        maps = [
            self._write_parameter(p, self._fit[f"map_{p.name}"], self._fit[f"std_{p.name}"])
            for p in parameters
        ]
        for whole in phase_maps(self._model, self._fit, self.inputs.prepared):
            maps.append(self._write_parameter(*whole))
        manifest = {"maps": maps, **self._write_quality(), "fit_hash": self._record.fit_hash}
        return {"written": {"outputs": self._written, "manifest": manifest}}

    def _write_parameter(
        self, parameter: Parameter, estimate: np.ndarray, deviation: np.ndarray
    ) -> dict[str, Any]:
        """Write a parameter's map and standard deviation; its entry of the manifest."""
        written: dict[str, str] = {}
        unit = map_units(self._model).get(parameter.name, MapUnit(parameter.unit, 1.0))
        for statistic, voxels in (("", estimate), ("std", deviation)):
            path = names.map_path(
                self._series,
                model=self._model.name,
                parameter=parameter.name,
                statistic=statistic,
                suffix=parameter.suffix,
                bare=self._model.bare_names,
                compartment=parameter.compartment,
                datatype=self._model.datatype,
            )
            values = scatter(voxels * np.float32(unit.factor), self._mask, np.nan)
            about = sidecar.map_sidecar(
                self._record,
                parameter=parameter.name,
                description=parameter.description,
                unit=unit.unit,
                statistic=statistic,
            )
            self._write_image(path, values, about, keep_nan=bool(statistic))
            written[statistic] = str(path)
        return {
            "name": parameter.name,
            "label": parameter.description,
            "unit": unit.unit,
            "file": written[""],
            "std": written["std"],
            "window": None if parameter.window is None else list(unit.pair(parameter.window)),
            "colormap": parameter.colormap,
            "bounds": [b if np.isfinite(b) else None for b in unit.pair(parameter.bounds)],
            "at_bound": self.inputs.fitted["settings"]["at_bound"].get(parameter.name),
        }

    def _write_quality(self) -> dict[str, Any]:
        """Write NRMSE, flags, mask and the reference image; their entries of the manifest."""
        series, model = self._series, self._model
        quality = {}
        for name, description in QUALITY.items():
            if name not in self._fit:
                continue
            path = names.quality_path(series, name, model=model.name)
            about = sidecar.map_sidecar(
                self._record, parameter=name, description=description, unit="1"
            )
            self._write_image(path, scatter(self._fit[name], self._mask, np.nan), about)
            quality[name] = str(path)
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
            **quality,
            "flags": str(flag_path),
            "flag_counts": flag_counts(self._fit["flags"]),
            "mask": {
                "file": str(mask_path),
                "origin": self.inputs.mask["origin"],
                "source": ", ".join(self.inputs.mask["sources"]),
            },
            "reference": {"file": str(reference), "label": label},
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


class _ManifestInputSpec(FittedInputSpec):
    written = traits.Dict(mandatory=True)
    tables = traits.Dict(mandatory=True)


class _ManifestOutputSpec(TraitedSpec):
    outputs = traits.List(traits.Str, desc="all files written for this fit")


class WriteManifest(Step):
    """The record of one finished fit: what the report, ``group`` and ``--resume`` read."""

    input_spec = _ManifestInputSpec
    output_spec = _ManifestOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Write the manifest, which so never promises what is not there, and report to the run."""
        series = series_from_json(self.inputs.series)
        model, data = build_model(self.inputs.model, settings, self.inputs.prepared)
        job = {
            "subject": series.subject,
            "session": series.session,
            "series": series.label,
            "model": model.name,
        }
        path = names.manifest_path(series, model=model.name)
        outputs = [*self.inputs.written["outputs"], *self.inputs.tables["files"]]
        manifest = {
            "schema": 1,
            **job,
            **self.inputs.written["manifest"],
            **self._describe(series, model, settings),
            **self._tissues(series, model, data),
            "outputs": outputs,
            "atlases": provenance.atlas_digests(series),
        }
        write_json(settings.output_dir / path, manifest)
        done = {"outputs": [*outputs, str(path)], "problems": self.inputs.tables["problems"]}
        label = "_".join(job.values()).replace(" ", "-")
        record = {**done, **job, **self.inputs.fitted["settings"]}
        write_json(Path(self.inputs.run["done"]) / f"{label}.json", record)
        return {"outputs": done["outputs"]}

    def _tissues(self, series: Series, model: Any, data: np.ndarray) -> dict[str, Any]:
        """The acquisition, and what was measured and fitted in each tissue, to be drawn."""
        prepared, fit = self.inputs.prepared, load_fit(self.inputs.fitted)
        mask = np.load(self.inputs.mask["file"])
        name, tissues = tissue_voxels(series, reference_image(self.inputs.collected), mask)
        everything = {ALL_VOXELS: np.ones(data.shape[1], bool)}
        inputs = {k: np.load(v) for k, v in prepared["inputs"].items()}
        found: dict[str, Any] = {
            "decay": {
                "segmentation": name,
                "log": model.kind == "dwi",
                "tissues": decays(model, data, inputs, fit, tissues or everything),
            },
            "obtained_sd": obtained_sd(model, fit, tissues | everything),
        }
        if "directions" in prepared:
            scheme = scheme_from_json(prepared["scheme"])
            found["gradients"] = gradient_table(scheme, prepared["directions"])
        return found

    def _describe(self, series: Series, model: Any, settings: Settings) -> dict[str, Any]:
        """The words of the manifest."""
        fitted, run = self.inputs.fitted, self.inputs.run
        inputs = provenance.listed_inputs(series, run["datasets"])
        notes = [fitted["settings"].get(name) for name in ("note", "sign_doubt")]
        said = fallback(model.name, settings, self.inputs.prepared)
        return {
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
                *run["warnings"].get(f"{series.subject}/{series.session}/{series.label}", []),
                *self.inputs.collected["warnings"],
                *self.inputs.prepared["warnings"],
                *(f"{model.name}: {note}" for note in notes if note),
                *([said] if said else []),
                *self.inputs.tables["problems"],
            ],
            "methods": provenance.methods_text(series, model, fitted, self.inputs.mask),
            "references": [vars(reference) for reference in model.references],
            "tables": [file for file in self.inputs.tables["files"] if file.endswith(".tsv")],
            "fit": fitted["settings"],
            "preprocessed": series.preprocessed or series.kind != "dwi",
        }


def phase_maps(
    model: Any, fit: dict[str, np.ndarray], prepared: dict[str, Any]
) -> Iterator[tuple[Parameter, np.ndarray, np.ndarray]]:
    """Field offset and initial phase (voxels,) with standard deviations; none without phases.

    They are what was taken out of the signals before the fit, plus the corrections fitted. The
    field is the mean over flip angles, whose corrections have nearly the same error, that of the
    frequencies of the pools: the mean of their standard deviations is that of their mean.
    """
    fitted = [p for p in model.parameters if p.name.rstrip("0123456789") == "dfreqBKG"]
    if "complex" not in prepared or not fitted:
        return
    found = np.load(prepared["complex"]["field"]).mean(axis=0)
    factor = map_units(model)[fitted[0].name].factor / len(fitted)
    corrections = factor * np.stack([fit[f"map_{p.name}"] for p in fitted])
    deviations = factor * np.stack([fit[f"std_{p.name}"] for p in fitted])
    yield TOTAL_FIELD, found + corrections.sum(axis=0), deviations.sum(axis=0)
    phase = np.load(prepared["complex"]["phase"]) + fit["map_dpini"]
    yield INITIAL_PHASE, np.angle(np.exp(1j * phase)), fit["std_dpini"]


def scheme_file(settings: Settings, series: Series) -> PurePosixPath | None:
    """Path of the scheme file to write: asked for, and the diffusion times are known."""
    asked = settings.write_scheme and series.has_diffusion_times
    return names.scheme_path(series) if asked else None


def _scheme(series: Series) -> str:
    """All volumes of a dwi series, run after run, as a scheme."""
    parts = []
    for run in series.dwi_runs:
        b, directions = read_gradients(run.bval, run.bvec)

        def column(value: Sourced | None, unit: float, n: int = len(b)) -> np.ndarray:
            return np.broadcast_to(np.array(value.values if value else [0.0]) * unit, n)

        times = (column(run.big_delta, 1e-3), column(run.small_delta, 1e-3))
        parts.append((b, directions, *times, column(run.echo_time, 1.0)))
    return scheme_text(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def earlier_records(out_dir: Path, series: Series, model: str) -> list[Path]:
    """Manifest and ROI tables that an earlier run wrote for this fit."""
    table = str(names.table_path(series, model=model, atlas="X", extension="")).split("atlas-X")
    found = [out_dir / names.manifest_path(series, model=model)]
    return [
        *found,
        *out_dir.glob("atlas-*".join(table) + ".tsv"),
        *out_dir.glob("atlas-*".join(table) + ".json"),
    ]


def flag_counts(flags: np.ndarray) -> dict[str, int]:
    """Voxels of the mask with each flag, by meaning; a voxel with two flags counts twice."""
    counts = {names.FLAGS[0]: int((flags == 0).sum())}
    for bit, meaning in names.FLAGS.items():
        if bit > OUTSIDE:
            counts[meaning] = int(((flags & bit) > 0).sum())
    return counts
