"""Run notebooks, store their outputs, export them and clean them.

    python tools/refresh_notebooks.py                      # all
    python tools/refresh_notebooks.py nbs/03_cohort.ipynb  # one

Cells marked `#| data` run here, so BRAINMETS_DATA must point to the real data; `slow` and `cuda` cells keep their outputs.
"""
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.export import nbdev_export

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("#| slow", "#| cuda")


def refresh(path):
    "Execute one notebook in place."
    notebook = nbformat.read(path, 4)
    kept = [c for c in notebook.cells if c.cell_type == "code" and c.source.startswith(KEPT)]
    sources = {c.id: (c.source, c.outputs) for c in kept}
    for cell in kept: cell.source = ""
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.id in sources: cell.source, cell.outputs = sources[cell.id]
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


if __name__ == "__main__":
    os.environ.setdefault("BRAINMETS_DATA", str(ROOT.parent/"shared"/"data"))
    nbdev_export()
    for path in [Path(p).resolve() for p in sys.argv[1:]] or sorted((ROOT/"nbs").glob("*.ipynb")):
        began = time.monotonic()
        refresh(path)
        print(f"{path.name}: {time.monotonic() - began:.1f} s, {path.stat().st_size//1024} KB", flush=True)
