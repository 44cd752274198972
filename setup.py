"""Builds the operator libraries (csrc/native.py); without a working compiler the package installs and says so."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
from build_backend import torch_folder  # noqa: E402
from native import LIBRARIES, BuildProblem, build_cpu, build_cuda  # noqa: E402

FOLDER = Path("palp_fast", "lib")


class BuildLibraries(build_ext):
    """Compiles plain shared libraries (no Python modules), which torch.ops.load_library loads."""

    def run(self) -> None:
        self.folder = FOLDER if self.inplace else Path(self.build_lib, FOLDER)
        self.folder.mkdir(parents=True, exist_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        for device, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            note = self.folder / f"build_{device}.txt"
            note.unlink(missing_ok=True)
            try:
                build(self.compiler, torch, Path(self.build_temp, device), self.folder)
            except BuildProblem as problem:
                (self.folder / LIBRARIES[device]).unlink(missing_ok=True)
                text = f"the {'C++' if device == 'cpu' else 'CUDA'} library was not built: {problem}"
                note.write_text(text + "\n", encoding="utf-8")
                print(f"palp_fast: {text}; the PyTorch operators serve instead", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes where the package looks."""

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.folder.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel per platform for every Python: the libraries use no Python API and torch's stable ABI only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


packages, package_dir = find_packages(include=["palp_fast", "palp_fast.*"]), {}
if Path("kernels", "palp").is_dir():
    # Kept apart from the package: a top-level folder "kernels" with an __init__ would shadow another package.
    packages.append("palp_fast.kernels")
    package_dir["palp_fast.kernels"] = "kernels/palp"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[Extension("palp_fast.lib.operators", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
