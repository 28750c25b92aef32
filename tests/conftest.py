"""Where things are, and one thread a kernel: stored outputs must not depend on the machine's load."""
import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
os.environ.pop("MPLBACKEND", None)  # a kernel draws inline only where no backend is named
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
COMPONENTS = [p for p in NOTEBOOKS if p.name[0] in "01"] + [ROOT/"nbs"/"index.ipynb"]
RUNNERS = [p for p in NOTEBOOKS if p.name.startswith("9")]
MODULES = sorted(p for p in (ROOT/"medvlm3d").glob("*.py") if not p.name.startswith("_"))
