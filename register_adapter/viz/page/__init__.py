"""The page of an audit: one HTML file with verdicts, charts, tables and a gallery."""

from .advice import Origin
from .document import write_page

__all__ = ["Origin", "write_page"]
