"""Checklists of a real small run: every item once, numbers from the tables of the run only, the authors' answers kept."""
import json
import re
import shutil
import warnings

import numpy as np
import pytest

from brainmets.checklists import (ANSWERS, CHECKLISTS, CONDITIONS, DEPENDS, ITEMS, WEIGHTS, fill_checklist, fill_checklists, fill_conditions, metrics_score, model_card,
                                  read_answers, read_facts, write_checklists)
from brainmets.phantom import write_phantom
from brainmets.studies.clinical import clinical_config, run_clinical
from brainmets.tables import DataError, read_table

FILES = {"answers.toml", *(f"{c.file}.{kind}" for c in CHECKLISTS.values() for kind in ("md", "json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run that no test writes to."
    folder = tmp_path_factory.mktemp("checklists")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manifest = write_phantom(folder/"cohort", 60, images=False, seed=3, workers=1, progress=False)
        config = clinical_config(n_folds=2, inner_folds=2, n_trees=5, n_resamples=50, horizons_months=(12,))
        return run_clinical(manifest, folder/"cohort", folder/"run", config).folder


@pytest.fixture
def run(finished, tmp_path):
    "A copy of the run to write into."
    return shutil.copytree(finished, tmp_path/"run")


def test_every_list_has_its_items():
    numbers = {name: [i.number for i in c.items] for name, c in CHECKLISTS.items()}
    assert {name: len(found) for name, found in numbers.items()} == {"tripod_ai": 52, "claim": 44, "metrics": 30, "model_card": 22}
    assert len({re.match(r"\d+", n)[0] for n in numbers["tripod_ai"]}) == 27
    assert numbers["claim"] == [str(n) for n in range(1, 45)] and numbers["metrics"] == [str(n) for n in range(1, 31)]
    assert len({i.section for i in CHECKLISTS["metrics"].items}) == len({i.section for i in CHECKLISTS["model_card"].items}) == 9
    assert len({i.asks for i in ITEMS.values()}) > 140 and all(i.section for i in ITEMS.values())
    assert set(WEIGHTS) == set(numbers["metrics"]) and set(ANSWERS) <= set(ITEMS)


def test_a_status_says_what_the_row_holds(finished):
    for table in fill_checklists(finished).values():
        text, still = table.answer != "", table.still != ""
        assert (text == (table.status != "ask")).all() and (still == (table.status == "partly")).all()
        assert (table.by[text] == "run").all()


def test_context_is_asked_of_real_patients(run):
    summary = json.loads((run/"summary.json").read_text())
    summary["cohort"]["synthetic"] = False
    (run/"summary.json").write_text(json.dumps(summary))
    status = {f"{name}.{r.number}": r.status for name, t in fill_checklists(run).items() for r in t.itertuples()}
    for key in ("tripod_ai.3a", "tripod_ai.5b", "tripod_ai.17", "tripod_ai.18a", "tripod_ai.19", "claim.5", "claim.11", "claim.44", "model_card.2a", "model_card.8a"): assert status[key] == "ask", key


def rows_of(run):
    "Rows of the tables that answers may quote, by model, metric and scope."
    groups, pairs = read_table(run/"subgroups.csv"), read_table(run/"comparisons.csv")
    groups = groups.assign(scope=groups.subgroup + " = " + groups.group)
    pairs = pairs.assign(model=pairs.model_a + " less " + pairs.model_b, scope="difference")
    tables = (read_table(run/"metrics.csv"), groups[groups.subgroup != "all"], pairs)
    return {(r["model"], r["metric"], r["scope"]): r for t in tables for r in t.to_dict("records")}


def test_every_number_of_a_result_is_in_a_table_of_the_run(finished):
    rows, n = rows_of(finished), 0
    shown = r"(-?\d+\.\d{3}) \(95 % interval (-?\d+\.\d{3}) to (-?\d+\.\d{3}); (\d+) patients, (\d+) events\)(?:; p (\d\.\d{3}), corrected (\d\.\d{3}) .*)?"
    for row in (row for table in fill_checklists(finished).values() for row in table.itertuples()):
        lines = [line[2:] for line in row.answer.splitlines() if line.startswith("- ") and " interval " in line]
        assert len(lines) == row.answer.count(" % interval ")
        for line in lines:
            (model, metric, scope), source = next((key, r) for key, r in rows.items() if line.startswith(f"{key[0]}: {key[1]}, {key[2]}, "))
            *numbers, patients, events, p, corrected = re.fullmatch(shown, line.removeprefix(f"{model}: {metric}, {scope}, ")).groups()
            assert [float(v) for v in numbers] == pytest.approx([source["estimate"], source["low"], source["high"]], abs=5.1e-4)
            assert [int(patients), int(events)] == [source["n_patients"], source["n_events"]]
            if p: assert [float(p), float(corrected)] == pytest.approx([source["p"], source["p_adjusted"]], abs=5.1e-4)
            n += 1
    assert n > 50


def test_files_hold_the_same_and_are_whole(run):
    folder = write_checklists(run)
    assert {p.name for p in folder.iterdir()} == FILES
    for name, c in CHECKLISTS.items():
        stored, text = json.loads((folder/f"{c.file}.json").read_text()), (folder/f"{c.file}.md").read_text()
        assert [i["number"] for i in stored["items"]] == [i.number for i in c.items] and sum(stored["status"].values()) == len(c.items)
        for item in stored["items"]: assert f"### {item['number']} · " in text and item["asks"] in text
    assert (folder/"model_card.md").read_text() == model_card(run)


def test_answers_are_kept_and_laid_over(run):
    folder = write_checklists(run)
    assert not any(read_answers(folder/"answers.toml").values())
    mine = (folder/"answers.toml").read_text().replace('# "18a" = ""', '"18a" = "A <fund>, without a part in it."').replace('# "19" = ""', '"19" = "Yes, scanners."')
    (folder/"answers.toml").write_text(mine)
    for _ in range(2): write_checklists(run)
    assert (folder/"answers.toml").read_text() == mine
    text = (folder/"tripod_ai.md").read_text()
    assert "### 18a · filled, answered by the authors" in text and "A &lt;fund&gt;, without" in text
    assert {i["number"]: i["met"] for i in json.loads((folder/"metrics.json").read_text())["items"]}["19"] is True


@pytest.mark.parametrize("answers, message", [
    ({"tripod": {"1": "x"}}, "did you mean 'tripod_ai'"), ({"tripod_ai": {"18g": "x"}}, "no item '18g': did you mean '18"), ({"claim": {"45": "x"}}, "claim has no item '45': did you mean"),
    ({"metrics": {"18": "maybe"}}, "begins with yes or no"), ({"claim": {"5": 1}}, "expected text in quotes"), ({"claim": "x"}, "expected a table of items")])
def test_answers_that_land_nowhere_are_refused(run, answers, message):
    with pytest.raises(DataError, match=message): write_checklists(run, answers)
    assert not (run/"checklists").exists()


def test_an_unfinished_run_has_no_checklists(run):
    (run/"metrics.csv").unlink()
    with pytest.raises(DataError, match="is not finished: no metrics.csv"): write_checklists(run)


def calculator(met, applies):
    "The authors' online calculator: weight of yes over weight of yes and no."
    yes = sum(w for n, w in WEIGHTS.items() if applies[n] and met[n])
    return 100*yes/sum(w for n, w in WEIGHTS.items() if applies[n])


def test_the_score_is_that_of_the_calculator_and_its_range_holds_it(finished):
    rng, facts = np.random.default_rng(0), read_facts(finished)
    table = fill_checklist("metrics", facts, {})
    open_score = metrics_score(table, fill_conditions(facts, {}))
    assert 0 < open_score.lowest < open_score.highest < 100 and open_score.n_open > 10
    decided = {r.number: r.met for r in table.itertuples() if r.met is not None}
    for _ in range(10):
        met = {n: bool(rng.random() < 0.5) for n in WEIGHTS} | decided
        holds = {c.number: bool(rng.random() < 0.5) for c in CONDITIONS} | {"C4": True, "C5": False}
        answers = {"metrics": {key: "yes" if value else "no" for key, value in (met | holds).items()}}
        score = metrics_score(fill_checklist("metrics", facts, answers), holds)
        expected = calculator(met, {n: all(holds[c] for c in DEPENDS.get(n, ())) for n in WEIGHTS})
        assert score.n_open == 0 and score.lowest == score.highest == pytest.approx(expected)
        assert open_score.lowest - 1e-9 <= expected <= open_score.highest + 1e-9


def test_answers_of_the_first_call_are_stored_and_a_missing_file_is_refused(run):
    with pytest.raises(DataError, match="No answers at 'mine.toml'"): write_checklists(run, run/"mine.toml")
    folder = write_checklists(run, {"claim": {"5": 'Said "retrospective".\nTwice.'}, "metrics": {"C1": "no"}})
    assert {k: v for k, v in read_answers(folder/"answers.toml").items() if v} == {"claim": {"5": 'Said "retrospective".\nTwice.'}, "metrics": {"C1": "no"}}
    write_checklists(run)
    assert "### 5 · filled, answered by the authors" in (folder/"claim.md").read_text()
    assert [i["status"] for i in json.loads((folder/"metrics.json").read_text())["items"]][7:10] == ["not applicable"]*3
