"""Loads `ejk.paging` once more, under another name: changed, or only without the import hook."""

import importlib
import importlib.util
import itertools
import pathlib
import sys
import types

from ejk import paging

COPIES = itertools.count()


def load(file: str = "", right: str = "", wrong: str = "") -> types.ModuleType:
    """Load the package as it is, or with text of one of its files replaced by another."""
    copy = f"copied_paging_{next(COPIES)}"  # so that earlier ones can be pickled still
    sources = {}
    for path in pathlib.Path(paging.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            assert text.count(right) == 1, f"{right!r} is {text.count(right)} times in {path.name}"
            text = text.replace(right, wrong)
        name = copy if path.stem == "__init__" else f"{copy}.{path.stem}"
        sources[name] = compile(text.replace("ejk.paging", copy), f"{path}, changed", "exec")
    finder = Finder(sources)
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(copy)
    finally:
        sys.meta_path.remove(finder)


class Finder:
    """Finds and runs code by the names of modules."""

    def __init__(self, sources):
        self.sources = sources

    def find_spec(self, name, path=None, target=None):
        if name in self.sources:
            return importlib.util.spec_from_loader(name, self, is_package="." not in name)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.sources[module.__name__], module.__dict__)
