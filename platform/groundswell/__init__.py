"""Groundswell: train, sweep, evaluate and open up transformers that learn to reason."""

from groundswell.config import Component, Config, ConfigError
from groundswell.experiment import (
    AdamW,
    Budget,
    Checkpointing,
    Evaluation,
    Experiment,
    NeverReached,
    Reached,
    Scaling,
)
from groundswell.schedule import DenseThenSparse, Every, LogSpaced

__all__ = [
    "AdamW",
    "Budget",
    "Checkpointing",
    "Component",
    "Config",
    "ConfigError",
    "DenseThenSparse",
    "Evaluation",
    "Every",
    "Experiment",
    "LogSpaced",
    "NeverReached",
    "Reached",
    "Scaling",
]
