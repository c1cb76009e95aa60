#!/usr/bin/env python3
"""Trains on GKE as a JobSet, on TPU slices or on GPU nodes; or runs another command there.

    python launch/gke.py submit --name=celebahq --image=REGISTRY/conprediff_jax --tpu=tpu-v6e-slice
        --topology=4x4 --slices=2 --spot -- --config=configs/celebahq.py --workdir=gs://bucket/run
    python launch/gke.py submit --name=celebahq --image=REGISTRY/conprediff_jax
        --gpu=nvidia-h100-80gb --nodes=4 -- --config=configs/celebahq.py --workdir=gs://bucket/run
    python launch/gke.py submit --name=samples --image=REGISTRY/conprediff_jax --tpu=tpu-v6e-slice
        --topology=4x4 -- sample --workdir=gs://bucket/run --num=50000 --out=gs://bucket/samples
    python launch/gke.py logs   --name=celebahq
    python launch/gke.py delete --name=celebahq

launch/Dockerfile builds the image. The cluster must have JobSet 0.10 or newer, and node pools of
the kind that you ask for; kubectl's current context says which cluster it is.

Everything after -- is passed to conprediff_jax.main, or to the command of conprediff_jax whose name
comes first, such as sample or precompute. The workdir must be a bucket, or a volume that all pods
see.

A run that is preempted (exit code 75, or pods that are told that their node goes away) starts again
without limit. A run that fails otherwise starts again --max-restarts times. A run that was started
wrongly (exit code 2) does not start again. A node that dies without a word counts as a failure.

submit replaces a JobSet of the same name that has ended, and refuses to start while one is running.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys

RESTART_CODE, USER_ERROR = 75, 2

# The order matters: JobSet tells the rules apart by their number in the job's message.
POD_RULES = (
    {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [RESTART_CODE]},
    },
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [USER_ERROR]},
    },
)
RESTART_RULES = (
    {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": ["matching FailJob rule at index [01]$"],
    },
    {
        "name": "startedWrongly",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": ["matching FailJob rule at index 2$"],
    },
)


def main() -> int:
    """Reads the flags, and calls kubectl."""
    options = parse()
    kubectl = ["kubectl", f"--namespace={options.namespace}"]
    if options.context:
        kubectl.append(f"--context={options.context}")
    # It waits until all jobs are gone: jobs that are ending would block new ones of the same names.
    delete = [*kubectl, "delete", f"jobset/{options.name}", "--cascade=foreground"]
    if options.action == "submit":
        return submit(options, kubectl, delete)
    if options.action == "logs":
        selector = f"jobset.sigs.k8s.io/jobset-name={options.name}"
        command = [*kubectl, "logs", f"--selector={selector}", "--follow", "--prefix", "--tail=100"]
        command.append("--max-log-requests=1000")
    else:
        command = delete
    return run(command, options).returncode


def submit(options: argparse.Namespace, kubectl: list[str], delete: list[str]) -> int:
    """Creates the JobSet, unless one of that name is running."""
    look = [*kubectl, "get", f"jobset/{options.name}", "--ignore-not-found", "--output=json"]
    found = run(look, options, stdout=subprocess.PIPE)
    if found.returncode:
        return found.returncode
    if found.stdout:
        conditions = json.loads(found.stdout).get("status", {}).get("conditions", [])
        ended = [c["type"] for c in conditions if c["status"] == "True"]
        if not {"Completed", "Failed"}.intersection(ended):
            message = "it is still running; delete it first, or choose another name"
            print(f"error: --name={options.name}: {message}", file=sys.stderr)
            return USER_ERROR
        if code := run(delete, options).returncode:
            return code
    if options.spot:
        notice = "spot nodes give 15 to 30 seconds to save, whatever --grace says"
        advice = "a small --config.train.checkpoint_every limits what a longer save loses"
        print(f"WARNING: {notice}; {advice}", file=sys.stderr)
    # Not apply, which would leave a JobSet alone that has appeared in the meantime.
    return run([*kubectl, "create", "--filename=-"], options, input=fill(options)).returncode


def run(command: list[str], options: argparse.Namespace, **pipes) -> subprocess.CompletedProcess:
    """Runs a command; with --dry-run, prints the command and its input instead."""
    print("+", shlex.join(command), flush=True)
    if options.dry_run:
        print(pipes.get("input", ""), end="")
        return subprocess.CompletedProcess(command, 0, stdout="")
    return subprocess.run(command, text=True, check=False, **pipes)


def parse() -> argparse.Namespace:
    """Reads the flags and checks that they fit each other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("action", choices=("submit", "logs", "delete"))
    add("--name", required=True, help="name of the run: lower-case letters, digits and -")
    add("--namespace", default="default", help="namespace in the cluster")
    add("--context", help="context of kubectl; the current one by default")
    add("--image", help="container image (submit)")
    add("--tpu", metavar="TYPE", help="label gke-tpu-accelerator, such as tpu-v6e-slice")
    add("--topology", help="topology of one slice, such as 4x4 (with --tpu)")
    add("--slices", type=int, help="number of slices (with --tpu); 1 by default")
    add("--gpu", metavar="TYPE", help="label gke-accelerator, such as nvidia-h100-80gb")
    add("--nodes", type=int, help="number of nodes (with --gpu); 1 by default")
    add("--chips", type=int, help="TPU chips (4 by default) or GPUs (8) of a node")
    add("--port", type=int, default=1234, help="port of the first process (with --gpu)")
    add("--spot", action="store_true", help="use spot nodes, which may be taken away at any time")
    add("--service-account", default="default", help="Kubernetes account that may read the bucket")
    # Each node that dies uses up one restart: the processes on the other nodes abort before its pod
    # is marked as disrupted, with an exit code (134) that a broken program has too.
    add("--max-restarts", type=int, default=10, help="starts after failures and nodes that died")
    add("--grace", type=int, help="seconds to save after SIGTERM; 120, or 25 with --spot")
    add("--dry-run", action="store_true", help="print the command and manifest, run nothing")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.module, options.arguments = "main", sys.argv[end + 1 :]
    if options.arguments and not options.arguments[0].startswith("-"):
        options.module, *options.arguments = options.arguments
    if options.action == "submit":
        if not re.fullmatch("[a-z_]+", options.module):
            parser.error(f"{options.module!r} is no command of conprediff_jax")
        if not options.image or not options.arguments:
            flags = f"the flags of conprediff_jax.{options.module} after --"
            parser.error(f"submit needs --image, and {flags}")
        if bool(options.tpu) == bool(options.gpu):
            parser.error("submit needs either --tpu or --gpu")
        if options.tpu and not re.fullmatch(r"\d+(x\d+)+", options.topology or ""):
            parser.error("--tpu needs --topology, such as 4x4")
        if options.tpu and options.nodes is not None:
            parser.error("--nodes goes with --gpu: a slice's --topology says how many it has")
        if options.gpu and (options.slices is not None or options.topology):
            parser.error("--slices and --topology go with --tpu")
        least = {"slices": 1, "nodes": 1, "chips": 1, "grace": 1, "max_restarts": 0}
        for name, smallest in least.items():
            value = getattr(options, name)
            if value is not None and value < smallest:
                flag = name.replace("_", "-")
                parser.error(f"--{flag}={value}: it must be at least {smallest}")
        options.slices, options.nodes = options.slices or 1, options.nodes or 1
        options.grace = options.grace or (25 if options.spot else 120)
        options.chips = options.chips or (4 if options.tpu else 8)
        if options.tpu:
            options.total = math.prod(map(int, options.topology.split("x")))
            options.chips = min(options.chips, options.total)
            if options.total % options.chips:
                parser.error(f"--chips={options.chips} must divide the {options.total} of a slice")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
        parser.error(f"--name={options.name}: up to 40 lower-case letters, digits and -")
    return options


def fill(options: argparse.Namespace) -> str:
    """The manifest, as YAML."""
    kind = "tpu" if options.tpu else "gpu"
    tolerations, selector, hosts = [], {}, options.nodes
    if options.tpu:
        hosts = options.total // options.chips
        selector["cloud.google.com/gke-tpu-accelerator"] = options.tpu
        selector["cloud.google.com/gke-tpu-topology"] = options.topology
    else:
        selector["cloud.google.com/gke-accelerator"] = options.gpu
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        tolerations.append(spot | {"effect": "NoSchedule"})
    command = ["python", "-m", f"conprediff_jax.{options.module}", *options.arguments]
    values = {
        "name": options.name,
        "namespace": options.namespace,
        "image": options.image,
        "command": [*command, "--distributed"] if options.tpu else command,
        "hosts": hosts,
        "slices": options.slices,
        "chips": options.chips,
        "port": options.port,
        # The first pod's name in the headless service that JobSet makes.
        "coordinator": f"{options.name}-worker-0-0.{options.name}:{options.port}",
        "processes": str(hosts),
        "node_selector": selector,
        "tolerations": tolerations,
        "service_account": options.service_account,
        "max_restarts": options.max_restarts,
        "grace": options.grace,
        "restart_rules": RESTART_RULES,
        "pod_failure_policy": {"rules": POD_RULES},
    }
    template = string.Template((pathlib.Path(__file__).parent / f"jobset_{kind}.yaml").read_text())
    # JSON is YAML, and quotes whatever needs it.
    return template.substitute({name: json.dumps(value) for name, value in values.items()})


if __name__ == "__main__":
    sys.exit(main())
