"""Magnitude, phase, real and imaginary parts: which images make complex ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bids_gacelle.bids.files import BidsFile
from bids_gacelle.bids.metadata import MetadataError, Sidecars, as_number
from bids_gacelle.bids.series import SecondPart

_Images = dict[frozenset[tuple[str, str]], BidsFile]

_UNITS = {
    "rad": ("rad", "radian", "radians"),
    "deg": ("deg", "degree", "degrees"),
    "arbitrary": ("arbitrary", "arbitrary units", "arb", "a.u.", "au"),
}
_SAME_IN_BOTH = ("EchoTime", "FlipAngle", "RepetitionTimeExcitation")


@dataclass(frozen=True)
class Pair:
    """A magnitude image with its phase, or a real part with its imaginary one.

    ``other`` is None where there are magnitudes only.
    """

    image: BidsFile
    other: BidsFile | None = None


@dataclass(frozen=True)
class Parts:
    """What of a series can be used, and what to say of the rest."""

    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def magnitudes(files: Iterable[BidsFile]) -> list[BidsFile]:
    """``part-mag`` images, or those without ``part`` where there is no ``part-mag``."""
    return sorted(_of_part(files, "mag").values(), key=lambda f: f.path.name)


def pair_parts(files: Sequence[BidsFile]) -> Parts:
    """Pair the images of a series one by one.

    Magnitude with phase where every magnitude has one, else real with imaginary parts, else
    magnitudes alone.

    Raises
    ------
    MetadataError
        Neither magnitudes nor pairs of real and imaginary parts: the file that is missing is
        named.
    """
    magnitude, phase = _of_part(files, "mag"), _of_part(files, "phase")
    real, imag = _of_part(files, "real"), _of_part(files, "imag")
    if magnitude and phase.keys() == magnitude.keys():
        return Parts(_paired(magnitude, phase), notes=_unused(files, ("mag", "phase")))
    _require_magnitude(magnitude, phase, bool(real or imag))
    if real and real.keys() == imag.keys() and magnitude.keys() <= real.keys():
        return Parts(_paired(real, imag), notes=_unused(files, ("real", "imag")))
    if not magnitude:
        raise _incomplete(real, imag)
    if not phase:
        return Parts(_alone(magnitude), notes=_unused(files, ("mag",)))
    missing = [f"`{_expected(magnitude[k], 'phase')}`" for k in magnitude if k not in phase]
    are = "are" if len(missing) > 1 else "is"
    warning = (
        f"the magnitudes alone are used: of the phase images {', '.join(missing)} {are} missing"
    )
    return Parts(_alone(magnitude), (warning,), _unused(files, ("mag", "phase")))


def second_part(
    pairs: Sequence[Pair], images: Sequence[Sidecars], others: Sequence[Sidecars]
) -> tuple[SecondPart | None, tuple[str, ...], tuple[str, ...]]:
    """Phases or imaginary parts of a series, with warnings and notes.

    Parameters
    ----------
    pairs : in the order of the series.
    images, others : sidecars of both parts of each pair, in the same order.

    Returns
    -------
    None where there are magnitudes only, or phases of an unknown unit.

    Raises
    ------
    MetadataError
        The sidecars of a pair contradict each other.
    """
    files = [p.other for p in pairs if p.other is not None]
    if not files:
        return None, (), ()
    for first, second in zip(images, others, strict=True):
        _require_agreement(first, second)
    paths = tuple(str(f.path) for f in files)
    if files[0].entities["part"] == "imag":
        return SecondPart("imag", paths), (), ()
    try:
        units = _phase_units(others)
    except MetadataError as problem:
        return None, (f"{str(problem).rstrip('.')}. The magnitudes alone are used",), ()
    notes = (
        f'no "Units" in a sidecar of `{files[0].label}`: whether its values are radians, degrees '
        'or integers of the scanner is told by their range. Add "Units": "rad" or "arbitrary"',
    )
    return SecondPart("phase", paths, units), (), () if units else notes


def _of_part(files: Iterable[BidsFile], part: str) -> _Images:
    """Images of one part, by what tells them apart; no ``part`` means magnitude."""
    chosen: _Images = {}
    for file in sorted(files, key=lambda f: ("part" not in f.entities, f.path.name)):
        if file.entities.get("part", "mag") == part:
            key = frozenset((k, v) for k, v in file.entities.items() if k != "part")
            chosen.setdefault(key, file)
    return chosen


def _paired(images: _Images, others: _Images) -> tuple[Pair, ...]:
    return tuple(Pair(image, others[key]) for key, image in images.items())


def _alone(images: _Images) -> tuple[Pair, ...]:
    return tuple(Pair(image) for image in images.values())


def _require_magnitude(magnitude: _Images, phase: _Images, others: bool) -> None:
    """Refuse phases without magnitude."""
    alone = [file for key, file in phase.items() if key not in magnitude]
    if not alone or (not magnitude and others):
        return
    if not magnitude:
        raise MetadataError(
            f"`{alone[0].label}`: only part-phase images are there; magnitude images are needed.",
            alone[0].path,
        )
    raise MetadataError(
        f"`{alone[0].label}` has no magnitude: `{_expected(alone[0], 'mag')}` is missing. Add it, "
        "or leave the echo out with a filter file.",
        alone[0].path,
    )


def _incomplete(real: _Images, imag: _Images) -> MetadataError:
    """Real parts without imaginary ones, or the reverse."""
    found = [(real, imag, "imag"), (imag, real, "real")]
    file, part = next(
        (file, part) for have, lack, part in found for key, file in have.items() if key not in lack
    )
    return MetadataError(
        f"`{file.label}` needs a part-{part} image beside it, `{_expected(file, part)}`, which is "
        "missing; magnitude images would do as well.",
        file.path,
    )


def _unused(files: Iterable[BidsFile], used: Sequence[str]) -> tuple[str, ...]:
    parts = {f.entities["part"] for f in files if "part" in f.entities} - set(used)
    names = ", ".join(f"part-{p}" for p in sorted(parts))
    return (f"{names} images are not used",) if names else ()


def _expected(file: BidsFile, part: str) -> str:
    """Name that the other part of an image would have."""
    name = file.path.name
    if "part" in file.entities:
        return name.replace(f"_part-{file.entities['part']}", f"_part-{part}")
    stem, _, rest = name.rpartition("_")
    return f"{stem}_part-{part}_{rest}"


def _require_agreement(image: Sidecars, other: Sidecars) -> None:
    for field in _SAME_IN_BOTH:
        first, second = image.find(field), other.find(field)
        if first and second and not same_value(first.value, second.value):
            raise MetadataError(
                f"`{field}` is {first.value!r} in `{first.file.label}`, but {second.value!r} in "
                f"`{second.file.label}`: two parts of one image have the same. Correct the one "
                "that is wrong, or pass --ignore phase.",
                second.file.path,
                field,
            )


def same_value(first: object, second: object) -> bool:
    """Whether two values of a sidecar field are the same, but for the last digits."""
    a, b = as_number(first), as_number(second)
    if a is None or b is None:
        return first == second
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _phase_units(sidecars: Sequence[Sidecars]) -> Literal["", "rad", "deg", "arbitrary"]:
    """Unit of phases, "" where no sidecar says.

    Raises
    ------
    MetadataError
        A unit that is none of a phase, or not the same for all images.
    """
    found = [f for s in sidecars if (f := s.find("Units"))]
    units = {}
    for each in found:
        word = str(each.value).strip().lower()
        unit = next((u for u, words in _UNITS.items() if word in words), None)
        if unit is None:
            raise MetadataError(
                f"`Units` is {each.value!r} in `{each.file.label}`, but those of a phase are "
                '"rad", "deg" or "arbitrary" (integers of the scanner); correct it.',
                each.file.path,
                "Units",
            )
        units[unit] = each
    if len(units) > 1:
        said = " and ".join(f'"{f.value}" in `{f.file.label}`' for f in units.values())
        raise MetadataError(f"the phase images differ in `Units`: {said}; correct them.")
    return next(iter(units), "")  # type: ignore[arg-type]
