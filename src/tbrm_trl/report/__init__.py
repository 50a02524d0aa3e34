"""A run as one page: `tbrm report RUN` writes HTML that opens from disk and asks for no network."""

from .page import write_report

__all__ = ["write_report"]
