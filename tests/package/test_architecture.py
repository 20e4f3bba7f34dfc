"""The architecture of `ejk/`, by numbers: `python tests/architecture.py` prints them all."""

import architecture
import pytest

pytestmark = pytest.mark.fast

BUDGETS = architecture.budgets(architecture.Package())


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.title)
def test_of_the_package(budget):
    if len(budget.offenders) > budget.at_most:
        found = "\n  ".join([f"{len(budget.offenders)} {budget.title}:", *budget.offenders])
        pytest.fail(f"at most {budget.at_most}, but {found}", pytrace=False)


FAULTY = {
    "__init__.py": "",
    "_dispatch.py": "from ejk import _page_attention",  # reaches backends: of the public floor
    "_page_attention.py": "from ejk.backends.triton import kernel",
    "_long.py": "\n" * 301,
    "_one.py": "import ejk._two",
    "_two.py": "def f():\n    import ejk._one",
    "_tested.py": "from ejk.testing import oracle",
    "cli/check.py": "from ejk.testing import oracle",
    "testing/__init__.py": "from ejk import _page_attention",
    "testing/oracle/__init__.py": "import numpy, jax",
    "paging/__init__.py": "from ejk.paging._pages import Pages",
    "paging/_pages.py": "import hashlib, jax\nimport numpy.typing as npt\nfrom ejk import _two",
    "backends/__init__.py": "",
    "backends/_fields.py": "def check(x, *, y: int, **z): ...",
    "backends/page_attention.py": "from .. import _dispatch",
    "backends/reverse_mode/__init__.py": "from ejk.backends.xla import page_attention",
    "backends/triton/__init__.py": "",
    "backends/triton/kernel.py": "import triton\ndef f(x):" + "\n    pass" * 61,
    "backends/triton/_launch.py": "import triton\n@triton.jit\ndef f(x): ...",
    "backends/triton/backend.py": (
        "from ejk.backends.xla.page_attention import _hidden\n"
        "from ejk.backends.triton import _launch\n_launch._kept()\ndef f():\n    '''"
        + "\n" * 60
        + "'''"
    ),
    "backends/xla/__init__.py": "",
    "backends/xla/page_attention.py": "_hidden = 1\ndef f():" + "\n    pass" * 60,
}
FOUND = {
    "turning_back": [
        "ejk._tested:1 imports all of ejk.testing.oracle",
        "ejk.backends.page_attention:1 imports all of ejk._dispatch",
        "ejk.backends.triton.backend:1 imports _hidden of ejk.backends.xla.page_attention",
    ],
    "cycles": ["ejk._one -> ejk._two -> ejk._one"],
    "beyond_the_host": [
        "ejk.paging._pages:1 imports jax",
        "ejk.paging._pages:3 imports ejk",
        "ejk.testing.oracle:1 imports jax",
    ],
    "private_names": [
        "ejk.backends.triton.backend:1 imports _hidden of ejk.backends.xla.page_attention",
        "ejk.backends.triton.backend:3 reads _launch._kept",
    ],
    "long_functions": ["ejk.backends.xla.page_attention.f: 61 lines"],
    "untyped_parameters": [
        "ejk.backends._fields:1 check(x)",
        "ejk.backends._fields:1 check(z)",
    ],
    "long_modules": ["ejk/_long.py: 301 lines"],
}


@pytest.mark.parametrize("measure", FOUND)
def test_each_measure_finds_what_is_wrong(measure, tmp_path):
    for file, text in FAULTY.items():
        path = tmp_path / "ejk" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert getattr(architecture.Package(tmp_path), measure)() == FOUND[measure]
