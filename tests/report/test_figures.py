"""Slices must show the right side on the right side, in true proportions, with true numbers."""

import io

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from bids_gacelle.report import figures, geometry
from tests.report.report_fixture import oblique_affine

RAS = np.diag([4.0, 4.0, 4.0, 1])
LAS = np.diag([-4.0, 4.0, 4.0, 1])
PSR = np.array([[0, 0, 4.0, 0], [-4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 1]])
AFFINES = {
    "RAS": RAS,
    "LAS": LAS,
    "PSR": PSR,
    "oblique": oblique_affine((4, 4, 4), 20, flip=False),
    "oblique LAS": oblique_affine((4, 4, 4), 20),
    "oblique PSR": oblique_affine((1, 1, 1), 20, flip=False) @ PSR,
}
SHAPE = (30, 32, 28)


def centred(affine, shape):
    affine = affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def load(tmp_path, data, affine):
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    return geometry.load_volume(path)


def world(shape, affine):
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.tensordot(affine[:3, :3], ijk, 1) + affine[:3, 3, None, None, None]


def pixels(drawing):
    return np.asarray(Image.open(io.BytesIO(drawing.png)).convert("RGB")).astype(int)


def letters(mosaic, panel):
    """Position of each orientation letter of a panel, in CSS pixels from the top left."""
    found = {}
    for label in mosaic.figure.texts:
        x, y = label.get_position()
        x, y = x * mosaic.width, (1 - y) * mosaic.height
        inside = panel.x <= x <= panel.x + panel.width and panel.y <= y <= panel.y + panel.height
        if label.get_text() in "LRAPSI" and inside:
            found[label.get_text()] = np.array([x, y])
    return found


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
@pytest.mark.parametrize("spot", [(-20, 14, 12), (18, -16, -14)])
def test_bright_spot_is_nearest_to_the_letter_of_its_side(tmp_path, affine, spot):
    affine = centred(affine, SHAPE)
    distance = np.linalg.norm(world(SHAPE, affine) - np.reshape(spot, (3, 1, 1, 1)), axis=0)
    volume = load(tmp_path, (distance < 7).astype(np.float32), affine)
    mask = np.ones(volume.data.shape, bool)
    centre = [round(c.mean()) for c in np.nonzero(volume.data)]
    cuts = {plane.name: (centre[plane.cut],) for plane in geometry.PLANES}
    view = geometry.View(volume, tuple(slice(0, n) for n in mask.shape), cuts)
    mosaic = figures.map_figure(
        volume.data, mask, view, window=(0, 1), colormap="viridis", unit="", width=900, density=1
    )
    image = pixels(figures.draw_map(mosaic, "viridis", ""))
    yellow = (
        np.abs(image - np.round(255 * np.array(figures.colour_map("viridis")(1.0)[:3]))).sum(-1)
        < 12
    )
    side = {
        "x": "L" if spot[0] < 0 else "R",
        "y": "P" if spot[1] < 0 else "A",
        "z": "I" if spot[2] < 0 else "S",
    }
    opposite = dict(zip("LRPAIS", "RLAPSI", strict=True))
    assert len(mosaic.panels) == 3
    for panel, axes in zip(mosaic.panels, ("xy", "xz", "yz"), strict=True):
        rows, columns = np.nonzero(yellow)
        here = (columns >= panel.x) & (columns < panel.x + panel.width)
        here &= (rows >= panel.y) & (rows < panel.y + panel.height)
        middle = np.array([columns[here].mean(), rows[here].mean()])
        label = letters(mosaic, panel)
        for axis in axes:
            near, far = label[side[axis]], label[opposite[side[axis]]]
            assert np.linalg.norm(middle - near) < np.linalg.norm(middle - far), (
                panel.plane.name,
                axis,
            )


def test_neurological_convention_is_stated_and_kept(tmp_path):
    volume = load(tmp_path, np.ones(SHAPE, np.float32), centred(AFFINES["oblique LAS"], SHAPE))
    view = geometry.choose_view(volume)
    mosaic = figures.mosaic(view, lambda p, i: np.zeros((9, 9, 3), np.uint8), width=900, density=1)
    words = [t.get_text() for t in mosaic.figure.texts]
    assert any("Neurological" in w and "oblique" in w for w in words)
    axial = letters(mosaic, mosaic.panels[0])
    assert axial["L"][0] < axial["R"][0]
    assert axial["A"][1] < axial["P"][1]


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_captions_count_slices_as_the_file_does(tmp_path, affine):
    ijk = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    coded = (ijk[0] + 100 * ijk[1] + 10000 * ijk[2]).astype(np.float32)
    volume = load(tmp_path, coded, centred(affine, SHAPE))
    for axis in range(3):
        for index in (0, 5, volume.data.shape[axis] - 1):
            letter, number = volume.stored_index(axis, index).split()
            section = volume.data.take(index, axis).astype(int)
            stored = section // {"i": 1, "j": 100, "k": 10000}[letter] % 100
            assert np.all(stored == int(number))


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.0, 2.5, 5.0), (4.0, 1.0, 2.0)])
def test_a_ball_is_round_whatever_the_voxel_size(tmp_path, spacing):
    shape = tuple(int(100 / s) for s in spacing)
    affine = centred(np.diag([*spacing, 1]), shape)
    ball = (np.linalg.norm(world(shape, affine), axis=0) < 40).astype(np.float32)
    volume = load(tmp_path, ball, affine)
    view = geometry.choose_view(volume, per_plane=1)
    mosaic = figures.map_figure(
        ball, ball > 0, view, window=(0, 1), colormap="viridis", unit="", width=700, density=1.5
    )
    image = pixels(figures.draw_map(mosaic, "viridis", ""))
    yellow = (
        np.abs(image - np.round(255 * np.array(figures.colour_map("viridis")(1.0)[:3]))).sum(-1)
        < 12
    )
    for panel in mosaic.panels:
        x, y, w, h = (round(1.5 * v) for v in (panel.x, panel.y, panel.width, panel.height))
        rows, columns = np.nonzero(yellow[y : y + h, x : x + w])
        widest, tallest = np.ptp(columns) + 1, np.ptp(rows) + 1
        step = 1.5 * mosaic.scale * max(spacing)
        assert abs(widest - tallest) <= 2 * step
        assert abs(widest - 80 * 1.5 * mosaic.scale) <= 2 * step


def test_slices_lie_in_the_mask_and_spread_over_it(tmp_path):
    data = np.zeros((40, 40, 40), np.float32)
    data[5:35, 8:30, 10:24] = 1
    view = geometry.choose_view(load(tmp_path, data, RAS))
    assert [len(c) for c in view.cuts.values()] == [7, 7, 7]
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        inside = np.flatnonzero(data.any(axis=tuple(a for a in range(3) if a != axis)))
        assert set(view.cuts[name]) <= set(inside)
        assert np.ptp(view.cuts[name]) > 0.7 * np.ptp(inside)
    assert view.cuts["axial"][3] == 17
    assert view.fewer(3).cuts["axial"] == (
        view.cuts["axial"][1],
        view.cuts["axial"][3],
        view.cuts["axial"][5],
    )


@pytest.mark.parametrize(
    ("shape", "spacing", "planes"),
    [
        ((64, 64, 2), (3, 3, 8), {"axial": 2, "coronal": 7, "sagittal": 7}),
        ((64, 64, 1), (3, 3, 5), {"axial": 1}),
        ((3, 90, 60), (1, 1, 1), {"axial": 7, "coronal": 7, "sagittal": 3}),
        ((200, 8, 8), (0.5, 2, 2), {"axial": 7, "coronal": 7, "sagittal": 7}),
    ],
)
def test_thin_and_odd_volumes_fit_the_page(tmp_path, shape, spacing, planes):
    volume = load(tmp_path, np.ones(shape, np.float32), np.diag([*spacing, 1.0]))
    view = geometry.choose_view(volume)
    assert {name: len(cuts) for name, cuts in view.cuts.items()} == planes
    panels, scale, height = geometry.arrange(view, 1100, 560)
    assert len(panels) == sum(planes.values())
    for panel in panels:
        assert panel.x >= 0
        assert panel.x + panel.width <= 1100.01
        assert panel.y + panel.height <= height <= 560
        width, tall = view.size(panel.plane)
        assert panel.width / panel.height == pytest.approx(width / tall)
        assert panel.width == pytest.approx(width * scale)
    for n, one in enumerate(panels):
        for other in panels[n + 1 :]:
            apart_x = one.x + one.width <= other.x or other.x + other.width <= one.x
            apart_y = one.y + one.height <= other.y or other.y + other.height <= one.y
            assert apart_x or apart_y


def test_nan_and_outside_have_their_own_colours(tmp_path):
    data = np.full((12, 12, 12), 0.5, np.float32)
    data[6:] = np.nan
    mask = np.zeros(data.shape, bool)
    mask[2:10, 2:10, 2:10] = True
    view = geometry.choose_view(load(tmp_path, mask.astype(np.float32), RAS), per_plane=1)
    mosaic = figures.map_figure(
        data, mask, view, window=(0, 1), colormap="magma", unit="ms", width=600, density=1
    )
    image = pixels(figures.draw_map(mosaic, "magma", ""))
    axial = mosaic.panels[0]
    sampled = {}
    for name, (column, row) in {
        "value": (0.35, 0.3),
        "nan": (0.65, 0.3),
        "outside": (0.04, 0.04),
    }.items():
        y, x = int(axial.y + row * axial.height), int(axial.x + column * axial.width)
        sampled[name] = image[y, x]
    assert np.allclose(sampled["nan"], 255 * np.array(to_rgb(figures.NO_VALUE)), atol=1)
    assert np.allclose(sampled["outside"], 255 * np.array(to_rgb(figures.BACKGROUND)), atol=1)
    assert np.allclose(
        sampled["value"], 255 * np.array(figures.colour_map("magma")(0.5)[:3]), atol=3
    )
    assert any(t.get_text() == "no value" for t in mosaic.figure.texts)


def test_flag_map_shows_the_most_serious_flag(tmp_path):
    mask = np.ones((16, 16, 4), bool)
    flags = np.zeros(mask.shape, np.uint8)
    flags[:8] = 2 | 4
    view = geometry.choose_view(load(tmp_path, mask.astype(np.float32), RAS), per_plane=1)
    image = pixels(figures.draw_flags(flags, mask, view, width=604, density=1, alt=""))
    area = {
        name: (np.abs(image - 255 * np.array(to_rgb(c))).sum(-1) < 4).sum()
        for _, name, c in figures.FLAGS
    }
    assert area["unusable input"] > 20 * area["a parameter at a bound"] > 0  # the legend only
    assert 0.7 < area["unusable input"] / area["ok"] < 1.4


def test_mask_edges_count_every_border_once():
    rng = np.random.default_rng(3)
    inside = rng.random((9, 7)) < 0.5
    padded = np.pad(inside, 1)
    expected = sum(
        padded[r, c] != padded[r + dr, c + dc]
        for r in range(padded.shape[0] - 1)
        for c in range(padded.shape[1] - 1)
        for dr, dc in ((1, 0), (0, 1))
    )
    edges = figures.mask_edges(inside)
    assert len(edges) == expected
    assert np.allclose(np.abs(np.diff(edges, axis=1)).sum(axis=(1, 2)), 1)
    assert len(figures.mask_edges(np.ones((1, 1), bool))) == 4


def test_histogram_and_example_draw_what_they_are_given():
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(1, 0.1, 500), np.full(200, 9.0), np.nan]
    drawing = figures.draw_histogram(
        values, (0, 2), label="T1 (s)", width=604, density=1, alt="h", bounds=(0.1, 20)
    )
    image = pixels(drawing)
    assert image.shape[:2] == (drawing.height, drawing.width) == (180, 604)
    red = np.abs(image - 255 * np.array(to_rgb(figures.BEYOND))).sum(-1) < 30
    assert red.any()
    assert np.nonzero(red)[1].min() > 500  # the overflow bar stands at the right end
    with pytest.raises(ValueError, match="no voxel"):
        figures.draw_histogram(np.array([np.nan]), (0, 1), label="", width=300, density=1, alt="")
    with pytest.raises(ValueError, match="3 abscissae, 2 data points"):
        figures.draw_example(
            {"data": [1, 2], "fit": [1, 2]}, {"x": [1, 2, 3]}, width=300, density=1, alt=""
        )


@pytest.mark.parametrize(
    ("top", "expected"), [(0.058, 0.06), (1.0, 1.0), (23.0, 25.0), (9.9, 10.0), (0.0, 1.0)]
)
def test_nice_limit_is_round_and_large_enough(top, expected):
    assert figures.nice_limit(np.full(50, top)) == pytest.approx(expected)


def test_nice_limit_is_not_led_by_a_long_tail():
    values = np.r_[np.full(90, 0.002), np.full(10, 0.4)]
    assert figures.nice_limit(values) == pytest.approx(0.015)


def test_unreadable_geometry_is_refused(tmp_path):
    with pytest.raises(ValueError, match="4 dimensions"):
        load(tmp_path, np.ones((4, 4, 4, 2), np.float32), RAS)
    with pytest.raises(ValueError, match="empty"):
        geometry.choose_view(load(tmp_path, np.zeros((4, 4, 4), np.float32), RAS))
