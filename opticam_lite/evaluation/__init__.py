"""Classifier × dataset × methods × metrics → tidy rows: resumable, on this machine or on a cluster.

    images ──loading──▶ batches ──measuring──▶ rows ──store──▶ Parquet parts ──summary──▶ table

`run` plans what is still to be measured, this process or a Ray cluster (`on_ray`) measures it batch
by batch, and `store` writes the rows in parts, each of which is complete or absent.
"""

from .run import choose, evaluate
from .store import StoreError, read
from .summary import summarize

__all__ = ["StoreError", "choose", "evaluate", "read", "summarize"]
