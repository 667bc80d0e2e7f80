"""Can a chain of thought move into the layers? (arXiv 2311.01460, 2405.14838): a teacher that writes its chain, a
student that reads the teacher's states, an emulator that predicts them, both coupled; and stepwise internalisation.

python sweeps/implicit_cot.py [--preset smoke|demo|multiplication|gsm8k] [--stages coupled]
python sweeps/implicit_cot.py --preset search --search optuna --num-samples 20
"""

from typing import Any

from analysis.chain_of_thought import ChainOfThoughtEvaluation
from analysis.implicit_cot_report import implicit_cot_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment, Scaling
from groundswell.cli import main
from groundswell.stages import Stage
from groundswell.sweep import Axis, Sweep
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_objective import StateRegression
from models.chain_student import MindReadingStudent
from models.decoder import Decoder
from models.objectives import AnswerLoss
from models.stepwise import StepwiseInternalization
from models.transformers_model import TransformersModel
from tasks.chain_files import ChainFiles
from tasks.chain_of_thought import ChainOfThought
from tasks.multiplication_chain import MultiplicationChain
from tasks.running_sums import RunningSums

BEST = "eval/validation/accuracy"
PRESETS = {
    "smoke": "does everything work",
    "demo": "is the sum of five digits odd? 6 layers, 2 CPU cores",
    "search": "layers x delta x digits on products, the coupled accuracy decides; with --search optuna",
    "multiplication": "4 x 4 digits, 12 layers, one GPU",
    "gsm8k": "GSM8K in the folder data/gsm8k, from GPT-2 in a local folder; one GPU",
}
GPT2 = "networks/gpt2"  # a Hugging Face folder
DEMO = Experiment(
    task=RunningSums(length=5, base=8, modulus=2, train_size=20_000),
    model=Decoder(num_layers=6, num_heads=4, width=64, init_std=0.125),  # 1 / sqrt(width): 0.02 waits on a plateau
    objective=AnswerLoss(),
    optimizer=AdamW(lr=2e-3, weight_decay=0.01),
    budget=Budget(steps=400, batch_size=64),
    evaluation=Evaluation(schedule=Every(every=100), max_examples=250),
    checkpointing=Checkpointing(schedule=Every(every=100), keep="last", best_metric=BEST),
)
PUBLISHED: dict[str, Any] = {  # of all stages; the published runs have no warm-up and decay everything
    "optimizer": AdamW(lr=5e-5, weight_decay=0.01, decay_all=True), "budget.batch_size": 32,
    "evaluation.schedule": Every(every=2_000), "checkpointing.schedule": Every(every=2_000),
    "scaling": Scaling(device="cuda", precision="tf32"), "model": Decoder(num_layers=12, num_heads=12, width=768),
}  # fmt: skip
Sizes = dict[str, dict[str, Any]]  # stage, or "all" -> what differs from the demo


def sizes_of(preset: str) -> Sizes:
    if preset == "smoke":
        small = {"budget.steps": 20, "model.num_layers": 3, "model.width": 32}
        return {"all": {**small, **dict.fromkeys(("evaluation.schedule", "checkpointing.schedule"), Every(every=10))}}
    if preset == "search":
        return {"all": {"task": MultiplicationChain(digits=2, train_size=7_000, validation_size=250, test_size=250)}}
    if preset == "multiplication":  # stepwise as in arXiv 2405.14838: 8 tokens an epoch of 25,250 updates
        return {
            "all": {**PUBLISHED, "task": MultiplicationChain(train_size=808_000), "budget.steps": 100_000},
            "explicit": {"budget.steps": 25_250}, "coupled": {"optimizer.lr": 5e-5},
            "no_chain": {"budget.steps": 400_000},
            "stepwise": {"objective.remove_every": 3_156, "budget.steps": 400_000},
        }  # fmt: skip
    if preset == "gsm8k":
        gpt2, start = {"model": TransformersModel(path=GPT2)}, {"model.start": GPT2}
        mixture = {"model.mixture_size": "vocabulary"}
        task = ChainFiles.from_dict({"path": "data/gsm8k", "tokenizer": GPT2})
        return {
            "all": {**PUBLISHED, "task": task, "budget.steps": 180_000},
            "explicit": gpt2, "no_chain": {**gpt2, "budget.steps": 180_000},
            "stepwise": {**gpt2, "objective.remove_every": 3_000, "objective.remove_all_from": 39,
                         "objective.keep_positions": False, "budget.steps": 180_000},
            "student": start, "emulator": {**start, **mixture, "objective.mixture_weight": 1.0},
            "coupled": {**mixture, "optimizer.lr": 5e-5},
        }  # fmt: skip
    return {}


def stages(base: Experiment, sizes: Sizes) -> tuple[Stage, ...]:
    """What each stage changes in the base, the explicit chain. Stepwise removal has as many updates for each
    token of the chain, and three times as many without any; no chain has as many in all."""
    decoder, task, steps = base.model, base.task, base.budget.total
    assert isinstance(decoder, Decoder) and isinstance(task, ChainOfThought)
    chain = task.widths().chain - 1
    hidden, lowest = (
        {"task.form": "hidden"},
        {"checkpointing.best_metric": "eval/validation/state_loss", "checkpointing.best_mode": "min"},
    )
    regression = {**hidden, **lowest, "objective": StateRegression(), "budget.steps": 2 * steps}
    stepwise = StepwiseInternalization(remove_every=steps, remove_all_from=chain, keep_positions=True)
    long = {"budget.steps": (chain + 3) * steps}
    found: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "explicit": ({}, {}),
        "no_chain": ({**long, "task.form": "none"}, {}),
        "stepwise": ({**long, "objective": stepwise}, {}),
        "student": ({**hidden, "model": MindReadingStudent(decoder=decoder)}, {"model.teacher": "explicit"}),
        "emulator": ({**regression, "model": ThoughtEmulator(decoder=decoder)}, {"model.teacher": "explicit"}),
        "coupled": ({"task.form": "none", "model": CoupledStudent(decoder=decoder), "optimizer.lr": 3e-4},
                    {"model.student_folder": "student", "model.emulator_folder": "emulator"}),
    }  # fmt: skip
    return tuple(Stage(name, {**changes, **sizes.get(name, {})}, inputs) for name, (changes, inputs) in found.items())


def build(preset: str) -> Sweep:
    sizes = sizes_of(preset)
    base = DEMO.with_overrides(sizes.get("all", {}))
    axes = {"seed": Axis(values=(0, 1))}
    chosen = stages(base, sizes)
    if preset == "search":
        chosen = tuple(stage for stage in chosen if stage.name not in ("no_chain", "stepwise"))
        shape = Axis(values=(4, 6, 8), also=("model.decoder.num_layers",))
        axes |= {"model.num_layers": shape, "model.delta": Axis(values=("dynamic", 1, 2, 3)),
                 "task.digits": Axis(values=(2, 3)), "seed": Axis(values=(0,))}  # fmt: skip
    return Sweep(
        "implicit_cot", base, axes, metric=BEST, stages=chosen, report=implicit_cot_report,
        probes=(ChainOfThoughtEvaluation(),),
    )  # fmt: skip


if __name__ == "__main__":
    main(build, PRESETS)
