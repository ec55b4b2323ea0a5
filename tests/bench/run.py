"""Timings, each as a ratio against a named reference in the same run. `make bench` writes one csv for each into bench-results/.

`check`: tables and headers of 1,000 phantom patients, against a bare loop that opens the same files with nibabel and
reads the shape and the affine. Peak memory is that of the process that checks, imports included (Linux: VmHWM).

`metrics`: all survival metrics of one model with 1,000 resamples, on 2,000 and 20,000 patients, against scikit-survival's functions in a
loop over the same resamples. The loop is timed on the first few of them (their number stands in the table) and scaled to 1,000; its values
must equal ours.

`slices`: reading slices in random order from the cache, against unpacking the NIfTI file for each and against one PNG file each (all give
the same pictures); a step of training, against a plain PyTorch loop that ends with the same weights; peak memory of an epoch over 64,231
slices; and such an epoch on the card, where there is one. On one thread; the load of the machine stands in the table. Steps are timed in
three ways: the slope between a short and a long epoch, its processor time, and the median from one batch to the next.

`preprocess`: two phantom patients as a scanner delivers them, made from 240 x 240 x 155 voxels: seconds and peak memory by stage, two workers
against one, and our registrations against ANTs called directly for the same ones.

`vit`: the vision transformer at full size on one thread: a crop from the cache, against MONAI transforms that read the volumes and against
cutting it each time; a step of the training loop, against a plain one that ends with the same weights; a risk; and a training step, against
MONAI's ViT with einsum attention at the size of the public code of Erdur et al. (2025), by patient and by voxels that the net sees. Where there is a card:
steps in bf16 and compiled, against float32 with einsum attention, and five folds of 100 epochs extrapolated from measured ones.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import pandas as pd

from brainmets.phantom import write_phantom
from brainmets.tables import write_table
from metrics import looped_seconds
from preprocess import bench_preprocess
from slices import bench_slices
from vit import bench_vit

ROOT = Path(__file__).resolve().parent.parent.parent
CHECK = """
import re, sys, time
from brainmets.checks import check
import brainmets.checks as checks
def no_voxels(path): raise AssertionError(f"a volume was read: {path}")
checks.read_voxels = no_voxels
began = time.perf_counter()
cohort = check(sys.argv[1], sys.argv[2], voxels=False, n_workers=1)
seconds = time.perf_counter() - began
assert len(cohort.images) == 5*cohort.n_patients, "not all files were found"
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(seconds, int(peak)/1024, cohort.n_patients)
"""


def bare_headers(files):
    "The reference: seconds to open every file with nibabel and read its shape and affine."
    began = time.perf_counter()
    for file in files:
        image = nib.load(file)
        _ = image.shape, image.affine
    return time.perf_counter() - began


def bench_check(n_patients):
    "One row of results for `brainmets check --headers-only`."
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_phantom(Path(folder)/"cohort", n_patients=n_patients, shape=(16, 16, 16), workers=2, progress=False)
        files = sorted((Path(folder)/"cohort").rglob("*.nii.gz"))
        bare_headers(files)                                             # warm the cache of the file system
        reference = bare_headers(files)
        done = subprocess.run([sys.executable, "-c", CHECK, str(manifest), str(manifest.parent)], capture_output=True, text=True, check=True)
    seconds, memory, n = map(float, done.stdout.split()[-3:])
    return {"what": "check, tables and headers", "n_patients": int(n), "n_files": len(files), "seconds_per_1000": 1000*seconds/n, "peak_memory_mb": memory,
            "reference": "nibabel, shape and affine of the same files", "reference_seconds_per_1000": 1000*reference/n, "ratio": seconds/reference}


METRICS = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
from metrics import planted_predictions
from brainmets.evaluate.metrics import evaluate_survival
evaluate_survival(planted_predictions(200), n_resamples=20)      # compile
predictions = planted_predictions(int(sys.argv[2]))
began = time.perf_counter()
table = evaluate_survival(predictions, n_resamples=1000)
seconds = time.perf_counter() - began
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(seconds, int(peak)/1024, table.low.notna().sum())
"""


def bench_metrics(n_patients, n_looped):
    "One row of results for all survival metrics with 1,000 resamples."
    done = subprocess.run([sys.executable, "-c", METRICS, str(Path(__file__).parent), str(n_patients)], capture_output=True, text=True, check=True)
    seconds, memory, n_metrics = map(float, done.stdout.split()[-3:])
    reference = 1000*looped_seconds(n_patients, n_looped)/n_looped
    return {"what": "all survival metrics, 1,000 resamples", "n_patients": n_patients, "n_metrics": int(n_metrics), "seconds": seconds, "peak_memory_mb": memory,
            "reference": f"scikit-survival in a loop, timed on {n_looped} resamples", "reference_seconds": reference, "times_faster": reference/seconds}


BENCHES = {"check": lambda: [bench_check(1000)], "metrics": lambda: [bench_metrics(2000, 20), bench_metrics(20000, 2)], "slices": bench_slices, "preprocess": bench_preprocess, "vit": bench_vit}

if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("what", nargs="*", default=list(BENCHES), help=f"of {', '.join(BENCHES)}; default all")
    for what in options.parse_args().what:
        rows = []
        for row in BENCHES[what]():                        # each row is printed and kept when it is there: some take minutes
            print(pd.Series(row).to_string(), end="\n\n", flush=True)
            write_table(ROOT/"bench-results"/f"{what}.csv", pd.DataFrame(rows := [*rows, row]))
