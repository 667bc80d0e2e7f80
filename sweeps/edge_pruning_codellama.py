"""Edge Pruning of CodeLlama-13B on Boolean expressions (arXiv 2406.16778, section 5), on 32 GPUs. Link the folder of
CodeLlama-13b-Instruct-hf to networks/ first.

python sweeps/edge_pruning_codellama.py [--preset tiny|few_shot|instruction] [--scaling.num-workers 32]
"""

from pathlib import Path

from analysis.circuit_evaluation import CircuitEvaluation
from analysis.edge_pruning_report import edge_pruning_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment, Scaling
from groundswell.cli import main
from groundswell.experiment import ParameterGroup
from groundswell.sweep import Axis, Sweep
from groundswell.training.flat import initial_tensor
from groundswell.training.sampler import generator
from models.edge_masked import EdgeMasked
from models.edge_objective import EdgePruning
from models.huggingface import CONFIG
from models.transformers_model import TransformersModel
from tasks.boolean_expressions import BooleanExpressions

CODELLAMA = "networks/CodeLlama-13b-Instruct-hf"
PRESETS = {
    "tiny": "a random Llama of three layers with a token a word, on two CPU workers",
    "few_shot": "three solved lines before each expression, 72 tokens",
    "instruction": "a request in the chat form of Llama 2, 64 tokens",
}
TINY = {
    "budget": Budget(steps=120, batch_size=8), "objective.warmup_steps": 100, "optimizer.warmup_steps": 5,
    "metrics_every": 20, "evaluation": Evaluation(schedule=Every(every=60), max_examples=50),
    "checkpointing.schedule.every": 60, "scaling": Scaling(strategy="fsdp", num_workers=2, device="cpu"),
}  # fmt: skip


def tiny_llama(task: BooleanExpressions, folder: str = "results/networks/tiny_llama") -> str:
    """Write a random network of the task's words with grouped heads, unless it is there."""
    if not (Path(folder) / CONFIG).exists():
        model = TransformersModel(num_layers=3, num_heads=4, num_kv_heads=2, width=32, mlp_width=64, init_std=0.2)
        source = generator(0, "init")
        specs = model.parameters(task.vocab_size, task.text_length)
        weights = {spec.name: initial_tensor(spec, source) for spec in specs}
        model.save_folder(weights, Path(folder), task.build().vocabulary)
    return folder


def build(preset: str) -> Sweep:
    if preset == "tiny":
        task = BooleanExpressions(prompt="zero_shot", train_size=200, validation_size=50, test_size=100)
        model = EdgeMasked(path=tiny_llama(task), mask_embeddings=False, eps=1e-8, init_log_alpha=2.0)
    else:
        task = BooleanExpressions.from_dict({"prompt": preset, "tokenizer": CODELLAMA})
        model = EdgeMasked(path=CODELLAMA, mask_embeddings=False, eps=1e-8, dtype="bfloat16")
    base = Experiment(
        task=task,
        model=model,
        objective=EdgePruning(target=1.2, warmup_steps=5_500),
        optimizer=AdamW(lr=0.8, weight_decay=0.01, decay_all=True, warmup_steps=200, schedule="linear", groups=(
            ParameterGroup(match="multipliers.nodes", frozen=True),
            ParameterGroup(match="multipliers", lr=0.4, ascent=True),
        )),
        budget=Budget(steps=6_000, batch_size=32),
        metrics_every=8,
        evaluation=Evaluation(schedule=Every(every=6_000)),
        checkpointing=Checkpointing(schedule=Every(every=512)),
        scaling=Scaling(strategy="fsdp", num_workers=32, device="cuda"),
        seed=42,
    )  # fmt: skip
    base = base.with_overrides(TINY) if preset == "tiny" else base
    return Sweep(
        "edge_pruning_codellama", base, {"seed": Axis(values=(42,))}, metric="eval/validation/kl", mode="min",
        report=edge_pruning_report, probes=(CircuitEvaluation(),),
    )  # fmt: skip


if __name__ == "__main__":
    main(build, PRESETS, default="tiny")
