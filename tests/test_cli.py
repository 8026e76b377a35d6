"""The command line: commands are found without a list, and the doctor reports what this machine would run."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch

import linattn
from linattn import backend, cli
from linattn.cli import doctor


def linattn_command(*arguments, **environment):
    """Run `python -m linattn ...` as a user does, away from the checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LINATTN_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, "-m", "linattn", *arguments],
        env=env | environment,
        cwd=os.path.abspath(os.sep),
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------------------------- registry


def test_every_module_in_the_folder_is_a_command():
    folder = os.path.dirname(cli.__file__)
    modules = {name[:-3] for name in os.listdir(folder) if name.endswith(".py") and not name.startswith("_")}
    assert {module.__name__.rpartition(".")[2] for module in cli.commands().values()} == modules


def test_a_new_module_becomes_a_command_and_gets_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "greet.py").write_text(
        "'''Says it.'''\n"
        "NAME, HELP = 'say-hello', 'one greeting'\n"
        "def add_arguments(parser): parser.add_argument('--times', type=int, default=1)\n"
        "def run(args): print('hello ' * args.times); return 7\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert "say-hello" in cli.commands()
        assert cli.main(["say-hello", "--times", "3"]) == 7
    finally:
        sys.modules.pop("linattn.cli.greet", None)


def test_a_module_that_is_no_command_is_an_error_that_names_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("HELP = 'x'\ndef run(args): return 0\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        with pytest.raises(TypeError, match=r"linattn\.cli\.half: .*add_arguments"):
            cli.commands()
    finally:
        sys.modules.pop("linattn.cli.half", None)


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_help_of_every_command_names_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"linattn {name}" in text and "--help" in text


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["no-such-command"])
    assert stop.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_the_version_is_written_in_one_place():
    done = linattn_command("--version")
    assert done.stdout.strip() == f"linattn {linattn.__version__}"


def test_interrupting_a_command_is_no_traceback(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    command = types.SimpleNamespace(HELP="x", __doc__="x", add_arguments=lambda parser: None, run=interrupted)
    monkeypatch.setattr(cli, "commands", lambda: {"slow": command})
    assert cli.main(["slow"]) == 130


# --------------------------------------------------------------------------------------------------------- doctor


def test_no_command_is_the_doctors_report():
    bare, named = linattn_command(), linattn_command("doctor")
    assert bare.returncode == named.returncode == 0, bare.stderr + named.stderr
    assert bare.stdout == named.stdout


def test_doctor_reports_versions_libraries_and_every_op():
    done = linattn_command("doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"torch +{re.escape(torch.__version__)}", done.stdout)
    for name in ("_C_cpu", "_C_cuda", *{row["op"] for row in backend.report()}):
        assert name in done.stdout
    # A CPU never runs the CUDA backend, and the report says why.
    assert re.search(r"not cuda: \S+", done.stdout)


def test_doctor_as_json_agrees_with_the_library():
    done = linattn_command("doctor", "--json")
    facts = json.loads(done.stdout)
    assert facts["versions"]["linattn"] == linattn.__version__
    assert {row["op"] for row in facts["ops"]} == {row["op"] for row in backend.report()}
    assert all(set(row["why_not"]).isdisjoint({row["backend"]}) for row in facts["ops"])


def test_doctor_says_which_instruction_set_the_kernels_use():
    if doctor.processor()["kernels"] is None:
        pytest.skip(f"the CPU library is not loaded: {doctor.libraries()['_C_cpu']}")
    facts = json.loads(linattn_command("doctor", "--json", LINATTN_CPU_ISA="baseline").stdout)
    assert facts["cpu"]["kernels"] == "baseline"
    assert facts["settings"] == {"LINATTN_CPU_ISA": "baseline"}


def test_doctor_fails_and_says_why_when_a_forced_backend_cannot_run():
    done = linattn_command("doctor", LINATTN_BACKEND="cuda")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device: forcing cuda there is no mistake")
    assert done.returncode == 1
    assert "ERROR" in done.stdout and "LINATTN_BACKEND=cuda" in done.stdout


def test_doctor_refuses_an_unknown_backend_by_name():
    done = linattn_command("doctor", LINATTN_BACKEND="gpu")
    assert done.returncode != 0
    assert "LINATTN_BACKEND" in done.stdout + done.stderr and "gpu" in done.stdout + done.stderr
