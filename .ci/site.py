"""For mkdocs: notebooks become Markdown pages, so that mkdocs itself checks every link, and the modules a reference.

A page shows what a reader needs: nbdev's directives go, a cell tagged `result` shows its output alone,
solutions stay folded, and a link out of `nbs/` leads to the repository.
"""
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\(|(?:href|src)=\")(?!https?:|mailto:|data:|#|/)([^)\"\s#]+)(#[^)\"\s]*)?")


def without_directives(notebook):
    "`notebook` without nbdev's directives, without cells that hold nothing else, without the code of results."
    kept = []
    for cell in notebook.cells:
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type == "code" and not cell.source.strip() and not cell.outputs:
            continue
        if "result" in cell.metadata.get("tags", []):
            cell.source = ""
        if cell.cell_type == "markdown":    # a formula is a paragraph, also where only a line end stands before it
            cell.source = re.sub(r"^(\$\$(?:(?!\$\$).)+\$\$)[ \t]*$", r"\n\1\n", cell.source, flags=re.M | re.S)
        kept.append(cell)
    notebook.cells = kept
    return notebook


def link_from(source, repo):
    "A function for `re.sub`: the link as it must stand on the page made of `source`, a path below nbs/."
    def link(match):
        opening, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("../"):
            inside = path.removeprefix("../")
            if not (ROOT/inside).exists():
                raise PluginError(f"nbs/{source} links to {target}, which is not in the repository")
            kind = "tree" if (ROOT/inside).is_dir() else "blob"
            return f"{opening}{repo}/{kind}/main/{inside}{anchor}"
        if target.endswith(".ipynb"):
            target = re.sub(r"[.]ipynb$", ".md", target)
            anchor = anchor and "#" + slugify(unquote(anchor[1:]).replace("-", " "), "-")
        return f"{opening}{target}{anchor}"
    return link


def page_of(path, source, repo):
    "Markdown of the notebook at `path`, and its pictures: name → bytes."
    notebook = without_directives(nbformat.read(path, 4))
    notebook.metadata["language_info"] = {"name": "python"}
    folder = f"{Path(source).stem}_files"
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": folder})
    text = re.sub(r"^```python\s*```$", "", text, flags=re.M)
    text = LINK.sub(link_from(source, repo), text)
    text = text.replace("<details>", '<details markdown="1">')
    return text, resources.get("outputs", {})


def reference_pages():
    "A page a wing: its modules in alphabetical order, each with its public names."
    for wing in sorted(p.parent for p in (ROOT/"medvlm3d").glob("*/__init__.py")):
        modules = sorted(p.stem for p in wing.glob("*.py") if not p.stem.startswith("_"))
        blocks = [f"::: medvlm3d.{wing.name}.{module}\n" for module in modules]
        yield f"reference/{wing.name}.md", "\n".join([f"# medvlm3d.{wing.name}\n", *blocks])


def on_files(files, config):
    "Each notebook of the docs folder is replaced by the page made of it; the reference is added."
    repo = config["repo_url"]
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        text, pictures = page_of(file.abs_src_path, file.src_uri, repo)
        files.append(File.generated(config, re.sub(r"[.]ipynb$", ".md", file.src_uri), content=text))
        for name, data in pictures.items():
            source = posixpath.join(posixpath.dirname(file.src_uri), name)
            files.append(File.generated(config, source, content=data))
    for source, text in reference_pages():
        files.append(File.generated(config, source, content=text))
    return files
