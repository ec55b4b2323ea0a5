"""Quality control of a preprocessed cohort: planted faults come out, clean cases do not, runs go on, and no face leaves the house."""
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from brainmets.phantom import draw_scan, plan_patient
from brainmets.phantom_images import Grid, anatomy
from brainmets.prep.quality import COLUMNS, AtlasArrays, case_rows, judged, mirrored, ranking, read_atlas, read_case
from brainmets.prep.quality_pages import case_folders, case_section, case_strip, outlier_section, quality_page, quality_strip, quality_table
from brainmets.prep.registration import Space, save_transform
from brainmets.prep.sharing import box_to_mni, export_case
from brainmets.tables import DataError, read_json, read_table, write_json
from brainmets.volumes import read_voxels

SHAPE = (60, 60, 39)
GRID = Grid(SHAPE)
SEQUENCES = ("t1", "t1ce", "t2", "flair")
ONE_SCANNER = [k for k in range(20) if plan_patient(5, k).facts["Center"] == "A"][:12]


def save(path, array, affine=GRID.affine): nib.save(nib.Nifti1Image(array, affine), path)


def change(folder, sequence, how):
    "Rewrite one image; `how` sees it in RAS+."
    image = nib.as_closest_canonical(nib.load(folder/f"{sequence}.nii.gz"))
    array = image.get_fdata(dtype=np.float32)
    brain = read_voxels(folder/"brain.nii.gz") > 0
    save(folder/f"{sequence}.nii.gz", (how(array)*brain).astype(np.float32), image.affine)


def write_case(folder, k):
    "One session of the phantom as the pipeline would leave it."
    plan, rng, space = plan_patient(5, k), np.random.default_rng(k), Space(SHAPE, GRID.affine)
    drawn = draw_scan(plan, plan.lesions, 5, SHAPE)
    (folder/"transforms").mkdir(parents=True)
    brain = drawn["t1"] > 0
    for sequence in SEQUENCES:
        image = drawn[sequence].astype(np.float32)
        low, high = np.percentile(image[brain], [0.5, 99.5])
        save(folder/f"{sequence}.nii.gz", (np.clip((image - low)/(high - low), 0, 1)*brain).astype(np.float32))
        matrix = np.eye(4)
        matrix[:3, 3] = rng.normal(0, 2, 3)
        save_transform(folder/"transforms"/f"{sequence}.json", matrix, space, space, name="phantom", sha256="0")
    save(folder/"brain.nii.gz", brain.astype(np.uint8))
    save(folder/"mask.nii.gz", drawn["mask"])
    write_json(folder/"steps.json", {"patient_id": folder.name, "session": "", "fingerprint": f"f{k}", "similarity": {}, "brain": {"method": "given"}})


def write_atlas(folder):
    shares = anatomy(SHAPE)
    folder.mkdir(parents=True)
    save(folder/"image.nii.gz", (0.2*shares[0] + 0.7*shares[1] + shares[2]).astype(np.float32))
    save(folder/"brain.nii.gz", (shares.sum(0) > 0.5).astype(np.uint8))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "Twelve patients of one scanner."
    out = tmp_path_factory.mktemp("clean")/"out"
    write_atlas(out/"atlas")
    for n, k in enumerate(ONE_SCANNER): write_case(out/f"P{n + 1:02d}", k)
    return out


def rotated(image, degrees):
    a, middle = np.deg2rad(degrees), (np.array(image.shape) - 1)/2
    matrix = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return ndimage.affine_transform(image, matrix, middle - matrix @ middle, order=1)


def half_seen(folder):
    "The upper half of the flair is missing, in the voxels and in the native grid."
    change(folder, "flair", lambda image: image*(np.arange(SHAPE[2]) < SHAPE[2]//2))
    half = Space((SHAPE[0], SHAPE[1], SHAPE[2]//2), GRID.affine)
    save_transform(folder/"transforms"/"flair.json", np.eye(4), half, Space(SHAPE, GRID.affine), name="phantom", sha256="0")


def with_nan(image):
    image = image.copy()
    image[30, 30, 20] = np.nan
    return image


@pytest.fixture(scope="module")
def spoilt(clean, tmp_path_factory):
    "The same cohort; six are spoilt, one file is truncated. With its page and its table."
    out = tmp_path_factory.mktemp("spoilt")/"out"
    shutil.copytree(clean, out)
    atlas_brain = read_voxels(out/"atlas"/"brain.nii.gz") > 0
    change(out/"P01", "t2", lambda image: rotated(image, 15))
    change(out/"P02", "t1", lambda image: np.roll(image, 5, axis=1))
    change(out/"P03", "flair", lambda image: mirrored(image, atlas_brain))
    save(out/"P04"/"brain.nii.gz", np.zeros(SHAPE, np.uint8))
    change(out/"P05", "t1ce", with_nan)
    half_seen(out/"P06")
    (out/"P07"/"t2.nii.gz").write_bytes((out/"P07"/"t2.nii.gz").read_bytes()[:3000])
    page = quality_page(out, workers=2, progress=False)
    return out, page, pd.read_csv(out/"qc"/"quality.csv", keep_default_na=False, na_values={"value": [""]})


FAULTS = {"P01": "t2: fit here over fit 8 mm away", "P02": "t1: fit here over fit 8 mm away", "P03": "flair: fit over that of the mirror image",
          "P04": "brain volume in ml 0", "P05": "t1ce: share of NaN", "P06": "flair: share of the brain in the field of view", "P07": "t2.nii.gz: truncated"}


def test_planted_faults_come_out_and_clean_cases_do_not(spoilt):
    _, _, table = spoilt
    found = table[table["stands_out"]]
    assert set(found["patient_id"]) == set(FAULTS)
    for patient, words in FAULTS.items(): assert words in "\n".join(found["reason"][found["patient_id"] == patient]), patient


def test_nobody_of_the_clean_cohort_stands_out(clean):
    atlas = read_atlas(clean, [])
    rows = [row for folder in case_folders(clean) for row in case_rows(read_case(folder), atlas)]
    table = judged(pd.DataFrame(rows, columns=COLUMNS))
    assert table["reason"][table["stands_out"]].tolist() == []


def test_the_page_lists_outliers_first_and_links_their_strips(spoilt):
    out, page, _ = spoilt
    text = page.read_text(encoding="utf-8")
    assert page.parent == out and "12 cases, 7 stand out" in text
    cases = text[text.index("12 cases</figcaption>"):]
    order = [cases.index(f">P{n:02d}<") for n in range(1, 13)]
    assert max(order[:7]) < min(order[7:])
    for n in range(1, 13): assert (f'href="qc/P{n:02d}.png"' in text) == (n != 7) == (out/"qc"/f"P{n:02d}.png").is_file()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_a_second_run_draws_nothing_and_a_changed_fingerprint_one_strip(clean, tmp_path):
    out = tmp_path/"out"
    for name in ("atlas", "P01", "P02", "P03"): shutil.copytree(clean/name, out/name)
    quality_table(out, progress=False)
    stamp = {path.name: path.stat().st_mtime_ns for path in (out/"qc").glob("*.png")}
    first = (out/"qc"/"quality.csv").read_bytes()
    write_json(out/"P02"/"steps.json", {**read_json(out/"P02"/"steps.json"), "fingerprint": "other"})
    (out/".unfinished-1").mkdir()
    shutil.copy(out/"P01"/"steps.json", out/".unfinished-1")
    quality_table(out, workers=2, progress=False)
    assert (out/"qc"/"quality.csv").read_bytes() == first
    assert [path.name for path in sorted((out/"qc").glob("*.png")) if path.stat().st_mtime_ns != stamp[path.name]] == ["P02.png"]


def test_strips_are_the_same_bytes_and_sessions_have_their_own(clean, tmp_path):
    atlas = read_atlas(clean, [])
    strip = quality_strip(clean/"P01", atlas.brain, atlas.image)
    assert strip == quality_strip(clean/"P01", atlas.brain, atlas.image) and b"tIME" not in strip and b"tEXt" not in strip
    out = tmp_path/"out"
    shutil.copytree(clean/"atlas", out/"atlas")
    for session in ("2001-a", "2001-b"):
        shutil.copytree(clean/"P01", out/"P01"/session)
        write_json(out/"P01"/session/"steps.json", {**read_json(clean/"P01"/"steps.json"), "session": session})
    table = quality_table(out, progress=False)
    assert sorted(set(table["session"])) == ["2001-a", "2001-b"]
    assert 'href="qc/P01/2001-b.png"' in quality_page(out, progress=False).read_text(encoding="utf-8")


def test_right_is_on_the_left_of_the_strip(clean):
    "A bright right half of the brain shows in the left half of the axial picture."
    from brainmets.prep.quality_pages import plane
    case = read_case(clean/"P01")
    x_mm = (case.affine @ np.array([*map(float, case.brain.shape), 1.0]))[0] - (case.affine @ np.array([0.0, 0, 0, 1]))[0]
    assert x_mm > 0                                              # the first axis runs to the patient's right
    bright = np.zeros(case.brain.shape)
    bright[case.brain.shape[0]//2:] = 1
    picture = plane(bright, "axial", 20)
    assert picture[:, :20].min() == 1 and picture[:, -20:].max() == 0


def test_other_files_of_the_pipeline_are_no_sequences(clean, tmp_path):
    folder = tmp_path/"P01"
    shutil.copytree(clean/"P01", folder)
    save(folder/"cube.nii.gz", np.zeros((8, 8, 8, 4), np.float32))
    save(folder/"second_mask.nii.gz", np.ones(SHAPE, np.uint8))
    assert list(read_case(folder).images) == list(SEQUENCES)


def test_bad_folders_say_what_is_wrong(clean, tmp_path):
    folder = tmp_path/"P01"
    shutil.copytree(clean/"P01", folder)
    save(folder/"t1.nii.gz", np.zeros((20, 20, 20), np.float32))
    with pytest.raises(DataError, match="t1.nii.gz is not on the grid of brain.nii.gz"): read_case(folder)
    shutil.rmtree(folder/"transforms")
    with pytest.raises(DataError, match="no transform"): read_case(folder)
    atlas = read_atlas(clean, [])
    with pytest.raises(DataError, match="the atlas has"): case_rows(read_case(clean/"P01"), AtlasArrays(atlas.brain[:-1]))


def test_a_thousand_patients_make_a_page_that_opens(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"P{n:04d}" for n in range(1000)]
    rows = [dict(zip(COLUMNS, (name, "", sequence, "mutual_information", value, ""))) for sequence in SEQUENCES for name, value in zip(names, rng.normal(0.6, 0.05, 1000))]
    table = judged(pd.DataFrame(rows + [dict(zip(COLUMNS, ("P0500", "", "", "dice_atlas", 0.2, "")))]))
    ranked = ranking(table)
    assert ranked["patient_id"][0] == "P0500"
    html = "".join(block.html() for section in (*outlier_section(tmp_path, ranked, 12), *case_section(tmp_path, table, ranked)) for block in section.blocks)
    assert len(html) < 1_000_000 and html.count("<tr>") > 1000


@pytest.fixture(scope="module")
def glioma(real_data, tmp_path_factory):
    "The published skull-stripped case, every second voxel, as the output of a pipeline; its own brain stands for the atlas."
    folder = tmp_path_factory.mktemp("real")/"P01"
    (folder/"transforms").mkdir(parents=True)
    images = {s: nib.load(real_data/"tcga_fg_6692"/"sri24"/f"{s}.nii.gz").slicer[::2, ::2, ::2] for s in SEQUENCES}
    space = Space(images["t1"].shape, images["t1"].affine)
    brain = np.any([np.asarray(image.dataobj) != 0 for image in images.values()], axis=0)
    for sequence, image in images.items():
        save(folder/f"{sequence}.nii.gz", image.get_fdata(dtype=np.float32), image.affine)
        save_transform(folder/"transforms"/f"{sequence}.json", np.eye(4), space, space, name="SRI24", sha256="")
    save(folder/"brain.nii.gz", brain.astype(np.uint8), space.affine)
    write_json(folder/"steps.json", {"patient_id": "P01", "session": "", "fingerprint": "1"})
    return folder


def test_a_real_case_is_seen_as_registered_and_its_faults_are_seen(glioma):
    from dataclasses import replace
    case = read_case(glioma)
    atlas = AtlasArrays(case.brain)
    def reasons(case): return "\n".join(judged(pd.DataFrame(case_rows(case, atlas), columns=COLUMNS))["reason"])
    def spoil(how): return replace(case, images={**case.images, "t2": how(case.images["t2"])*case.brain})
    assert "fit" not in reasons(case)
    assert "t2: fit over that of the mirror image" in reasons(spoil(lambda image: mirrored(image, case.brain)))
    assert "t2: fit here over fit 8 mm away" in reasons(spoil(lambda image: np.roll(image, 10, axis=0)))
    assert "t2: fit here over fit 8 mm away" in reasons(spoil(lambda image: rotated(image, 15)))


def test_a_real_brain_may_leave_and_a_head_may_not(glioma, tmp_path):
    export_case(glioma, tmp_path/"shared")
    assert sorted(path.name for path in (tmp_path/"shared").iterdir()) == ["brain.nii.gz", *sorted(f"{s}.nii.gz" for s in SEQUENCES)]
    head = tmp_path/"P02"
    shutil.copytree(glioma, head)
    image, brain = nib.load(head/"t1.nii.gz"), read_voxels(head/"brain.nii.gz") > 0
    around = ndimage.binary_dilation(np.asarray(nib.load(head/"brain.nii.gz").dataobj) > 0, iterations=6)
    save(head/"t1.nii.gz", np.where(around & (image.get_fdata() == 0), 300, image.get_fdata()).astype(np.float32), image.affine)
    affine = nib.as_closest_canonical(image).affine
    with pytest.raises(DataError, match="P02/t1.nii.gz: signal outside the brain"): export_case(head, tmp_path/"refused", to_mni=box_to_mni(brain, affine))
    assert not (tmp_path/"refused").exists()
    export_case(head, tmp_path/"defaced", faces="deface", to_mni=box_to_mni(brain, affine))
    before, after = read_voxels(head/"t1.nii.gz"), read_voxels(tmp_path/"defaced"/"t1.nii.gz")
    assert (before[brain] == after[brain]).all() and 0.02 < (before != after).sum()/((before != 0) & ~brain).sum() < 0.5
