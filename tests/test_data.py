"""Data sets: every layout as it lies on disk, every fault of a list, leaks found and cut, no name written."""
import csv
import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from own_corpus import write_scans
from processes import command
from corpora import LPS, chest, ctrate_metadata, make_plan, rad_row, save_nifti, write_ctrate, write_ctrate_volume
from corpora import write_rows, write_totalseg
from PIL import Image
from scan_files import nrrd_bytes, patient, save_dicom, save_enhanced
from typer.testing import CliRunner

from medvlm3d.phantoms.benchmark import make_benchmark
from medvlm3d.front.cli import app
from medvlm3d.base.core import MedVLM3DError, RunFolder
from medvlm3d.data.corpora import BRATS, find_scans, left_over, load_autopet, load_brats, load_folder
from medvlm3d.data.corpora import study_samples
from medvlm3d.front.data import data_app
from medvlm3d.data.ctrate import side_of
from medvlm3d.data.m3d import COLUMNS, image_reader, load_m3d, read_image, read_m3d
from medvlm3d.data.samples import Sample
from medvlm3d.method.encoders import load_encoder
from medvlm3d.data.ties import audit, find_ties, take_census
from medvlm3d.data.manifest import check_lengths, load_samples, pin_data, read_manifest, samples_root
from medvlm3d.data.manifest import scan_manifest, sha256_image, volume_files, with_hashes, write_manifest
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.training.reader import make_reader, reader_tokenizer
from medvlm3d.data.similarity import jaccard, near_texts, near_volumes, set_matrix, shingles, volume_hash
from medvlm3d.data.similarity import z_scores
from medvlm3d.phantoms.prose import varied_report
from medvlm3d.data.split import assign, groups_of, split_corpus
from medvlm3d.training.stages import train
from medvlm3d.scans.prepare import Preprocess

NAME = "Beeblebrox_Zaphod_1952-03-11"
QUIET = dict(workers=1, progress=False)
VERBS = ("phantom", "probe", "layout", "m3d", "brats", "autopet", "ctrate", "llava", "threedrad",
         "merlin", "totalseg", "folder", "verify", "split", "crossmodal",
         "report")
LISTS = ("train", "validation", "test", "test1k", "test500", "test100", "hard_test")
TYPED = ("--encoder", "tiny", "--depth", "8", "--size", "32", "--rho", "50", "--float32", "--quiet")
STACK, AFFINE = patient(np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16), "SPL")


def smooth(seed, shape):
    "A volume that changes little from slice to slice, in [0, 1]."
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    waves = 0
    for _ in range(8):
        strength, slow, across, down = rng.normal(), rng.uniform(.3, 1), *rng.integers(0, 5, 2)
        waves = waves + strength * np.cos(np.pi * (slow * grid[0] + across * grid[1] + down * grid[2])
                                          + rng.uniform(0, 6))
    return ((waves - waves.min()) / np.ptp(waves)).astype(np.float32)


def write_nifti(path, array, affine=np.diag([-1., -1., 1., 1.])):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_table(path, rows, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([columns, *rows])


def row(image, kind=3, question="Which organ?", choices=("liver", "NA", "spleen", "NA"), answer="spleen",
        letter="C"):
    return [image, f"{Path(image).parent}/text.txt", kind, question, *choices, answer, letter]


def m3d_image(case, series="Axial_non_contrast", source="ct_quizze"):
    return f"M3D_Cap_npy/{source}/{case:06d}/{series}.npy"


@pytest.fixture
def m3d(tmp_path):
    """M3D as its authors lay it out: lists and tables in folders of their own, eight cases, every list
    and table."""
    root, images = tmp_path/"M3D", {}
    for n in range(8):
        image = images[n] = m3d_image(n, source="ct_case" if n % 2 else "ct_quizze")
        (root/image).parent.mkdir(parents=True)
        np.save(root/image, smooth(n, (8, 32, 32))[None])
        (root/image).with_name("text.txt").write_text(
            f"Title: x\nstudy_findings: {varied_report(np.random.default_rng(n))}\ndiscussion: none\n")
    entry = lambda n: {"image": images[n], "text": str(Path(images[n]).with_name("text.txt"))}
    where = dict(zip(LISTS, ([0, 1, 2, 3], [4], [5, 6, 7], [5, 6], [5], [5], [6])))
    lists = {name: [entry(n) for n in where[name]] for name in LISTS}
    (root/"M3D_Cap_npy"/"M3D_Cap.json").write_text(json.dumps(lists))
    for table, n in (("train", 0), ("val", 4), ("test", 5), ("test5k", 5)):
        write_table(root/"M3D-VQA"/f"M3D_VQA_{table}.csv", [
            row(images[n]),
            row(images[n], 1, "Which plane?", ("axial", "coronal", "sagittal", "oblique"), "axial", "A")
        ])
    yes_no = [c for c in COLUMNS if "Choice" not in c]
    write_table(root/"M3D-VQA"/"M3D_VQA_yn_train.csv",
                [[images[1], "", 4, "Is there a mass?", "Yes"], [images[1], "", 4, "Is it old?", "no"]],
                yes_no)
    return root


def listing(tmp_path, n=12, **changes):
    "A manifest of `n` report samples with volumes of their own: (samples, root)."
    root, samples = tmp_path/"listed", []
    for i in range(n):
        image = f"v/{i}/axial.npy"
        (root/image).parent.mkdir(parents=True, exist_ok=True)
        np.save(root/image, smooth(100 + i, (8, 24, 24))[None])
        samples.append(
            Sample(f"s{i}", f"c{i}", image=image, split="train" if i < n - 4 else "test", task="report",
                   type="Report", answer=varied_report(np.random.default_rng((3, i))), **changes))
    return with_hashes(root, samples, workers=1), root


def refused(function, *parts):
    "The message of the error that `function` raises; it holds all `parts`."
    with pytest.raises(MedVLM3DError) as e: function()
    for part in parts: assert part in str(e.value), (part, str(e.value))
    return str(e.value)


# --- M3D as it lies on disk ------------------------------------------------------------------------

def test_every_list_and_table_of_m3d_is_read(m3d):
    samples = load_m3d(m3d)
    counts = Counter((s.split, s.task) for s in samples)
    assert {name: counts[name, "report"] for name in LISTS} == {
        "train": 4, "validation": 1, "test": 3, "test1k": 2, "test500": 1, "test100": 1, "hard_test": 1
    }
    assert all(counts[split, task] == 2 for split in ("train", "validation", "test", "test5k", "yn_train")
               for task in ("closed", "open"))
    assert len({s.id for s in samples}) == len(samples)
    closed = [s for s in samples if s.task == "closed" and s.type == "Organ"]
    assert all(s.choices == ("liver", "NA", "spleen", "NA") and s.letter == "C" for s in closed)
    yes, no = [s for s in samples if s.split == "yn_train" and s.task == "closed"]
    assert (yes.choices, yes.answer, yes.letter, no.answer, no.letter) == (("Yes", "No"), "Yes", "A", "No",
                                                                           "B")
    assert {(s.plane, s.phase) for s in samples} == {("axial", "non-contrast")}
    assert {s.case.split("/")[0] for s in samples} == {"ct_case", "ct_quizze"}


def test_the_phantom_loads_as_before(tmp_path):
    "The samples of a phantom, checked against a second, naive reading of its files."
    make_phantom(tmp_path, train=6, validation=2, test=4, shape=(8, 32, 32), **QUIET)
    samples, expected = load_m3d(tmp_path), []
    for split, entries in json.loads((tmp_path/"M3D_Cap.json").read_text()).items():
        for n, e in enumerate(entries):
            text = (tmp_path/e["text"]).read_text().split("study_findings: ")[1].strip()
            expected.append((f"{split}/report/{n}", e["image"].split("/", 1)[1].rsplit("/", 1)[0], e["image"],
                             split, "report", "Report", "", (), text, ""))
    for split, stem in (("train", "train"), ("validation", "val"), ("test", "test")):
        with open(tmp_path/f"M3D_VQA_{stem}.csv", newline="") as f:
            for n, r in enumerate(list(csv.reader(f))[1:]):
                case = r[0].split("/", 1)[1].rsplit("/", 1)[0]
                kind = ("Plane", "Phase", "Organ", "Abnormality", "Location")[int(r[2]) - 1]
                expected.append((f"{split}/closed/{n}", case, r[0], split, "closed", kind, r[3],
                                 tuple(r[4:8]), r[8], r[9]))
                expected.append((f"{split}/open/{n}", case, r[0], split, "open", kind, r[3], (), r[8], ""))
    assert [(s.id, s.case, s.image, s.split, s.task, s.type, s.question, s.choices, s.answer, s.letter)
            for s in samples] == expected


def test_prepared_volumes_in_every_form_give_the_same_voxels(tmp_path):
    "(1, 32, 256, 256) float32, and 128×256×256 NIfTI as SimpleITK and as nibabel would write it."
    array = smooth(0, (32, 256, 256))
    fine = np.repeat((array * 255).astype(np.uint8), 4, 0)
    folder = tmp_path/"M3D_Cap_npy"/"ct_quizze"/"005461"
    folder.mkdir(parents=True)
    np.save(folder/"Axial_non_contrast.npy", array[None])
    write_nifti(folder/"Coronal_bone_window.nii.gz", fine.transpose(2, 1, 0))
    write_nifti(folder/"Sagittal_C__portal_venous_phase.nii.gz", fine, np.eye(4))
    (folder/"text.txt").write_text("study_findings: A cyst of the liver.")
    entries = [{
        "image": f"M3D_Cap_npy/ct_quizze/005461/{name}.npy", "text": "M3D_Cap_npy/ct_quizze/005461/text.txt"
    } for name in ("Axial_non_contrast", "Coronal_bone_window", "Sagittal_C__portal_venous_phase")]
    (tmp_path/"M3D_Cap.json").write_text(json.dumps({"train": entries}))
    npy, last, first = load_m3d(tmp_path)
    assert (npy.plane, last.plane, first.plane) == ("axial", "coronal", "sagittal")
    assert (npy.phase, last.phase, first.phase) == ("non-contrast", "", "portal venous")
    assert last.image.endswith(".nii.gz")
    assert np.array_equal(read_image(tmp_path/npy.image).array, array)
    for s in (last, first):
        assert np.array_equal(read_image(tmp_path/s.image).array, fine)
        assert read_image(tmp_path/s.image).plane == s.plane


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_raw_folders_of_slices(tmp_path, kind):
    """Numbered slices with text.txt above: numbers are sorted as numbers, plane from the name of the
    series, interleaved order seen."""
    array = (smooth(1, (24, 40, 40)) * 255).astype(np.uint8)
    case, order = tmp_path/"M3D_Cap"/"ct_quizze"/"005461", np.r_[0:24:2, 1:24:2]
    for series, slices in (("Coronal_C__portal_venous_phase", array), ("_non_contrast", array[order])):
        (case/series).mkdir(parents=True)
        for d, x in enumerate(slices):
            Image.fromarray(x).save(case/series/f"{d}.{kind}",
                                    **({"quality": 95} if kind == "jpeg" else {}))
    (case/"text.txt").write_text("\ufeffstudy_findings: Normal.\r\n", encoding="utf-8")
    coronal, mixed = load_m3d(tmp_path)
    assert (coronal.phase, mixed.phase) == ("portal venous", "non-contrast")
    assert (coronal.plane, mixed.plane, coronal.split, coronal.answer,
            coronal.case) == ("coronal", "", "", "Normal.", "ct_quizze/005461")
    volume = read_m3d(tmp_path/coronal.image)
    assert volume.plane == "coronal" and np.abs(volume.array - array).max() <= (0 if kind == "png" else 12)
    assert not any("interleaved" in w for w in volume.warnings)
    assert any("interleaved" in w for w in read_m3d(tmp_path/mixed.image).warnings)
    found = audit(tmp_path, **QUIET)
    assert not found["passed"] and found["problems by reason"] == {"its slices look interleaved": 1}
    assert "005461/text.txt" in found["first problems"][0]


def test_raw_folders_that_are_none(tmp_path):
    (tmp_path/"000001").mkdir()
    (tmp_path/"000001"/"text.txt").write_text("study_findings: Normal.")
    refused(lambda: load_m3d(tmp_path), "000001/text.txt: has no series beside it", "Restore")
    (tmp_path/NAME).mkdir()
    (tmp_path/NAME/"text.txt").write_text("study_findings: Normal.")
    assert NAME not in refused(lambda: load_m3d(tmp_path), "is not named with six digits",
                               "medvlm3d data folder")


def test_the_folder_above_a_raw_case_is_not_repeated(tmp_path):
    """Two cases of the same number in the folders of two people are two cases; neither the audit nor an
    error says whose."""
    for name in (NAME, "Trillian"):
        (tmp_path/name/"000001"/"Axial_non_contrast").mkdir(parents=True)
        (tmp_path/name/"000001"/
         "text.txt").write_text(f"study_findings: Normal, as dictated by {len(name)}.")
        for d in range(3):
            Image.fromarray((smooth(len(name), (8, 8, 8)) * 255).astype(np.uint8)[d]).save(
                tmp_path/name/"000001"/"Axial_non_contrast"/f"{d}.png")
    assert len({s.case for s in load_m3d(tmp_path)}) == 2
    (tmp_path/NAME/"000001"/"text.txt").write_text(" ")
    (tmp_path/"Trillian"/"000001"/"Axial_non_contrast"/"1.png").write_bytes(b"torn")
    said = refused(lambda: load_m3d(tmp_path), "/000001/text.txt: the report is empty") + json.dumps(
        audit(tmp_path, **QUIET))
    assert "is no readable picture" in said and NAME not in said and "Trillian" not in said


def test_a_phantom_is_listed_and_read_as_the_modality_it_was_drawn_in(tmp_path):
    for modality in ("CT", "MR", "PT"):
        make_benchmark(tmp_path/modality, modality, train=2, validation=0, test=1, shape=(8, 32, 32),
                       **QUIET)
        samples = load_m3d(tmp_path/modality)
        assert {s.modality for s in samples} == {modality}
        assert {read_image(tmp_path/modality/s.image).modality for s in samples[:3]} == {modality}


def test_numbers_are_read_as_what_the_corpus_says_they_are(tmp_path):
    """Values that would pass for Hounsfield units, under the names of BraTS and AutoPET, and under a
    manifest's word."""
    for name in ("BraTS-GLI-00002-000-t2f.nii.gz", "SUV.nii.gz", "CTres.nii.gz", "scan.nii.gz"):
        write_nifti(tmp_path/name, 1000 * smooth(0, (8, 8, 6)) - 700)
    found = {
        name: read_image(tmp_path/name)
        for name in ("BraTS-GLI-00002-000-t2f.nii.gz", "SUV.nii.gz", "CTres.nii.gz", "scan.nii.gz")
    }
    assert [(v.modality, v.intensity) for v in found.values()] == [("MR", "arbitrary"), ("PT", "SUV"),
                                                                   ("CT", "HU"), ("CT", "HU")]
    assert "taken for CT in HU because of its values" in found["scan.nii.gz"].warnings
    assert "PT, SUV: as told" in found["SUV.nii.gz"].warnings
    read = image_reader(
        tmp_path,
        [Sample("1", "c", image="scan.nii.gz", split="", task="image", type="Image", modality="MR")])
    assert (read("scan.nii.gz").modality, read(tmp_path/"scan.nii.gz").intensity) == ("MR", "arbitrary")


# --- faults of lists and tables --------------------------------------------------------------------

def test_all_faults_of_m3d_are_named_at_once(m3d, tmp_path):
    images = sorted(p.relative_to(m3d).as_posix() for p in m3d.rglob("*.npy"))
    (tmp_path/"outside.npy").write_bytes(b"x")
    (m3d/"link.npy").symlink_to(tmp_path/"outside.npy")
    rows = [
        row("../outside.npy"),
        row(str(tmp_path/"outside.npy")),
        row("link.npy"),
        row("M3D_Cap_npy/ct_case/000099/x.npy"),
        row(images[0], 9),
        row(images[0], question=" "),
        row(images[0], answer="lung"),
        row(images[0], letter="A"),
        row(images[0], choices=("NA",) * 4),
        row(images[0], question="<image> Which?"),
        row(images[0])[:7],
        row(images[0], choices=("spleen", "NA", "spleen", "NA"))
    ]
    write_table(m3d/"M3D-VQA"/"M3D_VQA_train.csv", rows)
    table = m3d/"M3D-VQA"/"M3D_VQA_val.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"Which plane?", "Où?".encode("latin-1")))
    (m3d/images[1]).with_name("text.txt").write_bytes("study_findings: Lésion".encode("latin-1"))
    (m3d/m3d_image(4)).with_name("text.txt").write_text("  \n")
    message = refused(lambda: load_m3d(m3d), "has 15 problems",
                      "M3D_VQA_val.csv:3: is not UTF-8 (byte 0xf9). Save the file as UTF-8.",
                      "its text file is not UTF-8 (byte 0xe9)", "the report is empty")
    for line, reason in enumerate(
        ("leaves the data root", "leaves the data root", "link out of the data root", "does not exist",
         "question type is not one of 1 to 5", "question is empty", "answer is not among the choices",
         "not the choice that its letter names", "fewer than two choices", "contains <image>",
         "too many or too few columns", "two choices are the same"), 2):
        assert re.search(rf"M3D_VQA_train.csv:{line}: [^\n]*{re.escape(reason)}[^\n]*\. [A-Z]",
                         message), (line, reason)
    assert "outside" not in message and "lung" not in message
    sound = load_m3d(m3d, rejects=tmp_path/"rejects.jsonl")
    rejected = [json.loads(line) for line in (tmp_path/"rejects.jsonl").read_text().splitlines()]
    assert len(rejected) == 15 and set(rejected[0]) == {"where", "why", "remedy"}
    assert not {s.where for s in sound} & {r["where"] for r in rejected}


def test_crlf_bom_and_commas_in_quotes_do_no_harm(m3d):
    image = m3d_image(0)
    write_table(m3d/"M3D-VQA"/"M3D_VQA_train.csv", [row(image, question='Which organ, "really"?')])
    table = m3d/"M3D-VQA"/"M3D_VQA_train.csv"
    assert b"\r\n" in table.read_bytes()
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert [s.question for s in load_m3d(m3d) if s.split == "train" and s.task == "open"
            ] == ['Which organ, "really"?']


@pytest.mark.parametrize("content, reason",
                         [(b'{"train": [', "M3D_Cap.json:1: is not JSON"),
                          (b'{"exam": []}', "M3D_Cap.json:exam: is no list of M3D"),
                          (b'{"train": [{"image": 7}]}', "M3D_Cap.json:train[0]: has no image and text")])
def test_a_broken_list_is_named(m3d, content, reason):
    (m3d/"M3D_Cap_npy"/"M3D_Cap.json").write_bytes(content)
    refused(lambda: load_m3d(m3d), reason)


def test_a_table_with_other_columns_or_an_open_quote(m3d):
    table = m3d/"M3D-VQA"/"M3D_VQA_train.csv"
    write_table(table, [], ["image", "question"])
    refused(lambda: load_m3d(m3d), "M3D_VQA_train.csv:1: does not have M3D's columns", "They are Image Path")
    write_table(table, [row(m3d_image(0))])
    table.write_text(table.read_text() + 'a,"b' + "x" * 200_000 + "\n")
    refused(lambda: load_m3d(m3d), "M3D_VQA_train.csv:3: is no CSV", "one may never close")


def test_a_case_on_two_sides_cannot_be_rejected_away(m3d, tmp_path):
    file = m3d/"M3D_Cap_npy"/"M3D_Cap.json"
    lists = json.loads(file.read_text())
    lists["hard_test"].append(lists["train"][2])
    file.write_text(json.dumps(lists))
    for rejects in (None, tmp_path/"rejects.jsonl"):
        refused(lambda: load_m3d(m3d, rejects=rejects),
                "M3D_Cap.json:hard_test[1]: its case stands in train (M3D_Cap.json:train[2]) and in test",
                "medvlm3d data split")
    assert len(load_m3d(m3d, allow_shared=True)) == len(
        load_m3d(m3d, allow_shared=True, rejects=tmp_path/"rejects.jsonl"))


# --- manifests -------------------------------------------------------------------------------------

def test_a_manifest_keeps_every_field(tmp_path):
    samples, root = listing(tmp_path, source="S", licence="CC0", patient="p", modality="MR", plane="sagittal",
                            phase="arterial", series=0, frame=2, axis_order="DHW")
    closed = replace(samples[0], id="q", task="closed", type="Organ", question="Größe? “x”",
                     choices=("a", "NA", "b"), answer="b", letter="C")
    write_manifest(root/"m.jsonl", [*samples, closed])
    assert read_manifest(root/"m.jsonl") == [*samples, closed]
    assert [s.where for s in read_manifest(root/"m.jsonl")][-1] == "m.jsonl:13"


def without(record, name): return {k: v for k, v in record.items() if k != name}


def with_words(record, **changes): return {**record, "question": "?", **changes}


OTHER = "another case, patient, hash or way to read it than line 6"
FAULTS = {   # record → a faulty line, and the reason that names it
    "not JSON": (lambda r: b'{"id": "x"', "is not JSON"),
    "NaN": (lambda r: json.dumps({**r, "case": float("nan")}).encode(), "NaN"),
    "a list": (lambda r: b"[1, 2]", "is no JSON object"),
    "latin-1": (lambda r: json.dumps({**r, "report": "Lésion"}, ensure_ascii=False).encode("latin-1"),
                "is not UTF-8 (byte 0xe9)"),
    "no case": (lambda r: without(r, "case"), "lacks case"),
    "unknown field": (lambda r: {**r, "Zaphod": 1}, "has 1 unknown field"),
    "number": (lambda r: {**r, "id": 5}, "id is no text"),
    "task": (lambda r: {**r, "task": "Zaphod"}, "task is not known"),
    "split": (lambda r: {**r, "split": "Zaphod"}, "split is not known"),
    "hash": (lambda r: {**r, "sha256": "Zaphod"}, "sha256 is no hash"),
    "series": (lambda r: {**r, "series": "Zaphod"}, "series is no number"),
    "frame": (lambda r: {**r, "frame": True, "series": -1}, "series, frame is no number"),
    "axes": (lambda r: {**r, "axis_order": "Zaphod"}, "axis_order is not known"),
    "other frame": (lambda r: {**r, "frame": 1}, OTHER),
    "above": (lambda r: {**r, "image": "v/../../Zaphod.npy"}, "leaves the data root"),
    "absolute": (lambda r: {**r, "image": "/Zaphod.npy"}, "leaves the data root"),
    "link": (lambda r: {**r, "image": "v/link.npy"}, "link out of the data root"),
    "missing": (lambda r: {**r, "image": "v/Zaphod.npy"}, "does not exist"),
    "same id": (lambda r: {**r, "id": "s1"}, "repeats the id of line 2"),
    "empty report": (lambda r: {**r, "report": " \n"}, "the report is empty"),
    "marker": (lambda r: {**r, "report": "Zaphod <image>."}, "contains <image>"),
    "no choices": (lambda r: with_words(r, task="closed", answer="Zaphod"), "fewer than two choices"),
    "answer": (lambda r: with_words(r, task="closed", answer="Zaphod", choices=["a", "b"]),
               "not among the choices"),
    "no answer": (lambda r: with_words(r, task="open"), "the answer is empty"),
    "other hash": (lambda r: {**r, "sha256": "0" * 64}, OTHER),
    "deep": (lambda r: b'{"id": ' + b"[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_line_is_named_with_its_line_and_harms_no_other(tmp_path, fault):
    samples, root = listing(tmp_path, 6)
    write_manifest(root/"m.jsonl", samples)
    (tmp_path/"outside.npy").write_bytes(b"x")
    (root/"v"/"link.npy").symlink_to(tmp_path/"outside.npy")
    make, reason = FAULTS[fault]
    bad = make({**json.loads((root/"m.jsonl").read_text().splitlines()[5]), "id": "bad"})
    with open(root/"m.jsonl", "ab") as f:
        f.write((bad if isinstance(bad, bytes) else json.dumps(bad).encode()) + b"\n")
    message = refused(lambda: read_manifest(root/"m.jsonl"), "m.jsonl", "m.jsonl:7: ", reason)
    assert re.search(r"m\.jsonl:7: .+?\. [A-Z].+\.", message) and "Zaphod" not in message
    assert "Lésion" not in message
    assert read_manifest(root/"m.jsonl", rejects=tmp_path/"r.jsonl") == samples
    assert json.loads((tmp_path/"r.jsonl").read_text().splitlines()[0])["where"] == "m.jsonl:7"


def test_faults_come_all_at_once_and_bom_and_crlf_do_no_harm(tmp_path):
    samples, root = listing(tmp_path, 6)
    write_manifest(root/"m.jsonl", samples)
    lines = (root/"m.jsonl").read_bytes().splitlines()
    (root/"windows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n")
    assert read_manifest(root/"windows.jsonl") == samples
    (root/"many.jsonl").write_bytes(b"\n".join([*lines, *[b"{"] * 3000]) + b"\n")
    message = refused(lambda: read_manifest(root/"many.jsonl"), "has 3000 problems", "many.jsonl:7: ",
                      "3000 × is not JSON")
    assert len(message) < 10_000
    read_manifest(root/"many.jsonl", rejects=tmp_path/"r.jsonl")
    assert len((tmp_path/"r.jsonl").read_text().splitlines()) == 3000
    refused(lambda: read_manifest(root/"no.jsonl"), "no.jsonl: is no file", "Make a manifest")
    (root/"empty.jsonl").write_text("")
    refused(lambda: read_manifest(root/"empty.jsonl"), "holds no line")


def test_a_case_or_report_on_two_sides_of_a_manifest(tmp_path):
    samples, root = listing(tmp_path, 6)
    write_manifest(root/"m.jsonl", [*samples, replace(samples[0], id="x", split="validation")])
    refused(lambda: read_manifest(root/"m.jsonl", rejects=tmp_path/"r"),
            "m.jsonl:7: its case stands in train (m.jsonl:1) and in validation")
    assert len(read_manifest(root/"m.jsonl", allow_shared=True)) == 7
    write_manifest(
        root/"m.jsonl",
        [*samples[:-1], replace(samples[-1], answer=f"  {samples[0].answer.upper()}")])
    refused(lambda: read_manifest(root/"m.jsonl"),
            "m.jsonl:6: its report stands in train (m.jsonl:1) and in test", "Split again")


def test_one_door_for_a_manifest_and_an_m3d_folder(tmp_path, m3d):
    """What trains begins with `load_samples`: whole before the first step, and an allowance is written
    into the run."""
    samples, root = listing(tmp_path, 6)
    write_manifest(root/"manifest.jsonl", samples)
    assert load_samples(root) == load_samples(root/"manifest.jsonl") == samples
    assert samples_root(root) == samples_root(root/"manifest.jsonl") == root
    assert load_samples(m3d) == load_m3d(m3d)
    refused(lambda: load_samples(tmp_path/"nowhere"), "nowhere: is no file", "Make a manifest")
    write_manifest(root/"manifest.jsonl", [*samples, replace(samples[0], id="x", split="test")])
    refused(lambda: load_samples(root),
            "manifest.jsonl:7: its case stands in train (manifest.jsonl:1) and in test")
    run = RunFolder(tmp_path/"run")
    assert len(load_samples(root, allow_shared=True, run=run)) == 7
    assert run.manifest == {"shared": {"allowed": True, "cases": 1, "reports": 1}}


def test_a_folder_that_nobody_listed(tmp_path):
    """A folder of BraTS or of a clinic, or an empty one: verify, split and load say how to list it, and
    write nothing into it."""
    write_brats(tmp_path/"brats", "BraTS-GLI-00000-000")
    write_nifti(tmp_path/"clinic"/"a.nii.gz", smooth(0, (8, 8, 6)))
    (tmp_path/"empty").mkdir()
    for root in (tmp_path/"brats", tmp_path/"clinic", tmp_path/"empty"):
        before = sorted(root.rglob("*"))
        for verb in ("verify", "split"):
            status, shown = ask(verb, root)
            assert status == 1
            assert "is not listed. Run `medvlm3d data folder`, `brats` or `autopet` on it first" in shown
        refused(lambda: load_samples(root), f"{root.name}: is not listed")
        assert sorted(root.rglob("*")) == before


def test_what_a_path_does_not_determine_is_listed(tmp_path):
    """One of two series, one of two frames, an array without axes: refused as they are, read, audited and
    encoded as a line says; another choice is another volume."""
    root = tmp_path/"in"
    save_dicom(save_dicom(root/"two", STACK, AFFINE), STACK[:4] + 1, AFFINE, series=2)
    write_nifti(root/"times.nii.gz", np.stack([smooth(5, (9, 8, 7)), smooth(6, (9, 8, 7))], -1))
    np.save(root/"bare.npy", smooth(7, (8, 9, 7)))
    plain = [
        Sample(str(n), str(n), image=image, split="train", task="report", type="Report",
               answer=varied_report(np.random.default_rng(n)))
        for n, image in enumerate(("two", "times.nii.gz", "bare.npy"))
    ]
    told = [
        replace(s, **choice) for s, choice in zip(plain, ({"series": 1}, {"frame": 1}, {"axis_order": "HWD"}))
    ]
    write_manifest(root/"plain.jsonl", with_hashes(root, plain))
    assert len(audit(root/"plain.jsonl", **QUIET)["problems by reason"]) == 3
    rows = write_manifest(root/"told.jsonl", with_hashes(root, told)) and read_manifest(root/"told.jsonl")
    read = image_reader(root, rows)
    assert [s.series for s in rows] == [1, None, None]
    assert [read(s.image).shape for s in rows] == [(4, 8, 9), (7, 8, 9), (7, 8, 9)]
    assert audit(root/"told.jsonl", **QUIET)["problems"] == 0
    assert np.allclose(np.sort(read("times.nii.gz").array, None), np.sort(smooth(6, (9, 8, 7)), None))
    store = command("features", root/"told.jsonl", tmp_path/"store", *TYPED)
    assert [store.key(s.image)[64:] for s in rows] == [":series=1", ":frame=1", ":axis_order=HWD"]
    write_manifest(root/"other.jsonl", [replace(s, frame=0) if s.frame else s for s in rows])
    assert (command("features", root/"other.jsonl", tmp_path/"store", *TYPED)["times.nii.gz"][0]
            != store["times.nii.gz"][0]).any()


def test_reading_remembers_no_words(tmp_path):
    "Ten megabytes of reports pass through two."
    samples, root = listing(tmp_path, 6)
    with open(root/"m.jsonl", "w") as f:
        for n in range(1000):
            f.write(
                json.dumps({
                    "id": f"r{n}", "case": "c0", "image": samples[0].image, "task": "report",
                    "split": "train", "report": f"{n} " + "word " * 2000
                }) + "\n")
    assert (root/"m.jsonl").stat().st_size > 10e6
    tracemalloc.start()
    problems = []
    assert sum(1 for _ in scan_manifest(root/"m.jsonl", problems)) == 1000 and not problems
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


class Words:
    "A tokenizer with a token a word."
    all_special_tokens, eos_token_id = [], 0
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [hash(w) for w in re.findall(r"a(?= )|\S+", text)]}


def test_reports_longer_than_their_room_are_counted_and_named(tmp_path):
    samples = [
        Sample(f"s{n}", f"c{n}", image="x", split="train", task="report", type="Report", answer="word " * n,
               where=f"m.jsonl:{n}") for n in (3, 9, 12)
    ]
    refused(lambda: check_lengths(samples, Words(), 8), "m.jsonl:9: its report has 10 tokens, room is for 8",
            "m.jsonl:12: ", "Allow policy='truncate'")
    assert check_lengths(
        samples, Words(), 8,
        "truncate") == (2, "2 of 3 answers and reports have more than 8 tokens and will be cut (longest 13)")
    refused(lambda: check_lengths(samples, Words(), 8, "cut"), "Use 'error' or 'truncate'")


def test_data_that_changed_between_save_and_resume(tmp_path):
    samples, root = listing(tmp_path, 6)
    write_manifest(root/"m.jsonl", samples)
    samples, pinned = read_manifest(root/"m.jsonl"), tmp_path/"run"/"data.json"
    pin_data(pinned, root, samples)
    pin_data(pinned, root, samples, thorough=True)
    assert "v/" not in pinned.read_text()
    whole, path = (root/samples[2].image).read_bytes(), root/samples[2].image
    clock = path.stat()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(lambda: pin_data(pinned, root, samples), "m.jsonl:3: its volume has changed since this run began",
            "Restore the data, or begin a new run.")
    os.utime(path, ns=(clock.st_atime_ns, clock.st_mtime_ns))
    refused(lambda: pin_data(pinned, root, samples, thorough=True), "m.jsonl:3: its volume has changed")
    path.write_bytes(whole)
    pin_data(pinned, root, samples)
    refused(lambda: pin_data(pinned, root, [replace(samples[0], answer="Other."), *samples[1:]]),
            "m.jsonl:1: its words have changed")
    refused(lambda: pin_data(pinned, root, samples[1:]), "1 volumes: are no longer asked about")
    path.unlink()
    refused(lambda: pin_data(pinned, root, samples), "m.jsonl:3: its volume is gone")


def test_a_volume_replaced_between_listing_and_training(tmp_path):
    """A file of the same size, a slice of a folder, the data file behind a header:
    neither a run nor a store takes it for what was listed, and the others are encoded."""
    samples, root = listing(tmp_path, 6)
    for d in range(8):
        (root/"series").mkdir(exist_ok=True) or Image.fromarray(
            (smooth(9, (8, 16, 16)) * 255).astype(np.uint8)[d]).save(root/"series"/f"{d}.png")
    (root/"head.nhdr").write_bytes(nrrd_bytes(STACK, "raw", data_file="head.raw"))
    (root/"head.raw").write_bytes(STACK.tobytes(order="F"))
    samples = with_hashes(root, [
        *samples, *(replace(samples[0], id=i, case=i, image=i, answer=f"A report on {i}.")
                    for i in ("series", "head.nhdr"))
    ])
    write_manifest(root/"m.jsonl", samples)
    args = [str(root/"m.jsonl"), str(tmp_path/"store"), *TYPED]
    assert len(command("features", *args)) == 8
    pin_data(tmp_path/"begun.json", root, samples)
    np.save(root/samples[1].image, smooth(999, (8, 24, 24))[None])
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(root/"series"/"3.png")
    (root/"head.raw").write_bytes((STACK + 1).tobytes(order="F"))
    refused(lambda: pin_data(tmp_path/"begun.json", root, samples), "has 3 problems",
            "its volume has changed since this run began")
    samples = read_manifest(root/"m.jsonl")
    other = ("its volume is not the one that was listed (sha256). "
             "Restore the volume, or make the manifest again.")
    for act in (lambda: pin_data(tmp_path/"run"/"data.json", root, samples), lambda: command("features", *args),
                lambda: command("features", args[0], str(tmp_path/"fresh"), *TYPED)):
        assert "m.jsonl:1: " not in refused(act, "has 3 problems",
                                            *(f"m.jsonl:{n}: {other}" for n in (2, 7, 8)))
    assert not (tmp_path/"run").exists()
    command("features", args[0], str(tmp_path/"fresh"), *TYPED, "--rejects", str(tmp_path/"rejects.jsonl"))
    assert [json.loads(line)["where"] for line in (tmp_path/"rejects.jsonl").read_text().splitlines()
            ] == ["m.jsonl:2", "m.jsonl:7", "m.jsonl:8"]


# --- other corpora ---------------------------------------------------------------------------------

def own_pattern(seed, shape):
    "A volume (x, y, z) like no other that changes slowly along z."
    a, b = np.random.default_rng(seed).random((2, *shape[:2], 1))
    return a + b * np.linspace(0, 1, shape[2])


def write_brats(root, case, seed=0, shape=(12, 12, 8), kinds=(*BRATS, "seg")):
    for n, kind in enumerate(kinds):
        write_nifti(root/case/f"{case}-{kind}.nii.gz",
                    (own_pattern(seed * 10 + n, shape) * 500).astype(np.int16) if kind != "seg" else
                    (smooth(seed, shape) > .8).astype(np.uint8))


def write_autopet(folder, seed=0, names=("CTres", "SUV", "SEG")):
    for n, name in enumerate(names): write_nifti(folder/f"{name}.nii.gz", smooth(seed * 10 + n, (10, 10, 8)))


def test_brats(tmp_path):
    for n, case in enumerate(("BraTS-GLI-00002-000", "BraTS-GLI-00002-001", "BraTS-MET-00017-000")):
        write_brats(tmp_path/"ASNR"/"Training", case, n)
    write_brats(tmp_path/"ASNR"/"Validation", "BraTS-GLI-00099-000", 9, kinds=BRATS)
    studies = load_brats(tmp_path)
    assert [(s.case, s.patient, s.mask is None) for s in studies][1] == ("BraTS-GLI-00002-001",
                                                                         "BraTS-GLI-00002", False)
    assert studies[3].mask is None
    assert all(
        list(s.images) == list(BRATS) and s.images["t1c"].name == f"{s.case}-t1c.nii.gz" for s in studies)
    samples = study_samples(studies, tmp_path)
    assert len(samples) == 16 and {s.task for s in samples} == {"image"}
    assert len({s.patient for s in samples}) == 3
    write_manifest(tmp_path/"m.jsonl", samples)
    assert read_manifest(tmp_path/"m.jsonl") == samples


def test_faults_of_brats_are_named_at_once(tmp_path):
    for n in range(4):
        write_brats(tmp_path, f"BraTS-GLI-0000{n}-000", n)
    (tmp_path/"BraTS-GLI-00000-000"/"BraTS-GLI-00000-000-t2f.nii.gz").unlink()
    write_nifti(tmp_path/"BraTS-GLI-00001-000"/"BraTS-GLI-00001-000-seg.nii.gz",
                np.zeros((12, 12, 9), np.uint8))
    cut = tmp_path/"BraTS-GLI-00002-000"/"BraTS-GLI-00002-000-t1c.nii.gz"
    cut.write_bytes(cut.read_bytes()[:40])
    write_brats(tmp_path, NAME, 7, kinds=BRATS[:2])
    message = refused(lambda: load_brats(tmp_path), "BraTS-GLI-00000-000: t2f missing",
                      "BraTS-GLI-00001-000: mask lies on another grid than t1n",
                      "BraTS-GLI-00002-000: t1c is no readable NIfTI file", "has 4 problems",
                      "The layout is <case>/<case>-")
    assert NAME not in message
    assert [s.case for s in load_brats(tmp_path, rejects=tmp_path/"r.jsonl")] == ["BraTS-GLI-00003-000"]
    assert NAME not in (tmp_path/"r.jsonl").read_text()
    refused(lambda: load_brats(tmp_path/"BraTS-GLI-00000-000"/"nothing"), "holds no study")


def test_autopet(tmp_path):
    for n, folder in enumerate(
        ("PETCT_0011f3deaf/03-23-2003-NA-PET-CT-11111", "PETCT_0011f3deaf/03-25-2004-NA-PET-CT-22222",
         "PETCT_01140d52d8/08-13-2005-NA-PET-CT-33333")):
        write_autopet(tmp_path/"FDG"/folder, n)
    studies = load_autopet(tmp_path)
    assert [(s.case, s.patient) for s in studies] == [("PETCT_0011f3deaf/1", "PETCT_0011f3deaf"),
                                                      ("PETCT_0011f3deaf/2", "PETCT_0011f3deaf"),
                                                      ("PETCT_01140d52d8/1", "PETCT_01140d52d8")]
    assert all(s.images["PT"].name == "SUV.nii.gz" and s.images["CT"].name == "CTres.nii.gz"
               and s.mask.name == "SEG.nii.gz" for s in studies)
    assert Counter(s.modality for s in study_samples(studies, tmp_path)) == {"CT": 3, "PT": 3}
    (tmp_path/"FDG"/"PETCT_01140d52d8"/"08-13-2005-NA-PET-CT-33333"/"SUV.nii.gz").unlink()
    message = refused(lambda: load_autopet(tmp_path), "PETCT_01140d52d8: SUV.nii.gz missing",
                      "The layout is PETCT_<patient>/<study>/{CTres,SUV,SEG}.nii.gz")
    assert "2005" not in message


def test_a_plain_folder_in_its_three_arrangements(tmp_path):
    write_nifti(tmp_path/"a.nii.gz", smooth(0, (8, 8, 6)))
    (tmp_path/"a.txt").write_text("A beside.")
    for series in ("axial_1", "axial_1_seg", "coronal_2"):
        write_nifti(tmp_path/"case_b"/f"{series}.nii.gz", smooth(1, (8, 8, 6)))
    (tmp_path/"case_b"/"report.txt").write_text("B in the folder.")
    save_dicom(tmp_path/"case_c"/"series", (smooth(2, (6, 8, 8)) * 900).astype(np.int16),
               np.diag([1., 1., 3., 1.]))
    (tmp_path/"case_c"/"words.txt").write_text("C above.")
    samples = load_folder(tmp_path, licence="CC0")
    assert [(s.image, s.answer, s.plane) for s in samples] == [
        ("a.nii.gz", "A beside.", ""), ("case_b/axial_1.nii.gz", "B in the folder.", "axial"),
        ("case_b/coronal_2.nii.gz", "B in the folder.", "coronal"), ("case_c/series", "C above.", "")
    ]
    assert len({s.case for s in samples}) == 3 and len({s.patient for s in samples}) == 3
    assert {s.licence for s in samples} == {"CC0"}


@pytest.mark.parametrize("written, taken", [
    ("Findings: 3 cm lesion.\r\nMultidisciplinary discussion: follow-up in 3 months.\r\n",
     "Findings: 3 cm lesion.\nMultidisciplinary discussion: follow-up in 3 months."),
    ("study_findings: Normal.\n\nDiscussion: none.", "study_findings: Normal.\n\nDiscussion: none."),
    ("  IMPRESSION\n  1. A cyst.  \n  2. No mass.\n\n", "IMPRESSION\n  1. A cyst.\n  2. No mass."),
    ("discussion: x", "discussion: x")])
def test_the_report_of_a_folder_is_taken_as_it_is(written, taken, tmp_path):
    "No heading cuts it, its lines stay, and the verb says so; six digits as a folder's name make no M3D of it."
    write_nifti(tmp_path/"000012"/"scan.nii.gz", smooth(0, (8, 8, 6)))
    (tmp_path/"000012"/"text.txt").write_bytes(written.encode())
    status, shown = ask("folder", tmp_path)
    assert status == 0 and "taken as they are" in shown
    assert [s.answer for s in load_samples(tmp_path)] == [taken]


@pytest.mark.parametrize("name", ["DOE-PT", "DOE-MR", "DOE-t1c", "DOE-SUV", "x-CTres"])
def test_names_of_a_corpus_say_nothing_about_other_files(name, tmp_path):
    write_nifti(tmp_path/f"{name}.nii.gz", 1000 * smooth(0, (8, 8, 6)) - 700)
    volume = read_image(tmp_path/f"{name}.nii.gz")
    assert (volume.modality, volume.intensity) == ("CT", "HU") and "because of its values" in volume.warnings[-1]


def test_what_a_header_lacks_is_listed(tmp_path):
    "Raw numbers on a blank grid, with the rescale and the spacing of a manifest; both are checked, read and said."
    raw = np.round(1000 * smooth(3, (8, 9, 7))).astype(np.float32)
    write_nifti(tmp_path/"raw.nii.gz", raw, np.eye(4))
    line = dict(id="1", case="c", image="raw.nii.gz", task="image", split="", axis_order="LPS", slope=2,
                intercept=-1024.5, spacing=[.5, .6, 2.5])
    (tmp_path/"manifest.jsonl").write_text(json.dumps(line))
    sample, = read_manifest(tmp_path/"manifest.jsonl")
    volume = image_reader(tmp_path, [sample])("raw.nii.gz")
    assert volume.spacing == pytest.approx((2.5, .6, .5)) and (volume.codes, volume.intensity) == ("SPL", "HU")
    assert volume.array == pytest.approx(2 * raw.transpose(2, 1, 0) - 1024.5)
    assert sum("as listed" in w for w in volume.warnings) == 2
    assert write_manifest(tmp_path/"again.jsonl", [sample]) and read_manifest(tmp_path/"again.jsonl") == [sample]
    for field, value in {"slope": "1", "intercept": None, "spacing": [1, 1], "axis_order": "XYZ"}.items():
        (tmp_path/"bad.jsonl").write_text(json.dumps(line | {field: value}))
        if value is None: assert read_manifest(tmp_path/"bad.jsonl")[0].intercept is None
        else: refused(lambda: read_manifest(tmp_path/"bad.jsonl"), f"bad.jsonl:1: {field} is")


def test_scans_under_the_names_that_scanners_give(tmp_path):
    "UIDs, .IMA, no suffix, .nhdr, an enhanced file in the root: all are listed and read."
    for n, name in enumerate(("1.2.840.113619.2.{}", "MR.0001.{}.IMA", "IM{}")):
        for k, file in enumerate(sorted(save_dicom(tmp_path/f"series{n}", STACK + n, AFFINE).iterdir())):
            file.rename(file.with_name(name.format(k)))
        (tmp_path/f"series{n}"/"report.txt").write_text(f"Report {n}.")
    (tmp_path/"head.nhdr").write_bytes(nrrd_bytes(STACK, data_file="head.raw.gz"))
    (tmp_path/"head.raw.gz").write_bytes(gzip.compress(STACK.tobytes(order="F")))
    save_enhanced(tmp_path/"1.2.840.7", STACK, AFFINE)
    for stem in ("head", "1.2.840.7"): (tmp_path/f"{stem}.txt").write_text(f"Report of {len(stem)}.")
    (tmp_path/"DICOMDIR").write_bytes(bytes(128) + b"DICM")
    samples = load_folder(tmp_path)
    assert [s.image for s in samples] == ["1.2.840.7", "head.nhdr", "series0", "series1", "series2"]
    assert len({s.case for s in samples}) == 5
    assert {read_image(tmp_path/s.image).array.size for s in samples} == {STACK.size}
    assert left_over(tmp_path, find_scans(tmp_path)) == []


def test_what_is_no_scan_is_counted_and_loose_slices_are_a_problem(tmp_path):
    write_nifti(tmp_path/"a.nii.gz", smooth(0, (8, 8, 6)))
    (tmp_path/"a.txt").write_text("Normal.")
    (tmp_path/f"{NAME}.par").write_bytes(b"a format of its own")
    (tmp_path/NAME).symlink_to(tmp_path.parent)
    status, shown = ask("folder", tmp_path)
    assert status == 0 and "2 files are left out" in shown and NAME not in shown
    slices = sorted(save_dicom(tmp_path.parent/f"{tmp_path.name}-slices", STACK[:2], AFFINE).iterdir())
    for file, name in zip(slices, ("1.2.840.9", f"{NAME}.IMA")):
        file.rename(tmp_path/name)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path/"1.png")
    status, shown = ask("folder", tmp_path)
    assert status == 1
    assert "3 slices: lie in the root itself. Give the slices of each series a folder of their own" in shown
    assert NAME not in shown


@pytest.mark.parametrize("kind", ["pictures", "dicom"])
def test_one_slice_that_is_linked_from_outside(tmp_path, kind):
    root, series = tmp_path/"root", tmp_path/"root"/"case"/"axial"
    series.mkdir(parents=True)
    if kind == "dicom": save_dicom(series, STACK, AFFINE)
    else:
        for d, x in enumerate((smooth(0, (6, 16, 16)) * 255).astype(np.uint8)):
            Image.fromarray(x).save(series/f"{d}.png")
    (root/"case"/"report.txt").write_text("Normal.")
    samples = load_folder(root)
    write_manifest(root/"m.jsonl", samples)
    last = sorted(series.iterdir())[-1]
    last.rename(tmp_path/"elsewhere")
    last.symlink_to(tmp_path/"elsewhere")
    refused(lambda: load_folder(root),
            "scan 1 (in order of path): a file in it is a link out of the data root")
    refused(lambda: read_manifest(root/"m.jsonl"),
            "m.jsonl:1: image: a file in it is a link out of the data root")
    (tmp_path/"elsewhere").rename(root/"inside")
    last.unlink()
    last.symlink_to(root/"inside")
    assert read_manifest(root/"m.jsonl") == samples


# --- nobody's name ---------------------------------------------------------------------------------

def ask(*args):
    result = CliRunner().invoke(data_app, [str(a) for a in args])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


# --- CT-RATE, and questions about it -----------------------------------------------------------------------

@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_both_releases_of_ctrate_are_the_same_volumes(intercept, tmp_path):
    "Raw numbers get the metadata's rescale and grid once, fixed ones never; each file says which."
    read = {}
    for release in ("fixed", "raw"):
        root = write_ctrate(tmp_path/release, fixed=release == "fixed", intercept=intercept)
        status, shown = ask("ctrate", root, "--labels", "--validation", 0)
        assert status == 0 and "CC BY-NC-SA 4.0" in shown.split("\n")[0], shown
        done = "HU as stored; grid of the header" if release == "fixed" else f"number + {intercept}); grid of the metadata"
        with open(root/"manifest.values.csv", newline="") as f: assert all(done in row["done"] for row in csv.DictReader(f))
        samples = load_samples(root)
        reader = image_reader(root, samples)
        read[release] = {s.id: reader(s.image) for s in samples if s.task == "report"}
        assert Counter((s.split, s.task) for s in samples) == {
            ("train", "report"): 4, ("test", "report"): 1, ("train", "closed"): 8, ("test", "closed"): 2}
        assert {s.patient for s in samples if s.id.startswith("train_1")} == {"train_1"}
        assert audit(root, images=False)["passed"] and audit(root, **QUIET, allow=("near image",))["problems"] == 0
    for name, fixed in read["fixed"].items():
        raw = read["raw"][name]
        assert (fixed.intensity, raw.intensity) == ("HU", "HU") and fixed.spacing == pytest.approx(raw.spacing)
        assert fixed.array == pytest.approx(raw.array) and fixed.array.min() > -1100


def test_numbers_of_ctrate_are_decided_by_their_values(tmp_path):
    "Hounsfield units in the first release's folder, padding, no metadata, numbers that fit nothing, a file in both."
    hu = chest()
    padded = np.where(np.indices(hu.shape)[0] < 3, -3024, hu).astype(np.int16)
    blank = np.diag([-1., -1., 1., 1.])
    write_ctrate_volume(tmp_path, "train", "train_1_a_1", hu, LPS)
    write_ctrate_volume(tmp_path, "train_fixed", "train_2_a_1", padded)
    write_ctrate_volume(tmp_path, "train", "train_3_a_1", (padded + 1024).astype(np.float32), blank)
    write_ctrate_volume(tmp_path, "train", "train_4_a_1", hu + 1024, blank)
    write_ctrate_volume(tmp_path, "train_fixed", "train_5_a_1", hu // 2)
    write_ctrate_volume(tmp_path, "train", "train_6_a_1", hu + 1024, blank)
    write_ctrate_volume(tmp_path, "train", "train_2_a_1", padded + 1024, blank)
    (tmp_path/"dataset"/"train"/"train_7"/"train_7_a").mkdir(parents=True)
    (tmp_path/"dataset"/"train"/"train_7"/"train_7_a"/"train_7_a_1.nii.gz").write_bytes(b"cut")
    rows = [ctrate_metadata(f"train_{n}_a_1") for n in range(1, 6)]
    rows[3]["ZSpacing"] = ""
    write_rows(tmp_path/"metadata"/"train_metadata.csv", rows)
    status, shown = ask("ctrate", tmp_path, "--rejects", tmp_path/"rejects.jsonl")
    assert status == 1 and "1 volumes lie in both releases" in shown
    with open(tmp_path/"manifest.values.csv", newline="") as f: done = {row["VolumeName"][6]: row for row in csv.DictReader(f)}
    assert done["1"]["done"] == done["2"]["done"] == "HU as stored; grid of the header"
    assert done["3"]["done"] == "rescaled by the metadata (1 · number + -1024); grid of the metadata"
    assert "no metadata names its spacing" in done["4"]["reason"] and "air lies near" in done["5"]["reason"]
    assert "air lies near" in done["6"]["reason"] and "cannot be read" in done["7"]["reason"]
    samples = load_samples(tmp_path)
    assert [s.task for s in samples] == ["image"] * 3, "without a report a volume has no words"
    volumes = [image_reader(tmp_path, samples)(s.image).array for s in samples]
    order = {s.case: v for s, v in zip(samples, volumes)}
    assert order["train_2_a"] == pytest.approx(order["train_3_a"])


def test_a_share_of_ctrates_patients_is_held_out_whole():
    names = [f"train_{n}_{visit}_{k}" for n in range(40) for visit in "ab" for k in (1, 2)]
    sides = {name: side_of(name, 25)[::2] for name in names}
    assert len(set(sides.values())) == 40 and 4 < sum(side == "validation" for _, side in set(sides.values())) < 18
    assert {side_of(name, 0)[2] for name in names} == {"train"}


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    "CT-RATE's first release, listed."
    root = write_ctrate(tmp_path_factory.mktemp("ctrate")/"raw", fixed=False)
    assert ask("ctrate", root, "--validation", 0)[0] == 0
    return root


def test_conversations_are_joined_to_listed_volumes(chests, tmp_path):
    def say(who, value, **more): return {"from": who, "value": value, **more}
    chat = [say("human", "<image>\nReport.<report_generation>", type="report_generation"), say("gpt", "Clear."),
            say("human", "Where? (a) left (b) right <multiple_choice>", type="multiple_choice"), say("gpt", "(b) right"),
            say("human", "How large?", type="conversation"), say("gpt", "6 mm")]
    entries = [{"id": "1", "image": "train_1_a_1.nii.gz", "conversations": chat},
               {"id": "2", "image": "train_9_a_1.nii.gz", "conversations": chat[:2]}]
    (tmp_path/"chat.json").write_text(json.dumps(entries))
    status, shown = ask("llava", tmp_path/"chat.json", chests, "--rejects", tmp_path/"rejects.jsonl")
    assert status == 1 and "1 problems set aside" in shown
    samples = read_manifest(chests/"llava.jsonl")
    assert [(s.task, s.type, s.answer, s.letter) for s in samples] == [
        ("report", "Report", "Clear.", ""), ("closed", "Multiple choice", "right", "B"), ("open", "Conversation", "6 mm", "")]
    listed = {s.image: s for s in read_manifest(chests/"manifest.jsonl")}
    for s in samples:
        volume = listed[s.image]
        assert (s.case, s.patient, s.split, s.slope, s.intercept, s.spacing, s.sha256) == (
            "train_1_a", "train_1", "train", 1, -1024, (.7, .7, 1.5), volume.sha256)
        assert image_reader(chests, samples)(s.image).intensity == "HU"


def test_tasks_of_3d_rad_are_joined_to_listed_volumes(chests, tmp_path):
    yes_no = ("Yes", "No", "-", "-")
    rows = [rad_row("test_1_a_1.nii.gz", "Is there atelectasis?", "No", "Close", "B", yes_no),
            rad_row("test_1_a_1.nii.gz", "What is seen?", "A band."),
            rad_row("test_1_a_1.nii.gz", "How many?", "3", "Close", "C", ("1", "2", "3", "-")),
            rad_row("test_77_a_1.nii.gz", "Is there atelectasis?", "No", "Close", "B", yes_no),
            rad_row("test_1_a_1.nii.gz", "Is there atelectasis?", "No", "Close", "A", yes_no)]
    write_rows(tmp_path/"3DRAD"/"test"/"Task4_Existence_Detection"/"Atelectasis.csv", rows)
    status, shown = ask("threedrad", tmp_path/"3DRAD", chests, "--rejects", tmp_path/"rejects.jsonl")
    assert status == 1 and "2 problems set aside" in shown
    samples = read_manifest(chests/"threedrad.jsonl")
    assert [(s.task, s.choices, s.letter, s.split, s.patient) for s in samples] == [
        ("closed", ("Yes", "No"), "B", "test", "valid_1"), ("open", (), "", "test", "valid_1"),
        ("closed", ("1", "2", "3"), "C", "test", "valid_1")]
    why = [json.loads(line)["why"] for line in (tmp_path/"rejects.jsonl").read_text().split("\n") if line]
    assert why == ["its volume is not in the folder", "the answer is not the choice that its letter names"]


def test_merlins_spreadsheet_and_findings(tmp_path):
    "Columns in any order, findings that are said or denied, a study without a volume; patients where a column names them."
    from openpyxl import Workbook
    book = Workbook()
    for cells in (("Patient ID", "Findings", "few_shot", "study id", "Split"), ("P1", "Liver normal.\nNo mass.", True, "AC1", "train"),
                  ("P1", "A cyst.", False, "AC2", "train"), ("P2", "Gone.", False, "AC3", "test"), (None,) * 5): book.active.append(cells)
    book.save(tmp_path/"reports_final.xlsx")
    for study in ("AC1", "AC2"): save_nifti(tmp_path/"merlin_data"/f"{study}.nii.gz", chest())
    write_rows(tmp_path/"zero_shot_findings_disease_cls.csv", [{"study id": "AC1", "ascites": 0, "renal_cyst": -1},
                                                               {"study id": "AC2", "ascites": -1, "renal_cyst": 1}])
    status, shown = ask("merlin", tmp_path, "--labels", "--rejects", tmp_path/"rejects.jsonl")
    assert status == 1 and "1 problems set aside" in shown and "cannot be checked by patient" not in shown
    samples = read_manifest(tmp_path/"manifest.jsonl")
    assert [(s.patient, s.split, s.question, s.answer) for s in samples] == [
        ("P1", "train", "", "Liver normal.\nNo mass."), ("P1", "train", "Is there ascites?", "No"),
        ("P1", "train", "", "A cyst."), ("P1", "train", "Is there renal cyst?", "Yes")]


def test_questions_from_organ_masks_have_the_masks_answers(tmp_path):
    "TotalSegmentator's layout: present, cut off or absent as the masks say; balanced; each case on its side of meta.csv."
    write_totalseg(tmp_path, cases=24)
    status, shown = ask("totalseg", tmp_path, "--workers", 1)
    assert status == 0 and "CC BY 4.0" in shown and "left out, so that no answer can be told" in shown, shown
    samples = load_samples(tmp_path)
    assert {s.task for s in samples} == {"closed"} and {"Presence", "Organ"} <= {s.type for s in samples}
    sides = {row["image_id"]: row["split"] for row in csv.DictReader(open(tmp_path/"meta.csv"), delimiter=";")}
    assert all(s.split == {"val": "validation"}.get(sides[s.case], sides[s.case]) for s in samples)
    for split in {s.split for s in samples}:
        for text in {s.question for s in samples if s.split == split and s.type != "Organ"}:
            answers = Counter(s.answer for s in samples if (s.split, s.question) == (split, text))
            assert len(answers) > 1 and len({*answers.values()}) == 1, (split, text, answers)
    for s in samples:
        if s.type != "Presence": continue
        name = "_".join(reversed(s.question.removeprefix("Is the ").removesuffix(" in this scan?").split()))
        mask = np.asarray(nib.load(tmp_path/s.case/"segmentations"/f"{name}.nii.gz").dataobj) > 0
        edge = mask.any() and (mask[..., 0].any() or mask[..., -1].any())
        assert s.answer == ("No" if not mask.any() else "Yes, but cut off at the edge of the scan" if edge else "Yes, all of it")


def test_questions_about_ctrate_need_its_listing(tmp_path):
    write_ctrate(tmp_path, ("train_1_a_1", "valid_1_a_1"))
    (tmp_path/"chat.json").write_text("[]")
    status, shown = ask("llava", tmp_path/"chat.json", tmp_path)
    assert status == 1 and "Run `medvlm3d data ctrate` on it first" in shown


def test_a_planted_name_is_nowhere_in_what_is_written(tmp_path):
    """A folder, its files and its reports hold a name; listing, audit, ledger, rejects and every line
    printed do not."""
    for n, name in enumerate((NAME, "Trillian", "Marvin", "Slartibartfast", "Agrajag")):
        write_nifti(tmp_path/"in"/f"{NAME}_{n}"/f"{name}.nii.gz", smooth(n, (16, 16, 8)))
        (tmp_path/"in"/f"{NAME}_{n}"/
         f"{name}.txt").write_text(varied_report(np.random.default_rng(n)) + f" Reported for {name}.")
    root, said = tmp_path/"in", []
    said.append(ask("folder", root)[1])
    rows = [json.loads(line) for line in (root/"manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and not any(NAME in r[k] for r in rows for k in ("id", "case", "patient"))
    (root/"leaky.jsonl").write_text("".join(
        json.dumps({**r, "split": side, "id": f"{r['id']}{side}"}) + "\n" for r in rows
        for side in ("train", "test")))
    said += [
        ask("verify", root/"leaky.jsonl", "--workers", 1)[1],
        ask("split", root/"leaky.jsonl", "--workers", 1, "--shares", "60,20,20")[1]
    ]
    (root/f"{NAME}_0"/f"{NAME}.txt").unlink()
    (root/f"{NAME}_1"/"Trillian.nii.gz").write_bytes(b"broken")
    said += [
        ask("folder", root)[1],
        ask("folder", root, "--rejects", root/"rejects.jsonl", "--out", root/"rest.jsonl")[1],
        ask("verify", root/"leaky.jsonl", "--workers", 1)[1]
    ]
    written = [
        p.read_text() for p in (root/"audit"/"audit.md", root/"audit"/"audit.json",
                                root/"leaky-by-case.ledger.jsonl", root/"leaky-by-case.summary.json",
                                root/"rejects.jsonl")
    ]
    assert "cannot be read" in written[0] and "no report beside it" in written[-1]
    for text in (*said, *written):
        assert not any(
            word in text for word in ("Zaphod", "Beeblebrox", "Trillian", "Marvin", "Slartibartfast", "1952"))


def test_a_planted_name_does_not_pass_from_a_folder_into_a_run(tmp_path, capfd):
    """From the folder to a trained model: the fields `image` and `report` of a manifest hold the name,
    and no other byte that is written or printed."""
    root, names = tmp_path/"in", (NAME, "Trillian", "Marvin", "Slartibartfast")
    for n, name in enumerate(names):
        write_nifti(root/f"{name}_folder"/f"{name}.nii.gz", smooth(n, (16, 16, 8)))
        (root/f"{name}_folder"/
         f"{name}.txt").write_text(varied_report(np.random.default_rng(n)) + f" Reported for {name}.")
    given = {p for p in root.rglob("*") if p.is_file()}
    assert ask("folder", root)[0] == ask("split", root, "--workers", 1, "--shares", "75,0,25")[0] == 0
    (root/f"{NAME}_folder"/f"{NAME}.nii.gz").write_bytes(b"torn")
    listed, store = root/"manifest-by-case.jsonl", tmp_path/"store"
    said = refused(lambda: command("features", listed, store, *TYPED),
                   "its volume is not the one that was listed")
    command("features", listed, store, *TYPED, "--rejects", tmp_path/"rejects.jsonl")
    listed.write_text("".join(line for line in listed.read_text().splitlines(True) if NAME not in line))
    tokenizer = reader_tokenizer()
    make_reader(tokenizer, hidden=16, layers=1, heads=2).save_pretrained(tmp_path/"reader")
    tokenizer.save_pretrained(tmp_path/"reader")
    encoder = load_encoder("tiny", size=32)
    fields = dict(encoder="tiny", encoder_channels=encoder.channels, grid=list(encoder.grid),
                  preprocess=Preprocess(8, 32, 32).to_dict(), rho=50, whiten=True, channels=8,
                  answer_style="text")
    train(
        tmp_path/"run",
        make_plan(tmp_path, fields,
                  [{"stage": 1, "tasks": ["report"], "epochs": 1, "lr": 5e-3, "batch": 2, "accumulation": 1}],
                  data=str(listed), unknown_limit=1.), progress=False)
    written = {
        p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*")
        if p.is_file() and p not in given
    }
    assert {"rejects.jsonl", "store/images.json", "run/data.json",
            "in/manifest-by-case.ledger.jsonl"} <= set(written)
    assert any(name.startswith("run/model/") for name in written)
    for name in ("in/manifest.jsonl", "in/manifest-by-case.jsonl"):
        rows = [json.loads(line) for line in written[name].splitlines()]
        written[name] = json.dumps([{k: v for k, v in r.items() if k not in ("image", "report")} for r in rows
                                    ]).encode()
    for name, data in {**written, "said": said.encode(),
                       "printed": "".join(capfd.readouterr()).encode()}.items():
        assert not any(
            word.encode() in data or word in name
            for word in ("Zaphod", "Beeblebrox", "Trillian", "Marvin", "Slartibartfast", "1952")), name


# --- near-duplicates -------------------------------------------------------------------------------

def test_near_texts_are_those_that_all_pairs_give():
    rng = np.random.default_rng(0)
    texts = [varied_report(np.random.default_rng((5, n))) for n in range(150)]
    texts += [re.sub(r"\d+", str(rng.integers(100)), t, count=1) for t in texts[:40]] + texts[:10]
    i, j, value, crowded = near_texts(texts)
    upper = np.triu_indices(len(texts), 1)
    every = jaccard(set_matrix([shingles(t) for t in texts]), *upper)
    truth = {(a, b) for a, b, v in zip(*upper, every) if v >= .8}
    assert len(truth) > 40 and set(zip(i.tolist(), j.tolist())) == truth and not crowded
    assert np.allclose(value, [every[(upper[0] == a) & (upper[1] == b)][0] for a, b in zip(i, j)])


def test_a_crowd_of_equal_texts_stays_tied_in_bounded_work():
    "1,000 copies of a template: not every pair is listed, but all are one group, and it is said."
    texts = [
        f"There is no focal lesion in this examination of the abdomen and pelvis number {n}."
        for n in range(1000)
    ]
    i, j, _, crowded = near_texts(texts)
    assert crowded and len(i) < 1000 * 64 * 21
    census = take_census(
        Sample(str(n), str(n), image=f"{n}.npy", split="train", task="report", type="Report", answer=t)
        for n, t in enumerate(texts))
    assert len(set(groups_of(1000, list(find_ties(census, kinds=("near text",)).values())).tolist())) == 1


def test_near_volumes_are_those_that_all_pairs_give():
    originals = [smooth(n, (12, 40, 40)) for n in range(60)]
    copies = ([
        x * .5 + .002 * np.random.default_rng(n).standard_normal(x.shape)
        for n, x in enumerate(originals[:25])
    ] + [np.repeat(x, 2, 0)[:, ::2] for x in originals[:10]])
    hashes = np.stack([volume_hash(x.astype(np.float32)) for x in originals + copies]).astype(np.float16)
    i, j, value, _ = near_volumes(hashes)
    cosine = np.triu(z_scores(hashes) @ z_scores(hashes).T, 1)
    assert set(zip(i.tolist(), j.tolist())) == set(zip(*np.nonzero(cosine >= .95)))
    assert {(n, 60 + n) for n in range(25)} | {(n, 85 + n) for n in range(10)} <= set(
        zip(i.tolist(), j.tolist()))
    assert all(b == a + 60 or b == a + 85 or b - 85 == a - 60 for a, b in zip(i, j))


# --- leaks found, leaks cut ------------------------------------------------------------------------

def leak_case(a, b, root): return replace(b, case=a.case)
def leak_patient(a, b, root): return replace(b, patient="p")
def leak_text(a, b, root): return replace(b, answer=a.answer.upper() + " ")
def leak_near_text(a, b, root): return replace(b, answer=a.answer.replace("Conclusion", "Impression"))
def leak_bytes(a, b, root):
    return (root/b.image).write_bytes((root/a.image).read_bytes()) and replace(b, sha256="")
def leak_near_image(a, b, root):
    np.save(root/b.image, (255 * np.load(root/a.image)).round().astype(np.uint8))
    return replace(b, sha256="")


LEAKS = {
    "case": leak_case, "patient": leak_patient, "text": leak_text, "near text": leak_near_text,
    "bytes": leak_bytes, "near image": leak_near_image
}


@pytest.mark.parametrize("kind", LEAKS)
def test_each_kind_of_leak_is_found_named_and_cut(tmp_path, kind):
    samples, root = listing(tmp_path, 14)
    train, test = samples[:-4], samples[-4:]
    write_manifest(root/"clean.jsonl", samples)
    assert audit(root/"clean.jsonl", **QUIET)["passed"]
    first = replace(train[2], patient="p") if kind == "patient" else train[2]
    write_manifest(root/"m.jsonl", [
        *train[:2], first, *train[3:], LEAKS[kind](first, test[1], root),
        *(t for t in test if t is not test[1])
    ])
    found = audit(root/"m.jsonl", **QUIET)
    assert not found["passed"] and kind in found["leaks"] and found["tied to training"]["test"] == 1
    finding = next(f for f in found["findings"] if f["kind"] == kind)
    assert (finding["across"], finding["touched"]) == (1, {"test": 1, "validation": 0})
    assert finding["examples"][0]["places"] == ["m.jsonl:3", "m.jsonl:11"]
    assert set(found["leaks"]) <= {kind, "patient", "near image"}
    assert audit(root/"m.jsonl", allow=found["leaks"], **QUIET)["allowed"] == sorted(found["leaks"])
    summary = split_corpus(root/"m.jsonl", by="patient", shares=(.6, .2, .2), **QUIET)
    assert audit(root/"m-by-patient.jsonl", **QUIET)["passed"] and summary["largest group"] == 2
    assert sum(summary["volumes"].values()) == 14 and all(summary["volumes"].values())
    rows = [json.loads(line) for line in (root/"m-by-patient.ledger.jsonl").read_text().splitlines()]
    assert any(kind in r["ties"] and r["from"] == {"train": 1, "test": 1}
               and r["places"] == ["m.jsonl:3", "m.jsonl:11"] for r in rows)


def test_a_chain_of_ties_goes_to_one_side(tmp_path):
    """A shares its report with B, B is a copy of C, C shares its patient with D: nothing ties A to D, and
    they stay together."""
    samples, root = listing(tmp_path, 14)
    a, b, c, d = samples[0], samples[5], samples[-1], samples[-2]
    (root/c.image).write_bytes((root/b.image).read_bytes())
    chain = {
        a.id: a, b.id: replace(b, answer=a.answer), c.id: replace(c, sha256="", patient="p"),
        d.id: replace(d, patient="p")
    }
    write_manifest(root/"m.jsonl", [chain.get(s.id, s) for s in samples])
    split_corpus(root/"m.jsonl", by="patient", **QUIET)
    side = {s.id: s.split for s in read_manifest(root/"m-by-patient.jsonl")}
    assert len({side[k] for k in chain}) == 1
    for seed in range(4):
        split_corpus(root/"m.jsonl", by="case", ties=(), out=root/f"loose{seed}.jsonl", seed=seed,
                     images=False, **QUIET)
    assert any(
        len({s.split for s in read_manifest(root/f"loose{seed}.jsonl") if s.id in chain}) > 1
        for seed in range(4))


@pytest.mark.parametrize("seed", range(8))
def test_no_split_tears_a_group_and_shares_are_met(seed):
    rng = np.random.default_rng(seed)
    case = np.sort(rng.integers(0, 150, 400))
    census = take_census(
        Sample(str(v), f"c{c}", image=f"{v}.npy", split="", task="report", type="Report",
               answer=f"text number {rng.integers(300)}", patient=f"p{c // 3}") for v, c in enumerate(case))
    ties = find_ties(census, kinds=("case", "patient"))
    group = groups_of(400, list(ties.values()))
    side = assign(np.bincount(group), (.7, .1, .2), seed)[group]
    for t in ties.values():
        assert all(len(set(side[t.item == item])) == 1 for item in range(t.items) if (t.item == item).any())
    assert np.abs(np.bincount(side, minlength=3) / 400 - (.7, .1, .2)).max() < .05


def test_duplicates_between_the_sources_of_m3d(m3d):
    one, two = (next(m3d.rglob(f"{source}/*/Axial_non_contrast.npy")) for source in ("ct_case", "ct_quizze"))
    two.write_bytes(one.read_bytes())
    two.with_name("text.txt").write_text(one.with_name("text.txt").read_text())
    found = audit(m3d, **QUIET)
    assert found["ct_case and ct_quizze"]["bytes"] == 1 and found["ct_case and ct_quizze"]["text"] == 1


def test_parts_of_a_list_are_no_leak_and_do_not_survive_a_split(m3d):
    assert audit(m3d, **QUIET)["leaks"] == []
    summary = split_corpus(m3d, shares=(.5, .25, .25), **QUIET)
    assert summary["left out"] == {"test1k": 2, "test500": 1, "test100": 1, "hard_test": 1, "test5k": 4}
    assert {s.split for s in read_manifest(m3d/"manifest-by-case.jsonl")} == {"train", "validation", "test"}


def test_a_volume_that_is_not_the_listed_one_or_cannot_be_read(tmp_path):
    samples, root = listing(tmp_path, 8)
    write_manifest(root/"m.jsonl", samples)
    np.save(root/samples[1].image, smooth(999, (8, 24, 24))[None])
    (root/samples[2].image).write_bytes(b"nothing")
    found = audit(root/"m.jsonl", **QUIET)
    assert not found["passed"]
    assert found["first problems"] == [
        "m.jsonl:2: its volume is not the one that was listed (sha256). "
        "Restore the volume, or make the manifest again.",
        "m.jsonl:3: its volume cannot be read: has no readable .npy header. "
        "Save the array again with numpy.save."
    ]
    refused(lambda: split_corpus(root/"m.jsonl", **QUIET), "m.jsonl:2: ", "m.jsonl:3: ",
            "Repair the places named above first.")


def test_each_cause_of_an_unreadable_volume_has_its_own_words(tmp_path):
    """A wrong CRC, NaN, two series and undeclared axes are four reasons; two volumes with NaN are one,
    whatever their numbers."""
    samples, root = listing(tmp_path, 8)
    for n, bad in ((0, 3), (1, 5)):
        array = smooth(n, (8, 24, 24))[None].copy()
        array.flat[:bad] = np.nan
        np.save(root/samples[n].image, array)
    np.save(root/samples[2].image, smooth(2, (8, 24, 24)))
    write_nifti(root/"crc.nii.gz", smooth(3, (8, 8, 6)))
    packed = (root/"crc.nii.gz").read_bytes()
    (root/"crc.nii.gz").write_bytes(packed[:-6] + bytes([packed[-6] ^ 16]) + packed[-5:])
    save_dicom(save_dicom(root/"two", STACK, AFFINE), STACK + 1, AFFINE, series=2)
    samples = [
        replace(s, sha256="", image={3: "crc.nii.gz", 4: "two"}.get(n, s.image))
        for n, s in enumerate(samples)
    ]
    write_manifest(root/"m.jsonl", samples)
    status, shown = ask("verify", root/"m.jsonl", "--workers", 1, "--json")
    found = json.loads(shown[shown.index("{"):shown.rindex("}") + 1])
    reasons = {
        why.removeprefix("its volume cannot be read: "): n for why, n in found["problems by reason"].items()
    }
    assert status == 1 and len(reasons) == 4 and found["problems"] == 5, reasons
    assert reasons["n of n voxels are NaN or infinite"] == 2
    assert reasons["has shape (n, n, n) and no declared axis order"] == 1
    assert any("CRC" in why for why in reasons) and any(why.startswith("holds n series") for why in reasons)
    assert ("m.jsonl:1: its volume cannot be read: 3 of 4608 voxels" in found["first problems"][0]
            and "Choose one with series=0 to 1" in found["first problems"][4])


def test_several_processes_see_what_one_sees(tmp_path):
    samples, root = listing(tmp_path, 10)
    write_manifest(root/"m.jsonl", [*samples, replace(samples[0], id="x", split="test")])
    assert audit(root/"m.jsonl", workers=2, progress=False) == audit(root/"m.jsonl", **QUIET)


# --- the command line ------------------------------------------------------------------------------

@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    status, shown = ask(verb, "--help")
    assert status == 0 and "Usage" in shown


def test_no_verb_is_forgotten():
    assert {command.name or command.callback.__name__ for command in data_app.registered_commands} == {*VERBS}


SMALL = ("--depth", 8, "--size", 32, "--workers", 1)
DRAWN = {
    "phantom": (("phantom", "--train", 8, "--validation", 4, "--test", 4), "m3d", {
        "modality": "CT", "source": "M3D"
    }), "pet": (("phantom", "--train", 8, "--validation", 4, "--test", 4, "--modality", "PT", "--contrast",
                 .7, "--radius", "20,30", "--kind", "mass", "--kind", "nodule"), "m3d", {"modality": "PT"}),
    "probe": (("probe", "mirror", "--test", 4, "--scale", 1.2, "--contrast", .9), "m3d", {
        "modality": "CT", "type": "Report"
    }), "brats": (("layout", "brats", "--studies", 4), "brats", {"modality": "MR", "source": "BraTS 2023"}),
    "autopet": (("layout", "autopet", "--studies", 4), "autopet", {"modality": "CT", "source": "AutoPET"})
}


@pytest.mark.parametrize("made", DRAWN)
def test_what_is_drawn_can_be_listed_verified_and_split(made, tmp_path):
    "From an empty folder by four verbs; the same drawing again changes nothing, another one is refused."
    (verb, *args), listing_verb, expected = DRAWN[made]
    root = tmp_path/made
    assert ask(verb, *args, "--out", root, *SMALL)[0] == 0
    assert ask(listing_verb, root)[0] == 0 and ask(verb, *args, "--out", root, *SMALL)[0] == 0
    status, shown = ask(verb, *args, "--out", root, *SMALL, "--seed", 1)
    assert status == 1 and "with other parameters" in shown
    rows = [json.loads(line) for line in (root/"manifest.jsonl").read_text().splitlines()]
    assert {k: rows[0][k] for k in expected} == expected
    assert ask("verify", root/"manifest.jsonl", "--no-images", "--allow", "text", "--allow",
               "near text")[0] == 0
    assert ask("split", root/"manifest.jsonl", "--by", "patient", "--tie", "bytes", "--shares", "50,0,50",
               "--workers", 1)[0] == 0
    assert {s.split for s in read_manifest(root/"manifest-by-patient.jsonl", allow_shared=True)
            } == {"train", "test"}


@pytest.mark.parametrize("args", [("phantom", "--contrast", 5), ("phantom", "--train", -1),
                                  ("phantom", "--out", __file__), ("layout", "brats"),
                                  ("layout", "phantom", "--out", "x")])
def test_what_cannot_be_drawn_is_a_matter_of_usage(args):
    assert ask(*args)[0] == 2


NOWHERE = {"m3d": "Give the folder that holds it", "brats": "holds no study", "autopet": "holds no study",
           "folder": "is no folder", "verify": "does not exist", "split": "does not exist"}


@pytest.mark.parametrize("verb", NOWHERE)
def test_a_folder_that_is_not_there(verb, tmp_path):
    status, shown = ask(verb, tmp_path/"nowhere")
    assert status == 1 and NOWHERE[verb] in shown


def test_what_is_set_aside_is_counted_and_leaves_with_one(m3d, tmp_path):
    (m3d/m3d_image(4)).with_name("text.txt").write_text("")
    status, shown = ask("m3d", m3d)
    assert status == 1 and "the report is empty" in shown and not (m3d/"manifest.jsonl").exists()
    status, shown = ask("m3d", m3d, "--rejects", tmp_path/"rejects.jsonl")
    assert status == 1 and "1 problems set aside: rejects.jsonl" in shown
    assert len((tmp_path/"rejects.jsonl").read_text().splitlines()) == 1
    assert len(read_manifest(m3d/"manifest.jsonl")) == len(load_m3d(m3d, rejects=tmp_path/"rejects.jsonl"))


def test_the_verbs_in_a_real_shell(tmp_path):
    "A folder never seen before, from listing to a split that passes; a leak is exit status 1 and one page."
    script = Path(sys.executable).parent/"medvlm3d"

    def run(*args):
        return subprocess.run([script, "data", *map(str, args)], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "COLUMNS": "120", "TERM": "dumb"})

    root = tmp_path/"brats"
    for n in range(6):
        write_brats(root, f"BraTS-GLI-0000{n // 2}-00{n % 2}", n)
    assert run("brats", root, "--licence", "research only").returncode == 0
    rows = [json.loads(line) for line in (root/"manifest.jsonl").read_text().splitlines()]
    (root/"torn.jsonl").write_text("".join(
        json.dumps({**r, "split": "test" if r["case"].endswith("1") else "train"}) + "\n" for r in rows))
    torn = run("verify", root/"torn.jsonl", "--workers", 2)
    assert torn.returncode == 1 and "| patient | 3 |" in torn.stdout
    assert "NOT passed: brats/audit" in torn.stderr and "Traceback" not in torn.stderr
    done = run("split", root/"torn.jsonl", "--by", "patient", "--shares", "67,0,33", "--tie", "bytes")
    assert done.returncode == 0, done.stderr
    assert run("verify", root/"torn-by-patient.jsonl", "--json").returncode == 0
    failed = run("m3d", root)
    assert failed.returncode == 1 and "M3D_Cap.json: is missing" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_data_report_finds_what_it_planted(tmp_path):
    """Runner 96 by its verb: sheets, balance, an audit, and what bench/scale.py measured on a corpus with
    known leaks."""
    bench = [sys.executable, ROOT/"bench"/"scale.py", tmp_path/"data"/"scale", "--quiet"]
    subprocess.run([*bench, "--volumes", "600", "--questions", "1200"], check=True)
    given = {
        "data": tmp_path/"data", "corpus": "''", "shape": "[8,32,32]", "sizes": "[[8,32,32]]", "drawn": 8,
        "asked": 240, "volumes": 600, "questions": 1200
    }
    done = CliRunner().invoke(app, [
        "data", "report", "--out",
        str(tmp_path/"out"), *(x for k, v in given.items() for x in ("-p", f"{k}={v}"))
    ])
    assert done.exit_code == 0, done.output + str(done.exception)
    run = RunFolder(tmp_path/"out")
    record = run.results["scale"]
    assert (run.status == "done" and run.results["audit"]["allowed"] == ["near text", "text"]
            and run.results["audit"]["passed"] and (run/"audit"/"audit.md").exists())
    assert {p.stem for p in (run/"tables").glob("*.md")} == {"balance", "speed", "audit", "scale"}
    assert {p.stem for p in (run/"figures").glob("*.png")
            } == {"phantom-CT", "phantom-MRI", "phantom-PET", "probes"}
    for page in [run/"audit"/"audit.md", *(run/"tables").glob("*.md"), *(run/"tables").glob("*.tex")]:
        assert "Research use only" in page.read_text(), page.name
    assert str(tmp_path) not in (run/"notebooks"/"96_data.ipynb").read_text()
    assert all(0 < v["a second"] < 1e4 for sizes in run.results["speed"].values() for v in sizes.values())
    assert record["manifest"]["leaks"] == ["case", "patient", "text", "near text", "bytes", "near image"]
    assert record["manifest-by-case"]["passed"]
    assert all(step["seconds"] > 0 and 10 < step["peak MB"] < 4000 for step in record["steps"].values())
    assert json.loads((tmp_path/"data"/"scale"/"scale.json").read_text()) == record


def test_the_committed_record_is_of_the_scale_that_was_asked():
    """A hundred thousand volumes and half a million questions: verify and split within a gigabyte a process,
    the planted leaks found, and none left after the split."""
    record = json.loads((ROOT/"reports"/"data"/"results.json").read_text())["scale"]
    assert (record["volumes"], record["questions"], record["workers"]) == (100_000, 500_000, 2)
    assert set(record["steps"]) == {"make the corpus", "verify", "split by case", "verify the split"}
    assert all(
        step["peak MB"] < 1000 and step["peak MB of a worker"] < 1000 for step in record["steps"].values())
    assert sum(record["manifest"]["volumes"].values()) == sum(
        record["manifest-by-case"]["volumes"].values()) == 100_000
    assert record["manifest"]["leaks"] == ["case", "patient", "text", "near text", "bytes", "near image"]
    assert record["manifest-by-case"]["passed"]


def test_pairs_and_mgz_are_listed_with_all_their_bytes(tmp_path):
    "What the reader takes as one volume is listed as one; the hash of a pair is of both files; no part is left over."
    voxels = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
    nib.save(nib.Nifti1Pair(voxels, np.diag([2., 2., 3., 1.])), tmp_path/"p1.img")
    nib.save(nib.MGHImage(voxels, np.diag([2., 2., 3., 1.])), tmp_path/"p2.mgz")
    for name in ("p1", "p2"): (tmp_path/f"{name}.txt").write_text("A cyst of 5 mm in the left kidney.")
    scans = find_scans(tmp_path)
    assert [p.name for p in scans] == ["p1.hdr", "p2.mgz"] and not left_over(tmp_path, scans)
    assert [s.image for s in load_folder(tmp_path)] == ["p1.hdr", "p2.mgz"]
    before = sha256_image(tmp_path/"p1.hdr")
    nib.save(nib.Nifti1Pair(voxels + 1, np.diag([2., 2., 3., 1.])), tmp_path/"p1.img")
    assert sha256_image(tmp_path/"p1.hdr") != before


def test_a_header_that_points_elsewhere_hashes_nothing_there(tmp_path):
    "The hash of a volume is of files in its own folder: another folder's bytes do not enter it."
    (tmp_path/"in").mkdir()
    secret = tmp_path/"secret.raw"
    secret.write_bytes(b"1")
    header = tmp_path/"in"/"scan.mhd"
    header.write_text("NDims = 3\nElementDataFile = ../secret.raw\n")
    before = sha256_image(header)
    secret.write_bytes(b"2")
    assert [*volume_files(header)] == [""] and sha256_image(header) == before


@pytest.mark.parametrize("verb", [("data", "verify"), ("data", "split")], ids=" ".join)
def test_the_most_voxels_are_those_that_the_user_names(verb, tmp_path):
    "A limit reaches the reader of every verb that reads volumes; where none is read, it is refused by its name."
    root = write_scans(tmp_path/"scans", 6, 6)
    write_manifest(root/"manifest.jsonl", [replace(s, split="train") for s in load_folder(root)])
    def call(*words): return CliRunner().invoke(app, [*verb, str(root/"manifest.jsonl"), "--workers", "1", *words])
    refused = call("--max-voxels", "1000")
    assert refused.exit_code and "the limit is" in f"{refused.exception} {refused.output}"
    assert "--max-voxels" in str(CliRunner().invoke(app, [*verb, str(root), "--no-images", "--max-voxels", "9"]).exception)
