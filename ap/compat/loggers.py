"""Writers with SummaryWriter's methods, for what is not TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

_SCHEMA = 1


class CSVWriter:
    """Scalars as rows `step,tag,value,schema` of a CSV file; `schema` tells the version of this format.

    A row is in the file as soon as it is written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = CSVWriter(Path(folder) / "dnr.csv")
        ...     writer.add_scalar("dnr/train/model/total", 0.5, 10)
        ...     writer.close()
        ...     (Path(folder) / "dnr.csv").read_text().split()
        ['step,tag,value,schema', '10,dnr/train/model/total,0.5,1']
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", buffering=1)
        self._rows = csv.writer(self._file)
        self._rows.writerow(("step", "tag", "value", "schema"))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One row."""
        self._rows.writerow((step, tag, float(value), _SCHEMA))

    def flush(self) -> None:
        """Nothing: no row waits."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricsWriter:
    """For loggers that take a dictionary a step, `log_metrics(metrics, step)` as Lightning's and MLflow's do.

    `flush()` hands over what `add_scalar` has collected since the last one.
    """

    def __init__(self, *loggers: Any) -> None:
        self._loggers = loggers
        self._metrics: dict[int, dict[str, float]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Collects one value."""
        self._metrics.setdefault(step, {})[tag] = float(value)

    def flush(self) -> None:
        """One `log_metrics` call a step and logger."""
        for step, metrics in self._metrics.items():
            for logger in self._loggers:
                logger.log_metrics(metrics, step=step)
        self._metrics.clear()
