"""The clinical study on real, censored patients, through the command line."""
import numpy as np
import pandas as pd
import pytest

from brainmets.cli import main
from brainmets.tables import read_json, read_table


def run(root, real_data, tmp_path_factory, name):
    out = tmp_path_factory.mktemp(name)/"run"
    status = main(["run", "clinical", str(root/"data_manifests"/f"{name}.toml"), "--data", str(real_data/name), "--out", str(out), "--workers", "1"])
    assert status == 0
    return out


def pooled(out, model, metric="Harrell C"):
    table = read_table(out/"metrics.csv")
    rows = table[(table.model == model) & (table.metric == metric) & (table.scope == "pooled")]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture(scope="module")
def pdgm(root, real_data, tmp_path_factory): return run(root, real_data, tmp_path_factory, "ucsf_pdgm")


@pytest.fixture(scope="module")
def melanoma(root, real_data, tmp_path_factory): return run(root, real_data, tmp_path_factory, "radiomics_mm")


def test_pdgm_cox_reaches_its_known_c(pdgm):
    c = pooled(pdgm, "cox")
    assert 0.70 < c.estimate < 0.80
    assert c.low < c.estimate < c.high and c.high - c.low < 0.12
    assert (c.n_patients, c.n_samples, c.n_events) == (494, 494, 247)     # six exams are follow-ups of other patients: averaged


def test_pdgm_leaves_out_the_one_without_survival_and_says_why(pdgm):
    steps = read_json(pdgm/"summary.json")["flow"]
    assert [s["n_samples"] for s in steps] == [501, 500]
    assert steps[1]["left_out"] == ["UCSF-PDGM-0169"] and "no overall survival" in steps[1]["text"]


def test_pdgm_predicts_every_exam_once_out_of_fold(pdgm):
    predictions = read_table(pdgm/"predictions.csv")
    test = predictions[predictions.partition == "test"]
    assert set(test.groupby("model").sample_id.nunique()) == {500}
    assert not test.duplicated(["model", "sample_id"]).any()
    folds = read_table(pdgm/"folds.csv")
    sides = folds.groupby(["fold", "patient_id"]).partition.nunique()
    assert (sides == 1).all()
    follow_ups = test[test.sample_id.str.contains("_FU") & (test.model == "cox")]
    for row in follow_ups.itertuples():                                    # a follow-up is in the fold of its patient
        assert test[(test.patient_id == row.patient_id) & (test.model == "cox")].fold.nunique() == 1


def test_pdgm_reports_all_metrics_with_numbers(pdgm):
    table = read_table(pdgm/"metrics.csv")
    cox = table[(table.model == "cox") & table.scope.isin(["pooled", "within folds"])]
    for part in ("Harrell C", "Uno C", "AUC at 12 months", "Brier at 12 months", "integrated Brier"): assert cox.metric.str.contains(part).any(), part
    known = cox[cox.estimate.notna()]
    assert (known.n_patients > 0).all() and (known.n_events > 0).all()
    summary = read_json(pdgm/"summary.json")
    assert {m["model"] for m in summary["not_computable"]} >= {"volume", "rpa", "gpa-2008", "sir", "bsbm"}
    assert all("no column has the role" in m["reason"] for m in summary["not_computable"])


def test_pdgm_goes_on_without_fitting_again(pdgm, root, real_data):
    before = {p: p.stat().st_mtime_ns for p in pdgm.glob("members/*/*")}
    old = read_table(pdgm/"predictions.csv")
    assert main(["run", "clinical", str(root/"data_manifests"/"ucsf_pdgm.toml"), "--data", str(real_data/"ucsf_pdgm"), "--out", str(pdgm), "--workers", "1"]) == 0
    assert {p: p.stat().st_mtime_ns for p in pdgm.glob("members/*/*")} == before
    pd.testing.assert_frame_equal(read_table(pdgm/"predictions.csv"), old)


def test_melanoma_lesions_stay_with_their_patient(melanoma):
    summary, predictions = read_json(melanoma/"summary.json"), read_table(melanoma/"predictions.csv")
    assert summary["counts"]["n_patients"] == 18 and summary["counts"]["n_samples"] == 44
    assert any("16 and 16_2" in n for n in summary["notices"])
    test = predictions[(predictions.partition == "test") & (predictions.model == "cox")]
    assert len(test) == 44 and (test.groupby("patient_id").fold.nunique() == 1).all()


def test_melanoma_names_what_it_drops_and_adapts(melanoma):
    notices = " ".join(read_json(melanoma/"summary.json")["notices"])
    assert "constant" in notices and "bed_tumor" in notices
    assert "Only 4 patients have an event: 4 folds instead of 5" in notices


def test_melanoma_interval_is_as_wide_as_ten_events_deserve(melanoma):
    c = pooled(melanoma, "cox")
    assert (c.n_events, c.n_patients, c.n_samples) == (10, 18, 44)
    assert c.high - c.low > 0.2


@pytest.mark.parametrize("fixture", ["pdgm", "melanoma"])
def test_report_is_one_file_without_network(fixture, request):
    page = (request.getfixturevalue(fixture)/"report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.replace("https://doi.org", "")
    assert "<script" not in page and page.count("data:image/png;base64") >= 3
