"""Adds pages to the site that mkdocs.yml describes, beside those of this folder.

The navigation follows docs/index.md, in whose place the site begins with README.md. Files of the
repository that a page links to become pages, too, and so do the docstrings of the packages in API.
"""

import html
import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parents[1]
API = ("inference.predictor", "models", "losses", "metrics", "data", "training", "evaluation")
HOME = "index.md"
LINK = re.compile(r"(!?\[(?:[^][]|\[[^][]*\])*\])\((?!\w+:|#)([^()\s#]+)(#[^()\s]*)?\)")

ITEM = re.compile(r"\w+(\[\w+\])?(, \w+(\[\w+\])?)*: ")


def on_config(config):
    """Makes the navigation: the README, the groups of docs/index.md and the API."""
    nav = [{"Introduction": HOME}]
    index = (REPOSITORY / "docs" / HOME).read_text()
    for group, title, path in re.findall(r"(?m)^\*\*(.+)\*\*$|^- \[(.+?)\]\((.+?)\)", index):
        if group:
            nav.append({group: []})
        else:
            nav[-1][next(iter(nav[-1]))].append({title: path})
    nav.append({"Python": [f"api/{name}.md" for name in API]})
    config.nav = [item for item in nav if all(item.values())]
    return config


def on_files(files, config):
    """Adds the README, the API, and all files that pages link to."""
    for name in API:
        page = f"# dense_jax.{name}\n\n::: dense_jax.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=page))
    files.remove(files.get_file_from_path(HOME))
    pages = ["README.md", *(f"docs/{path}" for path in files.src_uris if path.endswith(".md"))]
    for path in pages:
        if path.startswith("docs/api/"):
            continue
        text = (REPOSITORY / path).read_text()
        if not path.endswith(".md"):
            hidden = "---\nhide: [toc]\nsearch:\n  exclude: true\n---\n"
            text = f"{hidden}# {path}\n\n````{Path(path).suffix[1:]}\n{text}\n````\n"
        elif linked := [_target(path, match) for match in LINK.finditer(text)]:
            pages += [new for new in linked if new not in pages and _is_outside(new)]
        if not path.startswith("docs/"):
            files.append(File.generated(config, _uri(path), content=text))


def on_page_markdown(markdown, page, **_):
    """Replaces links between files of the repository with links between pages."""
    path = _path(page.file.src_uri)
    if not path.endswith(".md"):
        return markdown

    def replaced(match):
        text, _, anchor = match.groups("")
        target = _target(path, match)
        if not (REPOSITORY / target).exists():
            return match[0]  # code, or a link that mkdocs reports
        if (REPOSITORY / target).is_dir():
            return text[1:-1]
        uri = posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri))
        return f"{text}({uri}{anchor})"

    return LINK.sub(replaced, markdown)


def on_page_content(content, page, files, **_):
    """Makes the links of notebooks lead to pages, and MathML of their formulas."""
    path = _path(page.file.src_uri)
    if not path.endswith(".ipynb"):
        return content

    def linked(match):
        file = files.get_file_from_path(_uri(_target(path, match)))
        if file is None:
            raise PluginError(f"{path} has a link to {match[2]}, which is no page")
        return match[1] + file.url_relative_to(page.file)

    def drawn(match):
        display = "block" if match[1] == "$$" else "inline"
        return convert(html.unescape(match[2]), display=display)

    content = re.sub(r"(\$\$?)([^$<]+)\1", drawn, content)
    return re.sub(r'(href=")(?!\w+:|#)([^"#]+)', linked, content)


def _target(path, match):
    """Returns the path in the repository to which a link in the file at `path` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))


def _is_outside(path):
    return not path.startswith("docs/") and (REPOSITORY / path).is_file()


def _uri(path):
    """Returns the path in the site's sources of the page of a file in the repository."""
    if path in ("README.md", "docs/index.md"):
        return HOME
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _path(uri):
    """Returns the path in the repository of the file of a page. Inverts `_uri`."""
    if uri == HOME:
        return "README.md"
    if not uri.startswith("repository/"):
        return f"docs/{uri}"
    path = uri.removeprefix("repository/")
    return path if (REPOSITORY / path).is_file() else path.removesuffix(".md")


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings: lists of lines `name: meaning`, code of indented lines."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = "\n".join(_markdown(obj.docstring.value.splitlines()))


def _markdown(lines):
    before = ""
    for line in lines:
        if not line:
            kind = ""
        elif before == "table" or re.match(r"\S.{0,40}?\S {2,}\S", line):
            kind = "table"
        elif line.startswith("    "):
            kind = "code"
        elif (line.startswith("  ") and before == "item") or (
            before != "text" and ITEM.match(line)
        ):
            kind = "item"
        else:
            kind = "text"
        if kind and before and kind != before:
            yield ""
        before = kind
        if kind == "table":
            yield f"    {line}"
        elif kind == "item" and not line.startswith("  "):
            names, meaning = line.split(": ", 1)
            yield f"- `{names}`: {_escaped(meaning)}"
        else:
            yield line if kind == "code" else _escaped(line)


def _escaped(line):
    """Escapes what Markdown would take for markup, outside of `code`."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
