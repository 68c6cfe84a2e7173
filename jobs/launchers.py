"""How a stage's process is started: in this process, by spark-submit, by torchrun, or as a Kubernetes job.

The runner and the manifest are the same for all, so are the rows; a launcher only decides where `jobs.runner.run_stage` runs.
A launcher that starts a process hands the run's identity over as arguments and reads the outcome file the stage left.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import profiles
from pipeline import redact
from pipeline import spark as spark_gate
from pipeline.context import Context, read_json
from pipeline.errors import ConfigError, UpstreamMissing, from_fields
from pipeline.stages import BY_NAME

logger = logging.getLogger(__name__)
ENTRY = Path(__file__).with_name("cli.py")
Commands = tuple[list[str], ...]  # run one after the other; what became of the stage is read from its outcome, not from how they ended
FILLS_THE_LAKE = "ingest"
START_SECONDS = 3_600  # a node with a GPU may have to be bought first
WAIT_SECONDS = 86_400
DISTRIBUTED = frozenset({"train_tokenizer"})  # their jobs join a process group; any other would do its work once per process
SAME_MACHINE = frozenset({"submit", "torchrun"})  # a Kubernetes Job may hold keys to the lake that its launcher lacks
PASSED_ON = (
    "SID_HOME",
    "SID_WAREHOUSE",
    "SID_CATALOG_URI",
    "SID_CATALOG_USER",
    "SID_JARS",
    "SID_S3_ENDPOINT",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_URI",
    "SID_NAMESPACE",
)
KEPT_SECONDS = 7 * 86_400  # a finished Job and its log


@dataclass(frozen=True, kw_only=True)
class Request:
    """A stage to run, as strings that survive a process boundary."""

    profile: str
    overrides: tuple[str, ...] = ()

    def arguments(self, ctx: Context) -> list[str]:
        """Arguments of `sid run` that make the same context in another process."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        params = [part for name, value in ctx.params for part in ("--param", f"{name}={value}")]
        identity = ["--date", str(ctx.logical_date), "--run-id", ctx.run_id, "--attempt", str(ctx.attempt), "--reason", ctx.reason]
        return ["run", ctx.stage, "--profile", self.profile, *sets, *identity, *params, "--inline"]


def launch(ctx: Context, request: Request) -> dict[str, Any]:
    """The stage's outcome document, wherever it ran.

    Raises: the SidError that stopped the stage; UpstreamMissing (retry) when its process ended without an outcome; ConfigError when nothing can start it.
    """
    from jobs import runner

    kind = ctx.config.launch.kind
    here = kind == "inline" or (kind in SAME_MACHINE and runner.has_no_work(ctx))
    outcome = runner.run_stage(ctx) if here else _run(COMMANDS[kind](ctx, request), ctx)
    if ctx.stage == FILLS_THE_LAKE:
        profiles.remember(ctx.home, request.profile)
    return outcome


def submit_commands(ctx: Context, request: Request) -> Commands:
    """Command of the `submit` launcher: spark-submit for Spark stages, a plain Python process for the others."""
    if BY_NAME[ctx.stage].engine != "spark":
        return ([sys.executable, "-m", "jobs.cli", *request.arguments(ctx)],)
    launch_settings = ctx.config.launch
    submit = str(Path(sys.executable).with_name("spark-submit"))
    jars = list(map(str, spark_gate.jars()))
    options = ["--master", launch_settings.master, "--driver-memory", launch_settings.driver_memory]
    options += ["--jars", ",".join(jars), "--driver-class-path", os.pathsep.join(jars)]
    options += ["--driver-java-options", spark_gate.driver_options(launch_settings)]  # the session comes too late for them
    return ([submit, *options, str(ENTRY), *request.arguments(ctx)],)


def torchrun_commands(ctx: Context, request: Request) -> Commands:
    """Command of the `torchrun` launcher: several processes for the stages whose training is spread over them, `submit` for the others."""
    if ctx.stage not in DISTRIBUTED:
        return submit_commands(ctx, request)
    processes = ctx.config.launch.processes
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return ([*torchrun, "-m", "jobs.cli", *request.arguments(ctx)],)


def kubernetes_commands(ctx: Context, request: Request) -> Commands:
    """Commands of the `kubernetes` launcher: a Job from the manifest in the run's staging folder, waited for.

    Each try has a manifest and a Job of its own, numbered by what lies in the folder: on the command line every try is attempt 1.
    """
    number = 1 + len(list(ctx.staging.glob(f"{ctx.stage}-*.k8s.json")))
    path = ctx.staging / f"{ctx.stage}-{number}.k8s.json"
    path.write_text(json.dumps(kubernetes_manifest(ctx, request, number), indent=1), encoding="utf-8")
    kubectl = ["kubectl", "--namespace", ctx.config.launch.namespace]
    name = f"job/{job_name(ctx, number)}"
    return (
        # The Job of an earlier try may live on, when its follower was killed or lost it: two would write the same files.
        [*kubectl, "delete", "job", "--selector", f"app=sidmill,try-of={ctx.key}", "--ignore-not-found", "--wait"],
        [*kubectl, "create", "--filename", str(path)],
        # Follows the log to the end of the container, whether it succeeds or fails; no single condition of a Job covers both.
        [*kubectl, "logs", name, "--follow", f"--pod-running-timeout={START_SECONDS}s"],
        # A log stream may break off early: the pod is done when none is ready any more.
        [*kubectl, "wait", name, "--for=jsonpath={.status.ready}=0", f"--timeout={WAIT_SECONDS}s"],
    )


def kubernetes_manifest(ctx: Context, request: Request, number: int) -> dict[str, Any]:
    """The Kubernetes Job of one stage try: no shell, non-root, the home on a volume, addresses from the environment, secrets by name only.

    Raises: ConfigError when the profile names no pinned image or no volume claim.
    """
    image, claim = ctx.config.launch.image, ctx.config.launch.volume_claim
    if not image or image.endswith(":latest"):
        raise ConfigError(
            "the kubernetes launcher needs a pinned image", expected="launch.image by digest or version", found=image or "nothing", where="section [launch]"
        )
    if not claim:
        raise ConfigError("the kubernetes launcher needs a volume for the home", expected="launch.volume_claim", found="nothing", where="section [launch]")
    stage = BY_NAME[ctx.stage]
    addresses = {**os.environ, "SID_HOME": str(ctx.home.root)}
    container = {
        "name": "stage",
        "image": image,
        "command": ["python", "-m", "jobs.cli", *request.arguments(ctx)],
        "env": [{"name": name, "value": addresses[name]} for name in PASSED_ON if name in addresses and not redact.holds_secret(addresses[name])],
        "envFrom": [{"secretRef": {"name": "sidmill", "optional": True}}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}} if stage.gpu else {},
        "securityContext": {"runAsNonRoot": True, "allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "home", "mountPath": str(ctx.home.root)}],
    }
    volumes = [{"name": "home", "persistentVolumeClaim": {"claimName": claim}}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(ctx, number), "labels": {"app": "sidmill", "stage": stage.name, "try-of": ctx.key}},
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"spec": {"restartPolicy": "Never", "containers": [container], "volumes": volumes}},
        },
    }


def job_name(ctx: Context, number: int) -> str:
    """Name of the Kubernetes Job of the n-th try of a stage in a run."""
    return f"sid-{ctx.stage.replace('_', '-')}-{ctx.key}-{number}"


COMMANDS: Mapping[str, Callable[[Context, Request], Commands]] = {
    "submit": submit_commands,
    "torchrun": torchrun_commands,
    "kubernetes": kubernetes_commands,
}


def _run(commands: Commands, ctx: Context) -> dict[str, Any]:
    path = ctx.staging / f"{ctx.stage}.json"
    path.unlink(missing_ok=True)
    codes = []
    for command in commands:
        if shutil.which(command[0]) is None:
            raise ConfigError(
                f"{Path(command[0]).name} is not installed", expected="an executable", found=command[0], where=f"launch.kind = {ctx.config.launch.kind}"
            )
        logger.info("launch command=%s", shlex.join(command))
        codes.append(subprocess.run(command, env=_environment(ctx), check=False).returncode)
    if not path.is_file():
        raise UpstreamMissing(
            f"the process of {ctx.stage} ended without an outcome",
            expected=str(path),
            found=f"exit code {next(filter(None, codes), 0)}",
            where=shlex.join(commands[0][:3]),
            next_command="see the task's log",
        )
    outcome = read_json(path)
    if outcome["status"] == "failed":
        raise from_fields(outcome["error"])
    return outcome


def _environment(ctx: Context) -> dict[str, str]:
    python = {"PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
    return {**os.environ, **python, "SID_HOME": str(ctx.home.root), "JAVA_HOME": spark_gate.java_home()}
