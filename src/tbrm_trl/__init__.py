"""Trajectory Bellman Residual Minimization (arXiv 2505.15311) as a trainer in the style of TRL."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet as _SpecifierSet

SUPPORTED_TRL = ">=1.16,<1.17"

if not _SpecifierSet(SUPPORTED_TRL).contains(_version("trl"), prereleases=True):
    raise ImportError(
        f"tbrm_trl works with trl{SUPPORTED_TRL}, but trl {_version('trl')} is installed. "
        f'Install a supported one with: pip install "trl{SUPPORTED_TRL}"'
    )

if TYPE_CHECKING:
    from .config import TBRMConfig
    from .loss.residual import bellman_residual, squared_residual_loss, trajectory_log_ratio
    from .loss.soft_value import SoftValue
    from .sources.saved_rollouts import load_rollouts
    from .trainer import TBRMTrainer

__version__ = _version("tbrm-trl")

__all__ = [
    "SoftValue",
    "TBRMConfig",
    "TBRMTrainer",
    "bellman_residual",
    "load_rollouts",
    "squared_residual_loss",
    "trajectory_log_ratio",
]

# Where each name is. It is imported when it is asked for: `tbrm --help` need not wait for torch.
_MODULES = {
    "SoftValue": "loss.soft_value",
    "TBRMConfig": "config",
    "TBRMTrainer": "trainer",
    "bellman_residual": "loss.residual",
    "load_rollouts": "sources.saved_rollouts",
    "squared_residual_loss": "loss.residual",
    "trajectory_log_ratio": "loss.residual",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
