"""Do the 95 % intervals hold the truth in 92 to 98 % of cohorts? 200 phantom tables; the truth from 300,000 patients of the same population."""
import numpy as np
import pandas as pd
import pytest

from brainmets.evaluate.metrics import evaluate_survival
from brainmets.phantom import plan_patient, risks, terms, used_hazard, weibull_survival

N_TABLES, N_PATIENTS, N_TRAIN, N_POOL = 200, 150, 600, 800
DAYS = np.arange(60, 721, 60)
HORIZON_DAYS = 365.25
METRICS = {"Harrell C": "pooled", "AUC at 12 months": "pooled", "integrated Brier": "pooled"}


@pytest.fixture(scope="module")
def population():
    "The risks of patients of the phantom: what decides (with a part that only images show), and what the table shows."
    hazard, found = used_hazard(), []
    for plan in (plan_patient(0, k) for k in range(N_POOL)):
        found.append(risks(hazard, terms({**plan.facts, "patchiness": plan.patchiness})))
    return pd.DataFrame(found)


def drawn(population, n, rng, partition):
    "n patients of the population with outcomes as in `phantom.draw_outcome`, predicted from the table alone."
    hazard, people = used_hazard(), population.iloc[rng.integers(len(population), size=n)]
    death = hazard.scale_days*(rng.exponential(size=n)*np.exp(-people.risk_true.to_numpy()))**(1/hazard.shape)
    censoring = np.minimum(rng.uniform(120, 1150, n), rng.exponential(1800, n))
    table = pd.DataFrame(dict(model="table", patient_id=[f"{partition}-{i}" for i in range(n)], partition=partition, repeat=0, fold=0, event=death <= censoring,
                              time_days=np.maximum(np.ceil(np.minimum(death, censoring)), 1), risk=people.risk_table.to_numpy()))
    curves = weibull_survival(people.risk_table, DAYS, hazard.shape, hazard.scale_days)
    return pd.concat([table, pd.DataFrame(curves, columns=[f"survival_{d}" for d in DAYS])], axis=1)


def estimates(train, test, **how):
    table = evaluate_survival(pd.concat([train, test], ignore_index=True), (HORIZON_DAYS,), **how)
    return pd.concat([table[(table.metric == m) & (table["scope"] == s)] for m, s in METRICS.items()]).set_index("metric")


@pytest.fixture(scope="module")
def coverage(population):
    rng = np.random.default_rng(11)
    long = drawn(population, 300_000, rng, "train")
    truth = estimates(long, long.assign(partition="test", patient_id="truth-" + long.patient_id), n_resamples=20).estimate
    hits = {kind: [] for kind in ("percentile", "bca")}
    for _ in range(N_TABLES):
        train, test = drawn(population, N_TRAIN, rng, "train"), drawn(population, N_PATIENTS, rng, "test")
        for kind, found in hits.items():
            table = estimates(train, test, n_resamples=1000, interval=kind)
            found.append((table.low <= truth) & (truth <= table.high))
    return {kind: pd.DataFrame(found).mean() for kind, found in hits.items()}


@pytest.mark.parametrize("kind", ["percentile", "bca"])
@pytest.mark.parametrize("metric", METRICS)
def test_intervals_hold_the_truth(coverage, metric, kind):
    assert 0.92 <= coverage[kind][metric] <= 0.98, coverage
