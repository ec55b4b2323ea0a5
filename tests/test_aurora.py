"""A cohort in AURORA layout, made by the phantom, through the shipped manifest: check, crops from either set of masks, system C."""
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from brainmets.checks import check
from brainmets.cohort import fatal, load_cohort
from brainmets.manifest import load_manifest, setting_value
from brainmets.phantom import oracle_scores
from brainmets.phantom_aurora import AURORA_SETTINGS, write_aurora_phantom
from brainmets.samples.boxes import cut
from brainmets.samples.crops import CropConfig, crops_of_cohort
from brainmets.studies.vit_cox import run_vit_cox
from brainmets.studies.vit_results import vit_sections
from brainmets.studies.vit_settings import crop_configs, vit_study_config
from brainmets.tables import read_json, read_table
from brainmets.volumes import read_header, read_voxels

MANIFEST = Path(__file__).resolve().parent.parent/"data_manifests"/"aurora.toml"
TINY = dict(protocol="centers", test_centers="B", n_members=2, epochs=1, batch_size=3, n_events="1+2", accumulate=2, n_resamples=20, hidden=8, mlp=8, layers=1, augment="none")
CROPS = crop_configs(vit_study_config("quick", **TINY))["crop"]
N_PATIENTS, SEED = 24, 4


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aurora")
    write_aurora_phantom(folder/"cohort", N_PATIENTS, seed=SEED, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def cohort(home): return load_cohort(MANIFEST, home/"cohort", AURORA_SETTINGS)


@pytest.fixture
def net_crops(cohort, home):
    def cut(cohort=cohort, **changes): return crops_of_cohort(cohort, home/"crops", CropConfig(**{**vars(CROPS), **changes}), progress=False)
    return cut


def mask_of(cohort, sample_id, sequence):
    rows = cohort.images[(cohort.images.sample_id == sample_id) & (cohort.images.sequence == sequence)]
    return read_voxels(cohort.data_dir/rows.path.iloc[0])


def affine_of(cohort, sample_id): return read_header(cohort.data_dir/cohort.images[cohort.images.sample_id == sample_id].path.iloc[0]).affine


def test_check_finds_nothing_fatal(home):
    "With what the manifest asks for answered; without, it asks for the unit and nothing else is wrong."
    checked = check(MANIFEST, home/"cohort", AURORA_SETTINGS)
    assert not fatal(checked.problems) and {p.code for p in checked.problems} <= {"identical-sequence"}
    assert checked.images.sequence.value_counts().to_dict() == dict.fromkeys(("t1ce", "flair", "mask", "mask_auto"), N_PATIENTS)
    assert set(checked.samples.center) == {"A", "B"} and {c.group for c in checked.columns} == {"clinical"}
    asked = check(MANIFEST, home/"cohort", voxels=False)
    assert [p.code for p in fatal(asked.problems)] == ["ask"] and "outcome.unit" in str(fatal(asked.problems)[0])


def test_settings_of_the_command_line_say_the_same(home, cohort):
    "The settings as a user types them, the second set of masks as the note of the manifest gives it."
    note = next(n for n in cohort.manifest.cohort.notes if "other_masks" in n)
    key, _, value = note.partition("--set '")[2].partition("'.")[0].partition("=")
    typed = {key: setting_value(value), "outcome.unit": setting_value("months"), "cohort.synthetic": setting_value("true")}
    assert load_manifest(MANIFEST, typed) == cohort.manifest
    dotted = {**typed, "images.other_masks.auto": typed.pop(key)["auto"]}
    dotted.pop(key, None)
    assert load_manifest(MANIFEST, dotted) == cohort.manifest


def test_outcome_is_local_failure_and_images_know_of_it(home, cohort):
    truth = read_table(home/"cohort"/"truth.csv").set_index("patient_id").loc[cohort.samples.patient_id]
    samples, failed = cohort.samples, cohort.samples.event.to_numpy(bool)
    assert np.allclose(samples.time_days[failed], np.ceil(truth.local_failure_time_days.to_numpy()[failed]), atol=0.01)
    assert (truth.local_failure_time_days.to_numpy()[~failed] > samples.time_days[~failed] - 1).all()
    assert truth.risk_local.corr(truth.patchiness) > 0.3 and "patchiness" not in samples
    assert oracle_scores(home/"cohort")["c_local_failure"] > 0.6


def test_two_sets_of_masks_differ_and_agree(cohort):
    found = []
    for sample_id in cohort.samples.sample_id:
        expert, automatic = (mask_of(cohort, sample_id, s) for s in ("mask", "mask_auto"))
        assert set(np.unique(automatic)) <= {0, 1, 2} and (automatic == 2).any()
        found.append(2*((expert > 0) & (automatic > 0)).sum()/((expert > 0).sum() + (automatic > 0).sum()))
    assert 0.85 < np.mean(found) < 0.97 and np.min(found) >= 0.7 and np.mean(np.array(found) < 1) > 0.7


def test_crops_follow_the_mask_that_is_asked_for(cohort, net_crops):
    "Place and mask channel are those of the asked mask; where both masks are the same, so are the crops."
    expert, automatic = net_crops(), net_crops(mask_from="mask_auto")
    assert expert.samples.sample_id.tolist() == automatic.samples.sample_id.tolist() and expert.identity != automatic.identity
    differ = 0
    for k, sample_id in enumerate(expert.samples.sample_id):
        same = np.array_equal(mask_of(cohort, sample_id, "mask"), mask_of(cohort, sample_id, "mask_auto"))
        a, b = (cache.read(cache.samples.iloc[[k]])[0] for cache in (expert, automatic))
        differ += not np.array_equal(a, b)
        assert not same or np.array_equal(a, b), sample_id
        graded = np.array([0, 0.5, 1], np.float32)[mask_of(cohort, sample_id, "mask_auto")]
        assert np.array_equal(b[2], cut(graded, affine_of(cohort, sample_id), automatic.grids[sample_id], 0)[0].astype(np.float16)), sample_id
        if expert.grids[sample_id] == automatic.grids[sample_id]: assert np.array_equal(a[:2], b[:2])
    assert differ > N_PATIENTS/2
    assert net_crops().written == () and "mask_from" not in (expert.home/"cache.json").read_text()


def test_a_patient_without_the_other_mask_is_named(home, cohort, net_crops):
    patient = cohort.samples.patient_id[3]
    path = home/"cohort"/cohort.images[(cohort.images.patient_id == patient) & (cohort.images.sequence == "mask_auto")].path.iloc[0]
    content = path.read_bytes()
    path.unlink()
    try:
        lacking = load_cohort(MANIFEST, home/"cohort", AURORA_SETTINGS)
        assert [(p.severity, p.what) for p in lacking.problems] == [("note", f"1 of {N_PATIENTS} samples have no mask_auto: {patient}")]
        assert lacking.fingerprint == cohort.fingerprint
        with pytest.warns(UserWarning, match=f"1 of {N_PATIENTS} scans could not be cut: {patient}"): automatic = net_crops(lacking, mask_from="mask_auto")
        assert automatic.failures.scan_id.tolist() == [patient] and "no file of sequence mask_auto" in automatic.failures.what[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(net_crops(lacking).samples) == N_PATIENTS        # the expert's masks are all there
    finally: path.write_bytes(content)


def test_system_c_runs_from_the_manifest_and_settings_alone(home, cohort):
    run = run_vit_cox(MANIFEST, home/"cohort", home/"run", vit_study_config("quick", **TINY, other_mask="mask_auto"), settings=AURORA_SETTINGS, cache_dir=home/"crops")
    table = read_table(run.path("predictions.csv"))
    mine = table[(table.model == "vit") & (table.partition == "test")]
    assert set(mine.patient_id) == set(cohort.samples.patient_id[cohort.samples.center == "B"])
    assert {"vit", "vit-mask_auto", "cox-clinical", "volume"} <= set(table.model)
    asked, agreement = read_table(run.path("by_masks.csv")), read_table(run.path("masks.csv"))
    assert "vit" in set(asked.model) and np.allclose(asked.other_estimate - asked.own_estimate, asked.difference_estimate, equal_nan=True)   # 24 patients: the test center may lack events
    risk = table[table.partition == "test"].pivot(index="sample_id", columns="model", values="risk")
    assert (risk["vit"] != risk["vit-mask_auto"]).mean() > 0.5, "the nets were given the other masks"
    assert len(agreement) == N_PATIENTS and 0.7 < agreement.dice_core.mean() < 1 and agreement.dice_edema.mean() < 1
    assert "Other masks" in [section.title for section in vit_sections(run.folder)] and read_json(run.path("summary.json"))["oracle"]["c_true"] > 0.5
    assert np.isfinite(table.risk).all() and pd.api.types.is_numeric_dtype(table.risk)
