"""Protocols of the digital brain, and the signals the models predict for them.

Every contrast is made by one of the engine's own models from known parameters: `r2star` makes the
multi-echo gradient echo, `despot1` the variable flip angles (and the steady state that the
multi-echo gradient echo starts from), `nexi` or `mcmicro` the diffusion-weighted images. Myelin
water alone is made by simulating what `mcrmwi` only approximates (`phantom.myelin`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bids_gacelle.bids.series import Kind
from bids_gacelle.engine import DiffusionScheme, GradientEchoScheme, get_model
from bids_gacelle.phantom.directions import directional_signal, spread_directions
from bids_gacelle.phantom.fields import stream
from bids_gacelle.phantom.head import Head
from bids_gacelle.phantom.myelin import MWI, Progress, echo, silent, steady_states, water_pools
from bids_gacelle.phantom.truth import Maps, fibre_inputs, field_truth, myelin_truth, true_map

GRE_SCALE, DWI_SCALE = 10_000.0, 1_000.0
"""Signal of pure water in the units of the images: a proton density, and a b=0 signal of white
matter, of 1. White matter comes out near 1000 in the brightest image of every contrast."""

TR_S = MWI.repetition_time
ECHO_TIMES_S = MWI.echo_times
MEGRE_FLIP = 20.0
VFA_FLIPS = (5.0, 10.0, 20.0, 50.0)

SMALL_DELTA_MS = 6.0
SHELLS = {13.0: (1.0, 2.5, 4.0), 21.0: (1.0, 2.5, 4.0), 30.0: (1.0, 2.5, 4.0, 6.0)}
"""b-values in ms/um^2 of the dwi run at each diffusion time Delta in ms."""
N_DIRECTIONS = 32

SCANNER: dict[str, Any] = {
    "MagneticFieldStrength": MWI.field_strength,
    "Manufacturer": "bids_gacelle",
    "ManufacturersModelName": "Digital brain",
}
_GRE = SCANNER | {
    "PulseSequenceType": "SPGR",
    "MRAcquisitionType": "3D",
    "SpoilingState": True,
    "SpoilingType": "COMBINED",
    "SpoilingRFPhaseIncrement": MWI.spoiling_increment,
    "RepetitionTimeExcitation": TR_S,
}


@dataclass(frozen=True)
class Image:
    """One image of the raw dataset, without noise.

    Attributes
    ----------
    datatype, entities, suffix
        For its name; subject and session come from elsewhere.
    data
        float32 (x, y, z[, volume]), or complex64, of which magnitude and phase are stored.
    metadata
        Its sidecar.
    gradients
        bval (volumes,) in s/mm^2 and bvec (3, volumes) in the frame of FSL, or None.
    noisy
        False for maps, which are not measured.
    """

    datatype: str
    entities: Mapping[str, str]
    suffix: str
    data: np.ndarray
    metadata: Mapping[str, Any]
    gradients: tuple[np.ndarray, np.ndarray] | None = None
    noisy: bool = True


@dataclass(frozen=True)
class Contrast:
    """What one contrast contributes to a session.

    Attributes
    ----------
    model, kind
        Name of the model that made the signals, and the kind of its series.
    images
        Made when asked for, because all of them together are large.
    truth
        Every declared quantity of the model with its map: float64 (x, y, z), NaN outside the
        brain and where the quantity has no meaning.
    brightness
        Mean of white matter in the brightest image; the noise is relative to it.
    entities
        Entities of its images that maps keep.
    inputs
        Maps that models can take as voxel inputs, as `truth`.
    parcels
        Whether the parcels of white matter are part of its truth.
    """

    model: str
    kind: Kind
    images: Iterable[Image] = field(repr=False)
    truth: Maps
    brightness: float
    entities: Mapping[str, str] = field(default_factory=dict)
    inputs: Maps = ()
    parcels: bool = False


def megre(head: Head, *, phase: bool = False) -> Contrast:
    """Make the multi-echo gradient echo: twelve echoes of a spoiled steady state.

    With `phase` they are complex, their phase being that of the static field and the coils.
    """
    scheme = GradientEchoScheme(flip_angle=[MEGRE_FLIP, MEGRE_FLIP], repetition_time=TR_S)
    steady = _signal("despot1", scheme, _relaxation(head), b1=head.transmit()[head.inside])[0]
    values = {"S0": steady, "R2star": head.parameter("R2star")}
    signal = _signal("r2star", GradientEchoScheme(echo_time=ECHO_TIMES_S), values)
    turned = signal
    if phase:
        radian_per_s = 2 * np.pi * MWI.hertz_per_ppm * head.field(1)
        times = np.array(ECHO_TIMES_S)[:, None]
        turned = signal * np.exp(1j * (head.initial_phase() + radian_per_s * times))

    def images() -> Iterator[Image]:
        for number, (time, image) in enumerate(zip(ECHO_TIMES_S, turned, strict=True), 1):
            sidecar = _GRE | {"EchoTime": time, "FlipAngle": MEGRE_FLIP}
            yield Image("anat", {"echo": str(number)}, "MEGRE", head.volume(image), sidecar)

    truth = _truth("r2star", GradientEchoScheme(echo_time=ECHO_TIMES_S), values, head)
    if phase:
        truth += field_truth(head.field(1), head)
    return Contrast("r2star", "megre", images(), truth, head.white_matter(signal[0]))


def vfa(head: Head) -> Contrast:
    """Make the variable flip angles, with the map of the transmit field that scales them."""
    scheme = GradientEchoScheme(flip_angle=VFA_FLIPS, repetition_time=TR_S)
    b1, values = head.transmit(), _relaxation(head)
    signal = _signal("despot1", scheme, values, b1=b1[head.inside])

    def images() -> Iterator[Image]:
        for number, (flip, image) in enumerate(zip(VFA_FLIPS, signal, strict=True), 1):
            sidecar = _GRE | {"EchoTime": ECHO_TIMES_S[0], "FlipAngle": flip}
            yield Image("anat", {"flip": str(number)}, "VFA", head.volume(image), sidecar)
        yield _transmit_map(head)

    truth = _truth("despot1", scheme, values, head)
    brightest = max(head.white_matter(image) for image in signal)
    return Contrast("despot1", "vfa", images(), truth, brightest)


def mwi(head: Head, progress: Progress = silent) -> Contrast:
    """Make complex multi-echo gradient echoes at several flip angles, with myelin water."""
    entities = {"acq": "mwi"}
    pools, field, start = water_pools(head), head.field(len(MWI.flip_angles)), head.initial_phase()
    pools["S0"] *= GRE_SCALE
    steady = steady_states(pools, head.transmit()[head.inside], MWI, progress)

    def signal(flip: int, time: float) -> np.ndarray:
        phase = start + 2 * np.pi * MWI.hertz_per_ppm * field[flip] * time
        return echo(pools, (steady[0][flip], steady[1][flip]), time, phase, MWI)

    def images() -> Iterator[Image]:
        for flip, angle in enumerate(MWI.flip_angles):
            for number, time in enumerate(MWI.echo_times, 1):
                sidecar = _GRE | {"EchoTime": time, "FlipAngle": angle}
                names = entities | {"flip": str(flip + 1), "echo": str(number)}
                yield Image("anat", names, "VFA", head.volume(signal(flip, time)), sidecar)
        yield _transmit_map(head)

    first = MWI.echo_times[0]
    brightest = max(
        head.white_matter(np.abs(signal(flip, first))) for flip in range(len(MWI.flip_angles))
    )
    truth, inputs = myelin_truth(pools, field, head), fibre_inputs(pools, head)
    return Contrast("mcrmwi", "vfa", images(), truth, brightest, entities, inputs, parcels=True)


def _transmit_map(head: Head) -> Image:
    sidecar = SCANNER | {"Units": "%", "Description": "Transmit field, 100 = nominal flip angle"}
    percent = (100 * head.transmit()).astype(np.float32)
    return Image("fmap", {}, "TB1map", percent, sidecar, noisy=False)


def dwi(head: Head, model: str = "nexi") -> Contrast:
    """Make the diffusion-weighted runs, one per diffusion time; `model` is "nexi" or "mcmicro"."""
    options: dict[str, Any] = {"l_max": 2} if model == "nexi" else {}
    values = {name: head.parameter(f"{model}.{name}") for name in DWI_MODELS[model]}
    b0 = DWI_SCALE * head.parameter("b0")
    scheme = diffusion_scheme()
    signals = _signal(model, scheme, values, **options)
    s0, s2 = signals[: len(scheme)], signals[len(scheme) :] if options else None
    fibres = head.fibres()

    def images() -> Iterator[Image]:
        for big_delta in SHELLS:
            bvals, directions = gradient_table(big_delta, head.seed)
            signal = np.empty((len(bvals), len(b0)), dtype=np.float32)
            signal[bvals == 0] = b0
            for i, (delta, b) in enumerate(_shells()):
                if delta == big_delta:
                    volumes = bvals == 1000 * b
                    cosine = directions[volumes] @ fibres.T
                    second = None if s2 is None else s2[i]
                    signal[volumes] = b0 * directional_signal(s0[i], second, cosine)
            gradients = bvals, _fsl_frame(directions, head.anatomy.affine)
            entities, sidecar = {"acq": f"D{big_delta:.0f}"}, _dwi_sidecar(big_delta)
            yield Image("dwi", entities, "dwi", head.volume(signal), sidecar, gradients)

    truth = _truth(model, scheme, values, head, **options)
    return Contrast(model, "dwi", images(), truth, head.white_matter(b0))


def diffusion_scheme() -> DiffusionScheme:
    """Return all shells of all runs, in their order."""
    big_delta, b = zip(*_shells(), strict=True)
    return DiffusionScheme(b, big_delta=big_delta, small_delta=SMALL_DELTA_MS)


def _shells() -> list[tuple[float, float]]:
    """Return Delta in ms and b in ms/um^2 of every shell."""
    return [(big_delta, b) for big_delta, shells in SHELLS.items() for b in shells]


DEFAULT_CONTRASTS = ("megre", "vfa", "dwi")
CONTRASTS = (*DEFAULT_CONTRASTS, "mwi")
"""Names on the command line; mwi, of 120 images a session, only on request."""
DWI_MODELS = {"nexi": ("fn", "dn", "de", "tex", "p2"), "mcmicro": ("fn", "d")}
"""Models that can make the diffusion signals, and their parameters."""


def make_contrast(
    name: str,
    head: Head,
    *,
    dwi_model: str = "nexi",
    phase: bool = False,
    progress: Progress = silent,
) -> Contrast:
    """Make the contrast of that name, one of `CONTRASTS`."""
    if name == "dwi":
        return dwi(head, dwi_model)
    if name == "mwi":
        return mwi(head, progress)
    return megre(head, phase=phase) if name == "megre" else vfa(head)


def measure(image: Image, sigma: float, rng: np.random.Generator) -> Iterator[Image]:
    """Yield the image as a scanner stores it: with noise, and in parts if it is complex.

    Magnitudes with noise (Rician) are whole numbers where rounding adds less than 1 % to the
    variance of the noise (sigma of 3 or more), floating point otherwise, so that an image without
    noise is exact. Phases are in radian.

    Parameters
    ----------
    image
        What to measure; a map stays as it is.
    sigma
        Standard deviation of real and imaginary part, in units of the image; 0 for none.
    rng
        Where the noise comes from.

    Yields
    ------
    Image
        The magnitude, int16 or float32, and of a complex image the phase, float32.
    """
    if not image.noisy:
        yield image
        return
    parted = np.iscomplexobj(image.data)
    real, imaginary = (image.data.real, image.data.imag) if parted else (image.data, 0.0)
    if sigma > 0:
        real, imaginary = (
            _noisy(part, image.data.shape, sigma, rng) for part in (real, imaginary)
        )
    magnitude = np.hypot(real, imaginary)
    whole = sigma >= 3 and magnitude.max() <= np.iinfo(np.int16).max
    stored = np.rint(magnitude).astype(np.int16) if whole else magnitude
    if not parted:
        yield replace(image, data=stored)
        return
    yield replace(image, data=stored, entities={**image.entities, "part": "mag"})
    yield replace(
        image,
        data=np.arctan2(imaginary, real),
        entities={**image.entities, "part": "phase"},
        metadata={**image.metadata, "Units": "rad"},
    )


def _noisy(
    values: np.ndarray | float, shape: tuple[int, ...], sigma: float, rng: np.random.Generator
) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= sigma
    noise += values
    return noise


def _relaxation(head: Head) -> dict[str, np.ndarray]:
    return {"M0": GRE_SCALE * head.parameter("M0"), "R1": 1 / head.parameter("T1")}


def _signal(
    name: str,
    scheme: DiffusionScheme | GradientEchoScheme,
    values: Mapping[str, np.ndarray],
    *,
    b1: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """Return what the model predicts for values (voxels,): float64 (measurements, voxels)."""
    model = get_model(name)(scheme, **options)
    inputs = None if b1 is None else {"b1": torch.from_numpy(b1)}
    params = {key: torch.from_numpy(value) for key, value in values.items()}
    return model.signal(params, inputs).numpy()


def _truth(
    name: str,
    scheme: DiffusionScheme | GradientEchoScheme,
    values: Mapping[str, np.ndarray],
    head: Head,
    **options: Any,
) -> Maps:
    """Return maps of all parameters and derived quantities of the model."""
    model = get_model(name)(scheme, **options)
    params = {key: torch.from_numpy(value) for key, value in values.items()}
    known = {key: value.numpy() for key, value in (params | model.derive(params)).items()}
    everywhere = np.ones(head.inside.sum(), dtype=bool)
    # Where there are no neurites, nothing but the diffusivity around them means anything.
    neurites = values["fn"] > 0 if name == "nexi" else everywhere
    return tuple(
        (p, true_map(known[p.name], everywhere if p.name in ("fn", "de") else neurites, head))
        for p in (*model.parameters, *model.derived)
    )


def gradient_table(big_delta: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return b (volumes,) in s/mm^2 and gradient directions (volumes, 3) in scanner coordinates.

    A b=0 volume before every shell and after the last; every shell has its own rotation of the
    same arrangement.
    """
    bvals: list[float] = []
    directions: list[np.ndarray] = []
    for b in SHELLS[big_delta]:
        rng = stream(seed, "directions", big_delta, b)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        directions += [np.zeros(3), *(spread_directions(N_DIRECTIONS) @ turn)]
        bvals += [0.0] + [1000 * b] * N_DIRECTIONS
    return np.array([*bvals, 0.0]), np.array([*directions, np.zeros(3)])


def _fsl_frame(directions: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return directions (volumes, 3) in scanner coordinates as FSL's bvec (3, volumes).

    That is along the voxel axes, the first reversed where the voxel axes are right-handed.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    bvecs = (directions @ axes).T
    if np.linalg.det(axes) > 0:
        bvecs[0] *= -1
    return bvecs


def _dwi_sidecar(big_delta: float) -> dict[str, Any]:
    return SCANNER | {
        "EchoTime": 0.058,
        "RepetitionTime": 3.2,
        "FlipAngle": 90,
        "PulseSequenceType": "Spin echo EPI",
        "MRAcquisitionType": "2D",
        "SmallDelta": SMALL_DELTA_MS / 1000,
        "BigDelta": big_delta / 1000,
        "PhaseEncodingDirection": "j-",
        "TotalReadoutTime": 0.03,
    }
