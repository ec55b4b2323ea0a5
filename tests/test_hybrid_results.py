"""The results section of the hybrid study against plain loops and scipy, on run folders with made-up tables, whole and damaged."""
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel, wilcoxon

from brainmets.evaluate.regression import evaluate_regression
from brainmets.pages import figure_blocks, render_page
from brainmets.records import write_toml
from brainmets.studies.hybrid_results import (PATIENTS, PRINTED_NETS, SLICES, backbone_comparison, bias_table, cost_summary, error_blocks, fold_summary, fold_table, histories, hybrid_run, hybrid_sections,
                                              interval_table, known_patients, plot_fold_losses, plot_fold_scores, split_sentence, split_table, unit_table)
from brainmets.tables import DataError, write_table

BACKBONES = ("resnet50", "efficientnet_b0")
NETS = tuple(f"hybrid-{b}" for b in BACKBONES)


def days(models, n=20, n_slices=5, seed=0):
    "Held-out slices and patients of made-up models."
    rng = np.random.default_rng(seed)
    time, event = rng.exponential(300, n).round() + 5, np.arange(n) % 3 > 0
    own = rng.normal(0, 80, (len(models), n, 1)) + rng.normal(0, 20, (len(models), n, n_slices)) + 250
    slices = pd.DataFrame([dict(model=m, patient_id=f"Q-{p:02d}", sample_id=f"Q-{p:02d}/{i}", partition="test", repeat=0, fold=p % 2, time_days=time[p], event=event[p], predicted_days=own[j, p, i], risk=-own[j, p, i])
                           for j, m in enumerate(models) for p in range(n) for i in range(n_slices)])
    patients = slices.groupby(["model", "patient_id"], sort=False).agg({**{c: "first" for c in ("partition", "repeat", "fold", "time_days", "event")}, "predicted_days": "mean", "risk": "mean"}).reset_index()
    other = patients.assign(patient_id="R" + patients["patient_id"], partition="train")
    folds = pd.concat([patients, *(other.assign(fold=f) for f in (0, 1))], ignore_index=True)
    return slices, folds.assign(sample_id=folds["patient_id"])


def made(folder, tables=None, curves=(), **study):
    "A run folder; tables: name -> table."
    write_toml(folder/"config.toml", {"study": {"name": "hybrid", "split": "patient", "backbones": list(BACKBONES), "ablations": ["image"], "loss": "mse", "level": 0.9, "n_members": 5, **study}})
    for name, table in (tables or {}).items(): write_table(folder/f"{name}.csv", pd.DataFrame(table))
    for place in curves: write_table(folder/"members"/place/"history.csv", pd.DataFrame(dict(epoch=[1, 2, 3], train_loss=[3., 2, 1], valid_loss=[3., 1, 2], lr=.1)))
    return folder


def validation(models=NETS, n_folds=5, n_nets=5, seed=1):
    rng = np.random.default_rng(seed)
    rows = [dict(model=m, net=k, member=f"repeat-0_fold-{f}", train_loss=rng.random(), valid_loss=rng.random(), R2=rng.uniform(-1, 1), MAE=rng.uniform(50, 90), MSE=rng.uniform(4000, 9000), RMSE=80., best_epoch=2,
                 epochs=3, n_patients=9, n_slices=100) for f in range(n_folds) for m in models for k in range(n_nets)]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def intervals():
    return pd.DataFrame([dict(model=NETS[0], kind=k, promised=.9, metric=m, estimate=.8, low=.7, high=np.nan if m.startswith("width") else .9, n_patients=20, n_events=13)
                         for k in ("patient", "ensemble", "dropout") for m in ("coverage, events only", "coverage, lower bound", "coverage, upper bound", "width of predicted intervals")])


@pytest.fixture(scope="module")
def tables():
    "All tables of a whole run."
    slices, patients = days(NETS)
    return dict(predictions=patients, slices=slices, metrics=evaluate_regression(patients, n_resamples=20), slice_metrics=evaluate_regression(slices, unit="sample", censoring="evaluated", n_resamples=20),
                validation=validation(), intervals=intervals(), latency=dict(model=list(NETS)*3, scan_id=list("aabbcc"), n_slices=10, seconds=[.1, .2, .3, .2, .2, .2], device="cpu"),
                nets=dict(model=NETS, parameters=[1_500_000, 900], multiply_adds_128=2e9, multiply_adds_224=6e9))


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole")/"whole", tables, [f"repeat-0_fold-{f}/{m}/inner-{k}" for f in range(5) for m in NETS for k in range(5)])


def test_fold_table_is_ordered_and_its_summary_that_of_plain_statistics(whole):
    table = fold_table(whole)
    assert len(table) == 50 and table["model"].tolist() == [NETS[0]]*25 + [NETS[1]]*25
    assert table["net"].tolist() == list(range(5))*10 and table["fold"].tolist() == [str(f) for f in range(5) for _ in range(5)]*2
    mine = table[table["model"] == NETS[1]]
    summary = fold_summary(table).set_index("model")
    assert summary.loc[NETS[1], "MAE"] == f"{statistics.mean(mine['MAE']):.1f} ({statistics.stdev(mine['MAE']):.1f})"
    assert table["time_sd_days"].tolist() == pytest.approx([(mse/(1 - r2))**.5 for mse, r2 in zip(table["MSE"], table["R2"])])
    assert fold_summary(table, with_printed=False)["model"].tolist() == list(NETS)
    assert PRINTED_NETS["RMSE"].tolist() == pytest.approx(PRINTED_NETS["MSE"]**.5, abs=.01)       # the printed table agrees with itself


def test_ten_folds_stand_in_the_order_of_numbers(tmp_path):
    run = made(tmp_path/"r", dict(predictions=dict(model=["a"]), validation=validation(NETS[:1], 11, 1)), [f"repeat-0_fold-{f}/{NETS[0]}/inner-{k}" for f in range(11) for k in (0, 10, 9)])
    assert fold_table(run)["fold"].tolist() == [str(f) for f in range(11)]
    assert list(histories(run, NETS[0]))[:4] == ["fold 0, net 0", "fold 0, net 9", "fold 0, net 10", "fold 1, net 0"]
    assert len([ax for ax in plot_fold_losses(run, NETS[0]).axes if ax.get_visible()]) == 25        # of 33
    assert [t.get_text() for t in plot_fold_scores(run, NETS[0]).axes[0].get_xticklabels()] == [str(f) for f in range(11)]


def test_figures_show_what_the_tables_hold(whole):
    axes = plot_fold_losses(whole, NETS[1]).axes
    assert len(axes) == 25 and all(ax.lines[2].get_xdata().tolist() == [2] for ax in axes) and [ax.get_title(loc="left") for ax in axes][6] == "fold 1, net 1"
    table = fold_table(whole)
    ax = plot_fold_scores(whole, NETS[1]).axes[0]
    assert [b.get_height() for b in ax.patches] == table.loc[table["model"] == NETS[1], "R2"].tolist()
    with pytest.raises(DataError, match="no history.csv"): plot_fold_losses(whole, "cox")
    with pytest.raises(DataError, match="no R2"): plot_fold_scores(whole, "cox")


def test_backbones_agree_with_scipy(whole, tables):
    found = backbone_comparison(whole).set_index(["times", "unit"])
    for reading, chosen in zip(("all", "events only"), (tables["slices"], tables["slices"][tables["slices"]["event"]])):
        error = (chosen["predicted_days"] - chosen["time_days"]).abs()
        a, b = (error[chosen["model"] == m].to_numpy() for m in NETS)
        by_slice = found.loc[(reading, "slices, as if independent")]
        assert by_slice["t"] == pytest.approx(ttest_rel(a, b).statistic) and by_slice["p_wilcoxon"] == pytest.approx(wilcoxon(a, b).pvalue) and by_slice["n"] == len(a)
        means = [error[chosen["model"] == m].groupby(chosen["patient_id"]).mean().to_numpy() for m in NETS]
        assert found.loc[(reading, "patients, mean of their slices"), "p_t"] == pytest.approx(ttest_rel(*means).pvalue)
        patients = tables["predictions"].query("partition == 'test'")
        patients = patients[patients["event"]] if reading == "events only" else patients
        one = [(part["predicted_days"] - part["time_days"]).abs().to_numpy() for m in NETS for part in [patients[patients["model"] == m].sort_values("patient_id")]]
        assert found.loc[(reading, "patients, their one prediction"), "t"] == pytest.approx(ttest_rel(*one).statistic)
        assert by_slice["effective_n"] < by_slice["n"]


def test_tables_hold_the_numbers_of_the_files(whole, tables):
    units = unit_table(whole)
    row = tables["metrics"].query("model == @NETS[0] and metric == 'MAE, events only' and scope == 'pooled'").iloc[0]
    mine = units[(units["model"] == NETS[0]) & (units["score"] == "MAE") & (units["censored times"] == "left out")].iloc[0]
    assert mine["by patient"] == f"{row.estimate:.0f} ({row.low:.0f} to {row.high:.0f})" and (mine["patients"], mine["slices"]) == (row.n_events, 5*row.n_events)
    errors = tables["slices"].query("model == @NETS[1]").eval("predicted_days - time_days")
    assert bias_table(whole)["over slices, as if independent"][1].startswith(f"{errors.mean():.1f} (")
    assert interval_table(whole)["interval"].tolist() == ["for a patient", "nets alone", "dropout alone"]
    cost = cost_summary(whole).set_index("model")
    assert cost.loc[NETS[0], "ms a scan"] == "200 (100 to 300)" and cost.loc[NETS[1], "parameters"] == "900" and cost.loc[NETS[0], "multiply-adds at 224"] == "6.0 G"
    assert [m for m in cost.index if m.startswith("printed")] == list(cost.index[2:])


def test_a_page_of_a_whole_run_names_no_patient_and_no_figure_twice(whole):
    sections = hybrid_sections(whole)
    names = [b.name for b in figure_blocks(block for s in sections for block in s.blocks)]
    assert len(names) == len(set(names)) == 4 + 4 + 1
    page = render_page("whole", "", sections)
    assert not re.search(r"Q-\d\d", page) and str(whole) not in page and "is not an interval for a patient" in page
    assert [s.title for s in sections] == ["Training of the nets", "Errors of predicted days by patient", "By patient and by slice", "Backbones", "Intervals for a patient", "Latency and size"]


@pytest.mark.parametrize("missing", ["slices", "metrics", "slice_metrics", "validation", "intervals", "latency", "nets", "all but predictions"])
def test_a_run_without_a_file_still_has_a_page(missing, tables, tmp_path):
    kept = {n: t for n, t in tables.items() if n == "predictions" or missing not in (n, "all but predictions")}
    page = render_page("less", "", hybrid_sections(made(tmp_path/"less", kept), with_errors=missing == "metrics"))
    said = {"validation": "no validation.csv", "intervals": "no intervals in days", "all but predictions": "neither latency.csv nor nets.csv"}
    assert said.get(missing, "<table>") in page and ("Backbones</h2>" in page)


def test_a_risk_alone_is_said_and_not_drawn(tables, tmp_path):
    risks = tables["predictions"].assign(predicted_days=np.nan)
    lost = tables["validation"].assign(**{c: np.nan for c in ("R2", "MAE", "MSE", "RMSE")})
    slices = tables["slices"].assign(predicted_days=np.nan)
    run = made(tmp_path/"cox", dict(predictions=risks, validation=lost, slices=slices, intervals=pd.DataFrame(columns=tables["intervals"].columns)), loss="cox")
    assert backbone_comparison(run) is None and unit_table(run) is None and bias_table(run) is None and interval_table(run) is None
    page = render_page("cox", "", hybrid_sections(run))
    assert "predicts no days" in page and "loss cox: a risk is predicted" in page and "<img" not in page and "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower()


def test_both_splits_stand_side_by_side(tmp_path):
    slices, _ = days(("a",))
    known = pd.concat([slices.assign(partition=np.where(np.arange(len(slices)) % 5 == 0, "test", "train"), predicted_days=slices["time_days"] + 1, model=NETS[0] + SLICES),
                       slices.assign(partition=np.where(slices["patient_id"] < "Q-08", "test", "train"), repeat=1, model=NETS[0] + PATIENTS)]).assign(fold=0)
    metrics = evaluate_regression(known, unit="sample", n_resamples=20)
    run = made(tmp_path/"s", dict(predictions=known, metrics=metrics), [f"slices/{NETS[0]}{SLICES}", f"patients/{NETS[0]}{PATIENTS}"], split="slice")
    assert known_patients(hybrid_run(run), NETS[0] + SLICES) == (20, 20, 20) and known_patients(hybrid_run(run), NETS[0] + PATIENTS) == (8, 0, 40)
    table = split_table(run).set_index("score")
    assert table.loc["R2 by slice", "slices split"].startswith("1.00") and table.loc["R2 by slice", "printed, slices split"] == "0.8935"
    assert "20 of the 20 patients behind the 20 test slices are training patients; with patients split, 0 of 8 (40 slices)" in split_sentence(run, NETS[0])
    sections = hybrid_sections(run)
    assert len(sections) == 1 and len(figure_blocks(sections[0].blocks)) == 4
    turned = metrics.assign(estimate=np.where(metrics["model"].str.endswith(SLICES), -1., metrics["estimate"]))
    assert "gave no higher R2" in split_sentence(made(tmp_path/"t", dict(predictions=known, metrics=turned), split="slice"), NETS[0])


def test_damaged_and_foreign_runs_are_refused(tables, tmp_path):
    with pytest.raises(DataError, match="no run folder"): hybrid_run(tmp_path)
    with pytest.raises(DataError, match="study 'clinical'"): hybrid_run(made(tmp_path/"a", dict(predictions=tables["predictions"]), name="clinical"))
    with pytest.raises(DataError, match="not finished"): hybrid_run(made(tmp_path/"b"))
    with pytest.raises(DataError, match="lacks R2"): fold_table(made(tmp_path/"c", dict(predictions=tables["predictions"], validation=tables["validation"].drop(columns="R2"))))
    with pytest.raises(DataError, match="lacks promised"): interval_table(made(tmp_path/"d", dict(predictions=tables["predictions"], intervals=tables["intervals"].drop(columns="promised"))))
    assert "no evaluated rows" in error_blocks(made(tmp_path/"e", dict(predictions=tables["predictions"].query("partition == 'train'"))))[0].text
