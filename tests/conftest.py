"""Where things are, and one thread a kernel: stored outputs must not depend on the machine's load."""
import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
os.environ.pop("MPLBACKEND", None)  # a kernel draws inline only where no backend is named
ROOT = Path(__file__).resolve().parent.parent
WINGS = ("base", "scans", "method", "phantoms", "data", "features", "training", "evaluation", "report", "studies", "front")
NOTEBOOKS = [p for wing in (*WINGS, "runners") for p in sorted((ROOT/"nbs"/wing).glob("*.ipynb"))] + [ROOT/"nbs"/"index.ipynb"]
RUNNERS = [p for p in NOTEBOOKS if p.parent.name == "runners"]
COMPONENTS = [p for p in NOTEBOOKS if p not in RUNNERS]
MODULES = [p for wing in WINGS for p in sorted((ROOT/"medvlm3d"/wing).glob("*.py")) if not p.name.startswith("_")]


def place(path):
    "A notebook or module as WING/NAME."
    return f"{path.parent.name}/{path.stem}"
