"""One scan, written in every format and in every way in which such files reach a user, is one tensor."""
import os
import shutil
import struct
import time
import zipfile
from math import cos, radians, sin

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.uid import EnhancedCTImageStorage, SecondaryCaptureImageStorage
from scan_files import LPS, dicom, item, save_meta, save_nrrd, write

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.scans.prepare import Preprocess
from medvlm3d.scans.readers import read_volume
from medvlm3d.scans.volume import PLANES, axis_codes, codes_affine, make_volume

PREPARE = [Preprocess(7, 12, 11), Preprocess(6, 10, 9, crop=True), Preprocess(7, 12, 11, plane="sagittal")]


def phantom(shape=(9, 12, 10)):
    "A lopsided body in air, with noise: int16 in HU."
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    rng = np.random.default_rng(0)
    tissue = np.where(d**2 + h**2 + (w - .2)**2 < .8, 40, -1000) + rng.integers(-24, 25, shape)
    tissue[(d - .3)**2 + (h + .4)**2 + (w - .3)**2 < .1] = 900
    return tissue.clip(-1024, 3071).astype(np.int16)


def turn(axis, degrees):
    "A rotation (3, 3) about a vector."
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    c, s = cos(radians(degrees)), sin(radians(degrees))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return c * np.eye(3) + s * cross + (1 - c) * np.outer((x, y, z), (x, y, z))


def grid(plane="axial", spacing=(5, 1, 1), origin=(-7, 11, 30), rotation=None):
    "The affine (4, 4) in RAS mm of slices acquired in a plane, perhaps turned."
    affine = codes_affine(PLANES[plane], spacing)
    if rotation is not None: affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


# --- the writers: (folder, slices (D, H, W) in HU, affine) → path, options of read_volume --------------------

def text(numbers, digits=10): return [f"{x:.{digits}g}" for x in np.ravel(numbers)]


def positions(affine, n): return [text((LPS @ affine @ [i, 0, 0, 1])[:3]) for i in range(n)]


def orientation(affine):
    lps = LPS @ affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    return {"ImageOrientationPatient": text([lps[:3, 2] / step[2], lps[:3, 1] / step[1]], 9)}


def spacing(affine): return text(np.linalg.norm(affine[:3, 1:3], axis=0))


def series(folder, array, affine, names="1-{}.dcm", number=1, **changes):
    "A classic CT series; stored numbers are HU + 1024, without a sign."
    folder.mkdir(parents=True, exist_ok=True)
    for i, (pixels, place) in enumerate(zip(array, positions(affine, len(array)))):
        ds = dicom(pixels.shape, number, i, RescaleSlope="1", RescaleIntercept="-1024", PixelSpacing=spacing(affine),
                   PixelData=(pixels + 1024).astype(np.uint16).tobytes(), ImagePositionPatient=place,
                   InstanceNumber=i + 1, **orientation(affine))
        ds.PixelRepresentation = 0
        write(ds, folder/names.format(i), changes, i)
    return folder


def scrambled(folder, array, affine):
    return series(folder/"x", array, affine, InstanceNumber=lambda i, ds: 5 * i % len(array)), {}


def head_first(folder, array, affine):
    "The slices in the other order, their numbers and names as well."
    last = affine.copy()
    last[:, 3] += affine[:, 0] * (len(array) - 1)
    last[:, 0] *= -1
    return series(folder/"x", array[::-1], last, names="IM{:04}"), {}


def rounded(folder, array, affine):
    "Positions to a hundredth of a millimetre, directions to five decimals."
    def place(i, ds): return [f"{x:.2f}" for x in ds.ImagePositionPatient]
    def axes(i, ds): return [f"{x:.5f}" for x in ds.ImageOrientationPatient]
    return series(folder/"x", array, affine, ImagePositionPatient=place, ImageOrientationPatient=axes), {}


def renamed(folder, array, affine): return series(folder/"x", array, affine, names="scan{}.jpg.bak"), {}


def zipped(folder, array, affine):
    "A zip as macOS makes it."
    for path in sorted(series(folder/"x", array, affine).iterdir()):
        with zipfile.ZipFile(folder/"x.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, f"scan/{path.name}")
            archive.writestr(f"__MACOSX/scan/._{path.name}", b"\0\5\x16\7" + bytes(60))
    return folder/"x.zip", {}


def in_company(folder, array, affine):
    "Beside a localiser, a screenshot, a note and what macOS and Windows leave."
    x = series(folder/"x", array, affine)
    series(x, array[:1], affine, number=9, names="scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(x, array[:1], affine, number=8, names="sc.dcm", SOPClassUID=SecondaryCaptureImageStorage)
    for name in ("._1-0.dcm", ".DS_Store", "Thumbs.db", "notes.txt"): (x/name).write_bytes(b"\0\5\x16\7 left over")
    return x, {}


def two_series(folder, array, affine):
    series(folder/"x", array, affine, names="a{}", number=2)
    return series(folder/"x", array[:5, ::2], affine, names="b{}", number=1), {"series": 1}


def enhanced(folder, array, affine):
    "One file, its frames scrambled."
    order = np.random.default_rng(1).permutation(len(array)).tolist()
    places = positions(affine, len(array))
    own = [item(PlanePositionSequence=[item(ImagePositionPatient=places[i])]) for i in order]
    values = item(RescaleSlope="1", RescaleIntercept="-1024", RescaleType="HU")
    shared = item(PixelMeasuresSequence=[item(PixelSpacing=spacing(affine))],
                  PixelValueTransformationSequence=[values],
                  PlaneOrientationSequence=[item(**orientation(affine))])
    ds = dicom(array.shape[1:], 7, "enhanced", EnhancedCTImageStorage, NumberOfFrames=len(order),
               SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own,
               PixelData=(array[order] + 1024).astype(np.int16).tobytes())
    return write(ds, folder/"x.dcm"), {}


def xyz(array, affine): return np.ascontiguousarray(array.transpose(2, 1, 0)), affine[:, [2, 1, 0, 3]]


def nifti(name, image=nib.Nifti1Image, forms=(1, 1), kind=np.int16):
    def save(folder, array, affine):
        voxels, matrix = xyz(array, affine)
        made = image(voxels.astype(kind), matrix)
        made.set_qform(matrix, forms[0])
        made.set_sform(matrix, forms[1])
        nib.save(made, folder/name)
        return folder/name, {}
    return save


def stored_otherwise(folder, array, affine):
    "A NIfTI file whose axes are those of RAS, or the nearest."
    image = nib.as_closest_canonical(nib.Nifti1Image(*xyz(array, affine)))
    nib.save(image, folder/"x.nii.gz")
    return folder/"x.nii.gz", {}


def shifted(folder, array, affine):
    "A NIfTI file with a slope and a shift."
    voxels, matrix = xyz(array, affine)
    image = nib.Nifti1Image((voxels + 1024).astype(np.uint16), matrix)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, folder/"x.nii")
    return folder/"x.nii", {}


def mgz(folder, array, affine):
    nib.save(nib.MGHImage(*xyz(array, affine)), folder/"x.mgz")
    return folder/"x.mgz", {}


def nrrd_of(name, **options):
    return lambda folder, array, affine: (save_nrrd(folder/name, *xyz(array, affine), **options), {})


def meta_of(name, compressed=False):
    return lambda folder, array, affine: (save_meta(folder/name, *xyz(array, affine), compressed), {})


def npy(folder, array, affine):
    "An array without a header: the letters and the lengths of its axes are declared."
    np.save(folder/"x.npy", array)
    lengths = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return folder/"x.npy", {"axis_order": axis_codes(affine), "spacing": lengths}


def npz(folder, array, affine):
    path, options = npy(folder, array, affine)
    np.savez_compressed(folder/"x.npz", np.load(path))
    return folder/"x.npz", options


FILES = {
    "scrambled": scrambled, "head first": head_first, "rounded": rounded, "renamed": renamed, "zip": zipped, "in company": in_company,
    "two series": two_series, "enhanced": enhanced, "nii": nifti("x.nii"), "nii.gz": nifti("x.nii.gz"),
    "nifti 2": nifti("x.nii.gz", nib.Nifti2Image), "qform only": nifti("x.nii", forms=(1, 0)),
    "sform only": nifti("x.nii", forms=(0, 1)), "float": nifti("x.nii", kind=np.float32),
    "double": nifti("x.nii", nib.Nifti2Image, kind=np.float64), "pair": nifti("x.hdr", nib.Nifti1Pair),
    "otherwise": stored_otherwise, "shifted": shifted, "mgz": mgz, "nrrd": nrrd_of("x.nrrd"),
    "nhdr": nrrd_of("x.nhdr", detached_header=True), "mha": meta_of("x.mha"), "mhd": meta_of("x.mhd", True),
    "npy": npy, "npz": npz}
PLACED = [name for name in FILES if name not in ("npy", "npz")]      # files that place the voxels themselves


def assert_same(folder, array, affine, plane, names=FILES):
    "Written in each way and read, the scan gives one volume and one tensor, in `plane`."
    first = None
    for name in names:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path, options = FILES[name](folder, array, affine)
        volume = read_volume(path, **options)
        assert (volume.modality, volume.intensity, volume.plane) == ("CT", "HU", plane), (name, volume)
        tensors = [preprocess(volume).numpy() for preprocess in PREPARE]
        first = first or (volume, tensors)
        np.testing.assert_array_equal(volume.voxels, first[0].voxels, name)
        np.testing.assert_allclose(volume.spacing, first[0].spacing, rtol=3e-3, err_msg=name)
        for tensor, expected in zip(tensors, first[1]): np.testing.assert_array_equal(tensor, expected, name)
        if name in PLACED: np.testing.assert_allclose(volume.affine, first[0].affine, atol=.02, err_msg=name)


# --- acquisitions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("plane", PLANES)
def test_every_file_is_the_scan(tmp_path, plane):
    "Thick slices in each plane; the tensor is also the one made without any file."
    array, affine = phantom(), grid(plane)
    assert_same(tmp_path/"x", array, affine, plane)
    path, options = FILES["npy"](tmp_path, array, affine)
    read = read_volume(path, **options)
    np.testing.assert_array_equal(read.voxels, array)


RATIOS = [(1, 1), (1.19, 1), (1.2, 1), (.6, .5), (.9, .75), (2.4, 2), (3.6, 3), (1.5, 1.25), (.84, .7), (1.08, .9)]
ABOVE = [(1.21, 1), (1.25, 1), (.61, .5), (1.5, 1.2), (3, .7)]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("thick, thin", [*RATIOS, *ABOVE])
def test_ratios_about_the_threshold(tmp_path, plane, thick, thin):
    "A ratio of exactly 1.2 is not above 1.2, however its two numbers are rounded in a file."
    expected = plane if (thick, thin) in ABOVE else "axial"
    some = ("scrambled", "rounded", "enhanced", "nii", "nifti 2", "qform only", "mgz", "nrrd", "mha", "npy")
    assert_same(tmp_path/"x", phantom(), grid(plane, (thick, thin, thin)), expected, some)


@pytest.mark.parametrize("origin", [(0, 0, 0), (-123.4, 512.7, -1000 / 3), (1e3 / 7, -.1, 1.2), (-2048.5, 0, 9999.9)])
@pytest.mark.parametrize("thick, thin", [(1.2, 1), (.6, .5), (1.25, 1)])
def test_table_offsets(tmp_path, origin, thick, thin):
    "Where the table stood changes the rounding of positions, and nothing else."
    expected = "sagittal" if thick == 1.25 else "axial"
    some = ("scrambled", "head first", "rounded", "nii", "qform only", "mgz", "nrrd", "mhd")
    assert_same(tmp_path/"x", phantom(), grid("sagittal", (thick, thin, thin), origin), expected, some)


@pytest.mark.parametrize("spaced", [(1, 1.2, 1), (1.2, 1, 1.2), (1, 1, 1.2), (1.2, 1.2, 1), (1, 1.25, 1)])
def test_pixels_that_are_no_squares(tmp_path, spaced):
    "The coarsest axis may lie within the slices."
    expected = "coronal" if spaced == (1, 1.25, 1) else "axial"
    some = ("scrambled", "nii", "qform only", "otherwise", "nrrd", "mha", "npy")
    assert_same(tmp_path/"x", phantom(), grid("axial", spaced), expected, some)


TURNS = [((0, 0, 1), 20), ((0, 0, 1), 44.9), ((0, 0, 1), 45), ((0, 0, 1), 45.1), ((1, 0, 0), 45), ((0, 1, 0), -45),
         ((1, 1, 1), 60), ((1, 1, 1), -60), ((1, 2, 3), 33), ((1, 1, 0), 90), ((1, 0, 1), 135)]


@pytest.mark.parametrize("axis, degrees", TURNS)
@pytest.mark.parametrize("thick", [5, 1.2])
def test_oblique(tmp_path, axis, degrees, thick):
    "A turned scan keeps its order of axes in every format, also half-way between two planes."
    affine = grid("axial", (thick, 1, 1), rotation=turn(axis, degrees))
    some = ("scrambled", "head first", "rounded", "enhanced", "nii", "qform only", "sform only", "otherwise", "mgz",
            "nrrd", "mhd")
    path, _ = FILES["nifti 2"](tmp_path, phantom(), affine)
    assert_same(tmp_path/"x", phantom(), affine, read_volume(path).plane, some)


@pytest.mark.parametrize("plane", PLANES)
def test_numbers_that_are_not_whole(tmp_path, plane):
    "A slope is applied in the same precision by every reader; real numbers stay what they are."
    array, affine = phantom(), grid(plane, (1.2, 1, 1))
    values = (array * np.float64(.7) - 100.3).astype(np.float32)
    voxels, matrix = xyz(array, affine)
    image = nib.Nifti2Image(voxels, matrix)
    image.header.set_slope_inter(.7, -100.3)
    nib.save(image, tmp_path/"slope.nii.gz")
    nib.save(nib.Nifti1Image(xyz(values, affine)[0], matrix), tmp_path/"real.nii")
    changes = dict(RescaleSlope="0.7", RescaleIntercept="-100.3", PixelRepresentation=1,
                   PixelData=lambda i, ds: array[i].tobytes())
    paths = [series(tmp_path/"x", array, affine, **changes), tmp_path/"slope.nii.gz", tmp_path/"real.nii",
             save_nrrd(tmp_path/"x.nrrd", xyz(values, affine)[0], matrix),
             save_meta(tmp_path/"x.mha", xyz(values, affine)[0], matrix)]
    volumes = [read_volume(path) for path in paths]
    for path, volume in zip(paths, volumes):
        np.testing.assert_array_equal(volume.voxels, volumes[0].voxels, str(path))
        assert volume.intensity == "HU", path
        for preprocess in PREPARE: assert preprocess(volume).equal(preprocess(volumes[0])), path


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.float32])
def test_types_of_numbers(tmp_path, kind):
    "MR without a unit: the type in which a file keeps its numbers does not show in the tensor."
    array, affine = phantom().astype(int) + 1024, grid("coronal", (1.2, 1, 1))
    voxels, matrix = xyz(array.astype(kind), affine)
    small = xyz(array.astype(np.int16), affine)[0]
    unsigned = dict(Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    first = read_volume(series(tmp_path/"x", (array - 1024), affine, **unsigned))
    nib.save(nib.Nifti1Image(voxels, matrix), tmp_path/"x.nii")
    save_nrrd(tmp_path/"x.nrrd", voxels, matrix)
    save_meta(tmp_path/"x.mha", voxels if kind == np.float32 else small, matrix)
    for name in ("x.nii", "x.nrrd", "x.mha"):
        volume = read_volume(tmp_path/name, modality="MR")
        assert (volume.modality, volume.intensity, volume.plane) == ("MR", first.intensity, first.plane)
        np.testing.assert_array_equal(volume.voxels, first.voxels, name)
        for preprocess in PREPARE: assert preprocess(volume).equal(preprocess(first)), name


# --- compressed pixels, with real encoders ---------------------------------------------------------------------

def compress(path, syntax, **options):
    "The file compressed by an encoder of pydicom's plug-ins."
    ds = pydicom.dcmread(path)
    ds.compress(syntax, generate_instance_uid=False, **options)
    ds.save_as(path)


def jpeg_lossless(path, syntax):
    "The file compressed by GDCM, the one encoder of JPEG Lossless."
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    coded = path.with_name("coded")
    writer.SetFileName(str(coded))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    ds, written = pydicom.dcmread(path), pydicom.dcmread(coded)          # GDCM rewrites tags: only its pixels are taken
    ds.PixelData, ds.file_meta.TransferSyntaxUID = written.PixelData, written.file_meta.TransferSyntaxUID
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    coded.unlink()


def deflate(path):
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    ds.save_as(path)


COMPRESSIONS = {
    "JPEG-LS": lambda path: compress(path, uid.JPEGLSLossless),
    "JPEG 2000": lambda path: compress(path, uid.JPEG2000Lossless),
    "RLE": lambda path: compress(path, uid.RLELossless),
    "JPEG Lossless .70": lambda path: jpeg_lossless(path, gdcm.TransferSyntax.JPEGLosslessProcess14_1),
    "JPEG Lossless .57": lambda path: jpeg_lossless(path, gdcm.TransferSyntax.JPEGLosslessProcess14),
    "deflated": deflate}


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_series(tmp_path, kind, signed):
    "Compressed without loss, a series is the same volume and the same tensor."
    array, affine = phantom((9, 40, 36)), grid("coronal")
    changes = dict(PixelRepresentation=1, RescaleIntercept="0", PixelData=lambda i, ds: array[i].tobytes())
    changes = changes if signed else {}
    plain = read_volume(series(tmp_path/"plain", array, affine, **changes))
    for path in sorted(series(tmp_path/"small", array, affine, **changes).iterdir()): COMPRESSIONS[kind](path)
    small = read_volume(tmp_path/"small")
    assert (small.modality, small.intensity, small.plane) == ("CT", "HU", "coronal")
    np.testing.assert_array_equal(small.voxels, plain.voxels)
    for preprocess in PREPARE: assert preprocess(small).equal(preprocess(plain))


def test_compressed_with_loss(tmp_path):
    "JPEG-LS that may be wrong by two keeps every voxel within two HU."
    for path in series(tmp_path/"x", phantom(), grid()).iterdir():
        compress(path, uid.JPEGLSNearLossless, jls_error=2)
    difference = read_volume(tmp_path/"x").voxels.astype(int) - phantom()
    assert 0 < np.abs(difference).max() <= 2


# --- what would never end, and what takes long ---------------------------------------------------------------

@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.dcm", "x.nrrd", "x.npy", "x.zip", "x"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path/name)
    with pytest.raises(MedVLM3DError, match="is a pipe or a device"): read_volume(tmp_path/name)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused_at_once(path):
    with pytest.raises(MedVLM3DError, match="is a pipe or a device"): read_volume(path)


def test_a_pipe_beside_a_series_is_no_slice(tmp_path):
    x = series(tmp_path/"x", phantom(), grid())
    os.mkfifo(x/"pipe.dcm")
    np.testing.assert_array_equal(read_volume(x).voxels, phantom())


@pytest.mark.parametrize("explicit", [True, False])
def test_a_million_empty_tags_end_at_once(tmp_path, explicit):
    whole = (series(tmp_path/"x", phantom(), grid())/"1-0.dcm").read_bytes()
    kind = b"LO\0\0" if explicit else bytes(4)
    tags = b"".join(struct.pack("<HH", 9 + 2 * (k >> 16), k & 0xffff) + kind for k in range(10**6))
    head = whole[:132] if explicit else b""
    (tmp_path/"x.dcm").write_bytes(head + tags if not explicit else whole[:400] + tags)
    start = time.process_time()
    with pytest.raises(MedVLM3DError): read_volume(tmp_path/"x.dcm")
    assert time.process_time() - start < 3


def test_a_crop_takes_seconds():
    "Eight million voxels."
    array = np.tile(phantom((16, 64, 64)), (4, 8, 4))
    volume, start = make_volume(array, grid(), modality="CT", intensity="HU"), time.process_time()
    Preprocess(crop=True)(volume)
    assert time.process_time() - start < 10
