"""Every refusal, through the command line as a user meets it: one damaged cohort after another, and the message each gets."""
import gzip
import struct

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainmets.cli import main
from brainmets.tables import read_table

MANIFEST = """
[cohort]
name = "small"
title = "A small cohort"
citation = "none"
licence = "CC0-1.0"
obtain = "made by the test"
[table]
file = "clinical.csv"
row = "patient"
patient = "ID"
missing = ["", "NA"]
[outcome]
name = "overall survival"
type = "survival"
time = "OS"
unit = "days"
event = "Death"
happened = ["1"]
censored = ["0"]
[covariates.age]
column = "Age"
type = "number"
unit = "years"
range = [18, 110]
[covariates.primary]
column = "Primary"
type = "category"
values = { lung = ["Lung", "NSCLC"], melanoma = ["Melanoma"] }
[images]
layout = "pattern"
root = "scans"
mask = "{patient}/seg.nii.gz"
[images.sequences]
t1ce = "{patient}/t1ce.nii.gz"
[labels]
necrosis = 1
edema = 2
enhancing = 3
"""
N = 12


class SmallCohort:
    "Twelve sound patients on disk; tests damage them."

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.folder, self.ids = folder, [f"p{i:02d}" for i in range(N)]
        self.table = pd.DataFrame({"ID": self.ids, "OS": rng.integers(30, 900, N), "Death": [1, 0]*(N//2), "Age": rng.integers(40, 80, N), "Primary": ["Lung", "Lung", "Melanoma"]*(N//3)}).astype(str)
        for i, name in enumerate(self.ids):
            self.image(name, rng.random((8, 8, 8)).astype(np.float32) + 1)
            self.image(name, rng.integers(0, 4, (8, 8, 8)).astype(np.uint8), "seg.nii.gz")
        self.manifest = MANIFEST

    def image(self, patient, array, file="t1ce.nii.gz", affine=None):
        path = self.folder/"scans"/patient/file
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
        image.set_sform(image.affine, 1)
        nib.save(image, path)
        return path

    def check(self, *more):
        "Exit code and table of problems of `brainmets check`."
        if self.table is not None: self.table.to_csv(self.folder/"clinical.csv", index=False)
        (self.folder/"small.toml").write_text(self.manifest)
        status = main(["check", str(self.folder/"small.toml"), "--data", str(self.folder), "--out", str(self.folder/"problems.csv"), "--workers", "1", *more])
        return status, read_table(self.folder/"problems.csv").fillna("").astype(str)


@pytest.fixture
def small(tmp_path): return SmallCohort(tmp_path)


def patch_spacing(path, value):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = struct.pack("<f", value)
    path.write_bytes(gzip.compress(bytes(content)))


def test_a_sound_cohort_has_no_problem(small):
    status, table = small.check()
    assert status == 0 and table.empty


def set_cell(column, value, row=3):
    def damage(small): small.table.loc[row, column] = value
    return damage


def negative_mask(small): small.image("p03", np.full((8, 8, 8), 1.5, np.float32), "seg.nii.gz")
def nan_voxel(small): small.image("p03", np.where(np.arange(512).reshape(8, 8, 8) == 7, np.nan, 1.5).astype(np.float32))
def inf_voxel(small): small.image("p03", np.where(np.arange(512).reshape(8, 8, 8) == 7, np.inf, 1.5).astype(np.float32))
def other_grid(small): small.image("p03", np.ones((8, 8, 8), np.uint8), "seg.nii.gz", np.diag([1, 1, 1.2, 1]))
def truncated(small):
    path = small.folder/"scans/p03/t1ce.nii.gz"
    path.write_bytes(path.read_bytes()[:-300])
def same_scan(small): small.image("p03", np.asanyarray(nib.load(small.folder/"scans/p07/t1ce.nii.gz").dataobj).astype(np.float64))
def outcome_column(small):
    small.table["Survival_days"] = small.table.OS
    small.manifest += '[covariates.survival_days]\ncolumn = "Survival_days"\ntype = "number"\n'
def event_column(small):
    small.table["Status"] = small.table.Death.map({"1": "dead", "0": "alive"})
    small.manifest += '[covariates.status]\ncolumn = "Status"\ntype = "category"\n'
def three_spellings(small): small.table.loc[[1, 2, 3], "Primary"] = ["lung ca", "LUNG", "non small cell"]
def no_images(small):
    for path in (small.folder/"scans/p03").iterdir(): path.unlink()


CASES = {
    "missing file": (lambda s: (s.folder/"scans/p03/t1ce.nii.gz").unlink(), "missing-file", "no file for t1ce", "fatal"),
    "no NIfTI": (lambda s: (s.folder/"scans/p03/t1ce.nii.gz").write_bytes(b"GIF89a"), "unreadable", "no readable NIfTI", "fatal"),
    "truncated gzip": (truncated, "unreadable", "truncated", "fatal"),
    "5-D file": (lambda s: s.image("p03", np.ones((4, 4, 4, 2, 2), np.float32)), "unreadable", "5 dimensions", "fatal"),
    "zero spacing": (lambda s: patch_spacing(s.folder/"scans/p03/t1ce.nii.gz", 0.0), "unreadable", "spacing (0.0, 1.0, 1.0) mm", "fatal"),
    "NaN spacing": (lambda s: patch_spacing(s.folder/"scans/p03/t1ce.nii.gz", float("nan")), "unreadable", "spacing (nan, 1.0, 1.0) mm", "fatal"),
    "other geometry": (other_grid, "geometry", "allowed 0.1 mm", "fatal"),
    "other shape": (lambda s: s.image("p03", np.ones((8, 8, 7), np.uint8), "seg.nii.gz"), "geometry", "shape (8, 8, 8) against (8, 8, 7)", "fatal"),
    "label outside the map": (lambda s: s.image("p03", np.full((8, 8, 8), 4, np.uint8), "seg.nii.gz"), "mask-labels", "labels 4 are not in the label map", "fatal"),
    "mask of fractions": (negative_mask, "mask-values", "are no labels", "fatal"),
    "empty mask": (lambda s: s.image("p03", np.zeros((8, 8, 8), np.uint8), "seg.nii.gz"), "mask-empty", "the mask is empty", "warning"),
    "NaN voxels": (nan_voxel, "invalid-voxels", "1 of 512 voxels are NaN or infinite", "fatal"),
    "infinite voxels": (inf_voxel, "invalid-voxels", "1 of 512 voxels are NaN or infinite", "fatal"),
    "constant image": (lambda s: s.image("p03", np.full((8, 8, 8), 5, np.float32)), "constant", "all voxels are 5", "fatal"),
    "duplicate patient": (set_cell("ID", "p02"), "duplicate", "'p02' stands in 2 rows", "fatal"),
    "patient without images": (no_images, "no-images", "stands in the table and has no images", "fatal"),
    "images without patient": (lambda s: s.image("stranger", np.ones((8, 8, 8), np.float32)), "not-in-table", "whom the table does not list", "warning"),
    "negative time": (set_cell("OS", "-5"), "time-negative", "time -5 days in row 5 is negative", "fatal"),
    "missing time": (set_cell("OS", "NA"), "time-missing", "no time in row 5", "fatal"),
    "implausible unit": (lambda s: s.table.__setitem__("OS", [str(3*i + 2) for i in range(N)]), "time-unit", "Is it a longer unit, such as months?", "question"),
    "event outside its coding": (set_cell("Death", "dead"), "event-coding", "event 'dead' in row 5; the coding knows happened ['1'] and censored ['0']", "fatal"),
    "missing event": (set_cell("Death", ""), "event-missing", "no event in row 5; it is never imputed", "fatal"),
    "age 15000": (set_cell("Age", "15000"), "out-of-range", "age 15000 in row 5 is outside 18 to 110 years", "fatal"),
    "outcome among the features": (outcome_column, "outcome-derived", "determines the outcome (agreement 1.000", "fatal"),
    "event among the features": (event_column, "outcome-derived", "determines the outcome (agreement 1.000", "fatal"),
    "identical image": (same_scan, "identical-image", "patients p03, p07", "fatal"),
    "path that leaves the folder": (lambda s: setattr(s, "manifest", s.manifest.replace('"{patient}/t1ce', '"../{patient}/t1ce')), "table", "leaves the data folder", "fatal"),
    "three spellings": (three_spellings, "spelling", "is not mapped", "fatal"),
    "unknown column": (lambda s: setattr(s, "manifest", s.manifest.replace('"Age"', '"Aeg"')), "no-column", "the table lacks", "fatal"),
    "question of the manifest": (lambda s: setattr(s, "manifest", s.manifest.replace('"OS"', '"?"')), "ask", "Headers found: ID, OS, Death, Age, Primary", "fatal"),
}


@pytest.mark.parametrize("name", CASES)
def test_refusal(small, name, capsys):
    damage, code, message, severity = CASES[name]
    damage(small)
    status, table = small.check()
    found = table[table.code == code]
    assert len(found), table.to_string()
    assert found.what.str.contains(message, regex=False).any(), found.what.tolist()
    assert found.severity.iloc[0] == severity and (found.remedy != "").all()
    assert status == (1 if severity == "fatal" else 0)
    assert severity in capsys.readouterr().out, "the table is printed"


def test_three_spellings_are_all_listed(small):
    three_spellings(small)
    _, table = small.check()
    assert (table.code == "spelling").sum() == 3


def write_as(small, **how): small.table.to_csv(small.folder/"clinical.csv", index=False, **how); small.table = None


@pytest.mark.parametrize("how, message", [({"sep": ";"}, "it looks separated by ';'"), ({"encoding": "utf-16"}, "it looks like utf-16")])
def test_csv_of_another_kind(small, how, message):
    write_as(small, **how)
    status, table = small.check()
    assert status == 1 and message in table.what[0] and "set table." in table.remedy[0].lower()


def test_workbook_without_the_sheet(small):
    small.table.to_excel(small.folder/"clinical.xlsx", index=False, sheet_name="Tabelle1")
    small.table = None
    status, table = small.check("--set", "table.file=clinical.xlsx", "--set", "table.sheet=Data")
    assert status == 1 and "no sheet 'Data'; found Tabelle1" in table.what[0]
    assert small.check("--set", "table.file=clinical.xlsx", "--set", "table.sheet=Tabelle1")[0] == 0


def test_unknown_key_names_the_nearest(small, capsys):
    small.manifest = small.manifest.replace('unit = "days"', 'unti = "days"')
    small.table.to_csv(small.folder/"clinical.csv", index=False)
    (small.folder/"small.toml").write_text(small.manifest)
    assert main(["check", str(small.folder/"small.toml"), "--data", str(small.folder)]) == 1
    message = capsys.readouterr().err
    assert "outcome.unti: unknown key; did you mean 'unit'" in message and "Traceback" not in message


def test_one_run_lists_all_problems(small):
    for name in ("age 15000", "negative time", "NaN voxels", "identical image", "other shape"):
        if name not in ("identical image", "other shape"): CASES[name][0](small)
    set_cell("Death", "x", 5)(small)
    small.image("p06", np.ones((8, 8, 7), np.uint8), "seg.nii.gz")
    _, table = small.check()
    assert {"out-of-range", "time-negative", "invalid-voxels", "event-coding", "geometry"} <= set(table.code)


def test_a_study_refuses_what_check_calls_fatal(small, capsys):
    outcome_column(small)
    small.table.to_csv(small.folder/"clinical.csv", index=False)
    (small.folder/"small.toml").write_text(small.manifest)
    assert main(["run", "clinical", str(small.folder/"small.toml"), "--data", str(small.folder), "--out", str(small.folder/"run")]) == 1
    assert "determines the outcome" in capsys.readouterr().err
    assert not (small.folder/"run").exists(), "nothing half-written"
