"""Pages, each one HTML file: of an audit, with verdicts, charts, tables and a gallery; of an evaluation; of a study."""

from .advice import Origin
from .document import write_page
from .studies import StudyPage, write_study_page
from .tables import Table
from .tasks import write_task_page

__all__ = ["Origin", "StudyPage", "Table", "write_page", "write_study_page", "write_task_page"]
