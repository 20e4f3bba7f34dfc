"""Make a release: what is wrong with it, its packages, and whether a fresh environment takes them.

python .ci/release.py              checks everything and builds into dist/
python .ci/release.py --trial      builds even where something is wrong with the version
python .ci/release.py --upload     and, if nothing is wrong, uploads to PyPI
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")
HEADING = re.compile(r"^## (\S+) \((.*)\)$", re.MULTILINE)


def git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def version_of(root: pathlib.Path) -> str:
    return re.findall('"(.*)"', (root / "ejk" / "_version.py").read_text())[0]


def problems(root: pathlib.Path, *, upload: bool) -> list[str]:
    """Say what keeps a checkout from being released, each with what mends it."""
    found, version = [], version_of(root)
    if not VERSION.fullmatch(version):
        found.append(f"ejk/_version.py: {version} is no version such as 1.2.3 or 1.2.3rc1")
    headings = HEADING.findall((root / "CHANGELOG.md").read_text())
    newest, date = headings[0] if headings else ("nothing", "")
    if newest != version:
        found.append(f"CHANGELOG.md: begins with {newest}, not with {version}")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"CHANGELOG.md: {version} ({date}) needs its date, as in (2026-01-31)")
    if git(root, "status", "--porcelain"):
        found.append("the checkout has changes that are not committed: commit or stash them")
    head, tagged = git(root, "rev-parse", "HEAD"), git(root, "rev-list", "-1", f"v{version}", "--")
    if tagged and tagged != head:
        found.append(f"v{version} is another commit's tag: choose a new version")
    if upload and not tagged:
        found.append(f"nothing is tagged v{version}: git tag v{version} and push it")
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    if upload and not settings["hooks"]["custom"]["repository"]:
        found.append("pyproject.toml: `repository` is empty, and a reader of PyPI needs its links")
    return found


def run(*command: str | pathlib.Path) -> None:
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--upload", action="store_true")
    asked = parser.parse_args()
    found = problems(ROOT, upload=asked.upload)
    for problem in found:
        print(problem, file=sys.stderr)
    if found and (asked.upload or not asked.trial):
        sys.exit(1)
    version, dist = version_of(ROOT), ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist)  # the wheel out of the sdist
    packages = sorted(dist.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *packages)
    run(sys.executable, ".ci/resolve.py")
    run(sys.executable, ".ci/stranger.py", *dist.glob("*.whl"))
    if asked.upload:
        run(sys.executable, "-m", "twine", "upload", *packages)
    elif not found:
        print(
            f"dist/ is ready. To release: git tag v{version}, push it, make release ARGS=--upload"
        )


if __name__ == "__main__":
    main()
