"""Models that users write: the documented example, files on the command line, and refusals."""

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from bids_gacelle.cli.main import main
from bids_gacelle.engine import (
    DiffusionScheme,
    EngineError,
    GradientEchoScheme,
    Parameter,
    SignalModel,
    fit,
    get_model,
    list_models,
    signal_model,
    use_models,
)
from bids_gacelle.engine.kernels import COMPILE_VARIABLE
from bids_gacelle.engine.models.checks import check_declaration, check_signal, probe_scheme
from bids_gacelle.interfaces import model_files
from bids_gacelle.interfaces.plots import example_voxels
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import add_dwi, add_megre, new_dataset

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/models.md").read_text(), re.M | re.S)[
    1
]
B = np.linspace(0.3, 6, 12)

SHORT = """\
import torch
from bids_gacelle.engine import Parameter, signal_model
@signal_model(kind="dwi", parameters=[Parameter("d", "um^2/ms", "D", bounds=(0, 4))])
def decay(params, scheme):
    return torch.exp(-scheme.b * params["d"])
"""


@pytest.fixture(autouse=True)
def forget():
    """Leave the process as it was."""
    yield
    model_files.use_model_files([])


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(EXAMPLE)
    return path


@pytest.fixture
def biexponential(model_file):
    model_files.load_model_files([model_file])
    return get_model("biexponential")


def formula(x, b=B):
    f, fast, slow = x
    return f * np.exp(-b * fast) + (1 - f) * np.exp(-b * slow)


@pytest.fixture
def voxels():
    rng = np.random.default_rng(4)
    truth = np.stack([rng.uniform(*r, 60) for r in ((0.3, 0.7), (1.2, 2.6), (0.1, 0.4))])
    clean = np.stack([formula(x) for x in truth.T], 1)
    return truth, clean + rng.normal(0, 0.002, clean.shape)


# --- in Python ---------------------------------------------------------------------------------


def test_the_documented_example_is_short():
    assert sum(bool(line.strip()) for line in EXAMPLE.splitlines()) <= 15


def test_the_documented_example_declares_what_it_needs(biexponential):
    assert biexponential.name == "biexponential"
    assert biexponential.title == "Bi-exponential decay of the powder-averaged signal"
    assert (biexponential.kind, biexponential.datatype) == ("dwi", "dwi")
    assert biexponential.minimum_measurements == 3
    assert biexponential.required == ("b",)
    assert not biexponential.needs_diffusion_times
    assert get_model(biexponential) is biexponential


def test_the_documented_example_is_fitted_as_scipy_does(biexponential, voxels):
    truth, data = voxels
    result = fit(biexponential(DiffusionScheme(b=B)), data, precision="float64")
    lower, upper = zip(*(p.bounds for p in biexponential.parameters), strict=True)
    inside = result.flags == 0
    assert inside.mean() > 0.9
    for i in np.flatnonzero(inside):
        reference = least_squares(
            lambda x, y=data[:, i]: formula(x) - y,
            truth[:, i],
            bounds=(lower, upper),
            xtol=1e-12,
            ftol=1e-14,
            gtol=1e-12,
        )
        ours = [result.maps[name][i] for name in ("f", "dfast", "dslow")]
        np.testing.assert_allclose(ours, reference.x, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager(biexponential, voxels, monkeypatch):
    model = biexponential(DiffusionScheme(b=B))
    monkeypatch.setenv(COMPILE_VARIABLE, "never")
    eager = fit(model, voxels[1])
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    compiled = fit(model, voxels[1])
    assert compiled.settings["compiled"]
    for name in model.parameter_names:
        distance = np.abs(compiled.maps[name] - eager.maps[name]) / eager.std[name]
        assert np.nanmax(distance) < 0.02


def test_a_derivative_by_forward_mode_is_compiled_in_one_piece(biexponential):
    model = biexponential(DiffusionScheme(b=B))
    params = {p.name: torch.linspace(*p.start, 5) for p in model.parameters}
    expected = model.jacobian(params)
    torch.compiler.reset()
    found = torch.compile(model.jacobian, fullgraph=True, backend="eager")(params)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected)


def test_voxel_inputs_options_and_amplitude():
    @signal_model(
        kind="vfa",
        parameters=(
            Parameter("M0", "arbitrary", "M0", bounds=(0, np.inf), amplitude=True),
            Parameter("angle", "1", "Scale", bounds=(0.1, 3), start=(0.5, 1.5)),
        ),
        inputs={"b1": 1.0},
        title="Sine",
    )
    def sine_law(params, scheme, inputs, *, power=1.0):
        turn = torch.deg2rad(scheme.flip_angle * params["angle"] * inputs["b1"])
        return params["M0"] * torch.sin(turn) ** power

    assert (sine_law.name, sine_law.title, sine_law.datatype) == ("sinelaw", "Sine", "anat")
    assert sine_law.required == ("flip_angle",)
    flips = [10, 30, 50, 70]
    scheme = GradientEchoScheme(flip_angle=flips)
    b1, angle = np.array([0.8, 1.0, 1.2]), np.array([0.7, 1.0, 1.3])
    data = 500 * np.sin(np.deg2rad(np.outer(flips, angle * b1))) ** 2
    result = fit(sine_law(scheme, power=2.0), data, inputs={"b1": b1}, precision="float64")
    np.testing.assert_allclose(result.maps["angle"], angle, rtol=1e-3)
    np.testing.assert_allclose(result.maps["M0"], 500, rtol=1e-3)
    with pytest.raises(EngineError, match="has no option 'order'; it has power"):
        sine_law(scheme, order=3)


def test_a_model_of_one_acquisition_has_no_curve_and_costs_no_maps():
    def only_measured(params, scheme):
        if len(scheme.b) not in (8, len(B)):
            raise EngineError("only the shells that were measured")
        return torch.exp(-scheme.b * params["d"])

    model = declare(only_measured)(DiffusionScheme(b=B))
    data = np.exp(-np.outer(B, [0.5, 1.0]))
    examples = example_voxels(model, data, {}, fit(model, data), np.ones((2, 1, 1), bool))
    assert [e["curves"] for e in examples] == [[], [], []]
    assert {round(e["values"]["d"], 2) for e in examples} == {0.5, 1.0}


def test_diffusion_times_become_a_need():
    @signal_model(kind="dwi", parameters=[Parameter("d", "um^2/ms", "D", bounds=(0, 4))])
    def timed(params, scheme):
        return torch.exp(-scheme.b * params["d"] * (1 - scheme.small_delta / scheme.big_delta))

    assert timed.needs_diffusion_times
    assert set(timed.required) == {"b", "small_delta", "big_delta"}
    with pytest.raises(EngineError, match=r"timed needs .* in its acquisition"):
        timed(DiffusionScheme(b=[1.0, 2.0]))


def declare(function, *, kind="dwi", parameters=None, **more):
    d = Parameter("d", "um^2/ms", "D", bounds=(0.0, 4.0))
    return signal_model(kind=kind, parameters=(d,) if parameters is None else parameters, **more)(
        function
    )


def good(params, scheme):
    return torch.exp(-scheme.b * params["d"])


def wrong_shape(params, scheme):
    return torch.exp(-scheme.b * params["d"]).sum(0)


def turned(params, scheme):
    return torch.exp(-scheme.b * params["d"].flip(-1))


def branching(params, scheme):
    bright = params["d"].mean() > 2
    return torch.exp(-scheme.b * params["d"]) + 0.01 * bright


def by_numpy(params, scheme):
    return np.asarray(params["d"]) * np.asarray(scheme.b)


def half_numpy(params, scheme):
    return torch.exp(-scheme.b * torch.as_tensor(np.asarray(params["d"])))


def detached(params, scheme):
    return torch.exp(-scheme.b * params["d"].detach())


def in_place(params, scheme):
    params["d"] *= 2
    return torch.exp(-scheme.b * params["d"])


def scheme_in_place(params, scheme):
    scheme.b.mul_(1.5)
    return torch.exp(-scheme.b * params["d"])


def not_a_number(params, scheme):
    return torch.log(-scheme.b * params["d"])


def infinite(params, scheme):
    return 1 / (0 * scheme.b * params["d"])


def neighbours(params, scheme):
    return torch.exp(-scheme.b * params["d"] / params["d"].mean())


def complex_valued(params, scheme):
    return torch.exp(-1j * scheme.b * params["d"])


def double(params, scheme):
    return torch.exp(-torch.linspace(0, 1, 8, dtype=torch.float64)[:, None, None] * params["d"])


def unknown_parameter(params, scheme):
    return torch.exp(-scheme.b * params["D"])


def unknown_column(params, scheme):
    return torch.exp(-scheme.bval * params["d"])


def raises(params, scheme):
    raise RuntimeError("no such luck")


def one_argument(params):
    return params["d"]


def no_default(params, scheme, *, order):
    return good(params, scheme)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (wrong_shape, r"wrongshape has shape \(2, 3\) .* must be \(measurements, ...\)"),
        (by_numpy, "is of type ndarray; return a tensor"),
        (half_numpy, "derivatives of halfnumpy cannot be computed: .* torch only, not numpy"),
        (detached, r"derivative of detached by d is not that of its signal; .*\.detach\(\)"),
        (in_place, "inplace changes its parameters in place"),
        (scheme_in_place, "schemeinplace is another one when a voxel comes alone"),
        (not_a_number, "notanumber is nan at measurement 1 for d = "),
        (infinite, "infinite is inf at measurement 1"),
        (neighbours, "neighbours is another one when a voxel comes alone"),
        (turned, "turned is another one when a voxel comes alone"),
        (branching, "branching is another one when a voxel comes alone"),
        (complex_valued, "is complex; it must be real"),
        (double, "does not keep the precision .* became torch.float64"),
        (unknown_parameter, "it has no 'D'; its parameters are d"),
        (unknown_column, "no column 'bval'; it has b, big_delta"),
        (raises, "signal of raises cannot be computed: RuntimeError: no such luck"),
        (one_argument, r"takes \(params\); a signal model takes \(params, scheme\)"),
        (no_default, "option order of no_default needs a default value"),
    ],
)
def test_functions_that_cannot_be_fitted(function, sentence):
    with pytest.raises(EngineError, match=sentence) as caught:
        declare(function)
    assert "\n" not in str(caught.value)


def parameter(**fields):
    return (Parameter("d", "um^2/ms", "D", **fields),)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "t1w"}, "kind of good is 't1w'; it can be megre, vfa, dwi"),
        ({"name": "my-model"}, "name 'my-model' cannot stand in file names"),
        ({"parameters": ()}, "must be a tuple of Parameter"),
        ({"parameters": ("d",)}, "must be a tuple of Parameter"),
        ({"parameters": parameter()}, "d of good needs a start box or finite bounds"),
        ({"parameters": parameter(bounds=(2, 1))}, r"bounds \(2, 1\); the first must be lower"),
        ({"parameters": parameter(bounds=3)}, "must be a pair of numbers"),
        (
            {"parameters": parameter(bounds=(0, 1), start=(0.5, 2))},
            r"starts in \(0.5, 2\), which is no box inside its bounds \(0, 1\)",
        ),
        (
            {"parameters": parameter(bounds=(0, 1), coordinate="log")},
            "a lower bound above 0",
        ),
        ({"parameters": parameter(amplitude=True)}, "at least one other parameter"),
        ({"required": ("bval",)}, "requires 'bval', which dwi data do not have; they have b,"),
        ({"minimum_measurements": 0}, "give a whole number of at least 1"),
        (
            {"parameters": (*parameter(bounds=(0, 4)), Parameter("D", "1", "x", bounds=(0, 1)))},
            "two parameters named 'D'",
        ),
        (
            {
                "parameters": (
                    *parameter(bounds=(0, 4)),
                    Parameter("S0", "arbitrary", "S0", amplitude=True),
                )
            },
            "S0 of good is declared as amplitude, but",
        ),
    ],
)
def test_declarations_that_cannot_be(fields, sentence):
    with pytest.raises(EngineError, match=sentence):
        declare(good, **fields)


def of_class(**attributes):
    """Return an object of a class that somebody wrote, with some attributes of another kind."""

    class Mono(SignalModel):
        name = "mono"
        title = description = "x"
        kind = datatype = "dwi"
        parameters = (Parameter("d", "um^2/ms", "D", bounds=(0.0, 4.0)),)

        def signal(self, params, inputs=None):
            b = self.table("b", self.scheme.b, params["d"])
            return torch.exp(-b * params["d"])

    for name, value in attributes.items():
        if value is None:
            delattr(Mono, name)
        else:
            setattr(Mono, name, value)
    return Mono(DiffusionScheme(b=B))


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"name": None}, "class Mono lacks 'name'"),
        ({"kind": None}, "class Mono lacks 'kind'"),
        ({"title": None}, "class Mono lacks 'title'"),
        (
            {"parameters": [Parameter("d", "1", "D")]},
            "must be a tuple of Parameter",
        ),
        ({"parameters": (Parameter("d", "1", "D", bounds=(4, 0)),)}, "the first must be lower"),
        ({"parameters": (Parameter("d", "1", "D"),)}, "needs a start box or finite bounds"),
        ({"linear": ("q",)}, "has no parameter 'q', which it calls linear"),
        ({"derived": (Parameter("q", "1", "Q"),)}, "'q', which its derive does not return"),
        (
            {"signal": lambda self, p, i=None: p["d"]},
            r"must be \(measurements, ...\)",
        ),
        (
            {"signal": lambda self, p, i=None: torch.stack([p["d"] + p["d"].mean()] * len(B))},
            "another one when a voxel comes alone",
        ),
        (
            {"signal": lambda self, p, i=None: torch.stack([p["d"].detach()] * len(B))},
            "derivative of mono by d is not that of its signal",
        ),
    ],
)
def test_classes_that_cannot_be_fitted(attributes, sentence):
    with pytest.raises(EngineError, match=sentence):
        fit(of_class(**attributes), np.ones((len(B), 3)))


@pytest.mark.parametrize("model", ["r2star", None, get_model("r2star"), good])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(EngineError, match="must be an object of a SignalModel class, got"):
        fit(model, np.ones((len(B), 3)))


@pytest.mark.parametrize("name", list_models())
def test_our_own_models_pass_the_checks(name):
    cls = get_model(name)
    check_declaration(cls)
    check_signal(cls(probe_scheme(cls)))


def test_names_of_others_are_not_taken_over(biexponential):
    use_models([biexponential])
    assert get_model("biexponential") is biexponential
    assert list_models()[-1] == "biexponential"
    for taken in ("Nexi", "r2star"):
        with pytest.raises(EngineError, match=f"name '{taken}' is taken by '{taken.lower()}'"):
            use_models([declare(good, name=taken)])
    with pytest.raises(EngineError, match="is taken"):
        use_models([biexponential, biexponential])
    assert get_model("biexponential") is biexponential
    use_models([])
    assert "biexponential" not in list_models()


# --- on the command line -----------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_dwi(root)
    add_megre(root)
    return root


def run(dataset, out, *words, processes=1):
    return main([*map(str, (dataset, out, "participant", "--nprocs", processes, *words))])


def reason(out):
    newest = max(out.glob("logs/*/summary.json"), key=lambda p: p.stat().st_mtime)
    [job] = json.loads(newest.read_text())["jobs"]
    assert job["status"] == "ok"
    return job["reason"]


def test_a_file_is_fitted_reported_and_resumed(
    dataset, model_file, tmp_path, bids_errors, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.chdir(model_file.parent)
    words = ("--model-file", model_file.name, "--models", "biexponential")
    assert run(dataset, out, *words, "--set", "biexponential.starts=2", processes=2) == 0
    folder = out / "sub-01/dwi"
    fast = nib.load(folder / "sub-01_model-biexponential_param-dfast_dwimap.nii.gz").get_fdata()
    assert np.isfinite(fast).all()
    assert fast.max() > 0.5
    stem = "sub-01_model-biexponential_param-f"
    assert (folder / f"{stem}_desc-std_dwimap.nii.gz").exists()
    sidecar = json.loads((folder / f"{stem}_dwimap.json").read_text())
    assert sidecar["Model"]["File"].startswith("my_model.py (SHA-256 ")
    assert sidecar["Model"]["Parameters"]["Starts"] == 2
    page = (out / "sub-01.html").read_text()
    assert "Bi-exponential decay of the powder-averaged signal" in page
    assert "defined by the user in my_model.py" in page
    [log] = out.glob("logs/2*")
    assert (log / "model_files/1_my_model.py").read_text() == EXAMPLE
    assert f'"{model_file}"' in (log / "bids_gacelle.toml").read_text()
    assert bids_errors(out) == []

    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")
    config = ("--config-file", log / "bids_gacelle.toml", "--resume")
    assert run(dataset, out, *config) == 0
    assert reason(out) == "unchanged since an earlier run"
    model_file.write_text(EXAMPLE.replace("bounds=(0.5, 4)", "bounds=(0.5, 0.9)").replace(
        "start=(1, 3)", "start=(0.6, 0.8)"))  # fmt: skip
    assert run(dataset, out, *config) == 0
    assert reason(out) == ""
    fast = nib.load(folder / "sub-01_model-biexponential_param-dfast_dwimap.nii.gz").get_fdata()
    assert fast.max() <= 0.9 + 1e-6


def test_models_of_a_file_join_the_others_for_one_run(dataset, model_file, tmp_path, capsys):
    assert run(dataset, tmp_path / "out", "--model-file", model_file, "--dry-run") == 0
    text = capsys.readouterr().out
    assert re.search(r"dwi +biexponential +yes", text)
    assert re.search(r"megre +r2star +yes", text)
    assert run(dataset, tmp_path / "out", "--dry-run") == 0
    assert "biexponential" not in capsys.readouterr().out
    assert run(dataset, tmp_path / "out", "--models", "biexponential", "--dry-run") == 2


def test_several_files_and_classes(dataset, model_file, tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text(
        "from dataclasses import dataclass\n"
        "from bids_gacelle.engine.models.r2star import R2Star\n"
        "@dataclass\nclass Helper:\n    x: 'int' = 1\n"
        "class Mine(R2Star):\n    name = 'mine'\n    title = 'My decay'\n    bare_names = False\n"
    )
    words = ["--model-file", str(model_file), f"--model-file={other}"]
    assert main(["--list-models", *words]) == 0
    listed = capsys.readouterr().out
    assert f"mine: My decay ({other})" in listed
    assert f"biexponential: Bi-exponential decay of the powder-averaged signal ({model_file})" in (
        listed
    )
    assert "dfast [um^2/ms]" in listed
    assert main([*words, "--list-models"]) == 0
    assert "mine: My decay" in capsys.readouterr().out
    assert run(dataset, tmp_path / "out", *words, "--set", "mine.order=2", "--dry-run") == 2
    assert "neither mine nor the solver lm has such an option" in capsys.readouterr().err


CLASS = """\
from bids_gacelle.engine import Parameter, SignalModel


class Mine(SignalModel):
    name = "mine"
    title = description = "x"
    kind = datatype = "dwi"
    parameters = (Parameter("d", "um^2/ms", "D", bounds=(0, 4)),)

    def signal(self, params, inputs=None):
        return params["d"]
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import torch\ndef f(:\n", ", line 2: invalid syntax (Python syntax)."),
        ("\nimport no_such_package\n", ", line 2: No module named 'no_such_package'. A model"),
        ("x = 1\ny = x / 0\n", ", line 2: ZeroDivisionError: division by zero."),
        ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3."),
        ("x = 1\n", " defines no signal model; write a function with @signal_model"),
        (SHORT.replace("scheme.b ", "scheme.bval "), ", line 5: The acquisition has no column"),
        (SHORT.replace('kind="dwi"', 'kind="t1w"'), ", line 3: The kind of decay is 't1w'"),
        (SHORT.replace("torch.exp", "torch.log"), ", line 3: The signal of decay is nan"),
        (SHORT.replace("decay", "nexi"), "line 4: The model name 'nexi' is taken by 'nexi'"),
        (SHORT.replace("decay", "themean"), "line 4: The maps of themean cannot be named"),
        (SHORT.replace('"d"', '"nrmse"'), "line 4: Two maps of decay would be called"),
        (SHORT.replace('"d"', '"d_x"'), "line 4: The maps of decay cannot be named"),
        (SHORT + SHORT[SHORT.index("@") :].replace("decay", "Decay"), "line 7: The model name"),
        (CLASS, "line 4: The signal of mine has shape (2, 3)"),
        (CLASS.replace('["d"]', '["x"]'), "line 11: The signal of mine cannot be computed"),
        (CLASS.replace("    name", "    _name"), "line 4: The model class Mine lacks 'name'."),
        (CLASS.replace("datatype = ", ""), "line 4: The model class Mine lacks 'datatype'."),
        (CLASS.replace("def signal", "def sgnal"), " defines no signal model"),
        ("\0", "null bytes (Python syntax)"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_used(dataset, tmp_path, capsys, text, sentence):
    path = tmp_path / "bad.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(dataset, tmp_path / "out", "--model-file", path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert sentence in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1
    assert main(["--list-models", "--model-file", str(path)]) == 2


def test_files_that_are_not_there(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(dataset, tmp_path / "out", "--model-file", tmp_path / "absent.py")
    assert stop.value.code == 2
    assert "absent.py does not exist" in capsys.readouterr().err
    assert run(dataset, tmp_path / "out", "--model-file", tmp_path) == 2
    assert f"Cannot read the model file {tmp_path}: Is a directory." in capsys.readouterr().err


def test_broken_packages_of_others(tmp_path, monkeypatch, capsys):
    info = tmp_path / "their_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bids_gacelle.models]\ndecay = their_functions:decay\nplain = their_functions:plain\n"
    )
    (tmp_path / "their_functions.py").write_text(SHORT + "def plain(params, scheme): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_model("decay").required == ("b",)
    with pytest.raises(EngineError, match="is no SignalModel; a function needs @signal_model"):
        get_model("plain")
    (info / "entry_points.txt").write_text("[bids_gacelle.models]\ngone = their_gone:Gone\n")
    assert main(["--list-models"]) == 2
    assert "'gone' that an installed package announces as their_gone:Gone" in (
        capsys.readouterr().err
    )
