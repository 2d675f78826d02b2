"""What every output file is called: pure functions of (series, model, parameter, statistic).

A name never depends on what else was requested, and no two outputs share one. All paths are
relative to the root of the output dataset. Maps with an official BIDS suffix say the model in
``desc`` (BIDS 1.11.1, derivatives of qMRI); all others follow BEP016 (``model``, ``param``) and
are listed in ``.bidsignore``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from bids_gacelle.bids.series import Series

# fmt: off
ENTITY_ORDER = (
    "sub", "tpl", "ses", "cohort", "task", "acq", "ce", "rec", "dir", "run", "mod", "echo", "flip",
    "inv", "mt", "part", "proc", "hemi", "space", "model", "param", "split", "recording", "chunk",
    "atlas", "seg", "scale", "res", "den", "label", "desc",
)
# fmt: on
"""Order of the entities in a file name (BIDS 1.11.1; ``model`` and ``param`` from BEP016)."""

STATISTICS = {
    "std": "Standard deviation of the estimate",
    "median": "Median of the posterior",
    "mean": "Mean of the posterior",
    "q05": "5 % quantile of the posterior",
    "q95": "95 % quantile of the posterior",
    "rhat": "Convergence diagnostic of the chains (rank-normalised split R-hat)",
    "ess": "Effective sample size of the chains",
}
"""What a map can hold besides the best estimate, and its meaning."""

FLAGS = {
    0: "ok",
    1: "outside the mask",
    2: "a parameter at a bound",
    4: "unusable input",
    8: "not converged",
    16: "several minima of similar depth",
    32: "excluded by a plausibility rule",
}
"""Bits of the flag map; a voxel holds the sum of those that apply."""

# what BIDS allows on maps, masks and segmentations alike; echo-, part- and the like stop existing
# once maps are made
_COMMON = frozenset({"acq", "rec", "run", "chunk", "space", "res"})
_SERIES_ENTITIES = {"anat": _COMMON | {"task", "ce"}, "dwi": _COMMON | {"dir"}}
_LABEL = re.compile(r"[0-9a-zA-Z+]+")


def datatype_of(series: Series) -> str:
    """Folder that the outputs of a series go to: ``anat`` or ``dwi``."""
    return "dwi" if series.kind == "dwi" else "anat"


def build_name(entities: Mapping[str, str], suffix: str, extension: str) -> str:
    """Join entities (in the order of BIDS), suffix and extension into a file name.

    Raises
    ------
    ValueError
        An entity is unknown, or a label or suffix is not alphanumeric.
    """
    if unknown := sorted(set(entities) - set(ENTITY_ORDER)):
        raise ValueError(f"Not a BIDS entity: {', '.join(unknown)}")
    parts = [f"{key}-{_label(entities[key], key)}" for key in ENTITY_ORDER if key in entities]
    return "_".join([*parts, _label(suffix, "suffix")]) + extension


def parse_name(name: str) -> tuple[dict[str, str], str, str]:
    """Split a file name into entities (in their order), suffix and extension.

    The inverse of `build_name`.

    Raises
    ------
    ValueError
        The name is not made of ``key-label`` pairs and a suffix, or repeats an entity.
    """
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    entities: dict[str, str] = {}
    for pair in pairs:
        key, dash, label = pair.partition("-")
        if not dash or key in entities:
            raise ValueError(f"Not a BIDS name: {name}")
        entities[key] = _label(label, key)
    return entities, _label(suffix, "suffix"), dot + extension


def map_path(
    series: Series,
    *,
    model: str,
    parameter: str = "",
    statistic: str = "",
    suffix: str = "",
    bare: bool = False,
    compartment: str = "",
    datatype: str,
    extension: str = ".nii.gz",
) -> PurePosixPath:
    """Path of one parameter map, or of its sidecar.

    Parameters
    ----------
    series : Series
        What was fitted; gives subject, session and the entities that names keep.
    model, parameter : str
        As in Python (``nexi``, ``R2star``); written in lower case, so that two parameters of a
        model must differ in more than case.
    statistic : str
        "" for the best estimate, else a key of `STATISTICS`.
    suffix : str
        Official BIDS suffix of the quantity (``R2starmap``), "" when there is none. The parameter
        is not in such a name.
    bare : bool
        The model is the canonical one for its suffixes and is left out of ``desc``.
    compartment : str
        Which compartment a map with an official suffix is about (``MW``): a model may use a suffix
        once for each.
    datatype : {"anat", "dwi"}

    Raises
    ------
    ValueError
        A label cannot stand in a name, the statistic is unknown, or the model's name ends like a
        statistic, so that ``desc`` would be ambiguous.
    """
    if statistic and statistic not in STATISTICS:
        raise ValueError(f"Unknown statistic {statistic}; one of {', '.join(STATISTICS)}")
    if suffix:
        about = _label(compartment, "compartment") if compartment else ""
        desc = ("" if bare else model_label(model)) + about + statistic
        entities = {"desc": desc} if desc else {}
    else:
        entities = {"model": model_label(model), "param": _label(parameter, "param").lower()}
        if statistic:
            entities["desc"] = statistic
    return _path(series, datatype, entities, suffix or f"{datatype}map", extension)


def quality_path(series: Series, quality: str, *, model: str) -> PurePosixPath:
    """Path of a map of the quality of the fit: ``nrmse`` or ``chi2``."""
    return map_path(series, model=model, parameter=quality, datatype=datatype_of(series))


def mask_path(series: Series, *, model: str, extension: str = ".nii.gz") -> PurePosixPath:
    """Path of the mask of the voxels that were fitted."""
    return _path(series, datatype_of(series), {"desc": model_label(model)}, "mask", extension)


def flag_path(series: Series, *, model: str, extension: str = ".nii.gz") -> PurePosixPath:
    """Path of the flag map; with ``.tsv`` that of the table of its codes (`flag_rows`)."""
    desc = {"desc": f"{model_label(model)}fitflag"}
    return _path(series, datatype_of(series), desc, "dseg", extension)


def flag_rows() -> list[dict[str, object]]:
    """Rows (``index``, ``name``) of the table of a flag map: every value that can occur."""
    bits = [bit for bit in FLAGS if bit]

    def name(value: int) -> str:
        return " + ".join(FLAGS[bit] for bit in bits if value & bit) or FLAGS[0]

    return [{"index": value, "name": name(value)} for value in range(2 * bits[-1])]


def table_path(
    series: Series, *, model: str, atlas: str, extension: str = ".tsv"
) -> PurePosixPath:
    """Path of the ROI table of one model and one atlas, or of its sidecar."""
    entities = {"atlas": atlas, "desc": model_label(model)}
    return _path(series, datatype_of(series), entities, "scalarstats", extension)


def scheme_path(series: Series) -> PurePosixPath:
    """Path of the acquisition of a dwi series as a Camino scheme."""
    return _path(series, datatype_of(series), {}, "dwi", ".scheme")


def manifest_path(series: Series, *, model: str) -> PurePosixPath:
    """Path of the manifest: what the report needs to know about one model on one series."""
    return _path(series, "figures", {"desc": model_label(model)}, "manifest", ".json")


def reference_path(series: Series) -> PurePosixPath:
    """Path of the image that the report draws the mask over.

    It carries the kind of the series, because a gradient-echo and a diffusion series may agree in
    all their entities.
    """
    return _path(series, "figures", {"desc": f"{series.kind}reference"}, "image", ".nii.gz")


def report_path(subject: str) -> PurePosixPath:
    """Path of the report of one subject (label without ``sub-``)."""
    return PurePosixPath(f"sub-{_label(subject, 'sub')}.html")


def model_label(model: str) -> str:
    """Label of a model in file names: its name in lower case.

    Raises
    ------
    ValueError
        The name is not alphanumeric, or ends like a statistic or as the flag map does.
    """
    label = _label(model, "model").lower()
    if label.endswith((*STATISTICS, "fitflag")):
        raise ValueError(f"Model name {model} must not end in {', '.join(STATISTICS)} or fitflag")
    return label


def _label(label: str, entity: str) -> str:
    if not _LABEL.fullmatch(label):
        raise ValueError(f"{entity}: {label!r} is not a BIDS label (letters, digits and + only)")
    return label


def _path(
    series: Series, folder: str, entities: Mapping[str, str], suffix: str, extension: str
) -> PurePosixPath:
    allowed = _SERIES_ENTITIES[datatype_of(series)]
    if refused := sorted(set(series.entities) - allowed):
        raise ValueError(f"Series {series.label}: outputs cannot keep {', '.join(refused)}")
    place = {"sub": series.subject} | ({"ses": series.session} if series.session else {})
    name = build_name({**place, **series.entities, **entities}, suffix, extension)
    return PurePosixPath(*(f"{key}-{label}" for key, label in place.items()), folder, name)
