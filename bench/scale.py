"""Time the audit and the split on a generated corpus of M3D's size.

    python bench/scale.py data/scale/scale                            # 100,000 volumes, 500,000 questions
    python bench/scale.py runs/out/scale --volumes 600 --questions 1200   # seconds

Writes a corpus with known leaks, verifies it, splits it, verifies the split, and leaves `scale.json` in the
folder: seconds by the clock and of the processor, and peak memory, of each step. Each step runs in a process
of its own, so that its peak memory is its own. `medvlm3d data report` takes a record of its size over from
`data/scale/scale`.

Measured in November 2026 on two cores: 500,000 questions on 100,000 volumes (600,000 lines, 33,000 cases)
are verified in 93 to 135 s of processor time and split in 126 to 157 s. The main process peaks at 0.86 GB
and each of two workers at 0.42 GB, of which the imported libraries are 0.25 GB each. Volumes are 4 kB here:
real ones of 8 MB would add their reading, about an hour at 200 MB/s.
"""
import argparse
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medvlm3d.base.core import write_json
from medvlm3d.base.pool import worker_pool
from medvlm3d.data.manifest import write_manifest
from medvlm3d.data.samples import TYPES, Sample
from medvlm3d.data.split import split_corpus
from medvlm3d.data.ties import audit, write_audit
from medvlm3d.phantoms.prose import LOOKS, PLACES, varied_report

SHAPE = 8, 16, 16
PLANTED = "case", "text", "near text", "bytes", "near image"
LEAKS = 50             # cases of each planted kind, at most
KINDS = list(TYPES.values())


# --- the corpus -----------------------------------------------------------------------------------

def coarse_volume(seed):
    "A small volume (1, 8, 16, 16) float16: coarse noise around an ellipsoid."
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    noise = np.random.default_rng(seed).standard_normal((4, 8, 8))
    for axis in range(3): noise = noise.repeat(2, axis)
    return (np.exp(-2 * (d*d + h*h + w*w)) + .3 * noise)[None].astype(np.float16)


class Plan:
    """Which volume belongs to which case (one to five each), which case to which split (90 : 5 : 5), and
    which test case leaks from which training case: `leak` is case → (kind, partner)."""
    def __init__(self, volumes, seed=0, leaks=LEAKS):
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.case = np.repeat(np.arange(volumes), rng.integers(1, 6, volumes))[:volumes]
        self.split = rng.choice(["train", "validation", "test"], self.case[-1] + 1, p=(.9, .05, .05))
        test, train = (np.flatnonzero(self.split == side) for side in ("test", "train"))
        leaks = min(leaks, len(test) // len(PLANTED))
        test, train = (rng.permutation(cases)[:leaks * len(PLANTED)].tolist() for cases in (test, train))
        kinds = np.repeat(PLANTED, leaks).tolist()
        self.leak = {case: (kind, partner) for kind, case, partner in zip(kinds, test, train)}

    def of(self, case):
        "(kind of leak, partner) of a case; an empty kind and the case itself where there is none."
        return self.leak.get(case, ("", case))

    def first_volumes(self):
        "case → its first volume."
        return dict(zip(self.case[::-1].tolist(), range(len(self.case) - 1, -1, -1)))


def image_of(volume): return f"volumes/{volume // 1000:04d}/{volume:06d}.npy"


def report_of(plan, case):
    "The report of a case, copied from its partner (all of it, or all but one word) where that is the leak."
    kind, partner = plan.of(case)
    source = partner if kind in ("text", "near text") else case
    text = varied_report(np.random.default_rng((plan.seed, source)))
    return text.replace("Conclusion", "Impression") if kind == "near text" else text


def question(number, rng):
    "The words of a closed question, as fields of a sample."
    looks = rng.permutation(len(LOOKS))[:4]
    choices = tuple(f"{rng.integers(3, 95)} mm, {LOOKS[k]}" for k in looks)
    words = f"What is seen in {PLACES['lungs'][number % 5]}?"
    return dict(type=KINDS[number % 5], question=words, choices=choices, answer=choices[number % 4],
                letter="ABCD"[number % 4])


def corpus_samples(plan, questions):
    "Yield a report and questions for each volume; a case that leaks by `case` has its partner's number."
    volumes = len(plan.case)
    counts = np.diff(np.linspace(0, questions, volumes + 1).round().astype(int))
    rng = np.random.default_rng((plan.seed, 1))
    for volume, case in enumerate(plan.case.tolist()):
        kind, partner = plan.of(case)
        number = partner if kind == "case" else case
        known = dict(case=f"case/{number:06d}", image=image_of(volume), split=str(plan.split[case]),
                     modality="CT", plane="axial", source="generated")
        yield Sample(f"{volume}/report", task="report", type="Report", answer=report_of(plan, case), **known)
        for q in range(counts[volume]):
            yield Sample(f"{volume}/{q}", task="closed", **question(q, rng), **known)


def write_volumes(root, plan, progress=True):
    "Write all volumes; the first of a leaking case is a copy of its partner's first, or nearly so."
    first = plan.first_volumes()
    for volume, case in enumerate(tqdm(plan.case.tolist(), desc="volumes", disable=not progress)):
        kind, partner = plan.of(case) if volume == first[case] else ("", case)
        source = first[partner] if kind in ("bytes", "near image") else volume
        array = coarse_volume((plan.seed, source))
        if kind == "near image":
            noise = np.random.default_rng(volume).standard_normal(array.shape)
            array = (array * .8 + .02 * noise).astype(np.float16)
        path = root/image_of(volume)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


# --- the steps ------------------------------------------------------------------------------------

def make_step(root, volumes, questions, progress):
    plan = Plan(volumes)
    write_volumes(root, plan, progress)
    write_manifest(root/"manifest.jsonl", corpus_samples(plan, questions))


def verify_step(root, name, workers):
    write_audit(root/name, audit(root/f"{name}.jsonl", workers=workers, progress=False))


def split_step(root, workers): split_corpus(root/"manifest.jsonl", workers=workers, progress=False)


# --- the clock ------------------------------------------------------------------------------------

def megabytes(who):
    unit = 2**20 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(who).ru_maxrss / unit)


def processor_seconds():
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(step):
    "Time of `step()` by the clock and of all its processes; peak MB of this process and its largest child."
    start, used = time.perf_counter(), processor_seconds()
    step()
    seconds, processor = time.perf_counter() - start, processor_seconds() - used
    return {"seconds": round(seconds, 1), "processor seconds": round(processor, 1),
            "peak MB": megabytes(resource.RUSAGE_SELF),
            "peak MB of a worker": megabytes(resource.RUSAGE_CHILDREN)}


def benchmark(root, volumes=100_000, *, questions=500_000, workers=2, progress=True):
    "Run all steps in the folder `root`; write and return the record."
    steps = {"make the corpus": partial(make_step, root, volumes, questions, progress),
             "verify": partial(verify_step, root, "manifest", workers),
             "split by case": partial(split_step, root, workers),
             "verify the split": partial(verify_step, root, "manifest-by-case", workers)}
    record = {"volumes": volumes, "questions": questions, "workers": workers, "steps": {}}
    for name, step in steps.items():
        with worker_pool(1, spawn=True) as pool:
            record["steps"][name] = pool.submit(timed, step).result()
        if progress: print(name, record["steps"][name], flush=True)
    for name in ("manifest", "manifest-by-case"):
        result = json.loads((root/name/"audit.json").read_text())
        record[name] = {k: result[k] for k in ("passed", "leaks", "volumes", "tied to training", "problems")}
    write_json(root/"scale.json", record)
    return record


def main():
    parser = argparse.ArgumentParser(description="Time the audit and the split on a generated corpus.")
    parser.add_argument("out", type=Path, help="folder of the corpus and of scale.json")
    parser.add_argument("--volumes", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=500_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="print the record alone")
    options = parser.parse_args()
    record = benchmark(options.out, options.volumes, questions=options.questions, workers=options.workers,
                       progress=not options.quiet)
    print(json.dumps(record, indent=1))


if __name__ == "__main__": main()
