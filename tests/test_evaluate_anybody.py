"""`brainmets evaluate` and `brainmets audit` on tables and folders that anybody may bring, through the command line."""
import json

import numpy as np
import pandas as pd
import pytest

from brainmets.cli import main
from brainmets.evaluate.metrics import evaluate_survival
from brainmets.evaluation import EvaluationConfig, evaluate
from brainmets.phantom import write_phantom

QUICK = ["--set", "n_resamples=50"]


def four_columns(n=90, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    died, lost = rng.exponential(500*np.exp(-x)), rng.uniform(100, 1500, n)
    return pd.DataFrame(dict(patient_id=[f"p{i:03d}" for i in range(n)], time_days=np.minimum(died, lost).round(1), event=(died <= lost).astype(int), risk=x.round(3)))


def written(tmp_path, table, name="theirs.csv"):
    table.to_csv(tmp_path/name, index=False)
    return str(tmp_path/name)


def test_four_columns_are_enough(tmp_path, capsys):
    assert main(["evaluate", written(tmp_path, four_columns()), "--out", str(tmp_path/"out"), *QUICK]) == 0
    assert "Harrell C" in capsys.readouterr().out
    metrics = pd.read_csv(tmp_path/"out"/"metrics.csv")
    row = metrics[metrics.metric == "Harrell C"].iloc[0]
    assert row.n_patients == 90 and row.low < row.estimate < row.high
    for name in ("evaluation.html", "evaluation.json", "audit.json", "audit.md"): assert (tmp_path/"out"/name).is_file(), name


def test_label_and_probability_are_enough(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.random(80) < 0.4
    table = pd.DataFrame(dict(patient_id=np.repeat(np.arange(40), 2), label=np.where(label, "necrosis", "tumor"), prob_necrosis=(0.3*label + 0.7*rng.random(80)).round(3)))
    assert main(["evaluate", written(tmp_path, table), "--out", str(tmp_path/"out"), "--unit", "sample", "--positive", "necrosis", *QUICK]) == 0
    metrics = pd.read_csv(tmp_path/"out"/"metrics.csv").set_index("metric")
    assert metrics.loc["AUC", "n_patients"] == 40 and metrics.loc["AUC", "n_samples"] == 80 and "AUC, clustered variance" in metrics.index


def test_predicted_days_are_enough(tmp_path):
    table = four_columns().assign(predicted_days=lambda t: 400 - 50*t.risk).drop(columns="risk")
    assert main(["evaluate", written(tmp_path, table), "--out", str(tmp_path/"out"), *QUICK]) == 0
    metrics = pd.read_csv(tmp_path/"out"/"metrics.csv")
    assert {"MAE", "MAE, IPCW", "R2", "Harrell C"} <= set(metrics.metric)
    assert any("censored" in note for note in json.loads((tmp_path/"out"/"evaluation.json").read_text())["notes"])


def test_subgroups_and_two_models(tmp_path):
    table = pd.concat([four_columns().assign(model="one"), four_columns().assign(model="two", risk=lambda t: -t.risk)])
    people = four_columns()[["patient_id"]].assign(sex=np.where(np.arange(90) % 2, "F", "M"))
    assert main(["evaluate", written(tmp_path, table), "--out", str(tmp_path/"out"), "--samples", written(tmp_path, people, "people.csv"), "--subgroups", "sex", *QUICK]) == 0
    assert set(pd.read_csv(tmp_path/"out"/"subgroups.csv").group) == {"all", "F", "M"}
    assert (pd.read_csv(tmp_path/"out"/"comparisons.csv").metric == "Harrell C").sum() == 1


WRONG = {"no event": (lambda t: t.drop(columns="event"), "who was censored is not known"), "text risk": (lambda t: t.assign(risk="high"), "is no number"),
         "months": (lambda t: t.rename(columns={"time_days": "time_months"}), "time_days"), "coding": (lambda t: t.assign(event="dead"), "neither yes nor no"),
         "no prediction": (lambda t: t.drop(columns="risk"), "no prediction"), "empty": (lambda t: t.head(0), "no rows"),
         "risk missing": (lambda t: t.assign(risk=[np.nan, *t.risk[1:]]), "risk is missing"), "negative time": (lambda t: t.assign(time_days=[-1, *t.time_days[1:]]), "p000"),
         "several outcomes": (lambda t: pd.concat([t, t.assign(time_days=t.time_days + 1)]), "unit='sample'")}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused_with_a_remedy_and_nothing_written(tmp_path, capsys, wrong):
    change, words = WRONG[wrong]
    assert main(["evaluate", written(tmp_path, change(four_columns())), "--out", str(tmp_path/"out"), *QUICK]) == 1
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert not (tmp_path/"out").exists()


def test_unknown_setting_and_missing_file(tmp_path, capsys):
    assert main(["evaluate", written(tmp_path, four_columns()), "--out", str(tmp_path/"out"), "--set", "n_resample=50"]) == 1
    assert "did you mean 'n_resamples'" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path/"nowhere.csv"), "--out", str(tmp_path/"out")]) == 1
    assert "No file" in capsys.readouterr().err


def test_printed_counts_of_rows_are_void(capsys):
    assert main(["audit", "--counts", "64231", "13765", "13764", "--per-patient", "620"]) == 1
    said = capsys.readouterr().out
    for words in ("VOID", "int(0.7 x 91,760)", "148 x 620", "63,860 / 13,640 / 14,260"): assert words in said, words
    assert main(["audit", "--counts", "63860", "13640", "14260", "--per-patient", "620"]) == 0
    assert main(["audit", "--counts", "1", "2"]) == 1 and "--per-patient" in capsys.readouterr().err


def test_overlap_in_anybodys_table_is_void_on_the_page(tmp_path, capsys):
    table = pd.concat([four_columns().assign(partition="train"), four_columns().head(40).assign(partition="test")])
    assert main(["evaluate", written(tmp_path, table), "--out", str(tmp_path/"out"), *QUICK]) == 1
    assert "VOID" in capsys.readouterr().out and 'class="notice void"' in (tmp_path/"out"/"evaluation.html").read_text()
    assert main(["audit", str(tmp_path/"theirs.csv"), "--out", str(tmp_path/"audit")]) == 1
    assert json.loads((tmp_path/"audit"/"audit.json").read_text())["is_void"]


def test_a_clean_run_passes_and_a_spoiled_one_is_void_in_its_report(tmp_path, capsys):
    manifest = write_phantom(tmp_path/"cohort", n_patients=40, images=False, workers=1, progress=False)
    run = tmp_path/"run"
    quick = [f"--set=study.{k}" for k in ("n_folds=2", "inner_folds=2", "n_trees=5", "n_resamples=50")]
    assert main(["run", "clinical", str(manifest), "--data", str(tmp_path/"cohort"), "--out", str(run), "--workers", "1", *quick]) == 0
    assert main(["audit", str(run)]) == 0
    folds = pd.read_csv(run/"folds.csv", dtype={"patient_id": str})
    one = folds[folds.partition == "test"].iloc[[0]].assign(partition="train")
    pd.concat([folds, one]).to_csv(run/"folds.csv", index=False)
    capsys.readouterr()
    assert main(["audit", str(run), "--out", str(run)]) == 1
    assert one.patient_id.iloc[0] in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(run/"report.html")]) == 1
    page = (run/"report.html").read_text()
    assert page.index('class="notice void"') < page.index("<section") and "VOID." in page


def flat(n=30, **columns):
    return pd.DataFrame(dict(model="m", patient_id=[f"p{i}" for i in range(n)], partition="test", time_days=np.arange(1.0, n + 1), event=np.arange(n) % 2 == 0,
                             risk=np.linspace(1, 0, n), survival_10=0.9, survival_20=0.5)).assign(**columns)


DEGENERATE = {"no event": flat(event=False), "all events": flat(event=True), "one patient": flat(1), "equal risks": flat(risk=0.5), "one time": flat(time_days=5.0), "at day 0": flat(time_days=0.0),
              "two patients": flat(2)}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_cohorts_give_reasons_and_no_exception(name, train):
    table = DEGENERATE[name]
    if train: table = pd.concat([table, table.assign(partition="train", patient_id="t" + table.patient_id)])
    found = evaluate(table, EvaluationConfig(n_resamples=20, horizons_months=(0.5,), horizon_months=0.5))
    lost = found.metrics[found.metrics.estimate.isna()]
    assert len(found.metrics) > 5 and lost.note.str.startswith("not computable").all()


def test_times_beyond_training_follow_up_are_named():
    table = pd.concat([flat(60), flat(60, partition="train", patient_id=[f"t{i}" for i in range(60)], time_days=np.arange(60)/10 + 1)])
    metrics = evaluate_survival(table, (30.0,), n_resamples=20)
    row = metrics[metrics.metric == "AUC at 30 days"].iloc[0]
    assert np.isnan(row.estimate) and "beyond the follow-up of the training rows" in row.note


def test_one_class_gives_reasons():
    table = pd.DataFrame(dict(patient_id=np.arange(20).astype(str), label="a", prob_a=np.linspace(0.1, 0.9, 20), prob_b=np.linspace(0.9, 0.1, 20)))
    metrics = evaluate(table, EvaluationConfig(n_resamples=20, positive="a")).metrics
    assert metrics.set_index("metric").loc["AUC", "note"].startswith("not computable")
