"""`groundswell train EXPERIMENT`: the experiment of a file, trained like a sweep of one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from groundswell import cli
from groundswell.config import ConfigError
from groundswell.planning.inputs import load
from groundswell.sweep import Sweep

USAGE = """usage: groundswell train EXPERIMENT [options]

EXPERIMENT is a .yaml, .json or .py file (with `experiment = Experiment(...)`), or the name of a preset of
`groundswell plan`. The options are those of a sweep file, each field of the experiment among them:
--scaling.strategy fsdp --scaling.num-workers 2 --axis seed=0,1,2 --output DIR --address HOST:PORT --dry-run"""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    try:
        subject = load(arguments[0], {})
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def build(preset: str) -> Sweep:
        return Sweep(subject.name, subject.experiment, {}, metric="train/loss", mode="min")

    return cli.run(build, {"train": f"the experiment of {arguments[0]}"}, "train", arguments[1:])
