"""Build backend (PEP 517): setuptools, asking for torch only where the environment has none to compile against."""

import importlib.util
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

MARKER = Path("include", "torch", "csrc", "stable", "library.h")


def torch_folder() -> Path | None:
    """The installed torch with the stable headers, in this environment or the one that a build is isolated from."""
    spec = importlib.util.find_spec("torch")
    found = list(spec.submodule_search_locations or ()) if spec else []
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        for scheme in ("platlib", "purelib"):
            found.append(Path(sysconfig.get_path(scheme, vars={"base": prefix, "platbase": prefix}), "torch"))
    found.append(Path(site.getusersitepackages(), "torch"))
    return next((Path(folder) for folder in found if (Path(folder) / MARKER).is_file()), None)


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if torch_folder() else [*requirements, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
