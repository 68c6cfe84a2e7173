"""The files of docker/: pinned bases, users that are not root, loopback ports, health checks, named volumes, and no secret anywhere."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from pipeline import config
from pipeline.context import ROOT

FOLDER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LASTING = sorted(set(SERVICES) - {"airflow-init"})
IMAGES = sorted(FOLDER.glob("*.Dockerfile"))
PINNED = re.compile(r"^[a-z0-9./-]+(?::\d+\.\d+(?:\.\d+)?[a-z0-9.-]*|@sha256:[0-9a-f]{64})$")


def dockerfile(service: dict[str, Any]) -> str:
    return (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")


def test_the_whole_stack_is_there() -> None:
    assert set(SERVICES) == {
        "postgres", "mlflow", "spark-master", "spark-worker-1", "spark-worker-2", "airflow-init", "api-server", "scheduler", "dag-processor", "triggerer",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_images_are_pinned_and_nobody_is_root(name: str) -> None:
    service = SERVICES[name]
    assert PINNED.fullmatch(service["image"]), service["image"]
    if "build" in service:
        assert re.search(r"(?m)^USER (?!root|0)\w+", dockerfile(service))
    else:
        assert service["user"] not in ("root", "0")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "network_mode" not in service


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_has_a_pinned_base_constraints_and_a_user(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    bases = re.findall(r"(?m)^FROM (\S+)", text)
    assert bases
    assert all(PINNED.fullmatch(base) for base in bases), bases
    assert "--constraint constraints.txt" in text
    assert text.index("USER sid") > text.index("RUN pip install"), "what is installed belongs to root, what runs does not"
    assert not re.search(r"(?m)^(?:ADD|ENV .*(?:PASSWORD|SECRET|TOKEN))", text)


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_service_says_when_it_is_well(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries"} <= set(check)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_ports_are_on_loopback_volumes_are_named_and_others_exist(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for volume in service.get("volumes", []):
        source, _, rest = volume.partition(":")
        assert source in COMPOSE["volumes"] or (rest.endswith(":ro") and (FOLDER / source).is_file()), volume
    for other, how in service.get("depends_on", {}).items():
        assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_every_secret_comes_from_the_environment_file_and_has_no_default() -> None:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    known = set(re.findall(r"(?m)^([A-Z_]+)=", (FOLDER / "env.example").read_text(encoding="utf-8")))
    needed = set(re.findall(r"\$\{([A-Z_]+):\?", text))
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    offered = set(re.findall(r"(?m)^# ([A-Z_]+)=", (FOLDER / "env.example").read_text(encoding="utf-8")))
    assert needed <= known
    assert used == known - {"COMPOSE_PROJECT_NAME"} | offered
    assert {name for name in used if re.search("PASSWORD|SECRET|KEY|LOGIN", name)} <= needed
    assert not re.search(r"(?m)^[A-Z_]*(?:PASSWORD|SECRET|KEY|LOGIN)=\S", (FOLDER / "env.example").read_text(encoding="utf-8"))
    for service in SERVICES.values():
        words = shlex.join([*service.get("entrypoint", []), *service.get("command", [])])
        assert "${" not in words, "an argument is seen by everybody on the machine"


def test_the_profile_is_one_that_loads() -> None:
    loaded = config.load(str(FOLDER / "compose.toml"))
    assert (loaded.lake.catalog, loaded.launch.kind) == ("jdbc", "submit")
    assert loaded.launch.master == "spark://spark-master:7077"
    assert set(SERVICES) >= {"spark-master"}


def test_the_driver_is_reachable_under_the_name_of_its_container() -> None:
    scheduler = SERVICES["scheduler"]
    assert scheduler["environment"]["SID_DRIVER_HOST"] == scheduler["hostname"] == "scheduler"
    jars = scheduler["environment"]["SID_JARS"].split(":")
    for service in (scheduler, SERVICES["spark-worker-1"]):
        assert all(jar in dockerfile(service) for jar in jars)
