"""Everything a run was asked to do: one frozen value, in and out of TOML."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from bids_gacelle.errors import InputError

CHOICES = {
    "analysis_level": ("participant", "group"),
    "input_type": ("bids", "hcpya", "ukb"),
    "solver": ("lm", "adam", "sgdm", "rmsprop", "linear"),
    "noise": ("gaussian", "rician"),
    "loss": ("l2", "l1", "huber"),
    "prior": ("none", "weak"),
    "precision": ("float32", "float64"),
    "phase_sign": ("positive", "negative"),
}
"""What settings of a few fixed values can be (None where a setting may be left out)."""


@dataclass(frozen=True)
class Settings:
    """The effective options of one run, named as on the command line.

    Times of diffusion gradients are in ms, the field strength in T, the increment of the spoiling
    phase in degrees, memory in GB. An empty tuple, an empty dict or None
    means "not given".
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = "participant"
    input_type: str = "bids"
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    derivatives: dict[str, Path] = field(default_factory=dict)
    bids_database_dir: Path | None = None
    ignore: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    model_file: tuple[Path, ...] = ()
    combine_dwi: bool = False
    fit_undetermined: bool = False
    mask: Path | None = None
    noise_map: Path | None = None
    gradient_deviation: Path | None = None
    atlas: dict[str, Path] = field(default_factory=dict)
    small_delta: float | None = None
    big_delta: float | None = None
    timing_file: Path | None = None
    scheme_file: Path | None = None
    field_strength: float | None = None
    spoiling_increment: float | None = None
    voxel_map: dict[str, str] = field(default_factory=dict)
    """Voxel input of a model -> path, in which {subject} and {session} stand for labels."""
    write_scheme: bool = False
    b0_threshold: float = 100.0
    phase_sign: str = "positive"
    assume_ms: tuple[str, ...] = ()
    solver: str = "lm"
    noise: str = "gaussian"
    loss: str = "l2"
    prior: str | None = None
    device: str = "auto"
    precision: str = "float32"
    random_seed: int = 0
    model_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per model, the ``--set model.option=value`` pairs."""
    nprocs: int = 1
    omp_nthreads: int = 1
    mem: float | None = None
    use_plugin: Path | None = None
    work_dir: Path | None = None
    keep_work: bool = False
    resume: bool = False
    stop_on_first_crash: bool = False
    dataset_link: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON- and TOML-ready values; fields that are None are left out."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {name: value for name, value in plain.items() if value is not None}

    def to_toml(self) -> str:
        """The run as a TOML file that ``--config-file`` reads back."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Inverse of `to_dict`.

        Raises
        ------
        InputError
            A field is unknown or has the wrong type.
        """
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            known = ", ".join(sorted(hints))
            raise InputError(f"Unknown setting '{unknown[0]}'. Known settings: {known}.")
        typed = {name: _typed(name, value, hints[name]) for name, value in data.items()}
        for name, allowed in CHOICES.items():
            if typed.get(name) not in (None, *allowed):
                listed = ", ".join(allowed)
                raise InputError(f"Setting '{name}' is {typed[name]!r}; it can be: {listed}.")
        return cls(**typed)


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a TOML file, not yet typed (the command line goes on top).

    Raises
    ------
    InputError
        The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {path} is not valid TOML: {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Cast a TOML value to the type that the field declares."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(name, v, typing.get_args(hint)[0]) for v in value)
    if origin is dict and isinstance(value, dict):
        return {k: _typed(name, v, typing.get_args(hint)[1]) for k, v in value.items()}
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool) == isinstance(value, bool)
    ):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise InputError(f"Setting '{name}' should be of type {wanted}, but is {value!r}.")
