"""Small text helpers for tables of settings and their replicates."""

from __future__ import annotations

import pandas as pd


def spread(values: pd.Series, form: str) -> str:
    """Mean (lowest-highest) in this format; the mean alone where they read alike; "-" without values."""
    values = values.dropna()
    if not len(values):
        return "-"
    mean, low, high = (form.format(value) for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low}-{high})"


def short(path: str) -> str:
    """The last part of a dotted path."""
    return path.rsplit(".", 1)[-1]
