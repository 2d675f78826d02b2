"""What the models of gradient echoes share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, SignalModel
from bids_gacelle.engine.physics.phase import phase_between, radians_per_ppm, slope_of_phase
from bids_gacelle.engine.scheme import GradientEchoScheme

BACKGROUND = Parameter(
    "dfreqBKG",
    "ppm",
    "Background frequency that demodulation left",
    bounds=(-0.4, 0.4),
    start=(-0.05, 0.05),
    window=(-0.05, 0.05),
    colormap="RdBu_r",
)
INITIAL_PHASE = Parameter(
    "dpini",
    "rad",
    "Phase at an echo time of zero that demodulation left",
    bounds=(-np.pi, np.pi),
    start=(-0.5, 0.5),
    window=(-0.5, 0.5),
    colormap="RdBu_r",
)


class GradientEchoModel(SignalModel):
    """A model of gradient-echo images: of their magnitudes, or of complex images.

    With the option ``signal="complex"`` the measurements are the real parts of all images, then
    their imaginary parts. The phase of an image grows with its echo time where a frequency is
    positive: S = |S| exp(i (2 pi f TE + phi0)).

    Complex images are meant to be demodulated before: what the echoes tell of frequency and
    initial phase is taken off, and the parameters `dfreqBKG` and `dpini` are what is left.

    Images of one flip angle and repetition time are echoes of one excitation.
    """

    datatype: ClassVar[Literal["anat", "dwi"]] = "anat"
    scheme: GradientEchoScheme

    def __init__(self, scheme: GradientEchoScheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        self.is_complex = self.chosen.get("signal") == "complex"
        self.signed = self.is_complex
        if self.is_complex and scheme.field_strength is None:
            raise EngineError(
                f"{self.name} of complex images needs field_strength (T) in its acquisition."
            )
        self.excitation, self.excitations = scheme.excitations()
        self._numbers = range(len(self.excitations))
        # Made here, as a compiler had better find no arithmetic of numpy in a signal.
        self._angles, self._times = np.deg2rad(self.excitations[:, 0]), self.excitations[:, 1]
        self._images_of = [(self.excitation == number).astype(float) for number in self._numbers]
        if scheme.echo_time is not None and scheme.field_strength is not None:
            self._radians = radians_per_ppm(scheme.echo_time, scheme.field_strength)

    @property
    def n_measurements(self) -> int:
        """Length of the signal: one number per image, or its real and its imaginary part."""
        return len(self.scheme) * (2 if self.is_complex else 1)

    def echo_time(self, like: Tensor) -> Tensor:
        """Return the echo times in s, (images, 1...)."""
        assert self.scheme.echo_time is not None
        return self.table("echo_time", self.scheme.echo_time, like)

    def radians(self, like: Tensor) -> Tensor:
        """Return the phase that a frequency of 1 ppm has in each image in rad, (images, 1...)."""
        return self.table("radians", self._radians, like)

    def flip_angle(self, inputs: Inputs | None, like: Tensor) -> Tensor:
        """Return the actual flip angle of each excitation in radian, (excitations, ...)."""
        nominal = self.table("flip_angle", self._angles, like)
        return nominal * self.voxel_input("b1", inputs, like)

    def repetition_time(self, like: Tensor) -> Tensor:
        """Return the repetition time of each excitation in s, (excitations, 1...)."""
        return self.table("repetition_time", self._times, like)

    def per_image(self, values: Tensor) -> Tensor:
        """Return values of excitations, (excitations or 1, ...), for each of their images."""
        if len(values) == 1:
            return values
        return values[self.places("excitation", self.excitation, values)]

    def echoes(self, number: int) -> np.ndarray:
        """Return the places of the images of an excitation, by echo time."""
        assert self.scheme.echo_time is not None
        images = np.flatnonzero(self.excitation == number)
        return images[np.argsort(self.scheme.echo_time[images], kind="stable")]

    def phases(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frequency of each excitation, and the initial phase that all have in common.

        Parameters
        ----------
        parts
            (2, images, ...) real and imaginary parts.

        Returns
        -------
        (excitations, ...) in ppm, of one with a single echo 0; (...) in rad.
        """
        radians = self.radians(parts[0, 0])
        frequency = torch.stack([self._slope(parts, number) for number in self._numbers])
        phase = radians * self.per_image(frequency)
        unit = torch.stack((torch.cos(phase), torch.sin(phase)))
        # The first echoes alone: later ones tell of several compartments.
        first = torch.tensor([int(self.echoes(number)[0]) for number in self._numbers])
        return frequency, phase_between(unit[:, first], parts[:, first])

    def _slope(self, parts: Tensor, number: int) -> Tensor:
        """Return the frequency of an excitation in ppm."""
        images = self.echoes(number)
        if len(images) == 1:
            return torch.zeros_like(parts[0, 0])
        radians = self.radians(parts[0, 0])[images]
        return slope_of_phase(parts[:, images], radians[1:] - radians[:-1])

    def decay(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return a common R2* of all excitations and their signals at an echo time of zero.

        The log-linear regression weighted by squared magnitudes, its intercept free for each.

        Parameters
        ----------
        magnitude
            (images, ...).

        Returns
        -------
        (...) in 1/s and (excitations, ...); NaN where no excitation has two echoes.
        """
        time = self.echo_time(magnitude[0])
        size = magnitude.clamp_min(1e-3 * magnitude.amax(0))
        means, above, below = [], torch.zeros_like(size[0]), torch.zeros_like(size[0])
        for number in self._numbers:
            images = self.echoes(number)
            echoes, times = size[images], time[images]
            weight, log = echoes**2, torch.log(echoes)
            share = weight / weight.sum(0)
            mean_time, mean_log = (share * times).sum(0), (share * log).sum(0)
            lag = times - mean_time
            offset = weight * lag
            above = above + (offset * (log - mean_log)).sum(0)
            below = below + (offset * lag).sum(0)
            means.append((mean_time, mean_log))
        rate = -above / below
        return rate, torch.stack([torch.exp(log + rate * time) for time, log in means])
