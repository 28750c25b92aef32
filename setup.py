"""The wheel holds plans, runners and the demo model as well, and its description links to the repository."""
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/medvlm3d/medvlm3d"
SHARED = {"runs": ("*.yaml", "*.json", "hostfile", "slurm.sbatch"), "nbs/runners": ("*.ipynb",),
          "reports/demo/model": ("*",)}


class WithShared(build_py):
    "Copies the shared files to `medvlm3d/share`, under the paths that they have in a clone."
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder, patterns in SHARED.items():
            for file in sorted({p for pattern in patterns for p in (ROOT/folder).rglob(pattern) if p.is_file()}):
                target = Path(self.build_lib)/"medvlm3d"/"share"/file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def description():
    "The README with links that lead somewhere outside of the clone as well."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!https?:|#)", rf"![\1]({REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)", rf"[\1]({REPOSITORY}/blob/main/", text)


setup(cmdclass={"build_py": WithShared}, long_description=description(),
      long_description_content_type="text/markdown")
