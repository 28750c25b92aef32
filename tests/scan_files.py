"""Writers of small scans for the tests, in every format; DICOM files carry a planted patient."""
import gzip
import zlib
from itertools import permutations, product

import nibabel as nib
import nrrd
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvlm3d.scans.volume import codes_affine

ORDERS = product(permutations((0, 1, 2)), product(("RAS", "LPI"), repeat=3))
ALL_CODES = ["".join(letters[axis] for letters, axis in zip(signs, order)) for order, signs in ORDERS]
NAME, NUMBER, BIRTH, ROOT = "Zaphod^Planted", "PID-0815-42", "19420101", "1.2.826"
SECRETS = (NAME, "Zaphod", "Planted", NUMBER, BIRTH, ROOT)
LPS = np.diag([-1., -1, 1, 1])


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


def nifti_bytes(voxels, affine=None, **fields):
    "A NIfTI file with header fields set without any check."
    header = nib.Nifti1Image(voxels, np.diag([.8, .8, 3., 1]) if affine is None else affine).header
    for name, value in {"vox_offset": 352, "magic": b"n+1", **fields}.items(): header[name] = value
    return header.binaryblock + bytes(4) + voxels.tobytes(order="F")


def save_nrrd(path, array, affine, space="left-posterior-superior", sign=(-1, -1, 1), **options):
    m = np.diag([*sign, 1.]) @ affine
    nrrd.write(str(path), np.ascontiguousarray(array),
               {"space": space, "space directions": m[:3, :3].T, "space origin": m[:3, 3]}, **options)
    return path


def nrrd_bytes(voxels, encoding="gzip", **fields):
    "An NRRD file with header fields set, or left out (None), without any check."
    fields = {"type": "short", "dimension": voxels.ndim, "space": "LPS",
              "sizes": " ".join(map(str, voxels.shape)), "space directions": "(1,0,0) (0,1,0) (0,0,3)",
              "endian": "little", "encoding": encoding, **{k.replace("_", " "): v for k, v in fields.items()}}
    data = voxels.tobytes(order="F")
    return (
        ("NRRD0005\n" + "".join(f"{k}: {v}\n" for k, v in fields.items() if v is not None) + "\n").encode() +
        (gzip.compress(data) if encoding == "gzip" else data))


def meta_bytes(voxels, compressed=False, data="LOCAL", **fields):
    "A MetaImage header, with its voxels if they are LOCAL; fields are set, or left out (None), unchecked."
    fields = {
        "ObjectType": "Image", "NDims": voxels.ndim, "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": bool(compressed), "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0",
        "ElementSpacing": "1 1 3", "DimSize": " ".join(map(str, voxels.shape)), "ElementType": "MET_SHORT",
        **fields, "ElementDataFile": data
    }
    if compressed: fields = {"CompressedDataSize": len(voxel_bytes(voxels, True)), **fields}
    head = "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None).encode()
    return head + (voxel_bytes(voxels, compressed) if data == "LOCAL" else b"")


def voxel_bytes(voxels, compressed=False):
    data = voxels.tobytes(order="F")
    return zlib.compress(data) if compressed else data


def save_meta(path, array, affine, compressed=False):
    "An `.mha`, or an `.mhd` with its voxels beside it."
    def text(numbers): return " ".join(repr(float(x)) for x in np.ravel(numbers))
    m = LPS @ affine
    step = np.linalg.norm(m[:3, :3], axis=0)
    kind = {"int16": "MET_SHORT", "float32": "MET_FLOAT"}[array.dtype.name]
    data = "LOCAL" if path.suffix == ".mha" else f"{path.stem}.{'zraw' if compressed else 'raw'}"
    path.write_bytes(meta_bytes(array, compressed, data, TransformMatrix=text((m[:3, :3] / step).T),
                                ElementSpacing=text(step), Offset=text(m[:3, 3]), ElementType=kind))
    if data != "LOCAL": (path.parent/data).write_bytes(voxel_bytes(array, compressed))
    return path


def item(**values):
    "A pydicom data set."
    ds = Dataset()
    for name, value in values.items(): setattr(ds, name, value)
    return ds


def dicom(shape, series, uid, kind=CTImageStorage, **values):
    "A data set of 16-bit grey pixels with planted patient data."
    ds = item(SOPClassUID=kind, SOPInstanceUID=generate_uid(entropy_srcs=[str(series), str(uid)]),
              SeriesInstanceUID=generate_uid(entropy_srcs=[str(series)]), SeriesNumber=series, Modality="CT",
              PatientName=NAME, PatientID=NUMBER, PatientBirthDate=BIRTH,
              SeriesDescription=f"chest of {NAME}", Rows=shape[0], Columns=shape[1], SamplesPerPixel=1,
              PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
              PixelRepresentation=1, **values)
    ds.add_new(0x00090010, "LO", f"PRIVATE OF {NAME}"[:60])
    ds.add_new(0x00091001, "LO", NAME)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, kind
    return ds


def write(ds, path, changes=(), i=0):
    "Save a data set after `changes` (values, functions of slice and data set, or None to delete)."
    for name, value in dict(changes).items():
        value = value(i, ds) if callable(value) else value
        if value is None: delattr(ds, name)
        else: setattr(ds, name, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return path


def save_dicom(folder, array, affine, series=1, **changes):
    "An int16 array with its affine in RAS, one file per slice, scrambled; HU = 1.7·stored − 1024.3."
    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS @ affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    for i, pixels in enumerate(array):
        ds = dicom(pixels.shape, series, i, RescaleSlope="1.7", RescaleIntercept="-1024.3",
                   PixelSpacing=[float(step[1]),
                                 float(step[2])], PixelData=np.ascontiguousarray(pixels).tobytes(),
                   ImageOrientationPatient=[*(lps[:3, 2]/step[2]), *(lps[:3, 1]/step[1])],
                   ImagePositionPatient=[float(x) for x in (lps @ [i, 0, 0, 1])[:3]])
        write(ds, folder/f"{series}-{(5 * i) % len(array)}.dcm", changes, i)
    return folder


def save_enhanced(path, array, affine, phases=1, order=None, **changes):
    "The same as one enhanced CT file with `phases` volumes (the k-th is array + k), its frames scrambled."
    lps = LPS @ affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    places = [(t, i)
              for t in range(phases)
              for i in (order or np.random.default_rng(0).permutation(len(array)).tolist())]
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[float(step[1]), float(step[2])])],
        PixelValueTransformationSequence=[
            item(RescaleSlope="1.7", RescaleIntercept="-1024.3", RescaleType="HU")
        ], PlaneOrientationSequence=[
            item(ImageOrientationPatient=[*(lps[:3, 2]/step[2]), *(lps[:3, 1]/step[1])])
        ])
    own = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[float(x) for x in (lps @ [i, 0, 0, 1])[:3]])],
             FrameContentSequence=[item(StackID=NAME[:16], TemporalPositionIndex=t + 1)]) for t, i in places
    ]
    ds = dicom(array.shape[1:], 7, "enhanced", EnhancedCTImageStorage, NumberOfFrames=len(places),
               SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own,
               PixelData=np.stack([array[i] + t for t, i in places]).astype(np.int16).tobytes())
    return write(ds, path, changes)


DRUG = dict(RadionuclideTotalDose=370e6, RadionuclideHalfLife=6586.2, RadiopharmaceuticalStartTime="090000")
PET = dict(Modality="PT", Units="BQML", CorrectedImage=["DECY",
                                                        "ATTN"], DecayCorrection="START", PatientWeight=70,
           SeriesDate="20260102", SeriesTime="100000", AcquisitionDate="20260102", AcquisitionTime="100000",
           RescaleSlope="2", RescaleIntercept="0", RadiopharmaceuticalInformationSequence=[item(**DRUG)])


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])
    return path
