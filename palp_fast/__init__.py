"""PALP: prompt-aligned personalization of text-to-image models (Arar et al., arXiv 2401.06105).

Public names load on first use, so that `import palp_fast` costs little more than `import torch`.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "errors",
    "DataError": "errors",
    "TrainingDiverged": "errors",
    "Subject": "config",
    "TrainConfig": "config",
    "train": "train",
    "Trainer": "train",
    "TrainResult": "train",
    "generate": "generate",
    "evaluate": "evaluate",
    "deterministic": "backend",
}
_MODULES = ("functional", "nn", "optim", "sampler")

__all__ = sorted([*_HOME, *_MODULES])


class _Package(ModuleType):
    """Keeps `palp_fast.train` the function although a submodule has the same name (generate and evaluate likewise)."""

    def __setattr__(self, name: str, value: object) -> None:
        # Importing palp_fast.train binds the submodule on its package: that would hide the public function.
        if name in _HOME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
