"""A Slurm of our own on this machine: munged, slurmctld and one slurmd, over a fresh folder and free ports.

Nothing of a Slurm that the machine may have is touched: configuration, keys, sockets, logs and state lie in the folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import wait_for
from tests.s3 import die_with_parent, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
_CONF = """
ClusterName=lrm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=200000,requeue_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
OverTimeLimit=0
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def require_slurm() -> None:
    """Skip the test, by name, where a Slurm cannot be run."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root, slurm-wlm and munge; missing: {missing}")


class Slurm:
    """The commands of a running Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: str, **variables: str) -> str:
        """Run a command of Slurm's; returns what it prints."""
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=60, env=self.environment | variables
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, **variables: str) -> str:
        """Submit a batch script; returns the number of the job."""
        return self.run("sbatch", "--parsable", *options, str(script), **variables).split(";")[0]

    def states(self, job: str) -> dict[str, str]:
        """Return the state of each task of a job, by its index; a job that is no array has one, named N/A."""
        lines = self.run("squeue", "--all", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        return dict(line.split() for line in lines.splitlines())

    def wait(self, job: str, timeout_s: float = 240.0) -> dict[str, str]:
        """Wait until every task of a job has ended; returns how."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
        wait_for(lambda: set(self.states(job).values()) <= over, timeout_s, f"the end of job {job}")
        return self.states(job)


@contextmanager
def slurm(folder: Path, cpus: int = 4) -> Iterator[Slurm]:
    """Run a Slurm with one node of so many CPUs, whatever the machine has."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    controller, daemon = free_ports(2)
    host = socket.gethostname().split(".")[0]
    values = {"host": host, "controller": controller, "daemon": daemon, "folder": folder, "cpus": cpus}
    (folder / "slurm.conf").write_text(_CONF.format(**values))
    made = Slurm(folder)
    munged = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log",
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        with (folder / f"{words[0]}.out").open("ab") as out:
            daemons.append(
                subprocess.Popen(
                    words, stdout=out, stderr=out, env=made.environment,
                    preexec_fn=die_with_parent,  # noqa: PLW1509 - prctl alone
                )
            )  # fmt: skip

    try:
        start(*munged)
        wait_for((folder / "munge.socket").exists, 20)
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        time.sleep(1)
        start("slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf"))
        idle = ["sinfo", "--noheader", "--format=%T", "--partition=low"]
        wait_for(lambda: _says(made, idle, "idle"), 60, "an idle node")
        yield made
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=made.environment, check=False)
        subprocess.run(["scancel", "--user=root"], env=made.environment, check=False)
        time.sleep(1)
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _says(made: Slurm, words: list[str], wanted: str) -> bool:
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=made.environment)
    return done.stdout.strip() == wanted
