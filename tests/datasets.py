"""Tiny BIDS datasets with known truth, written in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (7, 6, 5)
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
R2STAR = 25.0
ECHO_TIMES = (0.003, 0.008, 0.015, 0.024)


def write_image(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def write_json(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def new_dataset(root: Path) -> Path:
    write_json(root / "dataset_description.json", {"Name": "Tiny", "BIDSVersion": "1.11.1"})
    return root


def add_megre(root: Path, subject: str = "01", session: str = "", seed: int = 0) -> list[Path]:
    """Four echoes of a block with R2* 25 1/s (varied by 20 %) and SNR 100; air around it."""
    random = np.random.default_rng(seed)
    rate = R2STAR * (1 + 0.2 * np.linspace(-1, 1, SHAPE[0]))[:, None, None] * np.ones(SHAPE)
    inside = np.zeros(SHAPE, bool)
    inside[1:-1, 1:-1, :] = True
    prefix = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    folder = root / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
    paths = []
    for i, te in enumerate(ECHO_TIMES, 1):
        signal = 1000 * np.exp(-te * rate) * inside + random.normal(0, 10, SHAPE)
        paths.append(write_image(folder / f"{prefix}_echo-{i}_MEGRE.nii.gz", abs(signal)))
        sidecar = {"EchoTime": te, "MagneticFieldStrength": 3}
        write_json(folder / f"{prefix}_echo-{i}_MEGRE.json", sidecar)
    return paths


def add_vfa(
    root: Path, subject: str = "01", t1: float = 1.0, b1: np.ndarray | None = None
) -> None:
    """Three flip angles without noise, of one T1 (s), under a transmit field (SHAPE)."""
    b1 = np.ones(SHAPE) if b1 is None else b1
    repetition_time = 0.02
    decay = np.exp(-repetition_time / t1)
    for i, degrees in enumerate((4, 12, 25), 1):
        angle = np.deg2rad(degrees) * b1
        signal = 1e4 * np.sin(angle) * (1 - decay) / (1 - decay * np.cos(angle))
        stem = f"sub-{subject}_flip-{i}_VFA"
        write_image(root / f"sub-{subject}/anat/{stem}.nii.gz", signal)
        sidecar = {"FlipAngle": degrees, "RepetitionTimeExcitation": repetition_time}
        write_json(root / f"sub-{subject}/anat/{stem}.json", sidecar)


def add_contrasts(
    root: Path,
    suffix: str = "MPM",
    subject: str = "01",
    t1: float = 1.0,
    echoes: tuple[int, int, int] = (3, 5, 4),
) -> None:
    """MT-, PD- and T1-weighted echoes without noise, of one T1 (s) and R2* of 25 1/s."""
    repetition_time, folder = 0.025, root / f"sub-{subject}/anat"
    decay = np.exp(-repetition_time / t1)
    contrasts = zip(("MTw", "PDw", "T1w"), (1, 1, 2), (6, 6, 21), echoes, strict=True)
    for acq, flip, degrees, count in contrasts:
        angle, mt = np.deg2rad(degrees), acq == "MTw"
        first = (
            1e4 * np.sin(angle) * (1 - decay) / (1 - decay * np.cos(angle)) * (0.7 if mt else 1)
        )
        for echo in range(1, count + 1):
            time = 0.004 * echo - 0.002
            state = "on" if mt else "off"
            stem = f"sub-{subject}_acq-{acq}_echo-{echo}_flip-{flip}_mt-{state}_{suffix}"
            signal = np.full(SHAPE, first * np.exp(-time * R2STAR))
            write_image(folder / f"{stem}.nii.gz", signal)
            sidecar = {
                "EchoTime": time,
                "FlipAngle": degrees,
                "RepetitionTimeExcitation": repetition_time,
                "MTState": mt,
                "MagneticFieldStrength": 3,
            }
            write_json(folder / f"{stem}.json", sidecar)


def add_b1_map(root: Path, b1: np.ndarray, subject: str = "01") -> None:
    """A relative B1 map; 0 where there is none."""
    path = root / f"sub-{subject}/fmap/sub-{subject}_TB1map.nii.gz"
    write_image(path, b1)
    write_json(path.with_suffix("").with_suffix(".json"), {"Units": "relative"})


def add_dwi(
    root: Path,
    subject: str = "01",
    timing: bool = True,
    shells: tuple[int, ...] = (1000, 2000, 3000),
    run: int | None = None,
    big_delta: float = 0.030,
) -> Path:
    """Two b=0 volumes and shells (s/mm^2) of 20 directions; isotropic decay."""
    random = np.random.default_rng(3)
    bval = np.r_[0, 0, np.repeat(shells, 20)]
    vectors = random.normal(size=(len(bval), 3))
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    vectors[:2] = 0
    signal = np.exp(-bval * 0.7e-3) * np.ones((*SHAPE, len(bval))) * 500
    signal += random.normal(0, 5, signal.shape)
    folder = root / f"sub-{subject}/dwi"
    stem = f"sub-{subject}" + (f"_run-{run}" if run else "") + "_dwi"
    path = write_image(folder / f"{stem}.nii.gz", abs(signal))
    np.savetxt(folder / f"{stem}.bval", bval[None], fmt="%d")
    np.savetxt(folder / f"{stem}.bvec", vectors.T, fmt="%.6f")
    times = {"SmallDelta": 0.010, "BigDelta": big_delta} if timing else {}
    write_json(folder / f"{stem}.json", {"EchoTime": 0.07, **times})
    return path


def add_segmentation(root: Path, subject: str = "01", name: str = "tiny") -> tuple[Path, Path]:
    """Three labels, of which the third lies outside the image block; and their table."""
    labels = np.zeros(SHAPE)
    labels[1:3, 1:-1], labels[3:-1, 1:-1] = 1, 2
    image = write_image(root / f"sub-{subject}_desc-{name}_dseg.nii.gz", labels)
    table = root / f"sub-{subject}_desc-{name}_dseg.tsv"
    table.write_text("index\tname\n1\tLeft-Front\n2\tRight-Back\n9\tNowhere\n")
    return image, table


def water(te: np.ndarray, mwf: float, level: np.ndarray | float = 1.0) -> np.ndarray:
    """Three pools of water at 3 T (Nam et al. 2015, eq. 1), complex; one value per echo time.

    ``level`` are the magnetisations of myelin and of other water, by default 1.
    """
    ppm = 2j * np.pi * 42.57747892 * 3 * te
    myelin, other = np.broadcast_to(level, (2,))
    axon, extra = 0.6 * (1 - mwf) * other, 0.4 * (1 - mwf) * other
    return (
        myelin * mwf * np.exp(-te * 100 + ppm * 0.06)
        + axon * np.exp(-te * 16 - ppm * 0.01)
        + extra * np.exp(-te * 22)
    )


def add_complex(
    root: Path,
    suffix: str,
    images: dict[tuple[float, float], complex],
    *,
    subject: str = "01",
    snr: float = 1000.0,
    phase: str = "phase",
    sidecar: dict | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Complex images of a uniform block in a field that varies over it; returns the field in Hz.

    ``images`` are signals by flip angle (degrees, 0: none) and echo time (s); ``phase`` is the
    part to write beside magnitudes ("phase", "" for none) or "real" for real and imaginary parts.
    """
    random = np.random.default_rng(seed)
    field = 60 * np.linspace(-1, 1, SHAPE[0])[:, None, None] * np.ones(SHAPE)
    inside = np.zeros(SHAPE, bool)
    inside[1:-1, 1:-1, :] = True
    echoes, flips = (sorted({k[i] for k in images}) for i in (1, 0))
    for (flip, te), signal in images.items():
        turned = 1000 * signal * np.exp(2j * np.pi * field * te + 0.7j) * inside
        noise = random.normal(0, 1000 / snr, (2, *SHAPE))
        turned = turned + noise[0] + 1j * noise[1]
        parts = {"mag": np.abs(turned)} | ({"phase": np.angle(turned)} if phase == "phase" else {})
        if phase == "real":
            parts = {"real": turned.real, "imag": turned.imag}
        entities = f"echo-{echoes.index(te) + 1}_" * (len(echoes) > 1)
        entities += f"flip-{flips.index(flip) + 1}_" * (flip > 0)
        about = {"EchoTime": te, "MagneticFieldStrength": 3}
        if flip:
            about |= {"FlipAngle": flip, "RepetitionTimeExcitation": 0.05}
        for part, values in parts.items():
            stem = root / f"sub-{subject}/anat/sub-{subject}_{entities}part-{part}_{suffix}"
            write_image(Path(f"{stem}.nii.gz"), values)
            units = {"Units": "rad"} if part == "phase" else {}
            write_json(Path(f"{stem}.json"), about | units | (sidecar or {}))
    return field
