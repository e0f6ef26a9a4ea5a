"""The command line with a classification whose loss is not a number in the batch that has item 7."""

from __future__ import annotations

import math
from typing import Any

from register_adapter.train import main
from register_adapter.training import OBJECTIVES, ClassificationObjective


class Failing(ClassificationObjective):
    def loss(self, model: Any, batch: Any) -> Any:
        loss, metrics = super().loss(model, batch)
        return loss * (math.nan if 7 in batch["index"].tolist() else 1.0), metrics


if __name__ == "__main__":
    OBJECTIVES["classification"] = Failing
    main(prog=__file__)
