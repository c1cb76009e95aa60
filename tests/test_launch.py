"""Tests of the launchers: dry runs, runs against scripts that play the cluster, and refusals.

They do not test what only a cluster can show, such as whether machines of these names exist.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from conprediff_jax.cli import app
from conprediff_jax.common import interrupts
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
    """A program that appends its arguments to `calls` and then runs the given script."""
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{text}\n')
    file.chmod(0o755)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


# --- several processes of one machine -------------------------------------------------------------


def locally(*arguments, command):
    return launch("local.py", *arguments, command=[sys.executable, "-c", command])


def test_local_processes_know_their_number_and_fail_together():
    command = "import os; print({k: v for k, v in os.environ.items() if k.startswith('JAX_')})"
    result = locally("--processes=2", "--port=1234", command=command)
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
        ("2 0", 1, app.USER_ERROR_CODE, 1),  # wrong, and wrong again if it were repeated
        ("130 0", 1, interrupts.EXIT_CODE, 1),  # Ctrl-C
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
    assert process.wait() == processes.RESTART_CODE


# --- Cloud TPU VMs --------------------------------------------------------------------------------

POD = ["--name=pod", "--zone=us-west4-a"]


def cloud(folder, extra="", name="gcloud"):
    """A gcloud that knows of one TPU VM: it can be made, listed and deleted."""
    state = folder / "state"
    program(
        folder,
        name,
        f"""state={state}
{extra}
case "$*" in
  *" create "*) echo ACTIVE > $state ;;
  *" delete "*) rm $state ;;
  *" list "*) cat $state 2>/dev/null || true ;;
esac""",
    )
    return state


def tpu_up(folder, *flags):
    flags = ["--type=v6e-8", "--poll=0", *flags]
    result = launch("tpu_vm.sh", "up", *POD, *flags, path=folder)
    return result, (folder / "calls").read_text()


@pytest.mark.parametrize("when", ["queued-resources create", "tpu-vm scp", "conprediff_jax.main"])
@pytest.mark.parametrize("end", ["SUSPENDED", "FAILED"])
def test_tpu_vm_makes_machines_anew_when_they_are_taken_away(when, end, tmp_path):
    """gcloud loses the first machine at some time, and lets the second one finish."""
    lost = f"""if [[ "$*" == *"{when}"* && ! -e {tmp_path}/lost ]]; then
  touch {tmp_path}/lost; echo {end} > $state; exit 1
fi"""
    cloud(tmp_path, lost)
    result, text = tpu_up(tmp_path, "--spot")
    assert result.returncode == 0, result.stderr
    made = "create pod --node-id=pod --runtime-version=v2-alpha-tpuv6e"
    assert text.count(made) == text.count("--accelerator-type=v6e-8 --spot") == 2
    assert text.count("queued-resources delete pod") == 1
    assert text.count("conprediff_jax.main --distributed") == 1 + (when == "conprediff_jax.main")


@pytest.mark.parametrize(("code", "runs"), [(9, 3), (255, 3), (2, 1), (75, 1)])
def test_tpu_vm_tries_again_a_few_times_on_machines_that_are_there(code, runs, tmp_path):
    cloud(tmp_path, f'[[ "$*" != *conprediff_jax.main* ]] || exit {code}').write_text("ACTIVE\n")
    result, text = tpu_up(tmp_path, "--max-restarts=2")
    assert result.returncode == code
    assert text.count("conprediff_jax.main --distributed") == runs
    assert " create " not in text and " delete " not in text  # they were there, and stay


def test_tpu_vm_says_why_gcloud_does_not_answer_and_stops(tmp_path):
    cloud(tmp_path, "echo 'the login has expired' >&2; exit 1")
    arguments = ["create", *POD, "--type=v4-8", "--poll=0"]
    result = launch("tpu_vm.sh", *arguments, path=tmp_path)
    assert result.returncode == 1 and "the login has expired" in result.stderr
    assert len(calls(tmp_path)) == 5 and " create " not in " ".join(calls(tmp_path))


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v7x-8 --version=new", "new"),
        ("v6e-8 --version=new", "new"),
    ],
)
def test_tpu_vm_chooses_the_runtime_by_the_type(kind, version):
    result = launch("tpu_vm.sh", "create", *POD, *f"--type={kind} --dry-run".split())
    assert f"--runtime-version={version} " in result.stdout


@pytest.fixture
def worker(tmp_path):
    """A worker of a TPU VM: runs, in a folder of its own, what ssh would run there.

    Its Python notes its arguments and then does what the file `python` says.
    """
    home = tmp_path / "worker"
    workspace = home / "conprediff_jax" / ".venv" / "bin"
    workspace.mkdir(parents=True)
    note = f'for argument; do echo "<$argument>" >> {home}/arguments; done'
    program(workspace, "python", f"{note}\n. {home}/python")
    program(tmp_path, "gcloud", f'last="${{@: -1}}"; echo "${{last#--command=}}" > {home}/remote')

    class Worker:
        folder = home

        def python(self, text):
            (home / "python").write_text(text)

        def given(self, *arguments, command=TRAIN):
            """The command that the worker is given, as a file."""
            result = launch("tpu_vm.sh", *arguments, *POD, path=tmp_path, command=command)
            assert result.returncode == 0, result.stderr
            return (home / "remote").rename(home / f"remote{len(list(home.iterdir()))}")

        def start(self, file):
            return subprocess.Popen(
                ["bash", file], cwd=home,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

        def do(self, *arguments, command=TRAIN):
            process = self.start(self.given(*arguments, command=command))
            said = process.communicate(timeout=60)[0]
            return process.returncode, said

        def starts(self):
            file = home / "arguments"
            return file.read_text().split("\n").count("<--distributed>") if file.exists() else 0

        def wait_for(self, name, lines=0):
            """Until a file is there and has so many lines."""
            file, until = home / name, time.monotonic() + 60
            while not file.exists() or len(file.read_text().splitlines()) < lines:
                assert time.monotonic() < until, name
                time.sleep(0.05)

    yield Worker()
    (home / "end").touch()  # for what still trains


# What waits for the test, in the folder conprediff_jax.
WAIT = "touch ../waits; until [ -e ../end ]; do sleep 0.1; done"


def test_tpu_vm_workers_train_again_after_preemption_and_pass_codes_on(worker):
    worker.python("[ -e ../again ] || { touch ../again; exit 75; }; echo 'what is wrong'; exit 9")
    code, said = worker.do("run")
    assert code == 9 and "what is wrong" in said
    assert worker.starts() == 2
    arguments = (worker.folder / "arguments").read_text().splitlines()
    assert arguments.count("<--config.data.name=a folder>") == 2  # whole
    worker.python("exit 0")
    assert worker.do("run") == (0, "")
    assert worker.starts() == 3
    assert "what is wrong" in (worker.folder / "train" / "log").read_text()  # for logs


def test_tpu_vm_workers_start_one_training_however_often_they_are_asked(worker):
    """gcloud gives a command again when it has lost the connection."""
    worker.python(f"{WAIT}; echo 'the last line'; exit 9")
    command, another = worker.given("run"), worker.given("run")
    first = worker.start(command)
    worker.wait_for("waits")
    first.kill()
    again, joined = worker.start(command), worker.start(another)
    worker.wait_for("train/ids", lines=3)  # all of them follow
    code, said = worker.do("run", command=["--config=another.py"])
    assert code == 2 and "it trains already, with other flags" in said
    assert "it trains already: left as it is" in worker.do("install")[1]
    (worker.folder / "end").touch()
    late = [worker.start(command), worker.start(another)]  # while it ends, or after that
    for follower in (again, joined, *late):
        assert "the last line" in follower.communicate(timeout=60)[0]
        assert follower.returncode == 9
    assert worker.starts() == 1


def test_tpu_vm_workers_decide_on_one_command_after_the_other(worker):
    """Commands of the same flags and of others come at one moment, and all are answered rightly."""
    worker.python(f"{WAIT}; exit 9")
    same = [worker.given("run") for _ in range(8)]
    other = worker.given("run", command=["--config=another.py"])
    first = worker.start(same[0])
    worker.wait_for("waits")
    followers, refused = [], []
    for command in same[1:]:
        followers.append(worker.start(command))
        refused.append(worker.start(other))
    assert [process.wait(timeout=60) for process in refused] == [2] * 7
    worker.wait_for("train/ids", lines=8)
    (worker.folder / "end").touch()
    assert [process.wait(timeout=60) for process in (first, *followers)] == [9] * 8
    assert worker.starts() == 1


def test_tpu_vm_workers_report_an_end_that_came_without_a_connection(worker):
    worker.python("echo 'the last line'; exit 9")
    command = worker.given("run")
    for _ in range(2):
        process = worker.start(command)
        assert "the last line" in process.communicate(timeout=60)[0]
        assert process.returncode == 9
    assert worker.starts() == 1


def test_tpu_vm_workers_stop_when_they_are_told(worker):
    worker.python(f"trap 'exit 75' TERM; {WAIT}")
    training = worker.start(worker.given("run"))
    worker.wait_for("waits")
    assert worker.do("stop")[0] == 0
    training.communicate(timeout=60)
    assert training.returncode == processes.RESTART_CODE and worker.starts() == 1
    assert worker.do("stop") == (0, "it does not train\n")


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "code", "requeued"),
    [
        ("", 0, False),
        ("", 75, True),
        ("", 9, False),
        ("", 143, False),  # a SIGTERM that Slurm did not send
        ("USR1", 0, False),  # done in time
        ("USR1", 75, True),
        ("USR1", 143, True),  # the signal comes before the handler is set
        ("USR1", 134, True),  # aborted since another process had ended like this
        ("USR1 TERM", 137, True),  # killed before it had saved
        ("USR1", 2, False),
        ("TERM", 75, False),  # scancel
        ("TERM", 137, False),
    ],
)
def test_slurm_jobs_queue_again_after_preemption(signals, code, requeued, tmp_path):
    """sbatch plays the whole cluster: it runs the job that it is given."""
    program(tmp_path, "sbatch", "SLURM_JOB_ID=17 bash; exit 0")
    send = "".join(f"kill -{signal} $PPID; sleep 0.2; " for signal in signals.split())
    program(tmp_path, "srun", f"{send}exit {code}")
    program(tmp_path, "scontrol", "")
    program(tmp_path, "scancel", "")
    flags = ["--nodes=2", "--gpus=4", "--cpus=6", "--time=1:00:00", "--grace=90"]
    result = launch("slurm.sh", *flags, path=tmp_path)
    assert result.returncode == 0, result.stderr
    batch, step, *rest = calls(tmp_path)
    for option in ("--nodes=2", "--ntasks-per-node=4", "--requeue", "--signal=B:USR1@90"):
        assert option in batch.split()
    assert {"--cpus-per-task=6", "--kill-on-bad-exit=0", "--wait=90"} <= set(step.split())
    assert "conprediff_jax.main --distributed --config=configs/openmoji.py" in step
    signalled = ["scancel --signal=TERM 17"] if "USR1" in signals else []
    assert rest == signalled + (["scontrol requeue 17"] if requeued else [])


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
    make = f'[[ "$*" != *create* ]] || cat > {tmp_path}/manifest.yaml'
    program(tmp_path, "kubectl", make)
    given = ["submit", "--name=run", "--image=registry/image", *flags]
    result = launch("gke.py", *given, path=tmp_path)
    assert result.returncode == 0
    assert ("checkpoint_every" in result.stderr) == (flags is TPU)  # on spot nodes
    assert calls(tmp_path)[1:] == ["kubectl --namespace=default create --filename=-"]
    manifest = yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    check_fields(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (replicas, hosts, hosts)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == resource
    assert container["command"][:5] == ["python", "-m", "conprediff_jax.main", *TRAIN]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm"]
    assert pod["terminationGracePeriodSeconds"] == (25 if flags is TPU else 120)
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
    assert codes == [None, [processes.RESTART_CODE], [app.USER_ERROR_CODE]]
    again, never = manifest["spec"]["failurePolicy"]["rules"]
    assert again["onJobFailureMessagePatterns"] == ["matching FailJob rule at index [01]$"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert never["onJobFailureMessagePatterns"] == ["matching FailJob rule at index 2$"]
    assert never["action"] == "FailJobSet"


@pytest.mark.parametrize(
    ("conditions", "then"),
    [
        ([], None),
        ([("Completed", "False"), ("Suspended", "False")], None),
        ([("Completed", "True")], ["delete jobset/run --cascade=foreground", "create"]),
        ([("Failed", "True")], ["delete jobset/run --cascade=foreground", "create"]),
    ],
)
def test_gke_replaces_what_has_ended_and_nothing_else(conditions, then, tmp_path):
    conditions = [{"type": kind, "status": status} for kind, status in conditions]
    (tmp_path / "found").write_text(json.dumps({"status": {"conditions": conditions}}))
    program(tmp_path, "kubectl", f'[[ "$*" != *" get "* ]] || cat {tmp_path}/found')
    result = launch("gke.py", "submit", "--name=run", "--image=image", *GPU, path=tmp_path)
    look, *rest = calls(tmp_path)
    assert "get jobset/run --ignore-not-found" in look
    if then is None:
        assert result.returncode == app.USER_ERROR_CODE and not rest
        assert result.stderr.startswith("error: --name=run: it is still running")
    else:
        assert result.returncode == 0
        assert all(action in call for action, call in zip(then, rest, strict=True))


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


@pytest.mark.parametrize(("script", "arguments"), EVERY[1:], ids=[name for name, _ in EVERY[1:]])
def test_a_name_before_the_flags_chooses_another_command(script, arguments):
    named = [*arguments, "--dry-run"]
    result = launch(script, *named, command=["sample", "--workdir=runs/a"])
    assert result.returncode == 0, result.stderr
    assert re.search(r"conprediff_jax\.sample.*--workdir=runs/a", result.stdout, re.DOTALL)
    assert "conprediff_jax.main" not in result.stdout
    for command, message in ((["a; b", "--num=1"], "no command"), (["sample"], "jax.sample after")):
        result = launch(script, *named, command=command)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", ["launch"], "the first argument is 'launch'"),
        ("tpu_vm.sh", ["up", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["create", *POD], "--type is missing"),
        ("tpu_vm.sh", ["up", *POD, "--type=v9-8"], "--type=v9-8 is not known here"),
        ("tpu_vm.sh", ["up", *POD, "--type=v4-8", "--max-restarts=x"], "--max-restarts=x"),
        ("tpu_vm.sh", ["up", *POD, "--size=3"], "unknown flag '--size=3'"),
        ("slurm.sh", ["--machines=2"], "unknown flag '--machines=2'"),
        ("slurm.sh", ["--grace=2m"], "--grace=2m: it must be a number above 0"),
        ("gke.py", ["submit", "--name=run", "--image=image"], "either --tpu or --gpu"),
        ("gke.py", ["submit", "--name=run", "--image=i", "--tpu=t", "--topology=4"], "such as 4x4"),
        ("gke.py", ["submit", "--name=run", "--image=image", *TPU, "--chips=3"], "must divide the"),
        ("gke.py", ["submit", "--name=r", "--image=i", *TPU, "--nodes=2"], "--nodes goes with"),
        ("gke.py", ["submit", "--name=r", "--image=i", *GPU, "--slices=1"], "go with --tpu"),
        ("gke.py", ["submit", "--name=r", "--image=i", *TPU, "--slices=0"], "--slices=0: it must"),
        ("gke.py", ["submit", "--name=r", "--image=i", *GPU, "--nodes=0"], "--nodes=0: it must"),
        ("gke.py", ["submit", "--name=r", "--image=i", *GPU, "--max-restarts=-1"], "at least 0"),
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
