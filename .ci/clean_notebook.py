"""git's filter for notebooks: what Jupyter writes by opening one is not a change. Reads standard input, needs no package.

`make setup` installs it in the clone: `git config filter.notebook.clean "python3 .ci/clean_notebook.py"`.
"""
import json
import sys

KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def cleaned(notebook):
    "`notebook` with the kernel's name and tags as its only metadata, and without counts."
    notebook["metadata"] = KERNEL
    for cell in notebook.get("cells", []):
        tags = cell.get("metadata", {}).get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        for part in (cell, *cell.get("outputs", [])):
            if "execution_count" in part:
                part["execution_count"] = None
    return notebook


def main():
    text = sys.stdin.buffer.read()
    try:
        notebook = json.loads(text)
    except ValueError:
        sys.stdout.buffer.write(text)    # half a merge, or no notebook: as it is
        return
    text = json.dumps(cleaned(notebook), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(text.encode("utf-8"))


if __name__ == "__main__":
    main()
