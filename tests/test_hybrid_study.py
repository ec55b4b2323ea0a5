"""System A through the command line, as a user runs it: small nets, real files, real processes."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import tomli_w

from brainmets.samples.pictures import cut_scan
from brainmets.studies.hybrid_settings import hybrid_study_config, make_arms, slice_config

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("BRAINMETS_DATA", ROOT.parent/"shared"/"data"))/"tcga_fg_6692"
SMALL = {"n_folds": 2, "n_members": 2, "epochs": 3, "slices_per_scan": 2, "n_resamples": 50, "n_passes": 5, "ablations": "tabular", "min_tumor_voxels": 0, "checkpoint_seconds": 0.0}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def words(*parts, **settings):
    return [sys.executable, "-m", "brainmets", *map(str, parts), *[w for k, v in settings.items() for w in ("--set", f"study.{k}={v}")]]


def brainmets(*parts, **settings):
    return subprocess.run(words(*parts, **settings), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    assert brainmets("phantom", folder/"cohort", "--patients", 24, "--seed", 5).returncode == 0
    return folder


@pytest.fixture(scope="module")
def finished(phantom):
    done = brainmets("run", "hybrid", phantom/"cohort"/"phantom.toml", "--data", phantom/"cohort", "--out", phantom/"run", "--cache", phantom/"cache", "--workers", 1, **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return phantom/"run", done.stdout


def test_run_says_what_was_asked(finished):
    folder, said = finished
    assert "R2 per patient, hybrid-test_resnet" in said and "R2 per slice, hybrid-test_resnet" in said and "Interval 'patient'" in said and "oracle, all" in said
    for name in ("config.toml", "folds.csv", "predictions.csv", "slices.csv", "metrics.csv", "intervals.csv", "validation.csv", "latency.csv", "nets.csv", "audit.md", "report.html", "provenance.json"):
        assert (folder/name).is_file(), name
    models = set(pd.read_csv(folder/"predictions.csv").model)
    assert {"hybrid-test_resnet", "hybrid-test_resnet-best", "tabular-only", "volume", "cox"} <= models
    assert json.loads((folder/"audit.json").read_text())["counts"]["void"] == 0


def test_killed_run_goes_on_and_ends_the_same(finished, phantom):
    "SIGKILL between the first and the last epoch of a net; the same command ends with the same files and predictions, which also shows that two runs with one seed are equal."
    folder, out = finished[0], phantom/"killed"
    command = words("run", "hybrid", phantom/"cohort"/"phantom.toml", "--data", phantom/"cohort", "--out", out, "--cache", phantom/"cache", "--workers", 1, **SMALL)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=ROOT)
    checkpoint, until = out/"members"/"repeat-0_fold-1"/"hybrid-test_resnet"/"inner-0"/"checkpoint.json", time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < until and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (out/"predictions.csv").exists()
    assert len(json.loads(checkpoint.read_text())["rows"]) < SMALL["epochs"], "the net was not yet finished"
    assert (out/"members"/"repeat-0_fold-0"/"done.json").exists() and not (out/"members"/"repeat-0_fold-1"/"done.json").exists()
    first = (out/"members"/"repeat-0_fold-0"/"done.json").stat().st_mtime_ns
    assert subprocess.run(command, capture_output=True, env=ENVIRONMENT, cwd=ROOT).returncode == 0
    assert (out/"members"/"repeat-0_fold-0"/"done.json").stat().st_mtime_ns == first, "a finished fold is not run again"
    for name in ("predictions.csv", "slices.csv", "folds.csv"): assert (out/name).read_bytes() == (folder/name).read_bytes(), name
    files = lambda base: sorted(str(p.relative_to(base)) for p in (base/"members").rglob("*") if p.is_file())
    assert files(out) == files(folder)


def test_slices_split_is_void_beside_patients_at_chance(tmp_path):
    "Acceptance on --null: R2 above 0.9 where slices are split, no better than the mean where patients are, and exit code 1."
    assert brainmets("phantom", tmp_path/"cohort", "--patients", 30, "--seed", 5, "--null").returncode == 0
    done = brainmets("run", "hybrid", tmp_path/"cohort"/"phantom.toml", "--data", tmp_path/"cohort", "--out", tmp_path/"run", "--split", "slice", "--workers", 1, n_resamples=50)
    assert done.returncode == 1 and "VOID" in done.stdout, done.stderr[-3000:]
    metrics = pd.read_csv(tmp_path/"run"/"metrics.csv")
    r2 = metrics[(metrics.metric == "R2") & (metrics.scope == "pooled")].set_index("model").estimate
    assert r2["hybrid-test_resnet-by-slice"] > .9 and r2["hybrid-test_resnet-by-patient"] < .2
    assert "VOID" in (tmp_path/"run"/"report.html").read_text()
    counts = [len(pd.read_csv(tmp_path/"run"/f"processed_{part}.csv")) for part in ("train", "val", "test")]
    assert counts[0] == int(.7*sum(counts))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL.name}: set BRAINMETS_DATA")
def test_predicts_a_real_scan(finished, phantom, tmp_path):
    "Two patients with the same real scan, one of them with a table far from the training patients and a column missing."
    for patient in ("Real-1", "Real-2"):
        (tmp_path/"data"/patient).mkdir(parents=True)
        for name in ("t1", "t1ce", "t2", "flair"): shutil.copyfile(REAL/"sri24"/f"{name}.nii.gz", tmp_path/"data"/patient/f"{name}.nii.gz")
    manifest = (phantom/"cohort"/"phantom.toml").read_text()
    source = pd.read_excel(phantom/"cohort"/"Phantom_clin.xlsx", sheet_name="Data").iloc[[0, 1]].copy()
    source["BraTS_MET_ID"] = ["Real-1", "Real-2"]
    source.loc[source.index[1], "Age"] = 99
    with pd.ExcelWriter(tmp_path/"data"/"Phantom_clin.xlsx") as book: source.to_excel(book, sheet_name="Data", index=False)
    (tmp_path/"new.toml").write_text(new_manifest(manifest))
    done = brainmets("predict", finished[0], tmp_path/"new.toml", "--data", tmp_path/"data", "--out", tmp_path/"out.csv", "--workers", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path/"out.csv").set_index("patient_id")
    assert list(table.index) == ["Real-1", "Real-2"] and (table.n_slices == 155).all()
    assert (table.predicted_low_days < table.predicted_days).all() and (table.predicted_days < table.predicted_high_days).all()
    assert table.note_table.str.len().gt(20).all() and table.note_image.str.len().gt(20).all()
    assert "age is 99" in table.note_table["Real-2"]
    for patient in table.index:
        assert (tmp_path/"out_maps"/f"{patient}.png").stat().st_size > 10_000
        volume = nib.load(tmp_path/"out_maps"/f"{patient}.nii.gz")
        assert volume.shape == (240, 240, 155) and np.allclose(volume.affine, nib.load(REAL/"sri24"/"t1.nii.gz").affine)
        assert 0 < volume.get_fdata().max() <= 1


def new_manifest(text):
    "The phantom's manifest for other images: no outcome, no masks, no expected counts."
    parts = tomllib.loads(text)
    for name in ("outcome", "labels"): parts.pop(name, None)
    parts["cohort"] = {**parts["cohort"], "name": "real", "title": "One real scan", "synthetic": False}
    parts["cohort"].pop("expected", None)
    parts["images"] = {"layout": "pattern", "sequences": {name: f"{{patient}}/{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")}}
    return tomli_w.dumps(parts)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL.name}: set BRAINMETS_DATA")
def test_paper_preset_reads_the_real_grid():
    config = hybrid_study_config("paper")
    pictures, grid, _ = cut_scan({name: REAL/"sri24"/f"{name}.nii.gz" for name in config.sequences}, slice_config(config))
    assert pictures.shape == (620, 1, 128, 128) and grid.shape == (240, 240, 155) and pictures.max() == 255
    first = make_arms(config)[0]
    assert (first.name, first.loss, first.train.batch_size, first.train.lr, first.net.weights) == ("hybrid-resnet50", "mse", 32, 1e-4, "imagenet")


def test_damaged_weights_are_refused(finished, phantom, tmp_path):
    shutil.copytree(finished[0], tmp_path/"run", ignore=shutil.ignore_patterns("cache"))
    path = tmp_path/"run"/"members"/"repeat-0_fold-0"/"hybrid-test_resnet"/"inner-0"/"net.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    done = brainmets("predict", tmp_path/"run", phantom/"cohort"/"phantom.toml", "--data", phantom/"cohort", "--out", tmp_path/"out.csv", "--no-maps")
    assert done.returncode == 1 and "net.safetensors is not the file" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path/"out.csv").exists()
