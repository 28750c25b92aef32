"""The smallest corpus on which both stages train: eight phantoms, their features, a random reader; made once for a test module."""
import csv

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

from medvlm3d.studies.crossmodal import Facts
from medvlm3d.data.m3d import load_m3d
from medvlm3d.method.encoders import load_encoder
from medvlm3d.features.store import encode_images
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.training.plan import Plan
from medvlm3d.training.reader import make_reader, reader_tokenizer
from medvlm3d.scans.prepare import Preprocess

LORA = {"r": 2, "alpha": 4, "dropout": .1, "targets": "all-linear"}


def make_corpus(root, train=8):
    "A phantom of `train` cases below `root` with its features and a random reader; returns the fields of a model for it."
    make_phantom(root/"data", train=train, validation=1, test=1, shape=(8, 32, 32), workers=1,
                 progress=False)
    encoder, preprocess = load_encoder("tiny", size=32), Preprocess(8, 32, 32)
    encode_images(root/"store", root/"data", images=[s.image for s in load_m3d(root/"data")],
                  encoder=encoder, preprocess=preprocess, rho=50, progress=False)
    tokenizer = reader_tokenizer()
    make_reader(tokenizer, hidden=16, layers=1, heads=2).save_pretrained(root/"reader")
    tokenizer.save_pretrained(root/"reader")
    return dict(encoder="tiny", encoder_channels=encoder.channels, grid=list(encoder.grid),
                preprocess=preprocess.to_dict(), rho=50, whiten=True, channels=8, answer_style="text")


def make_plan(root, fields, stages=None, **changes):
    "A plan on the corpus below `root`: stage 2 alone unless `stages` are given (its connector is a random one)."
    stages = stages or [{
        "stage": 2, "tasks": ["closed"], "epochs": 3, "lr": 5e-3, "batch": 2, "accumulation": 1, "lora": LORA
    }]
    return Plan.of({
        "data": str(root/"data"), "store": str(root/"store"), "llm": str(root/"reader"),
        "stages": stages, "model": fields, "precision": "fp32", "save_every": 2, "log_every": 1, **changes
    })


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return root, make_corpus(root)


def invented(n, modalities=("MR", "PT")):
    "Facts of volumes that need not exist, two of each patient."
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        side, level = rng.choice(["right", "left"]), rng.choice(["upper", "lower"])
        shares = (1., 0.) if side == "right" else (0., 1.)
        made.append(
            Facts(f"c{i}", f"p{i // 2}", source="invented", modality=modalities[i // 2 % len(modalities)],
                  kind="x", image=ROOT/f"volume-{i}.nii.gz", mask=ROOT/f"mask-{i}.nii.gz", side=str(side),
                  level=str(level), shares=shares))
    return made


# --- layouts of public corpora, file by file ---------------------------------------------------------------

LPS = np.diag([-.7, -.7, 1.5, 1.])


def write_rows(file, rows, delimiter=","):
    "A CSV of dictionaries, with the columns of the first."
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def save_nifti(file, array, affine=LPS):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), file)


def chest(seed=0, shape=(20, 18, 10)):
    "Hounsfield units of air, a body and two lungs, (x, y, z) int16."
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.where(x**2 + y**2 < .7, np.where((np.abs(x) - .4)**2 + y**2 < .06, -850, 40), -1000) + 30 * z
    return (hu + np.random.default_rng(seed).normal(0, 10, shape)).round().astype(np.int16)


def write_ctrate_volume(root, release, name, array, affine=LPS):
    "One file of CT-RATE: dataset/RELEASE/patient/visit/name.nii.gz."
    visit = name.rsplit("_", 1)[0]
    save_nifti(root/"dataset"/release/visit.rsplit("_", 1)[0]/visit/f"{name}.nii.gz", array, affine)


def ctrate_metadata(name, intercept=-1024, **changes):
    "A row of CT-RATE's metadata: the spacing is a string, the slice distance a number or nothing."
    return {"VolumeName": f"{name}.nii.gz", "Manufacturer": "Siemens", "RescaleType": "HU", "RescaleSlope": 1,
            "RescaleIntercept": intercept, "XYSpacing": "[0.7, 0.7]", "ZSpacing": 1.5,
            "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]", **changes}


def ctrate_report(name, findings="Both lungs are clear.", impression="Not given."):
    return {"VolumeName": f"{name}.nii.gz", "ClinicalInformation_EN": "Not given.", "Technique_EN": "Not given.",
            "Findings_EN": findings, "Impressions_EN": impression}


def write_ctrate(root, names=("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1"), fixed=True,
                 intercept=-1024):
    "CT-RATE in one of its two releases, with reports, metadata and labels."
    for n, name in enumerate(names):
        part = name.split("_")[0]
        if fixed: write_ctrate_volume(root, f"{part}_fixed", name, chest(n))
        else: write_ctrate_volume(root, part, name, chest(n).astype(np.float32) - intercept, np.eye(4))
    for part, word in (("train", "train"), ("valid", "validation")):
        mine = [name for name in names if name.startswith(part)]
        write_rows(root/"radiology_text_reports"/f"{word}_reports.csv",
                   [ctrate_report(name, f"Visit {name[:-2]}.") for name in mine])
        write_rows(root/"metadata"/f"{word}_metadata.csv", [ctrate_metadata(name, intercept) for name in mine])
        write_rows(root/"multi_abnormality_labels"/f"{part}_predicted_labels.csv",
                   [{"VolumeName": f"{name}.nii.gz", "Lung nodule": 1, "Emphysema": 0} for name in mine])
    return root


def rad_row(volume, question, answer, kind="Open", letter="-", choices=("-",) * 4):
    "A row of 3D-RAD."
    return {"Task": "Existence Detection", "Subtask": "Atelectasis", "VolumeName": volume, "Question": question,
            "Answer": answer, "QuestionType": kind, "AnswerChoice": letter,
            **{f"Choice {c}": text for c, text in zip("ABCD", choices)}}


def write_totalseg(root, cases=12, shape=(24, 24, 16), seed=0):
    "TotalSegmentator's layout: a CT and a few organ masks per case, `meta.csv` with semicolons."
    rng = np.random.default_rng(seed)
    names = ("liver", "spleen", "stomach", "heart", "brain", "kidney_left", "kidney_right")
    for case in range(cases):
        folder = root/f"s{case:04d}"
        save_nifti(folder/"ct.nii.gz", chest(case, shape))
        for name in names:
            mask, low, size = np.zeros(shape, np.uint8), rng.integers(2, 12, 3), rng.integers(5, 8, 3)
            if (kind := rng.integers(3)) == 2: low[2] = 0
            else: low[2] = rng.integers(1, 7)
            if kind: mask[tuple(slice(a, a + n) for a, n in zip(low, size))] = 1
            save_nifti(folder/"segmentations"/f"{name}.nii.gz", mask)
    write_rows(root/"meta.csv", [{"image_id": f"s{n:04d}", "age": 60, "gender": "f", "study_type": "ct abdomen",
                                  "split": "train" if n % 4 else "val" if n % 8 else "test"} for n in range(cases)], ";")
