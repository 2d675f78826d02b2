"""Headers of the images of a series: whether they can be read and lie on one grid."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.metadata import MetadataError
from bids_gacelle.bids.options import names_of
from bids_gacelle.bids.series import Atlas, Finding, Mask, Series, Severity, VoxelMap
from bids_gacelle.errors import InputError

_TOLERANCE = 0.1  # voxel edges by which a corner of the volume may be off
_USUAL_B1 = (0.3, 2.0)  # median of a relative B1 map over its positive values
_UNREADABLE = (EOFError, ImageFileError, HeaderDataError, OSError, ValueError, zlib.error)

# A mask often comes from a tool that stores the affine with two decimals: with the same shape and
# entries this close (mm), voxel for voxel is what was meant.
_ROUNDING = 0.01
_ROUNDED = (
    "the affine of the mask `{}` differs from that of the images by rounding; the shapes agree, "
    "so the mask is taken voxel for voxel. Look at it in the report."
)


_Report = Callable[[Severity, MetadataError], None]


def review_series(
    series: Series, check_table: Callable[[Path], object]
) -> tuple[Series, list[Finding], str]:
    """Open the headers of everything that the models of a series need.

    Data are read only of a B1 map, whose median must agree with its unit.

    Parameters
    ----------
    series : as discovery found it.
    check_table : reads the table that names the labels of a segmentation, and raises InputError
        where it cannot be used.

    Returns
    -------
    series : without the segmentations, noise maps and gradient deviations that are of no use,
        and with a quick mask where the one found is not on the grid.
    findings : each names the file; they hold for all models, so ``model`` is "".
    reason : why nothing can be fitted to the images, "" if it can.
    """
    findings: list[Finding] = []

    def report(severity: Severity, problem: MetadataError) -> None:
        place = f"sub-{series.subject}" + (f"/ses-{series.session}" if series.session else "")
        verb = " skipped" if severity == "error" else ""
        message = f"{place} {series.label}{verb}: {problem}"
        about = {"file": problem.file, "series": series.label}
        findings.append(Finding(severity, message, series.subject, series.session, **about))

    try:
        reference = _check_images(series)
        mask = _checked_mask(series.mask, reference, report)
        if series.b1_map:
            _check_b1(Path(series.b1_map.image), series.b1_map.factor)
        series = _with_usable_maps(series, reference, report)
        atlases = tuple(_usable_atlases(series.atlases, reference, check_table, report))
    except MetadataError as problem:
        report("error", problem)
        return series, findings, str(problem)
    return replace(series, mask=mask, atlases=atlases), findings, ""


def too_few_fibres(series: Series, needed_inputs: Sequence[str]) -> MetadataError | None:
    """Say of the maps of fibres that they have too few volumes for the inputs of a model.

    Parameters
    ----------
    series : whose maps were found readable by `review_series`.
    needed_inputs : as in ``Job``; numbered where there are several fibres.
    """
    found: set[str] = set()
    sizes = []
    for name, path in ((n, Path(m.image)) for n, m in series.voxel_maps.items()):
        shape = _open(path).shape
        volumes = int(np.prod(shape[3:], dtype=int))
        fibres = volumes // 3 if name == "fo" else volumes
        base = "theta" if name == "fo" else name
        found |= {name, *(f"{base}{n}" for n in range(1, fibres + 1))}
        sizes.append((name, path, shape))
    missing = next((i for i in needed_inputs if i not in found), "")
    for name, path, shape in sizes:
        if name in names_of(missing):
            each = "three volumes" if name == "fo" else "one volume"
            return MetadataError(
                f"`{path}` has the shape {_shape(shape)} and holds no {missing}: the map {name} "
                f"needs {each} for each fibre.",
                path,
            )
    return None


def absent_images(series: Series) -> list[str]:
    """Images of a series of which there is no content: empty files, links that lead nowhere."""
    second = series.second.images if series.second else ()
    images = [Path(p) for p in (*series.images, *second)]
    return [str(p) for p in images if not p.exists() or p.stat().st_size == 0]


def _check_images(series: Series) -> SpatialImage:
    """Refuse images of one fit that cannot be read, or differ in grid or number of volumes."""
    images = [_open(Path(p)) for p in series.images]
    seconds = [_open(Path(p)) for p in series.second.images] if series.second else []
    for image in (*images, *seconds):
        if series.kind != "dwi":
            _require_3d(image)
        _require_same_grid(image, images[0])
    for run, image in zip(series.dwi_runs, images, strict=False):
        bval, _ = read_gradients(run.bval, run.bvec)
        _require_volumes(image, len(bval), Path(run.bval).name)
    return images[0]


def _checked_mask(mask: Mask, reference: SpatialImage, report: _Report) -> Mask:
    """Replace a mask from derivatives that does not fit by a quick one; ``--mask`` must fit."""
    try:
        for path in map(Path, mask.images):
            image = _open(path)
            _require_3d(image)
            if _rounded(image, reference):
                report("warning", MetadataError(_ROUNDED.format(path), path))
            else:
                _require_same_grid(image, reference)
    except MetadataError as problem:
        if mask.origin == "option":
            raise
        report(
            "warning",
            MetadataError(f"{problem} A rough mask is made from the image instead.", problem.file),
        )
        return Mask("quick")
    return mask


def _with_usable_maps(series: Series, reference: SpatialImage, report: _Report) -> Series:
    """Leave out noise maps and gradient deviations off the grid; those of options must be on it.

    They are not resampled: with nothing but affines to go by, a map of another space would be
    taken for one of this one.
    """

    def usable(
        given: VoxelMap | None, check: Callable[[SpatialImage], None], option: str, instead: str
    ) -> VoxelMap | None:
        if given is None:
            return None
        try:
            image = _open(Path(given.image))
            check(image)
            _require_same_grid(image, reference)
        except MetadataError as problem:
            if given.origin == "option":
                text = f"{problem} It was asked for with {option}."
                raise MetadataError(text, problem.file) from None
            report("warning", MetadataError(f"{problem} {instead}", problem.file))
            return None
        return given

    runs = tuple(
        replace(
            run,
            noise_map=usable(
                run.noise_map,
                _require_3d,
                "--noise-map",
                "The noise is estimated from the images instead.",
            ),
        )
        for run in series.dwi_runs
    )
    deviation = usable(
        series.gradient_deviation,
        _require_nine,
        "--gradient-deviation",
        "Nominal b-values are used everywhere.",
    )
    return replace(
        series,
        dwi_runs=runs,
        gradient_deviation=deviation,
        voxel_maps=dict(_readable_maps(series.voxel_maps, report)),
    )


def _readable_maps(
    maps: Mapping[str, VoxelMap], report: _Report
) -> Iterator[tuple[str, VoxelMap]]:
    """Leave out maps from derivatives that are no images; they need not be on the grid."""
    for name, given in maps.items():
        try:
            _open(Path(given.image))
        except MetadataError as problem:
            if given.origin == "option":
                text = f"{problem} It was asked for with --voxel-map {name}."
                raise MetadataError(text, problem.file) from None
            report("warning", MetadataError(f"{problem} No map {name} is used.", problem.file))
        else:
            yield name, given


def _require_nine(image: SpatialImage) -> None:
    if len(image.shape) != 4 or image.shape[3] != 9:
        raise MetadataError(
            f"`{_path(image)}` has the shape {_shape(image.shape)}; a map of gradient deviations "
            "has 9 volumes, the entries of a 3 x 3 matrix.",
            _path(image),
        )


def _usable_atlases(
    atlases: tuple[Atlas, ...],
    reference: SpatialImage,
    check_table: Callable[[Path], object],
    report: _Report,
) -> Iterator[Atlas]:
    """Leave out those from derivatives that are of no use; ``--atlas`` must be of use."""
    for atlas in atlases:
        try:
            image = _open(Path(atlas.image))
            _require_3d(image)
            _require_same_grid(image, reference)
            if atlas.table:
                _check_table(Path(atlas.table), check_table)
        except MetadataError as problem:
            if atlas.origin == "option":
                text = f"{problem} It was asked for with --atlas {atlas.name}."
                raise MetadataError(text, problem.file) from None
            text = f"{problem} No ROI table is made for the atlas '{atlas.name}'."
            report("warning", MetadataError(text, problem.file))
        else:
            yield atlas


def _check_table(path: Path, check_table: Callable[[Path], object]) -> None:
    try:
        check_table(path)
    except InputError as error:
        raise MetadataError(str(error), path) from None


def _check_b1(path: Path, factor: float) -> None:
    image = _open(path)
    _require_3d(image)
    try:
        values = np.asarray(image.dataobj, dtype=np.float64)
    except _UNREADABLE as error:
        raise MetadataError(_unreadable(path, error), path) from None
    values = values[np.isfinite(values) & (values > 0)]
    if values.size == 0:
        raise MetadataError(f"B1 map `{path}` has no positive value; pass --ignore tb1.", path)
    median = float(np.median(values))
    low, high = _USUAL_B1
    if low <= median * factor <= high:
        return
    unit = {1.0: "relative (1 = nominal)", 0.01: "percent (100 = nominal)"}.get(
        factor, f"degrees of a nominal flip angle of {1 / factor:.4g}"
    )
    probably = next(
        (u for f, u in ((1.0, "relative"), (0.01, "percent")) if low <= median * f <= high), ""
    )
    advice = (
        f"probably they are {probably}: correct Units in its sidecar" if probably else "correct it"
    )
    raise MetadataError(
        f"B1 map `{path}`: the median of its values is {median:.4g}, which cannot be {unit}; "
        f"{advice}, or pass --ignore tb1.",
        path,
        "Units",
    )


# ------------------------------------------------------------------------------ one image


def _open(path: Path) -> SpatialImage:
    """Open an image without reading its data; refuse a file that cannot be one."""
    if not path.exists():
        link = path.is_symlink()
        why = "is a link to a file that is not there (datalad get?)" if link else "does not exist"
        raise MetadataError(f"`{path}` {why}.", path)
    if path.stat().st_size == 0:
        raise MetadataError(f"`{path}` is empty (0 bytes); fetch or convert it again.", path)
    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ImageFileError(f"it is {type(image).__name__}")
        if image.get_data_dtype().kind not in "biuf":
            raise ImageFileError(f"its values are {image.get_data_dtype()}, not real numbers")
        if abs(np.linalg.det(image.affine[:3, :3])) < 1e-12 or not np.isfinite(image.affine).all():
            raise ImageFileError("its affine is singular")
        _require_all_data(path, image)
    except _UNREADABLE as error:
        raise MetadataError(_unreadable(path, error), path) from None
    return image


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"`{path}` cannot be read: permission denied."
    reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"`{path}` cannot be read as an image ({reason}): it is truncated, corrupt or no NIfTI "
        "file; fetch or convert it again."
    )


def _require_all_data(path: Path, image: SpatialImage) -> None:
    """Find files that end before their data do, without reading the data."""
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        return
    proxy: Any = image.dataobj
    needed = int(proxy.offset) + int(np.prod(image.shape)) * header.get_data_dtype().itemsize
    if path.suffix != ".gz":
        size = path.stat().st_size
    elif _gzip_size(path) == needed % 2**32:
        return
    else:  # truncated, several gzip members, or bytes after the data: only reading tells
        size = _count_bytes(path)
    if size < needed:
        raise EOFError(f"{size} of {needed} bytes are there")


def _gzip_size(path: Path) -> int:
    """Uncompressed size modulo 2^32, from the last 4 bytes of the file (RFC 1952)."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


def _count_bytes(path: Path) -> int:
    count = 0
    with gzip.open(path) as file:
        while block := file.read(1 << 24):
            count += len(block)
    return count


def _path(image: SpatialImage) -> Path:
    return Path(str(image.get_filename()))


def _require_3d(image: SpatialImage) -> None:
    if len(image.shape) < 3 or any(n != 1 for n in image.shape[3:]):
        raise MetadataError(
            f"`{_path(image)}` has the shape {_shape(image.shape)}; one 3D volume is needed.",
            _path(image),
        )


def _require_volumes(image: SpatialImage, n: int, bval: str) -> None:
    path = _path(image)
    if len(image.shape) != 4:
        raise MetadataError(
            f"`{path}` has the shape {_shape(image.shape)}; a dwi must be 4D, with the {n} "
            f"volumes that {bval} lists.",
            path,
        )
    if image.shape[3] != n:
        raise MetadataError(
            f"`{path}` has {image.shape[3]} volumes, but {bval} has {n} b-values; one of the two "
            "is not complete.",
            path,
        )


def _rounded(image: SpatialImage, reference: SpatialImage) -> bool:
    """Whether the affines differ, but only as storing them with two decimals makes them."""
    apart = np.abs(image.affine - reference.affine).max()
    return image.shape[:3] == reference.shape[:3] and 1e-3 < apart <= _ROUNDING


def _require_same_grid(image: SpatialImage, reference: SpatialImage) -> None:
    """Refuse another shape, or an affine that moves a corner of the volume visibly."""
    path, other = _path(image), _path(reference).name
    if image.shape[:3] != reference.shape[:3]:
        raise MetadataError(
            f"`{path}` is not on the grid of `{other}`: its shape is "
            f"{_shape(image.shape[:3])}, not {_shape(reference.shape[:3])}.",
            path,
        )
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in image.shape[:3]))])
    shift = np.linalg.norm((corners @ (image.affine - reference.affine).T)[:, :3], axis=1).max()
    if shift > _TOLERANCE * _smallest_edge(reference.affine):
        raise MetadataError(
            f"`{path}` is not on the grid of `{other}`: their affines put a corner "
            f"of the volume {shift:.3g} mm apart.",
            path,
        )


def _smallest_edge(affine: npt.NDArray[np.floating]) -> float:
    return float(nib.affines.voxel_sizes(affine).min())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
