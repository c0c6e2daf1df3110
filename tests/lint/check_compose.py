#!/usr/bin/env python3
"""Checks deploy/compose.yaml against the files that it and the Dockerfile name.

No container engine is needed. Exits with 77 (skipped) without PyYAML.
"""

import pathlib
import re
import sys

try:
    import yaml
except ImportError:
    print("SKIPPED: no PyYAML here (deploy/install.sh test installs it)")
    sys.exit(77)

# What a Compose file may have, as far as this one goes: a misspelt key would pass as YAML.
TOP_KEYS = {"name", "services", "volumes", "networks"}
SERVICE_KEYS = {"image", "build", "command", "ports", "volumes", "depends_on", "healthcheck",
                "restart", "stop_grace_period", "read_only", "tmpfs", "cap_drop", "security_opt",
                "environment", "networks", "profiles"}
BUILD_KEYS = {"context", "dockerfile", "target", "args"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
PORT = re.compile(r"^(?:(?:\d+\.){3}\d+:)?\d+:(\d+)$")


class Checker:
    def __init__(self, path):
        self.path = path
        self.root = path.parent
        self.errors = []

    def expect(self, condition, message):
        if not condition:
            self.errors.append(message)

    def check_build(self, name, build):
        self.expect(set(build) <= BUILD_KEYS, f"{name}.build has unknown keys {set(build) - BUILD_KEYS}")
        dockerfile = self.root / build["context"] / build.get("dockerfile", "Dockerfile")
        self.expect(dockerfile.is_file(), f"{name}: no {dockerfile}")
        if dockerfile.is_file() and "target" in build:
            stages = re.findall(r"^FROM .+ AS (\S+)$", dockerfile.read_text(), re.MULTILINE)
            self.expect(build["target"] in stages,
                        f"{name}: no stage {build['target']} in the Dockerfile, only {stages}")

    def check_service(self, name, service, services, volumes):
        self.expect(set(service) <= SERVICE_KEYS,
                    f"{name} has unknown keys {set(service) - SERVICE_KEYS}")
        self.expect("image" in service or "build" in service, f"{name} has no image")
        if "build" in service:
            self.check_build(name, service["build"])
        elif "image" in service:
            tag = service["image"].rpartition(":")[2]
            self.expect(re.search(r"\d", tag), f"{name}: image {service['image']} has no version")
        for port in service.get("ports", []):
            self.expect(isinstance(port, str) and PORT.match(port), f"{name}: port {port!r}")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                self.expect((self.root / source).exists(), f"{name}: volume {source} does not exist")
            else:
                self.expect(source in volumes, f"{name}: volume {source} is not declared")
        for other, how in service.get("depends_on", {}).items():
            self.expect(other in services, f"{name} depends on {other}, which is no service")
            self.expect(how.get("condition") in CONDITIONS, f"{name}: condition {how}")

    def check_scrape_targets(self, services):
        """Prometheus must ask the server by its service name, at the port that it listens on."""
        config = yaml.safe_load((self.root / "prometheus/prometheus.yml").read_text())
        targets = [target for job in config["scrape_configs"] for group in job["static_configs"]
                   for target in group["targets"]]
        self.expect(targets, "prometheus.yml scrapes nothing")
        for target in targets:
            host, _, port = target.partition(":")
            if host == "localhost":
                continue
            self.expect(host in services, f"prometheus.yml scrapes {target}, which is no service")
            exposed = (self.root / "../Dockerfile").read_text()
            self.expect(re.search(rf"^EXPOSE .*\b{port}\b", exposed, re.MULTILINE),
                        f"prometheus.yml scrapes port {port}, which the Dockerfile does not expose")

    def run(self):
        compose = yaml.safe_load(self.path.read_text())
        self.expect(set(compose) <= TOP_KEYS, f"unknown keys {set(compose) - TOP_KEYS}")
        services = compose["services"]
        for name, service in services.items():
            self.check_service(name, service, services, compose.get("volumes") or {})
        self.check_scrape_targets(services)
        for error in self.errors:
            print(f"{self.path}: {error}")
        return 1 if self.errors else 0


if __name__ == "__main__":
    sys.exit(Checker(pathlib.Path(sys.argv[1])).run())
