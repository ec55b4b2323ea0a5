"""Crops where a notebook lesson cannot reach: the cache when files change or a run is killed, workers, augmentation in loaders, real images."""
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from brainmets.samples.augment import Augment, AugmentConfig
from brainmets.samples.boxes import crop_grid, cut, place_back
from brainmets.samples.crops import EDEMA_CROPS, LESION_CUBES, CropConfig, CropDataset, crop_cases, crop_rows, cut_crops, read_crops
from brainmets.tables import DataError

LABELS = {"edema": 2, "enhancing": 3}
CONFIG = CropConfig(size=(10, 12, 11), pad_to=16, low_percent=1.0)
N_PATIENTS = 4


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


def write_case(folder, k):
    rng = np.random.default_rng(k)
    mask = np.zeros((20, 22, 18), np.uint8)
    mask[3 + k:12, 5:15, 4:12] = 2
    mask[5 + k:8 + k, 8:11, 6:9] = 3
    mask[16:18, 18:20, 15:17] = 3
    for name, array in (("t1ce", rng.integers(1, 900, mask.shape).astype(np.int16)), ("flair", rng.integers(1, 900, mask.shape).astype(np.int16)), ("mask", mask)):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), folder/f"p{k}_{name}.nii.gz")


@pytest.fixture
def cohort(tmp_path):
    (tmp_path/"data").mkdir()
    for k in range(N_PATIENTS): write_case(tmp_path/"data", k)
    rows = [(f"P{k}", f"P{k}", "", s, f"p{k}_{s}.nii.gz") for k in range(N_PATIENTS) for s in ("t1ce", "flair", "mask")]
    return pd.DataFrame(rows, columns=["patient_id", "sample_id", "session", "sequence", "path"]), tmp_path/"data", tmp_path/"cache"


def write(images, data, folder, config=CONFIG, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return crop_cases(images, data, folder, LABELS, config, progress=False, **more)


def files(home): return {p.name: p.read_bytes() for p in sorted(home.glob("*.npy"))}


# --- the cache

def test_crops_are_plain_arrays_that_need_no_pickle(cohort):
    cache = write(*cohort)
    for path in cache.home.glob("*.npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert array.dtype == np.float16 and array.shape == (1, 3, 16, 16, 16)
    whole = write(*cohort, replace(CONFIG, storage="float32"))
    assert whole.read(whole.samples).dtype == np.float32 and np.allclose(whole.read(whole.samples), cache.read(cache.samples), atol=1e-3)
    assert all(json.loads(p.read_text()) for p in cache.home.glob("*.json"))


def test_workers_and_order_of_the_table_change_no_byte(cohort, tmp_path):
    images, data, folder = cohort
    one = write(images, data, folder)
    two = write(images.sample(frac=1, random_state=0), data, tmp_path/"second", n_workers=2)
    assert files(one.home) == files(two.home) and one.identity == two.identity and one.samples.equals(two.samples)


def test_a_changed_image_is_cut_anew_and_a_touched_one_is_not(cohort):
    images, data, folder = cohort
    first = write(images, data, folder)
    os.utime(data/"p1_flair.nii.gz", ns=(1, 1))
    assert write(images, data, folder).written == ()
    content = (data/"p1_flair.nii.gz").read_bytes()
    nib.save(nib.Nifti1Image(np.full((20, 22, 18), 7, np.int16), np.diag([-1.0, -1.0, 1.0, 1.0])), data/"p1_flair.nii.gz")
    changed = write(images, data, folder)
    assert changed.written == ("P1",) and changed.identity != first.identity
    assert len(first.read(first.samples)) == N_PATIENTS                              # who opened the cache before still reads
    (data/"p1_flair.nii.gz").write_bytes(content)
    assert write(images, data, folder).identity == first.identity


def test_damaged_crops_and_records_are_written_anew(cohort):
    images, data, folder = cohort
    first = write(images, data, folder)
    shard = first.home/first.samples["shard"][0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-10])
    assert write(images, data, folder).written == ("P0",) and shard.read_bytes() == good
    shard.write_bytes(good[:-10] + b"0123456789")                                    # of the same size: only a hash tells
    assert write(images, data, folder).written == () and write(images, data, folder, verify="bytes").written == ("P0",)
    record = next(p for p in first.home.glob("P2*.json"))
    record.write_text(record.read_text().replace('"label": 1', '"label": 2'))
    with pytest.warns(UserWarning, match="1 of 4 records are damaged"): assert len(read_crops(first.home).samples) == 3
    assert write(images, data, folder).written == ("P2",)


def test_one_bad_patient_fails_alone_and_is_named(cohort):
    images, data, folder = cohort
    (data/"p2_t1ce.nii.gz").write_bytes((data/"p2_t1ce.nii.gz").read_bytes()[:300])
    mask = nib.load(data/"p3_mask.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), mask.affine), data/"p3_mask.nii.gz")
    cache = write(images[~((images["patient_id"] == "P1") & (images["sequence"] == "flair"))], data, folder, n_workers=2)
    assert cache.samples["patient_id"].tolist() == ["P0"]
    what = cache.failures.set_index("patient_id")["what"]
    assert "no file of sequence flair" in what["P1"] and "p2_t1ce.nii.gz" in what["P2"] and what["P3"].startswith("P3: no lesion in the mask")
    assert not any(str(data) in w for w in what)


KILLED = """
import sys, pandas as pd
from pathlib import Path
from brainmets.samples.crops import CropConfig, crop_cases
images = pd.read_csv(sys.argv[1], keep_default_na=False)
crop_cases(images, Path(sys.argv[2]), Path(sys.argv[3]), {"edema": 2, "enhancing": 3}, CropConfig(size=(10, 12, 11), pad_to=16, low_percent=1.0), progress=False)
"""


def test_a_killed_run_goes_on(cohort, tmp_path):
    images, data, folder = cohort
    images.to_csv(tmp_path/"images.csv", index=False)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path/"images.csv"), str(data), str(folder)])
    for _ in range(600):
        if list(folder.glob("*/P*.json")) or process.poll() is not None: break
        time.sleep(0.05)
    process.kill(); process.wait()
    n_done = len(list(folder.glob("*/P*.json")))
    assert n_done >= 1
    cache = write(images, data, folder)
    assert len(cache.samples) == N_PATIENTS and len(cache.written) == N_PATIENTS - n_done
    assert files(cache.home) == files(write(images, data, tmp_path/"fresh").home)


def test_lesions_with_recorded_outcome_decide_what_is_cut(cohort):
    images, data, folder = cohort
    cubes = replace(LESION_CUBES, size=(8, 8, 8))
    everything = write(images, data, folder, cubes)
    assert everything.samples["sample_id"].tolist() == [f"P{k}-L{n:02d}" for k in range(N_PATIENTS) for n in (1, 2)]
    for core in everything.read(everything.samples[everything.samples["label"] == 1])[:, 1]:
        assert np.all(np.abs(np.argwhere(core > 0).mean(0) - 3.5) <= 0.5)             # in the middle, to half a voxel
    recorded = pd.DataFrame({"patient_id": [f"P{k}" for k in range(N_PATIENTS)], "label": 2})
    assert set(write(images, data, folder, cubes, lesions=recorded).samples["label"]) == {2}
    second = write(images, data, folder, CONFIG, lesions=recorded)                   # the largest with an outcome is the second, far from the edema
    first = write(images, data, folder, CONFIG)
    assert not np.array_equal(first.read(first.samples), second.read(second.samples))
    two_scans = pd.concat([images, images[images["patient_id"] == "P0"].assign(sample_id="P0b", path=lambda t: t["path"].str.replace("p0", "p1"))])
    with pytest.raises(DataError, match="sample_id"): write(two_scans, data, folder, CONFIG, lesions=recorded)


# --- training

@pytest.fixture
def dataset(cohort):
    cache = write(*cohort)
    samples = pd.DataFrame({"patient_id": [f"P{k}" for k in range(N_PATIENTS)], "sample_id": [f"P{k}" for k in range(N_PATIENTS)], "time_days": 100.0, "event": True})
    return cache, crop_rows(cache, samples)


def epoch_of(loader): return {tuple(target.tolist()): image for images, _, targets in loader for image, target in zip(images, targets)}


def test_augmentation_depends_on_seed_epoch_and_sample_alone(dataset):
    cache, rows = dataset
    rows = rows.assign(time_days=np.arange(float(N_PATIENTS)))
    made = []
    for n_workers, shuffle in ((0, False), (1, True), (2, True)):
        varied = CropDataset(cache, rows, augment=Augment(AugmentConfig(seed=3)))
        loader = DataLoader(varied, batch_size=2, shuffle=shuffle, num_workers=n_workers, persistent_workers=n_workers > 0, generator=torch.Generator().manual_seed(n_workers))
        epochs = []
        for epoch in range(2): varied.set_epoch(epoch); epochs.append(epoch_of(loader))
        made.append(epochs)
    for other in made[1:]:
        for epoch in range(2):
            assert made[0][epoch].keys() == other[epoch].keys() and all(torch.equal(made[0][epoch][k], other[epoch][k]) for k in other[epoch])
    assert not any(torch.equal(made[0][0][k], made[0][1][k]) for k in made[0][0])
    fewer = CropDataset(cache, rows[2:], augment=Augment(AugmentConfig(seed=3)))    # another fold: the sample is varied as before
    assert torch.equal(fewer[0][0], made[0][0][(2.0, 1.0)])


def test_the_training_loader_takes_crops(dataset):
    from brainmets.train.learner import TrainConfig, training_loader
    cache, rows = dataset
    loader = training_loader(CropDataset(cache, rows), TrainConfig(batch_size=2, device="cpu"), torch.Generator().manual_seed(0), torch.device("cpu"))
    images, tabular, target = next(iter(loader))
    assert images.shape == (2, 3, 16, 16, 16) and images.dtype == torch.float32 and tabular.shape == (2, 0) and target.shape == (2, 2)


# --- real images

def test_real_atlas_images_of_the_paper_size(real_data):
    folder = real_data/"tcga_fg_6692"
    paths = {"t1ce": folder/"sri24/t1ce.nii.gz", "flair": folder/"sri24/flair.nii.gz", "mask": folder/"segmentation/fused_prediction.nii.gz"}
    labels = {"necrosis": 1, "edema": 2, "enhancing": 4}
    crops, facts = cut_crops(paths, EDEMA_CROPS, labels)
    assert crops.shape == (1, 3, 96, 128, 112) and crops.min() >= 0 and crops.max() == 1 and max(np.abs(facts[0]["grid"]["shift_mm"])) <= 0.5
    image = nib.as_closest_canonical(nib.load(paths["mask"]))
    mask = np.asarray(image.dataobj)
    from brainmets.samples.boxes import CropGrid
    grid = CropGrid(**facts[0]["grid"])
    back = place_back(crops[0, 2].astype(np.float32), grid, mask.shape, image.affine, order=0, fill=-1)
    expected = np.where(np.isin(mask, (1, 4)), 1.0, np.where(mask == 2, 0.5, 0.0))
    assert np.array_equal(back[back >= 0], expected[back >= 0]) and (back >= 0).sum() == round(95*123*105*(1 - facts[0]["padded_share"]))
    for point in (np.array([3.3, -20.0, 11.0]), (image.affine @ [2, 3, 4, 1])[:3]):          # the second is at the border
        cube = crop_grid(image.affine, point, 64, spacing_mm=1.0)
        array, share = cut(mask.astype(np.float32), image.affine, cube)
        middle = cube.matrix @ [31.5, 31.5, 31.5, 1]
        assert array.shape == (64, 64, 64) and np.allclose(middle[:3], point) and 0 <= share < 1
