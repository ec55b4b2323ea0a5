"""Novelty against a plain reference, for every choice of the new patient, with damaged files, and behind the clinical encoder."""
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from brainmets.features.clinical import Column, fit_encoder
from brainmets.models.novelty import RANKS, Novelty, fit_novelty, novelty_from_json
from brainmets.tables import DataError


def patients(n, seed, prefix, kind="normal", n_columns=6):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(n_columns, n_columns))
    x = rng.normal(size=(n, n_columns)) @ mixing
    if kind == "heavy": x = np.sinh(2*x)
    if kind == "ties": x = np.round(x/3).clip(-1, 1)
    return pd.DataFrame(x, index=[f"{prefix}{i}" for i in range(n)], columns=[f"c{i}" for i in range(n_columns)])


def plain_p_values(train, held_out, new, max_components):
    "p-values by loops, with scikit-learn's own transform and a full precision matrix."
    mean, sd = train.mean(), train.std(ddof=0)
    z = ((train - mean)/sd).to_numpy()
    pca = PCA(min(max_components, len(train)//10, z.shape[1])).fit(z)
    precision = LedoitWolf().fit(pca.transform(z)).precision_

    def looks(table):
        u = ((table - mean)/sd).to_numpy()
        scores = pca.transform(u)
        left = np.linalg.norm(u - pca.inverse_transform(scores), axis=1) if pca.n_components_ < z.shape[1] else np.zeros(len(u))
        return [(float(np.sqrt(s @ precision @ s)), float(r)) for s, r in zip(scores, left)]

    held, found = looks(held_out), []
    for mine in looks(new):
        everybody = [*held, mine]
        place = [max(sum(other[k] < one[k] - 1e-9 for other in everybody) for k in (0, 1)) for one in everybody]
        found.append(sum(p >= place[-1] for p in place)/len(everybody))
    return found


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("max_components", [2, 16])
def test_ranks_agree_with_plain_loops(kind, max_components):
    train, held_out, new = (patients(n, seed, prefix, kind) for n, seed, prefix in ((70, 1, "t"), (25, 2, "h"), (15, 3, "n")))
    ranked = fit_novelty(train, held_out, max_components).rank(new)
    assert ranked["p_value"].tolist() == pytest.approx(plain_p_values(train, held_out, new, max_components), abs=1e-12)
    assert ranked["share_nearer"].tolist() == pytest.approx((1 - ranked["p_value"]).tolist(), abs=1e-12)


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties"])
def test_p_values_hold_for_every_choice_of_the_new_patient(kind):
    "No randomness: of n + 1 patients, each in turn the new one, at most j have a p-value up to j/(n + 1)."
    train, others = patients(50, 1, "t", kind), patients(40, 2, "h", kind)
    p_values = np.sort([fit_novelty(train, others.drop(index=name), 3).rank(others.loc[[name]])["p_value"].item() for name in others.index])
    assert (p_values >= np.arange(1, 41)/40 - 1e-12).all()
    assert p_values[0] <= 2/40 + 1e-12 or kind == "ties"


def test_order_of_rows_and_columns_does_not_matter():
    train, held_out, new = patients(60, 1, "t"), patients(30, 2, "h"), patients(10, 3, "n")
    first = fit_novelty(train, held_out)
    assert fit_novelty(train[::-1], held_out[::-1]) == first
    mixed = first.rank(new[::-1][[*new.columns[::-1]]].assign(more=np.nan)).loc[new.index]   # a column that training did not have is not read
    pd.testing.assert_frame_equal(mixed, first.rank(new), rtol=1e-9)


def test_inputs_that_are_small_or_odd():
    train = pd.DataFrame({0: [1., 2., 4.], 1: [True, True, True]}, index=["a", "b", "c"])
    found = fit_novelty(train, train.set_axis(["d", "e", "f"]))
    new = pd.DataFrame({0: [3., -1e99, 4. + 1e-9], 1: [True, False, True]}, index=["x", "y", "z"])
    ranked = found.rank(new)
    assert [*ranked] == list(RANKS) and [len(o) for o in ranked["outside"]] == [0, 2, 0]     # rounding is not outside
    assert [o.column for o in ranked.loc["y", "outside"]] == ["1", "0"]                      # what never varied comes first
    assert "1 is 0 (always 1 in training)" in found.notes(new)["y"]
    assert np.isfinite(ranked["distance"]).all()
    with pytest.raises(DataError, match="columns 0, 1 are missing or not finite for patients x, y"):
        found.rank(pd.DataFrame({0: [np.nan, 1.], 1: [1., np.inf]}, index=["x", "y"]))
    with pytest.raises(DataError, match="2 training patients"): fit_novelty(train[:2], train[2:])
    with pytest.raises(DataError, match="max_components=0"): fit_novelty(train, train.set_axis(["d", "e", "f"]), 0)
    with pytest.raises(DataError, match="columns 0 stand more than once"): found.rank(pd.concat([new, new[[0]]], axis=1))


def test_json_is_exact_and_damage_is_refused():
    fitted = fit_novelty(patients(40, 1, "t", "heavy").assign(fixed=0.1), patients(12, 2, "h", "heavy").assign(fixed=0.1), 3)
    text = fitted.to_json()
    assert novelty_from_json(text) == fitted and novelty_from_json(text).to_json() == text
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(DataError): novelty_from_json(text[:end])
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(text), 400):
        damaged = text[:at] + str(rng.choice(list('019-."{}[],e x'))) + text[at + 1:]
        try: assert isinstance(novelty_from_json(damaged), Novelty)
        except DataError: refused += 1
    assert refused > 100
    for name in ("distances", "residuals", "n_outside"):
        with pytest.raises(DataError, match=name): replace(fitted, **{name: getattr(fitted, name)[:-1] + (-1.0,)})
        with pytest.raises(DataError, match="expected"): replace(fitted, **{name: ()})
    for name in ("low", "mean", "sd", "components", "variances", "columns"):
        with pytest.raises(DataError, match="novelty: "): replace(fitted.space, **{name: getattr(fitted.space, name)[:-1]})


def test_behind_the_clinical_encoder():
    rng = np.random.default_rng(4)

    def samples(n, prefix):
        ids = [f"{prefix}{i}" for i in range(n)]
        return pd.DataFrame({"patient_id": ids, "sample_id": ids, "age": rng.normal(60, 9, n), "grade": rng.choice(["2", "3", "4"], n), "resected": rng.integers(0, 2, n)})

    train, held_out, new = samples(60, "t"), samples(45, "h"), samples(3, "n")
    new.loc[0, "age"], new.loc[1, "grade"] = 130.0, "1"
    encoder = fit_encoder(train, [Column("age", "number"), Column("grade", "category"), Column("resected", "flag")])
    novelty = fit_novelty(encoder.transform(train), encoder.transform(held_out))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = novelty.notes(encoder.transform(new))
    assert notes["n0"].startswith("Unlike the training patients: further off than 45 of 45") and "outside the training range: age is" in notes["n0"]
    assert notes["n2"].startswith("Within the range of the held-out patients")
    # the encoder counts an unseen level as the reference, so this table cannot show it; the encoder's own report does
    assert notes["n1"].startswith("Within") and encoder.report(new)["value"].tolist() == ["1"]
