"""Names are in the order of BIDS, parse back, and never collide."""

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bids_gacelle.bids import names
from bids_gacelle.bids.series import Series

LABEL = st.text("abcXYZ019", min_size=1, max_size=6)
KEEP = {"anat": ("acq", "run", "space", "task"), "dwi": ("acq", "dir", "run", "space", "res")}
OFFICIAL = ("R2starmap", "T2starmap", "S0map", "T1map", "R1map", "M0map")


def series(kind="megre", session="", **entities):
    return Series(kind, "01", session, entities, ("x.nii.gz",))


@st.composite
def any_series(draw):
    kind = draw(st.sampled_from(["megre", "vfa", "dwi"]))
    keep = KEEP["dwi" if kind == "dwi" else "anat"]
    entities = draw(st.dictionaries(st.sampled_from(keep), LABEL))
    return Series(kind, draw(LABEL), draw(st.just("") | LABEL), entities, ("x.nii.gz",))


@st.composite
def any_map(draw):
    """A map as a model declares it: (model, parameter, suffix) and a statistic."""
    model = draw(st.text("anexi2st", min_size=1, max_size=6))
    assume(not model.endswith((*names.STATISTICS, "fitflag")))
    suffix = draw(st.just("") | st.sampled_from(OFFICIAL))
    # an official suffix belongs to one parameter of a model
    parameter = suffix.removesuffix("map") or draw(st.text("fnd01", min_size=1, max_size=3))
    return model, parameter, suffix, draw(st.sampled_from(["", *names.STATISTICS]))


def path_of(source, item):
    model, parameter, suffix, statistic = item
    return names.map_path(
        source,
        model=model,
        parameter=parameter,
        suffix=suffix,
        statistic=statistic,
        datatype=names.datatype_of(source),
    )


def all_paths(source, model):
    return [
        names.quality_path(source, "nrmse", model=model),
        names.mask_path(source, model=model),
        names.flag_path(source, model=model),
        names.flag_path(source, model=model, extension=".tsv"),
        names.table_path(source, model=model, atlas="aseg"),
        names.manifest_path(source, model=model),
        names.reference_path(source),
    ]


@settings(max_examples=60, deadline=None)
@given(any_series(), any_map())
def test_every_name_parses_back_with_its_entities_in_the_order_of_bids(source, item):
    for path in [path_of(source, item), *all_paths(source, item[0])]:
        entities, suffix, extension = names.parse_name(path.name)
        order = [names.ENTITY_ORDER.index(key) for key in entities]
        assert order == sorted(set(order))
        assert names.build_name(entities, suffix, extension) == path.name
        assert entities["sub"] == source.subject
        assert entities.get("ses", "") == source.session
        assert source.entities.items() <= entities.items()


@settings(max_examples=60, deadline=None)
@given(any_series(), any_map(), any_map())
def test_different_maps_never_share_a_name(source, one, other):
    assume(one != other)
    assert path_of(source, one) != path_of(source, other)
    assert path_of(source, one) not in all_paths(source, other[0])


@settings(max_examples=60, deadline=None)
@given(any_series(), any_series(), any_map())
def test_different_series_never_share_a_name(one, other, item):
    assume(
        (one.subject, one.session, one.entities) != (other.subject, other.session, other.entities)
    )
    assert path_of(one, item) != path_of(other, item)


def test_canonical_models_keep_apart_from_all_others():
    source = series()
    made = [
        names.map_path(
            source, model=m, suffix="R2starmap", bare=m == "r2star", statistic=s, datatype="anat"
        )
        for m, s in product(["r2star", "mcrmwi", "r1r2star"], ["", "std", "median"])
    ]
    assert len(set(made)) == 9


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (
            series(acq="gre", run="1"),
            {"model": "r2star", "parameter": "R2star", "suffix": "R2starmap", "bare": True},
            "sub-01/anat/sub-01_acq-gre_run-1_R2starmap.nii.gz",
        ),
        (
            series(session="a"),
            {"model": "r2star", "suffix": "R2starmap", "bare": True, "statistic": "std"},
            "sub-01/ses-a/anat/sub-01_ses-a_desc-std_R2starmap.nii.gz",
        ),
        (
            series("vfa"),
            {"model": "r1r2star", "parameter": "R1", "suffix": "R1map", "statistic": "std"},
            "sub-01/anat/sub-01_desc-r1r2starstd_R1map.nii.gz",
        ),
        (
            series(run="2", space="T1w", acq="gre"),
            {"model": "mcrmwi", "parameter": "kIEWM"},
            "sub-01/anat/sub-01_acq-gre_run-2_space-T1w_model-mcrmwi_param-kiewm_anatmap.nii.gz",
        ),
        (
            series("dwi", space="ACPC", res="2"),
            {"model": "nexi", "parameter": "fn", "statistic": "std", "extension": ".json"},
            "sub-01/dwi/sub-01_space-ACPC_model-nexi_param-fn_res-2_desc-std_dwimap.json",
        ),
    ],
)
def test_map_names_are_those_of_the_specification(source, options, expected):
    path = names.map_path(source, datatype=names.datatype_of(source), **options)
    assert str(path) == expected


def test_the_other_names_are_those_of_the_specification():
    source = series("dwi", "a", acq="b2k", space="ACPC")
    stem = "sub-01/ses-a/dwi/sub-01_ses-a_acq-b2k_space-ACPC"
    figures = stem.replace("/dwi/", "/figures/")
    assert list(map(str, all_paths(source, "nexi"))) == [
        f"{stem}_model-nexi_param-nrmse_dwimap.nii.gz",
        f"{stem}_desc-nexi_mask.nii.gz",
        f"{stem}_desc-nexifitflag_dseg.nii.gz",
        f"{stem}_desc-nexifitflag_dseg.tsv",
        f"{stem}_atlas-aseg_desc-nexi_scalarstats.tsv",
        f"{figures}_desc-nexi_manifest.json",
        f"{figures}_desc-dwireference_image.nii.gz",
    ]
    assert str(names.report_path("01")) == "sub-01.html"


@pytest.mark.parametrize(
    "options",
    [
        {"model": "my_model", "parameter": "x"},
        {"model": "nexi", "parameter": "R2*"},
        {"model": "nexi", "parameter": ""},
        {"model": "nexi", "parameter": "fn", "statistic": "sd"},
        # desc-mystd would be the standard deviation of model "my"
        {"model": "mystd", "suffix": "R1map"},
    ],
)
def test_what_cannot_be_named_is_refused(options):
    with pytest.raises(ValueError, match=r"label|statistic|end in"):
        names.map_path(series(), datatype="anat", **options)


@pytest.mark.parametrize("entity", ["echo", "desc", "model", "nonsense"])
def test_a_series_cannot_bring_entities_that_maps_do_not_have(entity):
    with pytest.raises(ValueError, match=entity):
        names.mask_path(series(**{entity: "1"}), model="r2star")


@pytest.mark.parametrize("name", ["sub-01_acq_T1w.nii.gz", "sub-01_sub-02_T1w.nii", "sub-_x.nii"])
def test_what_is_not_a_bids_name_is_refused(name):
    with pytest.raises(ValueError, match=r"BIDS"):
        names.parse_name(name)


def test_the_flag_table_spells_out_every_sum():
    rows = {row["index"]: row["name"] for row in names.flag_rows()}
    assert list(rows) == list(range(64))
    assert rows[0] == "ok"
    assert rows[2 + 8] == "a parameter at a bound + not converged"
    assert len(set(rows.values())) == 64


def test_compartments_of_one_suffix_have_names_of_their_own():
    def path(compartment, statistic=""):
        return names.map_path(
            series(),
            model="gremwi",
            parameter="R2s",
            suffix="R2starmap",
            statistic=statistic,
            compartment=compartment,
            datatype="anat",
        ).name

    assert path("MW") == "sub-01_desc-gremwiMW_R2starmap.nii.gz"
    assert path("EW", "std") == "sub-01_desc-gremwiEWstd_R2starmap.nii.gz"
    with pytest.raises(ValueError, match="compartment"):
        path("M-W")
