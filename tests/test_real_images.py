"""`brainmets check` on real images, through manifests of their own."""
import pytest

from brainmets.cli import main
from brainmets.tables import read_table

HEAD = '[cohort]\nname = "{name}"\ntitle = "{name}"\ncitation = "see the data README"\nlicence = "CC BY 3.0"\nobtain = "see the data README"\n'


def check(tmp_path, text, data):
    (tmp_path/"m.toml").write_text(text)
    status = main(["check", str(tmp_path/"m.toml"), "--data", str(data), "--out", str(tmp_path/"problems.csv"), "--workers", "1"])
    return status, read_table(tmp_path/"problems.csv").fillna("")


def glioma(labels, mask=True):
    "A table of one row is not needed: the one case is found on disk."
    text = HEAD.format(name="tcga_fg_6692") + '[images]\nlayout = "pattern"\nroot = "."\nshape = [240, 240, 155]\n'
    text += 'mask = "segmentation/fused_prediction.nii.gz"\n' if mask else ""
    text += "[images.sequences]\n" + "".join(f'{s} = "{{patient}}/{s}.nii.gz"\n' for s in ("t1", "t1ce", "t2", "flair"))
    text += '[[exclude]]\nreason = "before the atlas"\npatients = ["native"]\n'
    return text + f"[labels]\n{labels}\n"*mask


def test_atlas_images_have_negative_voxels_and_the_prediction_has_its_labels(tmp_path, real_data):
    status, table = check(tmp_path, glioma("necrosis = 1\nedema = 2\nenhancing = 4"), real_data/"tcga_fg_6692")
    negative = table[table.code == "negative-voxels"]
    assert len(negative) >= 1 and negative["where"].str.startswith("sri24/").all() and (negative.severity == "warning").all()
    assert "mask-labels" not in set(table.code) and "geometry" not in set(table.code)
    assert status == 0


def test_the_prediction_does_not_fit_another_label_map(tmp_path, real_data):
    status, table = check(tmp_path, glioma("necrosis = 1\nedema = 2\nenhancing = 3"), real_data/"tcga_fg_6692")
    found = table[table.code == "mask-labels"]
    assert status == 1 and len(found) == 1 and "labels 4 are not in the label map" in found.what.iloc[0]


def test_native_images_lie_on_several_grids(tmp_path, real_data):
    text = glioma("", mask=False).replace('["native"]', '["sri24"]').replace("shape = [240, 240, 155]\n", "")
    status, table = check(tmp_path, text, real_data/"tcga_fg_6692")
    assert status == 1 and sorted(table[table.code == "geometry"]["where"]) == ["native/flair.nii.gz", "native/t2.nii.gz"]   # t1 and t1ce share one


def test_progression_pairs(tmp_path, real_data):
    text = HEAD.format(name="brain_tumor_progression") + """
[images]
layout = "pattern"
mask = "{patient}/{session}_Mask.nii.gz"
[images.sequences]
t1 = "{patient}/{session}_Scan_T1.nii.gz"
[labels]
tumor = 1
"""
    status, table = check(tmp_path, text, real_data/"brain_tumor_progression")
    assert set(table.code) <= {"negative-voxels", "mask-labels", "orientation", "mask-values"}
