"""Small datasets written by the tests that read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.discovery import ModelNeeds, Options, discover
from bids_gacelle.bids.series import Finding, Job, Plan

NEEDS = (
    ModelNeeds("r2star", "megre"),
    ModelNeeds("despot1", "vfa"),
    ModelNeeds("mcmicro", "dwi", minimum_measurements=2),
    ModelNeeds("nexi", "dwi", needs_diffusion_times=True, minimum_measurements=4),
)
B_VALUES = "0 0 1000 1000 2000 2000"
DIRECTIONS = "0 0 1 0 0 1\n0 0 0 1 0 0\n0 0 0 0 1 0\n"


@dataclass(frozen=True)
class Tree:
    """A dataset in the making; paths are relative to its root."""

    root: Path

    def text(self, path: str, content: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        return target

    def json(self, path: str, **fields: object) -> Path:
        return self.text(path, json.dumps(fields))

    def image(self, path: str, **fields: object) -> Path:
        """An empty image, with a sidecar if there are fields."""
        if fields:
            self.json(path.split(".")[0] + ".json", **fields)
        return self.text(path, "")

    def nifti(
        self, path: str, shape: tuple[int, ...] = (4, 5, 6), affine=None, value: float = 1.0
    ) -> Path:
        """A real image of a constant value."""
        data = np.full(shape, value, dtype=np.float32)
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), target)
        return target

    def megre(self, prefix: str = "sub-01/anat/sub-01", times=(0.004, 0.008, 0.012)) -> None:
        for i, time in enumerate(times, start=1):
            self.image(f"{prefix}_echo-{i}_MEGRE.nii.gz", EchoTime=time)

    def vfa(self, prefix: str = "sub-01/anat/sub-01", flips=(3, 20)) -> None:
        for i, flip in enumerate(flips, start=1):
            self.image(
                f"{prefix}_flip-{i}_VFA.nii.gz", FlipAngle=flip, RepetitionTimeExcitation=0.015
            )

    def dwi(
        self, stem: str = "sub-01/dwi/sub-01_dwi", bval: str = B_VALUES, **fields: object
    ) -> None:
        self.image(f"{stem}.nii.gz", **fields)
        self.text(f"{stem}.bval", bval)
        self.text(f"{stem}.bvec", DIRECTIONS)

    def discover(self, **options: object) -> Plan:
        return discover(self.root, NEEDS, Options(**options))  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "data")


@pytest.fixture
def other_tree(tmp_path: Path) -> Tree:
    """A second dataset, given as derivatives."""
    return Tree(tmp_path / "derived")


@pytest.fixture(scope="session")
def needs() -> tuple[ModelNeeds, ...]:
    return NEEDS


@pytest.fixture(scope="session")
def pick():
    """The jobs of one model; the one job where ``only`` is true."""

    def pick_jobs(plan: Plan, model: str, only: bool = True) -> Job | list[Job]:
        jobs = [j for j in plan.jobs if j.model == model]
        if not only:
            return jobs
        assert len(jobs) == 1, jobs
        return jobs[0]

    return pick_jobs


@pytest.fixture(scope="session")
def messages():
    """Messages of a severity."""

    def of(plan: Plan | list[Finding], severity: str) -> str:
        findings = plan.findings if isinstance(plan, Plan) else plan
        return "\n".join(f.message for f in findings if f.severity == severity)

    return of
