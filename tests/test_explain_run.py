"""`explain_run` on models without table or without images, on a hold-out run of another loss without masks, and on runs and cohorts that do not fit."""
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from brainmets.phantom import write_phantom
from brainmets.runs import read_run
from brainmets.studies.explain import ALL_FOLDS, ExplainConfig, explain_run, held_out_by, measured_slices
from brainmets.studies.hybrid import run_hybrid
from brainmets.studies.hybrid_settings import hybrid_study_config
from brainmets.tables import DataError, read_table, write_table

QUICK = ExplainConfig(n_slices=40, n_rows=60, n_repeats=2, n_mapped=4, n_drawn=1, n_lesion_slices=2, n_random=2, n_resamples=20)
SMALL = dict(n_folds=2, n_members=2, epochs=(1,), slices_per_scan=1, n_resamples=20, n_passes=0, horizons_months=(12,))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    return write_phantom(folder, 36, seed=7, progress=False), folder


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory):
    return run_hybrid(*cohort, tmp_path_factory.mktemp("runs")/"run", hybrid_study_config("quick", ablations=("image", "tabular"), **SMALL))


def names(folder): return {p.name for p in folder.iterdir()}


def test_image_alone_has_maps_and_no_columns(run, cohort, tmp_path):
    page = explain_run(run.folder, *cohort, tmp_path, "image-only", config=QUICK)
    assert "sees images alone" in page.read_text() and "Against the truth" not in page.read_text()
    assert {"map_table.csv", "cascade.csv", "random_nets.csv", "maps"} <= names(tmp_path) and not {"importance_patient.csv", "attributions.csv"} & names(tmp_path)
    assert len(names(tmp_path/"maps")) == 2


def test_table_alone_has_columns_and_no_maps(run, cohort, tmp_path):
    page = explain_run(run.folder, *cohort, tmp_path, "tabular-only", config=QUICK)
    assert "sees the table alone" in page.read_text() and "Against the truth" in page.read_text()
    assert not {"maps", "cascade.csv"} & names(tmp_path)
    added = read_table(tmp_path/"attributions.csv")
    variables = [c for c in added if c not in ("patient_id", "fold", "difference", "unit")]
    assert np.abs(added[variables].sum(axis=1) - added.difference).max() <= 0.01*added.difference.abs().max() + 1e-6
    table = read_table(tmp_path/"importance_patient.csv")
    assert set(table.fold) == {ALL_FOLDS, "repeat-0_fold-0", "repeat-0_fold-1"} and set(table.n_patients[table.fold == ALL_FOLDS]) == {36}


def test_the_same_twice(run, cohort, tmp_path):
    pages = [explain_run(run.folder, *cohort, tmp_path/name, "tabular-only", config=QUICK).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_every_patient_is_explained_by_a_net_that_did_not_learn_from_this_patient(run):
    held, folds = held_out_by(run), read_table(run.path("folds.csv"))
    for row in folds[folds.partition == "train"].itertuples(): assert held[row.patient_id] != f"repeat-{row.repeat}_fold-{row.fold}"
    assert len(held) == 36


def copied(run, tmp_path):
    return read_run(shutil.copytree(run.folder, tmp_path/"copy", ignore=shutil.ignore_patterns("cache")))


def test_another_cohort_is_refused(run, cohort, tmp_path):
    other = write_phantom(tmp_path/"other", 36, seed=8, progress=False)
    with pytest.raises(DataError, match="table and manifest are not those of the run"): explain_run(run.folder, other, tmp_path/"other", tmp_path/"out")
    changed = tmp_path/"changed"
    shutil.copytree(cohort[1], changed)
    masks = sorted(changed.rglob("*-seg.nii.gz"))
    shutil.copy(masks[0], masks[1])
    with pytest.raises(DataError, match="masks and columns are not those"): explain_run(run.folder, changed/"phantom.toml", changed, tmp_path/"out")
    shutil.copytree(cohort[1], changed, dirs_exist_ok=True)
    images = sorted(changed.rglob("*-t1c.nii.gz"))
    shutil.copy(images[0], images[1])
    with pytest.raises(DataError, match="images are not those"): explain_run(copied(run, tmp_path).folder, changed/"phantom.toml", changed, tmp_path/"out")


def test_a_changed_folds_table_is_found_out(run, tmp_path):
    copy = copied(run, tmp_path)
    folds = read_table(copy.path("folds.csv"))
    write_table(copy.path("folds.csv"), folds.assign(fold=1 - folds.fold))
    with pytest.raises(DataError, match="does not name the patients"): held_out_by(copy)


def test_an_unfinished_run_is_refused(run, tmp_path):
    copy = copied(run, tmp_path)
    (copy.member("repeat-0_fold-1")/"done.json").unlink()
    with pytest.raises(DataError, match="not finished"): held_out_by(copy)


def test_hold_out_with_cox_and_without_masks(cohort, tmp_path):
    manifest = tmp_path/"no_masks.toml"
    manifest.write_text("\n".join(line for line in cohort[0].read_text().splitlines() if not line.startswith("mask = ")))
    config = hybrid_study_config("quick", **SMALL | dict(protocol="hold-out", test_share=0.4, loss="cox", channels="single", sequences=("t1ce",), min_tumor_voxels=0, ablations=()))
    run = run_hybrid(manifest, cohort[1], tmp_path/"run", config)
    page = explain_run(run.folder, manifest, cohort[1], tmp_path/"out", config=QUICK)
    table, text = read_table(tmp_path/"out"/"importance_patient.csv"), page.read_text()
    assert set(table.score) == {"C"} and set(table.fold) == {ALL_FOLDS} and table.n_patients.max() < 20
    assert "has no masks" in text and "log hazard" in text and "not explained" in text and not (tmp_path/"out"/"map_table.csv").exists()


def test_slices_to_measure():
    rows = pd.DataFrame({"n_tumor_voxels": [0, 3, 0, 2, 9, 1.0]})
    assert measured_slices(rows, 2).tolist() == [1, 5] and measured_slices(rows, 9).tolist() == [1, 3, 4, 5]
    assert measured_slices(rows*np.nan, 3).tolist() == [0, 2, 5] and len(measured_slices(rows*0, 3)) == 0
