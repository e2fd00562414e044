"""What runs in containers has no more rights than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = sorted(DEPLOY.rglob("compose.yaml"))


def services(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
    return found


def test_the_image_runs_as_a_user_without_rights_over_its_program() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    users = [line.split()[1] for line in lines[last:] if line.startswith("USER ")]
    assert users, "the last stage names no user"
    # A number, so that Kubernetes can see that it is not root.
    assert users[-1].isdecimal()
    assert int(users[-1]) > 0
    copied = [line for line in lines[last:] if line.startswith("COPY ")]
    assert not any("--chown" in line for line in copied)
    assert not any(re.search(r"curl .*\| *(ba)?sh|--trusted-host|ADD https?:", line) for line in lines)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_no_container_may_gain_rights_or_open_itself_to_the_network(path: Path) -> None:
    for name, service in services(path).items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert {"network_mode", "pid", "ipc", "devices", "cap_add"}.isdisjoint(service), name
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", ())), name
        assert service["mem_limit"], name
        for port in service.get("ports", ()):
            assert re.match(r"\$\{\w+_BIND:-127\.0\.0\.1\}:", str(port)), f"{name}: {port}"


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_no_secret_has_a_value_in_a_file(path: Path) -> None:
    for name, service in services(path).items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|KEYS?$|TOKEN", variable):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]+|:-)\}", str(value)), f"{name}: {variable}"
    example = (path.parent / ".env.example").read_text(encoding="utf-8")
    for line in example.splitlines():
        if re.match(r"\w*(PASSWORD|SECRET|KEYS?|TOKEN)\w*=", line):
            assert line.endswith("="), line


def test_the_service_cannot_write_but_to_its_data() -> None:
    service = services(DEPLOY / "service/compose.yaml")["service"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["volumes"] == ["data:/data"]
    assert service["tmpfs"] == ["/tmp"]
