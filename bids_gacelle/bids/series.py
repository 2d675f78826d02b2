"""What discovery finds, as plain data: frozen, and in and out of JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["megre", "vfa", "dwi"]
Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One message about the input: a sentence a user can act on, and what it is about.

    ``series`` is the label of the series, "" where it is not about one.
    """

    severity: Severity
    message: str
    subject: str = ""
    session: str = ""
    model: str = ""
    file: str = ""
    field: str = ""
    series: str = ""


@dataclass(frozen=True)
class Sourced:
    """Metadata values in one unit, each with the place it was read from.

    ``values`` has one entry, or one per image (MEGRE, VFA) or per volume (dwi); ``sources`` has
    one entry, or as many as ``values``.
    """

    values: tuple[float, ...]
    unit: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class VoxelMap:
    """An image that says something about each voxel of a series, and who named it."""

    image: str
    origin: Literal["option", "derivatives"] = "derivatives"


@dataclass(frozen=True)
class DwiRun:
    """One dwi image with its gradients, timing and noise.

    ``small_delta`` and ``big_delta`` are in ms, ``echo_time`` in s; None where nothing says.
    ``noise_map`` is the standard deviation of the noise of one volume, in the unit of the image.
    ``bval`` and ``bvec`` are the same file where it is a scheme file.
    """

    image: str
    bval: str
    bvec: str
    small_delta: Sourced | None = None
    big_delta: Sourced | None = None
    echo_time: Sourced | None = None
    noise_map: VoxelMap | None = None


@dataclass(frozen=True)
class B1Map:
    """A transmit-field map; stored value times ``factor`` is the relative B1 (1 = nominal)."""

    image: str
    factor: float
    source: str


@dataclass(frozen=True)
class SecondPart:
    """The other half of complex images, one for each image of a series, in the same order.

    Beside magnitudes stands their ``phase``, beside real parts the ``imag`` parts. ``units`` of a
    phase are "rad", "deg" or "arbitrary" (integers of the scanner, whose scale the values tell),
    and "" where no sidecar says; those of imaginary parts are "".
    """

    part: Literal["phase", "imag"]
    images: tuple[str, ...]
    units: str = ""


@dataclass(frozen=True)
class Mask:
    """Where the mask comes from: ``option``, ``derivatives``, or ``quick`` (made by us, no image).

    Several images (one per combined dwi run) are intersected.
    """

    origin: Literal["option", "derivatives", "quick"]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Atlas:
    """A segmentation on the grid of the maps, and the table that names its labels ("" if none)."""

    name: str
    image: str
    table: str = ""
    origin: Literal["option", "derivatives"] = "derivatives"


@dataclass(frozen=True)
class Series:
    """Images that belong to one fit, in order.

    MEGRE by echo time; VFA, also with several echoes, by flip angle, then repetition time, then
    echo time.
    """

    kind: Kind
    subject: str
    session: str
    entities: dict[str, str]
    """Entities that output names keep, such as ``acq``, ``run``, ``space``."""
    images: tuple[str, ...]
    """Magnitudes, or real parts where ``second`` holds the imaginary ones."""
    second: SecondPart | None = None
    """What makes the images complex; None where there are magnitudes only."""
    echo_time: Sourced | None = None
    """s, one per image."""
    flip_angle: Sourced | None = None
    """degrees, one per image."""
    repetition_time: Sourced | None = None
    """RepetitionTimeExcitation in s, one per image."""
    dwi_runs: tuple[DwiRun, ...] = ()
    field_strength: Sourced | None = None
    """T, one value for all images; None where nothing says."""
    spoiling_increment: Sourced | None = None
    """Increment of the RF spoiling phase in degrees, one value; None where nothing says."""
    b1_map: B1Map | None = None
    voxel_maps: dict[str, VoxelMap] = field(default_factory=dict)
    """Further voxel inputs by name (``ff``, ``theta``, ``fo``, ``iwf``, those of users)."""
    gradient_deviation: VoxelMap | None = None
    """Nine volumes per voxel: how the diffusion gradients differ from their nominal values."""
    mask: Mask = Mask("quick")
    atlases: tuple[Atlas, ...] = ()
    preprocessed: bool = False
    spatial_reference: str = ""
    """URI of the image that defines a non-standard ``space`` ("" when unknown or native)."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Constant acquisition fields copied to sidecars (MagneticFieldStrength, ...)."""

    @property
    def has_diffusion_times(self) -> bool:
        """Whether pulse duration and separation of every dwi run are known."""
        return bool(self.dwi_runs) and all(r.small_delta and r.big_delta for r in self.dwi_runs)

    @property
    def label(self) -> str:
        """Short name for tables and log lines: ``megre``, ``dwi acq-b2k run-1``."""
        keep = " ".join(f"{k}-{v}" for k, v in self.entities.items())
        return f"{self.kind} {keep}".strip()


@dataclass(frozen=True)
class Job:
    """One model on one series, or the reason why not (``reason`` is "" when eligible).

    ``cause`` says what kind of reason: the images are ``absent``, they are there but ``broken``
    (unreadable, a needed field missing), or sound but ``unsuited`` to this model.
    """

    series: Series
    model: str
    reason: str = ""
    cause: Literal["", "absent", "broken", "unsuited"] = ""
    needed_inputs: tuple[str, ...] = ()
    """Maps of the series that the model cannot do without, as in ``ModelNeeds``."""

    @property
    def eligible(self) -> bool:
        """Whether the model can be fitted."""
        return not self.reason


@dataclass(frozen=True)
class Plan:
    """Everything discovery decided, before any image is opened."""

    jobs: tuple[Job, ...]
    findings: tuple[Finding, ...]
    datasets: dict[str, str]
    """Name of each dataset in BIDS URIs (``raw``, the ``--derivatives`` names) -> path."""


_SOURCED = ("echo_time", "flip_angle", "repetition_time", "field_strength", "spoiling_increment")


def to_json(value: Any) -> Any:
    """A dataclass of this module (or a list of them) as JSON-ready data."""
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if value is None else dataclasses.asdict(value)


def series_from_json(data: dict[str, Any]) -> Series:
    """The inverse of ``to_json`` for a Series."""
    fields = dict(data)
    for name in _SOURCED:
        fields[name] = _sourced(fields[name])
    fields["images"] = tuple(fields["images"])
    fields["second"] = _second_part(fields["second"])
    fields["dwi_runs"] = tuple(_dwi_run(run) for run in fields["dwi_runs"])
    fields["b1_map"] = None if fields["b1_map"] is None else B1Map(**fields["b1_map"])
    fields["voxel_maps"] = {k: VoxelMap(**v) for k, v in fields["voxel_maps"].items()}
    fields["gradient_deviation"] = _voxel_map(fields["gradient_deviation"])
    fields["mask"] = Mask(fields["mask"]["origin"], tuple(fields["mask"]["images"]))
    fields["atlases"] = tuple(Atlas(**atlas) for atlas in fields["atlases"])
    return Series(**fields)


def _sourced(data: dict[str, Any] | None) -> Sourced | None:
    if data is None:
        return None
    return Sourced(tuple(data["values"]), data["unit"], tuple(data["sources"]))


def _second_part(data: dict[str, Any] | None) -> SecondPart | None:
    return None if data is None else SecondPart(**{**data, "images": tuple(data["images"])})


def _dwi_run(data: dict[str, Any]) -> DwiRun:
    timing = {k: _sourced(data[k]) for k in ("small_delta", "big_delta", "echo_time")}
    return DwiRun(**{**data, **timing, "noise_map": _voxel_map(data["noise_map"])})


def _voxel_map(data: dict[str, Any] | None) -> VoxelMap | None:
    return None if data is None else VoxelMap(**data)
