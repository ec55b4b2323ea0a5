"""Every notebook runs from top to bottom, as `nbdev-test` runs it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook):
    command = [str(Path(sys.executable).parent/"nbdev-test"), str(notebook), "--n-workers", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Success." in done.stdout + done.stderr
