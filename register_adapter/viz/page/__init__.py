"""Pages, each one HTML file: of an audit, with verdicts, charts, tables and a gallery; of an evaluation."""

from .advice import Origin
from .document import write_page
from .tasks import write_task_page

__all__ = ["Origin", "write_page", "write_task_page"]
