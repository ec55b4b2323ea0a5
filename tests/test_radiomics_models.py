"""Radiomics models on real lesions: local failure of melanoma metastases, folds of patients, through the loop of all studies."""
import numpy as np
import pytest

from brainmets.cohort import load_cohort
from brainmets.evaluate.metrics import harrell_estimates, make_sheet
from brainmets.features.selection import selection_settings
from brainmets.models.radiomics import FitRadiomics, RadiomicsSettings, fit_radiomics, load_radiomics
from brainmets.runs import open_run
from brainmets.splits import k_fold
from brainmets.tables import DataError
from brainmets.train.crossval import cross_validate

QUICK = selection_settings(n_folds=3, n_penalties=10)
MODELS = (RadiomicsSettings("cox", QUICK, 3), RadiomicsSettings("forest", QUICK, 3, n_trees=50))
BOOT = dict(n_resamples=500, seed=0, level=0.95)


@pytest.fixture(scope="module")
def melanoma(root, real_data):
    "Samples (44 lesions of 18 patients, days), and the names of their radiomic features."
    if not (real_data/"radiomics_mm").is_dir(): pytest.skip("no radiomics_mm among the real data")
    cohort = load_cohort(root/"data_manifests"/"radiomics_mm.toml", real_data/"radiomics_mm")
    names = [name for name in cohort.names(kind="number") if "original_" in name or "wavelet" in name]
    return cohort.samples, tuple(cohort.samples[names].dropna(axis=1, how="all").columns)


def predictions(samples, columns, folder, settings=MODELS):
    folds = k_fold(samples, 4, seed=0)
    sides = folds.groupby(["fold", "patient_id"]).partition.nunique()
    assert (sides == 1).all() and folds.patient_id.nunique() == samples.patient_id.nunique()
    return cross_validate(open_run(folder, {"study": "radiomics"}), samples, folds, FitRadiomics(columns, settings))


def harrell(table, model, scope="pooled"):
    return dict(harrell_estimates(make_sheet(table, model, unit="sample"), BOOT))[scope]


@pytest.fixture(scope="module")
def real(melanoma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("radiomics")/"run"
    return folder, predictions(*melanoma, folder)


def test_real_local_failure(melanoma, real):
    "10 events, 5 of them in one patient: any C can come out. What is asserted is that it is honest."
    samples, columns = melanoma
    assert (len(samples), samples.patient_id.nunique(), int(samples.event.sum())) == (44, 18, 10)
    n_columns, last_days = len(columns), float(samples.time_days.max())
    assert n_columns > 2000 and last_days > 5*365  # months were made days
    table = real[1]
    test = table[table.partition == "test"]
    for model in ("radiomics cox", "radiomics forest"):
        rows = test[test.model == model]
        assert sorted(rows.sample_id) == sorted(samples.sample_id) and np.isfinite(rows.risk).all()
        for scope in ("pooled", "within folds"):
            found = harrell(table, model, scope)
            assert (found.n_samples, found.n_events, found.n_patients) == (44, 10, 18) and 0 <= found.low <= found.estimate <= found.high <= 1
            print(f"{model}, {scope}: C {found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}], {found.n_events} events, {found.n_samples} lesions, {found.n_patients} patients")


def test_stored_models_predict_the_same_and_saw_training_rows_only(melanoma, real):
    (samples, columns), (folder, table) = melanoma, real
    kept = []
    for fold in range(4):
        rows = table[(table.fold == fold) & (table.model == "radiomics cox")].set_index("sample_id")
        stored = load_radiomics(folder/"members"/f"repeat-0_fold-{fold}"/"radiomics_cox")
        by_id = samples.set_index("sample_id").loc[rows.index]
        np.testing.assert_allclose(stored.risk(by_id[list(columns)]), rows.risk, atol=1e-6)
        train = by_id[(rows.partition == "train").to_numpy()]
        assert stored.selection.n_rows == len(train) and stored.selection.n_patients == train.patient_id.nunique() and stored.model.n_events == train.event.sum()
        again = fit_radiomics(train[list(columns)].sort_index(), train.sort_index().patient_id, train.sort_index().time_days, train.sort_index().event, MODELS[0])
        assert set(again.selection.kept) == set(stored.selection.kept)
        kept.append(len(stored.selection.kept))
    print(f"columns kept by fold {kept} of {len(columns)}")


def test_outcomes_of_test_rows_change_nothing(melanoma, real, tmp_path):
    "Failures of the first fold's test patients are turned round; its models and risks stay."
    samples, columns = melanoma
    first = real[1][(real[1].fold == 0) & (real[1].partition == "test")]
    turned = samples.copy()
    tested = turned.patient_id.isin(first.patient_id)
    turned.loc[tested, "event"] = ~turned.loc[tested, "event"]
    turned.loc[tested, "time_days"] = turned.time_days[tested].to_numpy()[::-1]
    folds = k_fold(samples, 4, seed=0)
    table = cross_validate(open_run(tmp_path/"run", {"study": "radiomics"}), turned, folds, FitRadiomics(columns, MODELS[:1]), only=[(0, 0)])
    was = real[1][(real[1].fold == 0) & (real[1].model == "radiomics cox")].set_index("sample_id").risk
    np.testing.assert_allclose(table.set_index("sample_id").risk[was.index], was, atol=1e-9)


def test_planted_signal_in_real_features_is_found_and_a_shuffled_one_is_not(melanoma, tmp_path):
    "Times follow one real feature: C of unseen patients is above what chance gives. The same times dealt to other lesions: not. (44 events, a C without meaning has an SD of about 0.05; the limits are four of them away.)"
    samples, columns = melanoma
    columns = columns[::12]
    rng = np.random.default_rng(0)
    values = samples[list(columns)]
    even = values[values.skew().abs().idxmin()]  # not a column that a few lesions make
    score = 3*((even - even.mean())/even.std()).to_numpy()
    time = np.ceil(rng.exponential(300/np.exp(score)))
    planted = samples.assign(time_days=time, event=True)
    at_random = samples.assign(time_days=rng.permutation(time), event=True)
    c = {name: harrell(predictions(rows, columns, tmp_path/name, MODELS[:1]), "radiomics cox").estimate for name, rows in (("planted", planted), ("shuffled", at_random))}
    print({name: round(value, 2) for name, value in c.items()})
    assert c["planted"] > 0.7 and abs(c["shuffled"] - 0.5) < 0.2


def test_bad_input(melanoma):
    samples, columns = melanoma
    with pytest.raises(DataError, match="no_such"): FitRadiomics(("no_such",))(samples, samples[:0], None, None, 0)
    with pytest.raises(DataError, match="text"): fit_radiomics(samples[["patient_id"]], samples.patient_id, samples.time_days, samples.event)
    with pytest.raises(DataError, match="not negative"): fit_radiomics(samples[list(columns[:5])], samples.patient_id, -samples.time_days, samples.event)
