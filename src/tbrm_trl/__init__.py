"""Trajectory Bellman Residual Minimization (arXiv 2505.15311) as a trainer in the style of TRL."""

from importlib.metadata import version as _version

from packaging.specifiers import SpecifierSet as _SpecifierSet

SUPPORTED_TRL = ">=1.16,<1.17"

if not _SpecifierSet(SUPPORTED_TRL).contains(_version("trl"), prereleases=True):
    raise ImportError(
        f"tbrm_trl works with trl{SUPPORTED_TRL}, but trl {_version('trl')} is installed. "
        f'Install a supported one with: pip install "trl{SUPPORTED_TRL}"'
    )

from .config import TBRMConfig  # noqa: E402
from .loss.residual import bellman_residual, squared_residual_loss, trajectory_log_ratio  # noqa: E402
from .loss.soft_value import SoftValue  # noqa: E402
from .sources.saved_rollouts import load_rollouts  # noqa: E402
from .trainer import TBRMTrainer  # noqa: E402

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
