"""Rules of the house that no single notebook can hold: order of imports, exports in sync, clean notebooks, no stray facts."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NUMBERED = sorted((ROOT/"nbs").glob("[0-9]*_*.ipynb"))
BY_HAND = {"__init__.py", "__main__.py"}     # nbdev owns the version in __init__; __main__ only calls the command line


def cells(notebook): return json.loads(notebook.read_text())["cells"]
def code(notebook): return ["".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code"]


def default_exp(notebook):
    found = [m for source in code(notebook) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M)]
    return found[0] if found else None


MODULES = {default_exp(n): n for n in NUMBERED}


def test_numbers_are_unique_and_every_notebook_exports_one_module():
    numbers = [n.name.split("_")[0] for n in NUMBERED]
    assert len(set(numbers)) == len(numbers), "two notebooks share a number"
    exports = [default_exp(n) for n in NUMBERED]
    assert None not in exports, f"without default_exp: {[n.name for n, e in zip(NUMBERED, exports) if e is None]}"
    assert len(set(exports)) == len(exports), "two notebooks export to one module: the second overwrites the first"


def test_relative_imports_are_seen():
    "The rule below would be empty if it missed the relative imports that nbdev writes."
    assert ("brainmets.tables" in {name for name, _ in imported_modules(module_file("evaluate.curves"))})


def module_file(module): return ROOT/"brainmets"/(module.replace(".", "/") + ".py")


def imported_modules(file):
    "Absolute names of imported modules; nbdev writes relative imports into modules."
    package = ("brainmets", *file.relative_to(ROOT/"brainmets").parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) + "." if node.level else ""
            yield base + (node.module or ""), [a.name for a in node.names]
        if isinstance(node, ast.Import): yield from ((a.name, []) for a in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_exported_cells_import_lower_numbers_only(module):
    number = MODULES[module].name.split("_")[0]
    for name, names in imported_modules(module_file(module)):
        assert "*" not in names, f"{module} imports * from {name}"
        if not name.startswith("brainmets."): continue
        target = name.removeprefix("brainmets.")
        assert target in MODULES, f"{module} imports {name}, which no notebook exports"
        assert MODULES[target].name.split("_")[0] < number, f"{MODULES[module].name} imports {MODULES[target].name}"


def test_no_module_without_a_notebook():
    files = {p.relative_to(ROOT/"brainmets").as_posix() for p in (ROOT/"brainmets").rglob("*.py")}
    expected = {module_file(m).relative_to(ROOT/"brainmets").as_posix() for m in MODULES}
    packages = {f"{Path(e).parent.as_posix()}/__init__.py" for e in expected if "/" in e}
    assert files - expected - packages - BY_HAND - {"_modidx.py"} == set()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project, exported and cleaned afresh."
    folder = tmp_path_factory.mktemp("copy")/"project"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "demo", "__pycache__", "*.egg-info", "tests"))
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([str(BIN/command)], cwd=folder, check=True, capture_output=True)
    return folder


def test_exports_are_in_sync(copy):
    names = [p.relative_to(ROOT).as_posix() for p in (ROOT/"brainmets").rglob("*.py")]
    _, differ, missing = filecmp.cmpfiles(ROOT, copy, names, shallow=False)
    assert not differ and not missing, f"run nbdev-export: {differ + missing}"


def test_notebooks_are_clean(copy):
    names = [p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").glob("*.ipynb")]
    _, differ, _ = filecmp.cmpfiles(ROOT, copy, names, shallow=False)
    assert not differ, f"run nbdev-clean: {differ}"


@pytest.mark.parametrize("notebook", NUMBERED, ids=lambda p: p.stem)
def test_notebook_is_a_page(notebook):
    first = "".join(cells(notebook)[0]["source"])
    assert re.match(r"# .+\n\n?> .+", first), "an H1 and a '>' subtitle come first"
    assert notebook.stat().st_size < 300_000, "over 300 KB: stale or large outputs"
    lessons = [s for s in code(notebook) if "#| export" not in s]
    assert any(re.search(r"\bassert\b|test_\w+\(|ExceptionExpected", s) for s in lessons), "no cell checks anything"


def tracked():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [ROOT/n for n in names if (ROOT/n).is_file()] or [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts and ".git" not in p.parts]


def test_no_path_of_a_machine_in_the_project():
    bad = re.compile(r"(?<![\w.])/(?:home|root|work|Users|tmp|opt)/[\w.-]+")
    found = []
    for path in tracked():
        if path.suffix in (".png", ".gz") or path.name in ("test_project.py", "LICENSE"): continue
        found += [f"{path.relative_to(ROOT)}: {m}" for m in bad.findall(path.read_text(errors="ignore"))]
    assert not found


def requirement_names(key):
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini")
    return [line.split(";")[0].strip() for line in config["DEFAULT"][key].splitlines() if line.strip()]


def test_every_requirement_is_pinned_once_and_says_why():
    pins = re.findall(r"^([\w-]+)(?:==|<)", (ROOT/"constraints.txt").read_text(), re.M)
    assert len(set(pins)) == len(pins)
    names = requirement_names("requirements") + requirement_names("dev_requirements")
    assert set(names) <= set(pins), set(names) - set(pins)
    for line in (ROOT/"settings.ini").read_text().splitlines():
        if line.startswith("    "): assert re.search(r";\s*\w+", line), f"no reason given: {line}"


def test_readme_is_generated_from_the_index():
    sys.path.insert(0, str(ROOT/"tools"))
    from make_readme import readme
    assert (ROOT/"README.md").read_text() == readme(), "run `make readme`"


def test_every_notebook_is_in_the_sidebar():
    sidebar = (ROOT/"nbs"/"sidebar.yml").read_text()
    assert [n.name for n in NUMBERED if n.name not in sidebar] == []


@pytest.mark.parametrize("notebook", NUMBERED, ids=lambda p: p.stem)
def test_imports_stand_in_cells_of_their_own(notebook):
    "nbdev runs cells with imports when it makes the docs: code beside them would run without what comes before."
    for source in code(notebook):
        try: body = ast.parse(source).body
        except SyntaxError: continue
        is_import = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert all(is_import) or not any(is_import), source[:200]
