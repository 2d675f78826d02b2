"""What the caller of discovery wants: options of the command line and needs of the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_gacelle.bids.files import Dataset, session_labels
from bids_gacelle.bids.layouts import Visit
from bids_gacelle.bids.series import Kind

DEFAULT_SPOILING_INCREMENT = 50.0
"""Increment of the RF phase (degrees) that stands where neither sidecars nor an option say one."""


@dataclass(frozen=True)
class ModelNeeds:
    """What a model must have to be fitted.

    ``minimum_measurements`` counts echoes (megre), flip angles (vfa) or shells (dwi),
    ``minimum_echo_times`` the different echo times of dwi, or those of one flip angle (vfa).
    ``takes_gradient_deviation`` is False for a dwi model that has only nominal b-values.
    ``columns`` are the columns of the acquisition that the signal depends on (``echo_time``,
    ``field_strength``, ``spoiling_increment``, ...); ``voxel_inputs`` are the maps it can use,
    those of several fibres numbered (``theta1``).
    """

    name: str
    kind: Kind
    needs_diffusion_times: bool = False
    minimum_measurements: int = 2
    minimum_echo_times: int = 1
    takes_gradient_deviation: bool = True
    columns: tuple[str, ...] = ()
    voxel_inputs: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether the model can use a map given by this name, ``theta`` for all of ``theta1``."""
        return any(name in (i, i.rstrip("0123456789")) for i in self.voxel_inputs)


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
