"""The command line: one function per group of options, and their union as Settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bids_gacelle import __version__
from bids_gacelle.cli import argtypes
from bids_gacelle.errors import InputError
from bids_gacelle.settings import CHOICES, Settings, read_config

EPILOG = """\
exit codes:
  0  all maps asked for were written      3  nothing in the dataset can be fitted
  1  a subject or model failed            70 an error inside bids-gacelle
  2  the command line is wrong

examples:
  bids-gacelle DATA DATA/derivatives/bids_gacelle participant --models r2star,despot1
  bids-gacelle DATA OUT participant --participant-label 01 --models nexi --combine-dwi \\
      -d qsiprep=/study/qsiprep --small-delta 6ms --big-delta 21ms
  bids-gacelle DATA OUT participant --dry-run
  bids-gacelle DATA OUT group
"""

FLAGS_WITHOUT_SETTING = ("config_file", "dry_run", "reports_only", "list_models", "verbose")
"""Options that steer one call and are not part of what was asked to be computed."""


def build_parser() -> argparse.ArgumentParser:
    """The parser; options that were not given are absent from its namespace."""
    parser = argparse.ArgumentParser(
        prog="bids-gacelle",
        description="Quantitative MRI maps with their uncertainty, from a BIDS dataset: R2*, T1, "
        "and diffusion microstructure, with ROI tables and a report to judge them by.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=argtypes.any_path, help="the BIDS dataset")
    parser.add_argument("output_dir", type=argtypes.any_path, help="where the derivatives go")
    parser.add_argument(
        "analysis_level",
        choices=CHOICES["analysis_level"],
        help="participant: fit and report; group: merge the ROI tables of all participants",
    )
    parser.add_argument("--version", action="version", version=f"bids-gacelle {__version__}")
    for add_group in (_select, _inputs, _acquisition, _fit, _resources, _run):
        add_group(parser)
    return parser


def _select(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to work on")
    group.add_argument(
        "--input-type",
        choices=CHOICES["input_type"],
        help="what BIDS_DIR is: bids (default), or the folder of all participants of the Human "
        "Connectome Project (hcpya) or of UK Biobank (ukb)",
    )
    group.add_argument(
        "--participant-label",
        "--participant_label",
        "--subject-label",
        nargs="+",
        action="extend",
        type=argtypes.label("sub-"),
        metavar="LABEL",
        help="participants, with or without sub-, or a text file of labels (default: all)",
    )
    group.add_argument(
        "--session-label",
        "--session-id",
        nargs="+",
        action="extend",
        type=argtypes.label("ses-"),
        metavar="LABEL",
        help="sessions, with or without ses-, or a text file of labels (default: all)",
    )
    group.add_argument(
        "--models",
        nargs="+",
        action="extend",
        type=argtypes.comma_list,
        metavar="MODEL",
        help="models to fit, separated by commas (default: every model that the data allow; "
        "--list-models shows them)",
    )
    _model_file(group)
    group.add_argument(
        "--list-models",
        action="store_true",
        help="list the models, those of --model-file too, and what they need",
    )
    group.add_argument(
        "--bids-filter-file",
        type=argtypes.existing_path,
        metavar="FILE",
        help="JSON with entities per query: megre, vfa, mpm, mts, tb1, dwi, mask, dseg, noise, "
        "graddev, voxelmap",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be fitted and why the rest would not, then stop",
    )
    group.add_argument(
        "--reports-only", action="store_true", help="rebuild the reports from existing outputs"
    )


def _inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs beside the dataset")
    group.add_argument(
        "-d",
        "--derivatives",
        "--datasets",
        nargs="+",
        action="extend",
        type=argtypes.named_path,
        metavar="NAME=PATH",
        help="derivatives to use: preprocessed dwi, masks, segmentations, B1 maps",
    )
    group.add_argument(
        "--mask", type=argtypes.existing_path, metavar="FILE", help="fit inside this mask"
    )
    group.add_argument(
        "--atlas",
        nargs="+",
        action="extend",
        type=argtypes.named_path,
        metavar="NAME=FILE",
        help="segmentation on the grid of the maps, for ROI tables; names from the .tsv beside it",
    )
    group.add_argument(
        "--noise-map",
        type=argtypes.existing_path,
        metavar="FILE",
        help="standard deviation of the noise of one dwi volume, in the unit of the images "
        "(default: a *_desc-noise_* beside the images, else estimated from them)",
    )
    group.add_argument(
        "--gradient-deviation",
        type=argtypes.existing_path,
        metavar="FILE",
        help="gradient nonlinearity in 9 volumes, HCP's grad_dev.nii.gz (default: a *_graddev "
        "beside the images)",
    )
    group.add_argument(
        "--combine-dwi",
        action="store_true",
        help="fit all dwi runs of a session together (each normalised by its own b0)",
    )
    group.add_argument(
        "--voxel-map",
        nargs="+",
        action="extend",
        type=argtypes.voxel_map,
        metavar="INPUT=PATH",
        help="map of a voxel input of a model in the space of its images, such as theta, ff or "
        "b1; {subject} and {session} in the path stand for labels",
    )
    group.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        choices=("tb1", "noise", "graddev", "phase"),
        help="leave out an input that is there: the B1 map, noise map, gradient deviations, or "
        "the phase of gradient echoes",
    )
    group.add_argument(
        "--bids-database-dir",
        type=argtypes.any_path,
        metavar="DIR",
        help="keep the index of the dataset here (made when missing)",
    )


def _acquisition(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the acquisition, in place of what sidecars say")
    group.add_argument(
        "--small-delta", type=argtypes.milliseconds, metavar="TIME", help="pulse duration, 6ms"
    )
    group.add_argument(
        "--big-delta", type=argtypes.milliseconds, metavar="TIME", help="pulse separation, 21ms"
    )
    group.add_argument(
        "--timing-file",
        type=argtypes.existing_path,
        metavar="FILE",
        help="TSV with a row per dwi volume: volume SmallDelta BigDelta [EchoTime], in s",
    )
    group.add_argument(
        "--scheme-file",
        type=argtypes.existing_path,
        metavar="FILE",
        help="Camino or AMICO scheme of the dwi images: gradients where they have no bval and "
        "bvec, and times in place of those in their sidecars",
    )
    group.add_argument(
        "--field-strength",
        type=argtypes.tesla,
        metavar="T",
        help="of the gradient echoes, in T (default: MagneticFieldStrength of their sidecars)",
    )
    group.add_argument(
        "--spoiling-increment",
        type=argtypes.degrees,
        metavar="DEGREES",
        help="by which the RF phase grows from pulse to pulse (default: "
        "SpoilingRFPhaseIncrement of the sidecars)",
    )
    group.add_argument(
        "--b0-threshold",
        type=float,
        metavar="B",
        help="volumes up to this b count as b=0, in s/mm^2 (default: 100)",
    )
    group.add_argument(
        "--assume-ms",
        nargs="+",
        action="extend",
        metavar="FIELD",
        help="read these metadata fields in ms although BIDS says s, e.g. EchoTime",
    )
    group.add_argument(
        "--phase-sign",
        choices=CHOICES["phase_sign"],
        help="whether the phase of the images grows (positive, default) or falls (negative) with "
        "echo time where the field is higher; scanners differ",
    )


def _fit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the fit")
    group.add_argument(
        "--solver",
        choices=CHOICES["solver"],
        help="lm: Levenberg-Marquardt (default); adam, sgdm, rmsprop: first-order, far slower; "
        "linear: the closed form, where a model has one",
    )
    group.add_argument(
        "--noise",
        choices=CHOICES["noise"],
        help="of the images: gaussian (default), or rician for magnitudes near the noise floor",
    )
    group.add_argument(
        "--loss",
        choices=CHOICES["loss"],
        help="l2: least squares or the likelihood (default); l1, huber: less moved by outliers",
    )
    group.add_argument(
        "--prior",
        choices=CHOICES["prior"],
        help="weak: a wide Gaussian prior, stated in the sidecars (default: none, but weak for "
        "models that need it: gremwi, mcrmwi)",
    )
    group.add_argument(
        "--fit-undetermined",
        "--force",
        action="store_true",
        help="fit a model also where the acquisition cannot determine its parameters (a single "
        "shell, say); the maps then show starting values as much as tissue",
    )
    group.add_argument(
        "--set",
        dest="model_options",
        nargs="+",
        action="extend",
        type=argtypes.model_option,
        metavar="MODEL.OPTION=VALUE",
        help="options of a model or of the solver for it, e.g. nexi.l_max=2 nexi.starts=8",
    )
    group.add_argument(
        "--device",
        help="auto (default), cpu, cuda, cuda:N or cuda:all; one that is absent is an error",
    )
    group.add_argument("--precision", choices=CHOICES["precision"], help="default: float32")
    group.add_argument("--random-seed", type=int, metavar="N", help="default: 0")


def _resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--nprocs",
        "--n-procs",
        type=argtypes.positive_int,
        metavar="N",
        help="processor cores in all (default: those this process may use)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=argtypes.positive_int,
        metavar="N",
        help="cores per fit (default: 1; more pays for large fits on an idle machine only)",
    )
    group.add_argument(
        "--mem",
        "--mem-gb",
        type=argtypes.gigabytes,
        metavar="GB",
        help="memory in all, 8G or 8000M",
    )
    group.add_argument(
        "--use-plugin",
        type=argtypes.existing_path,
        metavar="FILE",
        help="YAML with a Nipype plugin and its arguments",
    )


def _run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "-w", "--work-dir", type=argtypes.any_path, metavar="DIR", help="intermediate files"
    )
    group.add_argument("--keep-work", action="store_true", help="keep them afterwards")
    group.add_argument(
        "--write-scheme",
        action="store_true",
        help="also write the acquisition of each dwi series as a Camino scheme, for AMICO",
    )
    group.add_argument(
        "--resume", action="store_true", help="skip fits whose inputs and options are unchanged"
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop everything at the first failure"
    )
    group.add_argument(
        "--config-file",
        type=argtypes.existing_path,
        metavar="TOML",
        help="options from a file, such as logs/<run>/bids_gacelle.toml; the command line wins",
    )
    group.add_argument(
        "--dataset-link",
        nargs="+",
        action="extend",
        type=argtypes.named_uri,
        metavar="NAME=URI",
        help="address of a dataset for DatasetLinks, e.g. raw=doi:10.18112/openneuro.ds000001",
    )
    group.add_argument("-v", "--verbose", action="count", help="more messages")
    group.add_argument(
        "--skip-bids-validation",
        "--skip_bids_validation",
        "--notrack",
        action="store_true",
        dest="accepted",
        help="accepted for compatibility: bids-gacelle neither validates its input nor tracks",
    )


def _model_file(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model-file",
        action="append",
        type=argtypes.existing_path,
        metavar="FILE",
        help="Python file with signal models of your own, which join the others; may be repeated",
    )


def models_to_list(argv: Sequence[str]) -> list[Path] | None:
    """Files of models to list beside ours when ``--list-models`` was given, else None.

    Nothing else need be on such a command line, not even a dataset.
    """
    if "--list-models" not in argv:
        return None
    parser = argparse.ArgumentParser(prog="bids-gacelle", add_help=False, allow_abbrev=False)
    _model_file(parser)
    return parser.parse_known_args(argv)[0].model_file or []


def settings_from(namespace: argparse.Namespace) -> Settings:
    """Config file, then command line, then defaults that depend on the machine.

    Raises
    ------
    InputError
        A value is wrong in the config file, or a name was given twice.
    """
    given = {
        k: v for k, v in vars(namespace).items() if k not in (*FLAGS_WITHOUT_SETTING, "accepted")
    }
    for name in ("participant_label", "session_label", "models"):
        if name in given:
            given[name] = list(dict.fromkeys(x for part in given[name] for x in part))
    for name in ("derivatives", "atlas", "dataset_link", "voxel_map"):
        if name in given:
            given[name] = _unique(name, given[name])
    if "model_options" in given:
        options: dict[str, dict[str, Any]] = {}
        for model, option, value in given["model_options"]:
            options.setdefault(model, {})[option] = value
        given["model_options"] = options
    config = read_config(namespace.config_file) if "config_file" in namespace else {}
    merged = {"nprocs": available_cores(), **config, **given}
    return Settings.from_dict(merged)


def available_cores() -> int:
    """Cores this process may use: SLURM's allotment, else the affinity mask and cgroup quota."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if slurm.isdigit() and int(slurm) > 0:
        return min(cores, int(slurm))
    try:  # cgroup v2, then v1
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            base = Path("/sys/fs/cgroup/cpu")
            quota = (base / "cpu.cfs_quota_us").read_text().strip()
            period = (base / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cores
    if quota.lstrip("-").isdigit() and int(quota) > 0:
        return max(1, min(cores, int(quota) // int(period)))
    return cores


def _unique(option: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        flag = "--" + option.replace("_", "-")
        raise InputError(
            f"{flag}: the name '{twice[0]}' is given twice; name each one differently."
        )
    return dict(pairs)
