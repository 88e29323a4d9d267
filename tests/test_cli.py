"""The command line: help, doctor, explain on small scripts, and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import inductor_moe
from inductor_moe import demo, doctor
from inductor_moe.cli import app
from inductor_moe.errors import InductorMoeError
from inductor_moe.targets import load

SCRIPT = """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    def build():
        config = Qwen3MoeConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            vocab_size=64,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        return model, (torch.arange(8)[None],), {"use_cache": False}

    def plain():
        return torch.nn.Linear(4, 4), (torch.ones(2, 4),)

    def wrong():
        return torch.nn.Linear(4, 4)

    number = 3
"""


@pytest.fixture
def invoke():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "little_model.py"
    file.write_text(textwrap.dedent(SCRIPT))
    return file


COMMANDS = sorted(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples(invoke, command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0, result.output
    _, _, examples = result.output.partition("Examples:")
    lines = [line.split() for line in examples.splitlines() if line.strip()]
    assert lines
    for line in lines:
        assert line[0] == "inductor-moe" and line[1] in COMMANDS
        assert command in ("", line[1])


def test_version(invoke):
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"inductor-moe {inductor_moe.__version__}\n"


def test_module_and_console_script_agree():
    from importlib import metadata

    (point,) = metadata.entry_points(group="console_scripts", name="inductor-moe")
    assert point.value == "inductor_moe.cli:main"
    command = [sys.executable, "-m", "inductor_moe.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"inductor-moe {inductor_moe.__version__}\n"


def test_doctor_is_content_here(invoke):
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for what in ("python", "torch", "triton", "gpu", "C++ compiler", "cache folder", "backend"):
        assert what in result.output


def test_doctor_names_a_remedy_and_fails(invoke, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "no-such-compiler is not on the PATH" in result.output
    assert "-> install g++" in result.output


def test_doctor_finds_a_torch_and_triton_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["triton==2.1.0; extra == 'x'"])
    finding = doctor._triton()
    assert finding.status == "error"
    assert finding.remedy == "pip install triton==2.1.0"


@pytest.mark.parametrize(
    "hip, capability, remedy",
    [
        (None, (9, 0), ""),
        (None, (7, 5), "the GPU has compute capability 7.5, below 8.0; PyTorch's own ops run"),
        ("6.4", (9, 4), "there are no kernels for AMD GPUs; PyTorch's own ops run"),
    ],
)
def test_doctor_knows_which_gpus_run_the_kernels(hip, capability, remedy, monkeypatch):
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_name": "GPU",
        "get_device_capability": capability,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", hip)
    finding = doctor._gpu()
    assert finding.status == ("warning" if remedy else "ok")
    assert finding.remedy.startswith(remedy) and bool(finding.remedy) == bool(remedy)


def test_doctor_reports_a_check_that_fails(monkeypatch):
    def _broken():
        raise ZeroDivisionError("no")

    monkeypatch.setattr(doctor, "CHECKS", (_broken,))
    (finding,) = doctor.diagnose()
    assert (finding.what, finding.status) == ("broken", "error")
    assert "ZeroDivisionError: no" in finding.found


def test_explain_writes_text_json_and_html(invoke, script, tmp_path):
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    result = invoke("explain", str(script), "--html", str(page), "--json", str(data), "--strict")
    assert result.exit_code == 0, result.output
    assert "fused 2 moe_experts" in result.output
    assert json.loads(data.read_text())["counts"]["moe_experts"] == 2
    assert page.read_text().startswith("<!doctype html>")
    assert "model.layers.1.mlp.experts" in page.read_text()


def test_explain_prints_json_alone(invoke, script):
    result = invoke("explain", f"{script}:plain", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"] == {}


def test_bisect_finds_nothing_in_a_plain_model(invoke, script):
    result = invoke("bisect", f"{script}:plain")
    assert result.exit_code == 0, result.output
    assert "no rewrite changes the result" in result.output


def test_explain_strict_fails_without_sites(invoke, script):
    result = invoke("explain", f"{script}:plain", "--strict")
    assert result.exit_code == 1
    assert "no sites" in result.output


@pytest.mark.parametrize(
    "suffix, message",
    [
        (":wrong", "returned (Linear); it must return (model, args) or (model, args, kwargs)"),
        (":number", "found a int"),
        (":absent", "found no such name"),
    ],
)
def test_explain_says_what_is_wrong_with_a_target(invoke, script, suffix, message):
    result = invoke("explain", f"{script}{suffix}")
    assert result.exit_code == 2
    assert message in result.output


def test_explain_without_the_file_or_module(invoke):
    assert "no_such.py: no such file" in invoke("explain", "no_such.py").output
    assert "no_such_module: no such module" in invoke("explain", "no_such_module:f").output


@pytest.mark.parametrize(
    "command",
    ["explain no_such.py --html", "explain no_such.py --json", "bench --json", "bench --plot",
     "bench generate --json", "bench scale --json", "profile --trace"],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_said_before_the_work(invoke, tmp_path, command):
    result = invoke(*command.split(), str(tmp_path / "no" / "out.png"))
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", "").split())
    assert f"'{command.split()[-1]}': there is no folder" in said


def test_modules_load_from_the_working_directory(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, args, kwargs = load("little_model:build")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert len(args) == 1 and kwargs == {"use_cache": False}


def test_an_import_error_inside_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needy_model.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load("needy_model:build")


def test_demo_refuses_a_gpu_that_is_not_there(invoke, monkeypatch):
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    result = invoke("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "sees no GPU" in result.output


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("demo", "--device", "tpu"), "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (("demo", "--mode", "fast"), "mode: Unrecognized mode=fast, should be one of: default"),
        (("bench", "--device", "tpu"), "device: expected cuda or cpu, got 'tpu'"),
        (("bench", "--plot", "rows.xyz"), "expected a file in .png, .svg, .pdf, got rows.xyz"),
        (("bench", "--show", "no_such.json"), "no_such.json: no such file"),
        (("bisect", "no_such.py", "--tolerance", "-1"), "Invalid value for '--tolerance'"),
    ],
    ids=["device", "mode", "bench", "plot", "show", "tolerance"],
)
def test_unknown_choices_are_one_line(invoke, arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert expected in result.output and "Traceback" not in result.output


def test_demo_restores_the_weights_after_fp64():
    setup = demo.choose("cpu", layers=1)
    model = demo.build(setup)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with demo.torch.no_grad(), demo.in_fp64(model, setup.experts):
        logits = demo.Generation(model, setup).all(model)["prefill"]
    assert logits.dtype == demo.torch.float64
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and demo.torch.equal(value, before[name])
    assert model.config._experts_implementation == "grouped_mm"


def runs(ours):
    exact = dict.fromkeys(demo.PHASES, 0.001)
    errors = {demo.EAGER: exact, demo.STOCK: exact, demo.OURS: dict.fromkeys(demo.PHASES, ours)}
    return {way: demo.Run(error, exact) for way, error in errors.items()}


def report(matched):
    site = inductor_moe.Site("moe_experts", "moe.experts.grouped_mm")
    return inductor_moe.Report(sites=(site,) * matched)


@pytest.mark.parametrize(
    "error, reports, problem",
    [
        (2e-3, [report(2), report(2)], None),
        (2.1e-3, [report(2)], "the budget is 2.00e-03"),
        (float("nan"), [report(2)], "nan from fp64"),
        (1e-3, [report(2), report(1)], "1 of 2 MoE layers"),
        (1e-3, [], "compiled nothing"),
    ],
)
def test_demo_judges(error, reports, problem):
    problems = demo.judge(demo.choose("cpu"), runs(error), reports)
    assert bool(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_demo_passes_here(invoke):
    result = invoke("demo", "--device", "cpu", "--layers", "1")
    assert result.exit_code == 0, result.output
    assert "2 moe_experts" in result.output  # one layer in each of prefill and decode
    for way in (demo.EAGER, demo.STOCK, demo.OURS):
        assert way in result.output
    assert "All MoE layers fused" in result.output


def test_our_errors_are_of_one_family():
    with pytest.raises(InductorMoeError):
        load("no_such.py")
