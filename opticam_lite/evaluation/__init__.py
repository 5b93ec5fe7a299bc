"""Classifier × dataset × methods × metrics → tidy rows: resumable, on this machine or on a cluster.

    images ──loading──▶ batches ──measuring──▶ rows ──store──▶ Parquet parts ──summary──▶ table

`run` plans what is still to be measured, an engine (`local`, `on_ray`) has it measured batch by
batch, and `store` writes what comes back, whole or not at all.
"""

from .run import choose, evaluate
from .store import StoreError, read
from .summary import summarize

__all__ = ["StoreError", "choose", "evaluate", "read", "summarize"]
