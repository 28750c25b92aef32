"""For `make lab`: a notebook is saved as it is stored, without what depends on the session, so that opening one is no change."""
import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("clean_notebook", Path(__file__).with_name("clean_notebook.py"))
clean_notebook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(clean_notebook)


def before_saving(model, **_):
    "Clean the notebook in `model`, in place."
    if model["type"] == "notebook" and model.get("content"):
        clean_notebook.cleaned(model["content"])


c.FileContentsManager.pre_save_hook = before_saving    # noqa: F821 (c is Jupyter's)
