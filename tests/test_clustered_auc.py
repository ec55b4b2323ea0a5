"""Do 95 % intervals of the AUC hold the truth when patients have several lesions? Those that know about patients do, those of independent lesions do not."""
import numpy as np
import pandas as pd
import pytest

from brainmets.evaluate.bootstrap import class_ratio, patient_bootstrap
from brainmets.evaluate.classification import correlated_lesions, delong_auc, obuchowski_auc

TRUE_AUC = 0.8
N_CLOSED, N_BOOTSTRAP = 1000, 200   # studies; standard error of a coverage of 0.95: 0.007 and 0.015


def holds(estimate): return bool(estimate.low <= TRUE_AUC <= estimate.high)


def one_study(seed, n_patients=80, shared=0.7, n_resamples=0):
    "Which intervals of a simulated study hold the true AUC."
    lesions = correlated_lesions(n_patients, np.random.default_rng([31, seed]), TRUE_AUC, shared)
    lesions = lesions.assign(event=lesions["label"] == "progression")
    patient, found = pd.factorize(lesions["patient_id"])[0], {}
    for interval in ("logit", "normal"):
        found[f"naive {interval}"] = holds(delong_auc(lesions["score"], lesions["event"], interval=interval))
        found[f"clustered {interval}"] = holds(obuchowski_auc(patient, lesions["score"], lesions["event"], interval=interval))
    if n_resamples:
        statistic = class_ratio(patient, lesions["score"], lesions["event"])
        found["bootstrap"] = holds(patient_bootstrap(lesions, statistic, n_resamples, seed, on="counts"))
    return found


@pytest.fixture(scope="module")
def coverage():
    return pd.DataFrame([one_study(seed, n_resamples=300 if seed < N_BOOTSTRAP else 0) for seed in range(N_CLOSED)]).mean()


@pytest.mark.parametrize("interval", ["logit", "normal"])
def test_clustered_interval_holds_the_truth(coverage, interval):
    assert 0.92 <= coverage[f"clustered {interval}"] <= 0.98, coverage


@pytest.mark.parametrize("interval", ["logit", "normal"])
def test_naive_interval_does_not(coverage, interval):
    assert coverage[f"naive {interval}"] < 0.92, coverage


def test_bootstrap_of_patients_holds_the_truth(coverage):
    assert 0.92 <= coverage["bootstrap"] <= 0.98, coverage


def test_the_simulated_truth_is_the_truth():
    "The mean of 300 studies, so that a wrong truth cannot hide behind wide intervals."
    found = [obuchowski_auc(t["patient_id"], t["score"], t["label"] == "progression").estimate
             for t in (correlated_lesions(80, np.random.default_rng([5, seed]), TRUE_AUC) for seed in range(300))]
    assert abs(np.mean(found) - TRUE_AUC) < 0.008, np.mean(found)


def test_one_lesion_a_patient_is_delong():
    lesions = correlated_lesions(120, np.random.default_rng(3)).drop_duplicates("patient_id")
    positive = lesions["label"] == "progression"
    clustered, plain = (f for f in (obuchowski_auc(lesions["patient_id"], lesions["score"], positive), delong_auc(lesions["score"], positive)))
    assert (clustered.low, clustered.high) == (plain.low, plain.high)


def test_without_correlation_both_hold_the_truth():
    "Independent lesions whose classes are independent too: the clustered interval costs nothing."
    def study(seed):
        rng = np.random.default_rng([77, seed])
        lesions = correlated_lesions(80, rng, TRUE_AUC, shared=0.0, agreeing=0.5)
        positive = lesions["label"] == "progression"
        return holds(delong_auc(lesions["score"], positive)), holds(obuchowski_auc(lesions["patient_id"], lesions["score"], positive))
    naive, clustered = np.mean([study(seed) for seed in range(500)], axis=0)
    assert 0.92 <= naive <= 0.98 and 0.92 <= clustered <= 0.98, (naive, clustered)
