"""Diameters, matching, response and inclusion where a notebook lesson cannot reach: real masks, slow references, bad input."""
import itertools

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainmets.features.lesion_pairs import pair_edema
from brainmets.features.lesions import lesions_of, number_lesions
from brainmets.features.response import best_response, choose_targets, diameter_table, diameters, match_lesions, paper_d_inclusion, possible_responses, responses, track_lesions
from brainmets.phantom import draw_scan, follow_ups, plan_patient
from brainmets.phantom_images import LABELS, Grid
from brainmets.tables import DataError

QUIET = {"new_lesion": False, "immunotherapy": False, "non_target": "stable", "steroids": "same", "clinical": "stable"}


def slow_longest(lesion, affine):
    "The longest diameter by all pairs of midpoints between voxels, in every slice of the third axis."
    best = 0
    for k in range(lesion.shape[2]):
        at = np.argwhere(lesion[:, :, k])
        if not len(at): continue
        points = np.concatenate([at + step for step in ([0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5])]) @ affine[:3, :2].T
        best = max(best, np.linalg.norm(points[:, None] - points, axis=-1).max())
    return best


def random_lesion(rng, shape=(14, 12, 4)):
    from scipy import ndimage
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_diameter_is_that_of_all_pairs_on_a_sheared_oblique_grid(seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([0.8, 1.3, 2.9]) + rng.normal(0, 0.08, (3, 3))
    lesion = random_lesion(rng)
    found = diameters(lesion, affine)
    assert found.longest_mm == pytest.approx(slow_longest(lesion, affine), abs=1e-6)
    ends, across = np.array(found.longest_ends), np.array(found.perpendicular_ends)
    assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(found.longest_mm, abs=1e-6)
    assert np.linalg.norm(across[1] - across[0]) == pytest.approx(found.perpendicular_mm, abs=1e-6)
    assert abs((ends[1] - ends[0]) @ (across[1] - across[0])) < 1e-6*found.longest_mm**2 and found.perpendicular_mm <= found.longest_mm + 1e-9
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    assert np.ptp([normal @ p for p in (*ends, *across)]) < 1e-6             # all four ends lie in one slice


@pytest.mark.parametrize("baseline, nadir, now, expected", [((20,), (20,), (24,), "SD"), ((25,), (25,), (30,), "PD"), ((10, 10), (10, 10), (12.5, 12.5), "SD"), ((30,), (30,), (21,), "PR"), ((40,), (20,), (25,), "PD")])
def test_the_five_series(baseline, nadir, now, expected):
    assert possible_responses(now, baseline, nadir, QUIET) == [expected]
    sessions = pd.DataFrame([{"time_days": d, **QUIET} for d in (0, 60, 120, 150)])
    targets = pd.DataFrame([(n, d, mm) for d, sizes in zip((0, 60, 120, 150), (baseline, nadir, now, now)) for n, mm in enumerate(sizes)], columns=["lesion", "time_days", "longest_mm"])
    table = responses(targets, sessions)
    assert table["response"][2] == expected
    if expected == "PR": assert table["is_confirmed"][2] and not responses(targets[targets["time_days"] < 130], sessions[:3])["is_confirmed"].fillna(False).any()


def test_a_response_known_with_gaps_holds_whatever_fills_them():
    "Unknown facts: every filling gives a result among those that were called possible, and each of these is reached."
    choices = {"new_lesion": (True, False), "immunotherapy": (True, False), "non_target": ("none", "gone", "stable", "progressed"), "steroids": ("none", "lower", "same", "higher"), "clinical": ("better", "stable", "worse")}
    for now in ((20,), (24,), (30,), (13,), (0,)):
        for gaps in itertools.chain.from_iterable(itertools.combinations(choices, k) for k in (1, 2, 5)):
            facts = QUIET | dict.fromkeys(gaps)
            filled = {possible_responses(now, (20,), (20,), facts | dict(zip(gaps, values)))[0] for values in itertools.product(*[choices[g] for g in gaps])}
            assert set(possible_responses(now, (20,), (20,), facts)) == filled


def test_unknown_columns_are_unknown_and_bad_words_are_refused():
    targets = pd.DataFrame({"lesion": 1, "time_days": [0, 60], "longest_mm": [20.0, 20.0]})
    table = responses(targets, pd.DataFrame({"time_days": [0, 60]}))
    assert table["response"].tolist() == ["baseline", "unknown"] and best_response(table) == "unknown"
    with pytest.raises(DataError, match="expected one of better, stable, worse"): responses(targets, pd.DataFrame({"time_days": [0, 60], "clinical": "ok"}))
    with pytest.raises(DataError, match="when there was no session"): responses(targets, pd.DataFrame({"time_days": [0, 61]}))
    with pytest.raises(DataError, match="lacks longest_mm"): responses(targets.rename(columns={"longest_mm": "longest"}), pd.DataFrame({"time_days": [0, 60]}))


def test_lesions_of_the_phantom_are_followed_as_they_were_planned():
    "Planted truth: growing and shrinking lesions of several patients keep their numbers over three sessions."
    shape, grid = (96, 96, 62), Grid((96, 96, 62))
    for k in (0, 3):
        plan = plan_patient(4, k)
        sessions = [(60.0*s, number_lesions(draw_scan(plan, lesions, 4, shape, s)["mask"], grid.affine, LABELS)) for s, (_, lesions) in enumerate(follow_ups(plan, 4, 3))]
        tracks = track_lesions(sessions, grid.affine)
        assert not (tracks["how"] == "new").any()
        assert len(tracks) == 3*len(tracks["lesion"].unique())
        for (_, first), (_, second) in zip(sessions, sessions[1:]): assert set(match_lesions(first, second, grid.affine)["how"]) <= {"overlap", "distance", "gone"}


def test_real_mask_diameters_against_all_pairs(real_data):
    image = nib.as_closest_canonical(nib.load(real_data/"tcga_fg_6692/segmentation/fused_prediction.nii.gz"))
    mask, labels = np.asarray(image.dataobj).astype(int), {"necrosis": 1, "edema": 2, "enhancing": 4}
    lesions = number_lesions(mask, image.affine, labels, min_voxels=20)
    table, rows = diameter_table(lesions, image.affine), lesions_of(mask, image.affine, labels, min_voxels=20)
    assert len(table) == len(rows) >= 1 and np.allclose(table["volume_ml"], rows["volume_ml"])
    label = table["label"].iloc[-1]
    assert table["longest_mm"].iloc[-1] == pytest.approx(slow_longest(lesions == label, image.affine), abs=1e-5)
    assert (choose_targets(table)["role"] == "target").sum() == min(5, table["is_measurable"].sum())
    pairs = pair_edema(mask, image.affine, labels, min_voxels=20)
    counted = pairs.table.groupby("edema")["counted_ml"].sum()
    assert np.allclose(counted, pairs.table.groupby("edema")["component_ml"].first()) and counted.sum() == pytest.approx((mask == 2).sum()/1000, rel=1e-6)


def test_inclusion_needs_every_column_and_reports_every_lesion():
    lesions = pd.DataFrame({"lesion_id": ["A", "B"], "patient_id": "p", "label": ["RN", "PD"], "center_x_mm": [0.0, 20.0], "center_y_mm": 0.0, "center_z_mm": 0.0, "severe_motion": False})
    sizes = pd.DataFrame({"lesion_id": ["A", "A"], "time_days": [0, 50], "longest_mm": [10.0, 20.0]})
    table = paper_d_inclusion(lesions, sizes)
    assert table["lesion_id"].tolist() == ["A", "B"] and not table["included"].any() and table["reason"].ne("").all()
    assert paper_d_inclusion(lesions.assign(label="RN"), sizes)["included"].tolist() == [True, False]
    with pytest.raises(DataError, match="severe_motion"): paper_d_inclusion(lesions.drop(columns="severe_motion"), sizes)
