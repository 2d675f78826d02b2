"""Writing files so that a reader never sees half of one.

Every file is written beside its final place and renamed when complete. The same content gives the
same bytes, so a re-run leaves a dataset as it was.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from bids_gacelle.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when the block ends well.

    If the block fails, what was at ``path`` before stays and nothing else is left. Parent folders
    are made. Two processes may write the same path at once: one of them wins, whole.

    Raises
    ------
    InputError
        The file system refuses (full, quota, permission, read-only); says which file.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened by hand: tempfile would give mode 0600 where the user's umask should decide
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            # a full disk or an exceeded quota may show only here (NFS)
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(_refusal(path, error)) from error
    finally:
        # it fails only where the file was never made, as in a folder without permission
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_image(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    header_like: Any = None,
    dtype: Any = np.float32,
    *,
    keep_nan: bool = False,
) -> None:
    """Write a NIfTI-1 image (``.nii.gz``) on the grid of the input.

    Parameters
    ----------
    array : ndarray, shape (x, y, z[, n])
    affine : ndarray, shape (4, 4)
    header_like : NIfTI image or header, optional
        The sform, the qform and their codes are taken from it if it has this affine; otherwise
        both are the affine, with code 1 (scanner).
    dtype : {float32, uint8, int16, int32}
        As stored, without scaling.
    keep_nan : bool
        Values that are not finite become 0 in maps of an estimate, because many viewers and tools
        stumble over NaN and the flag map says where there is no estimate. Where 0 would be read
        as a value, as in a map of standard deviations, keep them: all become NaN.

    Raises
    ------
    InputError
        The file cannot be written.
    ValueError
        The values do not fit ``dtype``.
    """
    image = nib.Nifti1Image(_stored(array, np.dtype(dtype), keep_nan), affine)
    _set_orientation(image, affine, getattr(header_like, "header", header_like))
    image.header.set_xyzt_units("mm", "sec")
    # no name and no time in the gzip header: the same map gives the same file
    with (
        atomic_write(path) as stream,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=stream, mtime=0) as packed,
    ):
        image.to_stream(packed)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with the line ends it has.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    with atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON; numpy values become plain ones and numbers that are not finite ``null``.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_tsv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a BIDS table; None, NaN, infinities, "" and absent cells become ``n/a``.

    Raises
    ------
    InputError
        The file cannot be written.
    ValueError
        A row has a key that is not among ``columns``.
    """
    lines = ["\t".join(columns)]
    for row in rows:
        if extra := sorted(set(row) - set(columns)):
            raise ValueError(f"{path}: no column for {', '.join(extra)}")
        lines.append("\t".join(_cell(row.get(column)) for column in columns))
    write_text(path, "\n".join(lines) + "\n")


def missing_outputs(out_dir: Path, promised: Iterable[PurePath | str]) -> list[str]:
    """Those of the promised files (relative to ``out_dir``) that are absent or empty."""
    root = Path(out_dir)

    def present(path: Path) -> bool:
        return path.is_file() and path.stat().st_size > 0

    return [str(name) for name in promised if not present(root / name)]


def _refusal(path: Path, error: OSError) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e6
    reason = error.strerror or str(error)
    return (
        f"Cannot write {path}: {reason} ({free:,.0f} MB free in {folder}); free space or choose "
        "another output folder that you may write to, then run again."
    )


def _stored(array: np.ndarray, dtype: np.dtype, keep_nan: bool) -> np.ndarray:
    values = np.asarray(array)
    if dtype.kind == "f":
        # a value beyond float32 is no more a number than infinity is
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
        return np.where(np.isfinite(values), values, dtype.type(np.nan if keep_nan else 0))
    with np.errstate(invalid="ignore"):
        stored = values.astype(dtype)
    if not np.array_equal(stored, values):
        raise ValueError(f"Values from {values.min()} to {values.max()} do not fit {dtype}")
    return stored


def _set_orientation(image: nib.Nifti1Image, affine: np.ndarray, reference: Any) -> None:
    header = image.header
    if reference is None or not np.allclose(reference.get_best_affine(), affine, atol=1e-4):
        header.set_sform(affine, code=1)
        header.set_qform(affine, code=1, strip_shears=True)
        return
    # copied field by field: going through matrices would round what other tools compare
    for name in ("sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "qoffset_x"):
        header[name] = reference[name]
    for name in ("qoffset_y", "qoffset_z", "quatern_b", "quatern_c", "quatern_d"):
        header[name] = reference[name]
    header["pixdim"][:4] = reference["pixdim"][:4]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value == "":
        return "n/a"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # nine digits hold any float32 exactly
        return f"{value:.9g}" if math.isfinite(value) else "n/a"
    return " ".join(str(value).split()) or "n/a"
