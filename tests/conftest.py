"""Where real data lies, and the closing line of a test run."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "agg"  # figures are drawn, never shown


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="session")
def real_data():
    "The folder of real data; the test is skipped with a message where it is missing."
    folder = Path(os.environ.get("BRAINMETS_DATA", ROOT.parent/"shared"/"data"))
    if not folder.is_dir(): pytest.skip("no real data: set BRAINMETS_DATA to the folder that holds ucsf_pdgm, radiomics_mm, ...")
    return folder


def pytest_terminal_summary(terminalreporter):
    "One plain closing line, also when nothing failed."
    count = lambda *keys: sum(len(terminalreporter.stats.get(k, [])) for k in keys)
    skipped = count("skipped")
    terminalreporter.write_line(f"{count('passed')} passed, {count('failed', 'error')} failed" + (f", {skipped} skipped" if skipped else ""))
