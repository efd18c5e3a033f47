"""Check every link inside a built site: `python dev/links.py docs/_build`.

A link leads to a file of the site and, behind `#`, to an id in it. Links to other sites are counted and not followed.
"""

# ruff: noqa: T201
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKS = {"a": "href", "img": "src", "script": "src", "link": "href", "iframe": "src"}


class Page(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note what the tag points to, and what may be pointed at."""
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag in LINKS and attrs.get(LINKS[tag]):
            self.links.append(attrs[LINKS[tag]])


def broken(site: str | Path) -> tuple[list[str], int, int]:
    """Links of a folder of HTML pages that lead nowhere, the number of all inside it, and of those that leave it."""
    site = Path(site).resolve()
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    pages = {path: Page(path.read_text("utf-8")) for path in files}
    wrong, inside, outside = [], 0, 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside += 1
                continue
            inside += 1
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            there = target.is_file() and target.is_relative_to(site)
            anchor = unquote(parts.fragment)
            if not there or (anchor and target in pages and anchor not in pages[target].ids):
                wrong.append(f"{path.relative_to(site)}: {link}")
    return wrong, inside, outside


if __name__ == "__main__":
    wrong, inside, outside = broken(sys.argv[1])
    print("\n".join(wrong))
    print(f"{inside} links inside, {len(wrong)} of them broken; {outside} to other sites")
    sys.exit(bool(wrong) or not inside)
