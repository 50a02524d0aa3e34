"""Hook of MkDocs: pages made of files outside docs/, and links that lead to them.

README.md is the site's home. Every other file that a page links to becomes a page that shows it, with an anchor for
each line; a folder becomes a list of its files. So links to code work without a network, and show the code that the
page was written for. A link with a page's file name as its text gets the page's title instead. No file of the
repository changes.
"""

import json
import os
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Markdown outside docs/, by its page.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]+)?(?=\))")
NAMED = re.compile(r"\[(?:\w+/)?([\w-]+\.md)\]\(((?:[\w.]+/)*)\1")  # a link that shows the name of its page's file
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}


def page_of(path: str) -> str:
    """The page, or the file beside the pages, that shows a file or folder of the repository."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/") + ("/README.md" if (ROOT / path).is_dir() else "")
    return next((page for page, file in PAGES.items() if file == path), f"source/{path}.md")


def relinked(markdown: str, path: str) -> str:
    """The text of the repository's file `path`, with its links changed for its page."""

    def link(match: re.Match) -> str:
        target = page_of(normpath(f"{dirname(path)}/{match[1]}".lstrip("/")))
        line = re.match(r"#L(\d+)", match[2] or "")
        return relpath(target, dirname(page_of(path)) or ".") + (
            f"#__codelineno-0-{line[1]}" if line else match[2] or ""
        )

    return LINK.sub(link, markdown)


def linked(markdown: str, path: str) -> set[str]:
    """Files and folders of the repository that a text links to and that have no page of their own."""
    found = {normpath(f"{dirname(path)}/{match[1]}".lstrip("/")) for match in LINK.finditer(markdown)}
    return {one for one in found if page_of(one).startswith("source/")}


def shown(path: str) -> tuple[str, set[str]]:
    """The page of a file or folder outside docs/, and what it links to."""
    head = f"---\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n\n# `{path}`\n\n"
    if path.endswith(".ipynb"):
        cells = json.loads((ROOT / path).read_text())["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
        text = "\n\n".join(f"```python\n{text}\n```" if is_code else text for text, is_code in texts)
        return f"---\nhide: [navigation]\n---\n\n{relinked(text, path)}\n", set()
    if not (ROOT / path).is_dir():
        text = (ROOT / path).read_text()
        fence = "`" * 5
        language = LANGUAGES.get(Path(path).suffix, "text")
        return f'{head}{fence} {{.{language} linenums="1"}}\n{text}\n{fence}\n', set()
    files = sorted(one for one in (ROOT / path).iterdir() if one.name != "__pycache__" and not one.name.startswith("."))
    inside = [f"{path}/{one.name}" for one in files]
    lines = [f"- [`{one}`]({os.path.basename(path)}/{os.path.basename(one)}.md)" for one in inside]
    return head + "\n".join(lines) + "\n", set(inside)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for page, path in PAGES.items():
        texts[path] = (ROOT / path).read_text()
        files.append(File.generated(config, page, content=texts[path]))
    waiting = set().union(*(linked(text, path) for path, text in texts.items()))
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        content, more = shown(path)
        files.append(File.generated(config, page_of(path), content=content))
        waiting |= more - done
    return files


def titles_of(nav: Any) -> dict[str, str]:
    """Titles in the navigation, by the name of the page's file."""
    titles: dict[str, str] = {}
    for entry in nav:
        for title, below in entry.items():
            titles |= {below.rpartition("/")[2]: title} if isinstance(below, str) else titles_of(below)
    return titles


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    titles = titles_of(config.nav)
    named = NAMED.sub(lambda link: f"[{titles.get(link[1], link[1])}]({link[2]}{link[1]}", markdown)
    return relinked(named, PAGES.get(uri, f"docs/{uri}"))


def on_page_content(html: str, page: Page, **_: Any) -> None:
    """Tell MkDocs the anchors of code lines, since it checks anchors and does not see those in highlighted text."""
    page.present_anchor_ids = {*(page.present_anchor_ids or ()), *re.findall(r'id="(__codelineno-0-\d+)"', html)}
