"""`explain_vit_run` on a tiny run: page, tables, maps on the scan and in native space, and runs and cohorts that do not fit."""
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from brainmets.explain.attention import KINDS
from brainmets.phantom import write_phantom
from brainmets.prep.registration import Space, save_transform
from brainmets.runs import open_run, read_run
from brainmets.samples.crops import read_crops
from brainmets.studies.vit_cox import run_vit_cox
from brainmets.studies.vit_explain import VitExplainConfig, arm_maps, crops_of_run, explain_vit_run, fold_nets, joined_cells, shown_arms
from brainmets.studies.vit_external import stored_config
from brainmets.studies.vit_settings import vit_study_config
from brainmets.tables import DataError, read_table
from brainmets.volumes import read_header

QUICK = VitExplainConfig(n_cascaded=2, n_random=2, n_steps=3, n_resamples=20, n_shown=3, batch_size=8)
TINY = dict(n_folds=2, n_members=2, epochs=1, batch_size=3, n_events="1+2", accumulate=2, n_resamples=20, hidden=8, mlp=8, layers=1, augment="none", patch=4)
TURN = np.array([[0, -1, 0, 12.], [1, 0, 0, -8], [0, 0, 1, 20], [0, 0, 0, 1]])     # native to atlas: a quarter turn and a shift


def t1ce_of(home, patient): return home/"cohort"/"Pretreat-MetsToBrain-Masks"/patient/f"{patient}-t1c.nii.gz"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cohort of 16, one of them without a crop, one with a transform; a run of it, and what explains it."
    folder = tmp_path_factory.mktemp("vit")
    write_phantom(folder/"cohort", 16, seed=5, workers=1, progress=False)
    patients = sorted(p.name for p in (folder/"cohort"/"Pretreat-MetsToBrain-Masks").iterdir())
    flair = t1ce_of(folder, patients[0]).with_name(f"{patients[0]}-t2f.nii.gz")
    flair.write_bytes(flair.read_bytes()[:2000])
    run_vit_cox(folder/"cohort"/"phantom.toml", folder/"cohort", folder/"run", vit_study_config("quick", **TINY, compared="vit-no-registers+deepsurv"), cache_dir=folder/"crops")
    scan = t1ce_of(folder, patients[5])
    header = read_header(scan)
    corners = nib.affines.apply_affine(np.linalg.inv(TURN) @ header.affine, [[0, 0, 0], np.array(header.shape) - 1])
    native = np.diag([6, 6, 6, 1.0]); native[:3, 3] = corners.min(0) - 12
    shape = tuple(int(n) for n in np.ceil((np.ptp(corners, axis=0) + 24)/6) + 1)
    (scan.parent/"transforms").mkdir()
    save_transform(scan.parent/"transforms"/"t1ce.json", TURN, Space(shape, native), Space(header.shape, header.affine), name="test")
    explain(folder, folder/"explained")
    return folder


def explain(home, out, run="run", config=QUICK, **changes):
    return explain_vit_run(home/run, home/"cohort"/"phantom.toml", home/"cohort", out, config=config, cache_dir=home/"crops", **changes)


def test_page_and_tables(home):
    out = home/"explained"
    html = (out/"explain.html").read_text()
    for words in ("1 of 16 patients are not explained", "phantom, synthetic", "What registers change", "14 of 15 maps are on the grid of the scan only", "15 held-out patients"): assert words in html, words
    assert "A map has 2 x 2 x 2" not in html and "http://" not in html and "https://" not in html
    coverage = read_table(out/"coverage.csv")
    assert set(zip(coverage.model, coverage.kind)) == {(m, k) for m in ("vit", "vit-no-registers") for k in KINDS} and set(coverage.n_patients) == {15}
    known = coverage.estimate.notna()
    assert (coverage.low[known] <= coverage.estimate[known]).all() and (coverage.estimate[known] <= coverage.high[known]).all()
    samples = read_table(out/"coverage_samples.csv")
    assert samples.groupby(["model", "kind"]).sample_id.nunique().eq(15).all() and samples.core_coverage.between(0, 1).all()
    mean = samples[(samples.model == "vit") & (samples.kind == "relevance")].core_coverage.mean()
    assert np.isclose(mean, coverage[(coverage.model == "vit") & (coverage.kind == "relevance") & (coverage.metric == "core coverage")].estimate.iloc[0])
    ends = read_table(out/"cascade_ends.csv")
    assert len(ends) == 6 and ends.spearman.between(-1, 1).all() and (ends.n_random_nets == 4).all()
    assert {p.stem for p in (out/"figures").iterdir()} == {"maps-vit", "maps-vit-no-registers", "heads", "coverage-core", "coverage-gtv", "cascade", "cascade-coverage"}


def test_maps_lie_on_the_scan_and_in_native_space(home):
    out = home/"explained"
    paths = sorted((out/"maps").glob("*.nii.gz"))
    cache = read_crops(next((home/"crops").glob("crops-*")))
    assert len(paths) == 15
    for path in paths:
        patient = path.name.removesuffix("_relevance.nii.gz")
        image, scan = nib.load(path), nib.load(t1ce_of(home, patient))
        assert image.shape == scan.shape and np.allclose(image.affine, scan.affine) and 0 <= image.get_fdata().min() and 0.5 < image.get_fdata().max() <= 1
        grid = cache.grids[patient]
        marked = nib.affines.apply_affine(np.linalg.inv(grid.matrix) @ image.affine, np.argwhere(image.get_fdata() > 0))
        assert (marked > -0.51).all() and (marked < np.array(grid.shape) - 0.49).all(), "0 outside the crop"
    native, = (out/"maps_native").iterdir()
    on_scan, in_native = nib.load(out/"maps"/native.name), nib.load(native)
    middle = lambda image: nib.affines.apply_affine(image.affine, np.argwhere(image.get_fdata() > 0)*1.0).T @ image.get_fdata()[image.get_fdata() > 0]/image.get_fdata().sum()
    assert np.allclose(nib.affines.apply_affine(np.linalg.inv(TURN), middle(on_scan)), middle(in_native), atol=1.0)      # mm; voxels are 6 to 7.5 mm
    assert np.linalg.norm(middle(on_scan) - middle(in_native)) > 10, "the transform moves"


def test_each_patient_is_explained_by_the_nets_of_the_own_fold(home):
    run = read_run(home/"run")
    config = stored_config(run)
    cohort, caches, notices = crops_of_run(run, config, home/"cohort"/"phantom.toml", home/"cohort", home/"crops")
    assert any("1 of 16 samples have no crop" in n for n in notices)
    arm, cache = shown_arms(config)[0], caches["crop"]
    maps, folds = arm_maps(run, arm, cache, cohort.samples, QUICK), read_table(run.path("folds.csv"))
    tested = folds[folds.partition == "test"].set_index("patient_id").fold
    assert (maps.rows.fold == maps.rows.patient_id.map(tested).map("repeat-0_fold-{}".format)).all()
    part = maps.rows[maps.rows.fold == "repeat-0_fold-0"]
    for fold, same in (("repeat-0_fold-0", True), ("repeat-0_fold-1", False)):
        of = fold_nets(run, arm, fold, cache, cohort.samples)
        cells, _ = joined_cells(of.nets, *of.inputs(part), "relevance")
        assert np.allclose(cells, maps.cells["relevance"][part.index], atol=1e-4) == same


def test_the_same_twice_and_another_model(home, tmp_path):
    few = replace(QUICK, kinds=("relevance",), n_volumes=1)
    for name in ("a", "b"): explain(home, tmp_path/name, config=few, model="vit-no-registers")
    files = sorted(p.relative_to(tmp_path/"a") for p in (tmp_path/"a").rglob("*") if p.is_file())
    assert all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)
    assert set(read_table(tmp_path/"a"/"coverage.csv").model) == {"vit-no-registers"} and not (tmp_path/"a"/"registers.csv").exists()
    assert len(list((tmp_path/"a"/"maps").iterdir())) == 1


def test_what_does_not_fit_is_refused(home, tmp_path):
    out = tmp_path/"out"
    open_run(tmp_path/"clinical", {"study": {"name": "clinical"}})
    with pytest.raises(DataError, match="run of the study 'clinical'. Expected 'vit-cox'"): explain(home, out, tmp_path/"clinical")
    with pytest.raises(DataError, match="'deepsurv' is a deepsurv, which has no attention.*Expected one of vit, vit-no-registers"): explain(home, out, model="deepsurv")
    with pytest.raises(DataError, match="did you mean 'vit'"): explain(home, out, model="vti")
    with pytest.raises(DataError, match="not those of the run"): explain(home, out, settings={"cohort.name": "another"})
    with pytest.raises(DataError): explain(home, out, "cohort")
    shutil.copytree(home/"run", tmp_path/"stopped")
    (tmp_path/"stopped"/"members"/"repeat-0_fold-1"/"done.json").unlink()
    with pytest.raises(DataError, match="not finished"): explain(home, out, tmp_path/"stopped")
    with pytest.raises(DataError, match="relevance, then any"): VitExplainConfig(kinds=("rolout",))
    assert not out.exists()
