"""What a person sees while a fit runs, and how it ends at Ctrl-C."""

import io
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bids_gacelle.engine import (
    DiffusionScheme,
    FitInterrupted,
    GradientEchoScheme,
    Progress,
    get_model,
)
from bids_gacelle.interfaces import fit as module
from bids_gacelle.interfaces.prepare import scheme_to_json
from bids_gacelle.settings import Settings


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_every_tenth_says_speed_and_convergence(clock, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    tell = module._progress("sub-01 dwi nexi")
    with caplog.at_level(logging.INFO, "bids_gacelle"):
        for done in range(0, 250_001, 5_000):
            clock[0] += 10
            tell(Progress(done, 250_000, 0.974 if done > 30_000 else float("nan"), done / 12_300))
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == "sub-01 dwi nexi: 10 % of 250,000 voxels, 12,300 voxels/s"
    assert caplog.messages[2] == (
        "sub-01 dwi nexi: 30 % of 250,000 voxels, 12,300 voxels/s, 97 % converged"
    )


def test_a_short_fit_says_nothing(clock, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    tell = module._progress("sub-01 megre r2star")
    with caplog.at_level(logging.INFO, "bids_gacelle"):
        for done in range(0, 101, 10):
            clock[0] += 0.1
            tell(Progress(done, 100, 1.0, 1.0))
    assert caplog.messages == []


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tell = module._progress("sub-01 dwi nexi")
    for done in (1000, 2000, 4000):
        time.sleep(0.11)  # the bar is not drawn more often than ten times a second
        tell(Progress(done, 4000, 0.97, 2.0))
    drawn = terminal.getvalue()
    assert "sub-01 dwi nexi" in drawn
    assert "voxel/s" in drawn
    assert "97 % converged" in drawn


def test_an_interrupted_fit_stays_interrupted(monkeypatch):
    """No node takes half a fit for a fit."""

    def interrupted(*_):
        raise FitInterrupted("after 10 of 20", object())

    monkeypatch.setattr(module, "series_from_json", lambda series: series)
    monkeypatch.setattr(module, "build_model", lambda *_: (None, np.ones((2, 20))))
    monkeypatch.setattr(module, "_fit_call", lambda *_: interrupted)
    monkeypatch.setattr(module, "fallback", lambda *_: "")
    monkeypatch.setattr(module, "protocol_adequacy", lambda *_: {"sentences": []})

    class Inputs:
        model, prepared, use_gpu = "r2star", {}, False

        class series:
            subject, label = "01", "megre"

    class Settings:
        omp_nthreads, noise = 1, "gaussian"

    node = module.FitModel.__new__(module.FitModel)
    node.inputs = Inputs
    with pytest.raises(KeyboardInterrupt) as caught:
        node.work(Settings, None)
    assert type(caught.value) is KeyboardInterrupt


@pytest.fixture
def prepared(tmp_path):
    """Signals, their noise and their b=0 groups, each row with a number of its own."""
    rows = np.arange(6, dtype=np.float32)[:, None] + np.zeros(4, np.float32)
    scheme = DiffusionScheme(b=[0.7, 5, 6, 0.7, 5, 6], echo_time=[0.06] * 3 + [0.09] * 3)
    files = {"signals": 0.3 - 0.01 * rows, "sigma": 0.01 * (1 + rows), "scale_sigma": rows[:2]}
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    return {
        "scheme": scheme_to_json(scheme),
        "inputs": {},
        "scale_group": [0, 0, 0, 1, 1, 1],
        **{name: str(tmp_path / f"{name}.npy") for name in files},
    }


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [("mcmicro", {}, [0, 1, 2, 3, 4, 5]), ("axonalt2", {"b_min": 5.5}, [2, 5])],
)
def test_a_model_gets_the_shells_it_wants(monkeypatch, prepared, name, options, rows):
    settings = Settings(Path(), Path(), model_options={name: options})
    prepared = {**prepared, "echo_decay": prepared}
    model, data = module.build_model(name, settings, prepared)
    assert model.scheme.b.tolist() == [[0.7, 5, 6, 0.7, 5, 6][i] for i in rows]
    np.testing.assert_allclose(data[:, 0], 0.3 - 0.01 * np.array(rows))
    seen = {}
    monkeypatch.setattr(module, "fit", lambda model, data, **given: seen.update(given, data=data))
    module._fit_call(model, settings, prepared)(data, slice(1, 3), None)
    assert seen["data"].shape == seen["sigma"].shape == (len(rows), 2)
    np.testing.assert_allclose(seen["sigma"][:, 0], 0.01 * (1 + np.array(rows)))
    np.testing.assert_array_equal(seen["scale_group"], [int(i > 2) for i in rows])


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", ["gremwi", "mcrmwi"])
def test_a_phase_of_the_wrong_sign_is_noticed(name, wrong):
    if name == "mcrmwi":
        scheme = GradientEchoScheme(
            echo_time=np.tile(0.003 * np.arange(1, 9), 3),
            flip_angle=np.repeat([5.0, 20, 60], 8),
            repetition_time=0.04,
            field_strength=3,
        )
        model = get_model(name)(scheme, share_background=True)
    else:
        scheme = GradientEchoScheme(echo_time=0.002 * np.arange(1, 17), field_strength=3)
        model = get_model(name)(scheme)
    tissue = {"S0": 1.0, "dfreqBKG": 0.0, "dpini": 0.0} | model.tissues["white matter"]
    signal = model.signal({k: torch.full((100,), tissue[k]) for k in model.parameter_names})
    noise = 2e-4 if name == "mcrmwi" else 1 / 70
    data = signal.numpy() + np.random.default_rng(0).normal(0, noise, signal.shape)
    if wrong:
        data[len(scheme) :] *= -1
    settings = Settings(Path(), Path(), prior="weak")
    measured = {"scheme": scheme_to_json(scheme), "sigma": ""}
    call = module._fit_call(model, settings, {"inputs": {}, "complex": measured})
    said = module._doubt_of_sign(model, call, data, call(data, slice(None), None), settings)
    assert ("--phase-sign negative" in said) == wrong
    assert bool(said) == wrong
