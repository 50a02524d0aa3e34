"""A run as one page: `python -m tbrm_trl.report RUN` writes HTML that opens from disk and asks for no network."""

from .page import write_report

__all__ = ["write_report"]
