"""Reading large scans: time over nibabel's and pydicom's own on the same file, peak memory over its size.

    python bench/scans.py                               # 512×512×1200 int16, 630 MB: a few minutes, 3 GB of disk
    python bench/scans.py --slices 300 --rounds 3       # smaller
    python bench/scans.py --kinds nii dicom --out FILE.json

Everything is measured in this one process, ours and theirs in turn; the files are in the page cache. Times are
the shortest of the rounds. Memory is the peak of resident memory above what was resident before, by the bytes
of the voxels (Linux). The promises are 1.3 times their time and 1.6 times the size for reading, preparing and
describing. Theirs return stored numbers; ours also scales, checks and hashes, and finds the orientation.
"""
import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvlm3d.scans.prepare import Preprocess
from medvlm3d.scans.readers import read_volume

TIME, MEMORY = 1.3, 1.6


def phantom(slices, side):
    "A body in air with noise, int16 in HU, (D, H, W)."
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    inside = (x**2 + 1.7 * y**2 < .7)
    noise = rng.integers(-20, 21, (8, side, side), np.int16)
    voxels = np.empty((slices, side, side), np.int16)
    for d in range(slices): voxels[d] = np.where(inside, 40 + d % 30, -1000) + noise[d % 8]
    return voxels


def write_dicom(folder, voxels):
    "A CT series, one file a slice."
    folder.mkdir()
    series = generate_uid()
    for i, pixels in enumerate(voxels):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
        values = dict(SOPClassUID=CTImageStorage, SeriesInstanceUID=series, SeriesNumber=1, InstanceNumber=i + 1,
                      Modality="CT", Rows=pixels.shape[0], Columns=pixels.shape[1], SamplesPerPixel=1,
                      PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
                      PixelRepresentation=1, RescaleSlope="1", RescaleIntercept="0", PixelSpacing=[.7, .7],
                      ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, i],
                      PixelData=pixels.tobytes())
        for name, value in values.items(): setattr(ds, name, value)
        ds.save_as(folder/f"{i:05}.dcm", enforce_file_format=True)
    return folder


def write(kind, folder, voxels):
    if kind == "dicom": return write_dicom(folder/"series", voxels)
    image = nib.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-.7, -.7, 1, 1]))
    nib.save(image, folder/f"x.{kind}")
    return folder/f"x.{kind}"


def theirs(path):
    "The stored numbers, as nibabel or pydicom reads them."
    if path.is_dir(): return np.stack([pydicom.dcmread(p).pixel_array for p in sorted(path.iterdir())])
    array = np.asarray(nib.load(path).dataobj)
    return np.array(array) if isinstance(array, np.memmap) else array        # a memory map has read nothing yet


def seconds(function, path):
    gc.collect()
    start = time.perf_counter()
    function(path)
    return time.perf_counter() - start


def resident(name):
    "VmRSS or VmHWM of this process in bytes."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(function):
    "Bytes of resident memory that a call needs at most."
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = function()
    top = resident("VmHWM") - before
    del result
    return top


def prepared(path, preprocess):
    volume = read_volume(path)
    return preprocess(volume), preprocess.describe(volume)


def measure(kind, path, size, rounds):
    "Ratios of one file."
    for function in (theirs, read_volume): function(path)                       # imports, page cache
    Preprocess()(read_volume(path))
    times = [(seconds(read_volume, path), seconds(theirs, path)) for _ in range(rounds)]
    own, other = map(min, zip(*times))
    cropped = Preprocess(crop=True)
    volume = read_volume(path)
    crop = seconds(cropped, volume)
    del volume
    return {"kind": kind, "seconds": round(own, 2), "theirs": round(other, 2), "time": round(own / other, 2),
            "reading": round(peak(lambda: read_volume(path)) / size, 2),
            "memory": round(peak(lambda: prepared(path, Preprocess())) / size, 2),
            "cropped": round(peak(lambda: prepared(path, cropped)) / size, 2), "crop seconds": round(crop, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=1200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["nii", "nii.gz", "dicom"])
    parser.add_argument("--out")
    a = parser.parse_args()
    torch.set_num_threads(1)
    voxels = phantom(a.slices, a.side)
    size, rows = voxels.nbytes, []
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: write(kind, Path(folder), voxels) for kind in a.kinds}
        del voxels
        for kind, path in paths.items(): rows.append(measure(kind, path, size, a.rounds))
    for row in rows:
        print(f"{row['kind']:7} time {row['time']:.2f} of theirs (at most {TIME}: {row['time'] <= TIME}), {row['seconds']} s; "
              f"memory {row['reading']} read, {row['memory']} prepared (at most {MEMORY}: {row['memory'] <= MEMORY}), "
              f"{row['cropped']} cropped; crop {row['crop seconds']} s")
    if a.out: Path(a.out).write_text(json.dumps({"bytes": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__": main()
