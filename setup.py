"""Metadata of the package, read from settings.ini. The version is brainmets.__version__."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None, inline_comment_prefixes=None)
config.read(ROOT/"settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def requirement_lines(key):
    "Names of the requirements under `key`; what follows ` ;` on a line says why it is there."
    return [line.split(";")[0].strip() for line in settings[key].splitlines() if line.strip()]


setup(
    description=settings["description"],
    long_description=(ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=[word.strip() for word in settings["keywords"].split(",")],
    python_requires=f">={settings['min_python']}",
    install_requires=requirement_lines("requirements"),
    extras_require={"dev": requirement_lines("dev_requirements")},
)
