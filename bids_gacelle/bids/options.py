"""What the caller of discovery wants: options of the command line and needs of the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_gacelle.bids.files import Dataset, session_labels
from bids_gacelle.bids.layouts import Visit
from bids_gacelle.bids.series import Kind


@dataclass(frozen=True)
class ModelNeeds:
    """What a model must have to be fitted.

    Attributes
    ----------
    minimum_measurements
        Different echoes (megre), flip angles (vfa; images, for a model of echo times) or shells
        (dwi).
    minimum_flip_angles
        Different flip angles of vfa.
    minimum_echo_times
        Different echo times of dwi, or of one flip angle of vfa.
    takes_gradient_deviation
        False for a dwi model that has only nominal b-values.
    columns
        Columns of the acquisition that it must have (``echo_time``, ``field_strength``, ...).
    voxel_inputs, needed_inputs
        Maps that it can use, and those it cannot do without. Those of several fibres are numbered
        (``theta1``).
    default_spoiling
        Increment of the RF phase (degrees) that it takes where nothing says one; None: its signal
        does not depend on it.
    """

    name: str
    kind: Kind
    needs_diffusion_times: bool = False
    minimum_measurements: int = 2
    minimum_flip_angles: int = 1
    minimum_echo_times: int = 1
    takes_gradient_deviation: bool = True
    columns: tuple[str, ...] = ()
    voxel_inputs: tuple[str, ...] = ()
    needed_inputs: tuple[str, ...] = ()
    default_spoiling: float | None = None

    @property
    def knows_echoes(self) -> bool:
        """Whether the signal depends on the echo time."""
        return "echo_time" in self.columns or self.minimum_echo_times > 1

    def takes(self, name: str) -> bool:
        """Whether the model can use a map given by this name (see `names_of`)."""
        return any(name in names_of(i) for i in (*self.voxel_inputs, *self.needed_inputs))


def names_of(voxel_input: str) -> tuple[str, ...]:
    """Names under which the map of an input can be given.

    ``theta`` is that of all fibres, ``fo`` has their directions, which give the angles.
    """
    base = voxel_input.rstrip("0123456789")
    return (voxel_input, base, "fo") if base == "theta" else (voxel_input, base)


@dataclass(frozen=True)
class Options:
    """Which part of the dataset is used and how; the defaults ask for all of it."""

    input_type: str = "bids"
    participant_labels: tuple[str, ...] = ()
    session_labels: tuple[str, ...] = ()
    filters: Mapping[str, Any] = field(default_factory=dict)
    derivatives: Mapping[str, Path] = field(default_factory=dict)
    mask: Path | None = None
    noise_map: Path | None = None
    gradient_deviation: Path | None = None
    atlases: Mapping[str, Path] = field(default_factory=dict)
    combine_dwi: bool = False
    small_delta_ms: float | None = None
    big_delta_ms: float | None = None
    timing_file: Path | None = None
    scheme_file: Path | None = None
    field_strength: float | None = None
    """T, in place of what sidecars say."""
    spoiling_increment: float | None = None
    """degrees, in place of what sidecars say."""
    voxel_maps: Mapping[str, str] = field(default_factory=dict)
    """Voxel input -> path, in which {subject} and {session} stand for labels."""
    b0_threshold: float = 100.0
    assume_ms: tuple[str, ...] = ()
    database_dir: Path | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """The opened datasets together with what is asked of them."""

    raw: Dataset
    derivatives: tuple[Dataset, ...]
    options: Options
    queries: Mapping[str, Mapping[str, Any]]
    visits: tuple[Visit, ...] = ()
    """Folders of the participants where the data are no BIDS dataset."""

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All datasets, those given by the user first: what they hold was chosen for this run."""
        return (*self.derivatives, self.raw)

    def sessions(self, subject: str) -> set[str]:
        """Labels of all sessions of a participant, in any of the datasets."""
        found = {label for d in self.datasets for label in session_labels(d.root, subject)}
        return found | {v.session for v in self.visits if v.subject == subject and v.session}

    def dataset(self, name: str) -> Dataset:
        """Look up a dataset by its name."""
        return next(d for d in self.datasets if d.name == name)
