"""Preprocessed dwi of studies that do not come as BIDS, presented as if they did.

The Human Connectome Project (young adults; folders like 100307) and UK Biobank (folders like
1234567_20250_2_0, or 1234567_2_0) keep what we read under fixed names. The files stay where they
are; they get the entities that the same files of a BIDS derivative would have. Names of the
layouts and of the sessions are those of QSIRecon (``--input-type``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_gacelle.bids.files import BidsFile, Dataset, parse_file
from bids_gacelle.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where a pipeline puts what we read, below the folder of one visit of a participant.

    Attributes
    ----------
    visit : name of such a folder, with the groups ``sub``, ``instance`` and ``array``.
    folders : where the dwi files lie in it; the first that is there counts.
    images : name of the dwi and of its brain mask; the first dwi that is there counts.
    space : label of the space of the images, "" for their own.
    anatomy : the anatomical image that spans this space.
    hint : a sentence on the diffusion times of the protocol.
    """

    visit: re.Pattern[str]
    folders: tuple[str, ...]
    images: tuple[tuple[str, str], ...]
    space: str = ""
    anatomy: str = ""
    hint: str = ""


LAYOUTS: Mapping[str, Layout] = {
    "hcpya": Layout(
        visit=re.compile(r"(?P<sub>[0-9]+|[0-9A-Za-z]+_V[0-9]+_MR)(?P<instance>)(?P<array>)"),
        folders=("T1w/Diffusion",),
        images=(("data", "nodif_brain_mask"),),
        space="ACPC",
        anatomy="T1w/T1w_acpc_dc_restore.nii.gz",
        # Sotiropoulos et al. 2013, doi:10.1016/j.neuroimage.2013.05.057
        hint=" The 3T protocol of HCP young adults has --small-delta 10.6ms --big-delta 43.1ms.",
    ),
    "ukb": Layout(
        visit=re.compile(
            r"(?P<sub>[0-9]+?)(?:_20250)?(?:_(?P<instance>[0-9]{1,2})_(?P<array>[0-9]{1,2}))?"
        ),
        folders=("dMRI/dMRI", "DTI/dMRI/dMRI"),
        # _ud: after the correction of gradient distortion
        images=(("data_ud", "nodif_brain_mask_ud"), ("data", "nodif_brain_mask")),
    ),
}


@dataclass(frozen=True)
class Visit:
    """Folder of one visit of a participant, and where in it the dwi are (None: nowhere).

    ``session`` is "" where the folder names none.
    """

    subject: str
    session: str
    folder: Path
    dwi: Path | None


def find_visits(input_type: str, root: Path) -> list[Visit]:
    """Folders of a layout directly below ``root``, in the order of their names.

    Raises
    ------
    InputError
        Two folders are the same visit of the same participant.
    """
    layout = LAYOUTS[input_type]
    found: dict[tuple[str, str], Visit] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        match = layout.visit.fullmatch(folder.name)
        if not match:
            continue
        subject = re.sub(r"[^0-9A-Za-z]", "", match["sub"])
        numbers = (match["instance"], match["array"])
        session = "".join(f"{int(n):02d}" for n in numbers if n)
        visit = Visit(subject, session, folder, _dwi_folder(layout, folder))
        if other := found.get((subject, session)):
            raise InputError(
                f"{other.folder} and {folder} are the same visit of participant {subject}; leave "
                "one of them."
            )
        found[subject, session] = visit
    return list(found.values())


def open_layout(
    input_type: str, name: str, root: Path, visits: Sequence[Visit], subjects: Sequence[str]
) -> Dataset:
    """Present the dwi of the participants, and JSON and gradient files at the root, as BIDS."""
    files = [parse_file(p, root, name) for p in sorted(root.glob("dwi.*")) if p.is_file()]
    for visit in visits:
        if visit.subject in subjects:
            files += _files(LAYOUTS[input_type], name, root, visit)
    return Dataset(name, root, tuple(files))


def expected_dwi(input_type: str) -> str:
    """Where the dwi of a visit should be, in words."""
    layout = LAYOUTS[input_type]
    return " or ".join(f"{f}/{dwi}.nii.gz" for f in layout.folders for dwi, _ in layout.images)


def guess_layout(root: Path) -> str:
    """Name of the layout that a folder seems to have, "" if none."""
    for name, layout in LAYOUTS.items():
        folders = (f for f in root.iterdir() if layout.visit.fullmatch(f.name))
        if any(_dwi_folder(layout, folder) for folder in folders):
            return name
    return ""


def _dwi_folder(layout: Layout, folder: Path) -> Path | None:
    try:
        return next((p for f in layout.folders if (p := folder / f).is_dir()), None)
    except PermissionError:
        return folder  # whoever lists it finds that this may not be


def _files(layout: Layout, dataset: str, root: Path, visit: Visit) -> Iterator[BidsFile]:
    folder = visit.dwi
    if folder is None or not os.access(folder, os.R_OK | os.X_OK):
        return
    dwi, mask = next(((d, m) for d, m in layout.images if _there(folder, d)), layout.images[0])
    common = {"sub": visit.subject} | ({"ses": visit.session} if visit.session else {})
    common |= {"space": layout.space} if layout.space else {}
    preprocessed = {**common, "desc": "preproc"}
    for stem, entities, suffix in (
        (dwi, preprocessed, "dwi"),
        (mask, {**common, "desc": "brain"}, "mask"),
        ("grad_dev", common, "graddev"),
    ):
        if image := _there(folder, stem):
            extension = image.name.removeprefix(stem)
            yield BidsFile(dataset, root, image, entities, suffix, extension, "dwi")
    for file, extension in (("bvals", ".bval"), ("bvecs", ".bvec"), (f"{dwi}.json", ".json")):
        if (path := folder / file).is_file():
            yield BidsFile(dataset, root, path, preprocessed, "dwi", extension, "dwi")
    if layout.anatomy and (path := visit.folder / layout.anatomy).is_file():
        yield BidsFile(dataset, root, path, preprocessed, "T1w", ".nii.gz", "anat")


def _there(folder: Path, stem: str) -> Path | None:
    return next((p for e in (".nii.gz", ".nii") if (p := folder / f"{stem}{e}").is_file()), None)
