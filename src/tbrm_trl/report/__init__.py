"""Write a run as one page: `tbrm report RUN` writes HTML that opens from disk and needs no network."""

from .page import write_report

__all__ = ["write_report"]
