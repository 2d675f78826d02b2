"""Multi-compartment relaxometry for myelin water imaging, from echoes at several flip angles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.gradient_echo import BACKGROUND, INITIAL_PHASE
from bids_gacelle.engine.models.threepools import (
    AMPLITUDE,
    DECAYS,
    FRACTIONS,
    SHIFTS,
    TIMES,
    WHARTON,
    WHITE_MATTER,
    ThreePools,
    typical,
)
from bids_gacelle.engine.physics.epgx import spoiled_steady_state, truncation_order
from bids_gacelle.engine.physics.epgx_derivatives import spoiled_steady_state_derivatives
from bids_gacelle.engine.physics.steady_state import rational_fit
from bids_gacelle.engine.physics.surrogate import (
    R2_MYELIN,
    Surrogate,
    model_card,
    outside_range,
)
from bids_gacelle.engine.physics.two_pools import bloch_mcconnell
from bids_gacelle.engine.scheme import GradientEchoScheme

_RELAXATION = (
    Parameter(
        "R1IEW",
        "1/s",
        "Longitudinal relaxation rate of intra-axonal and extra-cellular water",
        bounds=(0.2, 2.0),
        start=(0.5, 1.5),
        window=(0.0, 2.0),
        suffix="R1map",
        compartment="IEW",
    ),
    Parameter(
        "kIEWM",
        "1/s",
        "Exchange rate from intra-axonal and extra-cellular water to myelin water",
        bounds=(0.0, 10.0),
        start=(0.0, 4.0),
        window=(0.0, 5.0),
    ),
)


# Flip angles that steady states with spoiling are computed for; at 180 degrees they have a pole.
_SIMULATED_DEG = (1e-3, 175.0)
# Slower decay takes more orders of the phase graph, and is not that of tissue.
_LEAST_R2S = 1 / 0.15


def _limited(parameter: Parameter) -> Parameter:
    """Return the decay of water outside of myelin within what steady states are computed for."""
    if parameter.compartment == "MW":
        return parameter
    return replace(parameter, bounds=(_LEAST_R2S, parameter.bounds[1]))


class McrMwi(ThreePools):
    """Myelin, intra-axonal and extra-cellular water in steady states of several flip angles.

    `ThreePools` whose magnetisations are steady states of two pools, myelin water (volume fraction
    f, T1 ``t1_myelin``) and all other water (R1IEW), that exchange at the rate kIEWM:

    A_MW = rho V m_MW, A_IEW = V m_IEW, V = 1 - MWF + MWF / rho, f = MWF / (rho V).

    The equilibrium magnetisation is S0, so that MWF does not depend on T1. An excitation is a pair
    of flip angle and repetition time; with ``share_background=False`` each has its own dfreqBKG1,
    dfreqBKG2, ..., by flip angle.

    ``steady_state`` says how m is found: "epgx", with spoiling by gradients and RF phase (with the
    increment of the acquisition, or ``spoiling_increment`` in degrees where it is not known);
    "surrogate", by a network in place of that, within the range it was trained for; or "ideal",
    the Bloch-McConnell steady state with no transverse magnetisation left before a pulse. For
    spoiling, T2 of myelin water is 15 ms, and that of the other water 1 / R2sIW.

    With ``exchange=False`` the pools do not exchange, and kIEWM is not fitted.
    """

    name = "mcrmwi"
    title = "Multi-compartment relaxometry myelin water imaging"
    description = (
        "The signals of every voxel at several flip angles and echo times were fitted with three "
        "pools of water, in myelin, inside and outside of axons, each with its own effective "
        "transverse relaxation rate and frequency, in the steady state of spoiled gradient echoes "
        "of myelin water of fixed T1 and other water, with exchange of magnetisation where it was "
        "fitted; where diffusion informed the fit, frequencies and dephasing followed from hollow "
        "cylinders. Nominal flip angles were multiplied by the relative transmit field where such "
        "a map was given."
    )
    references = (
        Reference(
            "chan2020",
            "Chan KS, Marques JP. Multi-compartment relaxometry and diffusion informed myelin "
            "water imaging - promises and challenges of new gradient echo myelin water imaging "
            "methods. NeuroImage 2020;221:117159.",
            "10.1016/j.neuroimage.2020.117159",
        ),
        WHARTON,
    )
    kind = "vfa"
    minimum_measurements = 8
    minimum_echo_times = 2
    required = ("echo_time", "flip_angle", "repetition_time", "field_strength")
    plausibility = ("first-echo", "r2star", "t1")
    options = ThreePools.SHARED_OPTIONS | {
        "exchange": True,
        "steady_state": "epgx",
        "t1_myelin": 0.234,
        "spoiling_increment": 50.0,
        "share_background": False,
    }
    choices = ThreePools.choices | {"steady_state": ("epgx", "surrogate", "ideal")}
    option_limits = ThreePools.option_limits | {
        "t1_myelin": (0.01, 5.0),  # a number of ms is out of it
        "spoiling_increment": (-360.0, 360.0),
    }
    starts = 1
    compile_from = 1 << 30  # a step of so many parameters takes many minutes to compile
    voxel_inputs = ("b1",)
    input_defaults = {"b1": 1.0}  # noqa: RUF012
    tissues = {  # noqa: RUF012
        "white matter": WHITE_MATTER | {"R1IEW": 0.95, "kIEWM": 2.0},
    }
    parameters = (
        AMPLITUDE,
        *FRACTIONS,
        *_RELAXATION,
        *(_limited(parameter) for parameter in DECAYS),
        *SHIFTS,
        BACKGROUND,
        INITIAL_PHASE,
    )
    derived = (
        Parameter(
            "T1IEW",
            "s",
            "Longitudinal relaxation time of intra-axonal and extra-cellular water",
            window=(0.0, 2.5),
            suffix="T1map",
            compartment="IEW",
        ),
        *TIMES,
    )
    exchange: bool
    steady_state: str
    t1_myelin: float

    def __init__(self, scheme: GradientEchoScheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        if len(self.excitations) < 2:
            raise EngineError(
                f"{self.name} needs at least two different flip angles or repetition times, got "
                f"one ({self.excitations[0, 0]:g} degrees): gremwi fits a single one."
            )
        self.increment = self._increment()
        f, r2, r2_myelin, exchange, tr = torch.tensor(
            [0.0, _LEAST_R2S, R2_MYELIN, 0.0, float(self.excitations[:, 1].min())]
        ).double()
        # The bound is far from sharp: with these orders the error stays below 1e-6.
        self._orders = int(truncation_order(f, r2, r2_myelin, exchange, tr, tolerance=1e-4))
        self.surrogate = None
        angles = _SIMULATED_DEG
        if self.steady_state == "surrogate":
            self.surrogate, angles = self._find_surrogate()
        if self.steady_state != "ideal":
            nominal = self.excitations[:, 0]
            limits = (angles[0] / float(nominal.min()), angles[1] / float(nominal.max()))
            self.input_limits = self.input_limits | {"b1": limits}
        self.shaping = ("MWF", "R1IEW", "kIEWM") if self.exchange else ("MWF", "R1IEW")
        if self.steady_state != "ideal":
            self.shaping += ("R2sIW",)

    def all_parameters(self) -> tuple[Parameter, ...]:
        """Return what is fitted to complex images if diffusion tells nothing."""
        found = []
        for parameter in McrMwi.parameters:
            if parameter is BACKGROUND and not self.chosen["share_background"]:
                found += [self._background(n) for n in range(len(self.excitations))]
            elif parameter.name != "kIEWM" or self.chosen["exchange"]:
                found.append(parameter)
        return tuple(found)

    def magnetisation(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        """Return the steady states, (2 pools, parts, excitations, ...)."""
        volume, pools = self._pools(params, inputs)
        if self.steady_state == "ideal":
            states = [signal[None] for signal in bloch_mcconnell(**pools)]
        elif self.surrogate is not None:
            found = self.surrogate(**pools, r2_free=params["R2sIW"])
            states = [
                _from_polar(found.free, found.free_phase),
                _from_polar(found.myelin, found.myelin_phase),
            ]
        else:
            states = [_parts(m) for m in spoiled_steady_state(**pools, **self._spoiling(params))]
        free, myelin = states
        return torch.stack((self.rho * volume * myelin, volume * free))

    def _state_slopes(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the magnetisations and their derivatives by the parameters that shape them."""
        if self.steady_state != "epgx":
            return super()._state_slopes(params, inputs)
        volume, pools = self._pools(params, inputs)
        found = spoiled_steady_state_derivatives(**pools, **self._spoiling(params))
        state, by_fraction, by_r1, by_r2, by_exchange = (
            torch.stack((self.rho * _parts(z[1]), _parts(z[0]))) for z in found[:5]
        )
        by_volume = 1 / self.rho - 1
        slopes = {
            # f = MWF / (rho V), so that df / dMWF = 1 / (rho V^2)
            "MWF": by_volume * state + by_fraction / (self.rho * volume),
            "R1IEW": volume * by_r1,
            "R2sIW": volume * by_r2,
            "kIEWM": volume * by_exchange,
        }
        return volume * state, {name: slopes[name] for name in self.shaping}

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return relaxation times in s."""
        return {"T1IEW": 1 / params["R1IEW"]} | super().derive(params)

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return a start around the R2* and R1 that one pool would have."""
        magnitude = torch.hypot(*data.unflatten(0, (2, -1))) if self.is_complex else data
        rate, at_zero = self.decay(magnitude)
        like = data[0]
        r1 = rational_fit(at_zero, self.flip_angle(inputs, like), self.repetition_time(like))
        values = typical(rate, signed=self.is_complex) | {
            "R1IEW": torch.where(r1 > 0, r1, torch.nan),
            "kIEWM": torch.ones_like(rate),
        }
        return self.start_from(data, inputs, values)

    def _pools(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the volume that the water of unit S0 fills, and what its two pools are."""
        mwf, r1 = params["MWF"], params["R1IEW"]
        volume = 1 - mwf + mwf / self.rho
        pools: dict[str, Any] = {
            "fraction": mwf / (self.rho * volume),
            "r1_free": r1,
            "r1_myelin": torch.full_like(r1, 1 / self.t1_myelin),
            "exchange": params["kIEWM"] if self.exchange else torch.zeros_like(r1),
            "tr": self.repetition_time(r1),
            "angle": self.flip_angle(inputs, r1),
        }
        return volume, pools

    def _spoiling(self, params: dict[str, Tensor]) -> dict[str, Any]:
        """Return what a simulation needs besides the pools."""
        r2 = params["R2sIW"]
        return {
            "r2_free": r2,
            "r2_myelin": torch.full_like(r2, R2_MYELIN),
            "increment": self.increment,
            "orders": self._orders,
        }

    def _find_surrogate(self) -> tuple[Surrogate, tuple[float, float]]:
        """Return the surrogate and the flip angles in degrees that it is for.

        Raises
        ------
        EngineError
            It was not made for this protocol.
        """
        angles = np.deg2rad(self.excitations[:, 0]).tolist()
        for time in np.unique(self.excitations[:, 1]).tolist():
            if wrong := outside_range(time, angles, self.t1_myelin, self.increment):
                raise EngineError(
                    f"{self.name}: {wrong} Set steady_state='epgx', which computes the steady "
                    "states of any protocol."
                )
        share = next(p for p in FRACTIONS if p.name == "MWF").bounds[1]
        share /= share + (1 - share) * self.rho
        trained = model_card()["ranges"]["fraction"][1]
        if share > trained:
            raise EngineError(
                f"{self.name}: with rho={self.rho:.4g} myelin fills up to {share:.3g} of the "
                f"volume, but the surrogate of EPG-X was trained up to {trained:g}. Set "
                "steady_state='epgx', which computes the steady states of any protocol."
            )
        low, high = model_card()["ranges"]["angle_deg"]
        return Surrogate(self.increment), (low, high)

    def _background(self, number: int) -> Parameter:
        angle, time = self.excitations[number]
        return replace(
            BACKGROUND,
            name=f"{BACKGROUND.name}{number + 1}",
            description=f"{BACKGROUND.description}, flip angle {angle:g} deg, TR {time:g} s",
        )

    def _increment(self) -> float:
        """Return the increment of the RF phase in degrees."""
        given = self.scheme.spoiling_increment
        if given is None:
            return float(self.chosen["spoiling_increment"])
        if np.ptp(given) > 0:
            raise EngineError(
                f"{self.name} needs one increment of the RF phase for all images, got "
                f"{given.min():g} to {given.max():g} degrees."
            )
        return float(given[0])


def _parts(z: Tensor) -> Tensor:
    """Return real and imaginary parts, on axis 0."""
    return torch.stack((z.real, z.imag))


def _from_polar(size: Tensor, phase: Tensor) -> Tensor:
    """Return real and imaginary parts of size exp(i phase), on axis 0."""
    return torch.stack((size * torch.cos(phase), size * torch.sin(phase)))
