"""Resolve `ejk` with each of its extras, on every supported Python, for the newest and oldest jax.

Nothing is installed: `uv pip compile` reads what packages ask for. The oldest is what is chosen
when all that `pyproject.toml` asks for is as old as it may be. A line for each extra says which jax
that is, on each Python. glibc is 2.31, which libtpu asks for.

python .ci/resolve.py              all extras: minutes
python .ci/resolve.py cuda13 tpu   these
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
EXTRAS = sys.argv[1:] or ["", *PROJECT["optional-dependencies"]]
JAX = re.compile(r"^jax==(\S+)$", re.MULTILINE)


def resolve(extra: str, python: str, resolution: str) -> tuple[str, str]:
    """Return the jax that is chosen, and what is wrong if none is."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet",
        *(["--extra", extra] if extra else []), "--python-version", python,
        "--python-platform", "x86_64-manylinux_2_31", "--only-binary", ":all:",
        "--resolution", resolution,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = JAX.search(done.stdout)
    return (found[1], "") if found else ("none", done.stderr[-1500:])


def main() -> None:
    wanted = [(e, p, r) for e in EXTRAS for r in ("lowest-direct", "highest") for p in PYTHONS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(wanted, pool.map(lambda x: resolve(*x), wanted), strict=True))
    print(f"{'extra':10}", *(f"{p + ' oldest':14}{p + ' newest':14}" for p in PYTHONS))
    for extra in EXTRAS:
        kinds = [(p, r) for p in PYTHONS for r in ("lowest-direct", "highest")]
        print(f"{extra or '-':10}", *(f"{found[extra, *kind][0]:13}" for kind in kinds))
    for (extra, python, resolution), (_, error) in found.items():
        if error:
            print(f"\n[{extra}] on Python {python}, {resolution}:\n{error}", file=sys.stderr)
    sys.exit(any(error for _, error in found.values()))


if __name__ == "__main__":
    main()
