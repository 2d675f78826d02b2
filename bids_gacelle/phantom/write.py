"""The digital brain as a raw BIDS dataset, with its truth in ``derivatives/truth``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bids_gacelle import __version__
from bids_gacelle.bids.dataset import BIDS_VERSION, IGNORED
from bids_gacelle.bids.names import build_name, map_path
from bids_gacelle.bids.output import write_image, write_json, write_text, write_tsv
from bids_gacelle.bids.series import Series
from bids_gacelle.engine import Parameter, get_model
from bids_gacelle.errors import InputError
from bids_gacelle.phantom.anatomy import Anatomy, load_template, make_anatomy
from bids_gacelle.phantom.contrasts import (
    CONTRASTS,
    DEFAULT_CONTRASTS,
    DWI_MODELS,
    Contrast,
    Image,
    make_contrast,
    measure,
)
from bids_gacelle.phantom.fields import stream
from bids_gacelle.phantom.head import Head
from bids_gacelle.phantom.parcels import PARCELS, parcel_labels
from bids_gacelle.phantom.tissue import TISSUES

NAME = "bids-gacelle-phantom"
TRUTH = Path("derivatives") / "truth"
RESOLUTION_MM = (1.0, 12.0)


@dataclass(frozen=True)
class Place:
    """Where the files of one session go: root of a dataset, and labels."""

    root: Path
    subject: str
    session: str

    def path(self, datatype: str, entities: dict[str, str], suffix: str) -> Path:
        """Return the path of a file, without extension."""
        labels = {"sub": self.subject} | ({"ses": self.session} if self.session else {})
        folder = self.root.joinpath(*(f"{k}-{v}" for k, v in labels.items()), datatype)
        return folder / build_name(labels | entities, suffix, "")


def write_phantom(
    out: Path,
    *,
    subjects: int = 2,
    sessions: int = 1,
    snr: float = 50.0,
    contrasts: Sequence[str] = DEFAULT_CONTRASTS,
    resolution: float = 4.0,
    seed: int = 0,
    dwi_model: str = "nexi",
    phase: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write a raw BIDS dataset of digital brains and ``derivatives/truth`` in it.

    Parameters
    ----------
    out
        Folder of the dataset; made when absent.
    subjects, sessions
        How many; one session leaves ``ses`` out of the names.
    snr
        Mean of white matter in the brightest image of a contrast over the standard deviation of
        real and imaginary noise; ``inf`` for none.
    contrasts
        Some of `contrasts.CONTRASTS`.
    resolution
        Isotropic voxel size in mm.
    seed
        Same seed, same dataset, byte for byte.
    dwi_model
        The model that makes the diffusion signals: "nexi" or "mcmicro".
    phase
        Write the multi-echo gradient echo as magnitude and phase, not as magnitude alone.
    overwrite
        Replace an earlier phantom at `out`; what else is in the folder stays.
    progress
        Called with what is being done, many times.

    Returns
    -------
    list of Path
        All images written.

    Raises
    ------
    InputError
        A value makes no sense, nilearn is missing, or `out` is in use or cannot be written.
    """
    _check(subjects, sessions, snr, contrasts, resolution, seed, dwi_model)
    load_template()  # fails before anything is written
    out = Path(out)
    _make_room(out, overwrite)
    options = (
        f"--subjects {subjects} --sessions {sessions} --snr {snr:g} --seed {seed} "
        f"--contrasts {','.join(contrasts)} --resolution {resolution:g} --dwi-model {dwi_model}"
        + (" --phase" if phase else "")
    )
    _write_root(out, subjects, options)
    written = []
    for subject, session in product(range(1, subjects + 1), range(1, sessions + 1)):
        anatomy = make_anatomy(subject, session, resolution=resolution, seed=seed)
        head = Head(anatomy, subject, session, seed)
        name = f"{session}" if sessions > 1 else ""
        tell = _telling(f"sub-{subject:02d}" + (f" ses-{name}" if name else ""), progress)
        made = _simulate(head, contrasts, dwi_model, phase, tell)
        written += _write_session(out, head, made, snr, name, tell)
    return list(dict.fromkeys(written))  # contrasts may share a map


def _simulate(
    head: Head,
    contrasts: Sequence[str],
    dwi_model: str,
    phase: bool,
    tell: Callable[[str], None],
) -> list[Contrast]:
    """Make the contrasts of one session."""

    def progress(share: float) -> None:
        tell(f"{share:.0%} of the steady states simulated")

    options: dict[str, Any] = {"dwi_model": dwi_model, "phase": phase, "progress": progress}
    return [make_contrast(name, head, **options) for name in contrasts]


def _telling(where: str, progress: Callable[[str], None] | None) -> Callable[[str], None]:
    """Return what tells of progress in one session."""

    def tell(what: str) -> None:
        if progress is not None:
            progress(f"{where}: {what}")

    return tell


def _check(
    subjects: int,
    sessions: int,
    snr: float,
    contrasts: Sequence[str],
    resolution: float,
    seed: int,
    dwi_model: str,
) -> None:
    for name, value in (("subjects", subjects), ("sessions", sessions)):
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be a whole number of at least 1.")
    if not snr > 0:
        raise InputError(f"--snr is {snr:g}; it must be greater than 0 (inf for no noise).")
    if unknown := [name for name in contrasts if name not in CONTRASTS]:
        raise InputError(
            f"--contrasts: '{unknown[0]}' is unknown; choose among {', '.join(CONTRASTS)}."
        )
    if not contrasts or len(set(contrasts)) < len(contrasts):
        raise InputError(f"--contrasts must name each of {', '.join(CONTRASTS)} at most once.")
    low, high = RESOLUTION_MM
    if not low <= resolution <= high:
        raise InputError(
            f"--resolution is {resolution:g} mm; it must be between {low:g} and {high:g} mm."
        )
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must be 0 or more.")
    if dwi_model not in DWI_MODELS:
        raise InputError(
            f"--dwi-model: '{dwi_model}' is unknown; choose among {', '.join(DWI_MODELS)}."
        )


def _make_room(out: Path, overwrite: bool) -> None:
    """See that `out` is empty, or take away the phantom that is there."""
    if out.is_file():
        raise InputError(f"{out} is a file; give the folder of the dataset to write.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not _is_phantom(out):
        raise InputError(
            f"{out} is not empty and not an earlier digital brain; give an empty or new folder."
        )
    if not overwrite:
        raise InputError(
            f"{out} already holds a digital brain; add --overwrite to replace it, or give "
            "another folder."
        )
    try:
        for folder in (*out.glob("sub-*/"), out / TRUTH):
            if folder.exists():
                shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"The earlier digital brain in {out} cannot be removed: {error.strerror}; give "
            "another folder."
        ) from error


def _is_phantom(folder: Path) -> bool:
    try:
        about = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
        return NAME in [maker["Name"] for maker in about["GeneratedBy"]]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write_root(out: Path, subjects: int, options: str) -> None:
    """Write the files at the root of both datasets."""
    maker = {"Name": NAME, "Version": __version__, "Description": options}
    about = {"BIDSVersion": BIDS_VERSION, "License": "See README.md", "Authors": [NAME]}
    write_json(
        out / "dataset_description.json",
        {"Name": "Digital brain", **about, "DatasetType": "raw", "GeneratedBy": [maker]},
    )
    write_text(out / "README.md", _README.format(options=options))
    labels = [f"sub-{i:02d}" for i in range(1, subjects + 1)]
    rows = [{"participant_id": label, "species": "digital"} for label in labels]
    write_tsv(out / "participants.tsv", rows, ("participant_id", "species"))
    levels = {"digital": "simulated from the ICBM 152 template"}
    write_json(
        out / "participants.json",
        {"species": {"Description": "What was scanned", "Levels": levels}},
    )
    truth = {"Name": "Digital brain: truth", **about, "DatasetType": "derivative"}
    links = {"GeneratedBy": [maker], "DatasetLinks": {"raw": "../.."}}
    write_json(out / TRUTH / "dataset_description.json", truth | links)
    write_text(out / TRUTH / "README.md", _TRUTH_README)
    write_text(out / TRUTH / ".bidsignore", "\n".join(IGNORED) + "\n")


def _write_session(
    out: Path,
    head: Head,
    contrasts: list[Contrast],
    snr: float,
    session: str,
    tell: Callable[[str], None],
) -> list[Path]:
    """Write everything about one session, named `session` ("" for no name)."""
    raw, truth = (Place(root, f"{head.subject:02d}", session) for root in (out, out / TRUTH))
    written = []
    for contrast in contrasts:
        written += _write_images(raw, contrast, head, snr, tell)
        written += _write_truth(truth, contrast, head.anatomy)
    if any(contrast.parcels for contrast in contrasts):
        written.append(_write_parcels(truth, head.anatomy))
    return written + _write_tissues(truth, head.anatomy, contrasts)


def _write_images(
    place: Place, contrast: Contrast, head: Head, snr: float, tell: Callable[[str], None]
) -> list[Path]:
    """Write the raw images of one contrast with their noise."""
    written = []
    for image in contrast.images:
        rng = stream(head.seed, head.subject, head.session, "noise", image.suffix, image.entities)
        for stored in measure(image, contrast.brightness / snr, rng):
            stem = place.path(stored.datatype, dict(stored.entities), stored.suffix)
            tell(f"writing {stem.name}")
            path = stem.with_name(stem.name + ".nii.gz")
            write_image(path, stored.data, head.anatomy.affine, dtype=stored.data.dtype)
            write_json(stem.with_name(stem.name + ".json"), stored.metadata)
            _write_gradients(stem, stored)
            written.append(path)
    return written


def _write_gradients(stem: Path, image: Image) -> None:
    if image.gradients is None:
        return
    bvals, bvecs = image.gradients
    write_text(stem.with_name(stem.name + ".bval"), " ".join(f"{b:.0f}" for b in bvals) + "\n")
    rows = [" ".join(f"{x:.8f}" for x in row) for row in bvecs]
    write_text(stem.with_name(stem.name + ".bvec"), "\n".join(rows) + "\n")


def _write_truth(place: Place, contrast: Contrast, anatomy: Anatomy) -> list[Path]:
    """Write the maps that a perfect fit of the contrast's own model would give, and inputs."""
    model = get_model(contrast.model)
    series = Series(contrast.kind, place.subject, place.session, dict(contrast.entities), ())
    diffusion = Series("dwi", place.subject, place.session, {}, ())
    written = []
    for parameter, values in contrast.truth:
        name = map_path(
            series,
            model=contrast.model,
            parameter=parameter.name,
            suffix=parameter.suffix,
            bare=model.bare_names,
            compartment=parameter.compartment,
            datatype=model.datatype,
        )
        written.append(_write_map(place.root / name, parameter, values, anatomy))
    for parameter, values in contrast.inputs:
        name = map_path(diffusion, model="fibres", parameter=parameter.name, datatype="dwi")
        written.append(_write_map(place.root / name, parameter, values, anatomy))
    return written


def _write_map(path: Path, parameter: Parameter, values: np.ndarray, anatomy: Anatomy) -> Path:
    write_image(path, values, anatomy.affine, keep_nan=True)
    write_json(
        path.with_name(path.name.replace(".nii.gz", ".json")),
        {
            "Description": f"True value: {parameter.description}; NaN where it has no meaning",
            "Units": parameter.unit,
            "SkullStripped": True,
        },
    )
    return path


def _write_tissues(place: Place, anatomy: Anatomy, contrasts: list[Contrast]) -> list[Path]:
    """Write the segmentation, and the brain mask beside the images of every datatype."""
    labels = np.where(anatomy.brain, anatomy.labels, 0)
    rows = [
        {"index": int(t.label), "name": t.name, "abbreviation": t.abbreviation, "color": t.color}
        for t in TISSUES
    ]
    about = "Tissue that each voxel was simulated from"
    stem = place.path("anat", {"desc": "tissues"}, "dseg")
    written = [_write_segmentation(stem, labels, anatomy, about, rows)]
    for datatype in sorted({get_model(contrast.model).datatype for contrast in contrasts}):
        stem = place.path(datatype, {"desc": "brain"}, "mask")
        path = stem.with_name(stem.name + ".nii.gz")
        write_image(path, anatomy.brain, anatomy.affine, dtype=np.uint8)
        about = "All tissue, without skull and scalp"
        write_json(stem.with_name(stem.name + ".json"), {"Type": "Brain", "Description": about})
        written.append(path)
    return written


def _write_parcels(place: Place, anatomy: Anatomy) -> Path:
    """Write the parcels of white matter."""
    rows = [
        {"index": p.index, "name": p.name, "abbreviation": p.abbreviation, "color": p.color}
        for p in PARCELS
    ]
    about = "Parcels of white matter, in the order of their mean myelin water fraction"
    stem = place.path("anat", {"seg": "parcels"}, "dseg")
    return _write_segmentation(stem, parcel_labels(anatomy), anatomy, about, rows)


def _write_segmentation(
    stem: Path, labels: np.ndarray, anatomy: Anatomy, about: str, rows: list[dict[str, object]]
) -> Path:
    """Write a label image, its sidecar and its table."""
    path = stem.with_name(stem.name + ".nii.gz")
    write_image(path, labels, anatomy.affine, dtype=np.uint8)
    write_json(stem.with_name(stem.name + ".json"), {"Manual": False, "Description": about})
    columns = ("index", "name", "abbreviation", "color")
    write_tsv(stem.with_name(stem.name + ".tsv"), rows, columns)
    return path


_README = """\
# Digital brain

Simulated scans with known truth, made by

    bids-gacelle-phantom OUT {options}

Nobody was scanned. The anatomy comes from the tissue probability maps of the ICBM 152 template
(2009a, nonlinear, symmetric; Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033) as
distributed with nilearn; the deep nuclei are ellipsoids. The template is copyright (C) 1993-2004
Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University,
who permit to use, copy, modify and distribute it for any purpose and without fee, provided that
this notice appears in all copies. Everything else here is in the public domain (CC0-1.0).

- `anat/*_MEGRE`: multi-echo gradient echo, mono-exponential decay.
- `anat/*_VFA`: spoiled gradient echoes at several flip angles; `fmap/*_TB1map` is the transmit
  field in them.
- `anat/*_acq-mwi_*_VFA`: complex multi-echo gradient echoes at several flip angles, from three
  pools of water of which two exchange; the steady states are extended phase graphs with exchange.
- `dwi/*_acq-D<ms>_dwi`: diffusion-weighted runs that differ in diffusion time.

Noise is Gaussian in real and imaginary part, so that magnitudes are Rician, and independent
between voxels. There is no motion, no distortion and no partial
volume: every voxel is one tissue. `derivatives/truth` holds tissue labels, brain mask and the
true parameter maps.
"""

_TRUTH_README = """\
# Truth of the digital brain

- `anat/*_desc-tissues_dseg`: the tissue of each voxel.
- `anat/*_seg-parcels_dseg`: parcels of white matter that differ in myelin water.
- `*_desc-brain_mask`: all tissue, without skull and scalp.
- `dwi/*_model-fibres_param-*_dwimap`: what diffusion could tell models of myelin water: the angle
  `theta` of fibres to the static field, their share `ff` (of one fibre: 1), and `iwf`.
- `anat/*_param-freqbkg*_anatmap`, `anat/*_param-pini_anatmap`: field offset and initial phase.
- All other maps: the parameter values that the scans were simulated from, under the names that
  bids_gacelle gives to its estimates. They are NaN outside the brain, and where a parameter has no
  meaning (the neurites of cerebrospinal fluid).
"""
