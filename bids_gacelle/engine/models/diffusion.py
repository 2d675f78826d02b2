"""What the models of diffusion-weighted signals share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, SignalModel
from bids_gacelle.engine.physics.restricted import RestrictedTable
from bids_gacelle.engine.scheme import DiffusionScheme

# Echo times that differ by less are one.
_ECHO_TIME_GAP_S = 1e-4


class DiffusionModel(SignalModel):
    """A model of the powder averages, or rotational invariants, of diffusion-weighted shells.

    Its signals are relative to the b=0 signal of the same echo time, so that they do not depend on
    it; a model that `wants_echo_decay` gets signals relative to the b=0 signal of the shortest
    echo time instead, those of b=0 at the other echo times among them.

    Where gradients are not linear, b differs from its nominal value by the voxel input `bscale`.
    """

    kind: ClassVar[Literal["megre", "vfa", "dwi"]] = "dwi"
    datatype: ClassVar[Literal["anat", "dwi"]] = "dwi"
    voxel_inputs: tuple[str, ...] = ("bscale",)
    input_defaults: dict[str, float] = {"bscale": 1.0}  # noqa: RUF012
    scheme: DiffusionScheme

    def b(self, inputs: Inputs | None, like: Tensor) -> Tensor:
        """Return the b-values in ms/um^2, (shells, ...), as the voxels saw them."""
        return self.scaled("b", self.scheme.b, inputs, like)

    def scaled(self, name: str, values: Any, inputs: Inputs | None, like: Tensor) -> Tensor:
        """Return a table (see `table`) of values proportional to b, as the voxels saw them."""
        table = self.table(name, values, like)
        if inputs is not None and "bscale" in inputs:
            return table * inputs["bscale"]
        return table

    def echo_times(self, like: Tensor) -> tuple[Tensor, float]:
        """Return the echo times in s, (shells, 1...), and the shortest."""
        assert self.scheme.echo_time is not None
        time = self.scheme.echo_time
        return self.table("echo_time", time, like), float(time.min())

    @classmethod
    def check_echo_times(cls, scheme: DiffusionScheme, where: str = "") -> None:
        """Refuse an acquisition without two different echo times.

        Parameters
        ----------
        scheme
            The acquisition.
        where
            Of which of its shells this is said, such as " at b >= 4 ms/um^2".
        """
        if scheme.echo_time is None:
            raise EngineError(f"{cls.name} needs echo_time in its acquisition.")
        if np.ptp(scheme.echo_time) < _ECHO_TIME_GAP_S:
            raise EngineError(
                f"{cls.name} needs at least two different echo times{where}, found only "
                f"{1e3 * scheme.echo_time[0]:g} ms."
            )

    def attenuation(
        self, table: RestrictedTable, radius: Tensor, inputs: Inputs | None
    ) -> tuple[Tensor, Tensor]:
        """Return the exponents of restricted diffusion, as the voxels saw b, and their slopes.

        Parameters
        ----------
        table
            Made for the shells of the scheme.
        radius
            (...) in um.
        inputs
            As in `signal`.

        Returns
        -------
        exponent, slope
            (shells, ...) each, the latter by the radius.
        """
        exponent, slope = table(radius)
        if inputs is not None and "bscale" in inputs:
            return exponent * inputs["bscale"], slope * inputs["bscale"]
        return exponent, slope
