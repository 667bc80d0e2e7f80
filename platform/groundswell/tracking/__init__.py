"""From run folders to MLflow. Training processes never talk to the tracking store; the driver's Tracker does."""

from groundswell.tracking.location import artifact_root, default_uri
from groundswell.tracking.tracker import Leftover, Tracker

__all__ = ["Leftover", "Tracker", "artifact_root", "default_uri"]
