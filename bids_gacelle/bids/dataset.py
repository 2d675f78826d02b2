"""The output folder as a BIDS derivative dataset: the files at its root, and URIs into others.

Every subject's job makes sure of these files, many of them at the same time; what one wrote, the
others keep.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from bids_gacelle.bids.names import STATISTICS, model_label
from bids_gacelle.bids.output import write_json, write_text, write_tsv
from bids_gacelle.errors import InputError

NAME = "bids_gacelle"
BIDS_VERSION = "1.11.1"
IGNORED = (
    "*_dwimap.*",
    "*_anatmap.*",
    "*_scalarstats.*",
    "*.h5",
    "*.shape.gii",
    "*.dscalar.nii",
    "*_xfm.*",
    "*.scheme",
    "*.html",
    "**/figures",
    "group_*",
)
"""Outputs that BIDS has no name for yet; the lines of ``.bidsignore``."""


def check_output_dir(bids_dir: Path, out_dir: Path) -> None:
    """See that ``out_dir`` may become, or already is, our dataset. Makes nothing.

    Raises
    ------
    InputError
        It is the input dataset, lies inside it (other than in a folder under ``derivatives/``),
        or holds somebody else's dataset.
    """
    source, target = Path(bids_dir).resolve(), Path(out_dir).resolve()
    advice = f"use for example {source / 'derivatives' / NAME}"
    if target == source:
        raise InputError(f"The output folder {out_dir} is the input dataset itself; {advice}.")
    if target.is_relative_to(source):
        parts = target.relative_to(source).parts
        if parts[0] != "derivatives" or len(parts) < 2:
            raise InputError(f"The output folder {out_dir} is inside the input dataset; {advice}.")
    _own_description(Path(out_dir))


def init_dataset(
    out_dir: Path,
    datasets: Mapping[str, Path | str],
    version: str,
    dataset_links: Mapping[str, str] | None = None,
    *,
    models: Mapping[str, str] | None = None,
) -> None:
    """Make or complete the files at the root of the output dataset.

    Links, sources and models that an earlier run put there stay; README, CHANGES and CITATION.cff
    are left as they are once they exist. Safe when many jobs do it at once.

    Parameters
    ----------
    datasets : mapping
        Name of each dataset used in BIDS URIs (``raw``, ...) -> its root folder.
    version : str
        Of this program.
    dataset_links : mapping, optional
        Name -> URI (``--dataset-link``), for where the folders mean nothing to others.
    models : mapping, optional
        Name -> title of each model, for ``descriptions.tsv``.

    Raises
    ------
    InputError
        The folder cannot be written, or holds somebody else's dataset.
    """
    root = Path(out_dir)
    # before the lock, which already makes a file
    _own_description(root)
    with _only_one(root):
        old = _own_description(root)
        description = _description(root, datasets, version, dataset_links or {}, old)
        if description != old:
            write_json(root / "dataset_description.json", description)
        _complete_lines(root / ".bidsignore", IGNORED)
        _complete_descriptions(root / "descriptions.tsv", models or {})
        _complete_changes(root / "CHANGES", version)
        for name, text in (
            ("README.md", _README),
            ("CITATION.cff", _CITATION.format(version=version)),
        ):
            if not (root / name).exists():
                write_text(root / name, text)


def bids_uri(path: Path | str, datasets: Mapping[str, Path | str]) -> str:
    """BIDS URI of a file (``bids:raw:sub-01/anat/...``), or its file URI outside all datasets.

    Parameters
    ----------
    datasets : mapping
        Name -> root folder; the name "" stands for the output dataset itself. The innermost
        folder that holds the file wins.
    """
    path = Path(path).absolute()
    # the folder is resolved and not the file: git-annex makes every file a link to its store
    places = (path, path.parent.resolve() / path.name)
    found = [
        (len(base.parts), name, place.relative_to(base))
        for name, root in datasets.items()
        for base in (Path(root).absolute(), Path(root).resolve())
        for place in places
        if place.is_relative_to(base)
    ]
    if not found:
        return places[1].as_uri()
    _, name, relative = max(found, key=lambda item: item[0])
    return f"bids:{name}:{quote(relative.as_posix(), safe='/+')}"


def _own_description(root: Path) -> dict[str, Any]:
    """Read our description in ``root``, {} if there is none; refuse somebody else's."""
    path = root / "dataset_description.json"
    advice = "choose another output folder"
    if not path.exists():
        if root.is_dir() and any(root.glob("sub-*/")):
            raise InputError(
                f"The output folder {root} holds sub-* folders but no dataset_description.json, "
                f"so it may be somebody else's dataset; {advice}."
            )
        return {}
    description = _read_description(root)
    if description is None:
        raise InputError(f"{path} cannot be read as JSON; repair it or {advice}.")
    kind = description.get("DatasetType", "raw")
    if kind != "derivative":
        raise InputError(f"{path} says DatasetType '{kind}': not our output; {advice}.")
    makers = [m.get("Name") for m in description.get("GeneratedBy", []) if isinstance(m, dict)]
    if NAME not in makers:
        names = ", ".join(map(str, makers)) or "nobody"
        raise InputError(f"{path} says GeneratedBy {names}, not {NAME}; {advice}.")
    return description


def _read_description(root: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((root / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _description(
    root: Path,
    datasets: Mapping[str, Path | str],
    version: str,
    dataset_links: Mapping[str, str],
    old: dict[str, Any],
) -> dict[str, Any]:
    links = dict(old.get("DatasetLinks", {}))
    sources = list(old.get("SourceDatasets", []))
    title = ""
    for name, folder in datasets.items():
        about = _read_description(Path(folder)) or {}
        title = title or str(about.get("Name", "")).strip()
        doi = str(about.get("DatasetDOI", ""))
        links[name] = dataset_links.get(name) or _link(root, Path(folder), doi)
        source = {"URL": links[name]} if urlsplit(links[name]).scheme else {}
        source |= {"DOI": doi} if doi else {}
        if source and source not in sources:
            sources.append(source)
    makers = [maker for maker in old.get("GeneratedBy", []) if maker.get("Name") != NAME]
    new = {
        "Name": f"{NAME}: quantitative maps" + (f" of {title}" if title else ""),
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [_maker(version), *makers],
        "SourceDatasets": sources,
        "DatasetLinks": {**links, **{k: v for k, v in dataset_links.items() if k in links}},
    }
    return {**old, **{key: value for key, value in new.items() if value}}


def _link(root: Path, dataset: Path, doi: str) -> str:
    """Where another dataset is, in the form that stays true longest.

    Relative while the two share a folder; else its DOI, which also holds for people who cannot see
    this disk or this container; else the folder itself.
    """
    here, there = root.resolve(), dataset.resolve()
    if any(len(parent.parts) > 1 and there.is_relative_to(parent) for parent in here.parents):
        return Path(os.path.relpath(there, here)).as_posix()
    if doi:
        return doi if urlsplit(doi).scheme else f"doi:{doi}"
    return there.as_uri()


def _maker(version: str) -> dict[str, Any]:
    maker: dict[str, Any] = {"Name": NAME, "Version": version}
    with suppress(metadata.PackageNotFoundError):
        urls = metadata.metadata(NAME).get_all("Project-URL") or []
        pages = dict(url.split(", ", 1) for url in urls)
        if code := pages.get("Repository"):
            maker["CodeURL"] = code
    if kind := os.environ.get("BIDS_GACELLE_CONTAINER"):
        # an image made for Docker says so in its environment also when Apptainer runs it
        container = {"Type": "apptainer" if "APPTAINER_CONTAINER" in os.environ else kind}
        for key in ("Tag", "URI"):
            if value := os.environ.get(f"BIDS_GACELLE_CONTAINER_{key.upper()}"):
                container[key] = value
        maker["Container"] = container
    return maker


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Let one process at a time change the root files; also the test that we may write here."""
    lock = root / "logs" / ".lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as error:
        raise InputError(
            f"Cannot write in the output folder {root}: {error.strerror}; choose a folder that "
            "you may write to."
        ) from error
    with stream:
        # some network file systems have no locks; there, two first jobs may race, not half-write
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _complete_lines(path: Path, lines: tuple[str, ...]) -> None:
    old = path.read_text().splitlines() if path.exists() else []
    new = [*old, *(line for line in lines if line not in old)]
    if new != old:
        write_text(path, "\n".join(new) + "\n")


def _complete_descriptions(path: Path, models: Mapping[str, str]) -> None:
    """Say what each ``desc`` label means (BIDS 1.11.1, descriptions.tsv)."""
    rows = {f"desc-{statistic}": meaning for statistic, meaning in STATISTICS.items()}
    rows |= {f"desc-{kind}reference": _REFERENCES[kind] for kind in _REFERENCES}
    for name, title in models.items():
        label = model_label(name)
        rows[f"desc-{label}"] = title
        rows[f"desc-{label}fitflag"] = f"{title}: what limits the fit of each voxel, as bits"
        for statistic, meaning in STATISTICS.items():
            rows[f"desc-{label}{statistic}"] = f"{title}: {meaning[0].lower()}{meaning[1:]}"
    if path.exists():
        lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        old = {line[0]: line[1] for line in lines if len(line) == 2}
        if rows.keys() <= old.keys():
            return
        rows = rows | old
    table = [{"desc_id": key, "description": rows[key]} for key in sorted(rows)]
    write_tsv(path, table, ("desc_id", "description"))


def _complete_changes(path: Path, version: str) -> None:
    old = path.read_text() if path.exists() else ""
    if any(line.split()[:1] == [version] for line in old.splitlines() if line[:1].strip()):
        return
    entry = f"{version} {date.today().isoformat()}\n  - Maps by {NAME} {version}\n"
    write_text(path, entry + ("\n" + old if old else ""))


_REFERENCES = {
    "megre": "Multi-echo gradient echo image behind the figures of the report",
    "vfa": "Variable flip angle image behind the figures of the report",
    "dwi": "Mean b=0 image behind the figures of the report",
}

_CITATION = """\
cff-version: 1.2.0
type: dataset
title: "Quantitative MRI maps by bids_gacelle"
message: >-
  If you use these maps, cite the papers of the models, which the sidecar of each map names in
  EstimationReference, and the software and the paper below.
authors:
  - name: "The bids_gacelle developers"
references:
  - type: software
    title: bids_gacelle
    version: "{version}"
    authors:
      - name: "The bids_gacelle developers"
  - type: article
    title: >-
      GACELLE: GPU-accelerated tools for model parameter estimation and image reconstruction
    year: 2025
    authors:
      - family-names: Chan
        given-names: Kwok-Shing
      - name: "and co-authors"
"""

_README = """\
# Quantitative MRI maps

Made by bids_gacelle from the datasets that `dataset_description.json` lists under `DatasetLinks`.

- `sub-<label>.html` is the report of a subject: look there first.
- `sub-<label>[/ses-<label>]/{anat,dwi}/` holds the maps. `*_desc-std_*` and `*std_*` are standard
  deviations; a file named `model-<m>_param-<p>` is parameter `<p>` of model `<m>`.
- `*_param-nrmse_*` is the root mean square residual over the root mean square signal,
  `*_param-chi2_*` the reduced chi-square where the noise level is known: about 1 where model and
  noise level describe the data.
- `*fitflag_dseg` says what limits the fit of each voxel: a sum of 0 ok, 1 outside the mask,
  2 a parameter at a bound, 4 unusable input, 8 not converged, 16 several minima of similar depth,
  32 excluded by a plausibility rule; its `.tsv` spells out every sum.
- `*_scalarstats.tsv` are the ROI tables; `group_<model>.tsv` joins those of all subjects.
- `logs/<run>/` holds the settings, the log and `summary.json` of each run.

A voxel without an estimate (outside the mask, or unusable) is 0 in the maps; the flag map tells
it from a true 0. Standard deviation maps are NaN there, and where the parameter is at a bound.

Files that BIDS has no name for yet are listed in `.bidsignore`. The paths in `Sources` are BIDS
URIs; where `DatasetLinks` does not lead to the data any more, run again with
`--dataset-link NAME=URI`.
"""
