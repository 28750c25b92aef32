"""Volumes: every orientation through files, damaged files of each format, privacy, bounded memory."""
import io
import json
import logging
import traceback
import warnings
import zipfile
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.uid import RLELossless
from scan_files import (
    ALL_CODES, DRUG, NAME, NUMBER, PET, SECRETS, cut, item, nifti_bytes, patient, save_dicom, save_enhanced,
    save_meta, save_nifti, save_nrrd)

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.scans.readers import read_volume
from medvlm3d.scans.volume import PLANES, acquired_plane, make_volume
from medvlm3d.scans.prepare import Preprocess, lesion_slices, resample_mask


@pytest.fixture(scope="module")
def voxels():
    return np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)


# --- orientation --------------------------------------------------------------------------------------------

WRITERS = {
    "nifti": lambda p, a, m: save_nifti(p/"x.nii.gz", a, m),
    "nrrd": lambda p, a, m: save_nrrd(p/"x.nrrd", a, m),
    "nhdr": lambda p, a, m: save_nrrd(p/"x.nhdr", a, m, detached_header=True),
    "mha": lambda p, a, m: save_meta(p/"x.mha", a, m, compressed=True),
    "mhd": lambda p, a, m: save_meta(p/"x.mhd", a, m),
    "dicom": lambda p, a, m: save_dicom(p/"x", a, m),
    "enhanced": lambda p, a, m: save_enhanced(p/"x.dcm", a, m)}


@pytest.mark.parametrize("kind", WRITERS)
def test_48_orientations_give_one_tensor(tmp_path, voxels, kind):
    "However a format stores the patient, the volume, its place in millimetres and the tensor are the same."
    preprocess, seen = Preprocess(6, 10, 9, crop=True), {}
    assert len(set(ALL_CODES)) == 48
    for codes in ALL_CODES:
        (tmp_path/codes).mkdir()
        volume = read_volume(WRITERS[kind](tmp_path/codes, *patient(voxels, codes)))
        tensor, place = preprocess(volume).numpy(), np.round(volume.affine, 3)
        seen.setdefault((volume.array.tobytes(), tensor.tobytes(), place.tobytes()), []).append(codes)
        assert volume.codes == PLANES["axial"] and acquired_plane(volume) == "axial"
    assert len(seen) == 1


def test_all_formats_agree(tmp_path, voxels):
    array, affine = patient(voxels, "SPL")
    found = {}
    for kind, write in WRITERS.items():
        (tmp_path/kind).mkdir()
        stored = array if kind in ("dicom", "enhanced") else (array * 1.7 - 1024.3).astype(np.float32)
        found[kind] = read_volume(write(tmp_path/kind, stored, affine))
    for kind, volume in found.items():
        np.testing.assert_array_equal(volume.array, found["nifti"].array, kind)
        np.testing.assert_allclose(volume.affine, found["nifti"].affine, atol=1e-4, err_msg=kind)
        assert (volume.modality, volume.intensity) == ("CT", "HU")
    assert len({volume.source_hash for volume in found.values()}) == len(found)


@pytest.mark.parametrize("plane", PLANES)
def test_dicom_and_nifti_agree_in_every_plane(tmp_path, voxels, plane):
    "Slices acquired in any plane: voxels, affine and tensor are those of the NIfTI copy, rescaled to HU."
    array, affine = patient(voxels, PLANES[plane])
    affine[:3, :3] *= np.array([5., 1, 1]) / np.linalg.norm(affine[:3, :3], axis=0)
    a = read_volume(save_dicom(tmp_path/"dicom", array, affine))
    hu = (array * 1.7 - 1024.3).astype(np.float32)
    b = read_volume(save_nifti(tmp_path/"same.nii", hu, affine))
    assert a.plane == b.plane == plane
    np.testing.assert_array_equal(a.array, b.array)
    np.testing.assert_array_equal(a.array, hu)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)
    assert torch.equal(Preprocess(5, 6, 7)(a), Preprocess(5, 6, 7)(b))


def test_nrrd_spaces_agree(tmp_path, voxels):
    array, affine = patient(voxels, "LPS")
    spaces = {
        "left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1),
        "left-anterior-superior": (-1, 1, 1)
    }
    found = [
        read_volume(save_nrrd(tmp_path/"x.nrrd", array, affine, space, sign))
        for space, sign in spaces.items()
    ]
    for volume in found[1:]:
        np.testing.assert_array_equal(volume.array, found[0].array)
        np.testing.assert_allclose(volume.affine, found[0].affine)


def test_nifti_2_units_and_byte_order(tmp_path, voxels):
    array, affine = patient(voxels, "RAS")
    nib.save(nib.Nifti2Image(array, affine), tmp_path/"two.nii.gz")
    microns = nib.Nifti1Image(array, np.diag([1000, 1000, 1000, 1]) @ affine)
    microns.header.set_xyzt_units("micron")
    nib.save(microns, tmp_path/"microns.nii")
    nib.save(nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=">")), tmp_path/"big.nii")
    plain = read_volume(save_nifti(tmp_path/"plain.nii", array, affine))
    for name in ("two.nii.gz", "microns.nii", "big.nii"):
        volume = read_volume(tmp_path/name)
        np.testing.assert_array_equal(volume.array, plain.array)
        np.testing.assert_allclose(volume.affine, plain.affine, rtol=1e-5)


def test_mask_follows_its_image(voxels):
    "Through any orientation, crop and size, the mask marks where the image is bright."
    bright = np.zeros((20, 30, 24), np.float32)
    bright[12:15, 20:24, 5:9] = 1
    for codes in ALL_CODES[::7]:
        array, affine = patient(bright, codes)
        image, mask = make_volume(array + .001, affine), make_volume(array, affine)
        sagittal = Preprocess(40, 16, 50, plane="sagittal")
        for preprocess in (Preprocess(10, 16, 16), sagittal, Preprocess(10, 16, 16, crop=True)):
            tensor, marked = preprocess(image), resample_mask(mask, preprocess, image)
            assert marked.any() and (tensor[~marked] < .9).all() and (tensor > .6).sum() > 0
            assert tensor.flatten(1).amax(1).argmax() in lesion_slices(marked)


def test_preprocess_leaves_a_ready_volume_alone():
    unit = torch.rand(50, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    unit.flat[:2] = 0, 1
    assert np.array_equal(Preprocess()(make_volume(unit)).numpy(), unit)
    with pytest.warns(UserWarning, match="constant"):
        assert not Preprocess(4, 4, 4)(make_volume(np.full((3, 3, 3), 7.))).any()
    padded = make_volume(np.float32([[[-3024, -1024, 0, 1000]]]), intensity="HU")
    assert Preprocess(1, 1, 4)(padded)[0, 0, 1] == 0


# --- damaged files ------------------------------------------------------------------------------------------

def files(folder, voxels):
    "One good file of each format."
    array, affine = patient(voxels, "LPS")
    np.save(folder/"a.npy", array[None])
    np.savez_compressed(folder/"a.npz", array[None])
    series = save_dicom(folder/"series", *patient(voxels, "SPL"))
    with zipfile.ZipFile(folder/"a.zip", "w") as z:
        for p in series.iterdir(): z.write(p, p.name)
    return [
        save_nifti(folder/"a.nii", array, affine),
        save_nifti(folder/"a.nii.gz", array, affine),
        save_nrrd(folder/"a.nrrd", array, affine),
        save_nrrd(folder/"b.nhdr", array, affine, detached_header=True),
        save_meta(folder/"a.mha", array, affine, compressed=True),
        save_meta(folder/"b.mhd", array, affine), folder/"a.npy", folder/"a.npz", folder/"a.zip",
        save_enhanced(folder/"a.dcm", *patient(voxels, "SPL"))
    ]


def damaged(good, trial, rng):
    "`good` cut short (every fifth trial) or with one to three bits flipped, mostly in its first 700 bytes."
    data = bytearray(good)
    if trial % 5 == 0: return data[:int(rng.integers(len(data)))]
    for _ in range(1 + trial % 3):
        data[int(rng.integers(min(len(data), 700 if trial % 2 else 10**9)))] ^= 1 << int(rng.integers(8))
    return data


def test_random_damage_is_an_error_or_a_volume(tmp_path, voxels):
    "Never another exception, never a word of the patient; what has a checksum is never wrong."
    rng = np.random.default_rng(1)
    for path in [*files(tmp_path, voxels), tmp_path/"series"/"1-3.dcm"]:
        target = path.parent if path.parent.name == "series" else path
        good, original = path.read_bytes(), read_volume(target)
        for trial in range(120):
            path.write_bytes(damaged(good, trial, rng))
            try: volume = read_volume(target)
            except MedVLM3DError as e:
                assert str(target) in e.what and e.why and e.remedy
                assert not any(secret in "".join(traceback.format_exception(e))
                               for secret in (NAME, "Zaphod", NUMBER))
            else:
                assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
                if path.name.endswith((".gz", ".npz")):
                    np.testing.assert_array_equal(volume.array, original.array)

@pytest.mark.parametrize("name, options, expected",
                         [("scan.xyz", {}, "not read"), ("absent.nii", {}, "does not exist"),
                          ("five.npy", {"axis_order": "CDHW"}, "does not name the axes"),
                          ("five.npy", {"axis_order": "DHWDC"}, "does not name the axes"),
                          ("three.npy", {"axis_order": "RAL"}, "no orientation"),
                          ("three.npy", {"axis_order": "DHH"}, "does not name the axes"),
                          ("channels.npy", {"axis_order": "CDHW"}, "2 channels"),
                          ("three.npy", {}, "no declared axis order"),
                          ("text.npy", {"axis_order": "DHW"}, "one real number"),
                          ("records.npy", {"axis_order": "DHW"}, "records"),
                          ("several.npz", {"axis_order": "DHW"}, "2 arrays"),
                          ("inf.npy", {"axis_order": "DHW", "non_finite": "ignore"}, "no policy"),
                          ("inf.npy", {"axis_order": "DHW"}, "1 of 24"), ("long.npy", {}, "far more bytes"),
                          ("nothing.npy", {"axis_order": "DHW", "non_finite": "replace"}, "24 of 24"),
                          ("three.npy", {"axis_order": "DHW", "max_voxels": 23}, "limit is 23")])
def test_arrays_that_are_refused(tmp_path, name, options, expected):
    three = np.arange(24.).reshape(2, 3, 4)
    (tmp_path/"scan.xyz").write_bytes(b"voxels")
    inf = three.copy(); inf[0, 0, 0] = np.inf
    for key, array in {"three": three, "five": three[None, None], "channels": np.stack([three, three]),
                       "text": three.astype(str), "inf": inf, "nothing": three * np.nan,
                       "long": three[None], "records": np.zeros((2, 3, 4), [("a", int)])}.items():
        np.save(tmp_path/f"{key}.npy", array)
    with open(tmp_path/"long.npy", "ab") as f: f.write(b"more")
    np.savez(tmp_path/"several.npz", three, three)
    with pytest.raises(MedVLM3DError, match=expected) as e: read_volume(tmp_path/name, **options)
    assert name in str(e.value) or expected == "no policy"


def test_declared_axis_orders_agree(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    for order in permutations("DHW"):
        np.save(tmp_path/"x.npy", x.transpose(["DHW".index(c) for c in order]))
        np.testing.assert_array_equal(read_volume(tmp_path/"x.npy", axis_order="".join(order)).array, x)
    np.save(tmp_path/"x.npy", np.asfortranarray(x[None]).astype(">f8"))
    np.testing.assert_array_equal(read_volume(tmp_path/"x.npy").array, x)


# --- what a number means ------------------------------------------------------------------------------------

@pytest.mark.parametrize("low, high, dtype, expected", [(-1000, 900, np.int16, ("CT", "HU")),
                                                        (0, 255, np.uint8, ("unknown", "grey8")),
                                                        (0, 1, np.uint8, ("unknown", "unit")),
                                                        (0, 900, np.int16, ("unknown", "arbitrary")),
                                                        (-40000, 900, np.float32, ("unknown", "arbitrary"))])
def test_numbers_without_a_label(tmp_path, low, high, dtype, expected):
    voxels = np.linspace(low, high, 120).reshape(4, 5, 6).astype(dtype)
    for name, content in (("x.nii", nifti_bytes(voxels)), ("x.nii",
                                                           nifti_bytes(voxels, scl_slope=1, scl_inter=0))):
        (tmp_path/name).write_bytes(content)
        volume = read_volume(tmp_path/name)
        assert (volume.modality, volume.intensity) == expected
        assert any("because of its values" in w for w in volume.warnings) == (expected[1] == "HU")


def test_what_is_told_is_noted_and_never_contradicts_a_header(tmp_path, voxels):
    array, affine = patient(voxels, "SPL")
    path = save_nifti(tmp_path/"pet.nii.gz", array, affine)
    pet = read_volume(path, intensity="SUV")
    assert (pet.modality, pet.intensity) == ("PT", "SUV") and "SUV: as told" in pet.warnings
    assert (read_volume(path,
                        modality="MR").modality, read_volume(path, modality="MR",
                                                             intensity="unit").intensity) == ("MR", "unit")
    with pytest.raises(MedVLM3DError, match="pet.nii.gz.*'SUVs'.*Use one of HU, SUV, arbitrary, grey8, unit"):
        read_volume(path, intensity="SUVs")
    with pytest.raises(MedVLM3DError, match="pet.nii.gz.*'MRI'.*Use one of CT, MR, PT, unknown"):
        read_volume(path, modality="MRI")
    series = save_dicom(tmp_path/"ct", array, affine)
    assert read_volume(series, modality="CT", intensity="HU").intensity == "HU"
    with pytest.raises(MedVLM3DError, match="states its intensity in HU, not SUV"):
        read_volume(series, intensity="SUV")
    with pytest.raises(MedVLM3DError, match="states the modality CT, not MR"):
        read_volume(series, modality="MR")

@pytest.mark.parametrize("option, value", [("series", 1), ("frame", 0), ("axis_order", "RAS"),
                                           ("suv", False), ("spacing", (1, 1, 3))])
def test_an_option_without_effect_is_refused(tmp_path, voxels, option, value):
    "Of every kind of file the options that it takes, and no others."
    takes = {
        "a.nii": {"frame", "axis_order"}, "a.nrrd": {"frame", "axis_order"}, "a.mha": {"frame", "axis_order"},
        "a.npy": {"axis_order", "spacing"}, "series": {"series", "suv", "frame"}, "axial": set()
    }
    files(tmp_path, voxels)
    np.save(tmp_path/"a.npy", voxels)
    (tmp_path/"axial").mkdir()
    for i in range(3): Image.fromarray(np.full((8, 9), i, np.uint8)).save(tmp_path/"axial"/f"{i}.png")
    for name, taken in takes.items():
        if option in taken: continue
        with pytest.raises(MedVLM3DError, match=f"{name}: has nothing to choose by {option}. Leave it out"):
            read_volume(tmp_path/name, **{option: value})


def test_a_window_is_for_hu_alone(voxels):
    for intensity in ("SUV", "arbitrary", "grey8", "unit"):
        volume = make_volume(voxels, intensity=intensity)
        assert torch.equal(Preprocess(9, 8, 7, window=(0, 10))(volume), Preprocess(9, 8, 7)(volume))
        assert Preprocess(9, 8, 7, window=(0, 10)).describe(volume)["window"] is None
    hu = make_volume(voxels, intensity="HU")
    record = Preprocess(4, 8, 7, window=(100, 400)).describe(hu)
    assert record["zero_one"] == [100, 400] and record["voxels"] == [9, 8, 7] and record["to_voxels"] == [
        4, 8, 7
    ] and record["to_spacing"][0] == 9/4
    assert json.loads(json.dumps(record))["window"] == [100, 400]


@pytest.mark.parametrize("depth", [1, 3, 50, 77])
def test_fewer_or_more_slices_than_asked_for(depth):
    volume = make_volume(
        np.random.default_rng(0).random((depth, 12, 10)),
        np.diag([1., 1, 1, 1])[[2, 1, 0, 3]])
    record = Preprocess(20, 12, 10, plane="axial").describe(volume)
    assert Preprocess(20, 12, 10, plane="axial")(volume).shape == (20, 12, 10)
    assert record["voxels"][0] == depth and abs(record["to_spacing"][0] - depth / 20) < 1e-3


def test_the_saved_settings_of_the_demo_still_load(tmp_path):
    "A model saved before keeps its preprocessing: six values, and the same tensor."
    from conftest import ROOT
    saved = json.loads((ROOT/"reports"/"demo"/"model"/"processor_config.json").read_text())["preprocess"]
    assert sorted(saved) == ["crop", "depth", "height", "plane", "width", "window"]
    preprocess = Preprocess.from_dict(saved)
    assert json.loads(json.dumps(preprocess.to_dict())) == saved and preprocess.window == (-200, 400)


# --- folders of pictures ------------------------------------------------------------------------------------

def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path/"Coronal_bone_window"
    folder.mkdir()
    x = rng.integers(0, 255, (12, 6, 7), dtype=np.uint8)
    for i, pixels in enumerate(x):
        Image.fromarray(pixels).convert("RGB" if i % 2 else "L").save(folder/f"{i + 1}.png")
    (folder/"text.txt").write_text("no picture")
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, x)
    assert (volume.plane, volume.intensity, volume.assumed, acquired_plane(volume)) == ("coronal", "grey8",
                                                                                        True, "coronal")
    cut(folder/"3.png", 40)
    with pytest.raises(MedVLM3DError, match="3.png.*no readable picture"): read_volume(folder)
    Image.fromarray(x[2].astype(np.uint16) * 200).save(folder/"3.png")
    assert read_volume(folder).array.max() > 255
    Image.fromarray(x[2]).save(folder/"03.png")
    with pytest.raises(MedVLM3DError, match="same number"): read_volume(folder)


# --- DICOM --------------------------------------------------------------------------------------------------

def test_choice_of_series(tmp_path, voxels):
    array, affine = patient(voxels, "SPL")
    save_dicom(save_dicom(tmp_path/"two", array, affine), array[:4] + 1, affine, series=2)
    with pytest.raises(MedVLM3DError, match="2 series") as e: read_volume(tmp_path/"two")
    assert "series=0 to 1" in str(e.value) and NAME not in str(e.value) and "1.2.826" not in str(e.value)
    assert read_volume(tmp_path/"two", series=1).shape == (4, 8, 9)
    with pytest.raises(MedVLM3DError): read_volume(tmp_path/"two", series=2)


def test_zip_of_a_series(tmp_path, voxels):
    series = save_dicom(tmp_path/"series", *patient(voxels, "SPL"))
    with zipfile.ZipFile(tmp_path/"s.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for p in series.iterdir():
            z.write(p, f"../../{p.name}")  # never unpacked, so its name cannot escape
        z.writestr("readme.txt", "hello")
    a, b = read_volume(series), read_volume(tmp_path/"s.zip")
    np.testing.assert_array_equal(a.array, b.array)
    assert a.source_hash == b.source_hash
    data = bytearray((tmp_path/"s.zip").read_bytes())
    data[len(data) // 3] ^= 255
    (tmp_path/"s.zip").write_bytes(data)
    with pytest.raises(MedVLM3DError, match="damaged"): read_volume(tmp_path/"s.zip")


def test_zip_that_declares_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("medvlm3d.scans.guard.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path/"s.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.dcm", bytes(10**6))
    with pytest.raises(MedVLM3DError,
                       match="s.zip.*unpacks to 1000000 bytes, above the limit.*not the whole archive"):
        read_volume(tmp_path/"s.zip")


def test_pet_becomes_suv_by_its_tags(tmp_path, voxels):
    "Bq/ml · weight / dose left at the scan, each slice with its own slope; relative numbers only on request."
    array, affine = patient(voxels, "SPL")
    suv = read_volume(
        save_dicom(tmp_path/"suv", array, affine, **{**PET, "Units": "GML", "RescaleSlope": "0.01"}))
    assert (suv.modality, suv.intensity) == ("PT", "SUV")
    np.testing.assert_allclose(suv.array, array * .01, rtol=1e-6)
    series = save_dicom(tmp_path/"bq", array, affine, **{**PET, "RescaleSlope": lambda i, ds: str(1 + i)})
    slopes = np.arange(1., len(array) + 1)[:, None, None]
    np.testing.assert_allclose(
        read_volume(series).array, array*slopes*70e3/(370e6*2**(-3600/6586.2)), rtol=1e-5)
    relative = read_volume(series, suv=False)
    assert relative.intensity == "arbitrary" and "PET not in SUV: relative numbers only" in relative.warnings
    np.testing.assert_allclose(relative.array, array * slopes)


@pytest.mark.parametrize(
    "tag, changes",
    [("PatientWeight", {"PatientWeight": ""}),
     ("AcquisitionDate or AcquisitionTime", {"AcquisitionTime": ""}),
     ("SeriesDate or SeriesTime", {"SeriesDate": ""}),
     ("RadionuclideTotalDose",
      {"RadiopharmaceuticalInformationSequence": [item(**{**DRUG, "RadionuclideTotalDose": 0})]}),
     ("RadionuclideHalfLife", {
         "RadiopharmaceuticalInformationSequence":
         [item(RadionuclideTotalDose=370e6, RadiopharmaceuticalStartTime="090000")]
     }),
     ("RadiopharmaceuticalStartTime", {
         "RadiopharmaceuticalInformationSequence":
         [item(RadionuclideTotalDose=370e6, RadionuclideHalfLife=6586.2)]
     }), ("DecayCorrection", {"DecayCorrection": "NONE"}),
     ("attenuation and decay", {"CorrectedImage": ["DECY"]}), ("its unit", {"Units": "PLANTED"}),
     ("different units, weights", {"PatientWeight": lambda i, ds: 70 + i}),
     ("another unit", {"PatientWeight": 70000})])
def test_pet_without_what_suv_needs(tmp_path, voxels, tag, changes):
    series = save_dicom(tmp_path/"pet", *patient(voxels, "SPL"), **{**PET, **changes})
    with pytest.raises(MedVLM3DError,
                       match=f"pet: cannot be turned into SUV.*{tag}.*read it with suv=False") as e:
        read_volume(series)
    assert not any(secret in "".join(traceback.format_exception(e.value)) for secret in (*SECRETS, "PLANTED"))
    assert read_volume(series, suv=False).intensity == "arbitrary"


def test_enhanced_file_of_two_phases(tmp_path, voxels):
    "One file, two volumes: they are listed, one is chosen; also from a zip."
    array, affine = patient(voxels, "SPL")
    path = save_enhanced(tmp_path/"two.dcm", array, affine, phases=2)
    with pytest.raises(
            MedVLM3DError,
            match="two.dcm: holds 2 series .0: CT, 7 images of 8×9, axial, 4×1×1.5 mm, time 1, number 7; "
                  "1: CT, 7 images of 8×9, .*time 2.*series=0 to 1"
    ) as e:
        read_volume(path)
    assert not any(secret in str(e.value) for secret in SECRETS)
    first, second = (read_volume(path, series=k) for k in (0, 1))
    np.testing.assert_array_equal(first.array,
                                  read_volume(save_dicom(tmp_path/"classic", array, affine)).array)
    np.testing.assert_allclose(second.array - first.array, 1.7, rtol=1e-3)
    with zipfile.ZipFile(tmp_path/"two.zip", "w", zipfile.ZIP_DEFLATED) as z: z.write(path, "deep/inside")
    np.testing.assert_array_equal(read_volume(tmp_path/"two.zip", series=1).array, second.array)


def test_compressed_pixels_that_can_be_decoded(tmp_path, voxels):
    array, affine = patient(voxels, "SPL")
    def compress(i, ds):
        ds.compress(RLELossless, generate_instance_uid=False)
        return ds.PixelData
    packed = read_volume(save_dicom(tmp_path/"rle", array, affine, PixelData=compress))
    np.testing.assert_array_equal(packed.array,
                                  read_volume(save_dicom(tmp_path/"plain", array, affine)).array)


def everything(volume):
    "All that a volume and its preprocessing could write, as text."
    np.save(out := io.BytesIO(), Preprocess(4, 6, 6)(volume).numpy())
    return " ".join([
        repr(volume),
        repr(vars(volume)),
        json.dumps(Preprocess(4, 6, 6).describe(volume)), *volume.warnings,
        out.getvalue().decode("latin-1")
    ])


@pytest.mark.parametrize("kind", ["series", "enhanced", "pet", "zip"])
def test_no_patient_in_anything_written(tmp_path, voxels, caplog, capfd, kind):
    "A planted name, number, birth date and UID are in no field, message, warning, log, output or traceback."
    array, affine = patient(voxels, "SPL")
    if kind == "enhanced": target = save_enhanced(tmp_path/"e.dcm", array, affine, RescaleType=NAME[:16])
    else:
        target = save_dicom(tmp_path/"s", array, affine, RescaleType=NAME[:16], StudyDescription=NAME,
                            **(PET if kind == "pet" else {}))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path/"s.zip", "w") as z:
            for p in target.iterdir(): z.write(p, p.name)
        target = tmp_path/"s.zip"
    assert NAME.encode() in (target if target.is_file() else next(target.iterdir())).read_bytes()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = [everything(read_volume(target))]
        for victim in [target] if target.is_file() else target.iterdir(): cut(victim, 900)
        with pytest.raises(MedVLM3DError) as e: read_volume(target)
    written += [
        *traceback.format_exception(e.value), *(str(w.message) for w in caught), caplog.text,
        *capfd.readouterr()
    ]
    for secret in SECRETS: assert not any(secret in text for text in written), secret


def test_a_name_where_a_number_belongs_is_not_repeated(tmp_path, voxels, caplog):
    "pydicom quotes what it cannot convert, in warnings, logs and errors; none of that comes out."
    series = save_dicom(tmp_path/"s", *patient(voxels, "SPL"), SeriesDescription="-1024.3")
    for victim in series.iterdir(): victim.write_bytes(victim.read_bytes().replace(b"-1024.3", b"Zaphod1"))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(MedVLM3DError, match="damaged DICOM header") as e: read_volume(series)
    assert not any(
        "Zaphod" in text
        for text in [*traceback.format_exception(e.value), caplog.text, *(str(w.message) for w in caught)])

# --- real scans ---------------------------------------------------------------------------------------------

def test_real_scans_lie_as_they_should():
    "The heart's side: the soft tissue between the lungs leans to the patient's left, the image's right."
    from medvlm3d.scans.readers import real_scans
    scans = real_scans("lung2", "brain2")
    ct, mask = scans["lung2"]
    assert mask.array[:, :, :256].sum() == 0 and mask.array.sum() > 0  # a left lesion at the image's right
    middle = ct.array[20, 150:250]
    assert (middle[:, 262:360] > -200).mean() > (middle[:, 160:250] > -200).mean()
    assert scans["brain2"][0].codes == "SPL"


# --- oracles that are not ours ------------------------------------------------------------------------------

def found_at(volume, points):
    "The values of a volume at points (n, 3) in LPS mm, each within a tenth of a voxel of a middle."
    voxels = (
        np.linalg.inv(volume.affine) @ np.diag([-1., -1, 1, 1]) @ np.c_[points, np.ones(len(points))].T)[:3]
    np.testing.assert_allclose(voxels, voxels.round(), atol=.1)
    return volume.array[tuple(voxels.round().astype(int))]


def test_a_real_series_lies_where_nibabel_puts_it():
    "nibabel reads each file of the MR series alone, by its own formula: each pixel lies where we put it."
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    from medvlm3d.base.fetch import fetch
    folder, rng = fetch("brain-mr-dicom"), np.random.default_rng(0)
    volume = read_volume(folder)
    files = sorted(folder.glob("*.dcm"))
    assert len(files) == volume.shape[0] == 20
    for path in files:
        alone = wrapper_from_file(path)
        pixels = alone.get_data()
        i, j = rng.integers(0, pixels.shape, (50, 2)).T
        points = (alone.affine @ np.stack([i, j, np.zeros(50), np.ones(50)]))[:3].T
        np.testing.assert_array_equal(found_at(volume, points), pixels[i, j])


def test_a_meta_image_lies_where_its_definition_puts_it(tmp_path):
    """Worked by hand: the first index runs fastest, row n of TransformMatrix the direction of index n (LPS).
    Voxel (i, j, k) holds i + 2j + 6k and lies at (10 − 4k, 20 + 2i, 30 − 3j)."""
    (tmp_path/"hand.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        b"CompressedData = False\n"
        b"TransformMatrix = 0 1 0 0 0 -1 -1 0 0\n"
        b"Offset = 10 20 30\nElementSpacing = 2 3 4\nDimSize = 2 3 4\n"
        b"ElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
        + bytes(range(24)))
    points = [(10, 20, 30), (10, 22, 30), (10, 20, 27), (6, 20, 30), (-2, 22, 24)]
    assert found_at(read_volume(tmp_path/"hand.mha"), points).tolist() == [0, 1, 2, 6, 23]
