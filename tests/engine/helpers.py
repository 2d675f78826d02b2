"""Acquisitions and random voxels that several engine tests use."""

import json

import numpy as np
import torch

from bids_gacelle.engine import (
    DiffusionScheme,
    GradientEchoScheme,
    Parameter,
    SignalModel,
    get_model,
)

# Shells of a published NEXI protocol: b in ms/um^2 at three diffusion times in ms.
_SHELLS = [2.3, 3.5, 4.8, 6.5]
NEXI_B = [*_SHELLS, *_SHELLS, 11.3, *_SHELLS, 11.3, 17.3]
NEXI_DELTA = [13.0] * 4 + [21.0] * 5 + [30.0] * 6
NEXI_PULSES = [4.5] * 4 + [6.0] * 11
# Shells of a published AxCaliber-SMT protocol with pulses of 6 ms.
AXCALIBER_B = [
    0.05,
    0.35,
    0.8,
    1.5,
    2.4,
    3.45,
    4.75,
    6.0,
    0.2,
    0.95,
    2.3,
    4.25,
    6.75,
    9.85,
    13.5,
    17.8,
]
AXCALIBER_DELTA = [13.0] * 8 + [30.0] * 8
# Weights and echo times in s of a published multi-echo protocol, relative to b=0 at the first.
TWO_ECHOES = {"b": [0.5, 1, 2, 6, 0, 0.5, 1, 2, 6], "echo_time": [0.054] * 4 + [0.092] * 5}


# Echoes in s at several flip angles in degrees of published protocols of myelin water imaging.
MCR_ECHOES = 2.2e-3 + 3.07e-3 * np.arange(12)
MCR_FLIPS = [5.0, 10.0, 20.0, 50.0, 70.0]
# All that fibres from diffusion can tell.
DIFFUSION = {"fit_iwf": False, "fit_freq_mw": False, "fit_freq_iw": False, "fit_r2s_ew": False}


def flip_angles(echoes, flips, **columns):
    """Return the scheme of every echo at every flip angle."""
    return GradientEchoScheme(
        echo_time=np.tile(echoes, len(flips)),
        flip_angle=np.repeat(flips, len(echoes)),
        **columns,
    )


def make_model(name, **options):
    schemes = {
        "r2star": GradientEchoScheme(echo_time=np.arange(1, 9) * 4e-3, field_strength=3),
        # Unequal repetition times and numbers of echoes, as in multi-parameter mapping.
        "r1r2star": GradientEchoScheme(
            echo_time=[*np.arange(1, 9) * 2.3e-3, *np.arange(1, 7) * 2.3e-3],
            flip_angle=[6.0] * 8 + [21.0] * 6,
            repetition_time=[0.024] * 8 + [0.018] * 6,
        ),
        "gremwi": GradientEchoScheme(echo_time=1.5e-3 + 2.9e-3 * np.arange(15), field_strength=3),
        "mcrmwi": flip_angles(MCR_ECHOES, MCR_FLIPS, repetition_time=0.038, field_strength=3),
        "despot1": GradientEchoScheme(flip_angle=[3, 8, 14, 20, 28], repetition_time=0.02),
        "mcmicro": DiffusionScheme(b=[0.3, 0.7, 1.0, 2.0, 3.0, 5.0]),
        "nexi": DiffusionScheme(b=NEXI_B, big_delta=NEXI_DELTA),
        "axcalibersmt": DiffusionScheme(b=AXCALIBER_B, big_delta=AXCALIBER_DELTA, small_delta=6.0),
        "sandi": DiffusionScheme([0.05, 0.3, 0.8, 1.5, 2.3, 3.5, 4.8, 6.5], 13.0, 6.0),
        "meaxcalibersmt": DiffusionScheme(
            b=[*AXCALIBER_B, 0.0, *AXCALIBER_B],
            big_delta=[*AXCALIBER_DELTA, 13.0, *AXCALIBER_DELTA],
            small_delta=6.0,
            echo_time=[0.051] * 16 + [0.092] * 17,
        ),
        "axonalt2": DiffusionScheme(
            b=[6.0] * 6 + [8.0] * 6, echo_time=[0.052, 0.062, 0.072, 0.092, 0.112, 0.132] * 2
        ),
    }
    schemes["nexidot"] = schemes["nexi"]
    schemes["smex"] = schemes["sandix"] = DiffusionScheme(
        b=NEXI_B, big_delta=NEXI_DELTA, small_delta=NEXI_PULSES
    )
    if options.get("relaxation"):
        schemes["mcmicro"] = DiffusionScheme(**TWO_ECHOES)
    return get_model(name)(schemes[name], **options)


ALL_MODELS = [
    ("r2star", {}),
    ("r2star", {"signal": "complex"}),
    ("despot1", {}),
    ("r1r2star", {}),
    ("gremwi", {}),
    ("gremwi", {"signal": "magnitude"}),
    ("gremwi", DIFFUSION),
    ("gremwi", {"fit_freq_mw": False, "fit_r2s_ew": False, "fibres": 2}),
    ("mcrmwi", {"steady_state": "ideal"}),
    ("mcrmwi", {"steady_state": "ideal", "signal": "magnitude"}),
    ("mcrmwi", {"steady_state": "ideal", "fibres": 2} | DIFFUSION),
    ("mcrmwi", {"steady_state": "ideal", "exchange": False, "share_background": True}),
    ("mcmicro", {}),
    ("nexi", {}),
    ("nexi", {"l_max": 2}),
    ("nexi", {"l_max": 4}),
    ("nexidot", {}),
    ("nexidot", {"l_max": 2}),
    ("smex", {}),
    ("smex", {"l_max": 4}),
    ("sandix", {}),
    ("sandix", {"l_max": 2, "ds": 2.5}),
    ("axcalibersmt", {}),
    ("axcalibersmt", {"limit": "neuman"}),
    ("sandi", {}),
    ("sandi", {"limit": "neuman"}),
    ("meaxcalibersmt", {}),
    ("meaxcalibersmt", {"fit_r2a": True, "fit_k2a": True}),
    ("meaxcalibersmt", {"limit": "neuman", "r2csf": 0.0}),
    ("axonalt2", {}),
    ("axonalt2", {"fit_r2a": True, "fit_k2a": True}),
    ("mcmicro", {"relaxation": True}),
]


def draw(model, n, seed, *, within="start"):
    """Draw parameters from the start boxes or the bounds, with exact edges among the latter."""
    rng = np.random.default_rng(seed)
    params = {}
    for p in model.parameters:
        low, high = (0.5, 2.0) if p.amplitude else getattr(p, within)
        unit = rng.random(n)
        if within == "bounds":
            unit = np.clip(1.3 * unit - 0.15, 0, 1)
        params[p.name] = torch.tensor(low + (high - low) * unit)
        if within == "bounds" and p.coordinate == "log":
            params[p.name] = torch.tensor(low * (high / low) ** unit).clamp(low, high)
    return params


def everywhere(model, n, seed):
    """Draw points: half from the start boxes, half from the bounds with exact edges among them.

    A quarter has sticks that diffuse along the gradient as their surroundings do, at a node.
    """
    typical, others = draw(model, n // 2, seed), draw(model, n - n // 2, seed + 1, within="bounds")
    params = {name: torch.cat((typical[name], others[name])) for name in typical}
    if {"dn", "de"} <= params.keys():
        squares = model._rules[torch.float64][0] if hasattr(model, "_rules") else [1.0]
        cosine2 = torch.tensor(np.random.default_rng(seed + 2).choice(squares, n))[::4]
        de = (params["dn"][::4] * cosine2).clamp_min(0.1)
        params["de"][::4], params["dn"][::4] = de, (de / cosine2).clamp_max(3.5)
    return params


def differences(model, params, inputs, name):
    """Return the derivative by a parameter to fourth order in the step, and the step."""
    value = params[name]
    box = next(p.start for p in model.parameters if p.name == name)
    step = 3e-4 * torch.where(value > 0.01, value, 1.0)
    if box is not None:  # not far beyond a bound, of parameters much smaller than 1
        step = step.clamp_max(3e-5 * (box[1] - box[0]))
    signal = [model.signal(params | {name: value + k * step}, inputs) for k in (-2, -1, 1, 2)]
    return (8 * (signal[2] - signal[1]) - (signal[3] - signal[0])) / (12 * step), step


def draw_inputs(model, n, seed):
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(model.input_defaults[name] * rng.uniform(0.7, 1.3, n))
        for name in model.voxel_inputs
    }


def noisy(model, params, sd, seed, inputs=None):
    """Return data (measurements, voxels) with Gaussian noise; sd a number or (voxels,)."""
    signal = model.signal(params, inputs).numpy()
    return signal + np.random.default_rng(seed).normal(size=signal.shape) * sd


def read(shared, name):
    return json.loads((shared / "reference" / f"{name}.json").read_text())


def even_directions(n: int, seed: int = 0) -> np.ndarray:
    """Directions spread by electrostatic repulsion of antipodal pairs."""
    g = np.random.default_rng(seed).normal(size=(n, 3))
    g /= np.linalg.norm(g, axis=1)[:, None]
    for _ in range(300):
        force = np.zeros_like(g)
        for sign in (1, -1):
            difference = g[:, None] - sign * g[None]
            distance = np.linalg.norm(difference, axis=2) + np.eye(n) * 1e9
            force += (difference / distance[..., None] ** 3).sum(axis=1)
        g += 0.3 / n * force / np.abs(force).max()
        g /= np.linalg.norm(g, axis=1)[:, None]
    return g


class Line(SignalModel):
    """S = offset + log(factor) t: linear in the solver's coordinates, so all is closed form.

    Written as a user would, without Jacobian or guess.
    """

    name = "line"
    title = "Line"
    description = "A straight line."
    kind = "megre"
    datatype = "anat"
    signed = True
    required = ("echo_time",)
    parameters = (
        Parameter("offset", "1", "Offset", bounds=(-10.0, 10.0), start=(-1.0, 1.0)),
        Parameter(
            "factor", "1", "Factor", bounds=(0.05, 20.0), start=(0.5, 2.0), coordinate="log"
        ),
    )
    derived = (Parameter("product", "1", "offset x factor"),)

    def signal(self, params, inputs=None):
        time = self.table("time", self.scheme.echo_time, params["offset"])
        return params["offset"] + torch.log(params["factor"]) * time

    def derive(self, params):
        return {"product": params["offset"] * params["factor"]}

    @classmethod
    def of(cls, times):
        return cls(GradientEchoScheme(echo_time=times))


class Square(Line):
    """S = offset^2 + t: two equal minima at +-offset."""

    name = "square"
    starts = 4
    parameters = (Parameter("offset", "1", "Offset", bounds=(-3.0, 3.0), start=(-2.0, 2.0)),)
    derived = ()

    def signal(self, params, inputs=None):
        time = self.table("time", self.scheme.echo_time, params["offset"])
        return params["offset"] ** 2 + time

    def derive(self, params):
        return {}
