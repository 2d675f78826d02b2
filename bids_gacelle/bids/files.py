"""The files of one dataset: found by pybids, named and inherited by the rules of BIDS."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bids_gacelle.errors import InputError

# Folders that hold nothing we read, but most of the files of a study.
_SKIPPED = re.compile(
    r"^/(code|models|sourcedata|stimuli|logs|derivatives)(/|$)"
    r"|/(func|eeg|meg|ieeg|beh|pet|nirs|motion|micr|mrs|figures|log)(/|$)"
    r"|/\."
)
NIFTI = (".nii.gz", ".nii")
_INDEX = "layout_index.sqlite"  # the name that pybids gives its database


@dataclass(frozen=True)
class BidsFile:
    """A file and what its name says; ``entities`` have their short keys, in the order written."""

    dataset: str
    root: Path
    path: Path
    entities: dict[str, str] = field(hash=False)
    suffix: str
    extension: str
    kept_in: str = ""
    """Datatype, where the folder does not say it."""

    @property
    def subject(self) -> str:
        """Label without ``sub-``."""
        return self.entities.get("sub", "")

    @property
    def session(self) -> str:
        """Label without ``ses-``, "" outside sessions."""
        return self.entities.get("ses", "")

    @property
    def datatype(self) -> str:
        """The folder: ``anat``, ``dwi``, ``fmap``; "" at the level of subjects or above."""
        if self.kept_in:
            return self.kept_in
        folder = self.path.parent.name
        return (
            "" if self.path.parent == self.root or folder.startswith(("sub-", "ses-")) else folder
        )

    @property
    def label(self) -> str:
        """Path inside the dataset, led by ``name:`` for every dataset but the raw one."""
        relative = self.path.relative_to(self.root).as_posix()
        return relative if self.dataset == "raw" else f"{self.dataset}:{relative}"

    @property
    def uri(self) -> str:
        """BIDS URI."""
        return f"bids:{self.dataset}:{self.path.relative_to(self.root).as_posix()}"

    def sibling(self, extension: str) -> Path:
        """Replace the extension."""
        return self.path.with_name(self.path.name.removesuffix(self.extension) + extension)


def parse_file(path: Path, root: Path, dataset: str) -> BidsFile:
    """Split a file name into entities, suffix and extension.

    Done here rather than by pybids because labels must stay as written (``echo-01``, ``run-02``)
    and because pybids drops entities that its configuration does not know (``param``, ``stat``).
    """
    stem, dot, extension = path.name.partition(".")
    *pairs, suffix = stem.split("_")
    entities = {key: value for key, dash, value in (p.partition("-") for p in pairs) if dash}
    return BidsFile(dataset, root, path, entities, suffix, dot + extension)


def loose_file(path: Path) -> BidsFile:
    """A file that was given by its path and is of no dataset."""
    return BidsFile("raw", path.parent, path, {}, path.stem, path.suffix)


@dataclass(frozen=True)
class Dataset:
    """A dataset: its name in BIDS URIs, its root, and the files that were indexed."""

    name: str
    root: Path
    files: tuple[BidsFile, ...] = field(repr=False, hash=False)

    @cached_property
    def _by_folder(self) -> dict[tuple[Path, str, str], list[BidsFile]]:
        groups = defaultdict(list)
        for file in self.files:
            groups[file.path.parent, file.suffix, file.extension].append(file)
        return groups

    @cached_property
    def _by_subject(self) -> dict[str, list[BidsFile]]:
        groups = defaultdict(list)
        for file in self.files:
            if file.extension in NIFTI:
                groups[file.subject].append(file)
        return groups

    def images(self, subject: str) -> list[BidsFile]:
        """All NIfTI files of a subject."""
        return self._by_subject.get(subject, [])

    def inherited(self, image: BidsFile, extension: str) -> list[BidsFile]:
        """Files of this extension that apply to an image, nearest first (inheritance principle).

        They have the suffix of the image, lie in its folder or above it, and name no entity that
        the image does not have.
        """
        found: list[BidsFile] = []
        for folder in _upwards(image.path.parent, self.root):
            level = [
                f
                for f in self._by_folder.get((folder, image.suffix, extension), [])
                if f.entities.items() <= image.entities.items()
            ]
            found += sorted(level, key=lambda f: -len(f.entities))
        return found


def open_dataset(
    name: str, root: Path, subjects: Iterable[str], database_dir: Path | None = None
) -> Dataset:
    """Index the given subjects of a dataset, and the files that they inherit from.

    Parameters
    ----------
    name : name of the dataset in BIDS URIs.
    root : its folder; a ``dataset_description.json`` is not needed.
    subjects : labels without ``sub-``.
    database_dir : where the index of all subjects is kept between runs (None: nothing is kept).

    Raises
    ------
    InputError
        The index cannot be kept in ``database_dir``.
    """
    wanted = {f"sub-{s}" for s in subjects}
    paths = (
        _kept_index(root, database_dir.absolute() / name)
        if database_dir
        else _index(root, sorted(subjects), None)
    )
    kept = [p for p in paths if _belongs(p.relative_to(root), wanted)]
    return Dataset(name, root, tuple(parse_file(p, root, name) for p in sorted(kept)))


def subject_labels(root: Path) -> list[str]:
    """Labels of the ``sub-*`` folders."""
    return _labels(root, "sub-")


def session_labels(root: Path, subject: str) -> list[str]:
    """Labels of the ``ses-*`` folders of a subject."""
    return _labels(root / f"sub-{subject}", "ses-")


def _labels(folder: Path, prefix: str) -> list[str]:
    folders = folder.glob(f"{prefix}*")
    return sorted(f.name.removeprefix(prefix) for f in folders if f.is_dir())


def _kept_index(root: Path, database: Path) -> list[Path]:
    """Use the index of an earlier run as long as the dataset has the same files."""
    from sqlalchemy.exc import SQLAlchemyError

    note, now = database / "files.sha256", _fingerprint(root)
    try:
        database.mkdir(parents=True, exist_ok=True)
        known = note.is_file() and note.read_bytes() == now
        if not known:  # an index that is not finished must not pass for one that is
            note.unlink(missing_ok=True)
            (database / _INDEX).unlink(missing_ok=True)
        paths = _index(root, [], database)
        note.write_bytes(now)
    except (OSError, SQLAlchemyError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"--bids-database-dir: the index of {root} cannot be kept in {database} ({reason}); "
            "give another folder."
        ) from None
    return paths


def _fingerprint(root: Path) -> bytes:
    """Digest of the place of a dataset and the names of its files.

    Names are all that the index holds: contents are read anew by every run.
    """
    digest = hashlib.sha256(os.fsencode(root))
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = "/" + Path(folder).relative_to(root).as_posix().removeprefix(".")
        at = inside.rstrip("/")
        folders[:] = sorted(f for f in folders if not _SKIPPED.search(f"{at}/{f}"))
        for name in sorted(names):
            digest.update(b"\0" + os.fsencode(f"{at}/{name}"))
    return digest.hexdigest().encode()


def _belongs(relative: Path, wanted: set[str]) -> bool:
    return len(relative.parts) == 1 or relative.parts[0] in wanted


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _index(root: Path, subjects: list[str], database: Path | None) -> list[Path]:
    """Paths of the files of a dataset, at least those of the subjects and above them."""
    from bids import BIDSLayout, BIDSLayoutIndexer  # 1 s to import: only when a dataset is opened

    # A kept index serves later runs with other participants, so it has them all.
    others = "" if database else rf"|^/sub-(?!({'|'.join(map(re.escape, subjects))})(/|$))[^/]*/"
    indexer = BIDSLayoutIndexer(
        index_metadata=False, ignore=[re.compile(_SKIPPED.pattern + others)]
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old fields of somebody's dataset_description.json
            layout = BIDSLayout(
                root,
                validate=False,
                config=["bids"],
                indexer=indexer,
                database_path=database,
            )
    except (TypeError, AttributeError, KeyError, ValueError, OSError):
        # pybids trips over descriptions such as {"GeneratedBy": {"Name": ...}} and those that
        # cannot be read; names are enough.
        if database:
            (database / _INDEX).unlink(missing_ok=True)
        paths = [p for p in root.rglob("*") if p.is_file()]
        return [p for p in paths if not _SKIPPED.search("/" + p.relative_to(root).as_posix())]
    paths = [Path(p) for p in layout.get(return_type="filename")]
    layout.session.close()
    layout.connection_manager.engine.dispose()
    return paths
