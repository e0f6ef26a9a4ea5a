"""The progress bars of other libraries."""

from __future__ import annotations

__all__ = ["disable_progress_bars"]


def disable_progress_bars() -> None:
    """Turn off the bars of transformers (loading), datasets and huggingface_hub (downloads)."""
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_downloads
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_downloads()
