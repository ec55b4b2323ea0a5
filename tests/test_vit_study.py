"""System C as a study: small nets on a phantom, jobs and kills, several processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainmets.cli import main
from brainmets.phantom import write_phantom
from brainmets.splits import assert_disjoint
from brainmets.studies.vit_cox import run_vit_cox, vit_text
from brainmets.studies.vit_settings import vit_study_config
from brainmets.tables import DataError, read_table

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = dict(n_folds=2, n_members=2, epochs=2, batch_size=3, n_events="1+2", accumulate=2, n_resamples=20, hidden=8, mlp=8, layers=1, checkpoint_seconds=0.0, radiomics="volumes")
SCRIPT = """
import sys, json, torch
torch.set_num_threads(1)
from brainmets.studies.vit_cox import run_vit_cox
from brainmets.studies.vit_settings import vit_study_config
home, out, fold, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
run_vit_cox(f"{home}/cohort/phantom.toml", f"{home}/cohort", out, vit_study_config("quick", **settings), cache_dir=f"{home}/crops", fold=None if fold == "all" else int(fold))
"""


def words(home, out, fold="all", **settings): return [sys.executable, "-c", SCRIPT, str(home), str(out), str(fold), json.dumps({**TINY, **settings})]


def command(home, out, *more):
    "Words for `brainmets`."
    chosen = [word for name, value in TINY.items() for word in ("--set", f"study.{name}={value}")]
    return ["run", "vit-cox", str(home/"cohort"/"phantom.toml"), "--data", str(home/"cohort"), "--out", str(out), "--cache", str(home/"crops"), "--workers", "1", *chosen, *map(str, more)]


def study(home, out, fold=None, collect=False, **settings):
    return run_vit_cox(home/"cohort"/"phantom.toml", home/"cohort", out, vit_study_config("quick", **{**TINY, **settings}), cache_dir=home/"crops", fold=fold, collect=collect)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    write_phantom(folder/"cohort", 24, seed=5, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def finished(home): return study(home, home/"run")


def test_run_leaves_what_every_study_leaves(finished):
    for name in ("config.toml", "samples.csv", "folds.csv", "predictions.csv", "metrics.csv", "comparisons.csv", "ensembles.csv", "validation.csv", "volume.csv", "latency.csv", "nets.csv", "hashes.csv", "audit.md", "provenance.json", "summary.json"):
        assert finished.path(name).is_file(), name
    table = read_table(finished.path("predictions.csv"))
    assert {"vit", "vit-rank", "vit-net-0", "vit-net-1", "volume", "cox-clinical", "cox", "radiomics cox", "radiomics forest"} <= set(table.model)
    mine = table[table.model == "vit"]
    assert_disjoint(mine[["repeat", "fold", "patient_id", "partition"]].assign(inner_fold=-1))
    assert mine.groupby(["fold", "patient_id"]).size().max() == 1 and (mine.groupby("fold").size() == 24).all()
    assert set(mine.partition) == {"train", "test"} and mine[mine.partition == "test"].patient_id.is_unique
    assert json.loads(finished.path("audit.json").read_text())["counts"]["void"] == 0
    assert "oracle, all" in vit_text(finished)


def test_no_net_learns_from_whom_it_stops_on_or_predicts(finished):
    "Each training patient of a fold is watched by exactly one of its nets."
    folds, validation = read_table(finished.path("folds.csv")), read_table(finished.path("validation.csv"))
    for member, part in validation.groupby("member"):
        train = folds[(folds.fold == int(member[-1])) & (folds.partition == "train")]
        assert part.n_patients.sum() == len(train) and sorted(part.n_patients) == sorted(train.inner_fold.value_counts())


def test_folds_as_jobs_at_a_time_equal_one_run(finished, home):
    "Two processes start together in one new folder; the collection trains nothing and writes the report. All on the command line."
    brainmets = [sys.executable, "-c", "import sys; from brainmets.cli import main; sys.exit(main())"]
    started = [subprocess.Popen([*brainmets, *command(home, home/"jobs", "--fold", k)], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for k in (0, 1)]
    for process in started: assert process.wait() == 0, process.stderr.read().decode()[-2000:]
    written = {p: p.stat().st_mtime_ns for p in (home/"jobs").rglob("best.safetensors")}
    assert main(command(home, home/"jobs", "--collect")) == 0
    page = (home/"jobs"/"report.html").read_text()
    assert all(words in page for words in ("Single nets and their ensembles", "Size and latency", "No finding voids the result"))
    assert (home/"jobs"/"predictions.csv").read_bytes() == finished.path("predictions.csv").read_bytes()
    assert len(written) == 4 and written == {p: p.stat().st_mtime_ns for p in (home/"jobs").rglob("best.safetensors")}


def test_run_is_explained_and_knows_its_own_patients(finished, home, tmp_path, capsys):
    "On the command line: maps of the run's own patients; as an external cohort they are refused."
    cohort = [str(finished.folder), str(home/"cohort"/"phantom.toml"), "--data", str(home/"cohort"), "--workers", "1"]
    assert main(["explain", *cohort, "--out", str(tmp_path/"maps")]) == 0
    assert (tmp_path/"maps"/"explain.html").is_file() and len(list((tmp_path/"maps"/"maps").glob("*_relevance.nii.gz"))) == 24
    assert main(["predict", *cohort, "--out", str(tmp_path/"again.csv")]) == 1 and "are patients of the run" in capsys.readouterr().err
    assert not (tmp_path/"again.csv").exists()


def test_killed_run_goes_on_and_ends_the_same(finished, home):
    process, out = subprocess.Popen(words(home, home/"killed"), env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL), home/"killed"
    checkpoint, until = out/"members"/"repeat-0_fold-1"/"vit"/"inner-0"/"checkpoint.json", time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until: time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (out/"predictions.csv").exists()
    assert subprocess.run(words(home, out), env=ENVIRONMENT, cwd=ROOT).returncode == 0
    assert (out/"predictions.csv").read_bytes() == finished.path("predictions.csv").read_bytes()


def test_test_centers_and_another_endpoint(home, tmp_path):
    "The published protocol on local failure: train at center A, test at B; nets as jobs."
    manifest, local = home/"cohort"/"phantom.toml", {"outcome.time": "Time to local failure (days)", "outcome.event": "Local failure", "outcome.name": "local failure"}
    config = vit_study_config("quick", **{**TINY, "protocol": "centers", "test_centers": "B", "way": "random", "keep": "last", "compared": "deepsurv"})
    for k in (1, 0): run_vit_cox(manifest, home/"cohort", tmp_path/"run", config, local, home/"crops", fold=k)
    run = run_vit_cox(manifest, home/"cohort", tmp_path/"run", config, local, home/"crops", collect=True)
    table, samples = read_table(run.path("predictions.csv")), read_table(run.path("samples.csv")).set_index("patient_id")
    assert (samples.center[table.patient_id[table.partition == "test"]] == "B").all() and (samples.center[table.patient_id[table.partition == "train"]] == "A").all()
    assert {"vit", "deepsurv", "deepsurv-rank"} <= set(table.model)
    assert (read_table(run.path("validation.csv")).best_epoch == 2).all(), "the last epoch is kept"


def test_two_processes_take_the_same_steps(home, tmp_path):
    "gloo on the CPU through torchrun: losses of all epochs as in one process, to 1e-5. Plain gradient steps: Adam divides by the size of a gradient, which blows up rounding where that is near 0."
    settings = {"dropout": 0.0, "epochs": 3, "optimiser": "sgd", "lr": 0.05, "weight_decay": 0.0}
    (tmp_path/"study.py").write_text(SCRIPT)
    one, two = words(home, tmp_path/"one", 0, **settings), [str(home), str(tmp_path/"two"), "0", json.dumps({**TINY, **settings})]
    assert subprocess.run(one, env=ENVIRONMENT, cwd=ROOT).returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path/"study.py"), *two], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for net in ("inner-0", "inner-1"):
        a, b = (pd.read_csv(tmp_path/name/"members"/"repeat-0_fold-0"/"vit"/net/"history.csv") for name in ("one", "two"))
        assert np.allclose(a[["train_loss", "valid_loss"]], b[["train_loss", "valid_loss"]], rtol=0, atol=1e-5), (a, b)
        assert a.train_loss.nunique() == 3 and a.train_loss.gt(0).all()


def test_bad_settings_are_refused(home, tmp_path):
    assert main(command(home, tmp_path/"both", "--fold", 0, "--collect")) == 1 and not (tmp_path/"both").exists()
    for wrong, said in (({"compared": "vit-imgae"}, "image"), ({"other_mask": "mask"}, "two sets"), ({"net": "vti"}, "vit"), ({"test_centers": "B"}, "protocol"), ({"n_members": 1}, "2 or more")):
        with pytest.raises(DataError, match=said): vit_study_config("quick", **wrong)
    with pytest.raises(DataError, match="lacks jobs 0, 1"): study(home, tmp_path/"empty", collect=True)
    with pytest.raises(DataError, match="expected 0 to 1"): study(home, tmp_path/"empty", fold=7)
