"""The loop closed: the composition network of sweeps/grok_circuits.py is pruned to its circuit before and after it
groks. Does the circuit pass through the bridge entity, as causal tracing says of the whole network?

python sweeps/grok_circuits.py && python sweeps/grokked_circuit.py --pack 6
"""

from pathlib import Path
from typing import Any

from analysis.circuit_evaluation import CircuitEvaluation
from analysis.circuit_report import HELD_OUT, TRAIN
from analysis.circuits import Curves
from analysis.grokked_circuit import BridgeInCircuit
from analysis.grokked_circuit_report import CHECKPOINT, grokked_circuit_report
from groundswell import AdamW, Budget, Checkpointing, ConfigError, Evaluation, Every, Experiment
from groundswell.cli import main
from groundswell.experiment import ParameterGroup
from groundswell.rundir import RunFolder
from groundswell.sweep import Axis, Sweep
from groundswell.trained import newest_finished
from models.decoder import Decoder
from models.edge_masked import EdgeMasked
from models.edge_objective import EdgePruning
from tasks.composition import Composition
from tasks.composition_pairs import CompositionPairs

RESULTS = Path("results")
SIZES: dict[str, Any] = {  # what it is for, targets, steps
    "smoke": ("does everything work; needs the smoke preset of grok_circuits", (0.3, 0.6), 30),
    "demo": ("circuits before and after grokking on 2 CPU cores; needs the demo of grok_circuits",
             (0.2, 0.3, 0.4, 0.5, 0.55, 0.6), 800),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, targets, steps = SIZES[preset]
    run = composition_run(RESULTS / f"grok_circuits-{preset}")
    task = run.experiment().task
    assert isinstance(task, Composition)
    named = checkpoints(run)
    base = Experiment(
        task=CompositionPairs(base=task), model=EdgeMasked(**_fields(named["after"])),
        objective=EdgePruning(target=targets[0], warmup_steps=4 * steps // 5),
        optimizer=AdamW(lr=0.3, weight_decay=0.01, clip_norm=0, warmup_steps=steps // 15, schedule="linear",
                        groups=(ParameterGroup(match="multipliers", ascent=True),)),
        budget=Budget(steps=steps, batch_size=32),
        evaluation=Evaluation(schedule=Every(every=steps // 3)),
        checkpointing=Checkpointing(schedule=Every(every=steps)),
    )  # fmt: skip
    axes = {
        CHECKPOINT: Axis(values=("before", "after"), named=named),
        "objective.target": Axis(values=targets),
        "seed": Axis(values=(0,)),
    }
    return Sweep(
        "grokked_circuit", base, axes, metric="eval/validation/exact_match", report=grokked_circuit_report,
        probes=(BridgeInCircuit(), CircuitEvaluation(split="held_out")),
    )  # fmt: skip


def composition_run(folder: Path) -> RunFolder:
    """The newest finished run of composition with weights of its own in each layer. Raises ConfigError, which says how
    to get one."""

    def wanted(run: RunFolder) -> bool:
        experiment = run.experiment()
        own = isinstance(experiment.model, Decoder) and experiment.model.num_recurrences == 1
        return isinstance(experiment.task, Composition) and own and bool(run.checkpoint_steps())

    run = newest_finished(folder, wanted)
    if run is None:
        preset = folder.name.removeprefix("grok_circuits-")
        raise ConfigError(
            f"{folder}: no finished composition run to prune; start python sweeps/grok_circuits.py --preset {preset} "
            "--axis task=composition --axis weights=own here first"
        )
    return run


def checkpoints(run: RunFolder) -> dict[str, dict[str, str]]:
    """Name -> field and value: before (the first checkpoint with 99 % training accuracy), after (the last one), and
    every one as step-<number>."""
    steps = run.checkpoint_steps()
    named = {f"step-{step}": step for step in steps}
    named |= {"before": Curves.of(run).phases(TRAIN, HELD_OUT).start(steps), "after": steps[-1]}
    return {name: {"model.path": str(run.checkpoint_folder(step).resolve())} for name, step in named.items()}


def _fields(override: dict[str, str]) -> dict[str, str]:
    return {path.removeprefix("model."): value for path, value in override.items()}


if __name__ == "__main__":
    main(build, {preset: size[0] for preset, size in SIZES.items()})
