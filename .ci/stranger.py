"""What somebody does who meets `ejk` for the first time, in an environment of their own.

Builds the wheel, or takes the one that is named, installs it, and goes on in an empty folder, where
no checkout is in the way: asks the doctor, works through the tutorial's first page, replaces one
call of a program, reads an error, does what it says.

python .ci/stranger.py             builds the wheel out of this checkout
python .ci/stranger.py ejk.whl     takes this one
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial_pages.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A decode step as a reader of JAX has it: one line names where the function is from.
PROGRAM = """
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

heads, kv_heads, dim, page, lens = 4, 2, 128, 16, np.array([20, 3])
rng = np.random.default_rng(0)
q = rng.standard_normal((2, heads, dim), np.float32)
k, v = rng.standard_normal((2, kv_heads, 8, page, dim), np.float32)
tables = np.array([[5, 2], [7, 0]], np.int32)
out = paged_attention(
    jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lens, jnp.int32),
    jnp.asarray(tables), pages_per_compute_block=1,
)
for s, n in enumerate(lens):  # the function leaves the scale to its caller
    for h in range(heads):
        keys, values = (x[h // 2][tables[s]].reshape(-1, dim)[:n] for x in (k, v))
        w = np.exp(keys @ q[s, h] - (keys @ q[s, h]).max())
        np.testing.assert_allclose(out[s, h], w @ values / w.sum(), atol=1e-4)
print("the numbers are right")
"""
THEIRS = "from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention"
OURS = "from ejk.compat.jax_tpu import paged_attention"

# A call with another library's word for the scale, and pools that lie as vLLM's do.
MISTAKES = """
import numpy as np, ejk
pool = np.ones((8, 16, 2, 64), np.float32)
query, lens, tables = np.ones((2, 4, 64), np.float32), np.array([20, 3]), np.array([[3, 5], [1, 0]])
out = ejk.page_attention(query, pool, pool, lens, tables, softmax_scale=0.125)
assert out.shape == (2, 4, 64) and (abs(out - 1) < 1e-6).all()
print("mended")
"""


class Stranger:
    """Somebody with a folder, an environment, and nothing else."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.desk = folder, folder / "desk"
        self.desk.mkdir()
        self.python = folder / "venv" / "bin" / "python"
        venv.create(folder / "venv", with_pip=True)

    def run(self, *arguments: str | pathlib.Path, codes: tuple[int, ...] = (0,)) -> str:
        """Run Python, which ends with one of these exit codes; return what it prints."""
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {name: x for name, x in os.environ.items() if name not in hidden}
        done = subprocess.run(
            [self.python, *arguments], cwd=self.desk, text=True, capture_output=True,
            env={**environment, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if done.returncode not in codes:
            sys.exit(f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout or done.stderr

    def program(self, source: str, codes: tuple[int, ...] = (0,)) -> str:
        """Write a program and run it."""
        path = self.desk / "program.py"
        path.write_text(source)
        return self.run(path, codes=codes)

    def install(self, wheel: pathlib.Path) -> None:
        self.run("-m", "pip", "install", "--quiet", f"{wheel}[cli]")
        print(self.run("-m", "pip", "check"), end="")
        where = self.run("-c", "import ejk; print(ejk.__file__)")
        assert str(self.folder) in where, f"{where} is not the wheel's"

    def doctor(self) -> None:
        # 1 where there is an accelerator, which JAX_PLATFORMS hides from all of this.
        said = self.run("-m", "ejk", "doctor", codes=(0, 1))
        print(said, end="")
        assert ("Nothing is to be mended." in said) != ("  mend: " in said)

    def tutorial(self) -> None:
        blocks = BLOCK.findall(TUTORIAL.read_text())
        assert blocks, f"{TUTORIAL} has no code"
        print(self.program("\n".join(blocks)), end="")

    def drop_in(self) -> None:
        assert PROGRAM.count(THEIRS) == 1
        print(self.program(PROGRAM.replace(THEIRS, OURS)), end="")

    def mend(self) -> None:
        """Make two mistakes, and change what the messages say, until it runs."""
        said = self.program(MISTAKES, codes=(1,)).splitlines()[-1]
        print(said)
        (theirs, ours) = re.findall(r"(softmax_scale).*\b(attn_scale)\b", said)[0]
        mended = MISTAKES.replace(theirs, ours)
        said = self.program(mended, codes=(1,)).splitlines()[-1]
        print(said)
        layout = re.findall(r"cache_layout=['\"]NHD['\"]", said)[0]
        print(self.program(mended.replace("0.125)", f"0.125, {layout})")), end="")


def build(folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        stranger = Stranger(folder)
        parts = {
            "install": lambda: stranger.install(wheel),
            "doctor": stranger.doctor,
            "tutorial": stranger.tutorial,
            "drop-in": stranger.drop_in,
            "mend": stranger.mend,
        }
        wheel = pathlib.Path(sys.argv[1]).resolve() if sys.argv[1:] else build(folder)
        for name, part in parts.items():
            begin = time.perf_counter()
            print(f"== {name}", flush=True)
            part()
            print(f"== {name}: {time.perf_counter() - begin:.1f} s\n", flush=True)


if __name__ == "__main__":
    main()
