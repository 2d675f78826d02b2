"""Pictures of a diffusion acquisition: even stays even, and every point is where it belongs."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from bids_gacelle.report import acquisition, figures


def pixels(drawing):
    return np.asarray(Image.open(io.BytesIO(drawing.png)).convert("RGB")).astype(int)


def coloured(image, colour):
    """(rows, columns) of the pixels of a colour."""
    return np.nonzero(np.abs(image - 255 * np.array(to_rgb(colour))).sum(-1) < 40)


def sphere(n, seed=0):
    g = np.random.default_rng(seed).normal(size=(n, 3))
    return g / np.linalg.norm(g, axis=1)[:, None]


def shell(b, delta, n, group, **more):
    about = {"b": b, "big_delta": delta, "group": group, "unevenness": 0.01}
    return about | {"directions": sphere(n, int(10 * b)).tolist(), **more}


def test_folding_takes_antipodes_together_and_keeps_areas():
    g = sphere(200_000)
    flat = acquisition.folded(g)
    np.testing.assert_allclose(flat, acquisition.folded(-g))
    radius = np.hypot(*flat.T)
    assert radius.max() <= 1 + 1e-9
    for edge in (0.3, 0.6, 0.9):  # even directions are even on the disc: the share is the area
        assert (radius < edge).mean() == pytest.approx(edge**2, abs=0.004)
    np.testing.assert_allclose(acquisition.folded(np.array([[0, 0, 1.0], [0, 0, -1.0]])), 0)
    np.testing.assert_allclose(acquisition.folded(np.array([[0.6, 0, 0.8]]))[0], [0.2**0.5, 0])
    rim = acquisition.folded(np.array([[0, 1.0, 0]]))
    np.testing.assert_allclose(np.hypot(*rim.T), 1)


def test_shells_stand_at_their_b_and_delta():
    shells = [
        shell(1.0, 20.0, 20, "Δ 20 ms"),
        shell(3.0, 20.0, 30, "Δ 20 ms"),
        shell(2.0, 40.0, 64, "Δ 40 ms"),
    ]
    drawing = acquisition.draw_acquisition(shells, density=1, alt="shells")
    image = pixels(drawing)
    assert image.shape[:2] == (drawing.height, drawing.width)
    foot = drawing.height - 60  # above the legend
    left = image[:foot, :440]
    (rows, columns), (rows2, columns2) = (
        coloured(left, figures.GROUP_COLOURS[k]) for k in range(2)
    )
    assert rows2.max() < rows.min()  # the longer diffusion time is higher up
    assert columns.min() < columns2.mean() < columns.max()
    middle = (columns.min() + columns.max()) / 2
    assert columns2.mean() == pytest.approx(middle, abs=2)  # b 2 lies between b 1 and b 3
    right = image[:, 452:]
    assert len(coloured(right, figures.GROUP_COLOURS[1])[0]) > 64


def test_unknown_times_and_many_shells_have_a_picture_too():
    untimed = [{k: v for k, v in shell(b, 1, 30, "").items() if k != "big_delta"} for b in (1, 2)]
    acquisition.draw_acquisition(untimed, density=1, alt="")
    many = [shell(0.1 + 0.1 * n, 10.0 + n, 15, f"Δ {10 + n} ms") for n in range(30)]
    drawing = acquisition.draw_acquisition(many, density=1, alt="")
    assert drawing.height < 1000
    with pytest.raises(ValueError, match="no shells"):
        acquisition.draw_acquisition([], density=1, alt="")


def tissue(values, **more):
    curve = {"group": "", "x": [1, 2, 3], "y": values}
    about = {"name": "white matter", "n_voxels": 10, "n_shown": 10, "curves": [curve]}
    bars = {"q25": [0.9 * v for v in values], "q75": [1.1 * v for v in values]}
    return about | {"median": values, "fit": values, **bars, **more}


@pytest.mark.parametrize("log", [False, True])
def test_each_tissue_has_its_panel(log):
    plot = {"x": [1, 2, 3], "x_label": "b (ms/um^2)", "groups": [""] * 3}
    tissues = [tissue([0.8, 0.5, 0.3]), tissue([0.3, 0.1, 0.03], name="CSF")]
    drawing = acquisition.draw_decays(tissues, plot, density=1, alt="decay", log=log)
    image = pixels(drawing)
    rows, columns = coloured(image, figures.GROUP_COLOURS[0])
    half = drawing.width / 2
    first, second = (rows[columns < half], rows[columns > half])
    assert len(first) > 100
    assert len(second) > 100
    if log:  # one axis: less signal is lower down
        assert second.min() > first.min() + 20
    for wrong in ([], [tissue([0.8, 0.5])]):
        with pytest.raises(ValueError, match=r"no tissue|3 abscissae, 2 medians"):
            acquisition.draw_decays(wrong, plot, density=1, alt="")


def test_signals_below_zero_stay_in_the_picture():
    plot = {"x": [1, 2, 3], "groups": [""] * 3}
    acquisition.draw_decays([tissue([0.8, 0.1, -0.05])], plot, density=1, alt="", log=True)
    acquisition.draw_decays([tissue([0.8, 0.1, -0.05])], plot, density=1, alt="")
