"""The page of an audit: one HTML file with verdicts, charts, tables and a gallery."""

from .document import write_page

__all__ = ["write_page"]
