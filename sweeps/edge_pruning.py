"""Which edges does a network need? Edge Pruning (arXiv 2406.16778) over sparsity targets and seeds, packed over one
frozen network: compiled programs whose circuits are known, the networks of `circuit_networks.py`, or GPT-2.

python sweeps/edge_pruning.py [--preset smoke|demo|networks] [--axis task=ioi]
python sweeps/edge_pruning.py --preset search --search optuna --num-samples 20
python sweeps/edge_pruning.py --preset gpt2_ioi --model.path FOLDER --task.tokenizer FOLDER
"""

from typing import Any

from analysis.circuit_evaluation import CircuitEvaluation
from analysis.edge_pruning_report import edge_pruning_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.cli import main
from groundswell.experiment import ParameterGroup
from groundswell.sweep import Axis, Sweep
from groundswell.trained import trained_networks
from models.edge_masked import EdgeMasked
from models.edge_objective import EdgePruning
from models.tracr_command import compiled_folder
from tasks.boolean_expressions import BooleanExpressions
from tasks.gendered_pronoun import GenderedPronoun
from tasks.greater_than import GreaterThan
from tasks.ioi import Ioi
from tasks.tracr_tasks import TracrProportion, TracrReverse

FREE = ParameterGroup(match="multipliers.nodes", frozen=True)  # node masks follow the KL alone


def climbing(lr: float) -> ParameterGroup:
    return ParameterGroup(match="multipliers", lr=lr, ascent=True)


def program(name: str) -> EdgeMasked:
    return EdgeMasked(path=compiled_folder(name), ablation="zero", pairs=False)


PROGRAMS: dict[str, Any] = {
    "reverse": {"task": TracrReverse(pairs=False), "model": program("reverse"), "budget.steps": 6_000,
        "objective": EdgePruning(target=1.02, warmup_steps=5_900, token_reduction="sum"),
        "optimizer.lr": 0.03, "optimizer.warmup_steps": 1_500, "optimizer.groups": (FREE, climbing(0.001))},
    "xproportion": {"task": TracrProportion(pairs=False), "model": program("xproportion"), "budget.steps": 720,
        "objective": EdgePruning(target=0.92, node_target=0.4, node_loss=True, warmup_steps=640,
                                 answer_space="positions"),
        "optimizer.lr": 1.0, "optimizer.warmup_steps": 96, "optimizer.groups": (climbing(0.0001),)},
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {  # of each task, and the targets of the published sweep
    "ioi": {"task": Ioi(test_size=1_000)},
    "greater_than": {"task": GreaterThan(test_size=1_000), "objective.answer_space": "candidates"},
    "gendered_pronoun": {"task": GenderedPronoun(test_size=1_000)},
    "boolean": {"task": BooleanExpressions(prompt="zero_shot")},
}
TARGETS = {
    "ioi": (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1, 1.01, 1.02, 1.05, 1.1),
    "greater_than": (0.95, 0.955, 0.96, 0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1, 1.01, 1.02, 1.05, 1.1),
    "gendered_pronoun": (0.93, 0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1, 1.05,
                         1.1, 1.15, 1.2, 1.4),
}  # fmt: skip
PUBLISHED = Experiment(
    task=PROGRAMS["reverse"]["task"],
    model=PROGRAMS["reverse"]["model"],
    objective=EdgePruning(target=0.95, warmup_steps=2_500),
    optimizer=AdamW(lr=0.8, weight_decay=0.01, decay_all=True, warmup_steps=200, schedule="linear",
                    groups=(FREE, climbing(0.8))),
    budget=Budget(steps=3_000, batch_size=32),
    metrics_every=8,
    evaluation=Evaluation(schedule=Every(every=64), max_examples=150),
    checkpointing=Checkpointing(schedule=Every(every=512), keep="last"),
)  # fmt: skip
MORE = {"train_size": 1_000, "validation_size": 400}  # examples cost little on a small network
QUICK = {"budget.steps": 1_600, "objective.warmup_steps": 1_333, "optimizer.warmup_steps": 200}
PRESETS = {
    "smoke": "does everything work",
    "demo": "two compiled programs: are their known circuits found? 2 CPU cores",
    "networks": "our own networks (train them with circuit_networks.py), three targets, 2 CPU cores",
    "search": "target and rate, for few edges and a small KL at once, with --search optuna; our own network on IOI",
} | {f"gpt2_{name}": f"the published sweep of {name} on GPT-2 in a local folder" for name in TARGETS}


def ours() -> dict[str, EdgeMasked]:
    """By task, those that are trained."""
    found = trained_networks("results/circuit_networks-demo", "python sweeps/circuit_networks.py", "task")
    return {task: EdgeMasked(path=folder) for task, folder in found.items()}


def build(preset: str) -> Sweep:
    base, seed = PUBLISHED, Axis(values=(0,))
    if preset in ("smoke", "demo"):
        base = base.with_overrides({"budget.batch_size": 16})
        seed = Axis(values=(0, 1, 2, 3) if preset == "demo" else (0,))  # about half of them end at the known circuits
        names = ("reverse", "xproportion") if preset == "demo" else ("xproportion",)
        axes = {"task": Axis(values=names, named=PROGRAMS)}
    elif preset == "networks":
        named = {
            task: {"model": model, **TEXTS[task], "task": TEXTS[task]["task"].with_overrides(MORE), **QUICK}
            for task, model in ours().items()
        }
        axes = {"task": Axis.of_names(named), "objective.target": Axis(values=(0.94, 0.97, 0.99))}
        seed = Axis(values=(0, 1))
    elif preset == "search":
        base = base.with_overrides({"model": ours()["ioi"], **TEXTS["ioi"], **QUICK})
        axes = {"objective.target": Axis(low=0.9, high=1.1), "optimizer.lr": Axis(low=0.1, high=2.0, log=True)}
    else:
        task = preset.removeprefix("gpt2_")
        base = base.with_overrides({"model": EdgeMasked(path="networks/gpt2"), **TEXTS[task]})
        axes = {"objective.target": Axis(values=TARGETS[task])}
    return Sweep(
        "edge_pruning", base, {**axes, "seed": seed}, metric="eval/validation/kl", mode="min",
        also={"eval/validation/edge_sparsity": "max"} if preset == "search" else {},
        report=edge_pruning_report,
        probes=(CircuitEvaluation(split="validation" if preset == "networks" else "test"),),
    )  # fmt: skip


if __name__ == "__main__":
    main(build, PRESETS)
