"""Blocks: the same maps through any memory, from any array, on several devices, interrupted."""

import _thread
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from bids_gacelle.engine import (
    EngineError,
    FitInterrupted,
    GradientEchoScheme,
    Parameter,
    Progress,
    fit,
    signal_model,
)
from bids_gacelle.engine import blocks as blocks_module
from bids_gacelle.engine.arrays import Rows, memory_order
from bids_gacelle.engine.blocks import (
    Cancelled,
    Feeder,
    Link,
    Queue,
    Tally,
    for_blocks,
    make_plan,
    share,
)
from bids_gacelle.engine.device import is_out_of_memory
from bids_gacelle.engine.kernels import COMPILE_VARIABLE, Kernel, Voxels
from bids_gacelle.engine.memory import AllocationCounter, Footprint, footprint
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import get_solver
from bids_gacelle.engine.starts import build_dictionary, find_starts, starts_at_once
from bids_gacelle.engine.study import Study

from .helpers import draw, draw_inputs, make_model, noisy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv(COMPILE_VARIABLE, "never")


def r2star(n, seed=1):
    model = make_model("r2star")
    return model, noisy(model, draw(model, n, seed), 0.02, seed + 1)


def assert_identical(one, other):
    for name in one.maps:
        np.testing.assert_array_equal(one.maps[name], other.maps[name])
        np.testing.assert_array_equal(one.std[name], other.std[name])
    np.testing.assert_array_equal(one.flags, other.flags)
    np.testing.assert_array_equal(one.nrmse, other.nrmse)
    assert one.trace == other.trace


# ---- the same maps -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("r2star", {}),
        ("r2star", {"sigma": "rows"}),
        ("r2star", {"noise": "rician"}),
        ("nexi", {"starts": 2, "prior": "weak"}),
        ("despot1", {"solver": "linear"}),
        ("despot1", {"loss": "huber", "weights": "rows"}),
    ],
)
def test_maps_do_not_depend_on_the_size_of_blocks(name, extra):
    n = 300 if name == "nexi" else 700
    model = make_model(name)
    inputs = draw_inputs(model, n, 3)
    data = noisy(model, draw(model, n, 4), 0.02, 5, inputs)
    data[0, 17] = np.nan
    rows = np.random.default_rng(6).uniform(0.01, 0.03, data.shape)
    options = {k: rows if isinstance(v, str) and v == "rows" else v for k, v in extra.items()}
    options["inputs"] = {k: v.numpy() for k, v in inputs.items()}
    whole = fit(model, data, block_size=n, **options)
    assert whole.settings["blocks"] == 1
    for size in (37, 128):
        assert_identical(fit(model, data, block_size=size, **options), whole)


@pytest.fixture(scope="module")
def small():
    """Data on a grid, a mask, sigma, and the maps of a fit in one piece."""
    model, data = r2star(4 * 5 * 6)
    data = data.reshape(8, 4, 5, 6).astype(np.float32)
    mask = np.random.default_rng(7).random((4, 5, 6)) < 0.7
    sigma = np.full(data.shape, 0.02) * np.linspace(1, 2, 6)
    whole = fit(model, data, mask=mask, sigma=sigma)
    return model, data, mask, sigma, whole


class Proxy:
    """As nibabel's ArrayProxy: shape, dtype, order, and slices only."""

    def __init__(self, array, order):
        self._array, self.order = array, order
        self.shape, self.dtype = array.shape, array.dtype
        self.most = 0

    def __getitem__(self, index):
        assert all(isinstance(i, slice) for i in index)
        part = self._array[index]
        self.most = max(self.most, part.size)
        return part


def layouts(data, folder):
    yield "fortran", np.asfortranarray(data)
    volumes = np.ascontiguousarray(np.moveaxis(data, 0, -1))
    yield "measurements last", np.moveaxis(volumes, -1, 0)
    yield "nifti", np.moveaxis(np.asfortranarray(volumes), -1, 0)
    yield "with gaps", np.repeat(data, 2, axis=2)[:, :, ::2]
    yield "big endian", data.astype(">f4")
    read_only = data.astype(np.float64)
    read_only.flags.writeable = False
    yield "read only", read_only
    yield "tensor", torch.tensor(data)
    np.save(folder / "c.npy", data)
    np.save(folder / "f.npy", np.asfortranarray(data))
    yield "memory map", np.load(folder / "c.npy", mmap_mode="r")
    yield "memory map of columns", np.load(folder / "f.npy", mmap_mode="r")
    yield "proxy", Proxy(data, "C")
    yield "proxy of columns", Proxy(data, "F")


def test_maps_do_not_depend_on_where_and_how_the_data_lie(small, tmp_path):
    model, data, mask, sigma, whole = small
    for what, array in layouts(data, tmp_path):
        parts = fit(model, array, mask=mask, sigma=sigma, block_size=23)
        for name in whole.maps:
            np.testing.assert_array_equal(whole.maps[name], parts.maps[name], what)
            np.testing.assert_array_equal(whole.std[name], parts.std[name], what)
        np.testing.assert_array_equal(whole.flags, parts.flags, what)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float16, np.uint32, np.int64])
def test_whole_numbers_and_half_precision_are_data_too(dtype):
    model, data = r2star(50)
    data = (1000 * data).clip(0).astype(dtype)
    assert_identical(fit(model, data), fit(model, data.astype(np.float64)))


def test_a_block_reads_only_its_own_voxels(small, tmp_path):
    model, data, mask, _, _ = small
    proxy = Proxy(data, "F")
    study = Study(model, proxy, mask=mask)
    block = study.block(10, 20, CPU)
    assert block.voxels.data.shape == (8, 10)
    assert proxy.most <= 8 * 2 * 20  # two of six planes
    flat = np.flatnonzero(mask.transpose(2, 1, 0))[10:20]
    expected = data.transpose(0, 3, 2, 1).reshape(8, -1)[:, flat].astype(float)
    np.testing.assert_array_equal(
        (block.voxels.data * block.scale).float(), expected.astype(np.float32)
    )
    assert study.on_disk
    assert not Study(model, data).on_disk
    np.save(tmp_path / "data.npy", data)
    assert Study(model, np.load(tmp_path / "data.npy", mmap_mode="r")[:, :2]).on_disk


def test_arrays_are_not_copied_whole(small):
    _, data, _, _, _ = small
    volumes = np.ascontiguousarray(np.moveaxis(data, 0, -1))
    for array in (data, np.asfortranarray(data), np.moveaxis(volumes, -1, 0)):
        rows = Rows(array, memory_order(array))
        assert np.shares_memory(rows._flat, array)


# ---- the plan ------------------------------------------------------------------------------

NEED = Footprint(loaded=100, held=300, lane=1000, start=0)


def plan(n, **options):
    given = {"device": CPU, "limit": None, "block_size": None, "lanes": 2048, "ahead": False}
    return make_plan(n, NEED, least_lanes=256, **(given | options))


def test_blocks_are_as_large_as_the_limit_allows():
    free = plan(10**6)
    assert (free.n_blocks, free.lanes) == (16, 2048)
    tight = plan(10**6, limit=25 * 10**6)
    assert tight.predicted <= 25 * 10**6
    assert tight.n_blocks > free.n_blocks
    assert plan(10**6, limit=25 * 10**6, ahead=True).block_size < tight.block_size
    assert plan(10**6, limit=18 * 10**6).lanes == 256  # fewer lanes leave room for a block
    own = plan(10**6, block_size=10**5, limit=1)
    assert (own.block_size, own.limit) == (10**5, None)
    assert plan(100_000, n_devices=2).n_blocks == 8
    assert plan(5, limit=20 * 10**6).block_size == 5
    assert plan(0).n_blocks == 0
    with pytest.raises(EngineError, match="needs at least 18 MB"):
        plan(10**6, limit=17 * 10**6)


def test_the_plan_is_said_before_the_fit_and_kept(caplog):
    model, data = r2star(5000)
    with caplog.at_level(logging.INFO, "bids_gacelle.engine"):
        result = fit(model, data, memory_limit=40 * 10**6)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("r2star: 5,000 voxels in 1 block of up to 5,000, about ")
    assert line.endswith(" MB of at most 40 MB on cpu.")
    settings = result.settings
    assert (settings["blocks"], settings["block_size"]) == (1, 5000)
    assert settings["memory_predicted"] <= settings["memory_limit"] == 40 * 10**6
    if sys.platform == "linux":
        assert settings["memory_peak"] <= settings["memory_predicted"]


def test_allocations_are_counted_while_they_live():
    with AllocationCounter() as counter:
        first = torch.ones(1000)
        view = first[None]
        del first
        second = view + 1
        del view
        second.sin()
    assert counter.peak == 8000


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nexi", {}),
        ("nexi", {"l_max": 2}),
        ("nexi", {"l_max": 4}),
        ("nexidot", {"l_max": 2}),
        ("sandi", {}),
        ("axcalibersmt", {}),
    ],
)
def test_what_looking_for_starts_takes_is_foreseen(name, options, weighted):
    model, lm = make_model(name, **options), get_solver("lm")
    kernel = Kernel(model, Objective(), torch.float32, CPU)
    n, settings = 2 * starts_at_once(kernel), lm.settings()
    data = noisy(model, draw(model, n, 1), 0.01, 2).astype(np.float32)
    study = Study(model, data, weights=np.ones(len(data)) if weighted else None)
    foreseen = footprint(kernel, study, lm, settings).start
    signal = torch.tensor(data)
    voxels = Voxels(signal, weight=torch.ones_like(signal) if weighted else None)
    dictionary = build_dictionary(kernel, settings.dictionary, 1, 0)
    with AllocationCounter() as counter:
        find_starts(kernel, voxels, dictionary)
    assert foreseen / 4 < counter.peak <= foreseen * 1.2  # the plan adds as much


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_times_the_memory_limit_gives_the_same_maps_and_stays_below_it(tmp_path):
    """In a process of its own, whose memory a thread of the benchmark samples."""
    root = Path(__file__).parents[2]
    script = root / "benchmarks" / "streaming.py"
    environment = os.environ | {COMPILE_VARIABLE: "never", "PYTHONPATH": str(root)}
    for model, more in {
        "r2star": ["--voxels", "800000", "--times", "8", "--dictionary", "64"],
        "nexi": ["--voxels", "50000", "--times", "1.4", "--dictionary", "64"],
    }.items():
        out = tmp_path / f"{model}.json"
        command = [sys.executable, script, "--models", model, "--repeats", "1", "--out", out]
        subprocess.run([*command, *more], check=True, env=environment, capture_output=True)
        (row,) = json.loads(out.read_text())["results"]
        assert row["identical"]
        assert row["blocks"] > (8 if model == "r2star" else 1)
        assert 0 < row["peak"] <= row["limit"]
        assert row["predicted"] <= row["limit"]
        assert 0 < row["peak_of_the_fit"] <= row["limit"]
        assert row["whole_peak"] <= row["whole_predicted"]


# ---- too little memory, several devices ----------------------------------------------------


class Counting(Link):
    """Fails on blocks that are too large for it, in whatever thread loads them."""

    most = 3000

    def load(self, study, start, stop):
        if stop - start > self.most:
            raise torch.cuda.OutOfMemoryError("too large")
        return super().load(study, start, stop)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("where", ["load", "work"])
def test_a_block_that_does_not_fit_is_done_in_halves(ahead, where, caplog):
    model, data = r2star(20_000)
    covered, sizes = np.zeros(20_000, int), []
    link = Counting(CPU) if where == "load" else Link(CPU)
    feeder = Feeder(Study(model, data), link, Queue(20_000), 10_000, ahead=ahead)

    def work(start, stop, block):
        assert block.voxels.data.shape[1] <= stop - start
        sizes.append(stop - start)
        if stop - start > 3000:
            raise torch.cuda.OutOfMemoryError("too large")
        covered[start:stop] += 1

    with feeder:
        for_blocks(feeder, work)
    assert (covered == 1).all()
    assert sizes[-1] <= 2500
    assert "continuing with blocks of 5,000 voxels" in caplog.messages[0]
    assert len(caplog.messages) == 2


def test_the_smallest_block_that_does_not_fit_is_an_error():
    model, data = r2star(10_000)

    def hopeless(start, stop, block):
        raise MemoryError

    with (
        Feeder(Study(model, data), Link(CPU), Queue(10_000), 10_000, ahead=True) as feeder,
        pytest.raises(MemoryError),
    ):
        for_blocks(feeder, hopeless)


def test_memory_errors_of_the_host_count_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_memory_of_a_failed_block_is_free_before_the_next_is_read(monkeypatch):
    model, data = r2star(10_000)
    alive = []

    class Emptying(Link):
        def empty_cache(self):
            gc.collect()
            alive.append([reference() for reference in made])

    made = []

    def work(start, stop, block):
        made.append(weakref.ref(block))
        if stop - start > 6000:
            raise MemoryError

    with Feeder(Study(model, data), Emptying(CPU), Queue(10_000), 10_000, ahead=False) as feeder:
        for_blocks(feeder, work)
    assert alive == [[None]]


def test_a_fit_that_runs_out_of_memory_gives_the_same_maps(monkeypatch):
    model, data = r2star(9000)
    whole = fit(model, data, block_size=9000)
    prepare = Study.prepare

    def limited(self, raw):
        if raw.data.shape[1] > 4000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return prepare(self, raw)

    monkeypatch.setattr(Study, "prepare", limited)
    calls = []
    assert_identical(fit(model, data, block_size=9000, progress=calls.append), whole)
    assert [c.done for c in calls] == sorted({c.done for c in calls})
    assert calls[-1].done == 9000


def test_two_devices_share_the_blocks(monkeypatch):
    model, data = r2star(3000)
    threads = set()
    read = Study.read

    def noted(self, start, stop):
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        return read(self, start, stop)

    monkeypatch.setattr(Study, "read", noted)
    calls = []
    two = fit(model, data, device=["cpu", "cpu"], block_size=300, progress=calls.append)
    assert len(threads) == 2
    assert two.settings["device"] == "cpu, cpu"
    assert [c.done for c in calls] == sorted({c.done for c in calls})
    assert calls[-1].done == 3000
    assert calls[-1].converged > 0.99
    assert_identical(two, fit(model, data))
    planned = fit(model, data, device=["cpu", "cpu"])
    assert planned.settings["blocks"] == 2  # not smaller than the smallest


def test_devices_share_a_model_that_torch_differentiates():
    """Forward differentiation of torch has levels that all threads of a process share."""

    @signal_model(kind="megre", parameters=(Parameter("R2", "1/s", "R2", bounds=(0.0, 200.0)),))
    def decay(params, scheme):
        return torch.exp(-scheme.echo_time * params["R2"])

    model = decay(GradientEchoScheme(echo_time=np.linspace(0.002, 0.04, 8)))
    data = noisy(model, draw(model, 3000, 1, within="bounds"), 0.02, 2)
    whole = fit(model, data)
    for _ in range(3):
        assert_identical(fit(model, data, device=["cpu", "cpu"], block_size=300), whole)


def test_the_error_of_one_device_ends_the_others():
    queue = Queue(10**9)
    ended = threading.Event()

    def failing():
        raise EngineError("broken")

    def endless():
        try:
            while True:
                queue.take(1)
                time.sleep(0.001)
        except Cancelled:
            ended.set()
            raise

    with pytest.raises(EngineError, match="broken"):
        share([endless, failing, endless], queue)
    assert ended.is_set()


@pytest.mark.parametrize("device", ["cpu", ["cpu", "cpu"]])
def test_errors_of_the_thread_that_reads_ahead_come_up(tmp_path, monkeypatch, device):
    model, data = r2star(900)
    np.save(tmp_path / "data.npy", data)
    read = Study.read

    def failing(self, start, stop):
        if start >= 600:
            raise OSError("the disk is gone")
        return read(self, start, stop)

    monkeypatch.setattr(Study, "read", failing)
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(
            model,
            np.load(tmp_path / "data.npy", mmap_mode="r"),
            block_size=300,
            device=device,
        )
    assert threading.active_count() == before


def test_the_next_block_is_read_while_the_current_one_is_worked_on():
    model, data = r2star(900)
    link, begun = Link(CPU), threading.Event()
    load = link.load

    def noted(study, start, stop):
        if start == 300:
            begun.set()
        return load(study, start, stop)

    link.load = noted
    with Feeder(Study(model, data), link, Queue(900), 300, ahead=True) as feeder:
        assert feeder.take()[:2] == (0, 300)
        assert begun.wait(10)
        assert [feeder.take()[0], feeder.take()[0], feeder.take()] == [300, 600, None]


class FakeCuda:
    """Streams and events that write down what is asked of them, in order."""

    def __init__(self):
        self.log = []

    class _Stream:
        def __init__(self, cuda, name):
            self.cuda, self.name = cuda, name

        def record_event(self):
            self.cuda.log.append(("record", self.name))
            return FakeCuda._Event(self.cuda, self.name)

        def wait_event(self, event):
            self.cuda.log.append(("wait", self.name, event.name))

        def __enter__(self):
            self.cuda.log.append(("enter", self.name))

        def __exit__(self, *_):
            self.cuda.log.append(("leave", self.name))

    class _Event:
        def __init__(self, cuda, name):
            self.cuda, self.name = cuda, name

        def synchronize(self):
            self.cuda.log.append(("synchronize", self.name))

    def Stream(self, device):
        name = "down" if hasattr(self, "made") else "up"
        self.made = True
        return self._Stream(self, name)

    def stream(self, stream):
        return stream

    def current_stream(self, device):
        return self._Stream(self, "compute")


def test_copies_wait_for_what_they_need_and_nothing_else(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: cuda.log.append("pin") or t.clone())
    used = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: used.append((id(t), s.name)))
    monkeypatch.setattr(blocks_module, "_pinned_like", torch.empty_like)
    model, data = r2star(50)
    study, link = Study(model, data, sigma=0.02), Link(CPU, cuda)
    sent = link.load(study, 0, 50)
    assert cuda.log == [("enter", "up"), "pin", "pin", ("record", "up"), ("leave", "up")]
    cuda.log.clear()
    block = link.receive(sent)
    assert cuda.log == [("wait", "compute", "up")]
    assert {name for _, name in used} == {"compute"}
    assert {i for i, _ in used} == {id(t) for t in block.tensors()}
    assert len(used) == 3  # data, noise variance, scale
    cuda.log.clear()
    used.clear()
    result = (block.scale * 2, block.voxels.data * 3)
    wait = link.fetch(result)
    assert cuda.log == [
        ("record", "compute"),
        ("wait", "down", "compute"),
        ("enter", "down"),
        ("record", "down"),
        ("leave", "down"),
    ]
    assert used == [(id(t), "down") for t in result]
    for one, other in zip(wait(), result, strict=True):
        torch.testing.assert_close(one, other)
    assert cuda.log[-1] == ("synchronize", "down")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["r2star", "nexi"])
def test_streaming_on_a_gpu_changes_nothing(name):
    model = make_model(name)
    n = 300_000
    data = noisy(model, draw(model, n, 1), 0.02, 2).astype(np.float32)
    whole = fit(model, data, device="cuda", block_size=n, starts=1)
    limit = max(whole.settings["memory_predicted"] // 8, 2**28)
    parts = fit(model, data, device="cuda", memory_limit=limit, starts=1)
    assert_identical(parts, whole)
    assert parts.settings["memory_peak"] <= limit
    assert_identical(fit(model, data, device="cuda:all", block_size=40_000, starts=1), whole)


# ---- interrupted ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", ["cpu", "cpu"]])
def test_finished_blocks_of_an_interrupted_fit_are_usable(device):
    model, data = r2star(2000)
    data[:, 3] = 0
    whole = fit(model, data)

    def stop(progress):
        if progress.done >= 1000:
            raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match=r"after 1,000 of 2,000|after \d") as caught:
        fit(model, data, block_size=250, progress=stop, device=device)
    assert isinstance(caught.value, KeyboardInterrupt)
    part = caught.value.result
    finished = np.isfinite(part.maps["R2star"])
    finished[3] = part.flags[3] == 4  # with two devices its block may be the one given up
    assert 750 <= finished.sum() < 2000
    assert part.settings["n_finished"] == finished.sum()
    assert part.settings["interrupted"]
    np.testing.assert_array_equal(part.maps["R2star"][finished], whole.maps["R2star"][finished])
    np.testing.assert_array_equal(part.flags[finished], whole.flags[finished])
    assert (part.flags[~finished] == 8).all()
    assert np.isnan(part.std["S0"][~finished]).all()
    assert np.isnan(part.nrmse[~finished]).all()


def test_control_c_in_the_terminal_ends_a_running_block(request):
    """The signal comes while the solver works, not in a callback."""
    model, data = r2star(200_000)
    begun = threading.Event()
    # A background job of a shell inherits that the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    timer = threading.Thread(target=lambda: begun.wait() and _thread.interrupt_main())
    timer.start()
    with pytest.raises(FitInterrupted) as caught:
        fit(model, data, block_size=100_000, progress=lambda progress: begun.set())
    timer.join()
    assert (caught.value.result.flags == 8).sum() >= 100_000


# ---- progress ------------------------------------------------------------------------------


def test_progress_grows_to_the_number_of_voxels():
    model, data = r2star(500)
    calls = []
    fit(model, data, block_size=120, progress=calls.append)
    done = [c.done for c in calls]
    assert done == sorted(set(done))
    assert {c.total for c in calls} == {500}
    assert np.isnan(calls[0].converged)
    assert (calls[-1].done, calls[-1].converged) == (500, 1.0)
    assert calls[-1].voxels_per_second == pytest.approx(500 / calls[-1].seconds)


def test_a_block_that_is_done_again_does_not_count_twice():
    calls = []
    tally = Tally(100, lambda: 1.0, calls.append)
    tally.running(0, 50, 0.5)
    tally.dropped(0)
    tally.running(0, 25, 1.0)
    tally.finished(0, 25)
    tally.running(25, 100, 1.0)
    tally.finished(25, 75)
    assert [c.done for c in calls] == [25, 99, 100]
    assert calls[0] == Progress(25, 100, 1.0, calls[0].seconds)


# ---- hostile data --------------------------------------------------------------------------


def hostile(data):
    """Kinds of bad voxels with the flag they must get (None: any)."""
    m = len(data)
    first, last = np.zeros(m), np.zeros(m)
    first[0], last[-1] = 1, 1
    missing = data[:, 0].copy()
    missing[2] = np.nan
    return [
        (np.full(m, np.nan), 4),
        (np.full(m, np.inf), 4),
        (np.full(m, -np.inf), 4),
        (np.zeros(m), 4),
        (missing, 4),
        (-data[:, 0], 4),
        (np.ones(m), None),
        (np.full(m, 1e30), None),
        (np.full(m, 1e-30), None),
        (first, None),
        (last + 1e-3, None),
        (np.linspace(1, 5, m), None),
        (np.resize([1.0, -1.0], m), None),
    ]


@pytest.mark.parametrize("name", ["r2star", "nexi", "axcalibersmt", "mcmicro", "despot1"])
@pytest.mark.parametrize("block_size", [None, 5])
def test_no_voxel_harms_its_neighbours(name, block_size):
    model = make_model(name)
    n = 13
    inputs = {k: np.ones(2 * n) for k in model.voxel_inputs}
    good = noisy(model, draw(model, 2 * n, 8), 0.02, 9)
    good[0] = np.abs(good[0])
    mixed = good.copy()
    kinds = hostile(good)
    for i, (bad, _) in enumerate(kinds):
        mixed[:, 2 * i] = bad
    clean = fit(model, good, starts=1, inputs=inputs)
    result = fit(model, mixed, starts=1, inputs=inputs, block_size=block_size)
    for key in clean.maps:
        np.testing.assert_array_equal(result.maps[key][1::2], clean.maps[key][1::2])
        np.testing.assert_array_equal(result.std[key][1::2], clean.std[key][1::2])
    for i, (_, flag) in enumerate(kinds):
        if flag is not None and not (model.signed and i == 5):
            assert result.flags[2 * i] == flag, i
        for key in model.parameter_names:
            known = np.isfinite(result.maps[key][2 * i])
            assert known or result.flags[2 * i] & (4 | 8)


def test_all_voxels_at_a_bound():
    model = make_model("r2star")
    result = fit(model, np.linspace(1, 1.3, 8)[:, None] * np.ones(600), block_size=100)
    assert (result.flags & 2 > 0).all()
    assert np.isfinite(result.maps["S0"]).all()
    assert result.settings["at_bound"] == {"S0": 0.0, "R2star": 1.0}


@pytest.mark.parametrize("name", ["r2star", "nexi"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4,)])
def test_no_voxels_are_no_error(name, shape):
    model = make_model(name)
    calls = []
    result = fit(
        model,
        np.ones((model.n_measurements, *shape), np.float32),
        mask=np.zeros(shape, bool),
        sigma=np.ones(shape),
        progress=calls.append,
    )
    assert result.flags.shape == shape
    assert (result.flags == 1).all()
    assert np.isnan(result.maps[model.parameter_names[0]]).all()
    assert set(result.settings["at_bound"].values()) == {0.0}
    assert result.settings["n_voxels"] == result.settings["blocks"] == 0
    assert result.trace == {"evaluations": [], "mean_evaluations": 0.0, "winning_start": []}
    assert [(c.done, c.total) for c in calls] == [(0, 0)]


@pytest.mark.slow
def test_many_voxels_with_bad_ones_among_them():
    model = make_model("r2star")
    n = int(os.environ.get("BIDS_GACELLE_TEST_VOXELS", 300_000))
    rng = np.random.default_rng(10)
    data = np.empty((8, n), np.float32)
    rate = rng.uniform(10, 60, n).astype(np.float32)
    for row, echo in zip(data, model.scheme.echo_time, strict=True):
        row[:] = np.exp(-rate * np.float32(echo)) + 0.02 * rng.standard_normal(n, np.float32)
    data[0] = np.abs(data[0]) + 1e-3
    data[3, ::1000] = np.nan
    result = fit(model, data)
    assert (result.flags[::1000] == 4).all()
    rest = np.ones(n, bool)
    rest[::1000] = False
    assert (result.flags[rest] & 4 == 0).all()
    assert np.median(np.abs(result.maps["R2star"][rest] - rate[rest])) < 2
