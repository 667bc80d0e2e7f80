"""The command, as a user gives it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from groundswell.commands import main
from groundswell.planning import inputs
from groundswell.planning.report import flags
from models.decoder import Decoder
from tasks.random_tokens import RandomTokens

SWEEPS = Path(__file__).parents[3] / "sweeps"


@pytest.fixture
def file(tiny, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    return path


def planned(capsys, *arguments) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_table_a_verdict_and_flags(file, capsys):
    assert main(["plan", str(file), "--gpus", "2", "--gpu", "a100-40", "--weak-scaling", "2,8"]) == 0
    text = capsys.readouterr().out
    assert "Fits on 2 x a100-40 with ddp" in text
    assert "--scaling.strategy ddp --scaling.num-workers 2 --scaling.precision float32 --scaling.micro-batch 16" in text
    assert "weak scaling" in text and "efficiency" in text


@pytest.mark.slow
def test_one_json_object(file, capsys):
    found = planned(capsys, file, "--gpus", 2, "--price-per-gpu-hour", 3, "--weak-scaling", "2,4")
    assert found["best"] == "ddp" and found["flags"].startswith("--scaling.strategy ddp")
    best = next(row for row in found["rows"] if row["label"] == "ddp")
    parts = {name: value for name, value in best["memory_bytes"].items() if name not in ("host", "gpu_total")}
    assert sum(parts.values()) == pytest.approx(best["memory_bytes"]["gpu_total"])
    assert best["cost"] == pytest.approx(3 * best["gpu_hours"])
    assert [point["num_gpus"] for point in found["weak_scaling"]] == [2, 4]
    assert found["machine"]["gpu"]["name"] == "h200"


@pytest.mark.slow
def test_the_flags_are_a_setting_that_plans_the_same(file, capsys):
    found = planned(capsys, file, "--gpus", 2)
    again = planned(capsys, file, "--gpus", 2, *found["flags"].split())
    best = [next(row for row in plan["rows"] if row["label"] == plan["best"]) for plan in (found, again)]
    assert best[0] == best[1]


@pytest.mark.slow
def test_fields_can_be_overridden(file, capsys):
    wide = planned(capsys, file, "--model.width", 64, "--scaling.precision=bf16")
    narrow = planned(capsys, file)
    assert wide["parameters"]["total"] > 4 * narrow["parameters"]["total"]
    assert wide["rows"][0]["scaling"]["precision"] == "bf16"


@pytest.mark.slow
def test_nothing_fits_is_exit_code_1(file, capsys):
    custom = ["--gpu", "custom", "--memory-gib", "0.00001", "--tflops", "1", "--reserve-gib", "0"]
    assert main(["plan", str(file), *custom]) == 1
    assert "Does not fit on 1 x custom" in capsys.readouterr().out


def test_a_python_file_with_extras(tmp_path, capsys):
    path = tmp_path / "study.py"
    path.write_text(
        "from groundswell import Experiment\n"
        "from groundswell.planning.strategies import Extra\n"
        "from models.decoder import Decoder\n"
        "from models.objectives import AnswerLoss\n"
        "from tasks.random_tokens import RandomTokens\n"
        "task = RandomTokens(vocabulary=50, length=20, answers=2)\n"
        "model = Decoder(num_layers=2, width=16, num_heads=2)\n"
        "experiment = Experiment(task=task, model=model, objective=AnswerLoss())\n"
        "def plan_extras(experiment, micro_batch):\n"
        "    return Extra('buffers', bytes_per_gpu=1e6 * micro_batch)\n"
    )
    found = planned(capsys, path, "--budget.batch_size", 32)
    assert found["extra"]["name"] == "buffers"
    assert found["rows"][0]["memory_bytes"]["extra"] == 32e6


def test_of_a_sweep_file_the_first_run_of_a_preset():
    file = str(SWEEPS / "llama_grokking.py")
    subject = inputs.load(file, {"budget.batch_size": 7}, "demo")
    assert subject.name == "llama_grokking"
    assert isinstance(subject.experiment.model, Decoder)  # the first of the axis of architectures
    assert (subject.experiment.budget.steps, subject.experiment.budget.batch_size) == (3000, 7)
    assert inputs.load(file, {}, "smoke").experiment.budget.steps == 60


@pytest.mark.parametrize(("arguments", "message"), [
    (["{file}", "--gpu", "h20"], "--gpu h20: did you mean 'h200'?"),
    (["gpt2-smal"], "gpt2-smal: no such preset and no .py, .yaml or .json file; did you mean 'gpt2-small'?"),
    (["{file}", "--gpus", "0"], "--gpus 0: must be more than 0"),
    (["{file}", "--gpus", "-3"], "--gpus -3: must be more than 0"),
    (["{file}", "--mfu", "40"], "--mfu 40: is a part of the peak"),
    (["{file}", "--tflops", "40"], "--tflops: is for --gpu custom"),
    (["{file}", "--gpu", "custom"], "--gpu custom: needs --memory-gib and --tflops"),
    (["{file}", "--weak-scaling", "8;32"], "--weak-scaling 8;32: write numbers of GPUs"),
    (["{file}", "--gpsu", "4"], "--gpsu: no such option; did you mean '--gpu'?"),
    (["{file}", "--model.widht", "4"], "model.widht: 'model' has no field 'widht'; did you mean 'width'?"),
    (["{folder}/none.yaml"], "none.yaml: no such file"),
    (["{folder}/empty.py"], "empty.py: defines no experiment"),
    (["{folder}/broken.py"], "broken.py: NameError: name 'nothing' is not defined"),
    (["{sweep}", "--preset", "papr"], "has no such preset; python {sweep} --help lists them"),
    (["{file}", "--model.class", "models.bilinear.Bilinear", "--gpus", "4"], "model Bilinear cannot be spread"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(arguments, message, file, tmp_path, capsys):
    (tmp_path / "empty.py").write_text("answer = 42\n")
    (tmp_path / "broken.py").write_text("nothing\n")
    names = {"file": file, "folder": tmp_path, "sweep": SWEEPS / "llama_grokking.py"}
    assert main(["plan", *(text.format(**names) for text in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(**names) in error and "\n" not in error


def test_presets_are_listed(capsys):
    assert main(["plan", "--list"]) == 0
    text = capsys.readouterr().out
    for name in ("gpt2-xl", "codellama-13b-pruning", "h200", "a100-80"):
        assert name in text


def test_listing_does_not_wait_for_torch():
    code = (
        "import sys; from groundswell.commands import main; main(['plan', '--list']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


SIZES = {  # millions of parameters
    "gpt2-small": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558, "gpt2-small-pruning": 124,
    "codellama-7b-pruning": 6739, "codellama-13b-pruning": 13016, "codellama-13b-pruning-published": 13016,
}  # fmt: skip


def test_every_preset_is_known_here():
    assert set(inputs.presets()) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_networks_of_the_published_size(name):
    """Without data, tokenizer or weights."""
    import math

    experiment = inputs.load(name, {}).experiment
    assert isinstance(experiment.task, RandomTokens)
    specs = experiment.model.parameters(experiment.task.vocab_size, experiment.task.max_length)
    assert round(sum(math.prod(spec.shape) for spec in specs) / 1e6) == SIZES[name]


@pytest.mark.slow
def test_the_published_pruning_fits_as_published(capsys):
    """13B on 32 GPUs of 80 GB, FSDP with CPU offload and recomputed blocks; a copy each does not fit."""
    found = planned(capsys, "codellama-13b-pruning-published", "--gpus", 32, "--gpu", "a100-80")
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["fsdp, offload all, checkpointing"]["fits"] and not rows["ddp, checkpointing"]["fits"]
    assert rows["fsdp, offload all, checkpointing"]["hours"] < 35
    fast = planned(capsys, "codellama-13b-pruning", "--gpus", 32, "--gpu", "a100-80")
    assert next(row for row in fast["rows"] if row["label"] == fast["best"])["step_s"] < min(
        row["step_s"] for row in rows.values() if row["fits"]
    )


def test_flags_name_every_choice():
    from groundswell import Scaling

    own = Scaling.from_dict({"strategy": "deepspeed", "num_workers": 4, "zero_stage": 3, "offload": "all",
                             "precision": "bf16", "micro_batch": 2, "activation_checkpointing": True})  # fmt: skip

    class Row:
        scaling = own

    assert flags(Row()) == (  # type: ignore[arg-type]
        "--scaling.strategy deepspeed --scaling.num-workers 4 --scaling.zero-stage 3 --scaling.precision bf16 "
        "--scaling.micro-batch 2 --scaling.activation-checkpointing true --scaling.offload all"
    )
