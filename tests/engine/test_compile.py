"""The compile switch: same answers as eager, and eager when compilation is impossible."""

import logging
import shutil

import numpy as np
import pytest
import torch

from bids_gacelle.engine import EngineError, fit, kernels
from bids_gacelle.engine.kernels import (
    COMPILE_VARIABLE,
    Compiled,
    compile_wanted,
)

from .helpers import draw, make_model, noisy

CPU = torch.device("cpu")


@pytest.fixture
def data():
    model = make_model("r2star")
    params = draw(model, 300, 1)
    return model, noisy(model, params, 0.01, 2)


def test_switch(monkeypatch):
    model = make_model("nexi")
    many = model.compile_from
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv(COMPILE_VARIABLE, "never")
    assert not compile_wanted(model, many, CPU)
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    assert compile_wanted(model, 1, CPU)
    monkeypatch.setenv(COMPILE_VARIABLE, "auto")
    assert not compile_wanted(model, many, CPU)  # no compiler
    monkeypatch.setattr(shutil, "which", lambda name: "/somewhere/" + name)
    assert compile_wanted(model, many, CPU)
    assert not compile_wanted(model, many - 1, CPU)
    monkeypatch.setenv(COMPILE_VARIABLE, "yes")
    with pytest.raises(EngineError, match="never, auto or always"):
        compile_wanted(model, 1, CPU)


def test_failed_compilation_costs_one_line_and_nothing_else(data, monkeypatch, caplog):
    model, y = data
    monkeypatch.setenv(COMPILE_VARIABLE, "never")
    eager = fit(model, y)

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nlong traceback")

    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(kernels, "_said", set())
    with caplog.at_level(logging.WARNING):
        fallen = fit(model, y)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == ["Compilation failed, continuing without: RuntimeError: no compiler here"]
    assert fallen.settings["compiled"] is False
    np.testing.assert_array_equal(fallen.maps["R2star"], eager.maps["R2star"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager(data, monkeypatch):
    model, y = data
    monkeypatch.setenv(COMPILE_VARIABLE, "never")
    eager = fit(model, y)
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    compiled = fit(model, y)
    assert compiled.settings["compiled"]
    for name in ("S0", "R2star"):
        distance = np.abs(compiled.maps[name] - eager.maps[name]) / eager.std[name]
        assert distance.max() < 0.02
    np.testing.assert_array_equal(compiled.flags, eager.flags)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_model_object_keeps_what_was_compiled_for_it(monkeypatch):
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    model = make_model("mcmicro")
    data = noisy(model, draw(model, 300, 41), 0.01, 42)
    first = fit(model, data, sigma=0.01)
    kept = dict(model.kept)
    assert {key[0] for key in kept} == {"dictionary", "starts", "step", "refill", "results"}
    again = fit(model, data[:, :200], sigma=0.01)
    assert dict(model.kept) == kept
    np.testing.assert_array_equal(again.maps["fn"], first.maps["fn"][:200])
    fit(model, data, sigma=0.01, options={"ftol": 1e-3})  # another step, all else as before
    steps = [key for key in model.kept if key[0] == "step"]
    assert len(steps) == 2
    assert len(model.kept) == len(kept) + 1


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_functions_of_many_models_share_no_limit():
    """torch compiles one code object so many times, and all steps have the same code."""
    with torch._dynamo.config.patch(recompile_limit=1):
        shifts = [Compiled(Shift(by)) for by in (1.0, 2.0, 3.0)]
        assert [float(shift(torch.zeros(8))[0]) for shift in shifts] == [1, 2, 3]
    assert all(shift.works for shift in shifts)
