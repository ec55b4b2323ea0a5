"""Timings, each as a ratio against a named reference in the same run. `make bench` writes bench-results/bench.csv.

`check`: tables and headers of 1,000 phantom patients, against a bare loop that opens the same files with nibabel and
reads the shape and the affine. Peak memory is that of the process that checks, imports included (Linux: VmHWM).
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib

from brainmets.phantom import write_phantom
from brainmets.tables import write_table

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


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--patients", type=int, default=1000)
    row = bench_check(options.parse_args().patients)
    import pandas as pd
    table = pd.DataFrame([row])
    write_table(ROOT/"bench-results"/"bench.csv", table)
    print(table.T.to_string(header=False))
