"""The compile switch: same answers as eager, and eager when compilation is impossible."""

import copy
import gc
import logging
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bids_gacelle.engine import (
    EngineError,
    GradientEchoScheme,
    Parameter,
    fit,
    kernels,
    signal_model,
)
from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.kernels import (
    COMPILE_VARIABLE,
    Compiled,
    Kernel,
    compile_wanted,
)
from bids_gacelle.engine.objective import Objective

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
class TestCompiled:
    def test_functions_of_many_models_share_no_limit(self):
        """torch compiles one code object so many times, and all steps have the same code."""
        with torch._dynamo.config.patch(recompile_limit=1):
            shifts = [Compiled(Shift(by)) for by in (1.0, 2.0, 3.0)]
            assert [float(shift(torch.zeros(8))[0]) for shift in shifts] == [1, 2, 3]
            sizes = (3, 5, 7)
            assert [float(shifts[0](torch.ones(n)).sum()) for n in sizes] == [6, 10, 14]
        assert all(shift.works for shift in shifts)

    def test_functions_of_one_name_that_depend_on_different_things(self):
        kernel = Kernel(make_model("r2star"), Objective(), torch.float32, CPU)
        for by in (1.0, 2.0, 1.0):
            assert float(kernel.compile("shift", Shift(by), by)(torch.zeros(8))[0]) == by

    def test_arguments_of_any_kind(self):
        factor = torch.arange(4.0)  # a constant

        def function(pair, named, number):
            first, nothing = pair
            assert nothing is None
            return first * factor + named["b"] * number, None, named["b"], number

        compiled = Compiled(function)
        one, two = torch.ones(4), torch.full((4,), 2.0)
        for first, b, number in ((one, two, 3), (two, one, 3), (one, one, 3), (one, two, 5)):
            result = compiled((first, None), {"b": b}, number)
            wanted = function((first, None), {"b": b}, number)
            assert torch.equal(result[0], wanted[0])
            assert result[1] is None
            assert torch.equal(result[2], b)
            assert result[3] == number
        assert compiled.works
        assert isinstance(Compiled(torch.neg)(one), torch.Tensor)

    def test_kinds_of_arguments_are_told_apart(self):
        compiled = Compiled(lambda a, b: a + b)
        one = torch.ones(3)
        assert [float(compiled(one, b)[0]) for b in (one, 0, 1.0, True)] == [2, 1, 2, 2]
        pairs = Compiled(lambda a, b: a[0] - b[-1])
        two, four = torch.full((3,), 2.0), torch.full((3,), 4.0)
        assert float(pairs((one, two), (four,))[0]) == -3
        assert float(pairs((one,), (two, four))[0]) == -3
        assert float(pairs((two,), (four, one))[0]) == 1
        assert compiled.works
        assert pairs.works

    @pytest.mark.parametrize("part", [torch.ones(3), (torch.ones(3),)])
    def test_results_that_are_not_understood_are_not_compiled(self, part):
        compiled = Compiled(lambda x: (x + 1, part))
        for _ in range(3):
            result = compiled(torch.zeros(3))
            assert torch.equal(result[0], torch.ones(3))
            assert result[1] is part
        assert not compiled.works

    def test_other_threads_differentiate_while_one_compiles(self):
        """torch tells all threads when it compiles, and they share its levels of derivatives."""
        one = torch.ones(3)

        def slope(x):
            return directional(lambda y: (y**3).sin(), (x,), (torch.ones_like(x),))

        compiled, wanted = Compiled(slope), slope(one)[1]
        with ThreadPoolExecutor(2) as pool:
            future = pool.submit(compiled, one)
            while not future.done():
                assert torch.equal(slope(one)[1], wanted)
            torch.testing.assert_close(future.result()[1], wanted)
        assert compiled.works

    def test_lack_of_memory_is_no_reason_to_do_without(self, monkeypatch):
        """A smaller block may fit."""

        def short(function):
            raise MemoryError

        compiled = Compiled(torch.neg)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_looked_at", short)
            with pytest.raises(MemoryError):
                compiled(torch.ones(3))
        assert float(compiled(torch.ones(3))[0]) == -1
        assert compiled.works

    def test_copies_and_threads(self):
        compiled = Compiled(lambda x: (x + 1, x * 2))
        compiled(torch.zeros(3))
        copied = copy.deepcopy(compiled)
        for k in range(3):
            assert float(copied(torch.full((3,), float(k)))[1][0]) == 2 * k

        def many(value):
            for _ in range(100):
                compiled.look_again()
                for _ in range(2):
                    found = compiled(torch.full((3,), float(value)))
                    assert float(found[0][0]) == value + 1
                    assert float(found[1][0]) == value * 2

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(many, range(3)))

    def test_what_a_function_depends_on_is_looked_at_in_every_fit(self):
        with torch._dynamo.config.patch(recompile_limit=2):
            shift = Shift(1.0)
            compiled = Compiled(shift)
            for by in (1.0, 2.0, torch.tensor(3.0), 4.0, 2.0, 5.0):
                shift.by = by
                compiled.look_again()
                assert float(compiled(torch.zeros(8))[0]) == by
            assert compiled.works

    def test_values_that_decide_are_not_compiled_in(self, caplog, monkeypatch):
        monkeypatch.setattr(kernels, "_said", set())
        compiled = Compiled(lambda x: x if x.sum() > 0 else -x)
        for x in (torch.ones(3), -torch.ones(3), torch.ones(3)):
            assert torch.equal(compiled(x), torch.ones(3))
        assert not compiled.works
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1

    def test_neither_arguments_nor_functions_are_held(self):
        shift = Shift(1.0)
        compiled = Compiled(shift)
        x = torch.zeros(8)
        held = weakref.ref(x)
        compiled(x)
        compiled(x)
        del x
        gc.collect()
        assert held() is None
        function = weakref.ref(shift)
        del compiled, shift
        gc.collect()
        assert function() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_constant_that_changes_between_fits_is_not_an_old_one(monkeypatch):
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    offset = {"by": 0.0}

    @signal_model(
        kind="megre",
        parameters=(
            Parameter("s0", "1", "Signal", bounds=(0.1, 10.0), start=(0.5, 2.0)),
            Parameter("rate", "1/s", "Rate", bounds=(0.1, 100.0), start=(5.0, 50.0)),
        ),
    )
    def raised(params, scheme):
        return params["s0"] * torch.exp(-params["rate"] * scheme.echo_time) + offset["by"]

    model = raised(GradientEchoScheme(echo_time=np.linspace(0.01, 0.08, 8)))
    truth = {"s0": torch.ones(50).double(), "rate": torch.linspace(5, 40, 50).double()}
    for by in (0.0, 0.3):
        offset["by"] = by
        data = model.signal(truth).numpy()
        result = fit(model, data)
        assert result.settings["compiled"]
        np.testing.assert_allclose(result.maps["rate"], truth["rate"], rtol=1e-3)
