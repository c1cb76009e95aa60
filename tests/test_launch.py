"""Launchers: what they would do, what they do where scripts play the cluster, what they refuse.

What only a cluster can show, such as whether it has machines of such names, is not tested here.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from conprediff_jax import cli
from conprediff_jax.parallel import processes

ROOT = pathlib.Path(__file__).parent.parent
TRAIN = ["--config=configs/openmoji.py", "--config.data.name=a folder"]


def launch(script, *arguments, path=None, command=TRAIN):
    """A launcher run with programs of its own on the path."""
    interpreter = "bash" if script.endswith(".sh") else sys.executable
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run(
        [interpreter, str(ROOT / "launch" / script), *arguments, "--", *command],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip


def program(folder, name, text):
    """A program that notes how it was called in `calls`, and then does what it is told."""
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{text}\n')
    file.chmod(0o755)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


# --- several processes of one machine -------------------------------------------------------------


def locally(*arguments, command):
    return launch("local.py", *arguments, command=[sys.executable, "-c", command])


def test_local_processes_know_their_number_and_fail_together():
    told = "import os; print({k: v for k, v in os.environ.items() if k.startswith('JAX_')})"
    result = locally("--processes=2", "--port=1234", command=told)
    assert result.returncode == 0
    for index in range(2):
        line = next(s for s in result.stdout.splitlines() if s.startswith(f"[{index}]"))
        assert f"'JAX_PROCESS_ID': '{index}'" in line and "'JAX_NUM_PROCESSES': '2'" in line
        assert "'JAX_COORDINATOR_ADDRESS': 'localhost:1234'" in line
    one_fails = "import os, time; os.environ['JAX_PROCESS_ID'] == '1' and exit(3); time.sleep(600)"
    assert locally("--processes=2", command=one_fails).returncode == 3


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "starts"),
    [
        ("75 75 0", 0, 0, 3),  # preempted, as often as it happens
        ("9 0", 1, 0, 2),  # failed
        ("9 9", 1, 9, 2),  # too often
        ("2 0", 1, cli.USER_ERROR_CODE, 1),  # wrong, and wrong again if it were repeated
    ],
)
def test_local_runs_start_again_when_that_helps(ends, restarts, code, starts, tmp_path):
    """Each start takes the next exit code from a file."""
    file = tmp_path / "ends"
    file.write_text(ends)
    take = (
        f"import pathlib; file = pathlib.Path({str(file)!r}); first, *rest = file.read_text()"
        ".split(); file.write_text(' '.join(rest)); exit(int(first))"
    )
    result = locally("--processes=1", f"--restarts={restarts}", command=take)
    assert result.returncode == code
    assert result.stdout.count("local: started") == starts


def test_local_passes_sigterm_on_and_does_not_start_again():
    waits = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); "
        "print('ready', flush=True); time.sleep(600)"
    )
    arguments = ["--processes=2", "--", sys.executable, "-c", waits]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/local.py"), *arguments],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready = 0
    while ready < 2:
        ready += "ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "started" not in process.stdout.read()
    assert process.wait() == processes.AGAIN


# --- Cloud TPU VMs --------------------------------------------------------------------------------

POD = ["--name=pod", "--zone=us-west4-a"]


def test_tpu_vm_makes_spot_machines_anew_when_they_are_taken_away(tmp_path):
    """gcloud loses the first machine while it trains, and lets the second one finish."""
    state = tmp_path / "state"
    lose = f"[ -e {state} ] || {{ echo SUSPENDED > {state}; exit 1; }}"
    program(
        tmp_path,
        "gcloud",
        f"""case "$*" in
  *describe*) cat {state} 2>/dev/null || echo ACTIVE ;;
  *conprediff_jax.main*) {lose} ;;
  *delete*) echo ACTIVE > {state} ;;
esac""",
    )
    result = launch("tpu_vm.sh", "up", *POD, "--type=v6e-8", "--spot", "--poll=0", path=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "calls").read_text()
    assert text.count("--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv5-lite --spot") == 2
    assert text.count("tpu-vm scp") == text.count("uv pip install") == 2
    assert text.count("conprediff_jax.main --distributed") == 2
    assert text.count("queued-resources delete pod") == 1


def test_tpu_vm_commands_run_again_on_the_workers_and_quote_their_flags(tmp_path):
    """The command that the workers get, run here with a Python that is first preempted."""
    note = f'last="${{@: -1}}"; echo "${{last#--command=}}" > {tmp_path}/remote'
    program(tmp_path, "gcloud", note)
    assert launch("tpu_vm.sh", "run", *POD, path=tmp_path).returncode == 0
    workspace = tmp_path / "worker" / "conprediff_jax" / ".venv" / "bin"
    workspace.mkdir(parents=True)
    program(
        workspace,
        "python",
        f"""for argument; do echo "<$argument>" >> {tmp_path}/arguments; done
[ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; exit 75; }}""",
    )
    subprocess.run(
        ["bash", str(tmp_path / "remote")], cwd=tmp_path / "worker", check=True, capture_output=True
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments.count("<--config.data.name=a folder>") == 2  # whole, and twice


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (9, False)])
def test_slurm_jobs_queue_again_after_preemption(code, requeued, tmp_path):
    """sbatch plays the whole cluster: it runs the job that it is given."""
    program(tmp_path, "sbatch", "SLURM_JOB_ID=17 bash; exit 0")
    program(tmp_path, "srun", f"exit {code}")
    program(tmp_path, "scontrol", "")
    result = launch("slurm.sh", "--nodes=2", "--gpus=4", "--time=1:00:00", path=tmp_path)
    assert result.returncode == 0, result.stderr
    batch, step, *rest = calls(tmp_path)
    for option in ("--nodes=2", "--ntasks-per-node=4", "--requeue", "--signal=TERM@120"):
        assert option in batch.split()
    assert "conprediff_jax.main --distributed --config=configs/openmoji.py" in step
    assert rest == (["scontrol requeue 17"] if requeued else [])


# --- GKE ------------------------------------------------------------------------------------------

TPU = ["--tpu=tpu-v6e-slice", "--topology=4x8", "--slices=2", "--spot"]
GPU = ["--gpu=nvidia-h100-80gb", "--nodes=3"]


# What the API servers know of the fields that are used: JobSet v1alpha2, batch/v1 and v1. A list
# holds the schema of its items, a set the values that there are.
EXIT_CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
POD_RULE = {
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": EXIT_CODES,
    "onPodConditions": [{"type": str, "status": {"True", "False", "Unknown"}}],
}
JOB_RULE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [
        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
         "PodFailurePolicy"}
    ],
    "onJobFailureMessagePatterns": [str],
    "targetReplicatedJobs": [str],
}  # fmt: skip
ENVIRONMENT = {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [ENVIRONMENT],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD_SPEC = {
    "restartPolicy": {"Never"},  # the only one that goes with a podFailurePolicy
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": dict,
    "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": str}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": {"", "Memory"}}}],
}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [POD_RULE]},
    "template": {"spec": POD_SPEC},
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "namespace": str, "annotations": dict},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [JOB_RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check_fields(value, schema, where="manifest"):
    """Every field is known and of its type: a misspelt one is dropped, or refused by the server."""
    if isinstance(schema, type):
        assert type(value) is schema, f"{where}: {value!r}"
    elif isinstance(schema, set):
        assert value in schema, f"{where}: {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{where}: {value!r}"
        for index, item in enumerate(value):
            check_fields(item, schema[0], f"{where}[{index}]")
    else:
        assert isinstance(value, dict) and value.keys() <= schema.keys(), f"{where}: {value!r}"
        for key, item in value.items():
            check_fields(item, schema[key], f"{where}.{key}")


@pytest.mark.parametrize(
    ("flags", "replicas", "hosts", "resource"),
    [(TPU, 2, 8, {"google.com/tpu": 4}), (GPU, 1, 3, {"nvidia.com/gpu": 8})],
    ids=["tpu", "gpu"],
)
def test_gke_submits_a_jobset(flags, replicas, hosts, resource, tmp_path):
    program(tmp_path, "kubectl", f"cat > {tmp_path}/manifest.yaml")
    given = ["submit", "--name=run", "--image=registry/image", *flags]
    assert launch("gke.py", *given, path=tmp_path).returncode == 0
    assert calls(tmp_path) == ["kubectl --namespace=default apply --filename=-"]
    manifest = yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    check_fields(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (replicas, hosts, hosts)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == resource
    assert container["command"][:5] == ["python", "-m", "conprediff_jax.main", *TRAIN]
    selector = pod["nodeSelector"]
    if flags is TPU:
        assert "--distributed" in container["command"]
        assert selector["cloud.google.com/gke-spot"] == "true" and len(pod["tolerations"]) == 1
        assert selector["cloud.google.com/gke-tpu-topology"] == "4x8"
    else:
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert values[processes.COORDINATOR] == "run-worker-0-0.run:1234"
        assert values[processes.COUNT] == "3" and processes.INDEX in values
    # The rules of the jobs, by number, and what follows from each.
    codes = [
        rule.get("onExitCodes", {}).get("values") for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert codes == [None, [processes.AGAIN], [cli.USER_ERROR_CODE]]
    again, never = manifest["spec"]["failurePolicy"]["rules"]
    assert again["onJobFailureMessagePatterns"] == ["matching FailJob rule at index [01]$"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert never["onJobFailureMessagePatterns"] == ["matching FailJob rule at index 2$"]
    assert never["action"] == "FailJobSet"


# --- all of them ----------------------------------------------------------------------------------

EVERY = [
    ("local.py", ["--processes=2"]),
    ("tpu_vm.sh", ["up", *POD, "--type=v6e-8"]),
    ("slurm.sh", []),
    ("gke.py", ["submit", "--name=run", "--image=image", *TPU]),
]


@pytest.mark.parametrize(("script", "arguments"), EVERY, ids=[script for script, _ in EVERY])
def test_dry_runs_show_everything_and_do_nothing(script, arguments, tmp_path):
    for name in ("gcloud", "kubectl", "sbatch"):
        program(tmp_path, name, "")
    result = launch(script, *arguments, "--dry-run", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "configs/openmoji.py" in result.stdout and "a folder" in result.stdout.replace("\\", "")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", ["launch"], "the first argument is 'launch'"),
        ("tpu_vm.sh", ["up", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["create", *POD], "--type is missing"),
        ("tpu_vm.sh", ["up", *POD, "--size=3"], "unknown flag '--size=3'"),
        ("slurm.sh", ["--machines=2"], "unknown flag '--machines=2'"),
        ("gke.py", ["submit", "--name=run", "--image=image"], "either --tpu or --gpu"),
        ("gke.py", ["submit", "--name=run", "--image=i", "--tpu=t", "--topology=4"], "such as 4x4"),
        ("gke.py", ["submit", "--name=run", "--image=image", *TPU, "--chips=3"], "must divide the"),
        ("gke.py", ["delete", "--name=Run"], "--name=Run: up to 40 lower-case letters"),
    ],
)
def test_wrong_flags_are_named(script, arguments, message, tmp_path):
    result = launch(script, *arguments, path=tmp_path)
    assert result.returncode == 2 and message in result.stderr


def test_shell_scripts_are_clean():
    folders = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=folders)
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(map(str, (ROOT / "launch").glob("*.sh")))
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
