"""Iterations that a GPU repeats by itself: when they may be recorded, and that nothing changes."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bids_gacelle.engine import Parameter, fit, starts
from bids_gacelle.engine.replay import Rehearsal, Replay, is_recorded
from bids_gacelle.engine.solvers import lanes

from .helpers import ALL_MODELS, Line, draw, draw_inputs, make_model, noisy

X = torch.linspace(-1, 1, 8)


class Recorded:
    """Stands for a CUDA graph: does the work in the tensors it was recorded with."""

    def __init__(self, replay, work):
        self.replay = lambda: [
            old.copy_(new)
            for old, new in zip(work.tensors(), replay.function(work).tensors(), strict=True)
            if new is not old
        ]


@pytest.mark.parametrize(
    ("operation", "looks"),
    [
        (lambda x: torch.where(x > 0, x, -x).cumsum(0), False),
        (lambda x: x[torch.tensor([1, 0])] + torch.full_like(x[:2], 3.0), False),
        (lambda x: x * 2 if bool((x > 0).any()) else x, True),
        (lambda x: x[x > 0], True),
        (lambda x: x / float(x.sum() + 9), True),
        (lambda x: x.index_put((x > 0,), torch.tensor(1.0)), True),
        (lambda x: torch.unique(x), True),
        (lambda x: x.to("meta"), True),
    ],
)
def test_what_looks_at_values_is_found_before_it_is_recorded(operation, looks):
    with Rehearsal() as rehearsal:
        assert is_recorded(X)
        operation(X)
    assert rehearsal.looked == looks
    assert not is_recorded(X)


@pytest.mark.parametrize(
    ("solver", "name", "chosen"),
    [("lm", *model) for model in ALL_MODELS] + [("adam", "nexi", {}), ("rmsprop", "r2star", {})],
)
def test_the_iterations_of_all_models_can_be_recorded_without_a_change(
    solver, name, chosen, monkeypatch
):
    model, n = make_model(name, **chosen), 900
    inputs = draw_inputs(model, n, 2)
    data = noisy(model, draw(model, n, 1), 0.01, 3, inputs)
    options = {"lanes": 256, "max_evaluations" if solver == "lm" else "iterations": 30}
    told = {"inputs": {k: v.numpy() for k, v in inputs.items()}, "starts": 1}
    told |= {"solver": solver, "options": options}
    monkeypatch.setattr(starts, "starts_at_once", lambda kernel: 256)
    plain = fit(model, data, **told)
    seen = {}

    class Always(Replay):
        def __call__(self, work):
            seen[self.name] = self.kernel.recordable.get(self.name)
            return super().__call__(work)

    monkeypatch.setattr(Replay, "_record", lambda *given: Recorded(*given))
    for module in (starts, lanes):
        monkeypatch.setattr(module, "Replay", Always)
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    replayed = fit(model, data, **told)
    if model.guess(torch.as_tensor(data), inputs) is None:
        assert seen.pop("starts")
    assert seen == {"advance": True, "refill": True}
    for key in plain.maps:
        np.testing.assert_array_equal(replayed.maps[key], plain.maps[key])
    np.testing.assert_array_equal(replayed.flags, plain.flags)


class Bend(Line):
    """One parameter, for which many steps fail."""

    name = "bend"
    derived = ()
    parameters = (Parameter("r", "1/s", "Rate", bounds=(0.01, 10.0), start=(0.1, 1.0)),)

    def signal(self, params, inputs=None):
        time = self.table("time", self.scheme.echo_time, params["r"])
        return torch.atan(5 * (params["r"] - 3) * time)

    def derive(self, params):
        return {}


def test_gradient_and_hessian_of_one_parameter_do_not_share_memory(monkeypatch):
    model, n = Bend.of(np.linspace(0.1, 2, 8)), 900
    truth = torch.as_tensor(np.random.default_rng(0).uniform(2.5, 3.5, n))
    data = noisy(model, {"r": truth}, 0.01, 1)
    options = {"lanes": 256, "dictionary": 1}
    told = {"block_size": 300, "starts": 1, "options": options}
    plain = fit(model, data, **told).maps["r"]
    np.testing.assert_allclose(plain, truth, atol=0.05)
    monkeypatch.setattr(Replay, "_record", lambda *given: Recorded(*given))
    monkeypatch.setattr(lanes, "on_gpu", lambda tensor: True)
    np.testing.assert_array_equal(fit(model, data, **told).maps["r"], plain)


class Work(NamedTuple):
    """One number per lane."""

    x: torch.Tensor

    def tensors(self):
        return [self.x]


def test_other_tensors_are_recorded_anew_and_a_failure_ends_recording(monkeypatch):
    kernel = SimpleNamespace(recordable={}, runs_compiled=False)
    records = []

    def record(self, work):
        records.append(work)
        if len(records) == 3:
            raise RuntimeError("out of memory")
        return Recorded(self, work)

    monkeypatch.setattr(Replay, "_record", record)
    replay = Replay(lambda work: Work(work.x * 2), "double", kernel)
    work = Work(torch.ones(3))
    for _ in range(5):
        work = replay(work)
    assert len(records) == 1
    assert work.x.tolist() == [32.0] * 3
    work = replay(Work(work.x[:2].clone()))
    assert len(records) == 2
    work = replay(Work(work.x[:1].clone()))
    assert kernel.recordable == {"double": False}
    assert replay(work).x.tolist() == [256.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["lm", "adam"])
def test_recordings_of_many_blocks_share_their_memory(solver):
    model, n = make_model("mcmicro"), 40_000
    data = noisy(model, draw(model, n, 1), 0.01, 2).astype(np.float32)
    reserved = []

    def look(progress):
        reserved.append(torch.cuda.memory_reserved())

    options = None if solver == "lm" else {"iterations": 40}
    told = {"device": "cuda", "solver": solver, "options": options}
    parts = fit(model, data, block_size=1000, progress=look, **told)
    assert reserved[-1] <= 2 * reserved[len(reserved) // 8]
    whole = fit(model, data, **told)
    np.testing.assert_array_equal(parts.maps["fn"], whole.maps["fn"])
    torch.cuda.empty_cache()
