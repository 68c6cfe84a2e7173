"""Launchers: lists of words, never a shell; a run's identity survives the way through another process."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import launchers
from jobs.launchers import COMMANDS, Request, job_name, kubernetes_manifest, launch
from pipeline import config
from pipeline.context import ROOT, Context, Home, write_json
from pipeline.errors import ConfigError, ContractError, GateFailed, UpstreamMissing
from pipeline.stages import STAGES

NASTY = "$(touch gone); `x` && 'y' \"z\" | \\ *"


def context(folder: Path, stage: str = "ingest", *overrides: str, **changes: Any) -> Context:
    given_ = {
        "config": config.load("tiny", overrides), "home": Home(folder / "home"), "stage": stage, "logical_date": date(2026, 3, 1),
        "run_id": "scheduled__2026-03-01T00:00:00+00:00", "attempt": 2, "reason": NASTY, "params": (("release", "d20260301"),),
    }  # fmt: skip
    return Context(**{**given_, **changes})


def received(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Context, Request]:
    """What `sid <arguments>` would launch."""
    from typer.main import get_command

    from jobs import cli

    seen: list[tuple[Context, Request]] = []

    def catch(ctx: Context, request: Request) -> dict[str, Any]:
        seen.append((ctx, request))
        return {"stage": ctx.stage, "status": "done", "seconds": 0.0}

    monkeypatch.setattr(launchers, "launch", catch)
    get_command(cli.app).main(args=arguments, prog_name="sid", standalone_mode=False)
    return seen[-1]


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_the_arguments_make_the_same_context_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    overrides = ("seed=3", "source.path=a folder/with = equals", "train_ranker.arms=['id']", "launch.kind=submit")
    ctx = context(tmp_path, stage, *overrides)
    monkeypatch.setenv("SID_HOME", str(ctx.home.root))
    write_json(ctx.staging / "plan_night.json", {"outputs": {}})
    found, request = received(Request(profile="tiny", overrides=overrides).arguments(ctx), monkeypatch)
    assert found.config.launch.kind == "inline", "the started process must not start another"
    assert {**vars(found), "config": None} == {**vars(ctx), "config": None}
    assert found.config.digest() == ctx.config.digest()
    assert request == Request(profile="tiny", overrides=overrides)
    assert found.branch == ctx.branch


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    words=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20), min_size=2, max_size=2),
    attempt=st.integers(1, 99),
)
def test_any_text_survives(tmp_path: Path, words: list[str], attempt: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ctx = context(tmp_path, "maintain", run_id="r" + words[0], reason=words[1], params=(("word", words[0]),), attempt=attempt)
        monkeypatch.setenv("SID_HOME", str(ctx.home.root))
        found, _ = received(Request(profile="tiny").arguments(ctx), monkeypatch)
        assert {**vars(found), "config": None} == {**vars(ctx), "config": None}


def test_a_process_of_a_named_run_keeps_the_nights_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest by hand plans anew; ingest in a launcher's process must not: a retry a day later still makes the same night."""
    ctx = context(tmp_path, "ingest")
    monkeypatch.setenv("SID_HOME", str(ctx.home.root))
    write_json(ctx.staging / "plan_night.json", {"outputs": {}})
    stages: list[str] = []

    def note(ctx: Context, request: Request) -> dict[str, Any]:
        stages.append(ctx.stage)
        return {"stage": ctx.stage, "status": "done", "seconds": 0.0}

    monkeypatch.setattr(launchers, "launch", note)
    from typer.main import get_command

    from jobs import cli

    get_command(cli.app).main(args=Request(profile="tiny").arguments(ctx), standalone_mode=False)
    assert stages == ["ingest"]


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("kind", sorted(COMMANDS))
@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_a_command_is_a_list_of_words_that_ends_in_the_stages_arguments(tmp_path: Path, kind: str, stage: str) -> None:
    ctx = context(tmp_path, stage, "launch.image=sidmill:1.2.3", "launch.volume_claim=home")
    request = Request(profile="tiny", overrides=("seed=3",))
    for command in COMMANDS[kind](ctx, request):
        assert all(isinstance(word, str) for word in command)
        assert Path(command[0]).name not in ("sh", "bash", "env", "zsh")
        assert "-c" not in command
    if kind != "kubernetes":
        assert command[-len(request.arguments(ctx)) :] == request.arguments(ctx)
        assert NASTY in command, "the reason is one word, quoting is nobody's business"


def test_submit_uses_spark_for_spark_stages_only(tmp_path: Path) -> None:
    (spark,) = COMMANDS["submit"](context(tmp_path, "ingest", "launch.master=spark://127.0.0.1:7077", "launch.driver_memory=3g"), Request(profile="tiny"))
    assert Path(spark[0]).name == "spark-submit"
    assert spark[spark.index("--master") + 1] == "spark://127.0.0.1:7077"
    assert spark[spark.index("--driver-memory") + 1] == "3g"
    options = spark[spark.index("--driver-java-options") + 1]
    assert options.endswith(config.load("tiny").launch.java_options), "the driver's JVM runs before a session can ask for them"
    assert "ReservedCodeCacheSize" in options, "a night fills the code cache that a JVM without C2 reserves by itself"
    assert Path(spark[spark.index("--jars") + 1]).is_file()
    assert Path(spark[spark.index("run") - 1]).is_file(), "spark-submit is given the entry file"
    for stage in ("plan_night", "train_tokenizer"):
        (plain,) = COMMANDS["submit"](context(tmp_path, stage), Request(profile="tiny"))
        assert plain[:4] == [sys.executable, "-m", "jobs.cli", "run"]


def test_torchrun_starts_several_processes_only_for_stages_that_join_a_process_group(tmp_path: Path) -> None:
    (command,) = COMMANDS["torchrun"](context(tmp_path, "train_tokenizer", "launch.processes=3"), Request(profile="tiny"))
    assert "torch.distributed.run" in command
    assert command[command.index("--nproc-per-node") + 1] == "3"
    joining = {stage.name for stage in STAGES if "init_process_group" in (ROOT / "jobs" / f"{stage.name}.py").read_text(encoding="utf-8")}
    assert joining == launchers.DISTRIBUTED
    for stage in {stage.name for stage in STAGES} - joining:
        ctx = context(tmp_path, stage)
        assert COMMANDS["torchrun"](ctx, Request(profile="tiny")) == COMMANDS["submit"](ctx, Request(profile="tiny"))


# ---------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("image", ["", "sidmill:latest", "registry.example/sidmill:latest"])
def test_an_image_that_may_change_is_refused(tmp_path: Path, image: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kubernetes_manifest(context(tmp_path, "ingest", f"launch.image={image}", "launch.volume_claim=home"), Request(profile="tiny"), 1)
    assert "launch.image" in caught.value.expected
    assert caught.value.found == (image or "nothing")


def test_the_manifest_is_one_non_root_container_without_retries_or_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.setenv("SOME_PASSWORD", "hunter2")
    monkeypatch.delenv("SID_HOME", raising=False)
    monkeypatch.setenv("SID_JARS", "postgresql.jar")
    ctx = context(tmp_path, "train_tokenizer", "launch.image=sidmill@sha256:0123", "launch.volume_claim=home")
    manifest = kubernetes_manifest(ctx, Request(profile="tiny"), 1)
    assert manifest["spec"]["backoffLimit"] == 0, "retries are Airflow's"
    assert manifest["spec"]["ttlSecondsAfterFinished"] > 0, "finished Jobs go away by themselves"
    pod = manifest["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["securityContext"] == {"runAsNonRoot": True, "allowPrivilegeEscalation": False}
    assert container["image"] == "sidmill@sha256:0123"
    assert container["command"] == ["python", "-m", "jobs.cli", *Request(profile="tiny").arguments(ctx)]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow.example"
    assert environment["SID_HOME"] == str(ctx.home.root), "the outcome file is read from the launcher's own home"
    assert environment["SID_JARS"] == "postgresql.jar"
    assert pod["volumes"] == [{"name": "home", "persistentVolumeClaim": {"claimName": "home"}}]
    assert container["volumeMounts"] == [{"name": "home", "mountPath": str(ctx.home.root)}]
    assert "hunter2" not in json.dumps(manifest)
    other = context(tmp_path, "ingest", "launch.image=sidmill:1.2", "launch.volume_claim=home")
    assert kubernetes_manifest(other, Request(profile="tiny"), 1)["spec"]["template"]["spec"]["containers"][0]["resources"] == {}


def test_a_job_without_a_volume_for_the_home_is_refused_because_its_outcome_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.volume_claim"):
        kubernetes_manifest(context(tmp_path, "ingest", "launch.image=sidmill:1.2"), Request(profile="tiny"), 1)


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_a_job_name_is_a_valid_label_and_differs_by_try(tmp_path: Path, stage: str) -> None:
    import re

    name = job_name(context(tmp_path, stage), 12)
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])", name)
    assert name != job_name(context(tmp_path, stage), 13)


def test_the_job_is_created_from_the_staged_manifest_followed_and_waited_for(tmp_path: Path) -> None:
    ctx = context(tmp_path, "ingest", "launch.image=sidmill:1.2", "launch.volume_claim=home", "launch.namespace=night")
    clear, create, follow, wait = COMMANDS["kubernetes"](ctx, Request(profile="tiny"))
    assert all(command[:3] == ["kubectl", "--namespace", "night"] for command in (clear, create, follow, wait))
    assert clear[3:] == ["delete", "job", "--selector", f"app=sidmill,try-of={ctx.key}", "--ignore-not-found", "--wait"], "an earlier try's Job may live on"
    assert json.loads(Path(create[-1]).read_text())["metadata"]["labels"]["try-of"] == ctx.key
    assert json.loads(Path(create[-1]).read_text())["metadata"]["name"] == job_name(ctx, 1)
    assert (follow[3], wait[3]) == ("logs", "wait")
    assert f"job/{job_name(ctx, 1)}" in follow
    assert f"job/{job_name(ctx, 1)}" in wait


def test_the_same_stage_run_again_by_hand_makes_another_job(tmp_path: Path) -> None:
    ctx = context(tmp_path, "ingest", "launch.image=sidmill:1.2", "launch.volume_claim=home", attempt=1)
    made = [json.loads(Path(COMMANDS["kubernetes"](ctx, Request(profile="tiny"))[1][-1]).read_text())["metadata"]["name"] for _ in range(3)]
    assert made == [job_name(ctx, number) for number in (1, 2, 3)]


def test_a_machine_without_kubectl_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="kubectl is not installed"):
        launch(context(tmp_path, "maintain", "launch.kind=kubernetes", "launch.image=sidmill:1.2", "launch.volume_claim=home"), Request(profile="tiny"))


# ---------------------------------------------------------------- outcomes


def start(ctx: Context, script: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Launch `script` instead of the stage's process: a real child, only its work is not the stage's."""
    monkeypatch.setitem(launchers.COMMANDS, "submit", lambda ctx, request: ([sys.executable, "-c", script],))  # type: ignore[arg-type]
    return launch(ctx, Request(profile="tiny"))


def writes(path: Path, document: dict[str, Any], code: int = 0) -> str:
    return f"import json, pathlib, sys; pathlib.Path({str(path)!r}).write_text(json.dumps({document!r})); sys.exit({code})"


def test_the_outcome_of_the_process_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, "maintain", "launch.kind=submit")
    outcome = {"stage": "maintain", "status": "done", "seconds": 1.0, "outputs": {"a": 1}}
    assert start(ctx, writes(ctx.staging / "maintain.json", outcome), monkeypatch) == outcome


def test_the_error_of_the_process_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, "maintain", "launch.kind=submit")
    error = GateFailed("two expectations failed", expected="a", found="b", where="c", next_command="sid inspect d")
    with pytest.raises(GateFailed) as caught:
        start(ctx, writes(ctx.staging / "maintain.json", {"status": "failed", "error": error.fields()}, code=64), monkeypatch)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("script", "found"), [("import os; os.kill(os.getpid(), 9)", "exit code -9"), ("", "exit code 0"), ("raise SystemExit(3)", "exit code 3")]
)
def test_a_process_without_an_outcome_may_be_retried_and_an_old_outcome_is_not_taken_for_its(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: str
) -> None:
    ctx = context(tmp_path, "maintain", "launch.kind=submit")
    write_json(ctx.staging / "maintain.json", {"status": "done", "stage": "maintain"})  # of an earlier try
    with pytest.raises(UpstreamMissing) as caught:
        start(ctx, script, monkeypatch)
    assert caught.value.found == found
    assert caught.value.exit_code == 75


def test_a_damaged_outcome_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, "maintain", "launch.kind=submit")
    path = ctx.staging / "maintain.json"
    with pytest.raises(ContractError) as caught:
        start(ctx, f"open({str(path)!r}, 'w').write('half of')", monkeypatch)
    assert caught.value.where == str(path)


def test_the_process_finds_this_home_a_java_and_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, "maintain", "launch.kind=submit")
    monkeypatch.setenv("SID_HOME", "somewhere else")
    script = (
        "import json, os, pathlib; names = ('SID_HOME', 'JAVA_HOME', 'PYSPARK_PYTHON');"
        f"pathlib.Path({str(ctx.staging / 'maintain.json')!r}).write_text(json.dumps(dict(status='done', env=dict((n, os.environ[n]) for n in names))))"
    )
    environment = start(ctx, script, monkeypatch)["env"]
    assert environment["SID_HOME"] == str(ctx.home.root)
    assert environment["PYSPARK_PYTHON"] == sys.executable
    assert (Path(environment["JAVA_HOME"]) / "bin" / "java").is_file()
