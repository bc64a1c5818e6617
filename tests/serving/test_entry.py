"""What happens in a process that SGLang starts, with and without DSPARK being asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest

from dspark_sglang.serving import compat
from dspark_sglang.serving.entry import ALGORITHM, PLATFORM, activate_platform, requested_algorithm

PREAMBLE = "import sys; sys.argv = ['launch', *sys.argv[1:]]\n"


def run(
    code: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter without any of our or SGLang's variables."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DSPARK_", "SGLANG_"))
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREAMBLE + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**inherited, **(environment or {})},
    )


# --- what was asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], None),
        (["--model-path", "m"], None),
        (["--speculative-algorithm", "DSPARK"], "DSPARK"),
        (["--speculative-algorithm=DSPARK"], "DSPARK"),
        (["--speculative-algorithm", "dspark"], "DSPARK"),
        (["--speculative-algorithm=dSpark", "--port", "1"], "DSPARK"),
        (["--speculative-algorithm", "EAGLE"], "EAGLE"),
        (["--speculative-algorithm", "EAGLE", "--speculative-algorithm=DSPARK"], "DSPARK"),
        (["--speculative-algorithm=DSPARK", "--speculative-algorithm", "EAGLE"], "EAGLE"),
        (["--speculative-algorithm"], None),
        (["--speculative-algorithm="], None),
        (["--speculative-draft-model-path", "DSPARK"], None),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_algorithm_on_the_command_line(argv: list[str], wanted: str | None) -> None:
    assert requested_algorithm(["launch", *argv], None) == wanted


@pytest.mark.parametrize("flag", ["--speculative-algo", "--speculative-al"])
def test_abbreviated_flag(flag: str) -> None:
    assert requested_algorithm(["launch", flag, "DSPARK"], None) == "DSPARK"
    assert requested_algorithm(["launch", f"{flag}=DSPARK"], None) == "DSPARK"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("speculative-algorithm: DSPARK\n", "DSPARK"),
        ("speculative_algorithm: dspark\nport: 1\n", "DSPARK"),
        ("model-path: m\n", None),
        ("speculative-algorithm:\n", None),
        ("- a\n- list\n", None),
        ("", None),
    ],
    ids=["dashes", "underscores", "absent", "null", "list", "empty"],
)
@pytest.mark.parametrize("joined", [True, False], ids=["--config=file", "--config file"])
def test_algorithm_in_the_arguments_file(
    tmp_path: Path, content: str, wanted: str | None, joined: bool
) -> None:
    path = tmp_path / "arguments.yaml"
    path.write_text(content)
    argv = [f"--config={path}"] if joined else ["--config", str(path)]
    assert requested_algorithm(["launch", *argv], None) == wanted


def test_the_command_line_outranks_the_arguments_file(tmp_path: Path) -> None:
    path = tmp_path / "arguments.yaml"
    path.write_text("speculative-algorithm: DSPARK\n")
    argv = ["launch", "--config", str(path), "--speculative-algorithm", "EAGLE"]
    assert requested_algorithm(argv, None) == "EAGLE"


def test_a_missing_arguments_file_is_left_to_sglang(tmp_path: Path) -> None:
    argv = ["launch", "--config", str(tmp_path / "none.yaml"), "--config"]
    assert requested_algorithm(argv, None) is None


def loader(module: str, signature: str) -> Callable[..., FrameType]:
    """A function of ``module`` with these parameters that returns the frame plugins would see."""
    scope = {"__name__": module, "inner": lambda: sys._getframe(1)}
    exec(f"def load({signature}):\n    return inner()", scope)
    return scope["load"]  # type: ignore[return-value]


ASKED = SimpleNamespace(speculative_algorithm="dspark")
NOT_ASKED = SimpleNamespace(speculative_algorithm=None)


@pytest.mark.parametrize(
    ("signature", "arguments", "wanted"),
    [
        ("server_args", {"server_args": ASKED}, "DSPARK"),
        ("server_args", {"server_args": NOT_ASKED}, None),
        ("**kwargs", {"speculative_algorithm": "DSPARK"}, "DSPARK"),
        ("**kwargs", {"server_args": ASKED}, "DSPARK"),
        ("**kwargs", {"model_path": "m"}, None),
        ("other", {"other": ASKED}, None),
    ],
    ids=["process", "process-without", "engine", "engine-of-args", "engine-without", "other-name"],
)
def test_algorithm_in_the_frames_that_load_plugins(
    signature: str, arguments: dict[str, object], wanted: str | None
) -> None:
    """Child processes and Engine(...) have nothing on the command line."""
    frame = loader("sglang.srt.managers.scheduler", signature)(**arguments)
    assert requested_algorithm(["python"], frame) == wanted


def test_frames_outside_sglang_are_not_read() -> None:
    frame = loader("my_program", "server_args")(ASKED)
    assert requested_algorithm(["python"], frame) is None


def test_the_arguments_of_the_process_outrank_its_command_line() -> None:
    other = SimpleNamespace(speculative_algorithm="EAGLE")
    frame = loader("sglang.srt.entrypoints.engine", "server_args")(other)
    assert requested_algorithm(["x", "--speculative-algorithm", "DSPARK"], frame) == "EAGLE"


# --- platform ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"SGLANG_PLATFORM": "dspark"}, PLATFORM),
        ({"SGLANG_PLATFORM": "dspark", "SGLANG_USE_CPU_ENGINE": "1"}, PLATFORM),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, None),
    ],
    ids=["named", "named-wins", "sglangs-own-cpu"],
)
def test_platform_by_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str | None
) -> None:
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert activate_platform() == wanted


def test_without_an_accelerator_the_platform_is_ours() -> None:
    code = (
        "from dspark_sglang.serving.entry import accelerator_present, activate_platform\n"
        "print(accelerator_present(), activate_platform())\n"
    )
    done = run(code, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout.split() == ["False", PLATFORM], done.stderr


@pytest.mark.gpu
def test_with_an_accelerator_the_platform_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert activate_platform() is None


# --- activation, in real processes --------------------------------------------------------------


def test_importing_the_package_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import dspark_sglang, dspark_sglang.serving.entry\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in"
        " ('torch', 'sglang', 'numpy', 'matplotlib', 'msgspec', 'yaml')))\n"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stderr


#: Forks one process a scenario after importing what SGLang imports before it loads plugins.
#: Only our plugin is let in; SGLANG_PLUGINS is SGLang's own switch for that.
ZYGOTE = """
import json, os, pkgutil, traceback
from pathlib import Path
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

def scenario(argv, environment):
    sys.argv = ['launch_server.py', *argv]
    os.environ.update(environment)
    load_plugins()
    hooks = sys.modules.get('dspark_sglang.serving.hooks')
    print('hooks', sorted(HookRegistry._hooks))
    print('installed', sorted(hooks.installed()) if hooks else None)
    print('loaded', sorted({'dspark_sglang.serving.worker', 'matplotlib'} & set(sys.modules)))

for name, (argv, environment) in json.loads(sys.argv[2]).items():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    folder = Path(sys.argv[1])
    for stream, suffix in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(folder / f'{name}.{suffix}', os.O_WRONLY | os.O_CREAT), stream)
    code = 0
    try:
        scenario(argv, environment)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    (folder / f'{name}.rc').write_text(str(code))
    os._exit(0)
"""
ASK = ["--speculative-algorithm", ALGORITHM]
SCENARIOS: dict[str, tuple[list[str], dict[str, str]]] = {
    "nothing": (["--model-path", "m"], {}),
    "other-algorithm": (["--speculative-algorithm", "EAGLE"], {"DSPARK_TYPO": "1"}),
    "switched-off": (ASK, {"DSPARK_PLUGIN": "off"}),
    "bad-value": (ASK, {"DSPARK_PLUGIN": "on"}),
    "wrong-path": ([*ASK, "--model-path", "/no/such/model"], {}),
}
PARTS = ("rc", "out", "err")
Outcome = tuple[int, list[str], list[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Exit code, output and error lines of every scenario."""
    folder = tmp_path_factory.mktemp("outcomes")
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_PLUGINS": "dspark"}
    done = run(ZYGOTE, str(folder), json.dumps(SCENARIOS), environment=environment)
    assert done.returncode == 0, done.stderr

    def read(name: str) -> Outcome:
        code, out, err = ((folder / f"{name}.{suffix}").read_text() for suffix in PARTS)
        return int(code), out.splitlines(), err.splitlines()

    return {name: read(name) for name in SCENARIOS}


@pytest.mark.costly
@pytest.mark.parametrize("name", ["nothing", "other-algorithm"])
def test_unasked_nothing_changes(outcomes: dict[str, Outcome], name: str) -> None:
    """Not a hook, not an import, and a wrong setting of ours is no concern."""
    assert outcomes[name][:2] == (0, ["hooks []", "installed None", "loaded []"])


@pytest.mark.costly
def test_switched_off_the_builtin_stays(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["switched-off"][:2] == (0, ["hooks []", "installed []", "loaded []"])


def refused(code: int, out: list[str], err: list[str], *, said: str) -> None:
    assert (code, out) == (2, [])
    ours = [line for line in err if line.startswith("dspark:")]
    assert len(ours) == 1
    assert ours[0].startswith("dspark: refusing to start: ") and said in ours[0]
    assert not any("Traceback" in line for line in err)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "said"),
    [("bad-value", "DSPARK_PLUGIN is 'on'"), ("wrong-path", "target path /no/such/model")],
)
def test_a_broken_start_is_refused(outcomes: dict[str, Outcome], name: str, said: str) -> None:
    refused(*outcomes[name], said=said)


@pytest.mark.costly
def test_a_broken_start_ends_a_real_process() -> None:
    """SGLang logs and swallows a plugin's exception, then serves with its builtin."""
    done = run(
        "from sglang.srt.plugins import load_plugins\nload_plugins()\nprint('swallowed')\n",
        *ASK,
        environment={"SGLANG_USE_CPU_ENGINE": "1", "DSPARK_TYPO": "1"},
    )
    said = "DSPARK_TYPO is set but is not a setting"
    refused(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), said=said)


@pytest.mark.costly
def test_asked_every_hook_is_in_place() -> None:
    code = (
        "import pkgutil\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from dspark_sglang.serving import compat, hooks\n"
        "print(sorted(hooks.installed()))\n"
        "for target in (compat.HOOKS | compat.CPU_HOOKS).values():\n"
        "    print(target, hasattr(pkgutil.resolve_name(target), '__wrapped__'))\n"
        "print('dspark_sglang.serving.worker' in sys.modules)\n"
        "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm\n"
        "worker = SpeculativeAlgorithm.DSPARK.create_worker(None)\n"
        "print(worker.__module__, worker.__name__)\n"
    )
    environment = {"SGLANG_PLATFORM": "dspark", "SGLANG_PLUGINS": "dspark"}
    done = run(code, "--speculative-algorithm", "dspark", environment=environment)
    assert done.returncode == 0, done.stderr
    names, *targets, loaded_before, worker = done.stdout.splitlines()
    hooks = compat.HOOKS | compat.CPU_HOOKS
    assert {"arguments", "worker"} < set(hooks)
    assert names == str(sorted(hooks))
    assert targets == [f"{target} True" for target in hooks.values()]
    assert loaded_before == "False"  # imported where it is built, not where it is hooked
    assert worker == "dspark_sglang.serving.worker DSparkWorker"
