"""Preprocessing of patients at 240 x 240 x 155: rows of `make bench` preprocess."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from brainmets.cohort import load_cohort
from brainmets.phantom import write_phantom
from brainmets.phantom_scanner import add_native_scans
from brainmets.prep.brain import brain_mask, load_atlas
from brainmets.prep.pipeline import PrepSettings, preprocess, read_unit, units_of
from brainmets.prep.registration import COARSE, FINE, LARGE, ants_library, around, register, thinned, to_ants, widened

FULL = (240, 240, 155)
ONE = """
import re, sys
from pathlib import Path
import pandas as pd
from brainmets.cohort import load_cohort
from brainmets.prep import pipeline

peaks = {}
class Measured(pipeline.Stages):
    "Stages that also note the peak memory of the process so far."
    def __call__(self, name):
        inner = super().__call__(name)
        class Both:
            def __enter__(_): return inner.__enter__()
            def __exit__(_, *error):
                peaks[name] = int(re.search("VmHWM: *\\s*(\\d+)", open("/proc/self/status").read())[1])/1024   # ru_maxrss would start at the peak of the parent
                return inner.__exit__(*error)
        return Both()
pipeline.Stages = Measured
cohort = load_cohort(sys.argv[1], sys.argv[2])
row = pipeline.prepare_unit(pipeline.units_of(cohort.images)[0], Path(sys.argv[2]), Path(sys.argv[3]), pipeline.PrepSettings(), "mni152")
assert row["status"] == "made", row
for name, peak in peaks.items(): print(name, row["seconds_" + name], peak)
print("all", row["seconds"], max(peaks.values()))
"""


def by_stage(manifest, data, out):
    "One patient in a process of its own: seconds and peak memory so far (MB, imports included) after each stage."
    done = subprocess.run([sys.executable, "-c", ONE, str(manifest), str(data), str(out)], capture_output=True, text=True, check=True)
    row = {"what": "one patient, four sequences, 240 x 240 x 155, by stage", "load_of_machine": round(os.getloadavg()[0], 1)}
    for name, seconds, peak in (line.split() for line in done.stdout.splitlines()):
        row |= {f"seconds_{name}": float(seconds), f"peak_mb_after_{name}": round(float(peak))}
    return row


def speed_up(cohort, out):
    "Two patients by one process, and by two."
    seconds = {}
    for workers in (1, 2):
        began = time.perf_counter()
        preprocess(cohort, out/str(workers), PrepSettings(), workers=workers)
        seconds[workers] = time.perf_counter() - began
    return {"what": "two patients", "load_of_machine": round(os.getloadavg()[0], 1), "seconds_one_worker": seconds[1], "seconds_two_workers": seconds[2], "speed_up": seconds[1]/seconds[2]}


def direct(fixed, moving, mask, kind="Rigid"):
    "Seconds of processor time of the two ANTs calls that `register` makes, called directly on images that lie ready."
    ants = ants_library()
    fixed, mask = around(fixed, mask)
    look, inside = thinned(fixed, mask)
    images, region = (to_ants(fixed), to_ants(moving)), to_ants(look.like(widened(inside, look.spacing_mm, 5.0).astype("float32")))
    levels = 3 if fixed.array.size > LARGE else 4
    began = time.process_time()
    found = ants.registration(*images, type_of_transform=kind, **{name: values[:levels] for name, values in COARSE.items()})
    ants.registration(*images, type_of_transform=kind, initial_transform=found["fwdtransforms"], mask=region, mask_all_stages=True, **FINE)
    return time.process_time() - began


def against_ants(cohort):
    "Our registrations of one patient against ANTs called directly for the same ones."
    atlas = load_atlas()
    scans = read_unit(units_of(cohort.images)[0], cohort.data_dir, "t1ce")
    brain, _ = brain_mask(scans["t1ce"], atlas)
    jobs = [(scans[s], scans["t1ce"], brain) for s in ("t1", "t2", "flair")] + [(scans["t1ce"].like(scans["t1ce"].array*brain), atlas.template, atlas.brain)]
    began = time.process_time()
    for moving, fixed, mask in jobs: register(moving, fixed, mask)
    ours = time.process_time() - began
    theirs = sum(direct(fixed, moving, mask) for moving, fixed, mask in jobs)
    return {"what": "four registrations of one patient, processor time", "seconds": ours, "reference": "antspyx called directly", "reference_seconds": theirs, "ratio": ours/theirs}


def bench_preprocess():
    "Rows of the table, each as soon as it is there."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_phantom(folder/"c", n_patients=2, shape=FULL, progress=False)
        manifest = add_native_scans(folder/"c", progress=False)
        cohort = load_cohort(manifest, folder/"c")
        yield by_stage(manifest, folder/"c", folder/"one")
        yield against_ants(cohort)
        yield speed_up(cohort, folder)
