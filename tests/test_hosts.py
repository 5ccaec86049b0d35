"""Runs on two hosts, which two network namespaces of this machine stand for: pytest tests/test_hosts.py

Each host has its own hostname, address, loopback and cache folder. Needs root and iproute2.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import models
import pytest

from common.ranks import _of_srun

HOSTS = (f"plaintune-{os.getpid()}-a", f"plaintune-{os.getpid()}-b")  # of this process alone
ADDRESSES = ("10.213.7.1", "10.213.7.2")
ENVIRONMENT = {f"{name}_SOCKET_IFNAME": "veth0" for name in ("GLOO", "NCCL")} | {"MASTER_ADDR": ADDRESSES[0]}


def run_quietly(words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words.split(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts():
    """The names of two namespaces that a veth pair joins."""
    if os.geteuid() or not shutil.which("ip") or any(run_quietly(f"ip netns add {h}").returncode for h in HOSTS):
        pytest.skip("needs root and `ip netns`")
    run_quietly(f"ip link add veth0 netns {HOSTS[0]} type veth peer name veth0 netns {HOSTS[1]}")
    for host, address in zip(HOSTS, ADDRESSES, strict=True):
        run_quietly(f"ip -n {host} addr add {address}/24 dev veth0")
        for device in ("lo", "veth0"):
            run_quietly(f"ip -n {host} link set {device} up")
    yield HOSTS
    for host in HOSTS:
        run_quietly(f"ip netns del {host}")


def srun_environment(node: int, local_rank: int, per_node: int, port: int) -> dict:
    """What Slurm sets for a task of `srun --ntasks-per-node PER_NODE` on two nodes."""
    slurm = {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2 * per_node, "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x2)"}
    slurm |= {"SLURM_NODEID": node, "SLURM_LOCALID": local_rank, "SLURM_PROCID": node * per_node + local_rank}
    return ENVIRONMENT | {name: str(value) for name, value in slurm.items()} | {"MASTER_PORT": str(port)}


def on_host(host: str, words: list, own_folder: Path | None = None) -> list[str]:
    """The command on that host. own_folder: the host sees another folder there than the rest of the machine."""
    shell = f"hostname {host}; " + (f"mount -t tmpfs none {own_folder}; " if own_folder else "") + 'exec "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "bash", "-c", shell, "x", *map(str, words)]


class TwoHosts:
    """A run of one script on both hosts."""

    def __init__(self, script: str, flags: list[dict], per_node: int = 1, launcher: str = "srun", hidden=(None, None)):
        self.output_dir, port, self.processes = Path(flags[0]["output_dir"]), launch.free_port(), []
        common = os.environ | launch.CPU_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        for node, host in enumerate(HOSTS):
            words = [f"{script}.py", *launch.argv(flags[node])]
            torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", node, "--nproc_per_node", per_node]
            torchrun += ["--master_addr", ADDRESSES[0], "--master_port", port]
            for local_rank in range(per_node if launcher == "srun" else 1):
                of_task = srun_environment(node, local_rank, per_node, port) if launcher == "srun" else ENVIRONMENT
                command = on_host(host, [sys.executable, *torchrun * (launcher == "torchrun"), *words], hidden[node])
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": launch.REPO}
                process = subprocess.Popen(command, env=common | of_task, start_new_session=True, **pipes)
                self.processes.append(process)

    def wait(self, timeout: float = 240) -> tuple[list[int], str]:
        outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(outputs)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]


def flags_of(folder: Path, method: str, name: str, **changes) -> list[dict]:
    """Of each host: the same but for the cache folder."""
    model = folder / "model"
    if not model.is_dir():
        models.make_model(model)
    rows = models.conversations(10) if method == "sft" else models.preferences(10)
    data = models.write_jsonl(folder / f"{method}.jsonl", rows)
    same = {"global_batch_size": 4, "max_train_steps": 3, "learning_rate": 1e-3, "collective_timeout_minutes": 1}
    flags = launch.flags(model, data, folder, **same | changes) | {"output_dir": folder / name}
    return [flags | {"cache_dir": folder / f"cache-{host}"} for host in HOSTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


SAME = ("train_loss", "grad_norm", "total_tokens", "samples")


LONGER = [("sft", 1, "torchrun"), ("sft", 2, "srun"), ("dpo", 2, "torchrun")]
LONGER = [pytest.param(*case, marks=pytest.mark.soak) for case in LONGER]


@pytest.mark.parametrize(("method", "per_node", "launcher"), [("dpo", 1, "srun"), *LONGER])
def test_two_hosts_compute_what_one_does(hosts, folder, method, per_node, launcher):
    """With a cache of their own each, of which the reference cache of rank 0's host is read by both."""
    flags = flags_of(folder, method, f"{method}-{per_node}")
    run = TwoHosts(f"train_{method}", flags, per_node, launcher)
    codes, output = run.wait()
    assert set(codes) == {0}, [line for line in output.splitlines() if "rror" in line]
    (crossing,) = {line for line in output.splitlines() if line.startswith("2 hosts: in each step ")}
    assert crossing.endswith("by veth0 (NCCL_SOCKET_IFNAME)")
    one = flags[0] | {"output_dir": folder / f"{method}-{per_node}-one", "cache_dir": folder / "cache-one"}
    alone = launch.launch(f"train_{method}", one, 2 * per_node).succeeded()
    for seen, expected in zip(run.metrics(), alone.metrics, strict=True):
        for column in SAME:
            assert seen[column] == pytest.approx(expected[column], rel=1e-6), column


def test_a_folder_that_one_host_alone_sees_is_named_before_anything_is_loaded(hosts, folder):
    flags = flags_of(folder, "sft", "hidden")
    Path(flags[0]["output_dir"]).mkdir(exist_ok=True)
    codes, output = TwoHosts("train_sft", flags, hidden=(None, flags[1]["output_dir"])).wait()
    assert set(codes) == {2}
    (line,) = {line for line in output.splitlines() if line.startswith("error: ")}
    assert "--output_dir" in line and f"rank 1 ({HOSTS[1]})" in line and HOSTS[0] in line
    assert "loading" not in output


@pytest.mark.soak
@pytest.mark.parametrize("how", ["killed", "link down"])
def test_a_host_that_is_lost_ends_the_others_which_name_it_and_the_same_command_continues(hosts, folder, how):
    flags = flags_of(folder, "sft", how.replace(" ", "-"), max_train_steps=4000, checkpointing_steps=5, logging_steps=1)
    run = TwoHosts("train_sft", flags)
    deadline, checkpoints = time.monotonic() + 120, run.output_dir / "checkpoints"
    while not list(checkpoints.glob("step_*/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.2)
    if how == "killed":
        os.killpg(run.processes[1].pid, signal.SIGKILL)
    else:
        run_quietly(f"ip -n {HOSTS[1]} link set veth0 down")
    began = time.monotonic()
    codes, output = run.wait()
    run_quietly(f"ip -n {HOSTS[1]} link set veth0 up")
    assert codes[0] == 1 and codes[1] != 0 and time.monotonic() - began < 90
    told = [line for line in output.splitlines() if line.startswith("error: rank 0") or line.startswith("rank 0, ")]
    assert len(told) == 1 and f"on {HOSTS[1]}" in told[0], (told, output[-2000:])
    last = json.loads((run.output_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    again = TwoHosts("train_sft", [f | {"stop_after_steps": last + 10} for f in flags])
    codes, output = again.wait()
    assert set(codes) == {0} and "resuming after step" in output, output[-2000:]


def test_a_task_of_srun_knows_its_place(monkeypatch):
    assert _of_srun() == {}
    for name, value in srun_environment(1, 2, 3, 1).items():
        monkeypatch.setenv(name, value)
    assert _of_srun() == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4,2(x2)")
    assert _of_srun()["LOCAL_WORLD_SIZE"] == "2"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert _of_srun() == {}
