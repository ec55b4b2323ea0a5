"""Preprocessing on real scans and on native phantoms: how well, the same everywhere, and what a stop or a bad file costs."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainmets.checks import check
from brainmets.cohort import load_cohort
from brainmets.phantom import write_phantom
from brainmets.phantom_images import Grid, anatomy
from brainmets.phantom_scanner import add_native_scans
from brainmets.prep.brain import METHODS
from brainmets.prep.pipeline import Unit, PrepSettings, prep_settings, prepare_unit, preprocess
from brainmets.prep.registration import Scan, read_scan, read_transform, register, resampled, resampled_labels, Space, space_of, target_error_mm, to_native, write_scan
from brainmets.tables import DataError, read_json
from brainmets.volumes import dice

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("BRAINMETS_DATA", ROOT.parent/"shared"/"data"))
REAL = DATA/"tcga_fg_6692"
SEQUENCES = ("t1", "t1ce", "t2", "flair")
SHAPE, SMALL = (80, 80, 52), (48, 48, 31)


def phantom_atlas(folder, shape):
    "The phantom's own template as an atlas folder: then the planted matrices are the truth for the whole way."
    tissue = anatomy(shape)
    template = (tissue*np.array([0.2, 0.7, 1.0])[:, None, None, None]).sum(0)*400
    image = nib.as_closest_canonical(nib.Nifti1Image(np.where(tissue.sum(0) > 0.5, template, 0).astype(np.float32), Grid(shape).affine))
    write_scan(folder/"template.nii.gz", Scan(image.get_fdata(dtype=np.float32), image.affine))
    return folder


def native_cohort(base, shape, n_patients):
    "A cohort of native phantom patients and an atlas: (manifest, data folder, atlas folder)."
    write_phantom(base/"cohort", n_patients=n_patients, shape=shape, progress=False)
    return add_native_scans(base/"cohort", progress=False), base/"cohort", phantom_atlas(base/"atlas", shape)


def prepared_by_one(cohort, folder):
    manifest, data, atlas = cohort
    return preprocess(load_cohort(manifest, data), folder, atlas=atlas, workers=1)


@pytest.fixture(scope="module")
def native(tmp_path_factory): return native_cohort(tmp_path_factory.mktemp("native"), SHAPE, 1)


@pytest.fixture(scope="module")
def done(native, tmp_path_factory): return prepared_by_one(native, tmp_path_factory.mktemp("done")/"out")


@pytest.fixture(scope="module")
def small(tmp_path_factory): return native_cohort(tmp_path_factory.mktemp("small"), SMALL, 2)


@pytest.fixture(scope="module")
def small_done(small, tmp_path_factory): return prepared_by_one(small, tmp_path_factory.mktemp("small_done")/"out")


def patients_of(folder): return sorted(p.name for p in folder.iterdir() if (p/"steps.json").is_file())


def digests(folder):
    "SHA-256 of every file of the patients' folders."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for patient in patients_of(folder) for p in sorted((folder/patient).rglob("*")) if p.is_file()}


def test_native_grids_are_no_problem_of_a_native_cohort(native):
    manifest, data, _ = native
    assert not [p for p in check(manifest, data).problems if p.code == "geometry"]
    assert [p for p in check(manifest, data, {"images.native": False}).problems if p.code == "geometry"]


def test_rigid_recovery_is_under_half_a_millimetre_and_masks_come_back(native, done):
    manifest, data, _ = native
    truth = read_json(data/"truth_transforms.json")["native_to_phantom"]
    brain_points = nib.affines.apply_affine(Grid(SHAPE).affine, np.argwhere(anatomy(SHAPE).sum(0) > 0.5)[::60])
    for patient in patients_of(done.folder):
        kept = {s: read_transform(done.folder/patient/"transforms"/f"{s}.json") for s in SEQUENCES}
        planted = {s: np.array(m) for s, m in truth[patient].items()}
        for s in ("t1", "t2", "flair"):
            points = nib.affines.apply_affine(np.linalg.inv(planted[s]), brain_points)
            error = target_error_mm(np.linalg.inv(kept["t1ce"]["native_to_atlas"]) @ kept[s]["native_to_atlas"], np.linalg.inv(planted["t1ce"]) @ planted[s], points)
            assert error < 0.5, (patient, s, error)
        native_mask = read_scan(next((data/"native"/patient).glob("*seg.nii.gz")))
        coarse = to_native(read_scan(done.folder/patient/"mask.nii.gz"), kept["t1ce"], labels=True)
        fine = Space((240, 240, 155), Grid().affine)              # the 1 mm that atlases have, where the phantom here has 3 mm
        matrix = kept["t1ce"]["native_to_atlas"]
        back = resampled_labels(resampled_labels(native_mask, fine, matrix), space_of(native_mask), np.linalg.inv(matrix))
        scores = [round(dice(m.array > 0, native_mask.array > 0), 3) for m in (back, coarse)]
        print(f"mask to the atlas and back, {patient}: Dice {scores[0]} through 1 mm, {scores[1]} through 3 mm")
        assert scores[0] > 0.95 and scores[1] > 0.85


def test_the_whole_way_to_the_atlas_without_anatomy_in_between(tmp_path):
    "A head that is the atlas itself, moved: nothing but registration stands between the planted matrix and the one that is found."
    tissue, grid = anatomy(SHAPE), Grid(SHAPE)
    brain = tissue.sum(0) > 0.5
    template = Scan(np.where(brain, (tissue*np.array([0.2, 0.7, 1.0])[:, None, None, None]).sum(0)*400, 0).astype(np.float32), grid.affine, "template")
    from brainmets.phantom_scanner import rigid
    planted = rigid((5, -4, 7), (6, -3, 4), (-119.5, 120, 77))
    moved = resampled(template, space_of(template), np.linalg.inv(planted))
    noisy = moved.like(moved.array + np.random.default_rng(0).normal(0, 12, moved.array.shape).astype(np.float32)*(moved.array > 0))
    found = register(noisy, template, brain)
    points = nib.affines.apply_affine(np.linalg.inv(planted), nib.affines.apply_affine(grid.affine, np.argwhere(brain)[::60]))
    assert target_error_mm(found, planted, points) < 0.5


def test_skull_strip_against_the_truth_of_the_phantom(native, done):
    manifest, data, _ = native
    for patient in patients_of(done.folder):
        truth = read_scan(data/"truth_brains"/f"{patient}.nii.gz")
        kept = read_transform(done.folder/patient/"transforms"/"t1ce.json")
        carried = resampled_labels(truth, kept["atlas"], kept["native_to_atlas"]).array > 0
        score = dice(read_scan(done.folder/patient/"brain.nii.gz").array > 0, carried)
        print(f"brain mask, phantom {patient}: Dice {score:.3f}")
        assert score > 0.9


def test_a_given_brain_mask_wins(small, tmp_path):
    manifest, data, atlas = small
    shutil.copytree(data, tmp_path/"c")
    for path in (tmp_path/"c"/"truth_brains").iterdir():
        patient = path.name.removesuffix(".nii.gz")
        shutil.move(path, tmp_path/"c"/"native"/patient/f"{patient}-brain.nii.gz")
    cohort = load_cohort(tmp_path/"c"/"native.toml", tmp_path/"c", {"images.brain": "{patient}/{patient}-brain.nii.gz"})
    unit_rows = cohort.images[cohort.images.patient_id == cohort.images.patient_id[0]]
    unit = Unit(cohort.images.patient_id[0], "", "one", tuple(zip(unit_rows.sequence, unit_rows.path)))
    row = prepare_unit(unit, tmp_path/"c", tmp_path/"out", PrepSettings(), str(atlas))
    assert row["status"] == "made", row
    assert read_json(tmp_path/"out"/"one"/"steps.json")["brain"]["method"] == "given"


def test_two_workers_and_a_dask_cluster_write_the_same_bytes(small, small_done, tmp_path):
    manifest, data, atlas = small
    cohort = load_cohort(manifest, data)
    expected = digests(small_done.folder)
    preprocess(cohort, tmp_path/"two", atlas=atlas, workers=2)
    assert digests(tmp_path/"two") == expected
    programs = []
    try:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(tmp_path/"scheduler.json")]
        programs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.time() + 60
        while not (tmp_path/"scheduler.json").is_file() and time.time() < deadline: time.sleep(0.2)
        for k in range(2):
            words = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(tmp_path/"scheduler.json"), "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path/f"w{k}")]
            programs.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        address = read_json(tmp_path/"scheduler.json")["address"]
        from distributed import Client
        with Client(address, timeout="60s") as client: client.wait_for_workers(2, timeout=60)
        preprocess(cohort, tmp_path/"dask", atlas=atlas, scheduler=address)
        assert digests(tmp_path/"dask") == expected
    finally:
        for program in reversed(programs): program.terminate()
        for program in programs: program.wait(20)


def test_no_scheduler_is_said_in_words(small, tmp_path):
    manifest, data, atlas = small
    with pytest.raises(DataError, match="no Dask scheduler at"): preprocess(load_cohort(manifest, data), tmp_path/"o", atlas=atlas, scheduler="tcp://127.0.0.1:9")


def test_a_killed_run_goes_on_and_a_truncated_file_costs_one_patient(small, small_done, tmp_path):
    manifest, data, atlas = small
    expected = digests(small_done.folder)
    command = [sys.executable, "-m", "brainmets", "preprocess", str(manifest), "--data", str(data), "--atlas", str(atlas), "--out", str(tmp_path/"out"), "--workers", "1"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 300
    while not list((tmp_path/"out").glob("*/steps.json")) and time.time() < deadline: time.sleep(0.1)
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    first = patients_of(tmp_path/"out")
    assert len(first) == 1
    stamp = (tmp_path/"out"/first[0]/"steps.json").stat().st_mtime_ns
    copy = tmp_path/"data"
    shutil.copytree(data, copy)
    second = next(p for p in patients_of(small_done.folder) if p not in first)
    broken = next((copy/"native"/second).glob("*t2w.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:3000])
    ended = subprocess.run([*command[:4], str(copy/"native.toml"), "--data", str(copy), *command[7:]], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "1 were there, 1 failed" in ended.stdout and "t2w.nii.gz" in ended.stdout
    assert (tmp_path/"out"/first[0]/"steps.json").stat().st_mtime_ns == stamp
    assert pd.read_csv(tmp_path/"out"/"failures.csv").patient_id.tolist() == [second]
    assert not list((tmp_path/"out").rglob(".unfinished-*"))
    assert digests(tmp_path/"out") == {k: v for k, v in expected.items() if k.startswith(first[0])}
    assert load_cohort(tmp_path/"out"/"manifest.toml", tmp_path/"out").n_patients == 1
    assert (tmp_path/"out"/"quality.html").is_file()


def test_settings_change_what_they_name(small, tmp_path):
    manifest, data, atlas = small
    cohort = load_cohort(manifest, data)
    rows = cohort.images[cohort.images.patient_id == cohort.images.patient_id[0]]
    unit = Unit(rows.patient_id.iloc[0], "", "one", tuple(zip(rows.sequence, rows.path)))
    row = prepare_unit(unit, data, tmp_path/"z", prep_settings("gomaa", output="head", cube=24, masks="nearest", interpolation="lanczos"), str(atlas))
    assert row["status"] == "made", row
    brain = read_scan(tmp_path/"z"/"one"/"brain.nii.gz").array > 0
    t1 = read_scan(tmp_path/"z"/"one"/"t1.nii.gz").array
    assert abs(t1[brain].mean()) < 0.01 and abs(t1[brain].std() - 1) < 0.01 and (t1[~brain] != 0).any()
    assert nib.load(tmp_path/"z"/"one"/"cube.nii.gz").shape == (24, 24, 24, 4)


real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {DATA.name}: set BRAINMETS_DATA")


@pytest.fixture(scope="module")
def real_case(tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    unit = Unit("tcga", "", "tcga", tuple((s, f"native/{s}.nii.gz") for s in ("t1ce", "t2")))
    row = prepare_unit(unit, REAL, out, prep_settings(scale="none", output="head"), "mni152")
    assert row["status"] == "made", row
    return out/"tcga"


@real
def test_real_brain_mask_agrees_with_the_published_one(real_case):
    "The published skull-stripped t1ce lies on SRI24, ours on MNI152: aligned by a rigid registration, then compared."
    ours = read_scan(real_case/"brain.nii.gz").array > 0
    t1ce = read_scan(real_case/"t1ce.nii.gz")
    published = read_scan(REAL/"sri24"/"t1ce.nii.gz")
    matrix = register(published, t1ce.like(np.where(ours, t1ce.array, 0)), ours)
    theirs = resampled_labels(published.like((published.array != 0).astype(np.uint8)), space_of(t1ce), matrix).array > 0
    score = dice(ours, theirs)
    print(f"brain mask against the published one: Dice {score:.4f}")
    assert score > 0.93


@real
def test_real_sequences_are_brought_together(real_case):
    for s, found in read_json(real_case/"steps.json")["similarity"].items():
        print(f"{s}: mutual information {found['before']:.3f} before, {found['after']:.3f} after")
        assert found["after"] > 1.5*found["before"]


def test_brain_methods_are_refused_or_found_in_words():
    assert {"hd-bet", "synthstrip", "deepbet", "atlas", "nonzero"} == set(METHODS)
    with pytest.raises(DataError, match="expected one of auto, hd-bet"): prep_settings(brain="bet2")
