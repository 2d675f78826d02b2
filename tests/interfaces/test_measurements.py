"""Which of the prepared measurements reach the fit of a dwi model."""

from pathlib import Path

import numpy as np
import pytest

from bids_gacelle.engine import DwiVolumes, prepare_dwi
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces import fit as module
from bids_gacelle.interfaces.prepare import save_dwi
from bids_gacelle.settings import Settings

from ..engine.helpers import even_directions

TIMES = (0.06, 0.09)


def prepared_in(folder: Path, n=30, n_b0=6, l_max=0, times=TIMES):
    """Two runs that differ in echo time, and what is saved of them."""
    rng = np.random.default_rng(0)
    runs = []
    for k, te in enumerate(times):
        bval = np.concatenate([np.zeros(n_b0), *(np.full(n, b) for b in (700.0, 1500.0, 3000.0))])
        bvec = np.concatenate([np.zeros((n_b0, 3)), *[even_directions(n)] * 3])
        signal = np.exp(-bval / 1e3) * (100 - 40 * k)
        signal = signal[:, None] + rng.normal(size=(len(bval), 5))
        runs.append(
            DwiVolumes(
                signal.astype(np.float32),
                bval,
                bvec,
                big_delta=np.full(len(bval), 30.0),
                echo_time=np.full(len(bval), te),
            )
        )
    result = prepare_dwi(runs, l_max)
    common = {"inputs": {}, "warnings": [], "l_max_error": ""}
    return result, common | save_dwi(result, folder)


def settings_of(folder: Path, **options) -> Settings:
    return Settings(folder, folder, model_options=options)


def fitted_with(monkeypatch, model, settings, prepared, data):
    """The arguments that a fit gets."""
    got = {}
    monkeypatch.setattr(module, "fit", lambda model, data, **given: got.update(given, data=data))
    module._fit_call(model, settings, prepared)(data, slice(None), None)
    return got


def test_each_model_gets_the_measurements_it_is_made_for(tmp_path, monkeypatch):
    result, prepared = prepared_in(tmp_path)
    decay = result.with_echo_decay()
    for options, expected in (({}, result), ({"relaxation": True}, decay)):
        settings = settings_of(tmp_path, mcmicro=options)
        model, data = module.build_model("mcmicro", settings, prepared)
        np.testing.assert_array_equal(data, expected.signals)
        np.testing.assert_array_equal(model.scheme.b, expected.scheme.b)
        np.testing.assert_array_equal(model.scheme.echo_time, expected.scheme.echo_time)
        got = fitted_with(monkeypatch, model, settings, prepared, data)
        np.testing.assert_array_equal(got["sigma"], expected.sigma)
        np.testing.assert_array_equal(got["scale_sigma"], expected.scale_sigma)
        np.testing.assert_array_equal(got["scale_group"], expected.scale_group)
        assert got["weights"] is None
    assert len(decay.signals) == 7


def test_one_echo_time_is_none_for_a_model_of_relaxation(tmp_path):
    _, prepared = prepared_in(tmp_path, times=(0.06, 0.06))
    settings = settings_of(tmp_path, mcmicro={"relaxation": True})
    with pytest.raises(InputError, match="mcmicro: all dwi volumes have the echo time 60 ms"):
        module.build_model("mcmicro", settings, prepared)


def test_directions_weigh_where_the_noise_is_unknown(tmp_path, monkeypatch):
    result, prepared = prepared_in(tmp_path, n=7, n_b0=1, l_max=2)
    assert result.sigma is None
    settings = settings_of(tmp_path, nexi={"l_max": 2})
    model, data = module.build_model("nexi", settings, prepared)
    got = fitted_with(monkeypatch, model, settings, prepared, data)
    assert got["sigma"] is None
    np.testing.assert_allclose(got["weights"], result.weights)
    assert np.ptp(got["weights"]) > 0
    settings = settings_of(tmp_path)
    model, data = module.build_model("mcmicro", settings, prepared)
    assert fitted_with(monkeypatch, model, settings, prepared, data)["weights"] is None
