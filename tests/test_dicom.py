"""DICOM to NIfTI on real series with a known truth, and on real DICOM files written here: damage, compression, privacy, corrections, resuming."""
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dcm2niix
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (DeflatedExplicitVRLittleEndian, EnhancedMRImageStorage, HTJ2KLossless, JPEG2000Lossless, JPEGLSLossless, MPEG2MPML, RLELossless, generate_uid)

from brainmets.phantom_dicom import AXIAL, CORONAL, PLANTED, SAGITTAL, dicom_image, write_series
from brainmets.prep.dicom import convert_dicom, convert_series
from brainmets.prep.series import MIXED, find_series
from brainmets.prep.series_rules import SeriesRules, load_rules
from brainmets.prep.series_table import read_corrections
from brainmets.tables import DataError, read_json

ROOT = Path(__file__).resolve().parent.parent
def item(**values):
    dataset = Dataset()
    for key, value in values.items(): setattr(dataset, key, value)
    return dataset


def only(folder, **how): return find_series(folder, **how).series[0]


def all_bytes(folder): return b"".join((gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()) + p.as_posix().encode() for p in sorted(folder.rglob("*")) if p.is_file()).lower()


# Real series

@pytest.fixture(scope="module")
def real(real_data):
    if not (real_data/"dicom").is_dir(): pytest.skip("no folder dicom in the real data")
    return real_data/"dicom"


@pytest.fixture(scope="module")
def real_out(real, tmp_path_factory):
    "All of the folder through the whole way, one patient a folder; the reformatted series is taken by hand."
    out = tmp_path_factory.mktemp("real")/"out"
    plan = convert_dicom(real, out, ids="keep", patient_by="folder", plan_only=True).series
    plan.loc[plan["patient_id"] == "non_isotropic", ["sequence", "decision"]] = "t1", "use"
    return out, convert_dicom(real, out, ids="keep", patient_by="folder", table=plan)


@pytest.mark.parametrize("name, sequence, spacing_mm", [("siemens", "flair", (1, 1, 1)), ("ge", "t1", (1, 1, 1)), ("jpegls", "flair", (1, 1, 1)), ("non_isotropic", "t1", (6.4, 4, 0.5))])
def test_real_series_equals_its_truth(real, real_out, name, sequence, spacing_mm):
    "Truth and result in RAS+: voxels exactly (the scaled one within float32), every corner within 0.05 mm of where the truth puts it. Stored order differs: the truth has columns, rows, slices as scanned."
    out, _ = real_out
    facts = read_json(out/name/"ses-day0000"/f"{sequence}.json")
    assert (facts["converter"], facts["fallback"]) == ("dcm2niix", "")     # and the other one gives the same, see below
    got, truth = nib.load(out/name/"ses-day0000"/f"{sequence}.nii.gz"), nib.as_closest_canonical(nib.load(real/name/"001_ground_truth.nii.gz"))
    assert got.shape == truth.shape and nib.aff2axcodes(got.affine) == ("R", "A", "S")
    expected = truth.get_fdata()
    assert np.ptp(expected) > 50                                            # not a constant image
    np.testing.assert_allclose(got.get_fdata(), expected, rtol=0, atol=0 if name != "non_isotropic" else 1e-5)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in got.shape])).reshape(3, -1)
    away = nib.affines.apply_affine(got.affine, corners.T) - nib.affines.apply_affine(truth.affine, corners.T)
    assert np.linalg.norm(away, axis=1).max() < 0.05                        # GE states cosines with 6 digits: 0.03 mm at 256 voxels
    assert sorted(np.round(got.header.get_zooms(), 3)) == pytest.approx(sorted(spacing_mm), abs=1e-3)


def test_values_of_slices_with_a_scale_of_their_own(real, real_out):
    "non_isotropic has another rescale slope in each slice: one slope for all would be off by 60 of 63."
    path = real_out[0]/"non_isotropic"/"ses-day0000"/"t1.nii.gz"
    slices = [pydicom.dcmread(p) for p in sorted((real/"non_isotropic"/"001").iterdir())]
    assert len({d.RescaleSlope for d in slices}) == 4
    for k, d in enumerate(slices):
        expected = (d.pixel_array*float(d.RescaleSlope) + float(d.RescaleIntercept)).T[::-1, ::-1]
        np.testing.assert_allclose(nib.load(path).get_fdata()[:, :, k], expected, rtol=1e-6)


FAILING = {"two_slices": "too few slices: 2 slices. Expected 4 or more", "gantry_tilt": "gantry tilt: slices are stacked 14.0 degrees off", "missing_slice": "missing slice: 1 missing of 5, between image numbers 3 and 5: gap 1.50 mm. Expected gaps of 0.75 mm"}


@pytest.mark.parametrize("name", FAILING)
def test_each_failing_series_gives_its_own_message(real, name, tmp_path):
    with pytest.raises(DataError) as caught: convert_series(only(real/"failing"/name), tmp_path/"a.nii.gz")
    said = str(caught.value)
    assert FAILING[name] in said and "Remedy:" in said and not list(tmp_path.iterdir())
    assert [other for other in FAILING if FAILING[other] in said] == [name]


def test_failing_series_are_listed_and_cost_nothing_else(real_out):
    out, done = real_out
    assert sorted(done.images["patient_id"]) == ["ge", "jpegls", "non_isotropic", "siemens"]
    problems = done.series[done.series["patient_id"] == "failing"]
    assert set(problems["decision"]) == {"problem"} and len(done.failures) == 3
    assert all(any(text in error for error in done.failures["error"]) for text in FAILING.values())
    assert done.series.set_index("patient_id").at["non_isotropic", "reason"].startswith("by hand; the rules said skip: refused: reformatted (MPR)")


def test_real_series_by_the_fallback_are_the_same_files(real, tmp_path, monkeypatch):
    for name in ("siemens", "ge", "jpegls", "non_isotropic"):
        series = only(real/name)
        convert_series(series, tmp_path/f"{name}-1.nii.gz")
        with monkeypatch.context() as patch:
            patch.setattr(dcm2niix, "bin", str(tmp_path/"absent"))
            facts = convert_series(series, tmp_path/f"{name}-2.nii.gz")
        assert facts["converter"] == "dicom2nifti" and "cannot be started" in facts["fallback"]
        a, b = (nib.load(tmp_path/f"{name}-{k}.nii.gz") for k in (1, 2))
        np.testing.assert_allclose(a.get_fdata(), b.get_fdata(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(a.affine, b.affine, atol=2e-4)


# Damage and compression

def test_every_orientation_and_order_of_files_ends_in_the_same_place(tmp_path):
    for k, orientation in enumerate((AXIAL, CORONAL, SAGITTAL, (0.8, 0.6, 0, -0.6, 0.8, 0), (-1, 0, 0, 0, -1, 0))):
        voxels = write_series(tmp_path/str(k), n=5, orientation=orientation, gap_mm=3.)
        series = only(tmp_path/str(k))
        assert series.problems == ()
        convert_series(series, tmp_path/"a.nii.gz")
        got, values = nib.load(tmp_path/"a.nii.gz"), nib.load(tmp_path/"a.nii.gz").get_fdata()
        for place in ((0, 0, 0), (9, 0, 0), (0, 11, 0), (3, 7, 4)):         # column, row, slice -> mm, by the DICOM formula (PS3.3 C.7.6.2.1.1)
            lps = np.array([-20., -30., 40.]) + np.array(orientation[:3])*1.25*place[0] + np.array(orientation[3:])*1.5*place[1] + np.cross(orientation[:3], orientation[3:])*3.*place[2]
            at = np.linalg.inv(got.affine) @ [*(lps*[-1, -1, 1]), 1]
            np.testing.assert_allclose(at, np.rint(at), atol=1e-4)
            assert values[tuple(np.rint(at[:3]).astype(int))] == voxels[place]


@pytest.mark.parametrize("how, says", [(dict(skip=(2, 3)), "missing slice: 2 missing of 6, between image numbers 2 and 5"), (dict(tilt_mm=.2), "gantry tilt: slices are stacked 5.7 degrees"),
                                       (dict(n=3), "too few slices: 3 slices"), (dict(gap_mm=0.), "duplicate slices: 5 of 6")])
def test_damage_has_its_own_message(tmp_path, how, says):
    write_series(tmp_path/"Quixote series", **how)
    with pytest.raises(DataError) as caught: convert_series(only(tmp_path), tmp_path/"a.nii.gz")
    assert says in str(caught.value) and "'Quixote series'" in str(caught.value)      # the folder is named to the user ...
    done = convert_dicom(tmp_path, tmp_path.parent/f"{tmp_path.name}-out")
    assert says in done.failures["error"][0] and "Quixote" not in done.failures["error"][0]      # ... and not in what is written


def test_uneven_spacing(tmp_path):
    write_series(tmp_path, change=lambda d: setattr(d, "ImagePositionPatient", [-20, -30, 40 + 2*(d.InstanceNumber**1.2)]))
    assert [p.kind for p in only(tmp_path).problems] == ["uneven spacing"]


def test_truncated_and_unreadable_files(tmp_path):
    write_series(tmp_path/"a"); write_series(tmp_path/"b", uid="b", number=2, times="t2")
    first = sorted((tmp_path/"a").iterdir())[0]
    first.write_bytes(first.read_bytes()[:-150])
    (tmp_path/"b"/"Alonso.dcm").write_bytes(b"\0"*50)
    (tmp_path/"notes.txt").write_text("not a scan")
    found = find_series(tmp_path)
    assert [[p.kind for p in s.problems] for s in found.series] == [["truncated file"], ["unreadable file"]] and found.n_other == 1
    assert first.name in found.series[0].problems[0].sentence("")
    done = convert_dicom(tmp_path, tmp_path.parent/"cut-out")
    assert sorted(done.failures["stage"]) == ["read", "series", "series"] and b"alonso" not in all_bytes(tmp_path.parent/"cut-out")
    shutil.rmtree(tmp_path.parent/"cut-out"); (tmp_path.parent/"cut-out_key.csv").unlink()


def test_a_folder_without_dicom_says_so(tmp_path):
    (tmp_path/"a.txt").write_text("x")
    with pytest.raises(DataError, match="No DICOM file .*1 other files"): find_series(tmp_path)
    with pytest.raises(DataError, match="No folder"): find_series(tmp_path/"no")


def garbage(syntax, head):
    def change(d):
        d.file_meta.TransferSyntaxUID = syntax
        d.PixelData = encapsulate([head + b"garbage"*100])
        d["PixelData"].VR, d["PixelData"].is_undefined_length = "OB", True
    return change


@pytest.mark.parametrize("syntax, head", [(JPEG2000Lossless, b"\xff\x4f\xff\x51"), (JPEGLSLossless, b"\xff\xd8\xff\xf7"), (HTJ2KLossless, b"\xff\x4f\xff\x51"), (MPEG2MPML, b"")])
def test_compressed_voxels_that_cannot_be_decoded(tmp_path, syntax, head):
    "Some decoders abort their process on such data: this one must live on, and say which compression it was."
    write_series(tmp_path/"in"/"bad", change=garbage(syntax, head))
    write_series(tmp_path/"in"/"good", uid="b", number=2, times="t2")
    done = convert_dicom(tmp_path/"in", tmp_path/"out")
    assert done.images["sequence"].tolist() == ["t2"]
    error = done.failures["error"][0]
    assert "compressed voxels that cannot be decoded" in error and pydicom.uid.UID(syntax).name in error and "dcm2niix" in error and "dicom2nifti" in error and "export the series uncompressed" in error
    assert str(tmp_path) not in error


def test_lossless_compression_and_the_natural_fallback(tmp_path):
    "RLE is read by dcm2niix; deflated files only by dicom2nifti: the same voxels."
    def deflated(d): d.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    for name, change in (("plain", None), ("rle", lambda d: d.compress(RLELossless)), ("deflated", deflated)): write_series(tmp_path/name, change=change)
    facts = {name: convert_series(only(tmp_path/name), tmp_path/f"{name}.nii.gz") for name in ("plain", "rle", "deflated")}
    assert [f["converter"] for f in facts.values()] == ["dcm2niix", "dcm2niix", "dicom2nifti"]
    assert "dcm2niix ended with code" in facts["deflated"]["fallback"] and "Unsupported transfer syntax" in facts["deflated"]["fallback"]
    assert len({f["sha256"] for f in facts.values()}) == 1


def test_enhanced_file_of_many_frames(tmp_path):
    n, voxels = 8, np.random.default_rng(3).integers(0, 1000, (8, 12, 10), dtype=np.uint16)
    d = dicom_image("enhanced", PatientID="e", StudyInstanceUID=generate_uid(entropy_srcs=["e"]), StudyDate="20200101", SeriesNumber=7, InstanceNumber=1, NumberOfFrames=n, SeriesDescription="T1 3D")
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    for key in ("PixelSpacing", "ImageOrientationPatient", "FlipAngle"): delattr(d, key)
    d.SharedFunctionalGroupsSequence = Sequence([item(MRTimingAndRelatedParametersSequence=Sequence([item(RepetitionTime=8.1, FlipAngle=8)]), MREchoSequence=Sequence([item(EffectiveEchoTime=3.7)]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=[1.5, 1.25], SliceThickness=2)]), PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=list(AXIAL))]))])
    d.PerFrameFunctionalGroupsSequence = Sequence([item(PlanePositionSequence=Sequence([item(ImagePositionPatient=[-20, -30, 40 + 2.*k])]), PixelValueTransformationSequence=Sequence([item(RescaleIntercept=0, RescaleSlope=2, RescaleType="US")]),
        FrameContentSequence=Sequence([item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])])) for k in range(n)])
    d.PixelData = voxels.tobytes()
    (tmp_path/"in").mkdir(); d.save_as(tmp_path/"in"/"a.dcm", enforce_file_format=True)
    done = convert_dicom(tmp_path/"in", tmp_path/"out")
    assert done.images["sequence"].tolist() == ["t1"] and done.series["te_ms"].tolist() == [3.7]
    np.testing.assert_array_equal(nib.load(tmp_path/"out"/done.images["path"][0]).get_fdata(), 2.*voxels.transpose(2, 1, 0)[::-1, ::-1])


# Rules, sessions, privacy

@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    "Two patients, two days, a localizer, a map, two T1 of which one is better, and a description with a name."
    folder = tmp_path_factory.mktemp("clinic")
    for orientation in (AXIAL, CORONAL, SAGITTAL): write_series(folder/"Quixote"/"1", "l", n=5, number=1, orientation=orientation, times="", RepetitionTime=8., EchoTime=4.)
    write_series(folder/"Quixote"/"2", "2", n=5, number=2, gap_mm=5., description="AX T1 for Alonso QUIXOTE 01.03.2020", RepetitionTime=500., EchoTime=9., InversionTime=None, ScanningSequence="SE")
    write_series(folder/"Quixote"/"3", "3", n=9, number=3, description="T1_MPRAGE")
    write_series(folder/"Quixote"/"4", "4", n=9, number=4, description="T1_MPRAGE", ContrastBolusAgent="Gadovist given by Panza")
    write_series(folder/"Quixote"/"5", "5", n=9, number=5, description="AX T2 FLAIR", times="flair", day="20200601", study="2")
    write_series(folder/"Quixote"/"6", "6", n=9, number=6, description="ADC", times="t2", day="20200601", study="2", ImageType=["DERIVED", "PRIMARY", "ADC"])
    write_series(folder/"Sancho"/"1", "7", n=9, number=1, description="AX T2", times="t2", patient="../MRN-4712", study="3", day="20190101")
    return folder


def test_plan_of_the_clinic(clinic, tmp_path):
    done = convert_dicom(clinic, tmp_path/"out")
    assert done.images["path"].tolist() == ["P0001/ses-day0000/t2.nii.gz", "P0002/ses-day0000/t1.nii.gz", "P0002/ses-day0000/t1ce.nii.gz", "P0002/ses-day0092/flair.nii.gz"]      # numbers in the order of the ids
    table = done.series[done.series["patient_id"] == "P0002"].reset_index(drop=True)
    assert table["decision"].tolist() == ["skip"]*3 + ["skip", "use", "use", "use", "skip"]
    assert set(table["reason"][:3]) == {"refused: localizer"} and "localizer" in table["problems"][0] and table["reason"][7] == "refused: diffusion"
    assert "most_slices: 9 slices against 5 slices" in table["reason"][3]
    assert not done.failures["stage"].tolist()
    assert pd.read_csv(tmp_path/"out"/"images.csv").columns.tolist() == ["patient_id", "session", "sequence", "path"]


@pytest.mark.parametrize("ids, stays", [("number", []), ("mapping", [])])
def test_nothing_planted_is_found_in_any_byte(clinic, tmp_path, ids, stays):
    done = convert_dicom(clinic, tmp_path/"out", ids=ids if ids == "number" else {"MRN-4711": "A", "../MRN-4712": "B"})
    assert len(done.images) == 4
    secrets = {part.lower() for v in PLANTED.values() for part in [v, *v.replace("^", " ").replace("-", " ").split()] if len(part) > 2}
    secrets |= {"mrn", "4711", "4712", "20200301", "20200601", "20190101", "2020-03-01", "01.03.2020", "100400", "gadovist"}
    for path in clinic.rglob("*.dcm"):
        d = pydicom.dcmread(path, stop_before_pixels=True)
        secrets |= {str(d.StudyInstanceUID), str(d.SeriesInstanceUID), str(d.SOPInstanceUID)}
    content = all_bytes(tmp_path/"out").replace(str(tmp_path).lower().encode(), b"")
    assert sorted(s for s in secrets if s.encode() in content) == stays
    assert b"quixote" not in (tmp_path/"out"/"series.csv").read_bytes().lower() and b"ax t1 for" in (tmp_path/"out"/"series.csv").read_bytes().lower()
    for path in (tmp_path/"out").glob("*/*/*.nii.gz"):
        header = nib.load(path).header
        assert [bytes(header[k].item()) for k in ("descrip", "aux_file", "db_name", "intent_name")] == [b""]*4 and not header.extensions


def test_sidecar_is_an_allow_list(clinic, tmp_path):
    done = convert_dicom(clinic, tmp_path/"out")
    facts = read_json(tmp_path/"out"/done.images["path"][2].replace(".nii.gz", ".json"))
    assert set(facts) == {"sequence", "manufacturer", "model", "field_t", "tr_ms", "te_ms", "ti_ms", "flip_degrees", "contrast", "orientation", "n_slices", "spacing_mm", "converter", "fallback", "sha256", "session", "series_key", "fingerprint", "made_by"}
    assert facts["contrast"] == "yes" and facts["ti_ms"] == 900


def test_ids_that_name_no_folder_are_refused(clinic, tmp_path):
    with pytest.raises(DataError, match="names a folder"): convert_dicom(clinic, tmp_path/"out", ids="keep")
    assert not (tmp_path/"out").exists()
    with pytest.raises(DataError, match="no patient_id for PatientID MRN-4711"): convert_dicom(clinic, tmp_path/"out", ids={"../MRN-4712": "B"})
    with pytest.raises(DataError, match="out lies in the DICOM folder"): convert_dicom(clinic, clinic/"out")
    with pytest.raises(DataError, match="key file lies in out"): convert_dicom(clinic, tmp_path/"out", key=tmp_path/"out"/"key.csv")


def test_numbers_stay_when_patients_are_added(tmp_path):
    write_series(tmp_path/"in"/"b", patient="B", uid="b")
    first = convert_dicom(tmp_path/"in", tmp_path/"out")
    write_series(tmp_path/"in"/"a", patient="A", uid="a")
    second = convert_dicom(tmp_path/"in", tmp_path/"out")
    key = pd.read_csv(tmp_path/"out_key.csv").set_index("dicom_id")["patient_id"]
    assert first.images["patient_id"].tolist() == ["P0001"] and key.to_dict() == {"A": "P0002", "B": "P0001"}
    assert second.images["path"].tolist() == ["P0001/ses-day0000/t1.nii.gz", "P0002/ses-day0000/t1.nii.gz"]


def test_an_earlier_study_moves_the_days_and_corrections_stay(tmp_path):
    write_series(tmp_path/"in"/"1", "1", description="T1 pre", day="20200601")
    write_series(tmp_path/"in"/"2", "2", description="T1 pre", day="20200601", number=2, n=8)
    out = tmp_path/"out"
    convert_dicom(tmp_path/"in", out)
    table = pd.read_csv(out/"series.csv", dtype=str, keep_default_na=False)
    table["decision"] = ["use", "skip"]                                      # in place, as a spreadsheet does
    table.to_csv(out/"series.csv", index=False)
    assert nib.load(out/convert_dicom(tmp_path/"in", out).images["path"][0]).shape[2] == 6
    write_series(tmp_path/"in"/"0", "0", study="0", description="T1 pre", day="20200501")
    done = convert_dicom(tmp_path/"in", out)
    assert done.images["session"].tolist() == ["ses-day0000", "ses-day0031"] and nib.load(out/done.images["path"][1]).shape[2] == 6
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.nii.gz")) == ["P0001/ses-day0000/t1.nii.gz", "P0001/ses-day0031/t1.nii.gz"]


def test_a_study_without_a_date_and_a_series_without_a_patient(tmp_path):
    write_series(tmp_path/"in"/"p"/"1", "1"); write_series(tmp_path/"in"/"p"/"2", "2", study="2", day="", times="t2", number=2); write_series(tmp_path/"in"/"q"/"3", "3", patient="", number=3)
    done = convert_dicom(tmp_path/"in", tmp_path/"out")
    assert done.images["path"].tolist() == ["P0001/ses-day0000/t1.nii.gz"]
    assert "no PatientID" in done.failures["error"][0] and "no study date" in done.failures["error"][1]
    table = done.series.copy()
    table.loc[table["sequence"] == "t2", ["session", "decision"]] = "ses-day0400", "use"
    assert "P0001/ses-day0400/t2.nii.gz" in convert_dicom(tmp_path/"in", tmp_path/"out", table=table).images["path"].tolist()
    assert convert_dicom(tmp_path/"in", tmp_path/"byfolder", patient_by="folder").series["patient_id"].tolist() == ["P0001", "P0001", "P0002"]


def test_mixed_orientation_is_a_problem_and_one_stack_may_be_chosen(tmp_path):
    voxels = write_series(tmp_path/"in", n=12, times="t2", description="T2", orientation=SAGITTAL)
    write_series(tmp_path/"in", n=20, times="t2", description="T2", orientation=AXIAL)
    done = convert_dicom(tmp_path/"in", tmp_path/"out")
    assert done.series["decision"].tolist() == ["problem"]*2 and MIXED in done.series["problems"][0] and "12 sagittal of 10 x 12, 20 axial of 10 x 12" in done.series["problems"][0]
    table = done.series.assign(decision=["use", "skip"])
    done = convert_dicom(tmp_path/"in", tmp_path/"out", table=table)
    assert sorted(nib.load(tmp_path/"out"/done.images["path"][0]).shape) == sorted(voxels.shape)


def test_corrections_win_and_bad_ones_name_the_row(clinic, tmp_path):
    first = convert_dicom(clinic, tmp_path/"out", plan_only=True)
    assert not list((tmp_path/"out").rglob("*.nii.gz"))
    table = pd.read_csv(tmp_path/"out"/"series.csv", dtype=str, keep_default_na=False)
    at = table.index[table["reason"] == "refused: diffusion"][0]
    table.loc[at, ["sequence", "decision"]] = "T2 ", " Use"
    table.to_excel(tmp_path/"corrected.xlsx", index=False)
    done = convert_dicom(clinic, tmp_path/"out", table=tmp_path/"corrected.xlsx")
    assert "P0002/ses-day0092/t2.nii.gz" in done.images["path"].tolist()
    row = table.index[table["decision"] == "use"][0]
    for column, value in (("sequence", "t7"), ("decision", "maybe"), ("series", "s999-0"), ("patient_id", "P9"), ("session", "a/b")):
        bad = table.copy()
        bad.loc[row, column] = value
        with pytest.raises(DataError, match=rf"row {row + 2} \("): read_corrections(bad, first.series, SeriesRules())
    with pytest.raises(DataError, match="lacks decision"): read_corrections(table.drop(columns="decision"), first.series, SeriesRules())
    with pytest.raises(DataError, match="No table"): convert_dicom(clinic, tmp_path/"out", table=tmp_path/"none.csv")


def test_a_choice_by_hand_cannot_hide_damage(tmp_path):
    write_series(tmp_path/"in"/"a", skip=(2,), description="T1"); write_series(tmp_path/"in"/"b", "b", number=2, times="t2")
    table = convert_dicom(tmp_path/"in", tmp_path/"out", plan_only=True).series.assign(decision="use")
    done = convert_dicom(tmp_path/"in", tmp_path/"out", table=table)
    assert done.images["sequence"].tolist() == ["t2"]
    assert done.failures[["stage", "series"]].values.tolist() == [["convert", table["series"][0]]] and "missing slice" in done.failures["error"][0]


def test_rules_from_a_file(clinic, tmp_path):
    (tmp_path/"rules.toml").write_text('min_slices = 6\nprefer = ["earliest"]\n[sequences.t2]\ndescription = "flair"\nnot_description = ""\n')
    rules = load_rules(tmp_path/"rules.toml")
    done = convert_dicom(clinic, tmp_path/"out", rules=tmp_path/"rules.toml", plan_only=True)
    assert rules.sequences["t2"].description == "flair" and done.series["reason"].str.contains("too few slices").any()
    (tmp_path/"bad.toml").write_text("[refuse.spine]\ndescripton = 'x'\n")
    with pytest.raises(DataError, match="bad.toml: refuse.spine.descripton: unknown setting; did you mean 'description'"): load_rules(tmp_path/"bad.toml")


# Whole or not at all, resuming, workers

def test_workers_give_the_same_bytes_and_a_second_run_writes_nothing(clinic, tmp_path):
    convert_dicom(clinic, tmp_path/"one")
    convert_dicom(clinic, tmp_path/"two", workers=2)
    files = sorted(p.relative_to(tmp_path/"one") for p in (tmp_path/"one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path/"two") for p in (tmp_path/"two").rglob("*") if p.is_file()) and len(files) == 13
    assert [f for f in files if (tmp_path/"one"/f).read_bytes() != (tmp_path/"two"/f).read_bytes()] == []
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/"one").rglob("*.nii.gz")}
    convert_dicom(clinic, tmp_path/"one")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path/"one").rglob("*.nii.gz")}


def test_a_killed_run_goes_on(tmp_path):
    "SIGKILL after the first file; no half file is left, what was done stays as it is, and the end is the same as of an unbroken run."
    for k in range(8): write_series(tmp_path/"in"/str(k), f"u{k}", n=12, patient=f"p{k:02d}")
    code = f"from brainmets.prep.dicom import convert_dicom; convert_dicom({str(tmp_path/'in')!r}, {str(tmp_path/'out')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.time() + 60
    while time.time() < until and len(list((tmp_path/"out").rglob("[!.]*.nii.gz"))) < 1 and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL); process.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"out").rglob("[!.]*.nii.gz")}
    assert 1 <= len(before) < 8 and not (tmp_path/"out"/"images.csv").exists()
    for path in before: nib.load(path).get_fdata()
    done = convert_dicom(tmp_path/"in", tmp_path/"out")
    assert len(done.images) == 8 and {p: p.stat().st_mtime_ns for p in before} == before
    convert_dicom(tmp_path/"in", tmp_path/"whole")
    for path in (tmp_path/"whole").rglob("*.nii.gz"): assert path.read_bytes() == (tmp_path/"out"/path.relative_to(tmp_path/"whole")).read_bytes()


def test_a_converter_that_lies_is_found(tmp_path, monkeypatch):
    "A converter that moves the volume by 2 mm, in place of dcm2niix: the fallback takes over and says why."
    write_series(tmp_path/"in")
    series, true_binary = only(tmp_path/"in"), dcm2niix.bin
    convert_series(series, tmp_path/"right.nii.gz")
    script = tmp_path/"dcm2niix"
    script.write_text(f"#!{sys.executable}\nimport sys, subprocess, nibabel as nib\nout = sys.argv[sys.argv.index('-o') + 1]\nsubprocess.run([{true_binary!r}, *sys.argv[1:]])\n"
                      "image = nib.load(out + '/out.nii')\nvalues, affine = image.get_fdata(), image.affine.copy()\naffine[0, 3] += 2\nnib.save(nib.Nifti1Image(values, affine), out + '/out.nii')\n")
    script.chmod(0o755)
    monkeypatch.setattr(dcm2niix, "bin", str(script))
    facts = convert_series(series, tmp_path/"again.nii.gz")
    assert facts["converter"] == "dicom2nifti" and "another grid than the headers state: corners 2.00 mm apart" in facts["fallback"]
    assert (tmp_path/"again.nii.gz").read_bytes() == (tmp_path/"right.nii.gz").read_bytes()


def test_formulas_for_spreadsheets_are_made_harmless(tmp_path):
    write_series(tmp_path/"in", description='=HYPERLINK("x")')
    assert convert_dicom(tmp_path/"in", tmp_path/"out").series["description"].tolist() == ["'=HYPERLINK(\"x\")"]


def test_min_slices_and_a_description_against_the_times(tmp_path):
    write_series(tmp_path/"in", description="T2 TSE")
    assert convert_dicom(tmp_path/"in", tmp_path/"out").series["reason"][0].startswith("the description says t2, the times (TR 2300, TE 3, TI 900 ms) say t1")
    assert [p.kind for p in only(tmp_path/"in", min_slices=7).problems] == ["too few slices"]
