"""Three pools of water that dephase: what the models of myelin water have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.gradient_echo import (
    BACKGROUND,
    INITIAL_PHASE,
    GradientEchoModel,
)
from bids_gacelle.engine.physics import hollow_cylinder
from bids_gacelle.engine.physics.phase import phase_between, times_i
from bids_gacelle.engine.scheme import GradientEchoScheme

MYELIN_WATER_DENSITY = 0.36 / 0.86
"""Water of myelin per volume, relative to that of the other tissue."""

# What the hollow cylinder gives when it is not fitted, and the option that tells.
_FROM_FIBRES = {"freqMW": "fit_freq_mw", "freqIW": "fit_freq_iw", "R2sEW": "fit_r2s_ew"}
_ANGLE, _IWF = 0.9, 0.6  # stand in for maps where there are no voxels

WHARTON = Reference(
    "wharton2012",
    "Wharton S, Bowtell R. Fiber orientation-dependent white matter contrast in gradient echo "
    "MRI. Proc Natl Acad Sci USA 2012;109:18559-18564.",
    "10.1073/pnas.1211075109",
)


def _rate(pool: str, words: str, bounds: tuple[float, float], start: tuple[float, float]) -> Any:
    return Parameter(
        f"R2s{pool}",
        "1/s",
        f"Effective transverse relaxation rate of {words}",
        bounds=bounds,
        start=start,
        window=(0.0, 200.0 if pool == "MW" else 50.0),
        suffix="R2starmap",
        compartment=pool,
    )


def _shift(pool: str, words: str, bounds: tuple[float, float], start: tuple[float, float]) -> Any:
    return Parameter(
        f"freq{pool}",
        "ppm",
        f"Frequency of {words} relative to extra-cellular water",
        bounds=bounds,
        start=start,
        window=(-0.1, 0.1),
        colormap="RdBu_r",
    )


AMPLITUDE = Parameter(
    "S0",
    "arbitrary",
    "Signal of all water extrapolated to an echo time of zero",
    bounds=(0.0, float("inf")),
    suffix="S0map",
    colormap="gray",
    amplitude=True,
)
FRACTIONS = (
    Parameter(
        "MWF",
        "1",
        "Myelin water fraction",
        bounds=(0.001, 0.5),
        start=(0.02, 0.25),
        window=(0.0, 0.25),
        suffix="MWFmap",
    ),
    Parameter(
        "IWF",
        "1",
        "Intra-axonal share of the water outside of myelin",
        bounds=(0.01, 0.99),
        start=(0.3, 0.9),
        window=(0.0, 1.0),
    ),
)
DECAYS = (
    _rate("MW", "myelin water", (40.0, 300.0), (60.0, 150.0)),
    _rate("IW", "intra-axonal water", (2.0, 50.0), (8.0, 25.0)),
    _rate("EW", "extra-cellular water", (2.0, 50.0), (14.0, 35.0)),
)
SHIFTS = (
    _shift("MW", "myelin water", (-0.1, 0.25), (0.0, 0.12)),
    _shift("IW", "intra-axonal water", (-0.1, 0.05), (-0.04, 0.01)),
)
TIMES = tuple(
    Parameter(
        f"T2s{pool}",
        "s",
        f"Effective transverse relaxation time of {words}",
        window=(0.0, 0.03 if pool == "MW" else 0.12),
        suffix="T2starmap",
        compartment=pool,
    )
    for pool, words in (
        ("MW", "myelin water"),
        ("IW", "intra-axonal water"),
        ("EW", "extra-cellular water"),
    )
)

# Customary starting values of white matter at 3 T, no measurement of one tissue.
WHITE_MATTER = {
    "MWF": 0.12,
    "IWF": 0.6,
    "R2sMW": 100.0,
    "R2sIW": 16.0,
    "R2sEW": 22.0,
    "freqMW": 0.04,
    "freqIW": -0.01,
}
PARAMETERS = (AMPLITUDE, *FRACTIONS, *DECAYS, *SHIFTS, BACKGROUND, INITIAL_PHASE)


class ThreePools(GradientEchoModel):
    """Myelin, intra-axonal and extra-cellular water (MW, IW, EW), alike in all gradient echoes.

    S = S0 sum_pools A exp(-TE R2s) exp(i theta),
    theta = 2 pi gamma B0 (freq + dfreqBKG) TE + dpini,

    with frequencies in ppm, that of EW being 0 by definition. The water outside of myelin is split
    by A_IW = IWF A_IEW, A_EW = (1 - IWF) A_IEW. A subclass says by `magnetisation` what A_MW and
    A_IEW are, complex and different for each excitation. Magnitudes have neither dfreqBKG nor
    dpini.

    Diffusion informs what is not fitted, as fibres are hollow cylinders (`hollow_cylinder`):

    - ``fit_iwf=False`` takes IWF from the voxel input `iwf`;
    - ``fit_freq_mw=False`` and ``fit_freq_iw=False`` take freqMW and freqIW from the cylinder;
    - ``fit_r2s_ew=False`` makes R2sEW the R2sIW, and has EW dephase in the field of the cylinders.

    The cylinders of a voxel have the angles `theta1`, `theta2`, ... in rad to the main field; with
    several (``fibres``) each has the share of `ff1`, `ff2`, ... in their sum. Their g-ratio and
    volume fraction follow from MWF, IWF and ``rho``, the water per volume of myelin relative to
    that of other tissue.

    Attributes
    ----------
    shaping
        Names of the parameters that the magnetisations depend on.
    """

    default_prior = "weak"  # without it the pools of a voxel are told apart by its noise
    max_evaluations = 200  # without a prior the last few take long along a flat valley
    SHARED_OPTIONS: ClassVar[dict[str, Any]] = {
        "signal": "complex",
        "fit_iwf": True,
        "fit_freq_mw": True,
        "fit_freq_iw": True,
        "fit_r2s_ew": True,
        "fibres": 1,
        "rho": MYELIN_WATER_DENSITY,
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"signal": ("complex", "magnitude")}
    option_limits: ClassVar[dict[str, tuple[float, float]]] = {
        "fibres": (1, 9),
        "rho": (0.01, 1.0),
    }
    input_limits = {"iwf": (0.0, 1.0)} | {
        f"{name}{n}": (0.0, float("inf")) for name in ("theta", "ff") for n in range(1, 10)
    }
    shaping: tuple[str, ...] = ("MWF",)
    fibres: int
    rho: float

    def __init__(self, scheme: GradientEchoScheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        given = {name for name, option in _FROM_FIBRES.items() if not self.chosen[option]}
        self.has_cylinders = bool(given)
        if not self.chosen["fit_iwf"]:
            given.add("IWF")
        if not self.is_complex:
            given |= {"dfreqBKG", "dpini"}
        wanted = self.all_parameters()
        self.parameters = tuple(p for p in wanted if not {p.name, _root(p.name)} & given)
        self.derived = tuple(p for p in self.derived if p.name != "T2sEW" or "R2sEW" not in given)
        needed = self.needed_inputs(self.chosen)
        typical = {"iwf": _IWF} | {f"ff{n}": 1.0 for n in range(1, 10)}
        self.voxel_inputs = (*type(self).voxel_inputs, *needed)
        self.input_defaults = type(self).input_defaults | {
            name: typical.get(name, _ANGLE) for name in needed
        }

    @classmethod
    def check_options(cls, options: Mapping[str, object]) -> None:
        """Check constructor options; several fibres need something that they tell."""
        super().check_options(options)
        chosen = cls.options | dict(options)
        if chosen["fibres"] > 1 and all(chosen[name] for name in _FROM_FIBRES.values()):
            raise EngineError(
                f"{cls.name} fits all that fibres would tell: with fibres={chosen['fibres']}, "
                f"also set one of {', '.join(_FROM_FIBRES.values())} to False."
            )

    @classmethod
    def needed_inputs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the maps that diffusion must give with these options."""
        chosen = cls.options | dict(options)
        needed = [] if chosen["fit_iwf"] else ["iwf"]
        if not all(chosen[option] for option in _FROM_FIBRES.values()):
            for n in range(1, chosen["fibres"] + 1):
                needed += [f"theta{n}", f"ff{n}"] if chosen["fibres"] > 1 else [f"theta{n}"]
        return tuple(needed)

    def all_parameters(self) -> tuple[Parameter, ...]:
        """Return what is fitted to complex images if diffusion tells nothing."""
        return type(self).parameters

    @abstractmethod
    def magnetisation(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        """Return A_MW and A_IEW, (2 pools, 1 part or real and imaginary, excitations, ...)."""

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signal of each image; shapes as in `SignalModel.signal`."""
        state = self.magnetisation(params, inputs)
        units, _ = self._units(params, inputs)
        z = params["S0"] * sum_of_products(self._amplitudes(state, params, inputs), units)
        return z.flatten(0, 1) if self.is_complex else torch.hypot(*z)

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by the parameters, in their order."""
        state, by_state = self._state_slopes(params, inputs)
        units, by_units = self._units(params, inputs, slopes=True)
        amplitudes = self._amplitudes(state, params, inputs)
        myelin, axon, extra = (times(a, u) for a, u in zip(amplitudes, units, strict=True))
        total = myelin + axon + extra
        time, radians = self.echo_time(params["S0"]), self.radians(params["S0"])
        slow = axon if self.chosen["fit_r2s_ew"] else axon + extra
        columns = {
            "R2sMW": -time * myelin,
            "R2sIW": -time * slow,
            "R2sEW": -time * extra,
            "freqMW": radians * times_i(myelin),
            "freqIW": radians * times_i(axon),
            "dpini": times_i(total),
        }
        turned = radians * columns["dpini"]
        for name, mask in self._backgrounds(params["S0"]).items():
            columns[name] = turned * mask
        if self.chosen["fit_iwf"]:
            water = self.per_image_parts(state[1])
            columns["IWF"] = times(water, units[1] - units[2])
        for name, slope in by_state.items():
            column = sum_of_products(self._amplitudes(slope, params, inputs), units)
            columns[name] = columns[name] + column if name in columns else column
        for name, slopes in by_units.items():
            columns[name] = columns[name] + sum_of_products(amplitudes, slopes)
        scaled = [params["S0"] * columns[n] for n in self.parameter_names[1:]]
        return self._as_measured(params["S0"] * total, [total, *scaled])

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return relaxation times in s."""
        return {
            p.name: 1 / params["R" + p.name[1:]] for p in self.derived if p.suffix == "T2starmap"
        }

    def start_from(
        self, data: Tensor, inputs: Inputs | None, values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Complete the values of a start: frequencies and phase such that they suit the data.

        Parameters
        ----------
        data
            (measurements, voxels).
        inputs
            As in `signal`.
        values
            All but dfreqBKG and dpini.
        """
        wanted = {name: values[name] for name in self.parameter_names if name in values}
        if not self.is_complex:
            return wanted
        parts = data.unflatten(0, (2, -1))
        frequencies = self.phases(parts)[0]
        names = list(self._backgrounds(data[0]))
        if len(names) == 1:
            frequencies = frequencies.mean(0, keepdim=True)
        wanted |= dict(zip(names, frequencies, strict=True))
        rest = {"S0": torch.ones_like(data[0]), "dpini": torch.zeros_like(data[0])}
        model = self.signal(wanted | rest, inputs).unflatten(0, (2, -1))
        return wanted | {"dpini": phase_between(model, parts)}

    def per_image_parts(self, state: Tensor) -> Tensor:
        """Return complex values of excitations, (parts, excitations, ...), for their images."""
        return torch.stack([self.per_image(part) for part in state])

    def _as_measured(self, z: Tensor, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the signal and its derivatives from the complex ones, (2, images, ...)."""
        if self.is_complex:
            return z.flatten(0, 1), torch.stack([c.flatten(0, 1) for c in columns])
        size = torch.hypot(*z)
        direction = z / size.clamp_min(torch.finfo(z.dtype).tiny)
        return size, torch.stack([(direction * c).sum(0) for c in columns])

    def _backgrounds(self, like: Tensor) -> dict[str, Tensor]:
        """Return the names of the background frequencies, and 1 at the images that have them."""
        names = [n for n in self.parameter_names if _root(n) == "dfreqBKG"]
        if len(names) == 1:
            return {names[0]: torch.ones_like(self.echo_time(like))}
        return {
            name: self.table(name, self._images_of[number], like)
            for number, name in enumerate(names)
        }

    def _iwf(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        if "IWF" in params:
            return params["IWF"]
        return self.voxel_input("iwf", inputs, params["MWF"])

    def _amplitudes(
        self, state: Tensor, params: dict[str, Tensor], inputs: Inputs | None
    ) -> list[Tensor]:
        """Return the amplitudes of the three pools, (parts, images, ...) each."""
        iwf = self._iwf(params, inputs)
        myelin, water = (self.per_image_parts(pool) for pool in state)
        return [myelin, iwf * water, (1 - iwf) * water]

    def _state_slopes(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the magnetisations and their derivatives by the parameters that shape them."""
        values = tuple(params[name] for name in self.shaping)

        def state(*values: Tensor) -> Tensor:
            return self.magnetisation(
                params | dict(zip(self.shaping, values, strict=True)), inputs
            )

        return _slopes(state, self.shaping, values)

    def _units(
        self, params: dict[str, Tensor], inputs: Inputs | None, *, slopes: bool = False
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return what the amplitudes of the three pools are multiplied by, (2, images, ...) each.

        With `slopes` also derivatives by the parameters that shape the cylinders.
        """
        if not self.has_cylinders:
            return self._fibre_units(params, params["freqMW"], params["freqIW"], None), {}
        shaping = [name for name in ("MWF", "IWF") if name in params]
        values = tuple(params[name] for name in shaping)

        def cylinders(*values: Tensor) -> Tensor:
            return self._cylinders(params | dict(zip(shaping, values, strict=True)), inputs)

        found, by = _slopes(cylinders, shaping if slopes else [], values)
        units = [torch.zeros(())] * 3
        by_units = dict.fromkeys(by, units)
        for n, weight in enumerate(self._weights(params, inputs)):
            myelin, axon, rate, volume = found[n]
            exponent, steepness = self._dephasing(rate, volume)
            fibre = [weight * unit for unit in self._fibre_units(params, myelin, axon, exponent)]
            units = [total + unit for total, unit in zip(units, fibre, strict=True)]
            for name, slope in by.items():
                change = self._fibre_slopes(fibre, slope[n], volume, exponent, steepness)
                by_units[name] = [a + b for a, b in zip(by_units[name], change, strict=True)]
        return units, by_units

    def _fibre_units(
        self, params: dict[str, Tensor], myelin: Tensor, axon: Tensor, exponent: Tensor | None
    ) -> list[Tensor]:
        """Return decay and phase of the three pools for given frequencies and dephasing of EW."""
        time, radians = self.echo_time(myelin), self.radians(myelin)
        background: Tensor | float = 0.0
        if self.is_complex:
            offsets = [params[name] for name in self._backgrounds(myelin)]
            background = radians * self.per_image(torch.stack(offsets)) + params["dpini"]
        extra = time * params.get("R2sEW", params["R2sIW"])
        decays = (
            time * params["R2sMW"],
            time * params["R2sIW"],
            extra if exponent is None else extra + exponent,
        )
        phases = (
            radians * myelin + background,
            radians * axon + background,
            torch.zeros_like(extra) + background,
        )
        return [
            torch.exp(-decay) * torch.stack((torch.cos(phase), torch.sin(phase)))
            for decay, phase in zip(decays, phases, strict=True)
        ]

    def _dephasing(self, rate: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        return hollow_cylinder.dephasing(volume, self.radians(rate) * rate)

    def _fibre_slopes(
        self,
        fibre: list[Tensor],
        slope: Tensor,
        volume: Tensor,
        exponent: Tensor,
        steepness: Tensor,
    ) -> list[Tensor]:
        """Return derivatives of the units of a fibre from those of what its cylinder is."""
        myelin, axon, rate, by_volume = slope
        radians = self.radians(myelin)
        decay = exponent / volume * by_volume + steepness * radians * rate
        return [
            radians * myelin * times_i(fibre[0]),
            radians * axon * times_i(fibre[1]),
            -decay * fibre[2],
        ]

    def _cylinders(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        """Return of each fibre the frequencies of myelin and axon, the dephasing rate and volume.

        (fibres, 4, ...): what the options say is fitted comes from the parameters, and EW does not
        dephase if R2sEW is fitted.
        """
        mwf, iwf = params["MWF"], self._iwf(params, inputs)
        axon, myelin = (1 - mwf) * iwf, mwf / self.rho
        share = hollow_cylinder.myelin_share(axon, myelin)
        volume = (axon + myelin) / (1 - mwf + myelin)
        rows = []
        for n in range(1, self.fibres + 1):
            sin2 = torch.sin(self.voxel_input(f"theta{n}", inputs, mwf)) ** 2
            frequencies = hollow_cylinder.frequencies(share, sin2)
            rate = hollow_cylinder.dephasing_rate(share, sin2)
            row = (
                params.get("freqMW", frequencies[0]),
                params.get("freqIW", frequencies[1]),
                torch.zeros_like(rate) if "R2sEW" in params else rate,
                volume,
            )
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def _weights(self, params: dict[str, Tensor], inputs: Inputs | None) -> list[Tensor]:
        """Return the share of each fibre; all alike where the voxel has none."""
        mwf = params["MWF"]
        if self.fibres == 1:
            return [torch.ones_like(mwf)]
        shares = [self.voxel_input(f"ff{n}", inputs, mwf) for n in range(1, self.fibres + 1)]
        total = torch.stack(torch.broadcast_tensors(*shares)).sum(0)
        none = total <= 0
        return [torch.where(none, 1 / self.fibres, s / total.clamp_min(1e-12)) for s in shares]


def typical(rate: Tensor, *, signed: bool) -> dict[str, Tensor]:
    """Return the parameters of white matter whose three pools decay with about this R2*.

    The frequency of myelin water lies between those of fibres along and across the field or, where
    data do not tell its sign, away from 0.
    """
    values = {"MWF": 0.1, "IWF": 0.6, "R2sMW": 100.0, "freqIW": 0.0}
    values["freqMW"] = 0.02 if signed else 0.05
    found = {name: torch.full_like(rate, value) for name, value in values.items()}
    return found | {"R2sIW": rate - 3, "R2sEW": rate + 3}


def times(a: Tensor, z: Tensor) -> Tensor:
    """Return a product of complex numbers, real and imaginary part on axis 0; a may be real."""
    if len(a) == 1:
        return a * z
    return torch.stack((a[0] * z[0] - a[1] * z[1], a[0] * z[1] + a[1] * z[0]))


def sum_of_products(amplitudes: list[Tensor], units: list[Tensor]) -> Tensor:
    """Return the sum over pools of complex products."""
    first, second, third = (times(a, u) for a, u in zip(amplitudes, units, strict=True))
    return first + second + third


def _slopes(
    function: Callable[..., Tensor], names: Sequence[str], values: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a function and its derivatives by its values, in forward mode.

    Parameters
    ----------
    names
        Of the values, for the derivatives; none: no derivatives are wanted.
    values
        (...) each.
    """
    if not names:
        return function(*values), {}
    # One call for all directions at once, so that the function itself is computed once.
    directions = torch.eye(len(names), dtype=values[0].dtype, device=values[0].device)
    tangents = tuple(
        direction.reshape(-1, *[1] * values[0].ndim).expand(-1, *values[0].shape)
        for direction in directions
    )
    found, slopes = torch.func.vmap(
        lambda *along: directional(function, values, along),
        out_dims=(None, 0),  # type: ignore[arg-type]
    )(*tangents)
    return found, dict(zip(names, slopes, strict=True))


def _root(name: str) -> str:
    """Return the name of a parameter without the number of the excitation."""
    return name.rstrip("0123456789")
