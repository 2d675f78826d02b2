"""What the models of diffusion-weighted signals share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, SignalModel
from bids_gacelle.engine.scheme import DiffusionScheme


class DiffusionModel(SignalModel):
    """A model of the powder averages, or rotational invariants, of diffusion-weighted shells.

    Its signals are relative to the b=0 signal of the same echo time, so that they do not depend on
    it; a model that `wants_echo_decay` gets signals relative to the b=0 signal of the shortest
    echo time instead, those of b=0 at the other echo times among them.

    Where gradients are not linear, b differs from its nominal value by the voxel input `bscale`.
    """

    kind: ClassVar[Literal["megre", "vfa", "dwi"]] = "dwi"
    datatype: ClassVar[Literal["anat", "dwi"]] = "dwi"
    voxel_inputs: ClassVar[tuple[str, ...]] = ("bscale",)
    input_defaults: ClassVar[dict[str, float]] = {"bscale": 1.0}
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
