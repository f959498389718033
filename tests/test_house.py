"""The structure of the package, the picture of it, and the size of the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jbn
from benchmarks import flax_differences, readme

pytestmark = pytest.mark.core
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HOUSE = (ROOT / "docs" / "how" / "house.md").read_text(encoding="utf-8")
PICTURE = re.search(r"```\njbn/\n(.*?)```", HOUSE, re.DOTALL)[1]  # type: ignore[index]


def rooms() -> list[str]:
    """Return the files of the package in the order of the picture; of a folder without files, all that it has."""
    found: list[str] = []
    folders: list[str] = []  # those that a line is in, from the outermost on
    for line in PICTURE.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if depth:
            del folders[depth - 1 :]
            found.append("".join([*folders, name]))
            folders += [name] if name.endswith("/") else []
    return found


ROOMS = rooms()
FILES = sorted(str(path.relative_to(ROOT / "jbn")) for path in (ROOT / "jbn").rglob("*.py"))


def place(file: str) -> int:
    """Return how far down in the picture a file is: a folder's own ``__init__`` is where its last file is."""
    inside = [i for i, room in enumerate(ROOMS) if file == room or (room.endswith("/") and file.startswith(room))]
    folder = file.removesuffix("__init__.py")
    return max([*inside, *(i for i, room in enumerate(ROOMS) if folder != file and room.startswith(folder))])


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, at its top or later, each as far as it is one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports name the whole module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def file_of(module: str) -> str | None:
    """Return the file of the package that a name is imported from, or None."""
    keys = module.split(".")
    if keys[0] != "jbn":
        return None
    for end in range(len(keys), 0, -1):
        for name in ("/".join(keys[1:end]) + ".py", "/".join([*keys[1:end], "__init__.py"])):
            if name in FILES:
                return name
    return None


def test_the_picture_shows_every_room():
    whole = [room for room in ROOMS if room.endswith("/")]
    whole = [folder for folder in whole if not any(room != folder and room.startswith(folder) for room in ROOMS)]
    shown = {file for file in FILES if file in ROOMS or any(file.startswith(folder) for folder in whole)}
    assert set(FILES) - shown <= {f"{folder}__init__.py" for folder in ROOMS if folder.endswith("/")}
    assert all((ROOT / "jbn" / room).exists() for room in ROOMS)


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_upwards(file):
    used = {file_of(name) for name in imported(ROOT / "jbn" / file)} - {None, file}
    if "__init__.py" in used:  # the public names, which nothing below the command line may need
        assert file.startswith(("lab/", "studies/", "cli/")) or file == "__main__.py"
    below = {name for name in used - {"__init__.py"} if place(name) > place(file)}
    assert not below, (file, below)


def test_nobody_imports_whom_it_does_not_know():
    known = {"jbn": {"jbn"}, "benchmarks": {"jbn", "benchmarks"}, "notebooks": {"notebooks"}}
    for folder, allowed in known.items():
        for path in (ROOT / folder).rglob("*.py"):
            roots = {name.partition(".")[0] for name in imported(path)}
            assert roots & {"jbn", "benchmarks", "notebooks", "tests"} <= allowed, path


CORE = [
    file
    for file in FILES
    if not file.startswith(("linen/", "nnx/", "lab/", "studies/", "cli/")) and file != "__main__.py"
]


@pytest.mark.parametrize("file", CORE)
def test_the_core_imports_jax_and_numpy_only(file):
    extra = {"files.py": {"safetensors"}, "keras_files.py": {"h5py"}, "comparing/record.py": {"haiku"}}
    allowed = {"jax", "numpy", "jbn", *sys.stdlib_module_names} | extra.get(file, set())
    assert {name.partition(".")[0] for name in imported(ROOT / "jbn" / file)} <= allowed


@pytest.mark.parametrize("file", FILES)
def test_a_room_says_what_belongs_there(file):
    assert ast.get_docstring(ast.parse((ROOT / "jbn" / file).read_text(encoding="utf-8")))


def test_importing_jbn_imports_nothing_before_a_name_is_asked_for():
    code = "import sys, jbn; print('jax' in sys.modules); from jbn import *; print('jax' in sys.modules, bn_init)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(r"False\nTrue <function bn_init at .*>\n", out.stdout)
    assert set(jbn.__all__) <= set(dir(jbn))
    with pytest.raises(AttributeError, match="module 'jbn' has no attribute 'bn_forwards'"):
        _ = jbn.bn_forwards


def test_importing_jbn_imports_no_extra():
    extras = {"flax", "optax", "matplotlib", "rich", "jbn.lab", "jbn.studies"}
    code = f"import sys, jbn; jbn.check; print(sorted({extras} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_an_old_jax_is_refused_by_name():
    code = "import jax; jax.__version_info__ = (0, 7, 2); jax.__version__ = '0.7.2'; import jbn; jbn.check"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "ImportError: jbn needs jax 0.8 or newer; this is jax 0.7.2" in out.stderr


def test_no_file_is_long():
    for folder in ("jbn", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path


def test_every_public_name_is_documented():
    for name in [name for name in dir(jbn) if not name.startswith("_") and getattr(jbn, name) is not None]:
        public = getattr(jbn, name)
        if getattr(public, "__module__", "").startswith("jbn"):
            assert len(public.__doc__ or "") > 40, name


def test_the_readme_is_one_page():
    assert README.count("\n") <= 150
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line]) <= 10


def test_the_readme_says_what_its_examples_print(capsys):
    swap, function = BLOCKS
    exec(swap, {})
    mean, std, moved = map(float, capsys.readouterr().out.split())
    assert (abs(mean) < 1e-3, abs(std - 1) < 1e-3, abs(moved - 0.05) < 0.005) == (True, True, True)
    exec(function, {})
    mean, std, mean_by_state, std_by_state = map(float, capsys.readouterr().out.split())
    assert (abs(mean) < 1e-3, abs(std - 1) < 1e-3) == (True, True)
    assert (abs(mean_by_state) < 0.05, abs(std_by_state - 1) < 0.05) == (True, True)


def test_the_readme_has_two_commands():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]


# What jbn does in the table of differences, and what Flax does there: a prefix of the figure.
EXPECTED = {
    "largest error of y": (r"[1-9]e-07", r"1e\+03"),
    "largest masked output": ("0.0", "[1-9]"),
    "NaN in masked rows": ("finite", "NaN"),
    "y of bfloat16 x": ("bfloat16", "float32"),
    "a float32 state": ("float32", "float64"),
    "gradient through the new": ("no", "yes"),
    "gradient through the moments": ("yes", "TypeError"),
    "complex x": ("TypeError", "complex64"),
    "integer x": ("TypeError", "float32"),
    "boolean x": ("TypeError", "float32"),
    "running statistics after a NaN": ("kept", "NaN"),
    "running statistics after one": ("kept", "var moves"),
    "running statistics after no": ("kept", "NaN"),
    "one value per channel": ("ValueError", "y = 0"),
    "`epsilon` traced": ("TypeError", "accepted"),
    "`epsilon=0`": ("ValueError", "accepted"),
    "error of dx for nearly constant dy": (r"[12]e-03", r"[12]e-01"),
    "a bfloat16 state in training": ("ValueError", r"mean [34]\.\d for 5"),
    "a mask of examples": ("ValueError", "masks features"),
    "`momentum=1.5`": ("ValueError", "accepted"),
    "`use_fast_variance=False`": ("no effect", "changes y"),
    "training without passing": ("ValueError", "restarts"),
}


@pytest.mark.parametrize("difference", flax_differences.DIFFERENCES, ids=lambda d: d.item)
def test_what_differs_from_flax(difference):
    import flax.linen as nn

    import jbn.linen

    (ours, theirs), *more = (want for item, want in EXPECTED.items() if difference.item.startswith(item))
    assert not more
    with jax.numpy_rank_promotion("allow"):
        found = difference.look(jbn.linen.BatchNorm), difference.look(nn.BatchNorm)
    assert re.match(ours, found[0]), found
    assert re.match(theirs, found[1]), found
    assert f"| {difference.item} |" in readme.between("flax-differences")


def test_the_list_of_differences_is_closed():
    assert len(EXPECTED) == len(flax_differences.DIFFERENCES)
    assert readme.between("flax-differences").count("\n") == 2 + len(EXPECTED)
