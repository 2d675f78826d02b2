"""One table per model from the ROI tables of all subjects."""

from __future__ import annotations

import csv
import json
import logging
import uuid
from collections import defaultdict
from pathlib import Path

from bids_gacelle.errors import InputError

_ABSENT = "n/a"
_NOT_ROWS = ("sub", "ses", "desc")
_LOG = logging.getLogger(__name__)


class NothingToMerge(InputError):
    """The output dataset has no ROI table."""


def merge_tables(out_dir: Path) -> list[Path]:
    """Join the ROI tables of all subjects into ``group_<model>.tsv`` at the root of the dataset.

    A row is a row of a ROI table, preceded by ``subject`` and ``session`` (with their ``sub-`` and
    ``ses-``: they stay text in every program and join with ``participants.tsv``) and by the other
    entities of the table's name (``acq``, ``space``, ``atlas``, ...), so that rows are unique.
    Values are copied as they are written, ``n/a`` included. Reads no images; the same tables
    always give the same bytes.

    Only tables that a manifest of the participant level lists are taken: one that the latest run
    of a subject did not write again is of an earlier run, with other maps. A manifest that cannot
    be read is left out with a warning in the log.

    Parameters
    ----------
    out_dir : Path
        Output dataset of the participant level.

    Returns
    -------
    list of Path
        The tables written, one per model.

    Raises
    ------
    NothingToMerge
        No manifest lists a table.
    InputError
        A table is malformed or not there, or the result cannot be written.
    """
    root = Path(out_dir)
    tables = defaultdict(list)
    listed, damaged = _listed(root)
    for path in listed:
        entities = _entities(path)
        tables[entities["desc"]].append((entities, *_read(path)))
    if not tables:
        left_out = f" (manifests that cannot be read: {', '.join(damaged)})" if damaged else ""
        raise NothingToMerge(
            f"No ROI tables (sub-*/**/*_scalarstats.tsv) in {root}{left_out}; run the participant "
            "level with an atlas first."
        )
    return [
        _write(root / f"group_{model}.tsv", *_merge(tables[model])) for model in sorted(tables)
    ]


def _listed(root: Path) -> tuple[list[Path], list[str]]:
    """Tables that the manifests list, and the manifests that cannot be read."""
    manifests = [
        *root.glob("sub-*/figures/*_manifest.json"),
        *root.glob("sub-*/ses-*/figures/*_manifest.json"),
    ]
    tables: set[str] = set()
    damaged: list[str] = []
    for manifest in sorted(manifests):
        try:
            tables.update(_tables_of(manifest))
        except (OSError, ValueError, RecursionError) as error:
            name = manifest.relative_to(root).as_posix()
            damaged.append(name)
            _LOG.warning(
                "Manifest %s cannot be read (%s): its tables are left out.",
                name,
                error,
            )
    return sorted((root / table for table in tables), key=lambda path: path.parts), damaged


def _tables_of(manifest: Path) -> list[str]:
    content = json.loads(manifest.read_text(encoding="utf-8"))
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, list) or not all(isinstance(table, str) for table in tables):
        raise ValueError('"tables" is no list of files')
    return tables


def _entities(path: Path) -> dict[str, str]:
    pairs = [pair.split("-", 1) for pair in path.stem.split("_")[:-1]]
    entities = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    if not {"sub", "desc"} <= set(entities):
        raise InputError(f"{path} does not say subject and model (sub-, desc-) in its name.")
    return entities


def _merge(
    tables: list[tuple[dict[str, str], list[str], list[dict[str, str]]]],
) -> tuple[list[str], list[dict[str, str]]]:
    # in order of appearance, which for entities is the order of file names
    entities = list(dict.fromkeys(key for names, _, _ in tables for key in names))
    columns = list(dict.fromkeys(column for _, header, _ in tables for column in header))
    extra = [key for key in entities if key not in _NOT_ROWS and key not in columns]
    merged = []
    for names, _, rows in tables:
        session = f"ses-{names['ses']}" if "ses" in names else _ABSENT
        place = {"subject": f"sub-{names['sub']}", "session": session}
        place |= {key: names.get(key, _ABSENT) for key in extra}
        merged += [{**place, **row} for row in rows]
    return ["subject", "session", *extra, *columns], merged


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read the ROI table {path}: {error}.") from error
    if not lines:
        raise InputError(f"The ROI table {path} is empty; run that subject again.")
    header, *rows = lines
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(
                f"The ROI table {path} has {len(row)} cells in line {number} where its header "
                f"has {len(header)}; run that subject again."
            )
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def _write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> Path:
    lines = ["\t".join(columns)]
    lines += ["\t".join(row.get(column, _ABSENT) for column in columns) for row in rows]
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
