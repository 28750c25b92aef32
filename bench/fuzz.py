"""Damages files at random and counts what their readers do: `python bench/fuzz.py --count 50000 --seed 1`.

Every reader must read a damaged file, or refuse it with `MedVLM3DError`. Any other error is *raw*: it is printed with the number of its mutant,
and the exit status is 1. The same seed gives the same mutants; memory is limited."""
import argparse
import gzip
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tests"))
from scan_files import meta_bytes, nifti_bytes, nrrd_bytes, save_dicom, save_enhanced  # noqa: E402

VOXELS = np.random.default_rng(0).integers(0, 900, (7, 6, 5)).astype(np.int16)
NUMBERS = [b"0", b"-1", b"NaN", b"1e999", b"9" * 40, b"9" * 5000, b"2147483648", b"18446744073709551616"]
TOKENS = [b"null", b"[]", b"{}", b"[" * 3000, b'"', b"\xff\xfe", b"\0", b"true", b"- ", b": ", b"&a *a", b"!!python/object:os.system x"]
BYTES = [0, 1, 127, 128, 255]


# --- damage ----------------------------------------------------------------------------------------------------------

def place(rng, data):
    "A position, more often near the beginning, where headers are."
    return rng.randrange(min(len(data), 400) if rng.random() < .7 else len(data)) if data else 0


def flip(rng, data, i): return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
def replace(rng, data, i): return data[:i] + bytes([rng.choice(BYTES)]) * rng.choice((1, 2, 4, 8)) + data[i + 1:]
def cut(rng, data, i): return data[:i]
def remove(rng, data, i): return data[:i] + data[i + rng.randrange(1, 64):]
def repeat(rng, data, i): return data[:i] + data[i:i + rng.randrange(1, 64)] * rng.choice((2, 3, 50)) + data[i:]
def insert(rng, data, i): return data[:i] + rng.choice(NUMBERS + TOKENS) + data[i:]


def number(rng, data, i):
    "Another number in the place of the next one."
    digits = [k for k in range(i, min(len(data), i + 200)) if 48 <= data[k] < 58]
    if not digits: return flip(rng, data, i)
    end = digits[0]
    while end < len(data) and 48 <= data[end] < 58: end += 1
    return data[:digits[0]] + rng.choice(NUMBERS) + data[end:]


CHANGES = (flip, replace, cut, remove, repeat, insert, number)


def damaged(rng, data):
    "The bytes after one to four changes; without a generator as they are."
    if rng is None: return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        if data: data = rng.choice(CHANGES)(rng, data, place(rng, data))
    return data


def zipped(rng, members):
    "A zip of damaged members, by any of its methods, perhaps damaged itself."
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)) if rng else zipfile.ZIP_LZMA
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items(): archive.writestr(name, damaged(rng, data) if rng and rng.random() < .3 else data)
    return damaged(rng, out.getvalue()) if rng and rng.random() < .5 else out.getvalue()


# --- seeds and readers -----------------------------------------------------------------------------------------------

def npy_bytes(array):
    np.save(out := io.BytesIO(), array)
    return out.getvalue()


def picture_bytes(kind):
    from PIL import Image
    pages = [Image.fromarray((x % 256).astype(np.uint8)) for x in VOXELS]
    more = dict(save_all=True, append_images=pages[1:]) if kind == "TIFF" else {}
    pages[0].save(out := io.BytesIO(), kind, **more)
    return out.getvalue()


def dicom_members(folder):
    "name → bytes of a small series."
    save_dicom(folder/"series", VOXELS, np.diag([1., 1, 3, 1]))
    return {p.name: p.read_bytes() for p in sorted((folder/"series").iterdir())}


def scan_seeds(folder):
    "name → function of a generator that gives the bytes of a damaged scan."
    plain = {"a.nii": nifti_bytes(VOXELS), "a.nrrd": nrrd_bytes(VOXELS, "raw"), "b.nrrd": nrrd_bytes(VOXELS), "a.mha": meta_bytes(VOXELS),
             "b.mha": meta_bytes(VOXELS, True), "a.npy": npy_bytes(VOXELS[None]), "a.tif": picture_bytes("TIFF")}
    series = dicom_members(folder)
    makers = {name: lambda rng, data=data: damaged(rng, data) for name, data in plain.items()}
    packed = gzip.compress(plain["a.nii"])
    makers["a.nii.gz"] = lambda rng: damaged(rng, packed) if rng and rng.random() < .2 else gzip.compress(damaged(rng, plain["a.nii"]), 1)
    save_enhanced(folder/"frames.dcm", VOXELS, np.diag([1., 1, 3, 1]))
    frames = (folder/"frames.dcm").read_bytes()
    makers["a.dcm"] = lambda rng: damaged(rng, frames)
    makers["a.zip"] = lambda rng: zipped(rng, series)
    makers["b.zip"] = lambda rng: zipped(rng, {"a.nii": plain["a.nii"]})
    return makers


def text_seeds(folder):
    "name → (bytes, reader) of the texts that users write or get."
    from medvlm3d.base.core import read_json
    from medvlm3d.base.values import read_yaml
    from medvlm3d.data.asked import read_questions, scans_in
    from medvlm3d.data.manifest import load_samples
    from medvlm3d.data.questions import read_conversations
    from medvlm3d.evaluation.outputs import read_file
    from medvlm3d.front.runners import read_plan
    (folder/"x").mkdir()
    (folder/"x"/"a.nii").write_bytes(nifti_bytes(VOXELS))
    line = json.dumps({"id": "1", "case": "c", "image": "x/a.nii", "task": "closed", "split": "test", "question": "Which plane?", "answer": "axial",
                       "choices": ["axial", "coronal"], "letter": "A", "type": "Plane"}).encode() + b"\n"
    answers = b'{"id": "1", "question": "Which plane?", "answer": "axial", "prediction": "axial", "choices": ["axial", "coronal"], "task": "closed"}\n'
    plan = (ROOT/"runs"/"demo.yaml").read_bytes()
    asked = b'[{"question": "Which plane?", "choices": ["axial", "coronal"]}, "Where?"]'
    talk = b'[{"id": "1", "image": "a.nii", "conversations": [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "Left."}]}]'
    return {"m.jsonl": (line, load_samples), "q.json": (asked, read_questions), "q.csv": (b"question,choices\nWhere?,\"[\"\"a\"\"]\"\n", read_questions),
            "list.csv": (b"image,series\nx/a.nii,0\n", lambda p: scans_in([p])), "list.jsonl": (b'{"image": "x/a.nii"}\n', lambda p: scans_in([p])),
            "talk.json": (talk, read_conversations), "p.jsonl": (answers, read_file), 
            "p.csv": (b"id,question,answer,prediction\n1,Where?,a,b\n", read_file),
            "plan.yaml": (plan, read_plan), "y.yaml": (plan, lambda p: read_yaml(p.read_text(errors="replace"), p.name)), "j.json": (asked, read_json)}


class Models:
    "A model's folder and a feature store with one damaged file each time."
    def __init__(self, folder):
        from medvlm3d.base.core import write_json
        from medvlm3d.features.store import write_shard
        from medvlm3d.method.model import tiny
        import torch
        self.model, self.store, self.copy = folder/"model", folder/"store", folder/"copy"
        tiny().save_pretrained(self.model)
        card = write_shard(self.store, {"k": (torch.zeros(2, 3, 4), torch.arange(2))})
        write_json(self.store/"store.json", {"format": "medvlm3d.features/3", "encoder": "tiny"})
        write_json(self.store/"images.json", {"a": {"key": next(iter(card["volumes"])), "stamp": "s", "sha256": "0"}})

    def damage(self, rng, folder):
        "A copy of a folder in which one file is damaged."
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(folder, self.copy)
        if rng:
            file = rng.choice(sorted(self.copy.iterdir()))
            file.write_bytes(damaged(rng, file.read_bytes()))

    def load_model(self, rng):
        from medvlm3d.method.model import MedVLM3D
        from medvlm3d.method.sealed import SUMS, seal
        self.damage(rng, self.model)
        if rng and rng.random() < .8:      # so that the reader gets past the hashes
            (self.copy/SUMS).unlink(missing_ok=True)
            (self.copy/"model.safetensors.sha256").unlink(missing_ok=True)
            seal(self.copy)
        MedVLM3D.from_pretrained(self.copy)

    def load_store(self, rng):
        from medvlm3d.features.store import FeatureStore
        self.damage(rng, self.store)
        store = FeatureStore(self.copy)
        if "a" in store.known: store.shards.read(*store.rows["k"][:1], "k", store.rows["k"][1])


def targets(folder):
    "(name, weight, what to do with a generator) of everything that is damaged."
    from medvlm3d.scans.readers import read_volume
    def scan(name, make):
        def read(rng):
            (folder/name).write_bytes(make(rng))
            read_volume(folder/name)
        return read
    def text(name, data, reader):
        def read(rng):
            (folder/name).write_bytes(damaged(rng, data))
            reader(folder/name)
        return read
    models = Models(folder)
    rows = [(name, 8, scan(name, make)) for name, make in scan_seeds(folder).items()]
    rows += [(name, 4, text(name, *pair)) for name, pair in text_seeds(folder).items()]
    return [*rows, ("model folder", 1, models.load_model), ("feature store", 4, models.load_store)]


# --- the count -------------------------------------------------------------------------------------------------------

def outcome(act, rng):
    "read, refused, or raw with the error's own words."
    from medvlm3d.base.core import MedVLM3DError
    try: act(rng)
    except MedVLM3DError: return "refused", None
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt): raise
        return "raw", f"{type(e).__name__}: {str(e)[:160]}"
    return "read", None


def limit_memory(megabytes):
    "No more than so many megabytes beyond what the process has now."
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20,) * 2)


def main():
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--count", type=int, default=50_000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", help="the name of one target")
    words.add_argument("--memory", type=int, default=1500, help="megabytes beyond the start")
    words.add_argument("--trace", action="store_true", help="raise the first raw error")
    given = words.parse_args()
    warnings.simplefilter("ignore")
    counts, raw, slowest = Counter(), [], (0, "")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for row in targets(Path(folder)) if given.only in (None, row[0])]
        for name, _, act in rows:      # undamaged, each is read
            if (kind := outcome(act, None)[0]) != "read": sys.exit(f"{name} is {kind} although it is undamaged")
        limit_memory(given.memory)
        begun = time.perf_counter()
        for n in range(given.count):
            rng = random.Random(f"{given.seed}/{n}")
            name, _, act = rng.choices(rows, [weight for _, weight, _ in rows])[0]
            start = time.perf_counter()
            kind, why = (act(rng), (None, None))[1] if given.trace else outcome(act, rng)
            counts[kind] += 1
            slowest = max(slowest, (time.perf_counter() - start, f"{name} {n}"))
            if kind == "raw": raw.append(f"{n} {name}: {why}")
    for line in raw[:40]: print(line)
    print(json.dumps({**{str(k): v for k, v in counts.items()}, "seconds": round(time.perf_counter() - begun, 1),
                      "slowest": [round(slowest[0], 2), slowest[1]]}))
    sys.exit(bool(raw))


if __name__ == "__main__": main()
