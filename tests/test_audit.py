"""Faults planted one at a time into a sound study, each with the code and grade that the audit must give; and a real run without any."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from brainmets.audit import Evidence, audit_counts, audit_predictions, audit_run, audit_tables, read_audit, write_audit
from brainmets.cohort import load_cohort
from brainmets.phantom import write_phantom
from brainmets.splits import hold_out, k_fold, slice_split
from brainmets.studies.clinical import clinical_config, run_clinical
from brainmets.tables import write_table
from brainmets.train.crossval import patients_fingerprint

N, LESIONS = 120, 2
STEPS = dict.fromkeys(("imputation", "scaling", "encoding", "feature_selection", "threshold"), "train") | {
    "harmonisation": "none", "hyperparameters": "inner", "epoch": "valid", "best_model": "none", "explained_model": "fixed"}


def make_samples():
    "Two lesions of each patient, with session, inputs, and a censored time."
    rng = np.random.default_rng(0)
    patients = pd.DataFrame({"patient_id": [f"p{i:03d}" for i in range(N)], "time_days": rng.exponential(400, N).round() + 1, "event": rng.random(N) < 0.6,
                             "age": rng.normal(60, 10, N), "sex": rng.choice(["female", "male"], N), "session": [f"visit-{i:03d}" for i in range(N)], "scan_year": 2010})
    samples = patients.loc[patients.index.repeat(LESIONS)].reset_index(drop=True)
    return samples.assign(lesion_id=[f"l{i:03d}" for i in range(N*LESIONS)], sample_id=[f"l{i:03d}" for i in range(N*LESIONS)], volume_ml=rng.gamma(2, 3, N*LESIONS))


def make_predictions(samples, folds, member=lambda fold: f"fold-{fold}"):
    "A row for each sample in each fold; the risk is noise."
    rows = folds.merge(samples[["patient_id", "sample_id", "time_days", "event"]], on="patient_id")
    return rows.assign(model="net", member=rows.fold.map(member), seed=0, risk=np.random.default_rng(1).normal(size=len(rows))).drop(columns="inner_fold")


@pytest.fixture(scope="module")
def sound():
    "Evidence of a study without fault that answers every question."
    samples = make_samples()
    folds = k_fold(samples, 3, seed=0, valid_share=0.2)
    fitted = [{"member": f"fold-{k}", "repeat": 0, "fold": k, "fitted_on": {"n_patients": int((rows.partition == "train").sum()), "patients_sha256": patients_fingerprint(rows.patient_id[rows.partition == "train"])}}
              for k, rows in folds.groupby("fold")]
    hashes = pd.DataFrame({"patient_id": samples.patient_id, "fingerprint": [f"{i:04x}" for i in range(len(samples))]})
    return Evidence(predictions=make_predictions(samples, folds), folds=folds, samples=samples.drop(columns=["age", "sex", "volume_ml"]),
                    features=samples[["patient_id", "sample_id", "age", "sex", "volume_ml"]], hashes=hashes, pretraining=pd.DataFrame({"patient_id": ["elsewhere-1"], "fingerprint": ["ffff"]}),
                    config={"study": {"early_stopping": {"monitor": "valid_loss"}}},
                    provenance={"fitted_on": fitted, "steps": STEPS, "models": [{"model": "net", "n_columns": 3}], "inputs": ["tables", "images"], "censoring": "cox",
                                "answers": {"test-population": "consecutive patients of one center"}})


def grades(evidence, code):
    return [f.grade for f in audit_tables(evidence, only=[code]).findings]


def test_the_sound_study_is_found_sound(sound):
    audit = audit_tables(sound)
    assert set(audit.table().grade) <= {"note", "ok"}, audit.text()
    assert set(audit.checks.state[audit.checks.code != "test-population"]) <= {"run", "not applicable"}


def test_patient_overlap(sound):
    folds = sound.folds.copy()
    one = folds[(folds.fold == 0) & (folds.partition == "test")].head(1)
    folds = pd.concat([folds, one.assign(partition="train")])
    audit = audit_tables(replace(sound, folds=folds), only=["patient-overlap"])
    assert audit.is_void and one.patient_id.iloc[0] in audit.findings[0].what


def test_overlap_of_training_and_validation_is_a_warning(sound):
    valid = sound.folds[sound.folds.partition == "valid"].head(1)
    assert grades(replace(sound, folds=pd.concat([sound.folds, valid.assign(partition="train")])), "patient-overlap") == ["warning"]


def on_both_sides(sound):
    "A training and a test patient of the first fold."
    first = sound.folds[sound.folds.fold == 0]
    return [first.patient_id[first.partition == side].iloc[0] for side in ("train", "test")]


@pytest.mark.parametrize("column, code", [("lesion_id", "lesion-overlap"), ("session", "session-overlap"), ("sample_id", "sample-overlap")])
def test_one_thing_under_two_patients(sound, column, code):
    first, second = on_both_sides(sound)
    samples = sound.samples.copy()
    samples.loc[samples.patient_id == second, column] = samples.loc[samples.patient_id == first, column].to_numpy()
    assert grades(replace(sound, samples=samples), "patient-overlap") == ["ok"]
    assert grades(replace(sound, samples=samples), code) == ["void"]


def test_same_voxels_under_two_patients(sound):
    first, second = on_both_sides(sound)
    hashes = sound.hashes.copy()
    hashes.loc[hashes.patient_id == second, "fingerprint"] = hashes.loc[hashes.patient_id == first, "fingerprint"].to_numpy()
    assert grades(replace(sound, hashes=hashes), "identical-images") == ["void"]


def test_one_patient_entered_twice(sound):
    first, second = on_both_sides(sound)
    copied, samples, features = ["age", "sex", "volume_ml"], sound.samples.copy(), sound.features.copy()
    for table, names in ((samples, ["time_days", "event"]), (features, copied)):
        table.loc[table.patient_id == second, names] = table.loc[table.patient_id == first, names].to_numpy()
    samples["event"] = samples.event.astype(bool)
    features[["age", "volume_ml"]] = features[["age", "volume_ml"]].astype(float)
    assert grades(replace(sound, samples=samples, features=features), "duplicate-inputs") == ["void"]


def test_member_fitted_on_a_patient_it_scores(sound):
    everyone = make_predictions(sound.samples, sound.folds)
    ensemble = everyone.assign(member=np.where(everyone.partition == "test", "fold-0+fold-1+fold-2", everyone.member))
    assert grades(replace(sound, predictions=ensemble), "member-fitted-on-scored") == ["void"]


def test_fitted_on_everybody(sound):
    ids = sound.samples.patient_id.unique()
    entry = {"member": "fold-0", "repeat": 0, "fold": 0, "fitted_on": {"n_patients": len(ids), "patients_sha256": patients_fingerprint(ids)}}
    told = {**sound.provenance, "fitted_on": [entry, *sound.provenance["fitted_on"][1:]]}
    assert grades(replace(sound, provenance=told), "fitted-on-scored") == ["void"]
    named = {**sound.provenance, "fitted_on": [{"member": "encoder", "fitted_on": {"patients": list(ids[:2])}}]}
    assert grades(replace(sound, provenance=named), "fitted-on-scored") == ["void"]


@pytest.mark.parametrize("corpus", [{"patient_id": ["p007", "x"]}, {"patient_id": ["x", "y"], "fingerprint": ["0003", "eeee"]}])
def test_pretraining_corpus_holds_a_scored_patient(sound, corpus):
    assert grades(replace(sound, pretraining=pd.DataFrame(corpus)), "pretraining-overlap") == ["void"]


def test_counts_that_are_no_patients():
    audit = audit_counts([64231, 13765, 13764], 620)
    assert [f.grade for f in audit.findings] == ["void"]
    for piece in ("148 x 620", "int(0.7 x 91,760)", "155", "103/22/23", "63,860 / 13,640 / 14,260"): assert piece in audit.findings[0].what
    assert not audit_counts([63860, 13640, 14260], 620).is_void


def test_identical_target_variance_in_all_parts():
    rng = np.random.default_rng(0)
    same = pd.DataFrame({"mse": 66*rng.uniform(0.98, 1.02, 6), "r2": 0.9, "n_patients": 22})
    assert grades(Evidence(reported=same), "target-variance") == ["void"]
    apart = pd.DataFrame({"mse": 0.1*rng.exponential(26, (6, 22)).var(1), "r2": 0.9, "n_patients": 22})
    assert grades(Evidence(reported=apart), "target-variance") == ["ok"]


def sliced(sound, n_slices=8):
    "The patients with several slices each."
    one = sound.features.drop_duplicates("patient_id").merge(sound.samples[["patient_id", "time_days", "event"]].drop_duplicates("patient_id"))
    slices = one.loc[one.index.repeat(n_slices)].reset_index(drop=True)
    return slices.assign(sample_id=[f"s{i}" for i in range(len(slices))])


def test_permuted_outcomes_are_recognised_under_a_slice_split(sound):
    slices = sliced(sound)
    assert grades(Evidence(folds=slice_split(slices), samples=slices), "permutation-probe") == ["void"]
    for seed in range(5): assert grades(Evidence(folds=hold_out(slices, seed=seed), samples=slices), "permutation-probe") == ["ok"]


@pytest.mark.parametrize("name, made", [("weeks", lambda s: s.time_days/7), ("status_code", lambda s: np.where(s.event, "A", "B")), ("autopsy", lambda s: np.where(s.event, 1.0, np.nan))])
def test_input_made_from_the_outcome(sound, name, made):
    features = sound.features.assign(**{name: made(sound.samples)})
    audit = audit_tables(replace(sound, features=features), only=["outcome-derived"])
    assert audit.is_void and name in audit.findings[0].what


def test_inputs_that_are_late_or_name_the_patient(sound):
    dates = pd.Series(pd.date_range("2015-01-01", periods=len(sound.features))).astype(str).to_numpy()
    features = sound.features.assign(imaging_date=dates, hospital_number="h" + sound.features.patient_id, progression=sound.features.age > 60)
    assert grades(replace(sound, features=features), "late-columns") == ["warning", "question"]
    assert grades(replace(sound, features=features), "identifying") == ["warning"]


def test_cohort_chosen_by_outcome(sound):
    patients = sound.samples.drop_duplicates("patient_id")
    chosen = pd.concat([rows.head(40) for _, rows in patients.groupby("event")]).patient_id
    balanced = sound.samples[sound.samples.patient_id.isin(chosen)]
    assert grades(replace(sound, samples=balanced, cohort={"n_source": N}), "outcome-selected") == ["warning"]
    assert grades(replace(sound, samples=balanced), "outcome-selected") == ["question"]
    assert grades(replace(sound, flow=({"text": "Left out: died within 90 days", "n_left_out": 9},)), "outcome-selected") == ["warning"]


def test_censoring_ignored(sound):
    told = {**sound.provenance, "censoring": "none"}
    days = sound.predictions.assign(predicted_days=300.0).drop(columns="risk")
    assert grades(replace(sound, predictions=days, provenance=told), "censoring-ignored") == ["warning"]
    all_dead = replace(sound, predictions=sound.predictions.assign(event=True), samples=sound.samples.assign(death=sound.samples.event.astype(int), event=True))
    assert grades(all_dead, "censoring-ignored") == ["void"]


def test_too_few_events(sound):
    told = {**sound.provenance, "models": [{"model": "net", "n_columns": 50}]}
    assert "warning" in grades(replace(sound, provenance=told), "few-events")


@pytest.mark.parametrize("step, place, code", [("threshold", "test", "chosen-on-scored"), ("epoch", "test", "chosen-on-scored"), ("explained_model", "external", "chosen-on-scored"),
                                               ("feature_selection", "all", "selection-on-scored"), ("imputation", "all", "preparation-on-scored")])
def test_step_done_on_scored_patients(sound, step, place, code):
    assert grades(replace(sound, provenance={**sound.provenance, "steps": {**STEPS, step: place}}), code) == ["void"]


def test_setting_that_chooses_by_the_test_set(sound):
    assert grades(replace(sound, config={"study": {"early_stopping": {"monitor": "test_c_index"}}}), "chosen-by-setting") == ["void"]


def test_no_test_set(sound):
    only_valid = replace(sound, folds=None, predictions=sound.predictions[sound.predictions.partition != "test"])
    assert grades(only_valid, "no-test-set") == ["void"]


def test_training_after_test(sound):
    rows = sound.folds[sound.folds.fold == 0]
    year = dict(zip(rows.patient_id, np.where(rows.partition == "test", 2012, 2015)))
    later = replace(sound, folds=rows, predictions=None, samples=sound.samples.assign(scan_year=sound.samples.patient_id.map(year)))
    assert grades(later, "time-order") == ["question"]
    assert grades(replace(later, provenance={**sound.provenance, "split_claim": "temporal"}), "time-order") == ["void"]


def test_every_check_without_evidence_is_a_question():
    audit = audit_tables(Evidence())
    assert audit.counts["question"] == len(audit.checks) and not audit.is_void


def test_clinical_run_is_clean(tmp_path):
    manifest = write_phantom(tmp_path/"cohort", 60, images=False, workers=1, progress=False)
    run = run_clinical(manifest, tmp_path/"cohort", tmp_path/"run", clinical_config(n_folds=3, inner_folds=3, n_trees=20, n_resamples=20))
    audit = audit_run(run.folder, samples=load_cohort(manifest, tmp_path/"cohort").samples)
    assert not audit.is_void, audit.text()
    assert set(audit.table(["warning"]).kind) <= {"validity"}, audit.text()
    assert audit.table(["warning"]).code.tolist() == ["few-events"], "sixty patients, seventeen inputs"
    write_audit(audit, run.folder)
    assert read_audit(run.folder).table().equals(audit.table())
    theirs = audit_predictions(run.path("predictions.csv"))
    assert not theirs.is_void and not len(theirs.table(["warning"])), theirs.text()


def test_predictions_of_others(tmp_path):
    write_table(tmp_path/"theirs.csv", pd.DataFrame({"patient_id": ["a", "a", "b"], "partition": ["train", "test", "test"], "label": [0, 0, 1], "prob_1": [0.1, 0.2, 0.9]}))
    audit = audit_predictions(tmp_path/"theirs.csv")
    assert audit.table(["void"]).code.tolist() == ["patient-overlap"]
