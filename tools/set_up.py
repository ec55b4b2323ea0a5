"""Make or refresh the environment in `.venv`. Does nothing when nothing changed since the last time.

    python3 tools/set_up.py          # Python 3.11 or newer

Versions come from constraints.txt, names from settings.ini. The fingerprint of both is kept in the environment.
"""
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT/".venv"
PYTHON = HOME/("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = HOME/"brainmets-fingerprint.txt"
INPUTS = ["settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "tools/set_up.py", "tools/torchvision_on_cpu.py"]


def fingerprint():
    "Hash of everything that decides what the environment holds, and of where it lies."
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for name in INPUTS: digest.update((ROOT/name).read_bytes())
    return digest.hexdigest()


def is_ready(): return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def pip(*args): subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *args], check=True)


def add_pyradiomics():
    "PyRadiomics 3.0.1 has no wheel for this Python and does not say what it is built with: that is installed before it. 3.1.0 is broken."
    pip("install", "--quiet", "--constraint", "constraints.txt", "setuptools", "wheel", "versioneer", "cython", "six")
    pip("install", "--quiet", "--constraint", "constraints.txt", "--no-build-isolation", "--no-deps", "pyradiomics")


def set_up():
    "Create the environment, install brainmets in editable form with its development tools, mend torchvision."
    if not PYTHON.exists(): venv.create(HOME, with_pip=True)
    STAMP.unlink(missing_ok=True)
    pip("install", "--quiet", "--constraint", "constraints.txt", "--editable", ".[dev]")
    add_pyradiomics()
    subprocess.run([str(PYTHON), "tools/torchvision_on_cpu.py"], check=True)
    STAMP.write_text(fingerprint())


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        sys.exit(f"brainmets needs Python 3.11 or newer, this is {sys.version.split()[0]}. "
                 "Remedy: make PYTHON=/path/to/python3.11 ...")
    os.chdir(ROOT)
    if not is_ready():
        print("Setting up .venv (about 4 minutes, 3 GB, the first time) ...", flush=True)
        set_up()
