"""Plain text from the files of a package: HTML, manual pages, dictionaries, fortunes and source code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import reduce
from html.parser import HTMLParser
from string import ascii_lowercase, ascii_uppercase, digits

MIN_CHARACTERS = 200  # of a document
MAX_CHARACTERS = 1_000_000  # longer ones are tables and generated code
MAX_REPLACED = 0.001  # share of the characters that are not UTF-8
MIN_LETTERS = 0.4  # share of the characters: below are tables, indices and drawings
JOINED = 2000  # characters of a document that joins short entries


def _words(text: str) -> set[str]:
    return set(text.split())


def documents(path: str, raw: bytes, index: str = "") -> Iterator[tuple[str, str]]:
    """The (name, text) of every document of a file that is worth reading.

    `path` is the one in the package: it says what the file is and names the documents; `raw` is the content,
    unpacked; `index` is the text of the index that belongs to a dictionary.
    """
    name = path.removesuffix(".gz")
    code = re.search(r"\.(py|[ch])$", name)
    texts: Iterable[str]
    if name.endswith(".dict.dz"):
        texts = joined(_MARKS.sub("", entry) for entry in dictionary(raw, index))
    elif "/games/fortunes/" in name:
        texts = joined(re.split(r"(?m)^%$\n?", decoded(raw)))
    else:
        converter = next((convert for kind, convert in _CONVERTERS.items() if re.search(kind, name)), str)
        texts = [converter(decoded(raw))]
    for number, text in enumerate(map(tidied, texts)):
        letters = len(text) if code else len(re.findall("[A-Za-z]", text))
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and letters >= MIN_LETTERS * len(text):
            yield f"{path}#{number}" if number else path, text


def decoded(raw: bytes) -> str:
    """The text of UTF-8 bytes; nothing if more than 0.1% of it had to be replaced."""
    text = raw.decode("utf-8", "replace")
    return text if text.count("\ufffd") <= MAX_REPLACED * len(text) else ""


def tidied(text: str) -> str:
    """Without carriage returns, spaces at the ends of lines and runs of blank lines."""
    text = re.sub(r"[ \t\r\f\v]+$", "", text.replace("\r\n", "\n"), flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def without_repeated_lines(texts: list[str]) -> list[str]:
    """Leave out lines of 20 characters or more that are on over 20% of the pages of a manual.

    Those are its name, links and copyright lines. Below 20 pages nothing is left out: too few to tell.
    """
    if len(texts) < 20:
        return texts
    counts = Counter(line for text in texts for line in {*text.split("\n")} if len(line) >= 20)
    often = {line for line, count in counts.items() if count > 0.2 * len(texts)}
    return [tidied("\n".join(line for line in text.split("\n") if line not in often)) for text in texts]


_DIGITS = ascii_uppercase + ascii_lowercase + digits + "+/"
# What stands on every entry of a dictionary: where it is from, and braces around links.
_MARKS = re.compile(r"\s*\[(?:1913 Webster|PJC|WordNet 1.5|Webster 1913 Suppl.|RP|R\. P\.)\]|[{}]")


def joined(entries: Iterable[str]) -> Iterator[str]:
    """Consecutive entries, a blank line between them, in texts of about JOINED characters."""
    text = ""
    for entry in entries:
        text += entry.strip("\n") + "\n\n"
        if len(text) >= JOINED:
            yield text
            text = ""
    yield text


def dictionary(data: bytes, index: str) -> Iterator[str]:
    """The entries of a dictd database in its own order, each once.

    A line of the index is: headword, offset, length, the two numbers in base 64.
    """
    entries: set[tuple[int, ...]] = set()
    for line in index.splitlines():
        word, *numbers = line.split("\t")[:3]
        if len(numbers) == 2 and not word.startswith("00"):  # 00-database-info and such
            entries.add(tuple(reduce(lambda n, d: 64 * n + _DIGITS.index(d), text, 0) for text in numbers))
    for offset, length in sorted(entries):
        yield decoded(data[offset : offset + length])


_LICENCE = re.compile(
    r"(?im)permission is hereby|above copyright notice|provided .as is|free software[;,:]|hope that it will"
    r"|received a copy of|redistribution and use|redistributions? |licensed under|you may (not use|obtain)"
    r"|limitations under|unless required by applicable|all rights reserved|general public licen[sc]e"
    r"|merchantability|derivative works|full license is|released under|permission to use"
    r"|subject to the terms|/licenses/|have been included|^\W*copyright"
)
_HEAD = re.compile(
    r"(?P<lead>(?:#!.*\n|#.*coding[:=].*\n|.*SPDX-License-Identifier.*\n|[ \t]*\n)*)"  # for machines
    r"(?:/\*(?P<block>(?s:.*?))\*/\n?|(?P<lines>(?:(?://|\#(?![a-z])).*\n)+))"
)


def without_licence(text: str) -> str:
    """A source file without the licence and copyright paragraphs of its first comment; other words stay."""
    head = _HEAD.match(text)
    if head is None or not _LICENCE.search(head[0]):
        return text
    comment = head["block"] or head["lines"]
    comment = re.sub(r"(?im)^[^\w\n]*(copyright|\(c\)).*\n?", "", comment)
    paragraphs = re.split(r"\n[ \t]*(?:\*+|//+|#+)?[ \t]*(?=\n)", "\n" + comment.rstrip(" \t\n"))
    kept = [part for part in paragraphs if part.strip("/*#-=+ \t\n") and not _LICENCE.search(part)]
    if head["block"] is not None:
        body = "/*" + "\n *".join(kept) + "\n */\n" if kept else ""
    else:
        body = "\n#".join(kept).lstrip("\n") + "\n" if kept else ""
    return (head["lead"] + body + text[head.end() :]).lstrip("\n")


_DROPPED = _words("script style nav head svg form button select noscript iframe template footer math object")
_VOID = _words("area base br col embed hr img input link meta param source track wbr")
_PARAGRAPHS = _words("p h1 h2 h3 h4 h5 h6 ul ol dl table pre blockquote section article figure hr")
_LINES = _words("div li tr dt dd br caption main header address details summary")
# Classes, roles and ids of what is on the page to move around in it.
_FURNITURE = _words(
    """NAVFOOTER NAVHEADER anchor apidoc_toc bottomlang breadcrumb breadcrumbs catlinks contentinfo contents
    copiable-link copyright doc-contents docnav editsection footer headerlink langs leftnav linenos menu
    menubar mobile-nav-chapters mw-editsection nav nav-chapters nav-panel nav-wrapper navbar navfooter
    navheader navigation navigation-header noprint nosearch page-nav prev-next-area printfooter quickview
    related search searchbox sidebar sitenav skip sphinxsidebar sr-only srclink t-navbar toc toctree-wrapper
    toplang topnav version-picker viewcode-link"""
)
# Texinfo's line of links, marks to link to a heading, and links to the pages around.
_MOVES = re.compile(
    r"^(?:(?:Next|Previous|Prev|Up): .*\[(?:Contents|Index)\].*|(?:Next|Previous|Prev|Up|Home|Top|Contents))$"
    r"|\[ <.*\[ Up ?:.*| ?[¶§]$", re.M | re.I
)  # fmt: skip


def html_text(page: str) -> str:
    """The text of a page: headings, paragraphs and code, without what is there to move around."""
    parser = _Html()
    parser.feed(page)
    parser.close()
    parser.end_line()
    return re.sub(r"\n{3,}", "\n\n", _MOVES.sub("", "\n".join(parser.lines)))


class _Html(HTMLParser):
    """Collects the lines of a page; what comes before its main part is left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.pending = ""  # the line so far
        self.skipped = ""  # the tag that began what is left out
        self.depth = self.preformatted = 0
        self.cell = False  # inside a table's row, which is one line

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Leave furniture out, and break lines where a block begins."""
        if self.skipped:
            self.depth += tag == self.skipped
            return
        marks = {
            mark for key, value in attrs if key in ("class", "role", "id") for mark in (value or "").split()
        }
        if tag in _DROPPED or marks & _FURNITURE:
            if tag not in _VOID:
                self.skipped, self.depth = tag, 1
            return
        self._block(tag)
        if tag == "main" or marks & {"main", "apicontent"}:
            self.lines, self.pending = [], ""
        self.preformatted += tag == "pre"
        self.cell = self.cell or tag in ("td", "th")
        if tag in ("td", "th") and self.pending:
            self.pending += "\t"
        if tag in ("li", "dd"):
            self.pending = "- " if tag == "li" else "\f"
        elif "classifier" in marks:  # Sphinx's types of parameters
            self.pending += " : "

    def handle_endtag(self, tag: str) -> None:
        """End a block or what is left out."""
        if self.skipped:
            self.depth -= tag == self.skipped
            self.skipped = self.skipped if self.depth else ""
            return
        self.cell = self.cell and tag not in ("tr", "table")
        self._block(tag)
        self.preformatted -= tag == "pre" and self.preformatted > 0

    def handle_data(self, data: str) -> None:
        """Collect text; only <pre> keeps its spaces and line ends."""
        if not self.skipped:
            self.pending += data if self.preformatted else re.sub(r"\s+", " ", data)

    def _block(self, tag: str) -> None:
        if self.cell and tag in ("p", "div", "br"):
            self.pending += " "
        elif tag in _PARAGRAPHS or tag in _LINES:
            self.end_line()
            if tag in _PARAGRAPHS and not self.pending:
                self.lines.append("")

    def end_line(self) -> None:
        """End the line; a list item or a definition whose text is in a block of its own goes on."""
        text = self.pending
        if self.preformatted:
            self.lines += text.strip("\n").split("\n")
        elif text.strip(" -\f"):
            indent = "    " if text.lstrip(" ").startswith("\f") else ""
            self.lines.append(indent + re.sub(r" *\t[ \t]*", "\t", re.sub("[ \f]+", " ", text)).strip())
        elif text.strip(" "):
            return
        self.pending = ""


_GLYPHS = {
    pair[:-2]: pair[-1]
    for pair in _words("""em=— en=– hy=- aq=' dq=" lq=“ rq=” oq=‘ cq=’ bu=• co=© ha=^ ti=~ ga=` rs=\\ mu=×
    +-=± ->=→ de=° mc=µ at=@ sh=# Do=$ ba=| sl=/ pl=+ mi=− -=- e=\\ \\=\\ '=' `=` .=.""")
} | {" ": " ", "0": " ", "~": " ", "t": "\t"}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?:["#].*|f(?:\(..|\[[^]]*\]|.)|s[+-]?\d|[*n](?:\(..|\[[^]]*\]|.)|[hvwlLmDX](?:'[^']*'|\[[^]]*\])"""
    r"""|\((?P<two>..)|\[(?P<long>[^]]*)\]|(?P<one>.))"""
)
_END_OF_SKIPPED = {"TS": ".TE", "EQ": ".EN", "ig": "..", "de": ".."}  # tables, equations, definitions


def roff_text(page: str) -> str:
    """The text of a manual page in the man macros; nothing of a page in other macros."""
    body = f"\n{page}".partition("\n.TH ")[2]
    parts: list[str] = []
    end, title, until = " ", False, ""  # what follows a line; it is a heading; what ends what is left out
    for raw in body.replace("\\\n", "").split("\n")[1:]:
        macro = re.match(r"[.'][ \t]*(\w*)(.*)", raw)
        name, words = (macro[1], _arguments(macro[2])) if macro else ("", [_unescaped(raw)])
        text = ("" if re.fullmatch("[BIR]{2}", name) else " ").join(words)
        if until:
            until = "" if raw.startswith(until) else until
        elif not macro or (words and re.fullmatch("[BIR]{1,2}|S[BM]", name)):
            parts.append(f"{text}\n    " if title else text.strip() + end if end == " " else text + end)
            title = False
        elif name in _END_OF_SKIPPED:
            until = _END_OF_SKIPPED[name]
        elif name in ("nf", "EX", "Vb", "fi", "EE", "Ve"):
            end = "\n" if name in ("nf", "EX", "Vb") else " "
            parts.append("\n")
        elif name in ("SH", "SS", "PP", "P", "LP", "HP", "IP", "TP", "TQ", "sp", "Sp", "br"):
            parts.append("\n" if name in ("br", "TQ") else "\n\n")
            title = name in ("TP", "TQ") or (name in ("SH", "SS") and not words)
            if words and name in ("SH", "SS", "IP"):
                bullet = name == "IP" and words[0] in "•·o*-"
                parts.append("- " if bullet else f"{words[0]}\n    " if name == "IP" else f"{text}\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", "".join(parts))).strip("\n")


def _arguments(text: str) -> list[str]:
    """The arguments of a macro without their escapes; double quotes hold one together."""
    words = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', re.sub(r'\\".*', "", text))
    return [_unescaped(quoted.replace('""', '"') or plain) for quoted, plain in words]


def _unescaped(text: str) -> str:
    """A line of roff without its escapes."""
    return _ESCAPE.sub(lambda found: _GLYPHS.get(found["two"] or found["long"] or found["one"], ""), text)


_CONVERTERS = {r"\.x?html?$": html_text, r"/man/man\d/": roff_text, r"\.(py|[ch])$": without_licence}
