"""Selection of features: real radiomics, an independent solver, size, and inputs that are hardly a table."""
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from brainmets.cohort import load_cohort
from brainmets.features.selection import (SelectionSettings, class_path, column_variance, feature_values, fit_selection, load_selection, patient_folds, save_selection, selection_frequency,
                                          selection_settings)
from brainmets.tables import DataError


@pytest.fixture(scope="module")
def melanoma(root, real_data):
    "44 lesions of 18 patients: samples, features without columns that are missing everywhere."
    if not (real_data/"radiomics_mm").is_dir(): pytest.skip("no radiomics_mm among the real data")
    cohort = load_cohort(root/"data_manifests"/"radiomics_mm.toml", real_data/"radiomics_mm")
    features = cohort.samples[cohort.names(kind="number")].dropna(axis=1, how="all")
    return cohort, features


def test_real_lesions_in_folds_of_patients(melanoma, tmp_path):
    cohort, features = melanoma
    samples = cohort.samples
    folds = patient_folds(samples.patient_id, samples.event, 5)
    assert samples.patient_id.nunique() == 18 and pd.Series(folds).groupby(samples.patient_id.to_numpy()).nunique().max() == 1     # 16 and 16_2 are one patient
    started, selections = time.time(), []
    for k in range(5):
        rows = folds != k
        selection = fit_selection(features[rows], samples.patient_id[rows], time_days=samples.time_days[rows], event=samples.event[rows])
        save_selection(selection, tmp_path/"s.json")
        assert load_selection(tmp_path/"s.json") == selection
        x = features.loc[rows, list(selection.kept)]
        assert len(selection.kept) < 10 and np.isfinite(selection.transform(features[~rows]).to_numpy()).all()
        if len(selection.kept) > 1: assert (np.abs(np.corrcoef(x, rowvar=False))[~np.eye(len(selection.kept), dtype=bool)] <= 0.9).all()
        assert dict(selection.steps)["not correlated"] < dict(selection.steps)["varied"]/2
        selections.append(selection)
    assert time.time() - started < 60
    print(f"{features.shape[1]} columns; kept by fold {[len(s.kept) for s in selections]}; most frequent in {selection_frequency(selections).n_kept.max()} of 5 folds")


def test_real_features_and_random_outcomes(melanoma):
    "Selected on all rows, a coin can be predicted from real features; selected inside the folds it cannot."
    cohort, features = melanoma
    features = features[cohort.names(group="lesion")].dropna(axis=1, how="all")
    patients, settings, areas = cohort.samples.patient_id.to_numpy(), selection_settings(n_folds=3, n_penalties=6, fallback="strongest"), {"outside": [], "inside": []}
    for seed in range(8):
        coin = np.random.default_rng(seed).random(len(features)) < 0.5
        folds = patient_folds(patients, coin, 4)
        on_all = fit_selection(features, patients, coin, settings=settings)
        for k in range(4):
            rows = folds != k
            for where in areas:
                picked = on_all if where == "outside" else fit_selection(features[rows], patients[rows], coin[rows], settings=settings)
                model = LogisticRegression().fit(picked.transform(features[rows]), coin[rows])
                areas[where].append(roc_auc_score(coin[~rows], model.decision_function(picked.transform(features[~rows]))))
    means = {where: np.mean(values) for where, values in areas.items()}
    print({where: round(float(v), 2) for where, v in means.items()})
    assert means["outside"] > 0.65 and means["inside"] < 0.6 and means["outside"] - means["inside"] > 0.1


def test_against_an_independent_solver():
    "saga minimises the same function by stochastic gradients, with a free intercept."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(109, 40))
    x = (x - x.mean(0))/x.std(0)
    y = rng.random(109) < 1/(1 + np.exp(-(x[:, 0] - x[:, 1])))
    for penalty in (0.03, 0.08):
        ours = class_path(x, y, [penalty])[0]
        saga = LogisticRegression(C=1/(109*penalty), l1_ratio=1.0, solver="saga", tol=1e-8, max_iter=20_000, random_state=0).fit(x, y)
        assert np.abs(ours[:-1] - saga.coef_[0]).max() < 2e-3 and ((np.abs(ours[:-1]) > 5e-3) == (np.abs(saga.coef_[0]) > 5e-3)).all()


def test_a_thousand_columns_take_seconds():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(109, 200))
    features = pd.DataFrame(np.hstack([low + 0.2*k*rng.normal(size=low.shape) for k in range(6)])[:, :1166]).rename(columns="f{}".format)
    label, patients, started = low[:, 0] + rng.normal(size=109) > 0.4, np.arange(109) % 75, time.time()
    by_class = fit_selection(features, patients, label)
    survival = fit_selection(features, patients, time_days=rng.exponential(300/np.exp(low[:, 0])), event=rng.random(109) < 0.6)
    assert time.time() - started < 40
    assert any(name in by_class.kept[:2] for name in ("f0", "f200", "f400")) and any(name in survival.kept[:2] for name in ("f0", "f200", "f400"))


def test_units_do_not_matter():
    "Metres or millimetres, shifted or mirrored: the same columns, unless the raw variance is asked for."
    rng = np.random.default_rng(3)
    features = pd.DataFrame(rng.normal(size=(80, 20))).rename(columns="f{}".format)
    label, patients = features.f0 - features.f1 + rng.normal(size=80) > 0, np.arange(80)//2
    other = features*rng.choice([1e-3, 1, 1e6], 20)*rng.choice([-1, 1], 20) + 5
    settings = selection_settings(n_penalties=10)
    assert set(fit_selection(features, patients, label, settings=settings).kept) == set(fit_selection(other, patients, label, settings=settings).kept)
    raw = selection_settings(n_penalties=10, variance_of="raw")
    assert dict(fit_selection(other, patients, label, settings=raw).steps)["varied"] < 20
    assert np.allclose(column_variance(features.to_numpy(), "range"), column_variance(other.to_numpy(), "range"))


@pytest.mark.parametrize("features, words", [(pd.DataFrame({"a": ["x"]*6}), "text in a"), (pd.DataFrame(np.eye(6)[:, [0, 0]], columns=["a", "a"]), "twice")])
def test_bad_tables(features, words):
    with pytest.raises(DataError, match=words): feature_values(features)


def test_hardly_a_table():
    "No column, one column, columns without a value, two patients, and time 0."
    label, patients = np.array([0, 1, 0, 1, 0, 1]), list("aabbcc")
    assert fit_selection(pd.DataFrame(index=range(6)), patients, label).kept == ()
    assert fit_selection(pd.DataFrame({"a": [np.nan]*6, "b": [1.0]*6}), patients, label).steps[-1] == ("lasso", 0)
    one = fit_selection(pd.DataFrame({"a": [0.0, 5, 1, 6, 0, 5]}), patients, label)
    assert one.kept == ("a",) and one.score(pd.DataFrame({"a": [0.0, 6]}))[0] < one.score(pd.DataFrame({"a": [0.0, 6]}))[1]
    two = fit_selection(pd.DataFrame({"a": [0.0, 5, 1, 6]}), list("aabb"), label[:4])
    assert two.n_patients == 2
    survival = fit_selection(pd.DataFrame({"a": np.arange(6.0)}), patients, time_days=[0, 0, 3, 3, 9, 9], event=[1, 1, 0, 1, 1, 0])
    assert survival.outcome == "survival"
    with pytest.raises(DataError, match="1 patient"): fit_selection(pd.DataFrame({"a": np.arange(4.0)}), list("aaaa"), label[:4])
    with pytest.raises(DataError, match="for 6 rows"): fit_selection(pd.DataFrame({"a": np.arange(6.0)}), list("aabb"), label)
    assert SelectionSettings() == selection_settings()
