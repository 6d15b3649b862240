"""The corpus from package archives: plain text, filters, and builds of tiny packages without a network."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch import corpus, corpus_text
from launch.corpus import CorpusError, Package

PROSE = "The quick brown fox jumps over the lazy dog and wonders about it. " * 4


def test_html_keeps_the_text_and_drops_what_is_there_to_move_around() -> None:
    page = """<head><title>no</title></head><body><div>no</div><main><nav><ul><li>no<li>no</ul></nav>
      <div class="sphinxsidebar"><div>no</div>no</div><script>no()</script>
      <h1>Title<a class="headerlink">¶</a></h1><p>One <b>bold</b> &amp; word.<p>Two.
      <ul><li>first</li><li><p>second</p></li></ul><pre>def f():
    return  1</pre>
      <table><tr><td>a</td><td>b</td></tr><tr><td><p>c</p></td><td><p>d</p></td></tr></table>
      <dl><dt>term</dt><dd>meaning</dd></dl></body></html>"""
    assert corpus_text.html_text(page).strip() == (
        "Title\n\nOne bold & word.\n\nTwo.\n\n- first\n- second\n\ndef f():\n    return  1\n\n"
        "a\tb\nc\td\n\nterm\n    meaning"
    )


def test_html_that_is_not_well_formed_still_gives_its_text() -> None:
    for page in ("<p>a<nav>b", "</div></main>a", "<pre>a", "<main><p>a", "<td>a</p>"):
        assert corpus_text.html_text(page).strip() == "a"


def test_roff_becomes_readable_text() -> None:
    page = r"""'\" t
.TH LS 1 2020-01-01
.SH NAME
ls \- list \fIdirectory\fP contents
.PP
Use \(lqls\(rq with
.BR dir (1),
.if t .B no
\(aqand so on. \" no
.TP
.B \-a
Show all.
.IP \(bu 2
Point.
.nf
  two  spaces
.fi
.TS
no	no
.TE
End."""
    assert corpus_text.roff_text(".Dd today\n.Sh NAME\n") == ""  # other macros
    text = "NAME\nls - list directory contents\n\nUse “ls” with dir(1), 'and so on.\n\n-a\n    Show all.\n\n"
    assert corpus_text.roff_text(page).rstrip() == text + "- Point.\n  two  spaces\n\nEnd."


def test_a_dictionary_is_cut_into_entries_each_once_and_in_order() -> None:
    index = "00-database-info\tA\tG\nbanana\tL\tG\napple\tG\tF\npomme\tG\tF\nbroken line\n"
    assert [*corpus_text.dictionary(b"headerapplebanana", index)] == ["apple", "banana"]
    assert [*corpus_text.dictionary(bytes(64) + b"x" * 10, "x\tBA\tK\n")] == ["x" * 10]  # base 64


def test_short_entries_are_joined_to_documents_of_some_length() -> None:
    found = [*corpus_text.documents("/games/fortunes/x", (PROSE + "\n%\n").encode() * 40)]
    assert len(found) == 5 and all(2000 <= len(text) < 2500 for _, text in found)


def test_the_licence_leaves_a_source_file_and_the_description_stays() -> None:
    licence = " * Copyright 2020 A\n * Permission is hereby\n *\n * PROVIDED 'AS IS'\n"
    code = "\n#include <a.h>\n/* Copyright is law */\n"
    text = f"/* SPDX-License-Identifier: MIT */\n/*\n * A driver.\n *\n{licence} */\n{code}"
    assert corpus_text.without_licence(text) == text.replace(f" *\n{licence}", "")
    assert corpus_text.without_licence(f"/*\n{licence} */\n{code}") == code.lstrip()
    python = "#!/bin/python\n# Copyright 2020 A\n#\n# Licensed under the Apache License\n\n# Adds.\nx = 1\n"
    assert corpus_text.without_licence(python) == "#!/bin/python\n\n# Adds.\nx = 1\n"


def test_a_source_file_without_a_licence_stays_as_it_is() -> None:
    for text in ("", "x = 1\n", "# a\n# b", "int a; /* Copyright */", "#define A 1\n"):
        assert corpus_text.without_licence(text) == text


def test_lines_that_most_pages_repeat_are_left_out() -> None:
    pages = [f"Chapter {number}\n\nWords.\n\nCopyright 2020 by everybody" for number in range(20)]
    assert corpus_text.without_repeated_lines(pages)[3] == "Chapter 3\n\nWords."
    assert corpus_text.without_repeated_lines(pages[:19]) == pages[:19]  # too few to tell


ALL = ["a:one.html", "a:two.html.gz", "b:three.html"]
PARTS = {"english": [Package("debian", name, r"\.html(\.gz)?$", 60) for name in ("a", "b")]}


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Packages of an archive, as name -> path -> content, in place of Debian's; an empty one fails."""
    pages = {
        "two.html.gz": gzip.compress(f"<p>Two. {PROSE}".encode()),
        **dict.fromkeys(("same.html", "one.html"), f"<p>{PROSE}".encode()),
        "short.html": b"<p>short",
        "long.html": b"<p>" + b"word " * 250_000,
        "latin1.html": b"<p>" + b"\xe9t\xe9 en France " * 40,
        "numbers.html": b"<p>" + b"1 2 3 4 5 " * 40,
        "copyright": b"Free for all.",
    }
    packages = {"a": pages, "b": {"three.html": f"<p>Three. {PROSE}".encode()}}

    def fetch(package: Package, folder: Path) -> corpus.Fetched | None:
        if package.name not in packages:
            return None
        if not packages[package.name]:
            raise CorpusError(f"{package.name}: no network")
        for name, content in packages[package.name].items():
            (folder / name).write_bytes(content)
        return folder, "1", [folder / "copyright"]

    monkeypatch.setattr(corpus, "_FETCH", {"debian": fetch})
    return packages


def build(out: Path, parts: dict[str, list[Package]] = PARTS) -> list[str]:
    """Build; return package:name of each document of the parts."""
    with ThreadPoolExecutor(1) as pool:
        corpus.build(out, parts, pool)
    files = [path for part in parts for path in sorted((out / part).iterdir())]
    return [f"{row['package']}:{row['name']}" for path in files for row in pq.read_table(path).to_pylist()]


def test_a_build_holds_the_documents_worth_reading_once(tmp_path: Path, archive: dict) -> None:
    assert build(tmp_path) == build(tmp_path / "again") == ALL
    for name in ("english/a.parquet", "english/b.parquet", "SOURCES.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert pq.read_table(tmp_path / "english/a.parquet")["text"][1].as_py() == f"Two. {PROSE}".strip()
    sources = json.loads((tmp_path / "SOURCES.json").read_text())["english"]
    assert (sources["documents"], sources["bytes"]) == (3, 3 * len(PROSE.strip()) + len("Two. Three. "))
    assert [(source["package"], source["documents"]) for source in sources["packages"]] == [
        ("a", 2),
        ("b", 1),
    ]
    assert (tmp_path / sources["packages"][0]["licence_file"]).read_text() == "Free for all."
    assert {path.name for path in tmp_path.iterdir()} == {"SOURCES.json", "again", "english", "licences"}


def test_a_build_goes_on_where_it_was_interrupted(tmp_path: Path, archive: dict) -> None:
    held, archive["b"] = archive["b"], {}
    with pytest.raises(CorpusError, match="no network"):
        build(tmp_path)
    assert not (tmp_path / "english").exists()
    archive.update(a={}, b=held)
    assert build(tmp_path) == ALL  # a was there
    archive["b"] = {}
    assert build(tmp_path) == ALL  # all was there


def test_another_recipe_builds_again_and_leaves_nothing_stale(tmp_path: Path, archive: dict) -> None:
    build(tmp_path)
    (tmp_path / "english/stale.parquet").write_bytes(b"stale")
    assert build(tmp_path, {"english": [Package("debian", "b", "html", 1)]}) == ALL[2:]
    build(tmp_path, {"c": PARTS["english"]})
    assert set(json.loads((tmp_path / "SOURCES.json").read_text())) == {"english", "c"}


def test_a_limit_on_a_package_takes_a_sample(tmp_path: Path) -> None:
    for n in range(50):
        (tmp_path / f"{n}.py").write_text("x" * 1000)
    chosen = corpus._chosen(tmp_path, Package("pypi", "p", r"\.py$", 0.01))
    assert len(chosen) == 10 and chosen == sorted(chosen) and chosen != sorted(tmp_path.iterdir())[:10]


def test_a_package_that_does_not_exist_is_a_warning(
    tmp_path: Path, archive: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Package("debian", "gone", "html", 1)
    assert build(tmp_path, {"english": [*PARTS["english"], gone]}) == ALL
    assert "warning: gone is not known here" in capsys.readouterr().err
    with pytest.raises(CorpusError, match="run `apt-get update` as root"):
        build(tmp_path, {"c": [gone]})


def test_debian_packages_are_found_behind_their_unnumbered_names(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {"python3-doc": "Version: 3.11\nDepends: python3.11-doc (>= 3.11.2-1~), libjs-sphinxdoc\n"}
    shown["python3.11-doc"] = "Version: 3.11.2-6\nDepends: libjs-sphinxdoc (>= 7)\n"
    monkeypatch.setattr(corpus, "_run", lambda command, folder, may_fail: shown.get(command[-1]))
    assert corpus._debian_version("python3-doc") == ("python3.11-doc", "3.11.2-6")
    assert corpus._debian_version("gone") == ("gone", None)


def test_a_command_that_fails_is_one_line_unless_the_failure_is_expected(tmp_path: Path) -> None:
    script = ["sh", "-c", 'printf "$0" >&2; exit 1']
    for message in (r"ERROR: disk full\nmore", r"ERROR: from versions: none\nNo matching distribution"):
        with pytest.raises(CorpusError, match=r"^[^\n]*: ERROR: [^\n]*; check the network, then run again$"):
            corpus._run([*script, message], tmp_path, corpus.UNKNOWN)
    assert corpus._run([*script, "No matching distribution"], tmp_path, corpus.UNKNOWN) is None
