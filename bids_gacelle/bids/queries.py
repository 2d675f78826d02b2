"""Which files are asked for, and how ``--bids-filter-file`` narrows that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bids_gacelle.bids.files import NIFTI, BidsFile
from bids_gacelle.bids.names import ENTITY_ORDER
from bids_gacelle.errors import InputError

#: Entities that must match, per query; None: absent, "*": present, a list: any of these.
#: An entity that is not named here may have any value or none.
QUERIES: dict[str, dict[str, Any]] = {
    "megre": {"suffix": "MEGRE", "datatype": "anat"},
    "vfa": {"suffix": "VFA", "datatype": "anat"},
    "mpm": {"suffix": "MPM", "datatype": "anat"},
    "mts": {"suffix": "MTS", "datatype": "anat"},
    "tb1": {"suffix": "TB1map", "datatype": ["fmap", "anat"]},
    "dwi": {
        "suffix": "dwi",
        "datatype": "dwi",
        "desc": [None, "preproc"],
        "space": [None, "ACPC", "T1w"],
    },
    "mask": {"suffix": "mask", "desc": "brain"},
    "dseg": {"suffix": "dseg"},
    "noise": {"datatype": "dwi", "desc": "noise"},
    "graddev": {"suffix": "graddev", "datatype": "dwi"},
    "voxelmap": {"suffix": "dwimap", "datatype": "dwi", "desc": None},
}

# Names as pybids (and filter files of fMRIPrep) spell them -> keys in file names.
_LONG = {
    "subject": "sub",
    "session": "ses",
    "acquisition": "acq",
    "reconstruction": "rec",
    "direction": "dir",
    "ceagent": "ce",
    "segmentation": "seg",
    "modality": "mod",
    "resolution": "res",
}
_ENTITIES = frozenset(ENTITY_ORDER)
_PROPERTIES = frozenset({"suffix", "datatype", "extension"})


def load_filter_file(path: Path) -> dict[str, Any]:
    """Read a filter file; `read_filters` checks what it says.

    Raises
    ------
    InputError
        The file cannot be read as JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Filter file {path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"Filter file {path} must hold one JSON object: query -> entities.")
    return content


def read_filters(filters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Narrow the queries by the content of a filter file.

    Parameters
    ----------
    filters : query name -> entity -> value, as in the JSON file. ``null`` means absent, ``"*"``
        any value, a list any of its members; ``suffix`` and ``datatype`` replace our own.

    Raises
    ------
    InputError
        A query or entity that we do not know, or a value that is no label.
    """
    queries = {name: dict(query) for name, query in QUERIES.items()}
    for name, wanted in filters.items():
        if name not in queries:
            raise InputError(
                f"Filter file: unknown query '{name}'; valid are {', '.join(QUERIES)}."
            )
        if not isinstance(wanted, Mapping):
            raise InputError(f"Filter file: '{name}' must be an object of entities and values.")
        for entity, value in wanted.items():
            key = _LONG.get(entity, entity)
            if key not in _ENTITIES | _PROPERTIES:
                valid = ", ".join(sorted(_ENTITIES | _PROPERTIES | set(_LONG)))
                raise InputError(
                    f"Filter file: unknown entity '{entity}' in query '{name}'; valid are {valid}."
                )
            queries[name][key] = _labels(value, f"{name}.{entity}")
    return queries


def matches(query: Mapping[str, Any], file: BidsFile) -> bool:
    """Whether a file is an image that the query asks for."""
    if file.extension not in NIFTI:
        return False
    return all(_matches(wanted, _value(file, key)) for key, wanted in query.items())


def _value(file: BidsFile, key: str) -> str | None:
    return getattr(file, key) if key in _PROPERTIES else file.entities.get(key)


def _matches(wanted: Any, value: str | None) -> bool:
    if isinstance(wanted, list):
        return any(_matches(w, value) for w in wanted)
    if wanted is None or value is None:
        return wanted is None and value is None
    # echo 1 in a filter also means echo-01 in a name
    return wanted in ("*", value) or (
        wanted.isdigit() and value.isdigit() and int(wanted) == int(value)
    )


def _labels(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_labels(v, where) for v in value]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(
        f"Filter file: {where} is {value!r}; write a label, a list of labels, null (absent) "
        'or "*" (any value).'
    )
