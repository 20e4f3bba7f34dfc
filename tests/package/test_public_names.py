"""Public names are those of `ejk`: in `__all__`, in `help()`, in a repr, in a pickle."""

import inspect
import pathlib
import pickle
import pydoc
import re
import types

import pytest

import ejk
import ejk.testing

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parents[2]
PRIVATE = re.compile(r"ejk(?:\.\w+)*\._\w[\w.]*|ejk\.backends\.[\w.]+")
NAMES = [
    (package, name)
    for package in (ejk, ejk.paging)
    for name in package.__all__
    if not isinstance(getattr(package, name), types.ModuleType)
]
IDS = [f"{package.__name__}.{name}" for package, name in NAMES]


def test_all_is_what_a_type_checker_takes_for_public():
    for package in (ejk, ejk.paging, ejk.testing):
        source = pathlib.Path(package.__file__).read_text()
        reexported = re.findall(r"\b(\w+) as \1\b", source)
        assert sorted(package.__all__) == sorted({*reexported} - {"__version__"})


def test_all_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    names = IDS + [f"ejk.testing.{name}" for name in ejk.testing.__all__]
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", reference)]


@pytest.mark.parametrize("package, name", NAMES, ids=IDS)
def test_of_a_name(package, name):
    public = getattr(package, name)
    assert (public.__module__, public.__qualname__) == (package.__name__, name)
    assert not PRIVATE.search(repr(public))
    title, *signature = pydoc.plain(pydoc.render_doc(public, "%s")).splitlines()[:4]
    kind = "class" if inspect.isclass(public) else "function"
    assert title == f"{kind} {name} in module {package.__name__}"
    if inspect.isfunction(public):
        assert not PRIVATE.search("\n".join(signature))
    assert pickle.loads(pickle.dumps(public)) is public


def test_what_was_pickled_by_another_name_is_read():
    """Before, a pickle named the module that a class is written in."""
    older = b"cejk.backends.triton.page_attention.backend\nTritonPageAttention\n."
    assert pickle.loads(older) is ejk.TritonPageAttention
    backend = ejk.TritonPageAttention(num_warps=8)
    assert pickle.loads(pickle.dumps(backend)) == backend


def test_an_error_is_the_packages_own():
    with pytest.raises(ejk.UnsupportedError) as raised:
        raise ejk.UnsupportedError("no")
    assert f"{raised.type.__module__}.{raised.typename}" == "ejk.UnsupportedError"


def test_a_star_brings_the_public_names_alone():
    brought: dict[str, object] = {}
    exec("from ejk import *", brought)
    assert {*brought} - {"__builtins__"} == {*ejk.__all__}
