"""Values from R and worked examples, stored with their source in tests/golden: agreement to 1e-6, or the reason why not.

A case holds `printed` (what the source prints, to half a unit of its last digit), `exact` (worked in fractions or in closed form), or
`elsewhere` (a program with other rules at tied times: its value is met by `Weights` below under those rules, and ours under ours)."""
import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lifelines.datasets import load_lung
from scipy.optimize import minimize
from scipy.stats import norm
from sksurv.datasets import load_gbsg2
from statsmodels.api import GLM, add_constant, families

from brainmets.evaluate import curves
from brainmets.evaluate.classification import delong_auc
from brainmets.evaluate.comparisons import delong_test
from brainmets.evaluate.measures import (brier_score, harrell_c, integrated_brier, kaplan_meier_at, survival_outcome, time_dependent_auc,
                                         uno_c)
from brainmets.evaluate.usefulness import DecisionRows, decision_curve, label_decisions
from brainmets.models.baselines import fit_cox, log_partial_likelihood

FOLDER = Path(__file__).parent/"golden"
GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def cases(name, *keys):
    "The cases of a file that have all of the keys, as parameters named after them."
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in GOLDEN[name]["cases"] if all(k in c for k in keys)])


def floats(values):
    "Numbers, or fractions as text, as floats of the same shape."
    if isinstance(values, list): return np.array([floats(v) for v in values])
    return float(Fraction(values)) if isinstance(values, str) else float(values)


def agree(found, expected, tolerance):
    "Within an absolute tolerance; NaN agrees with nothing."
    np.testing.assert_array_less(np.abs(np.asarray(found, float) - floats(expected)), tolerance*(1 + 1e-9), err_msg=f"{found} against {expected}")


def both(case, key, found):
    "Agreement with what is printed and with what is exact, where the case has them."
    for kind in ("printed", "exact"):
        if key in case.get(kind, {}): agree(found, case[kind][key], case[kind]["tolerance"])


def tolerances(value):
    "Each tolerance in a case, with the part it stands in."
    for part in ([value] if isinstance(value, dict) else value if isinstance(value, list) else []):
        if isinstance(part, dict):
            yield from ((number, part) for key, number in part.items() if key.endswith("tolerance"))
            yield from (found for inner in part.values() for found in tolerances(inner))


def test_the_files_cover_what_was_promised():
    assert set(GOLDEN) == {"kaplan_meier", "logrank", "cox", "harrell_c", "uno_c", "auc", "brier", "aalen_johansen", "delong", "decision_curve"}
    assert {c["ties"] for c in GOLDEN["cox"]["cases"]} == {"breslow", "efron"}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_case_names_its_source_and_why_it_is_loose(name):
    assert len({c["name"] for c in GOLDEN[name]["cases"]}) == len(GOLDEN[name]["cases"])
    for case in GOLDEN[name]["cases"]:
        assert {"package", "function", "address", "licence"} <= set(case["source"]), case["name"]
        assert case["source"]["package"] == "none" or case["source"]["address"].startswith("https://"), case["name"]
        loose = [part for tolerance, part in tolerances(case) if tolerance > 1e-6]
        assert all("why" in part for part in loose), f"{case['name']}: a tolerance above 1e-6 without a reason"
        assert "elsewhere" not in case or case["note"], f"{case['name']}: another value without a reason"


@cases("kaplan_meier")
def test_kaplan_meier(case):
    curve = curves.kaplan_meier(case["data"]["time"], case["data"]["event"]).set_index("time_days")
    for kind in ("printed", "exact"):
        for column in {"survival", "low", "high", "at_risk"} & set(case[kind]):
            agree(curve.loc[case[kind]["time"], column], case[kind][column], case[kind]["tolerance"])


@cases("logrank")
def test_logrank(case):
    data, printed = case["data"], case["printed"]
    found = curves.logrank(data["time"], data["event"], data["group"])
    assert found.degrees == 1
    agree(found.statistic, case["exact"]["statistic"], case["exact"]["tolerance"])
    for key in {"statistic", "p"} & set(printed): agree(getattr(found, key), printed[key], printed[f"{key}_tolerance"])


def cox_data(case):
    "Covariates, times and events; a case may name the one whose data it shares."
    data = case["data"]
    if isinstance(data, str): data = next(c["data"] for c in GOLDEN["cox"]["cases"] if c["name"] == data)
    return np.array(data["x"], float), np.array(data["time"], float), np.array(data["event"], bool)


def breslow_coefficients(x, time, event):
    "Where the partial likelihood of brainmets is highest."
    loss = lambda beta: -log_partial_likelihood(x @ beta, time, event)
    return minimize(loss, np.zeros(x.shape[1]), method="Nelder-Mead", options=dict(xatol=1e-10, fatol=1e-14, maxiter=2000)).x


@cases("cox")
def test_cox_coefficients_with_ties(case):
    x, time, event = cox_data(case)
    fitted = breslow_coefficients(x, time, event) if case["ties"] == "breslow" else fit_cox(pd.DataFrame(x), time, event).coefficients
    both(case, "coefficients", fitted)


@pytest.mark.parametrize("case", [c for c in GOLDEN["cox"]["cases"] if "log_likelihood" in c.get("exact", {})], ids=lambda c: c["name"])
def test_breslow_likelihood_in_closed_form(case):
    (x, time, event), exact = cox_data(case), case["exact"]
    agree(log_partial_likelihood(np.zeros(len(x)), time, event), exact["log_likelihood_at_zero"], exact["likelihood_tolerance"])
    agree(log_partial_likelihood(x @ exact["coefficients"], time, event), exact["log_likelihood"], exact["likelihood_tolerance"])


def test_likelihood_ratio_that_r_prints():
    case = next(c for c in GOLDEN["cox"]["cases"] if c["name"] == "aml, Breslow")
    x, time, event = cox_data(case)
    best, none = (log_partial_likelihood(x @ beta, time, event) for beta in (breslow_coefficients(x, time, event), np.zeros(1)))
    agree(2*(best - none), case["printed"]["likelihood_ratio"], case["printed"]["likelihood_ratio_tolerance"])


@pytest.mark.parametrize("case", [c for c in GOLDEN["cox"]["cases"] if "baseline_hazard" in c.get("exact", {})], ids=lambda c: c["name"])
def test_baseline_in_closed_form(case):
    (x, time, event), exact = cox_data(case), case["exact"]
    model = fit_cox(pd.DataFrame(x, columns=["x"]), time, event)
    survival = model.survival(pd.DataFrame(dict(x=[x.mean()])), exact["baseline_days"])[0]
    agree(-np.log(survival), exact["baseline_hazard"], exact["baseline_tolerance"])


@cache
def lung():
    "The lung data of R survival; event is true for a death."
    return load_lung().assign(event=lambda t: t["status"] == 1)


LUNG_ROWS = {"first half": lambda t: t.iloc[:114], "second half": lambda t: t.iloc[114:], "ph.ecog known": lambda t: t[t["ph.ecog"].notna()]}


def outcome(rows):
    "Times and events of a case: numbers, or the name of rows of lung."
    rows = LUNG_ROWS[rows](lung()) if isinstance(rows, str) else rows
    return survival_outcome(np.asarray(rows["time"], float), np.asarray(rows["event"], bool))


def risk_arrays(data):
    "Outcome and risk of a case."
    if "load" not in data: return outcome(data.get("test", data)), np.array(data["risk"], float)
    return outcome(data["rows"]), LUNG_ROWS[data["rows"]](lung())[data["risk"]].to_numpy(float)


@cases("harrell_c")
def test_harrell_c(case):
    test, risk = risk_arrays(case["data"])
    found = harrell_c(test["time"], test["event"], risk)
    for key in ("concordant", "discordant", "tied_risk", "tied_time", "c"): both(case, key, getattr(found, key))


@dataclass(frozen=True)
class Weights:
    "Measures weighted for censoring, pair by pair, under stated rules at tied times; nothing is shared with brainmets."
    train: np.ndarray
    events_first: bool = True   # at one time events come before censorings
    left: bool = False          # the chance to be uncensored just before a time instead of at it
    same_time: bool = True      # a pair of an event and a censoring at one time counts
    cases_strict: bool = False  # only events before the horizon are cases

    @cached_property
    def steps(self):
        "Times of censoring and the chance to be uncensored from 0 and from each of them on."
        time, event = self.train["time"], self.train["event"]
        steps = np.unique(time[~event])
        at_risk = [(time >= t).sum() - self.events_first*((time == t) & event).sum() for t in steps]
        factors = 1 - np.array([((time == t) & ~event).sum() for t in steps])/at_risk
        return steps, np.concatenate([[1.0], np.cumprod(factors)])

    def uncensored(self, days, left=None):
        "Chance to be uncensored at each of the days."
        (steps, chance), left = self.steps, self.left if left is None else left
        return chance[np.searchsorted(steps, days, "left" if left else "right")]

    def case(self, test, days): return test["event"] & ((test["time"] < days) if self.cases_strict else (test["time"] <= days))

    def uno_c(self, test, risk, tau_days):
        num = den = 0.0
        for i in np.flatnonzero(test["event"] & (test["time"] < tau_days)):
            partner = (test["time"] > test["time"][i]) | (self.same_time & (test["time"] == test["time"][i]) & ~test["event"])
            weight = self.uncensored(test["time"][i])**-2
            num += weight*((risk[partner] < risk[i]).sum() + (risk[partner] == risk[i]).sum()/2)
            den += weight*partner.sum()
        return num/den

    def auc(self, test, risk, days):
        case, control = self.case(test, days), test["time"] > days
        weight = 1/self.uncensored(test["time"][case])
        wins = (risk[case][:, None] > risk[control]) + (risk[case][:, None] == risk[control])/2
        return weight @ wins.mean(1)/weight.sum()

    def brier(self, test, survival, days):
        case, control = self.case(test, days), test["time"] > days
        died = np.sum(survival[case]**2/self.uncensored(test["time"][case]))
        return (died + np.sum((1 - survival[control])**2)/self.uncensored(days, left=False))/len(test)


def elsewhere(case, train):
    "`Weights` under the rules of the other program."
    rules = {k: case["elsewhere"][k] for k in ("events_first", "left", "same_time", "cases_strict") if k in case["elsewhere"]}
    return Weights(train, **rules)


@cases("uno_c", "exact")
def test_uno_c(case):
    (test, risk), train, tau = risk_arrays(case["data"]), outcome(case["data"]["train"]), case["data"]["tau_days"]
    found = uno_c(train, test, risk, tau).estimate
    both(case, "c", found)
    agree(Weights(train).uno_c(test, risk, tau), found, 1e-12)


@cases("uno_c", "elsewhere")
def test_uno_c_of_other_programs_and_why_it_differs(case):
    (test, risk), train, tau, other = risk_arrays(case["data"]), outcome(case["data"]["train"]), case["data"]["tau_days"], case["elsewhere"]
    by_rules = elsewhere(case, train).uno_c(test, risk, tau)
    agree(by_rules, other["c"], other["tolerance"])
    agree(by_rules, other["exact"], 1e-12)
    assert abs(uno_c(train, test, risk, tau).estimate - by_rules) > 1e-6, "the rules no longer differ: say so in the note"


def auc_values(case):
    "AUC of brainmets at the times of a case, with the arrays behind it."
    (test, risk), train = risk_arrays(case["data"]), outcome(case["data"]["train"])
    return np.array([time_dependent_auc(train, test, risk, t).estimate for t in case["data"]["times"]]), train, test, risk


@cases("auc")
def test_auc_at_horizons(case):
    found, train, test, risk = auc_values(case)
    both(case, "auc", found)
    rules = Weights(train)
    agree([rules.auc(test, risk, t) for t in case["data"]["times"]], found.tolist(), 1e-12)


@cases("auc", "elsewhere")
def test_auc_of_other_programs_and_why_it_differs(case):
    found, train, test, risk = auc_values(case)
    rules = elsewhere(case, train)
    by_rules = np.array([rules.auc(test, risk, t) for t in case["data"]["times"]])
    agree(by_rules, case["elsewhere"]["auc"], case["elsewhere"]["tolerance"])
    assert 1e-6 < np.abs(found - by_rules).max() < case["largest_difference"]


def golden_case(name, start): return next(c for c in GOLDEN[name]["cases"] if c["name"].startswith(start))


def test_brier_by_hand():
    case = golden_case("brier", "by hand")
    data, exact = case["data"], case["exact"]
    train, test, survival = outcome(data["train"]), outcome(data["test"]), np.array(data["survival"])
    scores = [brier_score(train, test, survival[:, k], t) for k, t in enumerate(data["times"])]
    agree([s.score for s in scores], exact["brier"], exact["tolerance"])
    agree([s.reference for s in scores], exact["reference"], exact["tolerance"])
    agree([s.ipa for s in scores], (1 - floats(exact["brier"])/floats(exact["reference"])).tolist(), exact["tolerance"])
    found = integrated_brier(train, test, survival, data["times"])
    agree([found.score, found.reference], [exact["integrated"], exact["integrated_reference"]], exact["tolerance"])


@cache
def nottingham():
    "GBSG2: outcome and group of the Nottingham prognostic index (1 to 3)."
    x, y = load_gbsg2()
    index = 0.2*x["tsize"]/10 + 1 + x["tgrade"].astype(str).map({"I": 1, "II": 2, "III": 3}).astype(int)
    return survival_outcome(y["time"], y["cens"]), np.select([index < 3.4, index <= 5.4], [1, 2], 3)


def nottingham_survival(times):
    "Kaplan-Meier of each patient's group at the times, (n, m)."
    known, group = nottingham()
    return np.stack([kaplan_meier_at(known[group == k], times) for k in (1, 2, 3)])[group - 1]


def test_brier_of_the_nottingham_index():
    printed, (known, _) = golden_case("brier", "GBSG2")["printed"], nottingham()
    survival = nottingham_survival(printed["times"])
    agree([brier_score(known, known, survival[:, k], t).score for k, t in enumerate(printed["times"])], printed["brier"], printed["tolerance"])
    for part in printed["integrated"]:
        times = part["times"] if "times" in part else np.arange(part["from_day"], part["to_day"] + 1)
        agree(integrated_brier(known, known, nottingham_survival(times), times).score, part["value"], printed["tolerance"])


def exponential_survival(times):
    "Survival of the second half of lung from exponential regression on age, fitted on the first half, (n, m)."
    table, x = lung(), add_constant(lung()["age"] - lung()["age"].mean())
    fit = GLM(table["event"][:114].astype(int), x[:114], family=families.Poisson(), offset=np.log(table["time"][:114])).fit(tol=1e-12)
    return np.exp(-np.outer(np.exp(x[114:] @ fit.params), times))


def test_brier_of_survmetrics_and_why_it_differs():
    case = golden_case("brier", "lung")
    other, times, test = case["elsewhere"], np.array(case["data"]["times"], float), outcome("second half")
    survival, rules = exponential_survival(times), elsewhere(case, test)
    by_rules = np.array([rules.brier(test, survival[:, k], t) for k, t in enumerate(times)])
    agree(by_rules, other["brier"], other["tolerance"])
    ours = np.array([brier_score(test, test, survival[:, k], t).score for k, t in enumerate(times)])
    events_first = Weights(test)
    agree([events_first.brier(test, survival[:, k], t) for k, t in enumerate(times)], ours.tolist(), 1e-12)
    assert 1e-6 < np.abs(ours - by_rules).max() < case["largest_difference"]
    agree(np.diff(times) @ by_rules[:-1]/(times[-1] - times[0]), other["integrated"], other["tolerance"])
    agree(integrated_brier(test, test, survival, times).score, float(np.trapezoid(ours, times)/(times[-1] - times[0])), 1e-12)


def test_delong_of_proc():
    case = golden_case("delong", "aSAH")
    data, printed = case["data"], case["printed"]
    label, tolerance = np.array(data["label"], bool), printed["tolerance"]
    for marker, auc in printed["auc"].items():
        found = delong_auc(data[marker], label, interval="normal")
        agree(found.estimate, auc, tolerance)
        agree(((found.high - found.low)/(2*norm.ppf(0.975)))**2, printed["variance"][marker], tolerance)
    found = delong_auc(data["ndka"], label, interval="normal")
    agree([found.low, found.high], printed["interval"]["ndka"], tolerance)
    for test in printed["tests"]:
        found = delong_test(label, data[test["a"]], data[test["b"]])
        agree([found.z, found.p, found.low, found.high], [test[k] for k in ("z", "p", "low", "high")], tolerance)


def test_delong_by_hand():
    case = golden_case("delong", "by hand")
    data, exact = case["data"], case["exact"]
    found = delong_test(np.array(data["label"], bool), data["a"], data["b"])
    agree([found.auc_a, found.auc_b, found.estimate], [exact["auc"]["a"], exact["auc"]["b"], exact["difference"]], exact["tolerance"])
    agree(found.standard_error**2, exact["difference_variance"], exact["tolerance"])


def decision_rows(data):
    "The rows of a decision curve from the data that come with the Python package dcurves; years become days."
    table = pd.read_csv(files(data["load"].split("/")[0])/data["load"].partition("/")[2])
    if "horizon" in data:
        days = 365.25*table["ttcancer"]
        rows = pd.DataFrame(dict(repeat=0, patient_id=table["patientid"].astype(str), sample_id=table["patientid"].astype(str), time_days=days,
                                 event=table["cancer"].astype(bool), chance=table[data["model"]].astype(float)))
        return DecisionRows(rows, 365.25*data["horizon"], "golden")
    ids = table["patientid"].astype(str)
    predictions = pd.DataFrame(dict(model="golden", patient_id=ids, sample_id=ids, partition="test", repeat=0, fold=0, member=0, seed=0,
                                    label=table["cancer"].map({True: "yes", False: "no"}), prob_yes=table[data["model"]].astype(float),
                                    prob_no=1 - table[data["model"]]))
    return label_decisions(predictions, "golden", positive="yes")


@cases("decision_curve")
def test_decision_curve(case):
    printed = case["printed"]
    curve = decision_curve(decision_rows(case["data"]), printed["thresholds"], n_resamples=20).table
    for column in ("net_benefit", "treat_all"): both(case, column, curve[column])


@cases("aalen_johansen")
def test_aalen_johansen(case):
    data = case["data"]
    curve = curves.cumulative_incidence(data["time"], data["event"], data["competing"]).set_index("time_days")
    for kind in {"printed", "exact"} & set(case):
        for column in {"incidence", "competing_incidence"} & set(case[kind]):
            agree(curve.loc[case[kind]["time"], column], case[kind][column], case[kind]["tolerance"])
