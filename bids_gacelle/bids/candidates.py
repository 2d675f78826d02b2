"""Images of one session that belong together, as far as they could be put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from bids_gacelle.bids.files import BidsFile
from bids_gacelle.bids.metadata import MetadataError
from bids_gacelle.bids.names import reference_path
from bids_gacelle.bids.series import Series, Sourced

# Entities that tell the images of one series apart, or that do not survive the fit.
_NOT_KEPT = frozenset({"sub", "ses", "echo", "flip", "inv", "mt", "part", "desc"})


@dataclass(frozen=True)
class Candidate:
    """A series as far as it could be put together.

    ``problem`` stops every model, ``timing_problem`` those that need diffusion times, and
    ``lacking`` those that need a certain field of the series: it says, by the name of the field,
    why its value is not known. ``measurements`` are the distinct echo times, flip angles or
    shells; ``warnings`` and ``notes`` are sentences of the classes WARNING and INFO.
    ``overruled`` are the diffusion times in files that an option replaces, by field.
    """

    series: Series
    files: tuple[BidsFile, ...]
    measurements: tuple[str, ...] = ()
    problem: MetadataError | None = None
    timing_problem: MetadataError | None = None
    lacking: Mapping[str, MetadataError] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    overruled: Mapping[str, Sourced] = field(default_factory=dict)


def kept_entities(file: BidsFile) -> dict[str, str]:
    """Entities that the names of maps keep."""
    return {k: v for k, v in file.entities.items() if k not in _NOT_KEPT}


def groups(images: Iterable[BidsFile], ignoring: str = "") -> list[list[BidsFile]]:
    """Images that agree in all entities that maps keep, but for one, in the order of names."""
    found = defaultdict(list)
    for image in images:
        key = tuple((k, v) for k, v in kept_entities(image).items() if k != ignoring)
        found[key].append(image)
    return [found[key] for key in sorted(found)]


def nameable(candidate: Candidate) -> Candidate:
    """Refuse series with entities that the names of maps cannot keep."""
    try:
        reference_path(candidate.series)
    except ValueError as error:
        file = candidate.files[0]
        problem = MetadataError(
            f"`{file.label}` cannot give its name to maps ({error}); rename its files.", file.path
        )
        return replace(candidate, problem=problem)
    return candidate
