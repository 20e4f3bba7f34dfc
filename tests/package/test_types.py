"""What type checkers say of calls, and that integers and truths may be NumPy's."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from wrong_calls import decode as arguments

import ejk
from ejk.backends._fields import at_least

FOLDER = pathlib.Path(__file__).parents[1] / "typing"
CHECKERS = {  # by settings of their own, whatever the project's are
    "pyright": ["--project", str(FOLDER), "--pythonpath", sys.executable],
    "mypy": ["--config-file=", "--no-color-output", str(FOLDER)],
}
DIAGNOSTIC = re.compile(r"([\w./\\-]+\.py):(\d+)(?::\d+)?(?: -|:) error: ")


def marked(path):
    lines = path.read_text().splitlines()
    return {(path.name, n) for n, line in enumerate(lines, 1) if line.endswith("# error")}


@pytest.mark.parametrize("checker", CHECKERS)
def test_type_checkers_refuse_what_is_wrong_and_nothing_else(checker):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    wrong, right = FOLDER / "wrong_calls.py", FOLDER / "right_calls.py"
    found = subprocess.run(
        [sys.executable, "-m", checker, *CHECKERS[checker]],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent.parent,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    refused = {(pathlib.Path(file).name, int(n)) for file, n in DIAGNOSTIC.findall(found.stdout)}
    assert refused, found.stdout + found.stderr
    assert refused == marked(wrong) | marked(right), found.stdout


def test_sizes_of_a_plan_may_be_of_numpy():
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, max_blocks=80)
    of_numpy = {name: np.int64(size) for name, size in sizes.items()}
    lens = np.array([3, 500])
    plan = ejk.plan_page_attention(lens, **of_numpy, value_head_dim=np.int32(16))
    facts = ejk.plan_page_attention(lens, **sizes).facts
    assert plan.facts == facts and type(plan.facts.num_heads) is int


def test_fields_of_backends_may_be_of_numpy():
    @dataclasses.dataclass(frozen=True)
    class Backend:
        block_kv: Any

        def __post_init__(self):
            at_least(self, block_kv=16)

    value = Backend(np.int64(128)).block_kv
    assert value == 128 and type(value) is int
    with pytest.raises(ValueError, match=re.escape("block_kv=8 must be at least 16")):
        Backend(np.int64(8))


def test_return_lse_may_be_of_numpy():
    assert len(ejk.page_attention(**arguments(), return_lse=np.bool_(True))) == 2
    with pytest.raises(TypeError, match=r"^return_lse=1 must be a bool"):
        ejk.page_attention(**arguments(), return_lse=1)
