#!/usr/bin/env python3
"""Trains on GKE, on TPU slices or GPU nodes, as a JobSet.

    python launch/gke.py submit --name=celebahq --image=REGISTRY/conprediff_jax --tpu=tpu-v6e-slice
        --topology=4x4 --slices=2 --spot -- --config=configs/celebahq.py --workdir=gs://bucket/run
    python launch/gke.py submit --name=celebahq --image=REGISTRY/conprediff_jax
        --gpu=nvidia-h100-80gb --nodes=4 -- --config=configs/celebahq.py --workdir=gs://bucket/run
    python launch/gke.py logs   --name=celebahq
    python launch/gke.py delete --name=celebahq

The image has this package installed; the cluster has JobSet 0.10 or newer, and node pools of that
kind. kubectl's current context decides which cluster. What follows -- are the flags of
conprediff_jax.main; the workdir is a bucket or a volume of all pods.

A run that is preempted (exit code 75, or pods whose node goes away) starts again without limit, one
that fails otherwise --max-restarts times, and one that was started wrongly (exit code 2) never.
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

AGAIN, USER_ERROR = 75, 2

# In the order of the pods' rules: JobSet tells them apart by the number in the job's message.
POD_RULES = (
    {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [AGAIN]},
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
    manifest = None
    if options.action == "submit":
        manifest, command = fill(options), [*kubectl, "apply", "--filename=-"]
    elif options.action == "logs":
        selector = f"jobset.sigs.k8s.io/jobset-name={options.name}"
        command = [*kubectl, "logs", f"--selector={selector}", "--follow", "--prefix", "--tail=100"]
        command.append("--max-log-requests=1000")
    else:
        command = [*kubectl, "delete", f"jobset/{options.name}"]
    print("+", shlex.join(command), flush=True)
    if options.dry_run:
        if manifest:
            print(manifest)
        return 0
    return subprocess.run(command, input=manifest, text=True, check=False).returncode


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("action", choices=("submit", "logs", "delete"))
    add("--name", required=True, help="of the run: lower-case letters, digits and -")
    add("--namespace", default="default", help="of the cluster")
    add("--context", help="kubectl's; its current one by default")
    add("--image", help="container image (submit)")
    add("--tpu", metavar="TYPE", help="label gke-tpu-accelerator, such as tpu-v6e-slice")
    add("--topology", help="of one slice, such as 4x4 (with --tpu)")
    add("--slices", type=int, default=1, help="how many (with --tpu)")
    add("--gpu", metavar="TYPE", help="label gke-accelerator, such as nvidia-h100-80gb")
    add("--nodes", type=int, default=1, help="how many (with --gpu)")
    add("--chips", type=int, help="TPU chips or GPUs of a node; 4 and 8 by default")
    add("--port", type=int, default=1234, help="of the first process (with --gpu)")
    add("--spot", action="store_true", help="nodes that may be taken away at any time")
    add("--service-account", default="default", help="Kubernetes account that may read the bucket")
    add("--max-restarts", type=int, default=3, help="after failures")
    add("--grace", type=int, default=120, help="seconds to save after SIGTERM")
    add("--dry-run", action="store_true", help="print the command and the manifest")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.arguments = sys.argv[end + 1 :]
    if options.action == "submit":
        if not options.image or not options.arguments:
            parser.error("submit needs --image, and the flags of conprediff_jax.main after --")
        if bool(options.tpu) == bool(options.gpu):
            parser.error("submit needs either --tpu or --gpu")
        if options.tpu and not re.fullmatch(r"\d+(x\d+)+", options.topology or ""):
            parser.error("--tpu needs --topology, such as 4x4")
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
    command = ["python", "-m", "conprediff_jax.main", *options.arguments]
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
