"""The manifests of public data sets say what is known, ask for what is not, and agree with one another."""
import csv
import re
import tomllib
from pathlib import Path

import pytest

from brainmets.cohort import find_files, load_cohort, patients_on_disk
from brainmets.manifest import load_manifest, open_settings, patient_fields, setting_value, value_at

FOLDER = Path(__file__).resolve().parent.parent/"data_manifests"
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
NO_MANIFEST = {"brats_2021"}      # cohorts that overlaps name and that have no manifest here

YALE_ASKS = {"outcome.time", "outcome.unit", "outcome.happened", "outcome.censored",
             *(f"covariates.{name}.column" for name in ("age", "sex", "ethnicity", "pack_years", "primary", "extracranial_metastases")),
             "covariates.extracranial_metastases.values.yes", "covariates.extracranial_metastases.values.no"}
ASKS = {"pretreat_mets_to_brain_masks": YALE_ASKS, "openbtai_molab": {"table.sheet"}, "aurora": {"outcome.unit"},
        "ucsf_bmsr": set(), "brainmetshare": set(), "nyumets": set(), "brats_mets": set(), "ucsf_pdgm": set(), "radiomics_mm": set()}
LABELS = {"pretreat_mets_to_brain_masks": {"necrosis": (1,), "edema": (2,), "enhancing": (3,)},
          "brats_mets": {"necrosis": (1,), "edema": (2,), "enhancing": (3,), "cavity": (4,)},
          "ucsf_pdgm": {"necrosis": (1,), "edema": (2,), "enhancing": (4,)},
          "aurora": {"edema": (1,), "core": (2,)}, "nyumets": {"tumor": (1, 4)}, "ucsf_bmsr": {"tumor": (1,)},
          "brainmetshare": {"tumor": (1,)}, "openbtai_molab": {"enhancing": (1,), "necrosis": (2,)}}
UNVERIFIED = {"pretreat_mets_to_brain_masks": {"cohort.licence", "cohort.obtain", "overlap"},
              "ucsf_bmsr": {"cohort.licence", "covariates.age.unit"},
              "openbtai_molab": {"cohort.licence", "table.patient_format", "covariates.age.unit"},
              "brainmetshare": {"cohort.citation", "labels.tumor"},
              "nyumets": {"table.file", "cohort.expected.patients"},
              "brats_mets": {"cohort.citation", "cohort.licence"},
              "aurora": {"cohort.obtain", "table.file", "images.mask"},
              "ucsf_pdgm": {"images.shape", "images.sequences", "images.mask"},
              "radiomics_mm": {"table.patient_pattern"}}
every = pytest.mark.parametrize("name", PATHS)


def texts(value):
    "All texts inside a nested value, without the notes that people read."
    if isinstance(value, str): return [value]
    if isinstance(value, dict): return [t for key, inner in value.items() if key not in ("notes", "note") for t in texts(inner)]
    return [t for inner in value for t in texts(inner)] if isinstance(value, list) else []


def manifest(name, **settings): return load_manifest(PATHS[name], {key.replace("__", "."): value for key, value in settings.items()})


def test_every_data_set_has_a_manifest(): assert set(PATHS) == set(ASKS)


@every
def test_says_what_it_is_and_where_from(name):
    cohort = manifest(name).cohort
    assert cohort.name == name
    for text in (cohort.title, cohort.citation, cohort.licence, cohort.obtain): assert text.strip() and text != "?"
    assert cohort.notes and not cohort.synthetic


@every
def test_begins_with_purpose_and_source(name):
    first, second, *_ = PATHS[name].read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and second.startswith("# To obtain: ")


@every
def test_asks_what_no_source_states(name):
    asked = open_settings(manifest(name))
    assert set(asked) == ASKS[name]
    assert all(len(text) > 10 for text in asked.values()), f"a '?' without a sentence under [ask]: {asked}"
    assert set(manifest(name).ask) == set(asked), "[ask] explains a key that is not '?'"


@every
def test_names_what_is_unverified_and_why(name):
    found = manifest(name)           # the schema refuses a key that does not exist
    assert set(found.unverified) == UNVERIFIED[name]
    assert not found.unverified or "# Why unverified." in PATHS[name].read_text(encoding="utf-8")


@every
def test_no_absolute_path(name):
    for text in texts(tomllib.loads(PATHS[name].read_text(encoding="utf-8"))):
        assert not re.match(r"[/~\\]|[A-Za-z]:[/\\]", text) and ".." not in Path(text).parts, text


@every
def test_label_map(name):
    labels = manifest(name).labels
    assert (labels.tissues() if labels else None) == LABELS.get(name)


def test_habits_of_labels():
    assert manifest("nyumets").labels.background == [2]
    assert manifest("openbtai_molab").labels.coding == "lesion_digit"
    assert all(manifest(name).labels.coding == "value" for name in LABELS if name != "openbtai_molab")
    assert manifest("ucsf_bmsr").images.ignore_case


def test_units_of_time():
    "Days, months of 30.4 days, and two that are asked; the others have no outcome."
    outcomes = {name: manifest(name).outcome for name in PATHS}
    assert {name: o.unit for name, o in outcomes.items() if o} == {"ucsf_pdgm": "days", "radiomics_mm": "months", "aurora": "?",
                                                                  "pretreat_mets_to_brain_masks": "?"}
    assert outcomes["ucsf_pdgm"].days_factor == 1 and outcomes["radiomics_mm"].days_factor == 30.4


def test_answers_complete_the_yale_manifest():
    answers = {key: "B" for key in YALE_ASKS if key.endswith("column")}
    answers |= {"outcome.time": "T", "outcome.unit": "days", "outcome.happened": ["1"], "outcome.censored": ["0"],
                "covariates.extracranial_metastases.values.yes": ["1"], "covariates.extracranial_metastases.values.no": ["0"]}
    assert open_settings(load_manifest(PATHS["pretreat_mets_to_brain_masks"], answers)) == {}


def test_overlaps_name_each_other():
    overlaps = {(name, o.cohort): o for name in PATHS for o in manifest(name).overlap}
    assert set(overlaps) == {("pretreat_mets_to_brain_masks", "brats_mets"), ("brats_mets", "pretreat_mets_to_brain_masks"),
                             ("ucsf_bmsr", "brats_mets"), ("brats_mets", "ucsf_bmsr"), ("ucsf_pdgm", "brats_2021")}
    for (name, other), overlap in overlaps.items():
        assert other in PATHS or other in NO_MANIFEST
        if other in PATHS: assert overlaps[other, name].same_ids == overlap.same_ids


def test_switches_that_notes_describe():
    "The settings given in notes for other files and masks load, and mean what the notes say."
    bmsr = manifest("ucsf_bmsr", labels=setting_value("{ necrosis = 1, edema = 2, enhancing = 3 }"), images__optional=setting_value('["mask"]'),
                    images__mask="UCSF_BrainMetastases_TRAIN/{sample}/{sample}_BraTS-seg.nii.gz")
    assert bmsr.labels.tissues() == LABELS["pretreat_mets_to_brain_masks"]
    keys = {(name, key) for name in PATHS for note in manifest(name).cohort.notes for key in re.findall(r"--set ([\w.]+)=", note)}
    assert len(keys) >= 8
    for name, key in keys: value_at(manifest(name), key)     # raises for a key that does not exist


PLACES = [  # manifest, identifier in the table, sample, sequence, path as the source describes it
    ("pretreat_mets_to_brain_masks", "BraTS-MET-00086-000", "", "t1ce", "Pretreat-MetsToBrain-Masks/BraTS-MET-00086-000/BraTS-MET-00086-000-t1c.nii.gz"),
    ("pretreat_mets_to_brain_masks", "BraTS-MET-00086-000", "", "mask", "Pretreat-MetsToBrain-Masks/BraTS-MET-00086-000/BraTS-MET-00086-000-seg.nii.gz"),
    ("ucsf_bmsr", "100101A", "100101A", "t1ce", "UCSF_BrainMetastases_v1.3/UCSF_BrainMetastases_TRAIN/100101A/100101A_T1post.nii.gz"),
    ("ucsf_pdgm", "UCSF-PDGM-004", "", "t1ce", "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c.nii.gz"),
    ("ucsf_pdgm", "UCSF-PDGM-0433_FU007d", "", "mask", "UCSF-PDGM-v5/UCSF-PDGM-0433_FU007d_nifti/UCSF-PDGM-0433_FU007d_tumor_segmentation.nii.gz"),
    ("nyumets", "12345678", "1234567890", "t1ce", "data/imaging/patientId/12345678/studyId/1234567890/CT1.nii.gz"),
    ("aurora", "P12_Center_A", "", "mask", "A/P12_Center/scan_label.nii.gz"),
    ("aurora", "P12_B", "", "flair", "B/P12/scan_fla.nii.gz"),
    ("openbtai_molab", "010023", "", "mask", "10023/10023/NIFTI/10023_1_T1_msk.nii")]


@pytest.mark.parametrize("name, identifier, sample, sequence, place", PLACES)
def test_pattern_finds_the_described_path(name, identifier, sample, sequence, place, tmp_path):
    found = manifest(name)
    for other in (place, place.replace("nii", "other.nii")):
        (tmp_path/other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/other).touch()
    patient, groups = patient_fields(found.table, identifier)
    pattern = found.images.mask if sequence == "mask" else found.images.sequences[sequence]
    fields = {"patient": patient, "sample": sample, **groups}
    assert find_files((tmp_path/found.images.root).resolve(), pattern, fields, found.images.ignore_case) == [(tmp_path/place).resolve()]


def test_brats_cases_and_yale_rows_share_identifiers(tmp_path):
    "A case of BraTS-METS and a row of the Yale workbook with the same number are one patient_id; sessions are not patients."
    for case in ("BraTS-MET-00086-000", "BraTS-MET-00086-001"):
        (tmp_path/case).mkdir()
        (tmp_path/case/f"{case}-t1n.nii.gz").touch()
    cases = list(patients_on_disk(manifest("brats_mets").images, tmp_path).values())
    assert cases == [{"patient": "00086", "session": "000"}, {"patient": "00086", "session": "001"}]
    assert patient_fields(manifest("pretreat_mets_to_brain_masks").table, "BraTS-MET-00086-000")[0] == "00086"


def test_exams_of_one_patient_are_joined():
    bmsr, pdgm, melanoma = (manifest(name).table for name in ("ucsf_bmsr", "ucsf_pdgm", "radiomics_mm"))
    assert patient_fields(bmsr, "100101A")[0] == patient_fields(bmsr, "100101B")[0] == "100101"
    assert patient_fields(pdgm, "UCSF-PDGM-433")[0] == patient_fields(pdgm, "UCSF-PDGM-0433_FU007d")[0] == "UCSF-PDGM-0433"
    assert patient_fields(melanoma, "16")[0] == patient_fields(melanoma, "16_2")[0] == "MM-16"
    assert patient_fields(melanoma, "2")[0] == patient_fields(melanoma, "02")[0] == "MM-02"


def test_ucsf_pdgm_loads(real_data):
    cohort = load_cohort(PATHS["ucsf_pdgm"], real_data/"ucsf_pdgm")
    assert (len(cohort.samples), cohort.n_patients, int(cohort.samples.event.sum())) == (500, 494, 250)
    assert [(step.n_samples, step.n_patients) for step in cohort.flow] == [(501, 495), (500, 494)]
    assert cohort.samples.idh.value_counts().to_dict() == {"wildtype": 397, "mutant": 103}
    assert {p.code for p in cohort.problems} == {"joined", "no-image-folder"}
    raw = load_cohort(PATHS["ucsf_pdgm"], real_data/"ucsf_pdgm", {"outcome.unit": "weeks"}).samples
    assert (raw.time_days == 7*cohort.samples.time_days).all()


def test_ucsf_pdgm_overlap_is_counted(real_data):
    found = manifest("ucsf_pdgm")
    with open(real_data/"ucsf_pdgm"/found.table.file, encoding="utf-8-sig", newline="") as file: rows = list(csv.DictReader(file))
    cases = [row for row in rows if row[found.overlap[0].column]]
    patients = {patient_fields(found.table, row["ID"])[0] for row in cases}
    assert (len(cases), len(patients)) == (298, found.overlap[0].n_patients)


@pytest.mark.parametrize("file, counts", [("M_manualContours_anon.csv", (44, 18, 10)), ("M_unetContours_anon.csv", (19, 11, 6))])
def test_radiomics_mm_loads(file, counts, real_data):
    cohort = load_cohort(PATHS["radiomics_mm"], real_data/"radiomics_mm", {"table.file": file})
    samples = cohort.samples
    assert (len(samples), cohort.n_patients, int(samples.event.sum())) == counts
    assert {group: len(cohort.names(group=group)) for group in ("lesion", "margin", "large_margin", "clinical")} == \
        {"lesion": 788, "margin": 788, "large_margin": 788, "clinical": 23}
    assert abs(samples.time_days - samples.time_days.round()).max() < 1e-6, "months of 30.4 days are whole days"
    constant = {c for c in cohort.names(group="clinical") if samples[c].nunique() <= 1}
    assert constant == set(cohort.names(group="clinical")), "the authors zeroed all clinical and dose columns"
    assert not [c.source for c in cohort.columns if re.match("status|mOfPD|mRN|mBlutung|mIfPD|.*diagnostics_", c.source)]
