"""The survival metrics of scikit-survival in a loop over resamples: the reference of `make bench metrics`."""
import time

import numpy as np
import pandas as pd
from sksurv.metrics import (brier_score, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc,
                            integrated_brier_score)
from sksurv.nonparametric import SurvivalFunctionEstimator

from brainmets.evaluate.bootstrap import draws_of
from brainmets.evaluate.metrics import HORIZONS_DAYS, brier_grid, evaluate_survival, make_sheet, sheet_tau
from brainmets.evaluate.measures import survival_at, survival_matrix, survival_outcome


def planted_predictions(n):
    "A predictions table of n training and n test patients with exponential times, censoring, and 24 survival columns."
    rng, days = np.random.default_rng(0), np.arange(1, 25)*365.25/12
    x, noise = rng.normal(size=(2, 2*n))
    event_days, censored_days = rng.exponential(500*np.exp(-x)), rng.uniform(0, 1500, 2*n)
    curves = np.exp(-np.outer(np.exp(x + 0.5*noise), days)/500)
    table = pd.DataFrame(dict(model="planted", patient_id=[f"p{i}" for i in range(2*n)], partition=np.repeat(["train", "test"], n), repeat=0, fold=0,
                              time_days=np.minimum(event_days, censored_days), event=event_days <= censored_days, risk=x + 0.5*noise))
    return pd.concat([table, pd.DataFrame(curves, columns=[f"survival_{d:g}" for d in days])], axis=1)


def library_metrics(train, test, risk, times, matrix, tau, grid, reference):
    "All survival metrics of one resample by scikit-survival, in the order of `evaluate_survival`."
    values = [concordance_index_censored(test["event"], test["time"], risk)[0], concordance_index_ipcw(train, test, risk, tau=tau)[0]]
    values += [cumulative_dynamic_auc(train, test, risk, horizon)[0][0] for horizon in HORIZONS_DAYS]
    for horizon in HORIZONS_DAYS:
        model, flat = (brier_score(train, test, s, horizon)[1][0] for s in (survival_at(times, matrix, horizon), np.full(len(test), reference([horizon])[0])))
        values += [model, flat, 1 - model/flat]
    columns = matrix[:, np.isin(times, grid)]
    model, flat = (integrated_brier_score(train, test, s, grid) for s in (columns, np.tile(reference(grid), (len(test), 1))))
    return [*values, model, flat, 1 - model/flat]


def looped_seconds(n, n_looped):
    "Seconds that scikit-survival takes for the first resamples; its values on the whole table must equal ours."
    predictions = planted_predictions(n)
    sheet = make_sheet(predictions, "planted")
    rows, train = sheet.joined, sheet.trains[(0, 0)]
    test, risk = survival_outcome(rows["time_days"], rows["event"]), rows["risk"].to_numpy()
    times, matrix = survival_matrix(rows)
    common = dict(times=times, tau=sheet_tau(sheet).tau_days, grid=brier_grid(sheet, times)[0], reference=SurvivalFunctionEstimator().fit(train).predict_proba)
    ours = evaluate_survival(predictions, n_resamples=20)
    np.testing.assert_allclose(library_metrics(train, test, risk, matrix=matrix, **common), ours["estimate"], atol=1e-9)
    counts = draws_of(rows, 1000, 0)[:n_looped].astype(int)
    began = time.perf_counter()
    for count in counts:
        drawn = np.repeat(np.arange(n), count)
        library_metrics(train, test[drawn], risk[drawn], matrix=matrix[drawn], **common)
    return time.perf_counter() - began
