"""What later studies stand on imports here: torch with torchvision, timm, fastai and monai, also without a GPU."""
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["torchvision", "timm", "fastai.vision.all", "monai.networks.nets"])
def test_imports_in_a_fresh_interpreter(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_the_tables_need_no_torch():
    "The command line starts without loading torch: `check` and `run clinical` do not need it."
    code = "import sys, brainmets.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
