"""Sidecar values with unit and source; what cannot be right is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bids_gacelle.bids.files import BidsFile, Dataset
from bids_gacelle.bids.series import Sourced
from bids_gacelle.errors import InputError


class MetadataError(InputError):
    """Why an image cannot be used; ``file`` and ``field`` are those the sentence is about."""

    def __init__(self, message: str, file: str | Path = "", field: str = "") -> None:
        super().__init__(message)
        self.file = str(file)
        self.field = field


@dataclass(frozen=True)
class Quantity:
    """Unit that BIDS asks for, and the range that real acquisitions lie in."""

    unit: str
    low: float
    high: float
    example: str


QUANTITIES = {
    "EchoTime": Quantity("s", 1e-5, 0.5, "0.004"),
    "RepetitionTimeExcitation": Quantity("s", 5e-4, 5.0, "0.015"),
    "InversionTime": Quantity("s", 1e-3, 30.0, "0.9"),
    # flip angles given in radians fall below 0.35 (20 degrees)
    "FlipAngle": Quantity("degrees", 0.35, 360.0, "12"),
    "MagneticFieldStrength": Quantity("T", 0.02, 20.0, "3"),
    "ImagingFrequency": Quantity("MHz", 0.85, 860.0, "123.2"),
    "SpoilingRFPhaseIncrement": Quantity("degrees", 4.0, 360.0, "50"),
}
TIMES_IN_MS = (
    "EchoTime",
    "RepetitionTimeExcitation",
    "InversionTime",
    "SmallDelta",
    "BigDelta",
    "LargeDelta",
)

_COPIED_NUMBERS = (
    "MagneticFieldStrength",
    "RepetitionTime",
    "ParallelReductionFactorInPlane",
    "MultibandAccelerationFactor",
    "PartialFourier",
)
_COPIED_TEXTS = (
    "Manufacturer",
    "ManufacturersModelName",
    "SoftwareVersions",
    "ReceiveCoilName",
    "MRAcquisitionType",
    "ScanningSequence",
    "SequenceName",
    "PulseSequenceType",
    "PhaseEncodingDirection",
)


@dataclass(frozen=True)
class Found:
    """A value of a sidecar field, as it stands there."""

    value: Any
    file: BidsFile


class Sidecars:
    """The JSON files that apply to an image, nearest first; a nearer value hides a farther one."""

    def __init__(self, dataset: Dataset, image: BidsFile) -> None:
        self.image = image
        self.files = dataset.inherited(image, ".json")

    def find(self, field: str) -> Found | None:
        """Look a field up, nearest file first; None when no file has it."""
        for file in self.files:
            content = read_json(file.path, file.label)
            if field in content:
                return Found(content[field], file)
        return None

    def require(self, field: str) -> Found:
        """Find a field that must be there."""
        found = self.find(field)
        if found is None:
            example = QUANTITIES[field].example
            raise MetadataError(
                f"`{field}` missing for `{self.image.label}`. Looked in: {self.looked_in()}. "
                f'Add e.g. "{field}": {example} ({QUANTITIES[field].unit}) to '
                f"{self.image.sibling('.json').name}.",
                self.image.path,
                field,
            )
        return found

    def looked_in(self) -> str:
        """Name the files that were read, and the image's own sidecar where it is not there."""
        own = self.image.sibling(".json")
        names = [f"{f.label} ({level(f)})" for f in self.files]
        if own not in (f.path for f in self.files):
            names.insert(0, f"{own.name} (no such file)")
        return ", ".join(names)


def level(file: BidsFile) -> str:
    """Where in the dataset a file stands: root, subject or session level, or beside the image."""
    depth = len(file.path.relative_to(file.root).parts)
    levels = {1: "root", 2: "subject level", 3: "beside the image"}
    if depth == 3 and file.path.parent.name.startswith("ses-"):
        return "session level"
    return levels.get(depth, "beside the image")


@lru_cache(maxsize=4096)
def _read_json(path: Path, modified: float) -> dict[str, Any] | str:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return content if isinstance(content, dict) else "not a JSON object"


def read_json(path: Path, label: str) -> dict[str, Any]:
    """Content of a sidecar; a file that is none is refused with its name."""
    try:
        content = _read_json(path, path.stat().st_mtime)
    except OSError as error:
        content = str(error)
    if isinstance(content, str):
        raise MetadataError(f"`{label}` cannot be read as JSON ({content}); correct it.", path)
    return content


def scalar(found: Found, field: str, assume_ms: Sequence[str] = ()) -> float:
    """One number in the unit of BIDS.

    Raises
    ------
    MetadataError
        No number (a string, a list, true), or a value outside the plausible range: the message
        names file, field, value and the probable unit.
    """
    value = found.value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise MetadataError(
            f"`{field}` is a list of {len(value)} in `{found.file.label}`; one number is needed "
            "(one file per echo or flip angle).",
            found.file.path,
            field,
        )
    return _plausible(value, found, field, assume_ms)


def per_volume(found: Found, field: str, n: int, assume_ms: Sequence[str] = ()) -> list[float]:
    """One number for all volumes, or one for each of ``n``, in the unit of BIDS."""
    values = as_list(found, field, n)
    return [_plausible(v, found, field, assume_ms) for v in values]


def as_list(found: Found, field: str, n: int) -> list[Any]:
    """Give the value as a list of 1 or ``n`` entries."""
    values = found.value if isinstance(found.value, list) else [found.value]
    if len(values) not in (1, n):
        raise MetadataError(
            f"`{field}` has {len(values)} values in `{found.file.label}`, but the image has "
            f"{n} volumes; give one number, or one per volume.",
            found.file.path,
            field,
        )
    return values


def number(value: Any) -> float | None:
    """Give a finite number that is no string or boolean, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON knows integers of any size
        return None
    return result if math.isfinite(result) else None


def _plausible(value: Any, found: Found, field: str, assume_ms: Sequence[str]) -> float:
    quantity = QUANTITIES[field]
    result, text = number(value), json.dumps(value)
    if field in assume_ms:
        result = as_number(value)
        result = None if result is None else result / 1000
        text += " (read as ms)"
    if result is not None and quantity.low <= result <= quantity.high:
        return result
    what = f"`{field}` is {text} in `{found.file.label}`"
    advice = _advice(value, field, quantity, read_as_ms=field in assume_ms)
    raise MetadataError(f"{what}: {advice}", found.file.path, field)


def as_number(value: Any) -> float | None:
    """Give a finite number, also when it is written as a string, else None."""
    try:
        return number(float(value)) if isinstance(value, str) else number(value)
    except ValueError:
        return None


def _advice(value: Any, field: str, quantity: Quantity, read_as_ms: bool) -> str:
    candidate, unit = as_number(value), quantity.unit
    kind = "a string, not a number; " if isinstance(value, str) else ""
    if candidate is None:
        return f'{kind}a number in {unit} is needed, e.g. "{field}": {quantity.example}.'
    if read_as_ms:
        return f"that is outside {quantity.low:g} to {quantity.high:g} {unit}; correct the value."
    if quantity.low <= candidate <= quantity.high:
        return f"{kind}write {candidate:g} (in {unit}) without quotes."
    for other, scale in _other_units(unit, candidate).items():
        if quantity.low <= candidate * scale <= quantity.high:
            option = f", or pass --assume-ms {field}" if other == "ms" else ""
            return (
                f"{kind}not plausible in {unit} (BIDS), probably {other}; "
                f"write {candidate * scale:.6g}{option}."
            )
    return f"{kind}not plausible in {unit} (BIDS), nor in any other usual unit; correct it."


def _other_units(unit: str, value: float) -> dict[str, float]:
    """Units that a value may have been meant in, each as a number of the right one."""
    if unit == "T":  # what is 15000 can be gauss only, what is 3000 hardly so
        return {"gauss": 1e-4} if value >= 5000 else {"mT": 1e-3}
    return {
        "s": {"ms": 1e-3, "us": 1e-6},
        "degrees": {"radians": 180 / math.pi},
        "MHz": {"Hz": 1e-6, "kHz": 1e-3},
    }[unit]


def sourced(field: str, sidecars: Sequence[Sidecars], assume_ms: Sequence[str] = ()) -> Sourced:
    """One value per image, each with its source."""
    found = [s.require(field) for s in sidecars]
    values = tuple(scalar(f, field, assume_ms) for f in found)
    return Sourced(values, QUANTITIES[field].unit, tuple(f.file.label for f in found))


def constant_fields(sidecars: Sequence[Sidecars]) -> dict[str, Any]:
    """Acquisition fields that are the same for all images, for the sidecars we write."""
    result: dict[str, Any] = {}
    for field in _COPIED_NUMBERS + _COPIED_TEXTS:
        values = [f.value if (f := s.find(field)) else None for s in sidecars]
        right_type = isinstance(values[0], str) if field in _COPIED_TEXTS else number(values[0])
        if right_type and all(v == values[0] for v in values):
            result[field] = values[0]
    return result
