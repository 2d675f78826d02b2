"""Small digital brains that the tests of this folder look at."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest


class Dataset(NamedTuple):
    """A written digital brain."""

    root: Path

    def image(self, path: str) -> np.ndarray:
        return np.asanyarray(nib.load(self.root / path).dataobj)

    def truth(self, path: str) -> np.ndarray:
        return self.image(f"derivatives/truth/{path}")

    def labels(self, subject: str = "01") -> np.ndarray:
        return self.truth(f"sub-{subject}/anat/sub-{subject}_desc-tissues_dseg.nii.gz")


def _write(tmp_path_factory: pytest.TempPathFactory, name: str, **options) -> Dataset:
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("needs nilearn (extra `phantom`)")
    from bids_gacelle.phantom.write import write_phantom

    root = tmp_path_factory.mktemp(name) / "brain"
    write_phantom(root, resolution=8.0, **options)
    return Dataset(root)


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two subjects without noise; the second one is oblique."""
    return _write(tmp_path_factory, "exact", snr=float("inf"))


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The first of them again, with noise."""
    return _write(tmp_path_factory, "noisy", subjects=1, snr=40.0)


@pytest.fixture(scope="session")
def mcmicro(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The first of them again, diffusion from the other model."""
    options = {"contrasts": ("dwi",), "dwi_model": "mcmicro", "snr": float("inf")}
    return _write(tmp_path_factory, "mcmicro", subjects=1, **options)


@pytest.fixture(scope="session")
def myelin(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The first of them again: complex gradient echoes with myelin water, without noise."""
    options = {"contrasts": ("mwi",), "snr": float("inf")}
    return _write(tmp_path_factory, "myelin", subjects=1, **options)


@pytest.fixture(scope="session")
def myelin_noisy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same with noise."""
    return _write(tmp_path_factory, "noisymyelin", subjects=1, contrasts=("mwi",), snr=150.0)
