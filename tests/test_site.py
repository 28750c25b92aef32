"""The site: it builds without a warning, every link leads somewhere, and a page shows what a reader needs."""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT

EQUATIONS = range(1, 22)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built site; a warning of mkdocs (a dead link, a page outside the navigation) is an error."
    folder = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).parent/"mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "INFO" not in line)
    return folder


def page_of(notebook):
    "Where the page of a notebook lies in the site."
    place = notebook.relative_to(ROOT/"nbs").with_suffix("")
    return place.parent/"index.html" if place.name == "index" else place/"index.html"


def test_every_notebook_has_a_page_without_directives(site):
    for notebook in NOTEBOOKS:
        text = (site/page_of(notebook)).read_text(encoding="utf-8")
        article = text[text.index("<article"):text.index("</article>")]
        assert not re.search(r"^#\|", re.sub(r"<[^>]+>", "", article), re.M), notebook.name


def test_links_of_the_pages_lead_somewhere(site):
    "Those in the outputs of cells, too, of which mkdocs knows nothing."
    dead = set()
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.S)     # code may speak of links
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            parts = urlsplit(urljoin(f"http://site/{page.relative_to(site).as_posix()}", link))
            if parts.netloc != "site" or parts.scheme != "http" or page.name == "404.html": continue
            target = site/unquote(parts.path).lstrip("/")
            if not (target.is_file() or (target/"index.html").is_file()): dead.add((page.relative_to(site).as_posix(), link))
    assert not dead


def test_equations_are_drawn_by_what_lies_beside_the_pages(site):
    "Every numbered equation is marked for KaTeX, whose script, style and fonts come from the site itself."
    marked = ""
    for page in [site/"scans"/"01_volume"/"index.html", *sorted(site.glob("method/0*/index.html"))]:
        text = page.read_text(encoding="utf-8")
        assert "katex.min.js" in text and "auto-render.min.js" in text and not re.search(r'<script[^>]*src=""', text)
        assert not re.search(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!medvlm3d)', text), page
        marked += "".join(re.findall(r'<div class="arithmatex">(.*?)</div>', text, re.S))
    assert all(f"\\tag{{{n}}}" in marked for n in EQUATIONS)
    style = (site/"assets"/"katex"/"katex.min.css").read_text()
    fonts = {name for name in re.findall(r"url\((fonts/[^)]+\.woff2)\)", style)}
    assert fonts and all((site/"assets"/"katex"/name).is_file() for name in fonts)


def test_the_reference_holds_the_public_names(site):
    import medvlm3d
    for name, module in medvlm3d.PUBLIC.items():
        wing = module.split(".")[0]
        text = (site/"reference"/wing/"index.html").read_text(encoding="utf-8")
        assert f'id="medvlm3d.{module}.{name}"' in text, name


def opened(text):
    "A stored notebook as Jupyter saves it after it was opened and run."
    text = text.replace('"display_name": "python3"', '"display_name": "Python 3 (ipykernel)"')
    text = text.replace('"kernelspec":', '"language_info": {"name": "python", "version": "3.13.1"},\n  "kernelspec":')
    return text.replace('"execution_count": null', '"execution_count": 7')


def test_a_notebook_that_was_only_opened_is_saved_as_it_was():
    "By the configuration that `make lab` gives to Jupyter."
    text = (ROOT/"nbs"/"method"/"04_fusion.ipynb").read_text(encoding="utf-8")
    c = SimpleNamespace(FileContentsManager=SimpleNamespace())
    runpy.run_path(ROOT/".ci"/"jupyter_server_config.py", {"c": c})
    model = {"type": "notebook", "content": nbformat.from_dict(json.loads(opened(text)))}
    c.FileContentsManager.pre_save_hook(model=model, path="fusion.ipynb", contents_manager=None)
    assert nbformat.writes(model["content"]) + "\n" == text != opened(text)


def test_opening_a_notebook_is_no_change_for_git(tmp_path):
    "Nor is it in a clone whose set-up installed the filter: there is no difference, and nothing to commit."
    def git(*words): return subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path/".ci").mkdir()
    for name in (".gitattributes", ".ci/clean_notebook.py"): shutil.copy(ROOT/name, tmp_path/name)
    shutil.copy(ROOT/"nbs"/"method"/"04_fusion.ipynb", tmp_path/"fusion.ipynb")
    git("init", "-q")
    git("config", "filter.notebook.clean", "python3 .ci/clean_notebook.py")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "one")
    text = opened((tmp_path/"fusion.ipynb").read_text(encoding="utf-8"))
    (tmp_path/"fusion.ipynb").write_text(text, encoding="utf-8")
    assert git("diff") == ""
    git("add", "-A")
    assert git("status", "--porcelain") == ""
    (tmp_path/"fusion.ipynb").write_text(text.replace("naive", "native", 1), encoding="utf-8")
    assert "fusion.ipynb" in git("diff", "--stat")
