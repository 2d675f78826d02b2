"""What a series is fitted with: mask, transmit-field map, noise map, segmentations, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bids_gacelle.bids.candidates import Candidate, kept_entities
from bids_gacelle.bids.files import NIFTI, BidsFile, Dataset, parse_file
from bids_gacelle.bids.metadata import MetadataError, Sidecars, scalar
from bids_gacelle.bids.options import Context
from bids_gacelle.bids.queries import matches
from bids_gacelle.bids.series import Atlas, B1Map, Mask, Series, VoxelMap

_RELATIVE = (
    "1",
    "relative",
    "ratio",
    "fraction",
    "arbitrary",
    "unitless",
    "dimensionless",
)
_PERCENT = ("%", "percent", "percentage", "p.u.")  # hMRI writes p.u. for percent units
_DEGREES = ("deg", "degree", "degrees")
FIBRE_MAPS = ("theta", "ff", "fo", "iwf")
"""Maps of the fibres of a voxel, from diffusion, that models of myelin water can use."""

_CALLED = {"noise": "noise map", "graddev": "map of gradient deviations"}
_OTHER_B1 = ("TB1AFI", "TB1DAM", "TB1EPI", "TB1RFM", "TB1SRGE", "TB1TFL")


def add_companions(candidate: Candidate, context: Context, inputs: Sequence[str]) -> Candidate:
    """Add mask and atlases, and what maps the voxels of the series.

    Parameters
    ----------
    inputs : names of the voxel inputs of the models.
    """
    series = candidate.series
    if candidate.problem:
        return candidate
    mask = find_mask(candidate, context)
    warnings = candidate.warnings
    if mask.origin == "quick":
        warnings += (
            "no brain mask; a rough one is made from the image. Give one with --mask or "
            "-d name=path (a desc-brain_mask of the same subject, session and space)",
        )
    series = replace(series, mask=mask, atlases=find_atlases(series, context))
    result = replace(candidate, series=series, warnings=warnings)
    result = _with_voxel_maps(result, context, inputs)
    if series.kind == "vfa":
        return _with_b1(result, context)
    return _with_dwi_maps(result, context) if series.kind == "dwi" else result


# ------------------------------------------------------------------------------------ mask


def find_mask(candidate: Candidate, context: Context) -> Mask:
    """``--mask``, else the best fitting brain mask of each image's space, else a quick one."""
    if context.options.mask:
        return Mask("option", (str(context.options.mask),))
    if candidate.series.kind == "dwi":
        chosen = [_best("mask", file, context) for file in candidate.files]
    else:
        chosen = [_best("mask", candidate.files[0], context)]
    images = tuple(dict.fromkeys(str(f.path) for f in chosen if f))
    return Mask("derivatives", images) if images else Mask("quick")


def _best(query: str, image: BidsFile, context: Context) -> BidsFile | None:
    """Choose, in the space of an image, the answer to a query with most of its entities.

    It may lack some of them, but contradict none.
    """
    found = [
        f
        for f in _about(query, image, context)
        if f.entities.get("space") == image.entities.get("space")
    ]

    def fits(file: BidsFile) -> tuple[bool, bool, int]:
        same_resolution = file.entities.get("res") == image.entities.get("res")
        return file.session == image.session, same_resolution, len(_identity(file))

    return max(found, key=fits, default=None)


def _about(query: str, image: BidsFile, context: Context) -> list[BidsFile]:
    """Answers to a query that may belong to an image, in any space."""
    return [
        f
        for f in _around(image.subject, image.session, context)
        if matches(context.queries[query], f)
        and f.datatype == image.datatype
        and _identity(f).items() <= _identity(image).items()
    ]


def _identity(file: BidsFile) -> dict[str, str]:
    """Entities that say which acquisition a file belongs to."""
    described = ("space", "res", "label", "atlas", "seg", "scale")
    return {k: v for k, v in kept_entities(file).items() if k not in described}


def _around(subject: str, session: str, context: Context) -> list[BidsFile]:
    """Images of the subject in this session, or outside sessions; else in the only session."""
    files = [f for d in context.datasets for f in d.images(subject)]
    near = [f for f in files if f.session in (session, "")]
    sessions = {f.session for f in files if f.session}
    return files if not session and len(sessions) == 1 else near


# ---------------------------------------------------------------------------------- atlases


def find_atlases(series: Series, context: Context) -> tuple[Atlas, ...]:
    """Segmentations given by path, then those of the subject in the space of the series."""
    taken: set[str] = set()
    result = []
    for name, path in context.options.atlases.items():
        result.append(Atlas(_unique(name, taken), str(path), _table_beside(path), "option"))
    for file in _around(series.subject, series.session, context):
        if (
            matches(context.queries["dseg"], file)
            and not file.entities.get("desc", "").endswith("fitflag")  # a flag map of ours
            and file.entities.get("space") == series.entities.get("space")
            and _identity(file).items() <= series.entities.items()
            and file.path not in context.options.atlases.values()
        ):
            tables = context.dataset(file.dataset).inherited(file, ".tsv")
            table = str(tables[0].path) if tables else ""
            result.append(Atlas(_unique(_atlas_name(file), taken), str(file.path), table))
    return tuple(result)


def _atlas_name(file: BidsFile) -> str:
    parts = [file.entities[k] for k in ("atlas", "seg", "scale") if k in file.entities]
    return "".join(parts) or file.entities.get("desc", "") or file.dataset


def _unique(name: str, taken: set[str]) -> str:
    base = re.sub(r"[^0-9a-zA-Z]", "", name)
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}{count}"
    taken.add(name)
    return name


def _table_beside(image: Path) -> str:
    extension = next((e for e in NIFTI if image.name.endswith(e)), image.suffix)
    table = image.with_name(image.name.removesuffix(extension) + ".tsv")
    return str(table) if table.is_file() else ""


# ------------------------------------------------------------------- noise and gradients


def _with_dwi_maps(candidate: Candidate, context: Context) -> Candidate:
    """Add a noise map to each run, and the map of gradient deviations to the series."""
    options, files, notes = context.options, candidate.files, list(candidate.notes)

    def found(query: str, given: Path | None, image: BidsFile) -> VoxelMap | None:
        if given:
            return VoxelMap(str(given), "option")
        if query in options.ignore:
            return None
        best = _best(query, image, context)
        if best:
            notes.append(f"{_CALLED[query]} `{best.label}` is used")
            return VoxelMap(str(best.path))
        if elsewhere := _about(query, image, context):
            spaces = ", ".join(f"`{f.label}`" for f in elsewhere)
            notes.append(f"{_CALLED[query]} {spaces} not used: not in the space of the images")
        return None

    runs = tuple(
        replace(run, noise_map=found("noise", options.noise_map, file))
        for run, file in zip(candidate.series.dwi_runs, files, strict=True)
    )
    deviation = found("graddev", options.gradient_deviation, files[0])
    series = replace(candidate.series, dwi_runs=runs, gradient_deviation=deviation)
    return replace(candidate, series=series, notes=tuple(notes))


# ------------------------------------------------------------------------------ voxel inputs


def given_path(template: str, subject: str, session: str) -> Path:
    """The file that ``--voxel-map`` means for a session."""
    return Path(template.replace("{subject}", subject).replace("{session}", session))


def _with_voxel_maps(candidate: Candidate, context: Context, inputs: Sequence[str]) -> Candidate:
    """Add the maps given with --voxel-map, and those of fibres from derivatives."""
    series, given = candidate.series, context.options.voxel_maps
    maps: dict[str, VoxelMap] = {}
    lacking, warnings = dict(candidate.lacking), candidate.warnings
    for name, template in given.items():
        path = given_path(template, series.subject, series.session)
        if path.is_file():
            maps[name] = VoxelMap(str(path), "option")
        else:
            lacking[name] = MetadataError(f"--voxel-map {name}: `{path}` does not exist.", path)
    if series.kind == "vfa":
        maps.pop("b1", None)  # its unit counts: it is added as the B1 map
    names = [n for n in (*FIBRE_MAPS, *inputs) if n not in (*given, "b1", "bscale")]
    for name in dict.fromkeys(names) if series.kind != "dwi" else ():
        found = _derived_maps(name, series, context)
        if found:
            maps[name] = VoxelMap(str(found[0].path))
        if len(found) > 1:
            others = ", ".join(f"`{f.label}`" for f in found[1:])
            warnings += (
                f"`{found[0].label}` is used as the map {name}; {others} would fit as well. "
                f"--voxel-map {name}=PATH chooses one",
            )
    return replace(
        candidate, series=replace(series, voxel_maps=maps), lacking=lacking, warnings=warnings
    )


def _derived_maps(name: str, series: Series, context: Context) -> list[BidsFile]:
    """Maps ``param-<name>`` of derivatives in the space of a series, best those of its session."""
    given = {d.name for d in context.derivatives}
    found = [
        f
        for f in _around(series.subject, series.session, context)
        if f.dataset in given
        and matches(context.queries["voxelmap"], f)
        and f.entities.get("param") == name.lower()
        and f.entities.get("space") == series.entities.get("space")
    ]
    return [f for f in found if f.session == series.session] or found


# --------------------------------------------------------------------------------------- B1


def _with_b1(candidate: Candidate, context: Context) -> Candidate:
    series = candidate.series
    if template := context.options.voxel_maps.get("b1"):
        return _with_given_b1(candidate, given_path(template, series.subject, series.session))
    if "tb1" in context.options.ignore:
        return candidate
    around = [
        f
        for f in _around(series.subject, series.session, context)
        if f.session in (series.session, "")
    ]
    maps = [
        f
        for f in around
        if matches(context.queries["tb1"], f)
        and f.entities.get("space") == series.entities.get("space")
    ]
    if not maps:
        return _without_b1(candidate, around)
    maps.sort(key=lambda f: _agreement(f, series), reverse=True)
    best = [f for f in maps if _agreement(f, series) == _agreement(maps[0], series)]
    warnings = candidate.warnings
    if len(best) > 1:
        names = ", ".join(f"`{f.label}`" for f in best[1:])
        warnings += (f"B1 map `{best[0].label}` is used; {names} would fit as well",)
    try:
        b1, assumed = _b1_map(best[0], context.dataset(best[0].dataset))
    except MetadataError as error:
        return replace(candidate, problem=error)
    return replace(candidate, series=replace(series, b1_map=b1), warnings=warnings + assumed)


def _agreement(file: BidsFile, series: Series) -> tuple[bool, int]:
    """Own session before subject level, then most entities in common."""
    common = kept_entities(file).items() & series.entities.items()
    return file.session == series.session, len(common)


def _with_given_b1(candidate: Candidate, path: Path) -> Candidate:
    if "b1" in candidate.lacking:
        return candidate
    file = parse_file(path, path.parent, "raw")
    sidecar = [p for p in (file.sibling(".json"),) if p.is_file()]
    beside = Dataset("raw", path.parent, tuple(parse_file(p, p.parent, "raw") for p in sidecar))
    try:
        b1, assumed = _b1_map(file, beside)
    except MetadataError as error:
        return replace(candidate, problem=error)
    series = replace(candidate.series, b1_map=b1)
    return replace(candidate, series=series, warnings=candidate.warnings + assumed)


def _b1_map(file: BidsFile, dataset: Dataset) -> tuple[B1Map, tuple[str, ...]]:
    """The map with the factor that makes it relative, by its unit; and a warning without one."""
    sidecars = Sidecars(dataset, file)
    found = sidecars.find("Units")
    if found is None:
        sentence = (
            f'no "Units" in a sidecar of `{file.label}`: its values are taken as relative '
            '(1 = nominal flip angle). Add "Units": "percent" if 100 = nominal'
        )
        return B1Map(str(file.path), 1.0, f"{file.label} (no Units: relative)"), (sentence,)
    unit = str(found.value).strip().lower()
    if unit in _PERCENT or unit in _RELATIVE:
        factor = 0.01 if unit in _PERCENT else 1.0
        return B1Map(str(file.path), factor, f"{found.file.label}: Units {found.value}"), ()
    nominal = sidecars.find("FlipAngle")
    if unit in _DEGREES and nominal is not None:
        degrees = scalar(nominal, "FlipAngle")
        source = f"{found.file.label}: Units {found.value}, of FlipAngle {degrees:g}"
        return B1Map(str(file.path), 1 / degrees, source), ()
    if unit in _DEGREES:
        raise MetadataError(
            f"`Units` is {found.value!r} in `{found.file.label}`: of a B1 map in degrees the "
            'nominal flip angle must be known; add it there, e.g. "FlipAngle": 60, or pass '
            "--ignore tb1.",
            found.file.path,
            "FlipAngle",
        )
    raise MetadataError(
        f"`Units` is {found.value!r} in `{found.file.label}`: a B1 map must be relative to the "
        'nominal flip angle; write "relative" (1 = nominal), "percent" (100 = nominal) or '
        '"degrees" (with the nominal "FlipAngle"), or pass --ignore tb1.',
        found.file.path,
        "Units",
    )


def _without_b1(candidate: Candidate, around: Iterable[BidsFile]) -> Candidate:
    others: Sequence[str] = sorted({f.suffix for f in around if f.suffix in _OTHER_B1})
    notes = candidate.notes
    if others:
        notes += (
            f"{', '.join(others)} images are there but not used: compute a TB1map from them and "
            "give it with -d name=path",
        )
    warnings = (
        *candidate.warnings,
        "no B1 map (TB1map): T1 carries the error of the transmit field. Looked in fmap and anat "
        "of the session, in the dataset and in those given with -d",
    )
    return replace(candidate, warnings=warnings, notes=notes)
