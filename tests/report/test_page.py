"""The page as a reader gets it: whole, self-contained, the same every time, and never silent."""

import base64
import copy
import io
import itertools
import re
import shutil
from pathlib import Path

import html5lib
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from bids_gacelle.report import build_subject_report, page
from tests.report import report_fixture as fixture

NASTY = "a<script>alert(1)</script>&\"'{{ 7*7 }}\x00\x1b[31m\ud800 </style> é"


def parse(path):
    """Elements of the page; fails on any violation of the HTML standard."""
    parser = html5lib.HTMLParser(namespaceHTMLElements=False)
    tree = parser.parse(Path(path).read_bytes(), transport_encoding="utf-8")
    assert not parser.errors
    return tree


def words(tree):
    return " ".join("".join(tree.find("body").itertext()).split())


def pictures(tree):
    return [i for i in tree.iter("img") if i.get("src")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two sessions, three models, one failed fit; and its page."""
    out = tmp_path_factory.mktemp("whole")
    manifests, status = fixture.write_dataset(out)
    path = build_subject_report(out, "01", manifests, status, fixture.RUN)
    return out, manifests, status, path


@pytest.fixture(scope="module")
def tree(dataset):
    return parse(dataset[3])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One model with one map, to take things away from."""
    out = tmp_path_factory.mktemp("small")
    head = fixture.make_head((14, 16, 10), fixture.oblique_affine((11, 12, 14)))
    manifest = fixture.write_model(out, fixture.R2STAR, head)
    manifest["maps"] = manifest["maps"][1:2]
    return out, manifest


@pytest.fixture
def broken(small, tmp_path, monkeypatch):
    """A copy of the small dataset, and a function that builds its page (in coarse pictures)."""
    monkeypatch.setattr(page, "DENSITY", 0.7)
    out = tmp_path / "out"
    shutil.copytree(small[0], out)
    manifest = copy.deepcopy(small[1])

    def build(**changes):
        return parse(build_subject_report(out, "01", [manifest | changes], [], fixture.RUN))

    return out, manifest, build


def test_page_has_every_section_and_its_links_lead_somewhere(dataset, tree):
    assert dataset[3] == dataset[0] / "sub-01.html"
    content = words(tree)
    for section in ("Inputs", "Mask", "Maps", "ROI statistics", "Methods", "Errors", "Reproduce"):
        assert section in content
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a.get("href")[1:] for a in tree.iter("a") if a.get("href").startswith("#")]
    assert set(targets) <= set(ids)
    levels = [int(e.tag[1]) for e in tree.iter() if e.tag in ("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_page_is_accessible(tree):
    assert tree.get("lang") == "en"
    for image in pictures(tree):
        assert len(image.get("alt")) > 15
    for table in tree.iter("table"):
        head = table.find("thead")
        assert head is not None
        assert all(th.get("scope") == "col" for th in head.iter("th"))


def test_page_is_self_contained_and_small(dataset, tree):
    content = dataset[3].read_text(encoding="utf-8")
    assert len(content.encode()) < page.SIZE_LIMIT
    for element in tree.iter():
        if not isinstance(element.tag, str):
            continue
        assert element.tag not in ("link", "iframe", "object", "embed", "base")
        for name, value in element.attrib.items():
            if element.tag == "a" and name == "href":
                assert value.startswith(("#", "https://doi.org/"))
            elif name in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith("data:image/png;base64,")
            else:
                assert "http:" not in value
                assert "https:" not in value
    inline = "".join(e.text for tag in ("style", "script") for e in tree.iter(tag))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", inline)
    assert sum(1 for _ in tree.iter("script")) == 1


def test_every_picture_is_a_palette_png_of_the_stated_proportions(tree):
    images = pictures(tree)
    # Four fits: mask, 4 per map, NRMSE with histogram, flags, three voxels; of the diffusion one
    # also the acquisition and the signals of tissues.
    maps = sum(len(fixture.SPECS[m].maps) for m in ("r2star", "despot1", "nexi", "r2star"))
    assert len(images) == 4 * (1 + 2 + 1 + 3) + 4 * maps + 2
    for element in images:
        png = base64.b64decode(element.get("src").split(",", 1)[1], validate=True)
        image = Image.open(io.BytesIO(png))
        image.load()
        assert (image.format, image.mode) == ("PNG", "P")
        stated = int(element.get("width")) / int(element.get("height"))
        assert image.width / image.height == pytest.approx(stated, rel=0.02)
        assert len(np.unique(np.asarray(image))) > 3


def test_statuses_sessions_and_reasons_are_shown(dataset, tree):
    content = words(tree)
    assert "1 of 5 fits failed" in content
    assert "18 of 240 volumes are missing" in content
    assert [e.text for e in tree.iter("h2")][:2] == ["Session 01", "Session 02"]
    chips = [c.text for c in tree.iter("span") if (c.get("class") or "").startswith("chip")]
    assert chips.count("ok") == 2 * 4
    assert chips.count("failed") == 2
    assert "No fit failed" not in content
    assert fixture.RUN["command"] in content
    assert "14:00:09 ERROR" in content


def test_inputs_are_shown_with_unit_and_provenance(tree):
    rows = {}
    for row in tree.iter("tr"):
        cells = [" ".join("".join(c.itertext()).split()) for c in row]
        rows.setdefault(cells[0], cells[1:])
    assert rows["EchoTime"][:2] == ["0.004, 0.0102, 0.0164, 0.0226, 0.0288", "s"]
    assert "sub-01_echo-5_part-mag_MEGRE.json" in rows["EchoTime"][2]
    assert rows["SmallDelta"] == ["6", "ms", "--small-delta 6ms"]
    assert rows["b"][1] == "ms/µm²"
    assert rows["B1 map factor"][2].endswith("(Units percent)")
    content = words(tree)
    assert "Not preprocessed." in content
    assert "shifted by 1.4 mm" in content
    assert "BigDelta (ms)" in content


def test_roi_table_holds_the_numbers_of_the_file(dataset, tree):
    text = (dataset[0] / dataset[1][0]["tables"][0]).read_text().splitlines()
    first = dict(zip(text[0].split("\t"), text[1].split("\t"), strict=True))
    table = next(t for t in tree.iter("table") if t.get("class") == "sortable")
    assert [th.text for th in table.find("thead").iter("th")][5:] == [
        "mean",
        "SD",
        "median",
        "n",
        "coverage",
        "at a bound",
    ]
    row = next(table.find("tbody").iter("tr"))
    cells = list(row)
    assert [c.text for c in cells[:4]] == [first["index"], first["name"], None, first["param"]]
    assert float(cells[5].get("data-sort")) == float(first["mean"])
    assert float(cells[8].get("data-sort")) == float(first["n_valid"])
    assert sum(1 for _ in table.find("tbody").iter("tr")) == len(text) - 1


def test_the_same_input_gives_the_same_bytes(broken):
    out, manifest, _ = broken
    pages = [
        build_subject_report(out, "01", [manifest], [], fixture.RUN).read_bytes() for _ in range(2)
    ]
    assert pages[0] == pages[1]


MISSING = {
    "map": (lambda m: m["maps"][0]["file"], "Expected but missing: map of R2star", 2),
    "sd": (lambda m: m["maps"][0]["std"], "Expected but missing: SD map of R2star", 2),
    "nrmse": (lambda m: m["nrmse"], "Expected but missing: NRMSE of", 2),
    "flags": (lambda m: m["flags"], "Expected but missing: flag map of", 1),
    "mask": (lambda m: m["mask"]["file"], "Expected but missing: mask of", 8),
    "reference": (lambda m: m["reference"]["file"], "mask over mean image", 1),
    "table": (lambda m: m["tables"][0], "Expected but missing: ROI table tissue", 0),
}
WHOLE = 1 + 4 + 2 + 1 + 3
"""Pictures of the small dataset."""


@pytest.mark.parametrize("piece", MISSING)
def test_a_missing_file_is_named_and_the_rest_is_drawn(broken, piece):
    out, manifest, build = broken
    which, sentence, lost = MISSING[piece]
    relative = which(manifest)
    (out / relative).unlink()
    tree = build()
    assert sentence in words(tree)
    assert Path(relative).name in words(tree)
    assert "expected pieces are missing" in words(tree)
    assert len(pictures(tree)) == WHOLE - lost


def test_broken_images_are_named_and_the_rest_is_drawn(broken):
    out, manifest, build = broken
    path = out / manifest["maps"][0]["file"]
    path.write_bytes(path.read_bytes()[:500])
    affine = nib.load(out / manifest["nrmse"]).affine
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.float32), affine), out / manifest["nrmse"])
    manifest["examples"][1]["data"] = [1.0]
    nib.save(nib.Nifti1Image(np.ones((4, 4), np.float32), affine), out / manifest["flags"])
    tree = build()
    content = words(tree)
    assert "Could not be drawn: map of R2star" in content
    assert "NRMSE map is (3, 4, 5)" in content
    assert "1 data points" in content
    assert "2 dimensions" in content
    assert len(pictures(tree)) == WHOLE - 2 - 2 - 1 - 1


def test_protocol_and_tissues_of_a_diffusion_fit_are_shown(tree):
    content = words(tree)
    assert "nexi: tex: expected SD 18 ms in grey matter at SNR 50: not estimable." in content
    assert "Cramér-Rao bound) at the measured SNR of 50" in content
    assert "Tissues from the segmentation tissues" in content
    [table] = [t for t in tree.iter("table") if any(c.text == "Expected SD" for c in t.iter("th"))]
    heads = [e.text for e in table.find("thead").iter("th")]
    rows = [["".join(c.itertext()).strip() for c in r] for r in table.find("tbody").iter("tr")]
    names = [name for name, *_ in fixture.NEXI.maps]
    assert len(rows) == 2 * len(names)
    assert rows[0][:2] == ["white matter", names[0]]
    assert len(rows[0]) == len(heads) == len(rows[1]) + 1  # one cell stands for the tissue
    assert rows[0][heads.index("Expected SD")] == "0.079"
    assert rows[0][heads.index("Median SD of the map")].startswith("0.12 in 50")
    grey = rows[len(names)]
    assert grey[heads.index("Median SD of the map")] == "0.46, all voxels"
    assert rows[1][heads.index("Verdict") - 1] == "poorly estimable voxel by voxel"
    assert rows[2][heads.index("Expected SD") - 1] == "n/a"


def test_broken_tissues_are_named_and_the_rest_is_drawn(broken):
    _, manifest, build = broken
    tree = build(
        gradients=[{"b": 1.0}],
        decay={"tissues": [{"name": "CSF"}]},
        fit=manifest["fit"] | {"adequacy": {"expected": [{}]}},
    )
    content = words(tree)
    for what in ("acquisition of", "signal and fit of", "expected standard deviations of"):
        assert f"Could not be drawn: {what}" in content
    assert len(pictures(tree)) > 5


def test_absent_parts_of_a_manifest_are_named(broken):
    tree = broken[2](
        examples=[],
        tables=[],
        nrmse=None,
        flags=None,
        flag_counts={},
        reference=None,
        acquisition=[],
        inputs=[],
        methods="",
        plot=None,
    )
    content = words(tree)
    for sentence in (
        "example voxels",
        "No ROI table for r2star",
        "no NRMSE map was written",
        "no flag map was written",
        "flag counts",
        "no reference image was written",
        "no acquisition values",
        "no input files",
        "methods text",
    ):
        assert sentence in content


def test_a_manifest_with_next_to_nothing_still_gives_a_page(tmp_path):
    bare = {"schema": 1, "subject": "01", "series": "megre", "model": "r2star"}
    tree = parse(build_subject_report(tmp_path, "01", [bare], [], {}))
    assert "the manifest lists no maps" in words(tree)
    assert "expected pieces are missing" in words(tree)


def test_unusable_voxels_count_for_nothing_though_the_file_holds_zero(broken):
    out, manifest, build = broken
    path, flag_path = out / manifest["maps"][0]["file"], out / manifest["flags"]
    flags = nib.load(flag_path)
    marked = np.asarray(flags.dataobj).copy()
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    chosen = (marked == 0) & (np.cumsum(marked == 0).reshape(marked.shape) % 3 > 0)
    marked[chosen], values[chosen] = 4, -1000
    nib.save(nib.Nifti1Image(values, image.affine), path)
    build()
    colder = (out / "sub-01.html").read_text()
    nib.save(nib.Nifti1Image(marked, flags.affine), flag_path)
    build()
    masked = (out / "sub-01.html").read_text()
    values[chosen] = 0
    nib.save(nib.Nifti1Image(values, image.affine), path)
    build()
    assert masked == (out / "sub-01.html").read_text() != colder


def test_an_empty_mask_is_said(broken):
    out, manifest, build = broken
    path = out / manifest["mask"]["file"]
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    assert "the mask is empty" in words(build())


def test_all_nan_map_keeps_its_picture_and_names_the_histogram(broken):
    out, manifest, build = broken
    path = out / manifest["maps"][0]["std"]
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), path)
    tree = build()
    assert "no voxel has a value" in words(tree)
    assert len(pictures(tree)) == WHOLE - 1


def test_nothing_fitted_still_says_why(tmp_path):
    status = [
        {
            "session": "",
            "series": "dwi",
            "model": "nexi",
            "status": "skipped",
            "reason": "SmallDelta is missing.",
            "seconds": None,
        },
        {
            "session": "",
            "series": "megre",
            "model": "r2star",
            "status": "ok",
            "reason": "",
            "seconds": 1,
        },
    ]
    content = words(parse(build_subject_report(tmp_path, "x", [], status, {})))
    assert "SmallDelta is missing." in content
    assert "results of megre, r2star (reported ok, no manifest)" in content
    assert "nothing was fitted" in words(parse(build_subject_report(tmp_path, "y", [], [], {})))


def test_nasty_strings_are_shown_not_run(broken):
    out, manifest, _ = broken
    table = out / manifest["tables"][0]
    table.write_text(table.read_text().replace("white matter", "<b>white</b> & matter"))
    manifest |= dict.fromkeys(("title", "description", "series", "methods"), NASTY)
    manifest |= {
        "warnings": [NASTY],
        "references": [{"key": "k", "text": NASTY, "doi": '10.1/"><script>x</script>'}],
        "inputs": [{"role": NASTY, "file": NASTY, "path": NASTY}],
        "acquisition": [{"name": NASTY, "unit": NASTY, "values": [1, 2], "sources": [NASTY]}],
        "flag_counts": {NASTY: 3},
    }
    manifest["maps"][0] |= {"label": NASTY, "unit": NASTY}
    manifest["examples"][0]["label"] = NASTY
    status = [
        {
            "session": NASTY,
            "series": NASTY,
            "model": NASTY,
            "status": NASTY,
            "reason": NASTY,
            "seconds": 1,
        }
    ]
    run = dict.fromkeys(fixture.RUN, NASTY)
    tree = parse(build_subject_report(out, "01", [manifest], status, run))
    assert sum(1 for _ in tree.iter("script")) == 1
    assert sum(1 for _ in tree.iter("style")) == 1
    assert not any(e.tag == "b" for e in tree.iter() if isinstance(e.tag, str))
    content = words(tree)
    assert content.count("<script>alert(1)</script>&\"'{{ 7*7 }}") > 15
    assert "<b>white</b> & matter" in content
    links = [a.get("href") for a in tree.iter("a") if a.get("href").startswith("http")]
    assert links == ["https://doi.org/10.1/%22%3E%3Cscript%3Ex%3C/script%3E"]


def test_pictures_grow_coarser_until_the_page_is_small_enough(broken, monkeypatch):
    out, _, build = broken
    before = sum(len(i.get("src")) for i in pictures(build()))
    size = (out / "sub-01.html").stat().st_size
    monkeypatch.setattr(page, "SIZE_LIMIT", int(0.75 * size))
    tree = build()
    assert (out / "sub-01.html").stat().st_size <= 0.75 * size
    assert len(pictures(tree)) == WHOLE
    assert sum(len(i.get("src")) for i in pictures(tree)) < before


def test_a_failed_write_leaves_the_old_page_and_no_debris(tmp_path, monkeypatch):
    path = build_subject_report(tmp_path, "01", [], [], {})
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        build_subject_report(tmp_path, "01", [], [], {"run_id": "another"})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["sub-01.html"]
