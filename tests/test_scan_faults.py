"""Each fault that a scan may have, made for real: the error names the file, the reason and the remedy; what is repaired is recorded;
nothing hostile costs memory."""
import gzip
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from zlib import crc32

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, MPEG2MPML
from scan_files import cut, meta_bytes, nifti_bytes, nrrd_bytes, patient, save_dicom, save_enhanced, save_nifti

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.scans.readers import read_volume
from medvlm3d.scans.prepare import Preprocess

VOXELS = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
PAIR = np.stack([VOXELS, VOXELS + 1], -1)
STACK, AFFINE = patient(VOXELS, "SPL")
PACKED = gzip.compress(nifti_bytes(VOXELS))
HUGE = "32767 32767 32767"
COPY, EXPORT, AGAIN, CHOOSE = "Copy the file again", "Export the scan again", "Export the series again", "Choose one with"
FLAT = {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}


def with_nan(n=2):
    x = VOXELS.astype(np.float32)
    x.flat[:n] = np.nan
    x.flat[n] = np.inf
    return x


def flipped(data, position, bit=16): return data[:position] + bytes([data[position] ^ bit]) + data[position + 1:]


def npy(array, version=(1, 0)):
    import io
    np.lib.format.write_array(out := io.BytesIO(), array, version=version)
    return out.getvalue()


def npy_header(header, version=b"\x01\x00"): return b"\x93NUMPY" + version + len(header).to_bytes(2 if version[0] == 1 else 4, "little") + header


def png(side):
    "A PNG that declares side × side pixels, and holds a few bytes."
    def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + crc32(kind + data).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00") + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def npz(path, *arrays):
    np.savez_compressed(path, *arrays)
    return path.read_bytes()


# --- volumes: name → (file, content, options, reason, remedy) --------------------------------------------------------

VOLUMES = {
    "empty .nii": ("a.nii", b"", {}, "truncated: 0 of 348 bytes", COPY),
    "empty .nii.gz": ("a.nii.gz", b"", {}, "truncated: 0 of 348 bytes", COPY),
    "empty .nrrd": ("a.nrrd", b"", {}, "no readable NRRD header", EXPORT),
    "empty .mha": ("a.mha", b"", {}, "no readable MetaImage header", EXPORT),
    "empty .npy": ("a.npy", b"", {}, "no readable .npy header", "Save the array again"),
    "header only": ("a.nii", nifti_bytes(VOXELS)[:352], {}, "truncated: 0 of 1008 bytes", COPY),
    "header only, zipped": ("a.nii.gz", gzip.compress(nifti_bytes(VOXELS)[:352]), {}, "truncated: 0 of 1008 bytes", COPY),
    "header only, .mha": ("a.mha", meta_bytes(VOXELS)[:-1008], {}, "truncated: 0 of 1008 bytes", COPY),
    "half a header": ("a.nii", nifti_bytes(VOXELS)[:200], {}, "truncated: 200 of 348 bytes", COPY),
    "short .nii": ("a.nii", nifti_bytes(VOXELS)[:-1], {}, "truncated: 1007 of 1008 bytes", COPY),
    "short .nrrd": ("a.nrrd", nrrd_bytes(VOXELS, "raw")[:-1], {}, "truncated: 1007 of 1008 bytes", COPY),
    "short .mha": ("a.mha", meta_bytes(VOXELS)[:-1], {}, "truncated: 1007 of 1008 bytes", COPY),
    "truncated .nii.gz": ("a.nii.gz", PACKED[:len(PACKED) // 2], {}, "compressed data are damaged .*ended before", COPY),
    "truncated gzip NRRD": ("a.nrrd", nrrd_bytes(VOXELS)[:-200], {}, "compressed data are damaged .*ended before", COPY),
    "truncated zlib .mha": ("a.mha", meta_bytes(VOXELS, True)[:-200], {}, "compressed data are damaged .*before their end mark", COPY),
    "trailer cut off": ("a.nii.gz", PACKED[:-8], {}, "compressed data are damaged", COPY),
    "checksum cut off .mha": ("a.mha", meta_bytes(VOXELS, True)[:-4], {}, "compressed data are damaged .*before their end mark", COPY),
    "wrong CRC": ("a.nii.gz", flipped(PACKED, len(PACKED) - 6), {}, "compressed data are damaged .*CRC", COPY),
    "wrong length": ("a.nii.gz", flipped(PACKED, len(PACKED) - 2), {}, "compressed data are damaged .*Incorrect length", COPY),
    "flipped byte": ("a.nii.gz", flipped(PACKED, len(PACKED) // 2), {}, "compressed data are damaged", COPY),
    "flipped byte, NRRD": ("a.nrrd", flipped(nrrd_bytes(VOXELS), -300), {}, "compressed data are damaged", COPY),
    "flipped byte, .mha": ("a.mha", flipped(meta_bytes(VOXELS, True), -300), {}, "compressed data are damaged", COPY),
    "wrong checksum, .mha": ("a.mha", flipped(meta_bytes(VOXELS, True), -2), {}, "compressed data are damaged .*incorrect data check", COPY),
    ".mha that is not zlib": ("a.mha", meta_bytes(VOXELS, True)[:-len(zlib.compress(VOXELS.tobytes(order="F")))] + bytes(900),
                              {}, "compressed data are damaged", COPY),
    "not NIfTI": ("a.nii", bytes(5000), {}, "is no NIfTI file", "Convert it"),
    "half of a pair": ("a.nii", nifti_bytes(VOXELS, magic=b"ni1"), {}, "half of a NIfTI pair", "one .nii file"),
    "claims 32767³": ("a.nii.gz", gzip.compress(nifti_bytes(VOXELS, **FLAT)), {}, "declares 35181150961663 voxels, the limit is", "larger max_voxels"),
    "NRRD claims 32767³": ("a.nrrd", nrrd_bytes(VOXELS, sizes=HUGE), {}, "declares 35181150961663 voxels", "larger max_voxels"),
    "MHA claims 32767³": ("a.mha", meta_bytes(VOXELS, DimSize=HUGE), {}, "declares 35181150961663 voxels", "larger max_voxels"),
    "npy claims 32767³": ("a.npy", npy_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 32767, 32767, 32767), }".ljust(117) + b"\n"),
                          {}, "declares 35181150961663 voxels", "larger max_voxels"),
    "claims more numbers than Python prints": ("a.mha", meta_bytes(VOXELS, DimSize="9" * 5000 + " 8 7"), {}, "DimSize is not 3 numbers", "Repair the header"),
    "zero dimension": ("a.nii", nifti_bytes(VOXELS, dim=[3, 9, 0, 7, 1, 1, 1, 1]), {}, r"shape \(9, 0, 7\)", "Repair the header"),
    "negative dimension": ("a.nii", nifti_bytes(VOXELS, dim=[3, 9, -8, 7, 1, 1, 1, 1]), {}, r"shape \(9, -8, 7\)", "Repair the header"),
    "zero dimension, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, sizes="9 0 7"), {}, r"shape \(9, 0, 7\)", "Repair the header"),
    "negative dimension, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, sizes="9 -8 7"), {}, r"shape \(9, -8, 7\)", "Repair the header"),
    "zero dimension, .mha": ("a.mha", meta_bytes(VOXELS, DimSize="0 8 7"), {}, r"shape \(0, 8, 7\)", "Repair the header"),
    "negative dimension, .mha": ("a.mha", meta_bytes(VOXELS, DimSize="-9 8 7"), {}, r"shape \(-9, 8, 7\)", "Repair the header"),
    "zero dimension, npy": ("a.npy", npy(np.zeros((1, 0, 4, 5))), {}, r"shape \(1, 0, 4, 5\)", "Repair the header"),
    "gzip bomb": ("a.nii.gz", gzip.compress(nifti_bytes(VOXELS) + bytes(2**25)), {}, "far more bytes than its header declares", "do not use"),
    "gzip bomb, NRRD": ("a.nrrd", nrrd_bytes(np.zeros((256, 256, 256), np.int16), sizes="9 8 7"), {}, "far more bytes", "do not use"),
    "zlib bomb, .mha": ("a.mha", meta_bytes(np.zeros((256, 256, 256), np.int16), True, DimSize="9 8 7"), {}, "far more bytes", "do not use"),
    "bytes after an npy": ("a.npy", npy(VOXELS[None]) + b"more", {}, "far more bytes", "do not use"),
    "two volumes": ("a.nii", nifti_bytes(PAIR), {}, r"shape \(9, 8, 7, 2\): 2 volumes", f"{CHOOSE} frame=0 to 1"),
    "two volumes, the third wanted": ("a.nii", nifti_bytes(PAIR), {"frame": 2}, "2 volumes", f"{CHOOSE} frame=0 to 1"),
    "two volumes, NRRD": ("a.nrrd", nrrd_bytes(PAIR, space_directions="(1,0,0) (0,1,0) (0,0,3) none"),
                          {}, r"shape \(9, 8, 7, 2\): 2 volumes", f"{CHOOSE} frame=0 to 1"),
    "two volumes, .mha": ("a.mha", meta_bytes(PAIR, TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", Offset="0 0 0 0", ElementSpacing="1 1 1 1"),
                          {}, "2 volumes", f"{CHOOSE} frame=0 to 1"),
    "two volumes on a fifth axis": ("a.nii", nifti_bytes(PAIR[..., None, :]), {}, "2 volumes", f"{CHOOSE} frame=0 to 1"),
    "five axes": ("a.nii", nifti_bytes(np.stack([PAIR, PAIR], -1)), {}, "not three axes", "Give one volume"),
    "a second volume of one": ("a.nii", nifti_bytes(VOXELS), {"frame": 1}, "holds one volume, and frame=1", "Leave frame out"),
    "a single slice": ("a.nii", nifti_bytes(VOXELS[..., :1]), {}, "a single slice", "at least two slices"),
    "a single slice, NRRD": ("a.nrrd", nrrd_bytes(VOXELS[..., :1]), {}, "a single slice", "at least two slices"),
    "a single slice, .mha": ("a.mha", meta_bytes(VOXELS[..., :1]), {}, "a single slice", "at least two slices"),
    "a single slice, npy": ("a.npy", npy(VOXELS[None, :1]), {}, "a single slice", "at least two slices"),
    "furlongs, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, space_units='"furlong" "furlong" "furlong"'), {}, "a unit that is not known", "in millimetres"),
    "a spacing of zero, npy": ("a.npy", npy(VOXELS), {"axis_order": "RAS", "spacing": (1, 0, 1)}, "is given the spacing", "three lengths in mm"),
    "half of a pair, alone": ("a.img", nifti_bytes(VOXELS), {}, "no .hdr beside it", "Copy both files"),
    "bytes beyond the limit": ("a.nii", nifti_bytes(VOXELS.astype(float)), {"max_voxels": 504},
                               "504 voxels of 8 bytes, the limit is 2016 bytes", "larger max_voxels"),
    "two axes": ("a.mha", meta_bytes(VOXELS[0], TransformMatrix="1 0 0 1", Offset="0 0", ElementSpacing="1 1"), {}, "not three axes", "Give one volume"),
    "RGB": ("a.nii", nifti_bytes(VOXELS, datatype=128, bitpix=24), {}, "colour or complex", "one real number a voxel"),
    "RGBA": ("a.nii", nifti_bytes(VOXELS, datatype=2304, bitpix=32), {}, "colour or complex", "one real number a voxel"),
    "complex": ("a.nii", nifti_bytes(VOXELS, datatype=32, bitpix=64), {}, "colour or complex", "one real number a voxel"),
    "RGB, NRRD": ("a.nrrd", nrrd_bytes(np.stack([VOXELS] * 3), space_directions="none (1,0,0) (0,1,0) (0,0,3)", kinds="RGB-color domain domain domain"),
                  {}, "colours or vectors", "one volume of real numbers"),
    "RGB, .mha": ("a.mha", meta_bytes(VOXELS, ElementNumberOfChannels=3), {}, "colours or vectors", "one volume of real numbers"),
    "complex, npy": ("a.npy", npy(VOXELS[None] * 1j), {}, "complex", "one real number a voxel"),
    "NaN": ("a.nii", nifti_bytes(with_nan()), {}, "3 of 504 voxels are NaN or infinite", "non_finite='replace'"),
    "all NaN": ("a.nii", nifti_bytes(VOXELS * np.float32("nan")), {"non_finite": "replace"}, "504 of 504 voxels", "Repair the file"),
    "beyond float32": ("a.npy", npy(np.full((1, 2, 2, 2), 1e300)), {}, "8 of 8 voxels", "Repair the file"),
    "affine zero": ("a.nii", nifti_bytes(VOXELS, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4), {}, "spacing .* is impossible", "Repair the header"),
    "affine singular": ("a.nii", nifti_bytes(VOXELS, srow_x=[0] * 4), {}, "spacing .* is impossible", "Repair the header"),
    "affine NaN": ("a.nii", nifti_bytes(VOXELS, srow_x=[np.nan, 0, 0, 0]), {}, "NaN or infinite", "Repair the header"),
    "affine sheared": ("a.nii", nifti_bytes(VOXELS, srow_x=[.8, .4, 0, 0]), {}, "sheared", "Resample"),
    "affine of two equal axes": ("a.nii", nifti_bytes(VOXELS, srow_x=[1, 1, 0, 0], srow_y=[0, 0, 0, 0]), {}, "sheared", "Resample"),
    "sheared, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, space_directions="(1,0,0) (0.4,1,0) (0,0,3)"), {}, "sheared", "Resample"),
    "sheared, .mha": ("a.mha", meta_bytes(VOXELS, TransformMatrix="1 0 0 0.4 1 0 0 0 1"), {}, "sheared", "Resample"),
    "matrix zero, .mha": ("a.mha", meta_bytes(VOXELS, TransformMatrix="0 0 0 0 0 0 0 0 0"), {}, "impossible", "Repair the header"),
    "offset NaN, .mha": ("a.mha", meta_bytes(VOXELS, Offset="nan 0 0"), {}, "NaN or infinite", "Repair the header"),
    "qform and sform both 0": ("a.nii", nifti_bytes(VOXELS, sform_code=0, qform_code=0), {}, "no orientation", "axis_order, such as 'RAS'"),
    "no space, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, space=None), {}, "no usable space", "axis_order, such as 'LPS'"),
    "no matrix, .mha": ("a.mha", meta_bytes(VOXELS, TransformMatrix=None), {}, "no orientation", "axis_order; 'LPS'"),
    "no spacing, .mha": ("a.mha", meta_bytes(VOXELS, ElementSpacing=None), {}, "no spacing", "axis_order; 'LPS'"),
    "an orientation that is none": ("a.nii", nifti_bytes(VOXELS), {"axis_order": "RLS"}, "is no orientation", "three letters such as RAS"),
    "voxels inside the header": ("a.nii", nifti_bytes(VOXELS, vox_offset=100), {}, "places its voxels impossibly", "one .nii file"),
    "voxels far behind": ("a.nii", nifti_bytes(VOXELS, vox_offset=2**30), {}, "places its voxels impossibly", "one .nii file"),
    "unknown type": ("a.nii", nifti_bytes(VOXELS, datatype=999), {}, "damaged NIfTI header", EXPORT),
    "unknown type, .mha": ("a.mha", meta_bytes(VOXELS, ElementType="MET_OTHER"), {}, "unknown type", "real numbers"),
    "no byte order, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, endian=None), {}, "byte order", EXPORT),
    "text voxels, NRRD": ("a.nrrd", nrrd_bytes(VOXELS, "ascii"), {}, "encoding", "raw, with gzip"),
    "text voxels, .mha": ("a.mha", meta_bytes(VOXELS, BinaryData="False"), {}, "as text", "binary voxels"),
    "a slope, .mha": ("a.mha", meta_bytes(VOXELS, ElementToIntensityFunctionSlope=2), {}, "intensity function", "as they are meant"),
    "no image, .mha": ("a.mha", meta_bytes(VOXELS, ObjectType="Tube"), {}, "holds no image", "real numbers"),
    "skips a gigabyte, .mha": ("a.mha", meta_bytes(VOXELS, HeaderSize=2**30), {}, "skips 1073741824 bytes", "without a skip"),
    "data file elsewhere, .mhd": ("a.mhd", meta_bytes(VOXELS, data="../../secret.raw"), {}, "outside its own folder", "into one folder"),
    "data file absolute, .mhd": ("a.mhd", meta_bytes(VOXELS, data="/etc/hostname"), {}, "outside its own folder", "into one folder"),
    "data file missing, .mhd": ("a.mhd", meta_bytes(VOXELS, data="other.raw"), {}, "not beside it", "Copy both files"),
    "data files many, .mhd": ("a.mhd", meta_bytes(VOXELS, data="LIST"), {}, "several data files", "one .mha file"),
    "data file elsewhere, .nhdr": ("a.nhdr", nrrd_bytes(VOXELS, data_file="../secret.raw"), {}, "outside its own folder", "into one folder"),
    "data file missing, .nhdr": ("a.nhdr", nrrd_bytes(VOXELS, data_file="other.raw"), {}, "not beside it", "Copy both files"),
    "data files many, .nhdr": ("a.nhdr", nrrd_bytes(VOXELS, data_file="s%03d.raw 1 7 1"), {}, "several data files", "one .nrrd file"),
    "objects, npy": ("a.npy", npy(np.array([{"a": 1}, None], dtype=object)), {"axis_order": "DHW"}, "objects", "pickles are never loaded"),
    "huge header, npy": ("a.npy", b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{", {}, "no readable .npy header", "numpy.save"),
    "long header, npy": ("a.npy", npy_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 2, 2, 2), }".ljust(60000) + b"\n") + bytes(64),
                         {}, "no readable .npy header", "numpy.save"),
    "truncated npy": ("a.npy", npy(VOXELS[None])[:-1], {}, "truncated: 1007 of 1008 bytes", COPY),
    "no axis order, npy": ("a.npy", npy(VOXELS), {}, r"shape \(9, 8, 7\) and no declared axis order", "Pass axis_order"),
    "a wrong axis order, npy": ("a.npy", npy(VOXELS), {"axis_order": "DHX"}, "does not name the axes", "Name D, H and W once each"),
    "channels, npy": ("a.npy", npy(np.stack([VOXELS, VOXELS])), {"axis_order": "CDHW"}, "2 channels", "Give one channel"),
    "damaged npz": ("a.npz", b"PK\x03\x04" + bytes(100), {}, "no readable .npz", "numpy.savez"),
    "no file": ("absent/a.nii", None, {}, "does not exist", "Check the path"),
    "no format": ("a.xyz", b"voxels", {}, "format that is not read", "Give .nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd"),
    "a small limit": ("a.nii", nifti_bytes(VOXELS), {"max_voxels": 503}, "504 voxels, the limit is 503", "larger max_voxels"),
}


@pytest.mark.parametrize("fault", VOLUMES)
def test_volume_fault(tmp_path, fault):
    name, content, options, reason, remedy = VOLUMES[fault]
    if content is not None: (tmp_path/name).write_bytes(content)
    with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(tmp_path/name, **options)
    assert str(tmp_path/name) in e.value.what and remedy in e.value.remedy
    assert e.value.what in str(e.value) and e.value.why in str(e.value) and e.value.remedy in str(e.value)


def test_other_files_are_untouched(tmp_path):
    "A damaged file changes nothing for its neighbour."
    good = save_nifti(tmp_path/"good.nii.gz", *patient(VOXELS, "RAS"))
    before = read_volume(good)
    (tmp_path/"bad.nii.gz").write_bytes(PACKED[:-8])
    with pytest.raises(MedVLM3DError): read_volume(tmp_path/"bad.nii.gz")
    assert read_volume(good).source_hash == before.source_hash


def folder_of(folder, *pixels, names=None):
    folder.mkdir()
    for k, x in enumerate(pixels): Image.fromarray(np.asarray(x, np.uint8)).save(folder/(names[k] if names else f"{k}.png"))
    return folder


GREY = np.random.default_rng(1).integers(0, 255, (8, 9))
PICTURES = {
    "colour": (dict(pixels=[GREY, np.stack([GREY, GREY, 255 - GREY], -1)]), "1.png", "in colour", "Give grey slices"),
    "two sizes": (dict(pixels=[GREY, GREY[1:]]), "1.png", "7×9, the first slice 8×9", "slices of one size"),
    "no number": (dict(pixels=[GREY, GREY], names=["1.png", "last.png"]), "last.png", "has no number in its name", "Name the slices 1.png, 2.png"),
    "a number twice": (dict(pixels=[GREY, GREY], names=["1.png", "01.png"]), "", "same number", "one file per slice"),
    "an empty folder": (dict(pixels=[]), "", "no DICOM images", "Give the folder or zip of an image series"),
}


@pytest.mark.parametrize("fault", PICTURES)
def test_picture_fault(tmp_path, fault):
    made, file, reason, remedy = PICTURES[fault]
    folder = folder_of(tmp_path/"slices", *made["pixels"], names=made.get("names"))
    with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(folder)
    assert str(folder/file) in e.value.what and remedy in e.value.remedy


def test_pictures_beside_dicom(tmp_path):
    "A preview among the slices is left out with a note; as many pictures as slices are refused."
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    plain = read_volume(series)
    Image.fromarray(GREY.astype(np.uint8)).save(series/"preview1.png")
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, plain.array)
    assert "1 files that are no DICOM images left out" in volume.warnings
    for k in range(7): Image.fromarray(GREY.astype(np.uint8)).save(series/f"{k}.png")
    with pytest.raises(MedVLM3DError, match="s: holds pictures beside DICOM files. Give a folder with files of one kind"): read_volume(series)


def test_fewer_kept_slices_than_the_scale(tmp_path):
    "A scan of three slices, one of them kept, cannot be halved along depth: the error says how to keep more."
    from medvlm3d.method.injection import downsample
    from medvlm3d.method.selection import select_slices
    x = Preprocess(3, 8, 8)(read_volume(save_nifti(tmp_path/"a.nii", *patient(VOXELS, "RAS"))))
    kept, _ = select_slices(x.reshape(3, 16, 4), rho=34)
    assert len(kept) == 1
    with pytest.raises(MedVLM3DError, match="1 slices cannot be reduced by 2. Keep more slices .raise rho. or lower the scale"):
        downsample(kept.reshape(1, 4, 4, 4), 2)


def test_truncated_and_oversized_pictures(tmp_path):
    folder = folder_of(tmp_path/"slices", GREY, GREY)
    cut(folder/"1.png", 60)
    with pytest.raises(MedVLM3DError, match="1.png: is no readable picture.*Copy or export"): read_volume(folder)
    for k in range(8): (folder/f"{k}.png").write_bytes(png(12_000))
    with pytest.raises(MedVLM3DError, match="slices: declares 1152000000 voxels, the limit is"): read_volume(folder)


# --- volumes: what is read, and recorded ------------------------------------------------------------------------------

NOTED = {
    "qform is not sform": ("a.nii", nifti_bytes(VOXELS, qform_code=1, qoffset_x=50), {}, "qform and sform differ: the sform is used"),
    "qform is mirrored": ("a.nii", nifti_bytes(VOXELS, qform_code=1, pixdim=[-1, .8, .8, 3, 1, 1, 1, 1]), {},
                          "qform and sform differ in the sides of the patient, RAI against RAS: the sform is used"),
    "an orientation told": ("a.nii", nifti_bytes(VOXELS, sform_code=0, qform_code=0), {"axis_order": "LAS"}, "orientation LAS as told"),
    "an orientation told, .mha": ("a.mha", meta_bytes(VOXELS, TransformMatrix=None, ElementSpacing=None),
                                  {"axis_order": "LPS"}, "spacing unknown: 1 mm assumed"),
    "letters against the matrix": ("a.mha", meta_bytes(VOXELS, AnatomicalOrientation="SAR"), {},
                                   "AnatomicalOrientation contradicts the matrix: the matrix is used"),
    "byte order not stated": ("a.mha", meta_bytes(VOXELS, BinaryDataByteOrderMSB=None), {}, "byte order not stated: little-endian assumed"),
    "NaN replaced": ("a.nii", nifti_bytes(with_nan()), {"non_finite": "replace"},
                     "3 of 504 voxels were NaN or infinite: replaced by the smallest finite value"),
    "constant": ("a.nii", nifti_bytes(np.full_like(VOXELS, 7)), {}, "every voxel has the same value"),
    "HU by its values": ("a.nii", nifti_bytes(VOXELS - 1024), {}, "taken for CT in HU because of its values"),
    "no geometry": ("a.npy", npy(VOXELS[None]), {}, "no geometry in the file: orientation and spacing are assumed"),
    "letters without millimetres": ("a.npy", npy(VOXELS), {"axis_order": "RAS"}, "spacing unknown: 1 mm assumed"),
}


@pytest.mark.parametrize("fault", NOTED)
def test_what_is_assumed_is_recorded(tmp_path, fault):
    name, content, options, note = NOTED[fault]
    (tmp_path/name).write_bytes(content)
    volume = read_volume(tmp_path/name, **options)
    assert note in volume.warnings and np.isfinite(volume.array).all()
    assert note in Preprocess(4, 6, 5).describe(volume)["warnings"]


def test_a_constant_volume_becomes_zeros_with_a_warning(tmp_path):
    (tmp_path/"a.nii").write_bytes(nifti_bytes(np.full_like(VOXELS, 7)))
    with pytest.warns(UserWarning, match="constant: it becomes zeros"): assert not Preprocess(4, 6, 5)(read_volume(tmp_path/"a.nii")).any()


def test_a_fourth_axis_of_one_is_dropped_and_a_longer_one_chosen(tmp_path):
    four = dict(TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", Offset="0 0 0 0", ElementSpacing="1 1 3 1")
    for name, write in {"a.nii": nifti_bytes, "a.mha": lambda x: meta_bytes(x, **(four if x.ndim == 4 else {})),
                        "a.nrrd": lambda x: nrrd_bytes(x, space_directions="(1,0,0) (0,1,0) (0,0,3)" + " none" * (x.ndim == 4))}.items():
        found = []
        for x, options in ((VOXELS, {}), (VOXELS[..., None], {}), (PAIR, {"frame": 0}), (PAIR, {"frame": 1})):
            (tmp_path/name).write_bytes(write(x))
            found.append(read_volume(tmp_path/name, **options).array)
        for array, expected in zip(found[1:], (found[0], found[0], found[0] + 1)): np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("suffix", [".nii.gz", ".npy", "pictures"])
def test_interleaved_slices_are_noticed(tmp_path, suffix):
    "A smooth volume whose even slices come first; in order, nothing is suspected."
    z, y, x = np.meshgrid(np.linspace(0, 3, 16), np.linspace(0, 1, 12), np.linspace(0, 1, 12), indexing="ij")
    smooth = (100 + 100 * np.sin(z + 2 * x * y)).astype(np.uint8)
    notes = []
    for k, array in enumerate((smooth, smooth[np.r_[:16:2, 1:16:2]])):
        if suffix == "pictures": path = folder_of(tmp_path/f"axial{k}", *array)
        elif suffix == ".npy": np.save(path := tmp_path/f"{k}.npy", array[None])
        else: path = save_nifti(tmp_path/f"{k}.nii.gz", array, np.diag([-5., -1, 1, 1])[[2, 1, 0, 3]])
        notes.append("the slices look interleaved: check their order" in read_volume(path).warnings)
    assert notes == [False, True]


# --- DICOM: name → (changes, reason, remedy) -------------------------------------------------------------------------

def at(*z): return lambda i, ds: [7., -11., 30. + 4 * z[i]]


def packed(syntax, data):
    def pixels(i, ds):
        ds.file_meta.TransferSyntaxUID = syntax
        return encapsulate([data])
    return pixels


def turned(i, ds): return [1, 0, 0, 0, 1, 0] if i > 2 else [0, 1, 0, 0, 0, -1]


DICOM = {
    "a missing slice": (dict(ImagePositionPatient=at(0, 1, 2, 4, 5, 6, 7)), "misses slices: 1 .steps of 4 mm, a gap after slice 2", AGAIN),
    "three missing slices": (dict(ImagePositionPatient=at(0, 1, 2, 4, 5, 6, 9)), "misses slices: 3", AGAIN),
    "uneven spacing": (dict(ImagePositionPatient=at(0, 1, 2, 3.3, 4, 5, 6)), "uneven slices .2.8 to 5.2 mm apart", "Resample it to even spacing"),
    "duplicate positions": (dict(ImagePositionPatient=at(0, 1, 2, 2, 3, 4, 5)), "slices at the position of another: 1", "as its own series"),
    "every position twice": (dict(ImagePositionPatient=at(0, 0, 1, 1, 2, 2, 2)), "slices at the position of another: 4", "as its own series"),
    "only localisers": (dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "only localisers", "Give the folder or zip of an image series"),
    "two orientations": (dict(ImageOrientationPatient=turned), "holds 2 series .0: CT, 4 images of 8×9, axial, .*1: CT, 3 images of 8×9, sagittal", CHOOSE),
    "an impossible orientation": (dict(ImageOrientationPatient=[1, 0, 0, 0, 0, 0]), "impossible position or orientation", "Export the one image series again"),
    "gantry tilt": (dict(ImagePositionPatient=lambda i, ds: [7., -11. + 1.2 * i, 30. + 4 * i]),
                    "sheared .*tilted gantry", "Resample the scan to a rectangular grid"),
    "two pixel spacings": (dict(PixelSpacing=lambda i, ds: [1, 1.5] if i > 2 else [1, 1]), "4×1×1.5 mm.*4×1×1 mm", CHOOSE),
    "no position": (dict(ImagePositionPatient=None), "lacks the position", "Export the original series"),
    "no orientation": (dict(ImageOrientationPatient=None), "lacks the position, orientation", "Export the original series"),
    "no pixel spacing": (dict(PixelSpacing=None), "lacks the position, orientation or pixel spacing", "Export the original series"),
    "rescale in some slices": (dict(RescaleSlope=lambda i, ds: "2" if i else None), "rescale tags in some slices only", AGAIN),
    "multi-frame without groups": (dict(NumberOfFrames=4), "multi-frame file that does not say where its frames lie", "classic or enhanced"),
    "colour": (dict(SamplesPerPixel=3), "colour images", "grey images"),
    "no decoder": (dict(PixelData=packed(MPEG2MPML, bytes(64))),
                   "compressed as MPEG2 Main Profile / Main Level, which nothing installed can decode", "Install pylibjpeg"),
    "damaged JPEG 2000": (dict(PixelData=packed(JPEG2000Lossless, b"\xff\x4f\xff\x51" + bytes(60))),
                          "truncated or damaged pixels", "Copy or export the file again"),
    "a header of 65535×65535": (dict(Rows=65535, Columns=65535), "declares 30063853575 voxels, the limit is", "larger max_voxels"),
    "fewer pixels than declared": (dict(Rows=100), "truncated or damaged pixels", "Copy or export the file again"),
}


@pytest.mark.parametrize("fault", DICOM)
def test_dicom_fault(tmp_path, fault):
    changes, reason, remedy = DICOM[fault]
    series = save_dicom(tmp_path/"series", STACK, AFFINE, **changes)
    with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(series)
    assert str(series) in e.value.what and remedy in e.value.remedy and "Zaphod" not in str(e.value)


def test_no_decoder_installed(tmp_path, monkeypatch):
    "JPEG-LS where none of its plug-ins is there."
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLSLosslessDecoder, "_available", {})
    series = save_dicom(tmp_path/"s", STACK, AFFINE, PixelData=packed(JPEGLSLossless, bytes(64)))
    with pytest.raises(MedVLM3DError, match="s: is compressed as JPEG-LS Lossless Image Compression, which nothing installed can decode.*Install pylibjpeg"):
        read_volume(series)


def test_an_unknown_transfer_syntax(tmp_path):
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    for p in series.iterdir(): p.write_bytes(p.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0", 1))
    with pytest.raises(MedVLM3DError, match="s: has an unknown transfer syntax. Export it uncompressed") as e: read_volume(series)
    assert "9.9.9" not in str(e.value)


@pytest.mark.parametrize("keep, reason", [(-60, "truncated or damaged pixels"), (-1, "truncated or damaged pixels"),
                                          (900, "truncated or damaged pixels"), (600, "damaged DICOM header .it ends before its size"),
                                          (400, "damaged DICOM header .it ends before its size"), (200, "damaged DICOM header"),
                                          (100, "damaged DICOM header .it does not begin"), (0, "damaged DICOM header .it does not begin")])
def test_truncated_dicom(tmp_path, keep, reason):
    "One file of the series cut short, in its pixels or in its header: named, with its remedy; as a folder and in a zip."
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    victim = cut(series/"1-0.dcm", keep)
    with zipfile.ZipFile(tmp_path/"s.zip", "w") as z:
        for p in series.iterdir(): z.write(p, p.name)
    for path in (series, tmp_path/"s.zip"):
        with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(path)
        assert f"{path}/{victim.name}" in e.value.what and "Copy or export the file again" in e.value.remedy


def test_two_series_in_one_folder(tmp_path):
    save_dicom(save_dicom(tmp_path/"two", STACK, AFFINE), STACK[:4] + 1, AFFINE, series=2, Modality="MR")
    listed = "two: holds 2 series .0: CT, 7 images of 8×9, axial, 4×1×1.5 mm, number 1; 1: MR, 4 images of 8×9.*Choose one with series=0 to 1"
    with pytest.raises(MedVLM3DError, match=listed) as e:
        read_volume(tmp_path/"two")
    assert "1.2.826" not in str(e.value)
    assert [read_volume(tmp_path/"two", series=k).modality for k in (0, 1)] == ["CT", "MR"]
    with pytest.raises(MedVLM3DError, match="Choose one with series=0 to 1"): read_volume(tmp_path/"two", series=7)


def test_what_dicom_leaves_out_is_recorded(tmp_path):
    "A localiser beside the series, a readme, a slice copied twice, missing rescale tags, MONOCHROME1: read, and noted."
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    plain = read_volume(series)
    save_dicom(series, STACK[:1], AFFINE, series=9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (series/"readme.txt").write_text("no slice")
    shutil.copy(series/"1-0.dcm", series/"again.dcm")
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, plain.array)
    assert volume.source_hash == plain.source_hash
    assert volume.warnings == ("1 localiser images left out", "1 files that are no DICOM images left out", "1 exact copies of slices dropped")
    bare = read_volume(save_dicom(tmp_path/"bare", STACK, AFFINE, RescaleSlope=None, RescaleIntercept=None))
    assert bare.intensity == "arbitrary" and "CT without rescale tags: the numbers are not HU" in bare.warnings
    np.testing.assert_array_equal(bare.array, STACK)
    dual = read_volume(save_dicom(tmp_path/"dual", STACK, AFFINE, RescaleType="MGML"))
    assert dual.intensity == "arbitrary" and "CT rescaled to another quantity: the numbers are not HU" in dual.warnings


def test_monochrome1(tmp_path):
    "HU stay HU; relative numbers are turned round, so that bright is bright; both are noted."
    plain = read_volume(save_dicom(tmp_path/"plain", STACK, AFFINE))
    ct = read_volume(save_dicom(tmp_path/"ct", STACK, AFFINE, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(ct.array, plain.array)
    mr = read_volume(save_dicom(tmp_path/"mr", STACK, AFFINE, PhotometricInterpretation="MONOCHROME1", Modality="MR", RescaleSlope=None))
    np.testing.assert_array_equal(mr.array, -1. - STACK)
    unsigned = read_volume(save_dicom(tmp_path/"cr", STACK, AFFINE, PhotometricInterpretation="MONOCHROME1",
                                      Modality="MR", RescaleSlope=None, PixelRepresentation=0, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(unsigned.array, 4095. - STACK)
    assert all(any(w.startswith("MONOCHROME1: ") for w in volume.warnings) for volume in (ct, mr, unsigned))


ENHANCED = {
    "frames without groups": (dict(NumberOfFrames=6), "damaged DICOM header", "Copy or export"),
    "a missing frame": (dict(order=[0, 1, 2, 4, 5, 6]), "misses slices: 1", AGAIN),
    "fewer pixels than frames": (dict(PixelData=bytes(100)), "truncated or damaged pixels", "Copy or export"),
    "no orientation": (dict(SharedFunctionalGroupsSequence=[]), "lacks the position, orientation", "Export the original series"),
    "rows beyond reason": (dict(Rows=65535, Columns=65535), "voxels, the limit is", "larger max_voxels"),
}


@pytest.mark.parametrize("fault", ENHANCED)
def test_enhanced_fault(tmp_path, fault):
    changes, reason, remedy = ENHANCED[fault]
    path = save_enhanced(tmp_path/"e.dcm", STACK, AFFINE, **changes)
    with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(path)
    assert str(path) in e.value.what and remedy in e.value.remedy and "Zaphod" not in str(e.value)


ZIPS = {
    "no zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(50)), "no readable zip", "Zip the series again"),
    "an empty zip": (lambda p: zipfile.ZipFile(p, "w").close(), "no DICOM images", "Give the folder or zip"),
}


@pytest.mark.parametrize("fault", ZIPS)
def test_zip_fault(tmp_path, fault):
    make, reason, remedy = ZIPS[fault]
    make(tmp_path/"s.zip")
    with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(tmp_path/"s.zip")
    assert str(tmp_path/"s.zip") in e.value.what and remedy in e.value.remedy


def test_encrypted_and_damaged_zips(tmp_path):
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    with zipfile.ZipFile(tmp_path/"s.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for p in series.iterdir(): z.write(p, p.name)
    good = (tmp_path/"s.zip").read_bytes()
    marked = good.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    assert marked != good
    (tmp_path/"s.zip").write_bytes(marked)
    with pytest.raises(MedVLM3DError, match="s.zip: is encrypted. Zip the series without a password"): read_volume(tmp_path/"s.zip")
    (tmp_path/"s.zip").write_bytes(flipped(good, 400))
    with pytest.raises(MedVLM3DError, match="s.zip/.*dcm: is damaged, or cannot be read.*zip the series again"): read_volume(tmp_path/"s.zip")


def test_more_files_than_the_limit(tmp_path, monkeypatch):
    "A folder and a zip with one file more than is allowed; at the limit both are read."
    series = save_dicom(tmp_path/"s", STACK, AFFINE)
    with zipfile.ZipFile(tmp_path/"s.zip", "w") as z:
        for p in series.iterdir(): z.write(p, p.name)
    for path in (series, tmp_path/"s.zip"):
        monkeypatch.setattr("medvlm3d.scans.guard.MAX_FILES", len(STACK) - 1)
        with pytest.raises(MedVLM3DError, match="holds 7 files, above the limit of 6. Give the one series") as e: read_volume(path)
        assert str(path) in e.value.what
        monkeypatch.setattr("medvlm3d.scans.guard.MAX_FILES", len(STACK))
        assert read_volume(path).shape == STACK.shape


# --- bounded memory ---------------------------------------------------------------------------------------------------

def hostile(folder):
    "Files that claim terabytes, or unpack to gigabytes: path → reason."
    bomb = gzip.compress(bytes(2**26), 1)
    voxels = np.zeros((8, 8, 8), np.int16)
    def save(name, content): (folder/name).write_bytes(content); return folder/name
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = b"".join(deflated.compress(bytes(2**24)) for _ in range(24)) + deflated.flush()
    first, second = sorted(save_dicom(folder/"two", STACK[:2], AFFINE).iterdir())
    with zipfile.ZipFile(folder/"bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.write(first, "1.dcm")
        with z.open("2.dcm", "w", force_zip64=True) as f:
            f.write(second.read_bytes())
            for _ in range(24): f.write(bytes(2**24))
    with zipfile.ZipFile(folder/"bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("a.npy", "w", force_zip64=True) as f:
            f.write(npy(voxels[None]))
            for _ in range(24): f.write(bytes(2**24))
    def deflate(i, ds):
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        return ds.PixelData
    whole = save_dicom(folder/"deflated", STACK[:1], AFFINE, PixelData=deflate)/"1-0.dcm"
    whole.write_bytes(whole.read_bytes()[:132 + 12 + pydicom.dcmread(whole).file_meta.FileMetaInformationGroupLength] + stream)
    pictures = folder/"pictures"
    pictures.mkdir()
    for k in range(8): (pictures/f"{k}.png").write_bytes(png(13_000))
    return {
        save("claim.nii", nifti_bytes(voxels, **FLAT)): "limit", save("claim.nii.gz", gzip.compress(nifti_bytes(voxels, **FLAT))): "limit",
        save("claim.nrrd", nrrd_bytes(voxels, sizes=HUGE)): "limit", save("claim.mha", meta_bytes(voxels, True, DimSize=HUGE)): "limit",
        save("claim.npy", npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 800, 800, 800), }".ljust(117) + b"\n")): "truncated",
        save("claim.nhdr", nrrd_bytes(voxels, "raw", sizes="800 800 800", data_file="claim.npy")): "truncated",
        save("bomb.nii.gz", gzip.compress(nifti_bytes(voxels)) + bomb * 24): "far more bytes",
        save("bomb.nrrd", nrrd_bytes(voxels) + bomb * 24): "far more bytes",
        save("bomb.mha", meta_bytes(voxels, True)[:-len(zlib.compress(voxels.tobytes()))] + zlib.compress(bytes(2**26), 1)): "far more bytes",
        folder/"bomb.npz": "far more bytes", folder/"bomb.zip": "far more bytes than its header declares",
        whole.parent: "damaged DICOM header", pictures: "limit",
        save_enhanced(folder/"frames.dcm", STACK, AFFINE, Rows=20_000, Columns=20_000): "limit",
    }


def test_nothing_hostile_allocates(tmp_path):
    "In one process, over all hostile files: what Python and NumPy hold at most, beyond a header's 64 MB."
    for path, reason in hostile(tmp_path).items():
        tracemalloc.start()
        with pytest.raises(MedVLM3DError, match=reason) as e: read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(path) in e.value.what
        assert peak < (2**28 if path.suffix == ".zip" else 2**26), (path.name, peak / 2**20)


MEASURE = """
import resource, sys
from medvlm3d.scans.readers import read_volume
import nibabel, nrrd, pydicom, PIL.Image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
before = peak()
for path in sys.argv[1:]:
    try: read_volume(path); print('read', path)
    except ValueError as e: print(type(e).__name__)
print(int((peak() - before) / 2**20))
"""


def test_the_process_stays_small(tmp_path):
    """The resident memory of a fresh process over all hostile files grows by less than 300 MB;
    together they claim hundreds of terabytes and unpack to gigabytes."""
    paths = list(hostile(tmp_path))
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True)
    *said, megabytes = done.stdout.split()
    assert said == ["MedVLM3DError"] * len(paths), done.stdout + done.stderr[-2000:]
    assert int(megabytes) < 300
