"""A finished output dataset as the report finds it: maps, manifests and tables of a made-up head.

``python report_fixture.py OUT`` writes it and its page in a realistic size, to look at.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

TISSUES = ("CSF", "cortex", "white matter", "deep nuclei")
ROIS = (
    (1, "CSF", ""),
    (2, "cortex", "L"),
    (3, "cortex", "R"),
    (4, "white matter", "L"),
    (5, "white matter", "R"),
    (6, "deep nuclei", ""),
)


def oblique_affine(
    spacing: tuple[float, float, float], degrees: float = 14.0, flip: bool = True
) -> np.ndarray:
    """Voxel axes tilted about the left-right and the vertical axis; ``flip`` makes it LAS."""
    a, b = np.radians([degrees, degrees / 3])
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = (
        turn @ tilt @ np.diag([-spacing[0] if flip else spacing[0], spacing[1], spacing[2]])
    )
    return affine


@dataclass
class Head:
    """Tissue classes 0 (outside) to 4 on a grid; ``rois`` are the labels of ``ROIS``."""

    affine: np.ndarray
    tissue: np.ndarray
    rois: np.ndarray
    skull: np.ndarray
    rng: np.random.Generator = field(repr=False)

    @property
    def mask(self) -> np.ndarray:
        return self.tissue > 0

    def texture(self, means: tuple[float, ...], spread: float, noise: float) -> np.ndarray:
        """A map: mean per tissue, smooth variation and voxel noise; NaN outside."""
        values = np.array([0.0, *means])[self.tissue]
        smooth = gaussian_filter(self.rng.standard_normal(values.shape), 4)
        values = values * (1 + spread * smooth / smooth.std()) + noise * self.rng.standard_normal(
            values.shape
        )
        return np.where(self.mask, values, np.nan).astype(np.float32)


def make_head(shape: tuple[int, int, int], affine: np.ndarray, seed: int = 1) -> Head:
    """An ellipsoid with folded cortex, ventricles and nuclei, about 140 x 176 x 128 mm."""
    affine = affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    x, y, z = np.tensordot(affine[:3, :3], ijk, 1) + affine[:3, 3, None, None, None]
    radius = np.sqrt((x / 68) ** 2 + (y / 86) ** 2 + (z / 64) ** 2)
    azimuth, height = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))
    fold = 0.05 * np.sin(17 * azimuth + 3 * np.sin(5 * height)) + 0.04 * np.sin(
        19 * height + 4 * azimuth
    )
    fissure = 0.12 * np.exp(-((x / 3) ** 2))
    tissue = np.zeros(shape, np.int16)
    tissue[radius < 1.0] = 1
    tissue[radius < 0.97 + fold * 0.5 - fissure] = 2
    tissue[radius < 0.80 + 2.2 * fold - fissure] = 3
    nuclei = ((np.abs(x) - 24) / 7) ** 2 + (y / 18) ** 2 + ((z + 4) / 12) ** 2 < 1
    thalamus = ((np.abs(x) - 11) / 8) ** 2 + ((y + 18) / 13) ** 2 + ((z + 2) / 10) ** 2 < 1
    ventricle = ((np.abs(x) - 9 - 0.1 * np.abs(y)) / 5) ** 2 + (y / 34) ** 2 + (
        (z - 12) / 9
    ) ** 2 < 1
    tissue[nuclei | thalamus] = 4
    tissue[ventricle] = 1
    side = (x > 0).astype(int)
    rois = np.select(
        [tissue == 1, tissue == 2, tissue == 3, tissue == 4], [1, 2 + side, 4 + side, 6], 0
    )
    skull = (radius > 1.10) & (radius < 1.22)
    return Head(affine, tissue, rois, skull, np.random.default_rng(seed))


@dataclass
class Spec:
    """What one model of the fixture looks like."""

    series: str
    model: str
    title: str
    datatype: str
    maps: list[tuple[Any, ...]]
    """(name, label, unit, tissue means, spread, noise, window, colour map, bounds, suffix)"""
    x: list[float]
    x_label: str
    groups: list[str]
    acquisition: list[dict[str, Any]]
    inputs: list[tuple[str, str]]
    references: list[dict[str, str]]
    warnings: list[str] = field(default_factory=list)
    preprocessed: bool = False


R2STAR = Spec(
    "megre",
    "r2star",
    "R2* from multi-echo gradient echoes",
    "anat",
    [
        (
            "S0",
            "Signal at echo time zero",
            "arbitrary",
            (2100, 1700, 1400, 1450),
            0.12,
            40,
            None,
            "gray",
            [0, 1e5],
            "S0map",
        ),
        (
            "R2star",
            "Effective transverse relaxation rate",
            "1/s",
            (2, 17, 21, 34),
            0.1,
            1.2,
            [0, 60],
            "viridis",
            [0, 500],
            "R2starmap",
        ),
        (
            "T2star",
            "Effective transverse relaxation time",
            "s",
            (0.4, 0.058, 0.047, 0.03),
            0.1,
            0.004,
            [0, 0.1],
            "viridis",
            [0.002, 10],
            "T2starmap",
        ),
    ],
    [4.0, 10.2, 16.4, 22.6, 28.8],
    "Echo time (ms)",
    [""] * 5,
    [
        {
            "name": "EchoTime",
            "unit": "s",
            "values": [0.004, 0.0102, 0.0164, 0.0226, 0.0288],
            "sources": [f"sub-01/anat/sub-01_echo-{n}_part-mag_MEGRE.json" for n in range(1, 6)],
        },
        {
            "name": "RepetitionTimeExcitation",
            "unit": "s",
            "values": [0.05],
            "sources": ["MEGRE.json"],
        },
    ],
    [
        (f"echo {n}", f"bids:raw:sub-01/anat/sub-01_echo-{n}_part-mag_MEGRE.nii.gz")
        for n in range(1, 6)
    ],
    [
        {
            "key": "yablonskiy1994",
            "text": "Yablonskiy & Haacke. Magn Reson Med 32:749-763 (1994).",
            "doi": "10.1002/mrm.1910320610",
        }
    ],
)
DESPOT1 = Spec(
    "vfa",
    "despot1",
    "T1 from variable flip angles (DESPOT1)",
    "anat",
    [
        (
            "M0",
            "Equilibrium signal",
            "arbitrary",
            (9000, 7600, 6500, 6900),
            0.1,
            150,
            [0, 12000],
            "gray",
            [0, 1e6],
            "M0map",
        ),
        (
            "R1",
            "Longitudinal relaxation rate",
            "1/s",
            (0.28, 0.72, 1.15, 0.95),
            0.06,
            0.04,
            [0, 1.5],
            "gray",
            [0.05, 10],
            "R1map",
        ),
        (
            "T1",
            "Longitudinal relaxation time",
            "s",
            (3.6, 1.4, 0.87, 1.05),
            0.06,
            0.05,
            [0, 3],
            "gray",
            [0.1, 20],
            "T1map",
        ),
    ],
    [3, 8, 13, 18, 25],
    "Flip angle (°)",
    [""] * 5,
    [
        {
            "name": "FlipAngle",
            "unit": "deg",
            "values": [3, 8, 13, 18, 25],
            "sources": [f"sub-01_flip-{n}_VFA.json" for n in range(1, 6)],
        },
        {
            "name": "RepetitionTimeExcitation",
            "unit": "s",
            "values": [0.015],
            "sources": ["VFA.json"],
        },
        {
            "name": "B1 map factor",
            "unit": "1",
            "values": [0.01],
            "sources": ["fmap/sub-01_TB1map.json (Units percent)"],
        },
    ],
    [(f"flip {n}", f"bids:raw:sub-01/anat/sub-01_flip-{n}_VFA.nii.gz") for n in range(1, 6)],
    [
        {
            "key": "deoni2003",
            "text": "Deoni, Rutt, Peters. Magn Reson Med 49:515-526 (2003).",
            "doi": "10.1002/mrm.10407",
        }
    ],
    ["flip 3 and flip 1 are shifted by 1.4 mm (centre of mass): did the subject move?"],
)
_B = [round(b + d, 3) for d in (0.0, 0.002, -0.003) for b in (0.5, 1.0, 2.0, 3.5, 5.0)]
_DELTA = [d for d in (13.0, 21.0, 30.0) for _ in range(5)]
NEXI = Spec(
    "dwi acq-multidelta space-ACPC",
    "nexi",
    "Neurite exchange imaging (NEXI)",
    "dwi",
    [
        (
            "fn",
            "Neurite signal fraction",
            "1",
            (0.05, 0.36, 0.52, 0.42),
            0.08,
            0.04,
            [0, 1],
            "viridis",
            [0, 1],
            "",
        ),
        (
            "dn",
            "Neurite diffusivity",
            "um^2/ms",
            (2.8, 2.2, 2.4, 2.3),
            0.05,
            0.3,
            [0, 3.5],
            "viridis",
            [0.1, 3.5],
            "",
        ),
        (
            "de",
            "Extra-neurite diffusivity",
            "um^2/ms",
            (2.9, 0.95, 0.8, 0.9),
            0.08,
            0.1,
            [0, 3.5],
            "viridis",
            [0.1, 3.5],
            "",
        ),
        ("tex", "Exchange time", "ms", (90, 38, 60, 45), 0.2, 14, [0, 100], "magma", [1, 100], ""),
    ],
    _B,
    "b (ms/µm²)",
    [f"Δ {d:g} ms" for d in _DELTA],
    [
        {
            "name": "b",
            "unit": "ms/um^2",
            "values": _B,
            "sources": ["sub-01_acq-multidelta_dwi.bval"],
        },
        {
            "name": "BigDelta",
            "unit": "ms",
            "values": _DELTA,
            "sources": ["sub-01_acq-multidelta_dwi.json (BigDelta)"],
        },
        {
            "name": "SmallDelta",
            "unit": "ms",
            "values": [6.0] * 15,
            "sources": ["--small-delta 6ms"],
        },
        {"name": "EchoTime", "unit": "s", "values": [0.056] * 15, "sources": ["dwi.json"]},
        {
            "name": "directions",
            "unit": "1",
            "values": [16, 32, 60, 60, 60] * 3,
            "sources": ["sub-01_acq-multidelta_dwi.bvec"],
        },
    ],
    [("run 1", "bids:raw:sub-01/dwi/sub-01_acq-multidelta_dwi.nii.gz")],
    [
        {
            "key": "jelescu2022",
            "text": "Jelescu et al. Neurite Exchange Imaging. NeuroImage 256:119277 (2022).",
            "doi": "10.1016/j.neuroimage.2022.119277",
        }
    ],
)
SPECS = {spec.model: spec for spec in (R2STAR, DESPOT1, NEXI)}


def _signal(model: str, x: np.ndarray, strength: float) -> np.ndarray:
    if model == "r2star":
        return 1500 * np.exp(-x * 0.021 * strength)
    if model == "despot1":
        alpha, e1 = np.radians(x), np.exp(-0.015 * 1.1 * strength)
        return 6500 * np.sin(alpha) * (1 - e1) / (1 - np.cos(alpha) * e1)
    return 0.45 * np.exp(-0.3 * strength * x) + 0.55 * np.exp(-1.0 * strength * x)


def _examples(spec: Spec, head: Head, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    x = np.array(spec.x, float)
    voxels = np.argwhere(
        (head.tissue == 3) & np.all([np.isfinite(v) for v in values.values()], axis=0)
    )
    examples = []
    for n, (label, noise) in enumerate((("best", 0.004), ("median", 0.02), ("worst", 0.09))):
        voxel = tuple(int(v) for v in voxels[(2 * n + 1) * len(voxels) // 7])
        fitted = _signal(spec.model, x, 1 + 0.1 * n)
        fine = np.linspace(x.min(), x.max(), 60)
        curve = {
            "x": fine.tolist(),
            "y": _signal(spec.model, fine, 1 + 0.1 * n).tolist(),
            "group": "",
        }
        examples.append(
            {
                "label": label,
                "voxel": list(voxel),
                "data": (
                    fitted + noise * fitted.max() * head.rng.standard_normal(x.size)
                ).tolist(),
                "fit": fitted.tolist(),
                "curves": [] if spec.model == "nexi" else [curve],
                "values": {name: float(v[voxel]) for name, v in values.items()},
                "std": {
                    name: float(abs(v[voxel]) * (0.03 + 2 * noise)) if n < 2 else None
                    for name, v in values.items()
                },
                "nrmse": noise,
            }
        )
    return examples


def _tissues(spec: Spec, head: Head) -> dict[str, Any]:
    """What the manifest of a diffusion model says of its acquisition and of tissues."""
    x = np.array(spec.x, float)
    shells = []
    for n, (b, group) in enumerate(zip(spec.x, spec.groups, strict=True)):
        vectors = head.rng.normal(size=(32 if n else 6, 3))
        vectors /= np.linalg.norm(vectors, axis=1)[:, None]
        delta = float(group.split()[1])
        shell = {"b": b, "big_delta": delta, "group": group, "directions": vectors.tolist()}
        shells.append(shell | {"unevenness": 0.02 if n else 0.31})
    tissues = []
    for name, strength in (("white matter", 0.8), ("grey matter", 1.2), ("CSF", 4.0)):
        fitted = _signal(spec.model, x, strength)
        fine = np.linspace(0.1, 1.05 * x.max(), 50)
        curves = [
            {"group": g, "x": fine.tolist(), "y": _signal(spec.model, fine, strength).tolist()}
            for g in dict.fromkeys(spec.groups)
        ]
        tissues.append(
            {
                "name": name,
                "n_voxels": 5000,
                "n_shown": 1000,
                "median": (fitted + 0.004 * head.rng.standard_normal(x.size)).tolist(),
                "q25": (0.85 * fitted).tolist(),
                "q75": (1.15 * fitted).tolist(),
                "fit": fitted.tolist(),
                "curves": curves,
            }
        )
    return {
        "gradients": shells,
        "decay": {"segmentation": "tissues", "log": True, "tissues": tissues},
        "obtained_sd": {
            "white matter": {name: [0.123, 0.5] for name, *_ in spec.maps},
            "all voxels": {name: [0.456, 1.0] for name, *_ in spec.maps},
        },
    }


def _adequacy(spec: Spec) -> dict[str, Any]:
    verdicts = ("estimable", "poorly estimable voxel by voxel", "not estimable voxel by voxel")
    expected = [
        {
            "tissue": tissue,
            "parameter": name,
            "unit": unit,
            "value": 0.5,
            "sd": 0.0789 if n < 2 else None,
            "posterior_sd": None,
            "share": 0.3,
            "verdict": verdicts[n % 3],
        }
        for tissue in ("white matter", "grey matter")
        for n, (name, _, unit, *_) in enumerate(spec.maps)
    ]
    sentence = f"{spec.model}: tex: expected SD 18 ms in grey matter at SNR 50: not estimable."
    return {"snr": 50.0, "assumed": False, "sentences": [sentence], "expected": expected}


def _rows(spec: Spec, head: Head, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for index, name, hemi in ROIS:
        inside = head.rois == index
        for param, volume in values.items():
            good = volume[inside & np.isfinite(volume)]
            row: dict[str, Any] = {
                "index": index,
                "name": name,
                "hemi": hemi or "n/a",
                "model": spec.model,
                "param": param,
            }
            if good.size:
                q1, q3, low, high = np.percentile(good, [25, 75, 5, 95])
                row |= {
                    "mean": good.mean(),
                    "std": good.std(),
                    "median": np.median(good),
                    "iqr": q3 - q1,
                    "cov": good.std() / good.mean(),
                    "q05": low,
                    "q95": high,
                    "min": good.min(),
                    "max": good.max(),
                    "weighted_mean": good.mean(),
                }
            row |= {
                "n_voxels": int(inside.sum()),
                "n_valid": good.size,
                "coverage": good.size / max(inside.sum(), 1),
            }
            rows.append(row)
    return rows


COLUMNS = [
    "index",
    "name",
    "hemi",
    "model",
    "param",
    "mean",
    "std",
    "median",
    "iqr",
    "cov",
    "q05",
    "q95",
    "min",
    "max",
    "n_voxels",
    "n_valid",
    "coverage",
    "weighted_mean",
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A scalarstats table as the workflow writes it: ``n/a`` where a ROI is empty."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter="\t", restval="n/a")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def write_model(
    out: Path, spec: Spec, head: Head, session: str = "", subject: str = "01"
) -> dict[str, Any]:
    """Write images, table and manifest of one model; return the manifest."""
    folder = Path(f"sub-{subject}", *([f"ses-{session}"] if session else []))
    prefix = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    for kind in (spec.datatype, "figures"):
        (out / folder / kind).mkdir(parents=True, exist_ok=True)

    def save(kind: str, name: str, data: np.ndarray, dtype: type = np.float32) -> str:
        path = folder / kind / f"{prefix}_{name}.nii.gz"
        nib.save(nib.Nifti1Image(data.astype(dtype), head.affine), out / path)
        return path.as_posix()

    flags = np.where(head.mask, 0, 1).astype(np.uint8)
    values, maps = {}, []
    for name, label, unit, means, spread, noise, window, colormap, bounds, suffix in spec.maps:
        volume = np.clip(head.texture(means, spread, noise), *bounds)
        at_bound = head.mask & ((volume <= bounds[0]) | (volume >= bounds[1]))
        bad = head.mask & (head.rng.random(volume.shape) < 0.0005)
        flags[at_bound] |= 2
        flags[bad] |= 4
        volume[bad] = np.nan
        deviation = np.where(
            at_bound,
            np.nan,
            noise * (0.6 + 0.4 * head.rng.random(volume.shape)) * (1 + (head.tissue == 1)),
        )
        deviation[~np.isfinite(volume)] = np.nan
        values[name] = volume
        stem = suffix or f"model-{spec.model}_param-{name}_dwimap"
        spread_stem = (
            f"desc-std_{suffix}" if suffix else f"model-{spec.model}_param-{name}_desc-std_dwimap"
        )
        maps.append(
            {
                "name": name,
                "label": label,
                "unit": unit,
                "window": window,
                "colormap": colormap,
                "bounds": bounds,
                "file": save(spec.datatype, stem, volume),
                "std": save(spec.datatype, spread_stem, deviation),
                "at_bound": float(at_bound.sum() / head.mask.sum()),
            }
        )
    flags[head.mask & (head.rng.random(flags.shape) < 0.002)] |= 8
    nrmse = np.where(
        head.mask, np.abs(head.texture((0.05, 0.02, 0.015, 0.018), 0.2, 0.004)), np.nan
    )
    anatomy = np.where(head.skull, 700, np.array([20.0, 1300, 900, 750, 700])[head.tissue])
    anatomy += 25 * np.abs(head.rng.standard_normal(anatomy.shape))
    table = folder / spec.datatype / f"{prefix}_atlas-tissue_desc-{spec.model}_scalarstats.tsv"
    write_table(out / table, _rows(spec, head, values))
    inside = flags[head.mask]
    manifest = {
        "schema": 1,
        "subject": subject,
        "session": session,
        "series": spec.series,
        "model": spec.model,
        "title": spec.title,
        "description": f"{spec.title}, fitted voxel by voxel.",
        "version": "0.1.0",
        "created": "2026-11-22T14:00:00",
        "reference": {
            "file": save("figures", f"desc-{spec.model}reference_image", anatomy),
            "label": "mean image",
        },
        "mask": {
            "file": save(spec.datatype, f"desc-{spec.model}_mask", head.mask, np.uint8),
            "origin": "derivatives",
            "source": "bids:masks:sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        },
        "maps": maps,
        "nrmse": save(spec.datatype, f"model-{spec.model}_param-nrmse_map", nrmse),
        "flags": save(spec.datatype, f"desc-{spec.model}fitflag_dseg", flags, np.uint8),
        "flag_counts": {
            "ok": int((inside == 0).sum()),
            "a parameter at a bound": int((inside & 2 > 0).sum()),
            "unusable input": int((inside & 4 > 0).sum()),
            "not converged": int((inside & 8 > 0).sum()),
            "several minima of similar depth": 0,
            "excluded by a plausibility rule": 0,
        },
        "n_voxels": int(head.mask.sum()),
        "inputs": [
            {"role": role, "file": file, "path": "/data/" + file.split(":")[-1]}
            for role, file in spec.inputs
        ],
        "acquisition": spec.acquisition,
        "plot": {"x": spec.x, "x_label": spec.x_label, "y_label": "Signal", "groups": spec.groups},
        "examples": _examples(spec, head, values),
        "warnings": spec.warnings,
        "methods": f"{spec.title}: the model was fitted to the data of every voxel by maximum "
        "likelihood; standard deviations come from the Hessian at the optimum.",
        "references": spec.references,
        "tables": [table.as_posix()],
        "fit": {
            "solver": "lm",
            "noise": "gaussian",
            "loss": "l2",
            "prior": None,
            "starts": 4,
            "device": "cpu",
            "precision": "float32",
            "seed": 0,
            "seconds": 1.234,
            "voxels_per_second": 103245.3,
            "degrees_of_freedom": len(spec.x) - len(spec.maps),
            "sigma": "residual",
            "n_voxels": int(head.mask.sum()),
            "at_bound": {m["name"]: m["at_bound"] for m in maps},
        },
        "preprocessed": spec.preprocessed,
    }
    if spec.series.startswith("dwi"):
        manifest |= _tissues(spec, head)
        manifest["fit"]["adequacy"] = _adequacy(spec)
    path = out / folder / "figures" / f"{prefix}_desc-{spec.model}_manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


RUN = {
    "command": "bids-gacelle /data /out participant --models r2star,nexi --small-delta 6ms",
    "config_toml": 'bids_dir = "/data"\nsmall_delta = "6ms"\n\n[fit]\nsolver = "lm"\nseed = 0\n',
    "run_id": "20261122-140000_1b4e28ba",
    "version": "0.1.0",
    "log_tail": "14:00:01 INFO sub-01: 3 models\n14:00:09 ERROR ses-02 nexi: truncated file",
}


def write_dataset(
    out: Path,
    shape: tuple[int, int, int] = (26, 30, 16),
    spacing: tuple[float, float, float] = (6.2, 6.6, 9.0),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two sessions of three and two models, one of them failed in the second."""
    manifests, status = [], []
    for n, session in enumerate(("01", "02")):
        head = make_head(shape, oblique_affine(spacing), seed=n + 1)
        for spec in SPECS.values() if session == "01" else (R2STAR, NEXI):
            entry = {
                "session": session,
                "series": spec.series,
                "model": spec.model,
                "status": "ok",
                "reason": "",
                "seconds": 3.2,
            }
            if session == "02" and spec is NEXI:
                entry |= {
                    "status": "failed",
                    "reason": "ses-02/dwi is truncated: 18 of 240 volumes are missing.",
                    "seconds": 0.4,
                }
            else:
                manifests.append(write_model(out, spec, head, session))
            status.append(entry)
    return manifests, status


def main() -> None:
    """Write the dataset and the page into the folder given on the command line."""
    from bids_gacelle.report import build_subject_report

    out = Path(sys.argv[1])
    manifests, status = write_dataset(out, (96, 108, 48), (1.75, 1.75, 3.0))
    print(build_subject_report(out, "01", manifests, status, RUN))


if __name__ == "__main__":
    main()
