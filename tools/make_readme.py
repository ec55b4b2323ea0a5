"""Write README.md from nbs/index.ipynb (nbdev-readme needs Quarto, this needs nbconvert only)."""
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme():
    "README.md as text: the index notebook without cells marked `#| hide`, with a note on its origin."
    notebook = nbformat.read(ROOT/"nbs"/"index.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith(("#| hide", "#|hide"))]
    body, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    lines = [line for line in body.splitlines() if not line.startswith("#| ")]
    text = "\n".join(lines).replace("](figures/", "](nbs/figures/").strip()
    return "<!-- Generated from nbs/index.ipynb by `make readme`. -->\n\n" + text + "\n"


if __name__ == "__main__":
    (ROOT/"README.md").write_text(readme(), encoding="utf-8")
    sys.exit(0)
