"""Every component notebook runs from a fresh kernel, and the text it stores is the text it gives."""
import re

import nbformat
import pytest
from conftest import COMPONENTS, place

from medvlm3d.front.kernels import execute

TEXT = ("text/plain", "text/markdown", "text/html", "text/latex")
SLOW_FIRST = sorted(COMPONENTS, key=lambda p: -p.stat().st_size)


def normal(text):
    "`text` without memory addresses."
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", text)


def shown(cell):
    "What a code cell shows: its printed text, then each display's texts and the kinds of its pictures."
    if cell.cell_type != "code": return []
    printed = "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
    displays = [{k: normal(v) if k in TEXT else "…" for k, v in o.data.items() if k in TEXT or k.startswith("image/")} for o in cell.outputs if "data" in o]
    return [normal(printed), *displays]


@pytest.mark.parametrize("path", SLOW_FIRST, ids=place)
def test_notebook_runs_and_agrees(path):
    stored, fresh = nbformat.read(path, 4), execute(path, timeout=420)
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        assert shown(old) == shown(new), f"{place(path)}: run `make notebooks`; differs at: {old.source[:200]}"
