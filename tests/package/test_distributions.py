"""The wheel and the sdist hold what they should and nothing else, and a release is checked."""

import email
import importlib.util
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import ejk

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"ejk-{ejk.__version__}"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git {arguments[0]}: {done.stderr}")
    return done.stdout


def files():
    """Everything that is, or would be, committed."""
    return set(git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").split("\n")[:-1])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return folder


def test_the_wheel_is_the_package_and_its_metadata(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    about |= {"entry_points.txt"} if "scripts" in PROJECT else set()
    package = {name for name in files() if name.startswith("ejk/")}
    assert names == package | {f"{NAME}.dist-info/{name}" for name in about}
    assert "ejk/py.typed" in names
    assert all(name.startswith("ejk/testing/") for name in names if "test" in name)
    assert metadata["Version"] == ejk.__version__ and metadata["Requires-Python"] == ">=3.12"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {*metadata.get_all("Provides-Extra", [])} == {*PROJECT["optional-dependencies"]}
    assert metadata.get_payload().startswith("# ejk")


def test_the_sdist_is_what_is_committed(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    assert names == files() | {"PKG-INFO"}


def test_addresses_follow_from_one_name():
    metadata = pytest.importorskip("hatchling") and loaded("metadata")
    hook = metadata.Metadata(str(ROOT), {"repository": "https://example.org/ejk/"})
    filled = {}
    hook.update(filled)
    assert all(url.startswith("https://example.org/ejk") for url in filled["urls"].values())
    assert f"https://example.org/ejk/blob/v{ejk.__version__}/" in filled["readme"]["text"]
    assert all("//" not in url.removeprefix("https://") for url in filled["urls"].values())
    assert not re.search(r"\]\((?!https?://|#)", filled["readme"]["text"])
    hook.config["repository"] = ""
    hook.update(filled)
    assert not filled["urls"]
    assert not re.search(r"\]\((?!https?://|#)", filled["readme"]["text"])
    assert "Start: Install · Tutorial · Concepts" in filled["readme"]["text"]
    given = (ROOT / "pyproject.toml").read_text()
    assert len(re.findall("^repository = ", given, re.MULTILINE)) == 1 and "urls" not in PROJECT


def test_links_become_absolute():
    absolute = loaded("metadata").absolute if importlib.util.find_spec("hatchling") else None
    if absolute is None:
        pytest.skip("hatchling is not installed")
    text = "[a](docs/a.md#b) ![c](c.svg) [![c](c.svg)](d.md) [e](https://e.org) [f](#f)"
    assert absolute(text, "R", "v1") == (
        "[a](R/blob/v1/docs/a.md#b) ![c](R/raw/v1/c.svg) [![c](R/raw/v1/c.svg)](R/blob/v1/d.md) "
        "[e](https://e.org) [f](#f)"
    )
    assert absolute(text, "", "v1") == "a   [e](https://e.org) [f](#f)"


@pytest.fixture
def checkout(tmp_path):
    """A checkout that can be released."""
    for name, text in {
        "ejk/_version.py": '__version__ = "1.2.3"\n',
        "CHANGELOG.md": "# Changes\n\n## 1.2.3 (2026-01-31)\n\n## 1.2.2 (2026-01-01)\n",
        "pyproject.toml": '[tool.hatch.metadata.hooks.custom]\nrepository = "https://e.org/ejk"\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    git(tmp_path, "tag", "v1.2.3")
    return tmp_path


def commit(folder):
    git(folder, "add", ".")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@e.org", "commit", "-q", "-m", "all")


def edited(file, old, new):
    def edit(folder):
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))

    return edit


FAULTS = {
    "ejk/_version.py: 1.2 is no version": [edited("ejk/_version.py", "1.2.3", "1.2")],
    "CHANGELOG.md: begins with 1.2.3, not with 1.2.4": [
        edited("ejk/_version.py", "1.2.3", "1.2.4")
    ],
    "CHANGELOG.md: 1.2.3 (unreleased) needs its date": [
        edited("CHANGELOG.md", "2026-01-31", "unreleased")
    ],
    "the checkout has changes": [edited("CHANGELOG.md", "# Changes", "# Changed")],
    "v1.2.3 is another commit's tag": [edited("CHANGELOG.md", "# Changes", "# Changed"), commit],
    "nothing is tagged v1.2.3": [lambda folder: git(folder, "tag", "-d", "v1.2.3")],
    "pyproject.toml: `repository` is empty": [edited("pyproject.toml", "https://e.org/ejk", "")],
}


@pytest.mark.parametrize("said", FAULTS)
def test_what_keeps_a_version_from_being_released(said, checkout):
    problems = loaded("release").problems
    assert problems(checkout, upload=True) == []
    for change in FAULTS[said]:
        change(checkout)
    assert [p for p in problems(checkout, upload=True) if p.startswith(said)]


def test_every_supported_python_is_tried():
    """The classifiers are what `.ci/resolve.py` reads, and begin where `requires-python` does."""
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert pythons[0] == PROJECT["requires-python"].removeprefix(">=")
    minors = [int(version.split(".")[1]) for version in pythons]
    assert minors == [*range(minors[0], minors[-1] + 1)] and len(minors) >= 3
