"""Permutation importance and integrated gradients: bad input is refused by name, and both work with the hybrid net and its fusions."""
import numpy as np
import pandas as pd
import pytest
import torch

from brainmets.explain.attributions import Baseline, fit_baseline, integrated_gradients, patient_attributions
from brainmets.explain.permutation import MOST_LEFT_OUT, Score, draw_rows, net_predictor, permutation_importance, tabular_function
from brainmets.models.hybrid import HybridNet, hybrid_config
from brainmets.tables import DataError
from brainmets.train.learner import evaluating

COLUMNS = ["a", "b", "c"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def rows(n_patients=8, n_slices=3):
    rng, n = np.random.default_rng(0), n_patients*n_slices
    table = pd.DataFrame(rng.normal(size=(n, 3)), columns=COLUMNS)
    table = table.assign(patient_id=np.repeat([f"P{i}" for i in range(n_patients)], n_slices), time_days=np.repeat(rng.integers(50, 900, n_patients), n_slices), partition="test")
    return table.assign(event=table["patient_id"].ne("P1"), sample_id=[f"{p}/{i}" for i, p in enumerate(table["patient_id"])])


def risk(table): return table["a"] + table["b"]


def images(n): return torch.randn(n, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def tensor(table): return torch.tensor(table[COLUMNS].to_numpy(np.float32))


BAD_INPUTS = [
    (dict(score="auc"), "mse, r2, c"), (dict(by="slice"), "patient, sample"), (dict(columns=["a", "a"]), "each in one variable"), (dict(columns=["missing"]), "missing"),
    (dict(level=95), "between 0 and 1"), (dict(n_repeats=0), "one repeat"), (dict(predict=lambda t: t["a"]*np.nan), "a finite number"),
    (dict(predict=lambda t: [1.0]), "1 values"), (dict(held_out=rows(1)), "two or more"), (dict(held_out=rows().head(0)), "two or more"),
    (dict(held_out=rows().assign(event=False)), "no value"), (dict(held_out=rows().drop(columns="event")), "event"),
    (dict(held_out=rows().assign(time_days=np.nan)), "time_days"), (dict(held_out=rows().assign(time_days=np.arange(24))), "the outcome differs"),
    (dict(held_out=rows().assign(partition=["train"] + ["test"]*23)), "partition train: P0"),
]


@pytest.mark.parametrize("changes, words", BAD_INPUTS)
def test_bad_input_is_refused(changes, words):
    arguments = dict(held_out=rows(), predict=risk, columns=COLUMNS, score="c") | changes
    with pytest.raises(DataError, match=words): permutation_importance(**arguments)


@pytest.mark.parametrize("partition", ["train", "test"])
def test_rows_of_training_are_refused_even_when_one(partition):
    table = rows().assign(partition="valid")
    table.loc[5, "partition"] = partition
    if partition == "test": assert len(permutation_importance(table, risk, COLUMNS, "c")) == 3
    else:
        with pytest.raises(DataError, match="partition train"): permutation_importance(table, risk, COLUMNS, "c")


@pytest.mark.parametrize("score, by", [("mse", "patient"), ("mse", "sample"), ("r2", "patient"), ("r2", "sample"), ("c", "patient"), ("c", "sample")])
def test_an_unused_column_has_no_drop_and_the_input_stays(score, by):
    table = rows()
    before = table.copy()
    found = permutation_importance(table, lambda t: 400 + 100*t["a"], COLUMNS, score, by).set_index("variable")
    assert (found.loc[["b", "c"], ["drop", "low", "high", "sd_repeats"]] == 0).all(axis=None) and found.loc["a", "drop"] != 0
    assert found["n_patients"].eq(8).all() and found["n_samples"].eq(24).all()
    pd.testing.assert_frame_equal(table, before)


def test_seed_repeats_and_index_does_not_matter():
    one, again = (permutation_importance(t, risk, COLUMNS, "c", seed=3) for t in (rows(), rows().set_index(np.arange(24) % 5)))
    pd.testing.assert_frame_equal(one, again)
    assert not one["drop"].equals(permutation_importance(rows(), risk, COLUMNS, "c", seed=4)["drop"])


def test_interval_with_more_patients_than_groups():
    table = rows(MOST_LEFT_OUT + 50, 1)
    table["time_days"] = 400 + 100*table["a"]
    found = permutation_importance(table, lambda t: 400 + 100*t["a"], ["a"], "mse", n_repeats=20).iloc[0]
    assert found["low"] < 20_000*table["a"].var() < found["high"] and found["low"] > 0


def test_two_patients_have_a_drop_without_interval():
    found = permutation_importance(rows(2).assign(event=True), risk, ["a"], "mse", n_repeats=1).iloc[0]
    assert np.isfinite(found["drop"]) and np.isnan([found["low"], found["high"], found["sd_repeats"]]).all()


def test_own_score():
    absolute = Score("MAE", lambda t, prediction: lambda weights: weights @ np.abs(t["time_days"].to_numpy() - prediction)/weights.sum(1), False)
    table = rows(3, 1).assign(a=[1.0, 2, 3], time_days=[1, 2, 3])
    assert permutation_importance(table, lambda t: t["a"], ["a"], absolute, n_repeats=2)["drop"][0] == pytest.approx(8/6)


def test_draw_rows_with_doubled_index():
    table = rows(4, 50).set_index(np.zeros(200, int))
    assert len(draw_rows(table, 40, "sample")) == 40 and draw_rows(table, 40)["patient_id"].value_counts().eq(10).all()
    with pytest.raises(DataError, match="patient, sample"): draw_rows(table, 40, "slice")


KINDS = [dict(), dict(fusion="gated"), dict(fusion="attention"), dict(inputs="tabular")]


@pytest.mark.parametrize("changes", KINDS)
def test_hybrid_net(changes):
    table, net = rows(4, 2), HybridNet(hybrid_config("quick", n_tabular=3, **changes)).train()
    image, before = images(8), {name: value.clone() for name, value in net.state_dict().items()}
    predict = net_predictor(net, image, COLUMNS, convert=lambda output: -output, batch_size=3)
    found = permutation_importance(table, predict, {"a and b": ["a", "b"], "c": ["c"]}, "c")
    assert np.isfinite(found["drop"]).all()
    baseline = fit_baseline(table.assign(partition="train"), COLUMNS)
    parts = integrated_gradients(net, image, tensor(table), baseline, batch_size=5)
    with evaluating(net), torch.no_grad():
        here = net(image, tensor(table))[:, 0]
        difference = (here - net(image, torch.tensor(baseline.values)[None].expand(8, -1))[:, 0]).numpy()
    np.testing.assert_allclose(predict(table), -here.numpy(), atol=1e-5)
    np.testing.assert_allclose(parts.values.sum(1), difference, atol=0.005*np.abs(difference).max() + 1e-4)
    np.testing.assert_allclose(patient_attributions(parts, table["patient_id"]).sum(axis=1), difference.reshape(4, 2).mean(1), atol=0.005*np.abs(difference).max() + 1e-4)
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items()) and all(p.grad is None for p in net.parameters())


def test_image_alone_has_nothing_to_attribute():
    table, net = rows(4, 2), HybridNet(hybrid_config("quick", n_tabular=3, inputs="image"))
    assert (permutation_importance(table, net_predictor(net, images(8), COLUMNS), COLUMNS, "c")["drop"] == 0).all()
    with pytest.raises(DataError, match="does not depend on the tabular"): integrated_gradients(net, images(8), tensor(table), Baseline(tuple(COLUMNS), (0.0,)*3, 4))


def test_a_missing_tabular_value_is_named():
    table, net = rows(4, 2), HybridNet(hybrid_config("quick", n_tabular=3, inputs="tabular"))
    table.loc[5, "b"] = np.nan
    with pytest.raises(DataError, match="not finite for row 5"): integrated_gradients(net, images(8), tensor(table), Baseline(tuple(COLUMNS), (0.0,)*3, 4))
    with pytest.raises(DataError, match="expected the rows of the images"): tabular_function(net, images(8))(tensor(table)[:3])
