"""Axon diameter from the transverse relaxation of axons at their surface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import NOT_NEGATIVE, POSITIVE, Inputs, Parameter
from bids_gacelle.engine.models.diffusion import DiffusionModel
from bids_gacelle.engine.models.surface import (
    SURFACE_LIMITS,
    SURFACE_OPTIONS,
    SURFACE_REFERENCE,
    SurfaceRelaxation,
)
from bids_gacelle.engine.physics.powder import stick_average
from bids_gacelle.engine.scheme import DiffusionScheme, Scheme

_B_MIN = 4.0
_B_TOLERANCE = 0.01  # scanners round the b-values asked for
_DN = 1.7


class AxonalT2(DiffusionModel):
    """Decay with echo time of what strong diffusion weighting leaves, the signal of axons.

    S = S0 exp(-TE (r2a + k2a / radius)) G(b dn) / G(b1 dn), with G(a) = int_0^1 exp(-a x^2) dx the
    powder average of sticks of diffusivity dn in um^2/ms and b1 that of the first shell; where all
    shells share one b-value, the latter factor is 1.

    Only shells with b of at least `b_min` ms/um^2 are fitted, see `wanted`. At 4 ms/um^2 an
    extra-axonal space that diffuses with 0.9 um^2/ms keeps 3 % of its signal, sticks 34 %; the
    model's authors used b = 6 ms/um^2.

    The constants are r2a (of axoplasm) in 1/s and k2a (surface relaxivity) in um/s. With `fit_r2a`
    or `fit_k2a` these become parameters of each voxel; but a voxel's decay has one rate, which
    tells nothing of how r2a, k2a and the radius share it: they then follow the prior.
    """

    name = "axonalt2"
    title = "Axon diameter from intra-axonal T2"
    description = (
        "Powder-averaged signals of strong diffusion weighting, to which axons alone contribute, "
        "were fitted with a mono-exponential decay over the echo time, whose rate was converted "
        "to an axon diameter with a calibrated model of relaxation at the axonal surface."
    )
    references = (SURFACE_REFERENCE,)
    minimum_measurements = 2
    minimum_echo_times = 2
    required = ("b", "echo_time")
    options = SURFACE_OPTIONS | {"b_min": _B_MIN, "dn": _DN}
    option_limits = SURFACE_LIMITS | {"b_min": NOT_NEGATIVE, "dn": POSITIVE}
    compile_from = 4_000_000  # eager steps of so small a model are nearly as fast
    parameters: tuple[Parameter, ...] = (
        Parameter(
            "diameter",
            "um",
            "Axon diameter",
            bounds=(0.1, 20.0),
            start=(1.0, 6.0),
            window=(0.0, 10.0),
        ),
        Parameter(
            "S0",
            "1",
            "Axonal signal of the first shell at an echo time of zero, relative to b=0",
            bounds=(0.0, float("inf")),
            window=(0.0, 1.0),
            amplitude=True,
        ),
    )
    derived = (
        Parameter("radius", "um", "Axon radius", window=(0.0, 5.0)),
        Parameter("t2", "s", "Transverse relaxation time of axons", window=(0.0, 0.15)),
    )

    def __init__(
        self,
        scheme: DiffusionScheme,
        *,
        r2a: float = SURFACE_OPTIONS["r2a"],
        k2a: float = SURFACE_OPTIONS["k2a"],
        fit_r2a: bool = False,
        fit_k2a: bool = False,
        b_min: float = _B_MIN,
        dn: float = _DN,
        **options: Any,
    ) -> None:
        own = {"r2a": r2a, "k2a": k2a, "fit_r2a": fit_r2a, "fit_k2a": fit_k2a}
        super().__init__(scheme, **own, b_min=b_min, dn=dn, **options)
        weak = scheme.b[~self.wanted(scheme, {"b_min": b_min})]
        if weak.size:
            raise EngineError(
                f"{self.name} describes shells with b >= {b_min:g} ms/um^2 only, got one with "
                f"{weak[0]:g}; leave it out, or lower b_min."
            )
        self.dn = dn
        self._surface = SurfaceRelaxation(r2a, k2a, fit_r2a=fit_r2a, fit_k2a=fit_k2a)
        self.parameters = (*type(self).parameters, *self._surface.parameters)
        self._weights_differ = bool(np.ptp(scheme.b) > 0)

    @classmethod
    def wants_echo_decay(cls, options: Mapping[str, Any]) -> bool:
        """Tell that it does."""
        return True

    @classmethod
    def wanted(cls, scheme: Scheme, options: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Return which shells have a b-value of at least the option `b_min`, within 1 %.

        Raises
        ------
        EngineError
            They do not have two different echo times.
        """
        assert isinstance(scheme, DiffusionScheme)
        b_min = float(options.get("b_min", _B_MIN))
        strong = scheme.b >= (1 - _B_TOLERANCE) * b_min
        if not strong.any():
            raise EngineError(
                f"{cls.name} needs shells with b >= {b_min:g} ms/um^2, where only axons are left; "
                f"the highest b is {scheme.b.max():g}."
            )
        cls.check_echo_times(scheme.take(strong), f" at b >= {b_min:g} ms/um^2")
        return strong

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signal of each shell; shapes as in `SignalModel.signal`."""
        return params["S0"] * self._decay(params, inputs)

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by the parameters, in their order."""
        time, _ = self.echo_times(params["S0"])
        decay = self._decay(params, inputs)
        signal = params["S0"] * decay
        by_rate = -time * signal
        columns = {k: by_rate * v for k, v in self._surface.slopes(params).items()}
        columns["S0"] = decay
        return signal, torch.stack([columns[name] for name in self.parameter_names])

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the radius, and t2 = 1 / (r2a + k2a / radius)."""
        return {"radius": params["diameter"] / 2, "t2": 1 / self._surface.rate(params)}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return the diameter of the log-linear regression weighted by the squared signal."""
        like = data[0]
        time, _ = self.echo_times(like)
        data = data / self._stick(inputs, like)
        size = data.clamp_min(1e-3 * data.abs().amax(0))
        weight, log = size**2, torch.log(size)
        time = time - (weight * time).sum(0) / weight.sum(0)
        rate = -(weight * time * log).sum(0) / (weight * time**2).sum(0)
        fitted = {}
        for parameter in self._surface.parameters:
            assert parameter.prior is not None
            fitted[parameter.name] = torch.full_like(like, parameter.prior[0])
        low, high = self.parameters[0].bounds
        return {"diameter": self._surface.diameter(rate, fitted).clamp(low, high), **fitted}

    def _decay(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        """Return the signal for S0 = 1."""
        time, _ = self.echo_times(params["S0"])
        return torch.exp(-time * self._surface.rate(params)) * self._stick(inputs, params["S0"])

    def _stick(self, inputs: Inputs | None, like: Tensor) -> Tensor:
        """Return G(b dn) / G(b1 dn)."""
        if not self._weights_differ:
            return torch.ones_like(like)
        average = stick_average(self.b(inputs, like) * self.dn)
        return average / average[:1]
