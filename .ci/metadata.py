"""What a package says of itself that follows from one name: where the repository is.

`pyproject.toml` names the repository once. Its addresses, and the links of the README, which are
relative, are made of it. Without one nothing leads nowhere: there are no addresses, of the README's
links to files the text stays, and `.ci/release` uploads nothing.
"""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {
    "Homepage": "",
    "Documentation": "/tree/{version}/docs",
    "Changelog": "/blob/{version}/CHANGELOG.md",
    "Issues": "/issues",
}
LINK = re.compile(r"(!?)\[((?:!\[[^]]*\]\([^)]*\)|[^]])*)\]\((?![a-z]+:|#)([^)]+)\)")


def absolute(text: str, repository: str, version: str) -> str:
    """Make the links of a page of Markdown lead to the files of a version, or leave their text."""

    def replaced(link: re.Match[str]) -> str:
        if not repository:
            return "" if link[1] else absolute(link[2], repository, version)
        kind = "raw" if link[1] else "blob"
        inside = absolute(link[2], repository, version)  # an image may be a link
        return f"{link[1]}[{inside}]({repository}/{kind}/{version}/{link[3]})"

    return LINK.sub(replaced, text)


class Metadata(MetadataHookInterface):
    """Fills in `urls` and `readme`, which `pyproject.toml` leaves to it."""

    def update(self, metadata: dict) -> None:
        root, repository = pathlib.Path(self.root), self.config["repository"].rstrip("/")
        readme = (root / "README.md").read_text(encoding="utf-8")
        source = (root / "ejk" / "_version.py").read_text(encoding="utf-8")
        version = "v" + re.findall('"(.*)"', source)[0]
        pages = PAGES.items() if repository else ()
        metadata["urls"] = {name: repository + page.format(version=version) for name, page in pages}
        readme = absolute(readme, repository, version)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
