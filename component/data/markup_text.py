"""The text of HTML and Markdown: what a reader sees, without scripts, styles and navigation.

Paragraphs are one blank line apart, list items and table rows are lines of their own, cells stand between " | ", and
preformatted text keeps its lines.
"""

import codecs
import re
import warnings
from typing import Any

from longqlora.cli import require_extra
from longqlora.data.clean_text import clean_text, one_line

SKIPPED_TAGS = frozenset(
    "script style noscript template head nav svg iframe object button select textarea audio video canvas rp".split()
)
SKIPPED_ROLES = frozenset("navigation banner contentinfo search menu menubar toolbar doc-pagebreak".split())
PARAGRAPH_TAGS = frozenset(
    "address article aside blockquote body center details div dl fieldset figure figcaption footer form h1 h2 h3 h4 h5 "
    "h6 header hgroup hr main ol p pre section table ul caption".split()
)
LINE_TAGS = frozenset("dd dt li summary tr".split())
CONTENT_TAGS = frozenset(("main", "article", "section", "blockquote"))
# What makes a table a layout of the page, not data: these within a cell.
LAYOUT_TAGS = ["table", "h1", "h2", "h3", "h4", "ul", "ol", "pre", "blockquote"]
SPACE = re.compile(r"[ \t\r\n\f]+")
CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w\-:.]+)|<\?xml[^>]{0,100}?encoding=["']([\w\-:.]+)"""
)
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.S)


def read_html(data: bytes, name: str) -> tuple[str | None, str]:
    """Title where there is one, and text, of an HTML or XHTML file. `name` is the file's, for the ValueError."""
    return html_text(decode_html(data, name), name)


def read_markdown(text: str, name: str) -> tuple[str | None, str]:
    """Title (of the front matter, or the first heading) and text of Markdown, tables included."""
    require_extra("markdown_it", "markdown-it-py")
    from markdown_it import MarkdownIt

    front = FRONT_MATTER.match(text)
    named = re.search(r"^title:[ \t]*(.+)$", front[1], re.M) if front else None
    rendered = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text[front.end() :] if front else text)
    )
    title, text = html_text(rendered, name)
    return (one_line(named[1].strip("\"' ")) or title) if named else title, text


def decode_html(data: bytes, name: str) -> str:
    """Text of HTML bytes in the encoding that their byte order mark or declaration names, else UTF-8 or cp1252."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace").removeprefix("\ufeff")
    declared = CHARSET.search(data[:4096].lower())
    name_declared = (declared[1] or declared[2]).decode("ascii", "replace") if declared else "utf-8"
    # As browsers do; and bytes that can be searched for a declaration are not UTF-16, whatever it says.
    names = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "utf-16": "utf-8"}
    for encoding in (names.get(name_declared, name_declared), "utf-8"):
        try:
            return data.decode(encoding)
        except (LookupError, UnicodeDecodeError, ValueError):
            continue
    if declared is None:
        return data.decode("cp1252", "replace")
    raise ValueError(f"{name} is declared as {name_declared}, but is neither that nor UTF-8; save it as UTF-8")


def html_text(markup: str, name: str) -> tuple[str | None, str]:
    """Title and text of HTML that is decoded already."""
    require_extra("bs4", "beautifulsoup4")
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    with warnings.catch_warnings():
        # XHTML is read with the HTML parser on purpose: it expands no entities of its own and forgives errors.
        warnings.simplefilter("ignore")
        try:
            soup = BeautifulSoup(markup, "html.parser")
        except (ParserRejectedMarkup, RecursionError):
            raise ValueError(f"{name} is not HTML that can be parsed; open and save it in a browser") from None
    heading = soup.find("title") or soup.find("h1")
    title = one_line(heading.get_text(" ")) if heading else ""
    return title or None, clean_text(MarkupWriter().write(soup))


class MarkupWriter:
    """Walks a parsed document and collects its visible text."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.line: list[str] = []
        self.gap = 0  # line breaks due before the next block
        self.bullet = ""
        self.lists: list[int | None] = []  # number of the next item of each open list; None: without numbers
        self.pre_depth = 0
        self.tables: list[bool] = []  # for each open table: whether it holds data
        self.row_depth = 0

    def write(self, root: Any) -> str:
        from bs4.element import CData, NavigableString, Tag

        # A stack of its own: markup may be nested deeper than Python's.
        stack = [(root, False)]
        while stack:
            node, is_end = stack.pop()
            if is_end:
                self.close(node.name)
            elif isinstance(node, Tag):
                if not is_hidden(node):
                    self.open(node)
                    stack.append((node, True))
                    stack += [(child, False) for child in reversed(node.contents)]
            elif type(node) in (NavigableString, CData):
                self.line.append(str(node) if self.pre_depth else SPACE.sub(" ", str(node)))
        self.end_block(2)
        return "".join(self.blocks)

    def open(self, tag: Any) -> None:
        name = tag.name
        if name == "br":
            self.line.append("\n")
        elif name in ("td", "th") and self.row_depth:
            self.line.append(" | " if tag.find_previous_sibling(["td", "th"]) else "")
        elif name in PARAGRAPH_TAGS:
            # A list within a list, and a paragraph within an item, stay with it.
            self.end_block(1 if self.lists and name != "pre" else 2)
        elif name in LINE_TAGS or name in ("td", "th"):
            self.end_block(1)
        if name == "li":
            self.begin_item(tag)
        elif name in ("ul", "ol"):
            self.lists.append(whole_number(tag.get("start"), 1) if name == "ol" else None)
        elif name == "pre":
            self.pre_depth += 1
        elif name == "table":
            self.tables.append(holds_data(tag))
        elif name == "tr" and self.tables and self.tables[-1]:
            self.row_depth += 1

    def close(self, name: str) -> None:
        if name == "tr" and self.tables and self.tables[-1]:
            self.row_depth -= 1
        if name in PARAGRAPH_TAGS:
            self.end_block(1 if len(self.lists) > 1 and name in ("ul", "ol") or self.lists and name == "p" else 2)
        elif name in LINE_TAGS or name in ("td", "th") and not self.row_depth:
            self.end_block(1)
        if name == "li":
            self.bullet = ""
        elif name in ("ul", "ol") and self.lists:
            self.lists.pop()
        elif name == "pre":
            self.pre_depth -= 1
        elif name == "table":
            self.tables.pop()

    def begin_item(self, tag: Any) -> None:
        number = self.lists[-1] if self.lists else None
        indent = "  " * (len(self.lists) - 1)
        if number is None:
            self.bullet = f"{indent}- "
        else:
            number = whole_number(tag.get("value"), number)
            self.bullet = f"{indent}{number}. "
            self.lists[-1] = number + 1

    def end_block(self, gap: int) -> None:
        """End the block under way; at least `gap` line breaks go before the next. A table row is never divided."""
        if self.row_depth:
            self.line.append(" ")
            return
        text = "".join(self.line)
        self.line.clear()
        if self.pre_depth:
            text = text.strip("\r\n")
        else:
            text = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip(" \n")
            if self.tables and self.tables[-1]:
                text = text.replace("\n", " ")
        if text.strip(" |\n\t"):
            self.blocks.append("\n" * (self.gap if self.blocks else 0) + self.bullet + text)
            self.gap, self.bullet = 0, ""
        self.gap = max(self.gap, gap)


def is_hidden(tag: Any) -> bool:
    """Whether a tag is not part of what a reader sees as the document."""
    if tag.name in SKIPPED_TAGS or tag.get("role") in SKIPPED_ROLES or "hidden" in tag.attrs:
        return True
    if tag.get("aria-hidden") == "true" or re.search(r"display\s*:\s*none", str(tag.get("style") or ""), re.I):
        return True
    if "pagebreak" in str(tag.get("epub:type") or ""):
        return True
    if tag.name in ("header", "footer"):
        # Those of the page, not of an article in it; a header with the title stays.
        is_of_page = not any(parent.name in CONTENT_TAGS for parent in tag.parents)
        return is_of_page and not (tag.name == "header" and tag.find("h1"))
    return False


def holds_data(table: Any) -> bool:
    """Whether a table is one of data, whose rows are lines; else it lays out a page."""
    if table.get("role") in ("presentation", "none") or table.find(LAYOUT_TAGS):
        return False
    return all(len(cell.find_all(["p", "div"], limit=2)) < 2 for cell in table.find_all(["td", "th"]))


def whole_number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()) else default
