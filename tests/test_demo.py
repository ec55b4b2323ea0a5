"""The main job from end to end, and a run that is killed in the middle."""
import subprocess
import sys
import time

import pandas as pd
import pytest

from brainmets.cli import main
from brainmets.phantom import write_phantom
from brainmets.tables import read_table


def test_demo_ends_in_a_report_and_goes_on_when_repeated(tmp_path, capsys):
    command = ["demo", "--out", str(tmp_path/"demo"), "--patients", "40"]
    assert main(command) == 0
    page = (tmp_path/"demo"/"report.html").read_text()
    assert "The cohort is a phantom" in page and "oracle: all that decides" in page
    assert (tmp_path/"demo"/"description"/"index.html").is_file() and read_table(tmp_path/"demo"/"problems.csv").empty
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"demo"/"run"/"members").rglob("*")}
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/"demo"/"run"/"members").rglob("*")} == before, "finished folds are not fitted again"


def test_demo_leaves_a_foreign_folder_alone(tmp_path, capsys):
    (tmp_path/"thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no demo" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("cohort")/"phantom", n_patients=60, images=False, seed=5, workers=1, progress=False)


def command(cohort, out):
    return ["run", "clinical", str(cohort), "--data", str(cohort.parent), "--out", str(out), "--workers", "1", "--set", "study.n_trees=20", "--set", "study.n_resamples=100", "--set", "study.inner_folds=2"]


@pytest.fixture(scope="module")
def whole(cohort, tmp_path_factory):
    "A run that nothing stopped."
    folder = tmp_path_factory.mktemp("whole")/"run"
    assert main(command(cohort, folder)) == 0
    return folder


def test_a_killed_run_goes_on_and_ends_the_same(cohort, whole, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "brainmets", *command(cohort, tmp_path/"killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path/"killed").glob("members/*/done.json")) and process.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    process.kill()
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path/"killed").glob("members/*/done.json")}
    assert 0 < len(done) < 5 and not (tmp_path/"killed"/"predictions.csv").exists(), "killed in the middle"
    assert main(command(cohort, tmp_path/"killed")) == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done
    for name in ("predictions.csv", "folds.csv", "metrics.csv"):
        assert (tmp_path/"killed"/name).read_bytes() == (whole/name).read_bytes(), name


def test_two_runs_with_one_seed_are_the_same(cohort, whole, tmp_path):
    assert main(command(cohort, tmp_path/"again")) == 0
    pd.testing.assert_frame_equal(read_table(whole/"predictions.csv"), read_table(tmp_path/"again"/"predictions.csv"), check_exact=True)
