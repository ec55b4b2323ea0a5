"""Every notebook runs from top to bottom, as `nbdev-test` runs it.

Each runs in a process of its own, forked from one that has imported the large libraries once and has done nothing else:
importing them anew for every notebook took a third of the time.
"""
import multiprocessing
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
LARGE = ("nbdev.test", "matplotlib.pyplot", "pandas", "scipy.stats", "sklearn", "lifelines", "sksurv.metrics", "torch", "torchvision",
         "fastai.vision.all", "timm", "monai.networks.nets", "monai.transforms", "ants")


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LARGE))
    return context


def run_notebook(notebook, said):
    "The call behind `nbdev-test`, in this process; what it prints goes into the file `said`."
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # for processes of the notebook, as in a shell
    from joblib.externals.loky import get_reusable_executor
    from nbdev.test import nbdev_test
    try: nbdev_test(notebook, n_workers=0)
    finally: get_reusable_executor().shutdown()  # a forked process waits for its workers before joblib would send them home


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook, processes, tmp_path):
    process = processes.Process(target=run_notebook, args=(str(notebook), str(tmp_path/"said.txt")))
    process.start()
    process.join()
    said = (tmp_path/"said.txt").read_text()
    assert process.exitcode == 0, said[-4000:]
    assert "Success." in said
