"""Where the emoji-64 world comes from: four npm packages, fetched by `npm pack` and checked against a digest."""

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

# Python before 3.11.4 has no filters; what is unpacked is known by its digest there too.
FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
# package -> (version, sha256 of the npm tarball)
PACKAGES = {
    "@lobehub/fluent-emoji-3d": ("1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    "unicode-emoji-json": ("0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401"),
    "emojibase-data": ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}


def folder(cache: Path, package: str) -> Path:
    """Folder into which `fetch` unpacks a package."""
    return cache / "npm" / package.strip("@").replace("/", "-")


def fetch(cache: Path) -> None:
    """Download and unpack every package of PACKAGES into `cache`; packages already there are left alone.

    Raises RuntimeError when npm is missing or a download's sha256 differs from the committed one.
    """
    for package, (version, digest) in PACKAGES.items():
        target = folder(cache, package)
        if target.exists():
            continue
        tarball = _pack(cache, f"{package}@{version}")
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != digest:
            raise RuntimeError(f"{package}@{version}: sha256 {found}, expected {digest}")
        partial = target.with_suffix(".partial")
        with tarfile.open(tarball) as archive:
            archive.extractall(partial, **FILTER)
        (partial / "package").rename(target)
        partial.rmdir()
        tarball.unlink()


def _pack(cache: Path, spec: str) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "npm").mkdir(exist_ok=True)
    try:
        done = subprocess.run(["npm", "pack", "--json", spec], cwd=cache, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("npm is needed to fetch the emoji packages, and is not on PATH") from None
    answer = json.loads(done.stdout)
    entry = answer[0] if isinstance(answer, list) else next(iter(answer.values()))
    return cache / entry["filename"].lstrip("@").replace("/", "-")
