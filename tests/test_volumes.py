"""What a reader need not see of volumes: every orientation through files, damaged files of each format, privacy, bounded memory."""
import gzip
import io
import json
import subprocess
import sys
import warnings
import zipfile
from itertools import permutations, product

import nibabel as nib
import nrrd
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvlm3d.core import MedVLM3DError
from medvlm3d.readers import read_volume
from medvlm3d.volume import PLANES, Preprocess, acquired_plane, codes_affine, lesion_slices, make_volume, resample_mask

ALL_CODES = ["".join(signs[j][axis] for j, axis in enumerate(order)) for order in permutations((0, 1, 2)) for signs in product(("RAS", "LPI"), repeat=3)]
NAME, NUMBER = "Zaphod^Planted", "PID-0815-42"


@pytest.fixture(scope="module")
def voxels():
    return np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)


def patient(voxels, codes):
    "A (9, 8, 7) array in RAS, 1.5×1×4 mm, stored along `codes`: (array, affine)."
    affine = codes_affine("RAS", (1.5, 1, 4))
    affine[:3, 3] = -7, 11, 30
    order = ["RAS".index(c) if c in "RAS" else "LPI".index(c) for c in codes]
    array, affine = voxels.transpose(order), affine[:, [*order, 3]]
    for axis, code in enumerate(codes):
        if code in "LPI":
            array = np.flip(array, axis)
            affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return array, affine


def save_nifti(path, array, affine):
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array), affine), path)
    return path


def save_nrrd(path, array, affine, space="left-posterior-superior", sign=(-1, -1, 1)):
    m = np.diag([*sign, 1.]) @ affine
    nrrd.write(str(path), np.ascontiguousarray(array), {"space": space, "space directions": m[:3, :3].T, "space origin": m[:3, 3]})
    return path


def save_dicom(folder, array, affine, series=1, **changes):
    "A (D, H, W) int16 array with its affine in RAS as one file per slice, with planted patient data."
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1., -1, 1, 1]) @ affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    for i, pixels in enumerate(array):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(series), str(i)])
        ds.SeriesInstanceUID, ds.SeriesNumber, ds.Modality = generate_uid(entropy_srcs=[str(series)]), series, "CT"
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.SeriesDescription = NAME, NUMBER, "19420101", f"chest of {NAME}"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelSpacing = "1.7", "-1024.3", [float(step[1]), float(step[2])]
        ds.ImageOrientationPatient = [*(lps[:3, 2] / step[2]), *(lps[:3, 1] / step[1])]
        ds.ImagePositionPatient = [float(x) for x in (lps @ [i, 0, 0, 1])[:3]]
        ds.PixelData = np.ascontiguousarray(pixels).tobytes()
        for name, value in changes.items(): setattr(ds, name, value)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(folder/f"{series}-{(5 * i) % len(array)}.dcm", enforce_file_format=True)
    return folder


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])
    return path


# --- orientation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", [lambda p, a, m: save_nifti(p/"x.nii.gz", a, m), lambda p, a, m: save_nrrd(p/"x.nrrd", a, m)], ids=["nifti", "nrrd"])
def test_48_orientations_give_one_tensor(tmp_path, voxels, write):
    preprocess, seen = Preprocess(6, 10, 9, crop=True), {}
    assert len(set(ALL_CODES)) == 48
    for codes in ALL_CODES:
        volume = read_volume(write(tmp_path, *patient(voxels, codes)))
        seen.setdefault((volume.array.tobytes(), preprocess(volume).numpy().tobytes(), np.round(volume.affine, 3).tobytes()), []).append(codes)
        assert volume.codes == PLANES["axial"] and acquired_plane(volume) == "axial"
    assert len(seen) == 1


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
    spaces = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1), "left-anterior-superior": (-1, 1, 1)}
    found = [read_volume(save_nrrd(tmp_path/"x.nrrd", array, affine, space, sign)) for space, sign in spaces.items()]
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
        for preprocess in (Preprocess(10, 16, 16), Preprocess(40, 16, 50, plane="sagittal"), Preprocess(10, 16, 16, crop=True)):
            tensor, marked = preprocess(image), resample_mask(mask, preprocess, image)
            assert marked.any() and (tensor[~marked] < .9).all() and (tensor > .6).sum() > 0
            assert tensor.flatten(1).amax(1).argmax() in lesion_slices(marked)


def test_preprocess_leaves_a_ready_volume_alone():
    unit = torch.rand(50, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    unit.flat[:2] = 0, 1
    assert np.array_equal(Preprocess()(make_volume(unit)).numpy(), unit)
    with pytest.warns(UserWarning, match="constant"): assert not Preprocess(4, 4, 4)(make_volume(np.full((3, 3, 3), 7.))).any()
    padded = make_volume(np.float32([[[-3024, -1024, 0, 1000]]]), intensity="HU")
    assert Preprocess(1, 1, 4)(padded)[0, 0, 1] == 0


# --- damaged files --------------------------------------------------------------------------------------------------

def files(folder, voxels):
    "One good file of each format."
    array, affine = patient(voxels, "LPS")
    np.save(folder/"a.npy", array[None])
    np.savez_compressed(folder/"a.npz", array[None])
    series = save_dicom(folder/"series", *patient(voxels, "SPL"))
    with zipfile.ZipFile(folder/"a.zip", "w") as z:
        for p in series.iterdir(): z.write(p, p.name)
    return [save_nifti(folder/"a.nii", array, affine), save_nifti(folder/"a.nii.gz", array, affine), save_nrrd(folder/"a.nrrd", array, affine),
            folder/"a.npy", folder/"a.npz", folder/"a.zip"]


def damaged(good, trial, rng):
    "`good` cut short (every fifth trial) or with one to three bits flipped, mostly in its first 700 bytes."
    data = bytearray(good)
    if trial % 5 == 0: return data[:int(rng.integers(len(data)))]
    for _ in range(1 + trial % 3): data[int(rng.integers(min(len(data), 700 if trial % 2 else 10**9)))] ^= 1 << int(rng.integers(8))
    return data


def test_random_damage_is_an_error_or_a_volume(tmp_path, voxels):
    "Never another exception, never a word of the patient; an error names the file; what has a checksum is never wrong."
    rng = np.random.default_rng(1)
    for path in [*files(tmp_path, voxels), tmp_path/"series"/"1-3.dcm"]:
        target = path.parent if path.suffix == ".dcm" else path
        good, original = path.read_bytes(), read_volume(target)
        for trial in range(120):
            path.write_bytes(damaged(good, trial, rng))
            try: volume = read_volume(target)
            except MedVLM3DError as e:
                assert str(target) in e.what and e.why and e.remedy
                assert NAME not in str(e) and NUMBER not in str(e)
            else:
                assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
                if path.name.endswith((".gz", ".npz")): np.testing.assert_array_equal(volume.array, original.array)


def test_hostile_headers_do_not_allocate(tmp_path, voxels):
    "In 600 MB of address space beyond the imports, claims of terabytes and a bomb of 4 GB end in an error."
    header = nib.Nifti1Image(voxels, np.eye(4)).header
    header["dim"], header["vox_offset"], header["magic"] = [3, 32767, 32767, 32767, 1, 1, 1, 1], 352, b"n+1"
    (tmp_path/"claim.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    header["dim"], piece = [3, 8, 8, 8, 1, 1, 1, 1], gzip.compress(bytes(2**26), 1)
    (tmp_path/"bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4 + 1024)) + piece * 64)
    (tmp_path/"claim.nrrd").write_bytes(b"NRRD0005\ntype: double\ndimension: 3\nspace: LPS\nsizes: 99999 99999 99999\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: gzip\n\n" + piece)
    (tmp_path/"claim.npy").write_bytes(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 800, 800, 800), }".ljust(117) + b"\n")
    code = """
import resource, sys
from medvlm3d.readers import read_volume
import nibabel, nrrd
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
for path in sys.argv[1:]:
    try: read_volume(path); print('read', path)
    except ValueError as e: print(type(e).__name__)
"""
    if not sys.platform.startswith("linux"): pytest.skip("address space is limited on Linux only")
    names = [str(tmp_path/n) for n in ("claim.nii.gz", "bomb.nii.gz", "claim.nrrd", "claim.npy")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.stdout.split() == ["MedVLM3DError"] * 4, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("name, options, expected", [
    ("scan.mha", {}, "not read"), ("absent.nii", {}, "does not exist"), ("five.npy", {"axis_order": "CDHW"}, "does not name the axes"),
    ("five.npy", {"axis_order": "DHWDC"}, "does not name the axes"), ("three.npy", {"axis_order": "RAL"}, "no orientation"),
    ("three.npy", {"axis_order": "DHH"}, "does not name the axes"), ("channels.npy", {"axis_order": "CDHW"}, "2 channels"), ("three.npy", {}, "no declared axis order"),
    ("text.npy", {"axis_order": "DHW"}, "one real number"), ("records.npy", {"axis_order": "DHW"}, "records"), ("several.npz", {"axis_order": "DHW"}, "2 arrays"),
    ("inf.npy", {"axis_order": "DHW", "non_finite": "ignore"}, "no policy"), ("inf.npy", {"axis_order": "DHW"}, "1 of 24"), ("long.npy", {}, "far more bytes"),
    ("nothing.npy", {"axis_order": "DHW", "non_finite": "replace"}, "24 of 24"), ("three.npy", {"axis_order": "DHW", "max_voxels": 23}, "limit is 23")])
def test_arrays_that_are_refused(tmp_path, name, options, expected):
    three = np.arange(24.).reshape(2, 3, 4)
    (tmp_path/"scan.mha").write_bytes(b"ObjectType = Image")
    inf = three.copy(); inf[0, 0, 0] = np.inf
    for key, array in {"three": three, "five": three[None, None], "channels": np.stack([three, three]), "text": three.astype(str), "inf": inf, "nothing": three * np.nan,
                       "long": three[None], "records": np.zeros((2, 3, 4), [("a", int)])}.items(): np.save(tmp_path/f"{key}.npy", array)
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


# --- folders of pictures --------------------------------------------------------------------------------------------

def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path/"Coronal_bone_window"
    folder.mkdir()
    x = rng.integers(0, 255, (12, 6, 7), dtype=np.uint8)
    for i, pixels in enumerate(x): Image.fromarray(pixels).convert("RGB" if i % 2 else "L").save(folder/f"{i + 1}.png")
    (folder/"text.txt").write_text("no picture")
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, x)
    assert (volume.plane, volume.intensity, volume.assumed, acquired_plane(volume)) == ("coronal", "grey8", True, "coronal")
    cut(folder/"3.png", 40)
    with pytest.raises(MedVLM3DError, match="3.png.*no readable picture"): read_volume(folder)
    Image.fromarray(x[2].astype(np.uint16) * 200).save(folder/"3.png")
    assert read_volume(folder).array.max() > 255
    Image.fromarray(x[2]).save(folder/"03.png")
    with pytest.raises(MedVLM3DError, match="same number"): read_volume(folder)


# --- DICOM ----------------------------------------------------------------------------------------------------------

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
        for p in series.iterdir(): z.write(p, f"../../{p.name}")        # never unpacked, so its name cannot escape
        z.writestr("readme.txt", "hello")
    a, b = read_volume(series), read_volume(tmp_path/"s.zip")
    np.testing.assert_array_equal(a.array, b.array)
    assert a.source_hash == b.source_hash
    data = bytearray((tmp_path/"s.zip").read_bytes())
    data[len(data) // 3] ^= 255
    (tmp_path/"s.zip").write_bytes(data)
    with pytest.raises(MedVLM3DError, match="damaged"): read_volume(tmp_path/"s.zip")


def test_zip_that_declares_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("medvlm3d.dicom.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path/"s.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.dcm", bytes(10**6))
    with pytest.raises(MedVLM3DError, match="above the limit"): read_volume(tmp_path/"s.zip")


def test_pet_and_unknown_units(tmp_path, voxels):
    array, affine = patient(voxels, "SPL")
    suv = read_volume(save_dicom(tmp_path/"suv", array, affine, Modality="PT", Units="GML"))
    counts = read_volume(save_dicom(tmp_path/"counts", array, affine, Modality="PT", Units="BQML"))
    assert (suv.intensity, counts.intensity) == ("SUV", "arbitrary") and "PET" in counts.warnings[0]


def test_no_patient_in_anything_written(tmp_path, voxels):
    series = save_dicom(tmp_path/"series", *patient(voxels, "SPL"), PatientName=NAME, RescaleType=f"HU {NAME}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        volume = read_volume(series)
        tensor = Preprocess(4, 6, 6)(volume)
    np.save(out := io.BytesIO(), tensor.numpy())
    written = [repr(volume), repr(vars(volume)), json.dumps(Preprocess(4, 6, 6).describe(volume)), *map(str, volume.warnings), *(str(w.message) for w in caught)]
    assert NAME.encode() in next(series.iterdir()).read_bytes()
    for secret in (NAME, NUMBER, "19420101", "1.2.826"):
        assert secret.encode() not in out.getvalue() and not any(secret in text for text in written)
    for victim in series.iterdir(): cut(victim, 900)
    with pytest.raises(MedVLM3DError) as e: read_volume(series)
    assert NAME not in str(e.value) and NUMBER not in str(e.value)


def test_real_scans_lie_as_they_should():
    "The heart's side: with the canonical view, the chest's soft tissue between the lungs leans to the patient's left, the image's right."
    from medvlm3d.readers import real_scans
    scans = real_scans("lung2", "brain2")
    ct, mask = scans["lung2"]
    assert mask.array[:, :, :256].sum() == 0 and mask.array.sum() > 0        # a left lesion at the image's right
    middle = ct.array[20, 150:250]
    assert (middle[:, 262:360] > -200).mean() > (middle[:, 160:250] > -200).mean()
    assert scans["brain2"][0].codes == "SPL"
