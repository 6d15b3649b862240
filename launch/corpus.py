"""Build a text corpus from package archives: `python -m launch.corpus --help`."""

from __future__ import annotations

import argparse
import email
import gzip
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from launch.corpus_text import MIN_CHARACTERS, documents, without_repeated_lines

HELP = """\
Build a corpus of about 0.6 GB of text from what a machine without a hub can reach: the Debian package
archive (a Debian or Ubuntu machine; no root needed, nothing is installed) and PyPI.

  english   manuals, books, dictionaries and fortunes, from Debian's documentation packages
  c         a sample of the Linux kernel's sources, from Debian's linux-source
  python    well-known packages of PyPI and the running Python's standard library

DIR/english/*.parquet and so on hold the columns text, name and package; DIR/SOURCES.json says what came from
where, DIR/licences/ holds the licences. A build that was interrupted goes on where it was.

  1. apt-get update             as root, where the package lists are missing
  2. python -m launch.corpus --out corpus
  3. python -m train data=corpus
"""

FORMAT = 2  # changes when the same package would give other documents
MAX_FILE = 1_000_000  # bytes; longer files are tables and generated code
ROW_GROUP = 8_000_000  # bytes of text, about


class CorpusError(Exception):
    """One line for the user: which package, what is wrong, what helps."""


@dataclass(frozen=True)
class Package:
    """What is read of a package: the files whose path matches `take`, at most `max_mb` MB of them.

    The name has a version on PyPI (name==1.0). A Debian name without a number, such as python3-doc, stands
    for the release's own version of it. "python" is the running Python's standard library.
    """

    archive: str  # debian, pypi or installed
    name: str
    take: str
    max_mb: float  # above, a sample by a hash of the path

    @property
    def title(self) -> str:
        """The name without a version."""
        return self.name.partition("==")[0]


# Files that are left out of every package: indices, generated code, other people's packages.
LEAVE = re.compile(
    r"/(genindex|.*modindex|search|bookindex|index-|copyright|change|.*_source)[^/]*html$|/print\.html$"
    r"|/(translations|class-use|site-packages|_vendor|jinterface[^/]*|wx-[^/]*)/|-members\.html$|_mj\.html$"
    r"|/package-(use|tree|summary)|/(ascii-art|ethnic|translate-me|zippy)$|/os_[a-z0-9]*\.txt$"
    r"|(_pb2|/_version|versioneer)\.py$|/lib2to3/tests/data/"
)
MANUALS = """aptitude-doc-en bash-doc cmake-doc cppreference-doc-en-html debian-kernel-handbook
debian-reference-en developers-reference erlang-doc exim4-doc-html gap-doc git-doc golang-doc
libboost-doc libreoffice-help-en-us linux-doc nodejs-doc octave-doc openjdk-17-doc postgresql-doc
python-celery-doc python-django-doc python-scipy-doc python-sqlalchemy-doc python-sympy-doc
python-xarray-doc python3-doc qtbase5-doc-html r-doc-html racket-doc shorewall-doc sphinx-doc sqlite3-doc
zsh-doc"""
ENGLISH = {  # names -> the files to take
    MANUALS: r"\.x?html?$",
    "dict-devil dict-foldoc dict-gcide dict-jargon dict-vera dict-wn": r"\.dict\.dz$",
    "fortunes fortunes-min": r"/games/fortunes/[^.]+$",
    "glibc-doc manpages manpages-dev perl-doc": r"/man/man\d/",
    "apache2-doc debian-handbook harden-doc installation-guide-amd64": r"/en(-US)?/.*\.html$",
    "debian-faq": r"\.en\.html$",
    "debian-policy ghc-doc": r"/(policy\.html|users_guide)/.*\.html$",
    "lilypond-doc-html": r"/Documentation/[^.]*\.html$",
    "rust-doc": r"/html/(book/[^/]*|(cargo|nomicon|reference|rust-by-example|rustc|rustdoc)/.*)\.html$",
    "vim-runtime": r"/doc/[^/]*\.txt$",
}
KERNEL = (
    r"linux-source-[^/]*/(arch/x86|block|certs|crypto|fs|include|init|io_uring|ipc|kernel|lib|mm|net|samples"
    r"|scripts|security|sound/(core|pci|usb)|tools|usr|virt|drivers/(base|block|bus|char|clk|cpufreq|cpuidle"
    r"|crypto|dma|firmware|gpio|hid|hwmon|i2c|input|iommu|irqchip|leds|md|mmc|mtd|nvme|of|pci|power|regulator"
    r"|rtc|spi|thermal|tty|usb|vhost|virtio|watchdog))/.*\.[ch]$"
)
WHEELS = """ansible-core==2.19.14 astropy==8.0.2 biopython==1.88 bokeh==3.9.2 celery==5.7.0 dask==2026.8.0
distributed==2026.8.0 django==5.2.19 docutils==0.23 flask==3.1.3 fonttools==4.68.0 ipython==9.18.1
matplotlib==3.11.2 meson==1.12.1 mpmath==1.3.0 networkx==3.6.1 nltk==3.10.4 numpy==2.4.6 pandas==3.1.1
prompt-toolkit==3.0.53 pylint==4.1.4 qiskit==2.6.2 rdflib==7.6.0 scikit-learn==1.9.1 scipy==1.17.1
scrapy==2.19.0 sphinx==9.0.4 sqlalchemy==2.1.9 sqlglot==30.30.0 statsmodels==0.15.0 sympy==1.14.0
textual==8.2.8 tornado==6.6.1 transformers==5.23.0 trio==0.35.0 twisted==26.10.0 werkzeug==3.1.9
xarray==2026.9.0 yt-dlp==2026.10.26"""
_english = [(name, take) for names, take in ENGLISH.items() for name in names.split()]
PARTS: dict[str, list[Package]] = {
    "c": [Package("debian", "linux-source", KERNEL, 180)],
    "english": [Package("debian", name, take, 60) for name, take in _english],
    "python": [
        Package("installed", "python", r"\.py$", 12),
        *(Package("pypi", name, r"\.py$", 12) for name in WHEELS.split()),
    ],
}


def main(argv: list[str] | None = None) -> int:
    """Build the parts that are missing, print a table; return 2, with one line, if that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.corpus", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="default: all")
    options = parser.parse_args(argv)
    spawn = multiprocessing.get_context("spawn")  # Arrow has threads, which a fork would lose
    try:
        with ProcessPoolExecutor(mp_context=spawn) as pool:
            build(options.out, {name: PARTS[name] for name in options.parts}, pool)
    except (OSError, CorpusError, BrokenExecutor, tarfile.TarError) as error:
        print(f"corpus: {error}", file=sys.stderr)
        return 2
    return 0


def build(out: Path, parts: dict[str, list[Package]], pool: Executor) -> None:
    """Write the parts that are missing or that another recipe wrote, and SOURCES.json; print a table.

    Raises CorpusError if a package cannot be fetched, or if none of a part's packages is known.
    """
    sources_file = out / "SOURCES.json"
    sources: dict[str, Any] = json.loads(sources_file.read_text()) if sources_file.exists() else {}
    for part, packages in parts.items():
        if sources.get(part, {}).get("recipe") != (recipe := _hash(f"{FORMAT} {packages}")):
            found = _build_part(out, part, packages, pool)
            total = {key: sum(source[key] for source in found) for key in ("documents", "bytes")}
            sources[part] = total | {"recipe": recipe, "packages": found}
            with _replaced(sources_file) as draft:
                draft.write_text(json.dumps(sources, indent=1, sort_keys=True) + "\n")
    figures = ("packages", "documents", "MB of text")
    table = Table("part", *(Column(name, justify="right") for name in figures))
    for part, found in sources.items():
        size = f"{found['bytes'] / 1e6:.1f}"
        table.add_row(part, f"{len(found['packages'])}", f"{found['documents']:,}", size)
    Console().print(table)


def _build_part(out: Path, part: str, packages: list[Package], pool: Executor) -> list[dict[str, Any]]:
    """Write the packages that are missing, seal the part; return what its files say of themselves."""
    folder, console = out / f".{part}", Console(stderr=True)
    if (out / part).exists() and not folder.exists():  # what is still right of it is kept
        os.replace(out / part, folder)
    missing = [package for package in packages if not _source(folder, package)]
    futures = [pool.submit(write_package, folder, package) for package in missing]
    try:
        for future in track(as_completed(futures), part, len(futures), console=console):
            if warning := future.result():
                console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    finally:
        for future in futures:
            future.cancel()
    found = {package.title: source for package in packages if (source := _source(folder, package))}
    if not found:
        raise CorpusError(f"no package of {part} is known here; run `apt-get update` as root, try again")
    for path in folder.iterdir():
        if path.stem not in found:
            path.unlink()
    shutil.rmtree(out / part, ignore_errors=True)
    os.replace(folder, out / part)
    return [found[title] for title in sorted(found)]


def _source(folder: Path, package: Package) -> dict[str, Any] | None:
    """What a package's file says about it; None if there is no file or another recipe wrote it."""
    import pyarrow.parquet as pq

    path = folder / f"{package.title}.parquet"
    source = json.loads(pq.read_schema(path).metadata[b"source"]) if path.exists() else {}
    return source if source.pop("recipe", None) == _hash(f"{FORMAT} {package}") else None


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Give a name to write to; it becomes `path` once all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_package(folder: Path, package: Package) -> str | None:
    """Fetch and convert one package into one file of `folder`; return a warning if it does not exist here.

    Raises CorpusError if it cannot be fetched.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as unpacked:
        fetched = _FETCH[package.archive](package, Path(unpacked))
        if fetched is None:
            return f"{package.title} is not known here; it is left out"
        root, version, licences = fetched
        if not (rows := _rows(root, package)):
            return f"{package.title} holds none of the expected files; it is left out"
        source: dict[str, Any] = {"package": package.title, "version": version, "archive": package.archive}
        if licence := min(filter(Path.is_file, licences), default=None):
            source["licence_file"] = f"licences/{package.title}.txt"
            with _replaced(folder.parent / source["licence_file"]) as draft:
                shutil.copyfile(licence, draft)
    size = sum(len(row["text"].encode()) for row in rows)
    source |= {"documents": len(rows), "bytes": size, "recipe": _hash(f"{FORMAT} {package}")}
    schema = pa.schema({name: pa.large_string() for name in rows[0]}, {"source": json.dumps(source)})
    table, group = pa.Table.from_pylist(rows, schema), max(1, len(rows) * ROW_GROUP // size)
    with _replaced(folder / f"{package.title}.parquet") as draft:
        pq.write_table(table, draft, row_group_size=group, compression="zstd")
    return None


def _rows(root: Path, package: Package) -> list[dict[str, str]]:
    """The documents of a package in the order of their paths, each once."""
    found: dict[str, str] = {}  # by name
    for path in _chosen(root, package):
        raw, index = path.read_bytes(), path.with_name(path.name.replace(".dict.dz", ".index"))
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        headwords = index.read_text("utf-8", "replace") if path.suffix == ".dz" else ""
        found |= documents(path.relative_to(root).as_posix(), raw, headwords)
    texts = without_repeated_lines([*found.values()]) if "html" in package.take else found.values()
    once: dict[str, str] = {}  # by text
    for name, text in zip(found, texts):
        if len(text) >= MIN_CHARACTERS:
            once.setdefault(text, name)
    return [{"text": text, "name": name, "package": package.title} for text, name in once.items()]


def _chosen(root: Path, package: Package) -> list[Path]:
    """The files to read, sorted by path; above max_mb a sample, the same on every machine."""
    left, chosen = package.max_mb * 1e6, []
    paths = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    names = {f"/{path.relative_to(root).as_posix()}": path for path in paths}
    for name in sorted(names, key=_hash):
        if re.search(package.take, name) and not LEAVE.search(name):
            size = names[name].stat().st_size
            if size <= left and (size <= MAX_FILE or name.endswith(".dz")):
                chosen.append(names[name])
                left -= size
    return sorted(chosen)


Fetched = tuple[Path, str, list[Path]]  # the folder, the version, files that may be the licence


def _fetch_debian(package: Package, folder: Path) -> Fetched | None:
    """Download and unpack a Debian package; tar archives inside are unpacked where they lie."""
    name, version = _debian_version(package.name)
    if version is None:
        return None
    _run(["apt-get", "-q", "download", f"{name}={version}"], folder)
    root = folder / "root"
    _run(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), str(root)], folder)
    for inner in list(root.rglob("*.tar.xz")):
        with tarfile.open(inner, "r|xz") as tar:
            for member in tar:
                if member.isreg() and re.search(package.take, member.name):
                    tar.extract(member, inner.parent, filter="data")
    return root, version, [root / "usr/share/doc" / name / "copyright"]


def _debian_version(name: str) -> tuple[str, str | None]:
    """The package behind a name such as python3-doc (python3.11-doc), and its version; None if unknown."""
    shown = _run(["apt-cache", "show", "--no-all-versions", name], Path("/"), "No packages found")
    fields = email.message_from_string(shown or "")
    number = re.compile(r"-?\d[\d.]*")
    for dependency in re.findall(r"[a-z0-9.+-]+", fields.get("Depends", "")):
        if dependency != name and number.sub("", dependency) == number.sub("", name):
            return _debian_version(dependency)
    return name, fields.get("Version")


# Of pip; "from versions: none" means that there is no such package, or no network.
UNKNOWN = r"(?s)^(?!.*from versions: none).*No matching distribution"


def _fetch_pypi(package: Package, folder: Path) -> Fetched | None:
    """Download and unpack the wheel for Python 3.11 on Linux, so that every machine takes the same one."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    host = ["--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11"]
    for tag in ("manylinux_2_28_x86_64", "manylinux2014_x86_64"):
        host += ["--platform", tag]
    if _run([*pip, "--dest", str(folder), *host, package.name], folder, UNKNOWN) is None:
        return None
    root = folder / "root"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(root)
    names = (path for path in root.glob("*.dist-info/**/*") if re.match("(?i)licen[cs]e|copying", path.name))
    return root, package.name.partition("==")[2], list(names)


def _fetch_installed(package: Package, folder: Path) -> Fetched:
    """The standard library of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, sys.version.split()[0], [root / "LICENSE.txt"]


_FETCH = {"debian": _fetch_debian, "pypi": _fetch_pypi, "installed": _fetch_installed}


def _run(command: list[str], folder: Path, may_fail: str = r"(?!)") -> str | None:
    """What a command prints; None if it fails with a message that matches `may_fail`."""
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{command[0]} is not here; english and c need Debian or Ubuntu")
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True
    )
    if result.returncode == 0:
        return result.stdout
    if re.search(may_fail, result.stderr):
        return None
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    line = next((line for line in lines if line.startswith("E")), lines[-1])  # E: and ERROR: say most
    raise CorpusError(f"{command[-1]}: {line}; check the network, then run again")


if __name__ == "__main__":
    sys.exit(main())
