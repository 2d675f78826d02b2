"""What the models of gradient echoes share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, SignalModel
from bids_gacelle.engine.physics.phase import radians_per_ppm
from bids_gacelle.engine.scheme import GradientEchoScheme

SIGNALS = ("magnitude", "complex")

BACKGROUND = Parameter(
    "dfreqBKG",
    "ppm",
    "Background frequency that is left after demodulation",
    bounds=(-0.4, 0.4),
    start=(-0.05, 0.05),
    window=(-0.05, 0.05),
    colormap="RdBu_r",
)
INITIAL_PHASE = Parameter(
    "dpini",
    "rad",
    "Phase at an echo time of zero that is left after demodulation",
    bounds=(-np.pi, np.pi),
    start=(-0.5, 0.5),
    window=(-0.5, 0.5),
    colormap="RdBu_r",
)


class GradientEchoModel(SignalModel):
    """A model of gradient-echo images, of their magnitudes or of complex images.

    The measurements of a model with the option ``signal="complex"`` are the real parts of all
    images, then their imaginary parts. The phase of an image grows with its echo time where a
    frequency is positive: S = |S| exp(i (2 pi f TE + phi0)).

    Images are meant to be demodulated before: what the echoes tell of frequency and initial phase
    is taken off, and `dfreqBKG` and `dpini` are what is left.
    """

    datatype: ClassVar[Literal["anat", "dwi"]] = "anat"
    scheme: GradientEchoScheme

    def __init__(self, scheme: GradientEchoScheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        self.signed = self.is_complex
        if self.is_complex and scheme.field_strength is None:
            raise EngineError(
                f"{self.name} with signal='complex' needs field_strength in its acquisition."
            )

    @property
    def is_complex(self) -> bool:
        """Whether real and imaginary parts are fitted."""
        return getattr(self, "signal_kind", self.chosen.get("signal")) == "complex"

    @property
    def n_measurements(self) -> int:
        """Length of the signal: one number per image, two of complex ones."""
        return len(self.scheme) * (2 if self.is_complex else 1)
