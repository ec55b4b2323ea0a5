"""The cache of slices where it is shared: cohorts with equal ids, readers beside writers, damaged records, many scans, and the data's identity."""
import json
import os
import resource
import subprocess
import sys
import time
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from brainmets.samples import slices
from brainmets.samples.pictures import SliceConfig
from brainmets.samples.slices import SliceCache, SliceDataset, read_slices, resident, scans_of, slice_rows, write_slices
from brainmets.tables import DataError

CONFIG = SliceConfig(sequences=("t1",), size=16)
N_PATIENTS, N_SLICES = 4, 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    slices._open_shard.cache_clear()


def write_volume(path, seed):
    array = np.zeros((20, 20, N_SLICES), np.float32)
    array[4:16, 4:16] = np.random.default_rng(seed).random((12, 12, N_SLICES)) + 0.1
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def scans(folder, seed=0):
    "Volumes in a folder, and their images table."
    folder.mkdir()
    for p in range(N_PATIENTS): write_volume(folder/f"p{p}.nii.gz", 100*seed + p)
    return pd.DataFrame({"patient_id": [f"P{p}" for p in range(N_PATIENTS)], "session": "", "sequence": "t1", "path": [f"p{p}.nii.gz" for p in range(N_PATIENTS)]}).assign(
        sample_id=lambda t: t["patient_id"])


def write(images, data, folder, config=CONFIG, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_slices(images, data, folder, config, progress=False, **more)


def dataset_of(cache): return SliceDataset(cache, cache.samples, outcome=None)


def stored(dataset): return np.stack([dataset.stored(k) for k in range(len(dataset))])


@pytest.fixture
def cohort(tmp_path): return scans(tmp_path/"data"), tmp_path/"data", tmp_path/"cache"


# --- who shares a folder

def test_cohorts_with_equal_ids_stand_beside_each_other(tmp_path):
    kept = {}
    for name, seed in (("a", 0), ("b", 1)): kept[name] = write(scans(tmp_path/name, seed), tmp_path/name, tmp_path/"cache")
    assert kept["a"].home != kept["b"].home and kept["a"].identity != kept["b"].identity
    assert (stored(dataset_of(kept["a"])) != stored(dataset_of(kept["b"]))).any()      # a was not mapped before b was written
    again = pd.DataFrame({"patient_id": "P0", "sample_id": "P0", "session": "", "sequence": "t1", "path": ["p0.nii.gz"]})
    assert write(again, tmp_path/"a", tmp_path/"cache").written == ()
    assert write(again, tmp_path/"a", tmp_path/"cache", name="another").written == ("P0",)


def test_no_path_of_the_machine_is_stored_and_identity_does_not_know_it(tmp_path):
    here, there = (write(scans(tmp_path/name), tmp_path/name, tmp_path/f"cache-{name}") for name in ("here", "there"))
    assert here.identity == there.identity and dataset_of(here).identity == dataset_of(there).identity
    for path in here.home.glob("*.json"): assert str(tmp_path) not in path.read_text()


READER = """
import sys, time
from pathlib import Path
import numpy as np
from brainmets.samples.slices import SliceDataset, read_slices
cache = read_slices(sys.argv[1])
dataset = SliceDataset(cache, cache.samples, outcome=None)
print("ready", flush=True)
sys.stdin.readline()
print(int(sum(dataset.stored(k).astype(int).sum() for k in range(len(dataset)))), flush=True)
"""


def test_a_reader_of_another_process_finds_its_files_after_a_volume_has_changed(cohort):
    images, data, folder = cohort
    before = write(images, data, folder)
    expected = int(before.read(before.samples).astype(int).sum())
    with subprocess.Popen([sys.executable, "-c", READER, before.home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        write_volume(data/"p3.nii.gz", 77)
        after = write(images, data, folder)
        assert after.written == ("P3",) and int(after.read(after.samples).astype(int).sum()) != expected
        assert reader.communicate("go\n")[0] == f"{expected}\n"


def test_old_slices_go_a_day_after_they_were_superseded_however_old_they_are(cohort):
    images, data, folder = cohort
    before = write(images, data, folder)
    old = before.home/before.samples["shard"].iloc[-1]
    aged = time.time() - 25*3600
    os.utime(old, (aged, aged))
    write_volume(data/"p3.nii.gz", 77)
    write(images, data, folder)
    assert old.is_file()                                        # written long ago, superseded just now
    write(images, data, folder)
    assert old.is_file()
    for mark in before.home.glob(".*.unnamed"): os.utime(mark, (aged, aged))
    write(images, data, folder)
    assert not old.is_file() and not list(before.home.glob(".*"))
    assert len(list(before.home.glob("*.npy"))) == N_PATIENTS


def test_slices_that_are_named_again_lose_their_mark(cohort):
    images, data, folder = cohort
    first = write(images, data, folder)
    content = (data/"p3.nii.gz").read_bytes()
    write_volume(data/"p3.nii.gz", 77)
    write(images, data, folder)
    assert len(list(first.home.glob(".*.unnamed"))) == 1
    (data/"p3.nii.gz").write_bytes(content)
    assert write(images, data, folder).identity == first.identity
    marked = [mark.name for mark in first.home.glob(".*.unnamed")]
    assert len(marked) == 1 and first.samples["shard"].iloc[-1] not in marked[0]


def test_slices_have_the_permissions_of_any_new_file(cohort):
    before = os.umask(0o027)
    try: cache = write(*cohort)
    finally: os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in cache.home.iterdir()} == {0o640}


# --- which files make a scan

def test_of_several_sessions_the_first_is_taken_by_number():
    table = pd.DataFrame({"patient_id": "P", "sample_id": "P", "sequence": "t1", "session": ["10", "2", "11"], "path": ["ten", "two", "eleven"]})
    assert scans_of(table, CONFIG)[0].files == (("t1", "two"),)
    names = ["ses-10b", "ses-9", "ses-10a", "ses-010", "", "ses"]
    assert sorted(names, key=slices.natural_order) == ["", "ses", "ses-9", "ses-010", "ses-10a", "ses-10b"]


def test_two_files_of_a_sequence_in_one_session_are_refused_by_name(cohort):
    images, data, folder = cohort
    twice = pd.concat([images, images[:1].assign(path="p1.nii.gz")])
    with pytest.raises(DataError, match="P0: several files of one sequence in session '': p0.nii.gz, p1.nii.gz"): write(twice, data, folder)


def test_an_expression_that_merges_patients_is_refused_also_across_sessions(cohort):
    images, data, folder = cohort
    config = SliceConfig(sequences=("t1",), size=16, ids="regex", id_pattern=r"(?P<patient>p)\d")
    with pytest.raises(DataError, match="'p', to several patients of the cohort: P0, P1"): write(images.assign(session=[f"s{k}" for k in range(4)]), data, folder, config)


def test_rows_without_an_id_are_named(cohort):
    images, data, folder = cohort
    for column in ("sample_id", "patient_id"):
        with pytest.raises(DataError, match=r"rows 2 \(p2.nii.gz\)"): write(images.assign(**{column: ["P0", "P1", np.nan, "P3"]}), data, folder)


# --- records

@pytest.mark.parametrize("damage", [lambda text: "{}", lambda text: "[]", lambda text: "", lambda text: text[:200], lambda text: text.replace("null", "[1, 2]", 1),
                                    lambda text: text.replace('"patient_id": "P0"', '"patient_id": "P1"'), lambda text: json.dumps({"shard": "x.npy"})])
def test_a_damaged_record_is_cut_again(cohort, damage):
    first = write(*cohort)
    path = next(first.home.glob("P0*.json"))
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.warns(UserWarning, match="1 of 4 records are damaged: P0"): assert sorted(read_slices(first.home).grids) == ["P1", "P2", "P3"]
    again = write(*cohort)
    assert again.written == ("P0",) and again.identity == first.identity and path.read_text() == text


def test_a_scan_that_fails_is_left_out_by_readers_until_it_is_mended(cohort):
    images, data, folder = cohort
    first = write(images, data, folder)
    whole = (data/"p2.nii.gz").read_bytes()
    (data/"p2.nii.gz").write_bytes(b"broken")
    partial = write(images, data, folder)
    assert partial.failures["scan_id"].tolist() == ["P2"] and sorted(read_slices(first.home).grids) == ["P0", "P1", "P3"]
    assert len(dataset_of(first).batch(range(4*N_SLICES))[0]) == 4*N_SLICES            # who opened the cache before still finds the slices
    (data/"p2.nii.gz").write_bytes(whole)
    assert write(images, data, folder).identity == first.identity == read_slices(first.home).identity


# --- many scans

def test_two_thousand_scans_stay_mapped_with_sixty_four_open_files(tmp_path):
    n = 2000
    for k in range(n): np.save(tmp_path/f"{k}.npy", np.full((2, 1, 16, 16), k % 251, np.uint8))
    rows = pd.DataFrame({"patient_id": "P", "scan_id": [str(k) for k in range(n)], "shard": [f"{k}.npy" for k in range(n)], "row": 1})
    dataset = SliceDataset(SliceCache(tmp_path, CONFIG, rows, {}, pd.DataFrame()), rows, outcome=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 64, hard))
    try:
        for _ in range(2): assert [int(dataset.stored(k)[0, 3, 3]) for k in range(n)] == [k % 251 for k in range(n)]
        assert len(os.listdir("/dev/fd")) == n_open
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert slices._open_shard.cache_info()[:2] == (n, n)        # every second reading was a hit


def test_mapped_slices_are_the_bytes_of_the_file_and_cannot_be_changed(tmp_path):
    for storage in (np.uint8, np.float16):
        array = np.random.default_rng(0).integers(0, 255, (3, 2, 5, 5)).astype(storage)
        np.save(tmp_path/f"{storage.__name__}.npy", array)
        mapped = slices._open_shard(str(tmp_path/f"{storage.__name__}.npy"))
        assert mapped.dtype == storage and np.array_equal(mapped, array)
        with pytest.raises(ValueError, match="read-only"): mapped[0] = 0


# --- which data, and on which device

@pytest.fixture
def joined(cohort):
    cache = write(*cohort)
    samples = pd.DataFrame({"patient_id": [f"P{k}" for k in range(N_PATIENTS)], "sample_id": [f"P{k}" for k in range(N_PATIENTS)], "time_days": 100.0*np.arange(4) + 50, "event": [True, False, True, True]})
    tabular = pd.DataFrame(np.random.default_rng(0).normal(size=(N_PATIENTS, 3)), index=samples["sample_id"])
    return cache, slice_rows(cache, samples), tabular


def test_identity_sees_patients_features_outcomes_and_scaling(joined):
    cache, rows, tabular = joined
    first = SliceDataset(cache, rows[rows["patient_id"] != "P3"], tabular)
    other_patients = SliceDataset(cache, rows[rows["patient_id"] != "P0"], tabular)
    assert len(first) == len(other_patients) and first.tabular.shape == other_patients.tabular.shape
    kept = rows[rows["patient_id"] != "P3"]
    others = [other_patients, SliceDataset(cache, kept, 50*tabular), SliceDataset(cache, kept.assign(time_days=kept["time_days"] + 1), tabular),
              SliceDataset(cache, kept.assign(event=~kept["event"]), tabular), SliceDataset(read_slices(cache.home, sd=0.4), kept, tabular)]
    assert isinstance(first.identity, str) and len({d.identity for d in [first, *others]}) == 6
    assert SliceDataset(read_slices(cache.home), kept.reset_index(drop=True), tabular[::-1]).identity == first.identity


def test_resident_batches_are_those_of_the_dataset_in_the_loop_of_training(joined):
    from brainmets.train.learner import TrainConfig, training_loader
    cache, rows, tabular = joined
    dataset = SliceDataset(cache, rows[::-1], tabular)
    held = resident(dataset, "cpu")
    assert held.identity == dataset.identity and len(held) == len(dataset)
    config = TrainConfig(batch_size=5, device="cpu")
    orders = [list(training_loader(d, config, torch.Generator().manual_seed(3), torch.device("cpu"))) for d in (dataset, held)]
    assert len(orders[0]) == len(orders[1]) > 3
    for expected, found in zip(*orders):
        for a, b in zip(expected, found): assert a.dtype == b.dtype and torch.equal(a, b)


def test_slices_on_another_device_refuse_worker_processes(joined):
    cache, rows, tabular = joined
    held = resident(SliceDataset(cache, rows, tabular), "meta")             # a device of torch without memory stands for a card
    images, features, target = held.batch([3, 1, 1])
    assert {t.device.type for t in (images, features, target)} == {"meta"} and images.shape == (3, 1, 16, 16) and images.dtype == torch.float32
    with pytest.raises(DataError, match="n_workers = 0"): list(torch.utils.data.DataLoader(held, batch_size=4, num_workers=1))
