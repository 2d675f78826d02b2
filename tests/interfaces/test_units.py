"""Units of maps: percent for myelin water, Hz for frequencies, the engine's for all else."""

from __future__ import annotations

import numpy as np
import pytest

from bids_gacelle.engine import GradientEchoScheme, Parameter, get_model
from bids_gacelle.interfaces.units import (
    in_map_units,
    map_unit,
    map_units,
    prior_in_map_units,
)
from bids_gacelle.interfaces.write import phase_maps

PPM = 42.577478518 * 3  # Hz at 3 T, CODATA


def model(name="gremwi"):
    scheme = GradientEchoScheme(echo_time=0.002 * np.arange(1, 17), field_strength=3)
    return get_model(name)(scheme)


def test_units_of_myelin_water():
    units = map_units(model())
    assert units["MWF"] == ("percent", 100)
    assert units["IWF"] == ("1", 1)
    assert units["R2sMW"] == ("1/s", 1)
    assert units["dpini"] == ("rad", 1)
    for name in ("freqMW", "freqIW", "dfreqBKG"):
        assert units[name].unit == "Hz"
        assert units[name].factor == pytest.approx(PPM, rel=1e-6)


def test_values_bounds_and_priors_change_alike():
    values = in_map_units({"MWF": np.array([0.1]), "freqMW": 0.05, "R2sIW": 15.0}, model())
    assert values["MWF"] == pytest.approx([10.0])
    assert values["freqMW"] == pytest.approx(0.05 * PPM)
    assert values["R2sIW"] == 15.0
    assert map_units(model())["MWF"].pair((0.0, 0.25)) == (0, 25)
    given = {
        "MWF": {"mean": 0.1, "sd": 0.05, "coordinate": "linear"},
        "freqMW": {"mean": "map", "sd": 0.01, "coordinate": "linear"},
        "R2sMW": {"mean": 4.0, "sd": 0.3, "coordinate": "log"},
    }
    prior = prior_in_map_units(given, model())
    assert prior["MWF"] == {"mean": 10.0, "sd": 5.0, "coordinate": "linear"}
    assert prior["freqMW"]["mean"] == "map"
    assert prior["freqMW"]["sd"] == pytest.approx(0.01 * PPM)
    assert prior["R2sMW"] == given["R2sMW"]
    assert prior_in_map_units("weak", model()) == "weak"
    assert given["MWF"]["mean"] == 0.1


def test_a_frequency_without_a_known_field_stays_in_ppm():
    shift = Parameter("f", "ppm", "Shift", bounds=(-1, 1))
    assert map_unit(shift, None) == ("ppm", 1)
    susceptibility = Parameter("chi", "ppm", "Susceptibility", bounds=(-1, 1), suffix="Chimap")
    assert map_unit(susceptibility, 3.0) == ("ppm", 1)


def test_the_whole_field_and_phase_with_the_error_that_all_flip_angles_share(tmp_path):
    scheme = GradientEchoScheme(
        echo_time=np.tile(0.003 * np.arange(1, 9), 3),
        flip_angle=np.repeat([5.0, 20, 60], 8),
        repetition_time=0.04,
        field_strength=3,
    )
    fitted = get_model("mcrmwi")(scheme, steady_state="ideal")
    np.save(tmp_path / "field.npy", np.array([[10.0, 0], [12, 0], [14, 0]], np.float32))
    fit = {f"map_dfreqBKG{n}": np.array([0.01, 0.0]) for n in (1, 2, 3)}
    fit |= {f"std_dfreqBKG{n}": np.array([0.02, np.nan if n == 2 else 0.02]) for n in (1, 2, 3)}
    np.save(tmp_path / "phase.npy", np.array([3.0, -1.0], np.float32))
    fit |= {"map_dpini": np.array([0.5, 0.25]), "std_dpini": np.array([0.1, 0.2])}
    removed = {name: str(tmp_path / f"{name}.npy") for name in ("field", "phase")}
    field, phase = phase_maps(fitted, fit, {"complex": removed})
    np.testing.assert_allclose(field[1], [12 + 0.01 * PPM, 0], rtol=1e-6)
    np.testing.assert_allclose(field[2], [0.02 * PPM, np.nan], rtol=1e-6)
    assert phase[0].name == "pini"
    np.testing.assert_allclose(phase[1], [3.5 - 2 * np.pi, -0.75], rtol=1e-6)
    np.testing.assert_allclose(phase[2], [0.1, 0.2])
    assert list(phase_maps(fitted, fit, {})) == []
