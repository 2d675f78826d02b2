"""The networks that stand for EPG-X: shipped weights, their card, refusals and training."""

import json
import math

import numpy as np
import pytest
import torch

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.physics import train_epgx
from bids_gacelle.engine.physics.epgx import spoiled_steady_state
from bids_gacelle.engine.physics.surrogate import (
    R2_MYELIN,
    WEIGHTS,
    Surrogate,
    increments,
    model_card,
    outside_range,
)

SEED = 20_251_126  # neither of training nor of the errors on the card


def tissue(n=600):
    return train_epgx.draw(n, SEED, torch.device("cpu"))


@pytest.mark.parametrize("increment", [50.0, 117.0, 150.0])
def test_shipped_weights_are_as_accurate_as_the_card_says(increment):
    cases = tissue()
    free, myelin = spoiled_steady_state(
        **cases._asdict(), r2_myelin=torch.tensor(R2_MYELIN), increment=increment
    )
    ours = Surrogate(increment)(*(row.float() for row in cases))
    stated = model_card()["errors"][f"{increment:g}"]
    errors = {
        "free_magnitude": (ours.free - free.abs()).abs(),
        "myelin_magnitude": (ours.myelin - myelin.abs()).abs(),
        "free_phase_rad": (ours.free_phase - free.angle()).abs(),
        "myelin_phase_signal": myelin.abs() * (ours.myelin_phase - myelin.angle()).abs(),
    }
    for where, chosen in (("all", cases.tr > 0), ("t2_below_200_ms", cases.r2_free > 5)):
        for name, error in errors.items():
            expected = stated[where][name]
            assert error[chosen].mean() < 1.3 * expected["mean"], (where, name)
            assert torch.quantile(error[chosen], 0.98) < expected["p99"], (where, name)
            assert error.max() < 1.5 * stated["all"][name]["max"], (where, name)


def test_card_and_weights_agree():
    card = model_card()
    with np.load(WEIGHTS) as file:
        sizes = {name: file[name].size for name in file.files}
        assert {name.split("/")[0] for name in sizes} == {f"{i:g}" for i in increments()}
    assert sum(sizes.values()) == card["weights_per_increment"] * len(increments())
    assert sorted(card["errors"]) == sorted(f"{i:g}" for i in increments())
    assert card["ranges"] == {name: list(limits) for name, limits in train_epgx.RANGES.items()}
    assert card["held_out"]["seed"] != card["training"]["seed"]
    assert WEIGHTS.stat().st_size < 2**20


def test_a_protocol_inside_the_range_is_taken():
    angles = np.deg2rad([5, 10, 20, 50, 70])
    assert outside_range(0.038, angles, 0.234, 50) is None
    assert outside_range(0.025, [math.radians(110)], 0.6, 150.0) is None


@pytest.mark.parametrize(
    ("protocol", "sentence"),
    [
        ((0.01, [0.5], 0.234, 50), "a TR of 25 to 85 ms, not 10"),
        ((0.038, [0.5, 2.1], 0.234, 50), "flip angles of 1 to 110 degrees, not 120.3"),
        ((0.038, [0.5], 1.0, 50), "a myelin T1 of 150 to 600 ms, not 1000"),
        ((0.038, [0.5], 0.234, 84), "increments of 50, 117, 150 degrees and nothing between"),
    ],
)
def test_other_protocols_are_refused_in_one_sentence(protocol, sentence):
    reason = outside_range(*protocol)
    assert sentence in reason
    assert reason.count(".") - reason.count("120.3") == 1
    assert reason.endswith(".")


def test_other_increments_are_refused():
    with pytest.raises(ValueError, match="not 84"):
        Surrogate(84.0)


def test_values_and_derivatives_are_finite_at_the_limits():
    rows = torch.tensor(
        [[f, 1 / t1, r2, 1 / 0.234, k, 0.038, a]
         for f in (0.0, 1e-8, 0.72) for t1 in (0.5, 6.0) for r2 in (0.25, 50.0)
         for k in (0.0, 1e-8, 10.0) for a in (0.001, 0.02, 1.9)]
    ).T  # fmt: skip
    surrogate = Surrogate(50.0)
    for which in range(7):
        tangent = torch.zeros_like(rows)
        tangent[which] = 1
        values, slopes = directional(lambda r: torch.stack(surrogate(*r)), (rows,), (tangent,))
        assert values.isfinite().all()
        assert slopes.isfinite().all()


def test_training_goes_on_from_its_checkpoint(tmp_path, capsys):
    small = ["--cases", "300", "--held-out", "100", "--width", "8", "--batch", "100"]
    train_epgx.main([str(tmp_path), *small, "--minutes", "0.01"])
    assert "going on" not in capsys.readouterr().out
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train_epgx.main([str(tmp_path), *small, "--minutes", "0.02"])
    assert f"going on after {kept['steps']} steps" in capsys.readouterr().out
    card = json.loads((tmp_path / "surrogate.json").read_text())
    assert card["training"]["minutes"] == 0.02
    with np.load(tmp_path / "surrogate.npz") as file:
        assert sum(file[name].size for name in file.files) == 3 * card["weights_per_increment"]
