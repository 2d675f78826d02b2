"""Series as data: what goes into JSON comes out again."""

import json

from bids_gacelle.bids.series import (
    SecondPart,
    Series,
    Sourced,
    VoxelMap,
    series_from_json,
    to_json,
)


def test_complex_series_survive_json() -> None:
    series = Series(
        "vfa",
        "01",
        "",
        {"run": "1"},
        ("/a.nii", "/b.nii"),
        second=SecondPart("phase", ("/pa.nii", "/pb.nii"), "rad"),
        echo_time=Sourced((0.002, 0.004), "s", ("a.json", "b.json")),
        field_strength=Sourced((3.0,), "T", ("a.json",)),
        spoiling_increment=Sourced((117.0,), "degrees", ("--spoiling-increment",)),
        voxel_maps={"theta": VoxelMap("/theta.nii", "option")},
    )
    assert series_from_json(json.loads(json.dumps(to_json(series)))) == series
    plain = Series("megre", "01", "", {}, ("/a.nii",))
    assert series_from_json(json.loads(json.dumps(to_json(plain)))) == plain
