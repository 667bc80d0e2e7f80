"""Small text helpers for tables of settings and their replicates."""

from __future__ import annotations

import pandas as pd

from groundswell.results import Results


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


def settings_of(results: Results) -> list[tuple[tuple, pd.DataFrame]]:
    """Values of the setting axes, and the runs there, in the order of the sweep."""
    axes = results.setting_axes
    if not axes:
        return [((), results.runs)]
    return [
        (key if isinstance(key, tuple) else (key,), runs)
        for key, runs in results.runs.groupby(axes, sort=False, dropna=False)
    ]
