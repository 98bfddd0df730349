"""The example scripts in processes of their own that start in a second: forked from one that has the imports done."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers", "accelerate", "datasets", "personvit_hf.scripting", "personvit_hf.hub"]
    + ["personvit_hf.modeling_personvit_pretraining", "torch.distributed.tensor", "pytest"]
)


def start(script: str, output: Path, environment: dict[str, str] | None = None, **settings):
    """A process that runs a script; what it prints goes to the file `output`."""
    process = _context.Process(target=_run, args=(script, str(output), environment or {}, settings))
    os.environ["OMP_NUM_THREADS"] = "1"  # for the process that they are forked from, started with the first
    process.start()
    return process


def launch_environment(configuration: Path) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIGURATION` tells the processes that it starts."""
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(configuration), "script.py"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        environment = environments.prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.multi_gpu or arguments.use_fsdp:
        environment = environments.prepare_multi_gpu_env(arguments)
    else:
        environment = environments.prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def start_ranks(script: str, output: Path, num_processes: int = 2, environment=None, **settings) -> list:
    """Processes that train together over gloo, without a launcher that would end one because the other did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"} | (environment or {})
    return [
        start(
            script, output.with_suffix(f".{rank}"), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **settings
        )
        for rank in range(num_processes)
    ]


def finish(process, seconds: float = 120) -> int:
    """Its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition, process, seconds: float = 120) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + seconds
    while process.exitcode is None:
        if condition():
            return True
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.002)
    return False


def _run(script: str, output: str, environment: dict[str, str], settings: dict) -> None:
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.path.insert(0, str(Path(__file__).parent))
    from test_examples import run

    if "ACCELERATE_USE_FSDP" in environment:
        _shard_on_cpu()
    _tell_how_much_is_held()
    if "STOP_AFTER" in environment:
        _stop_after(int(environment["STOP_AFTER"]))
    try:
        run(script, **settings)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # as a script does, but without waiting for peers that are gone


def _stop_after(step: int) -> None:
    """This process gets SIGTERM when it has logged a step."""
    from personvit_hf.scripting import MetricsLog

    write = MetricsLog.write

    def write_and_stop(self, at: int, **figures) -> None:
        write(self, at, **figures)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsLog.write = write_and_stop


def _shard_on_cpu() -> None:
    """Accelerate shards on GPUs only; it is told that these are some."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _tell_how_much_is_held() -> None:
    """Prints, at each update of the teacher, the share of its elements that this process moves."""
    from personvit_hf import modeling_personvit_pretraining as modeling

    model_class = modeling.PersonViTForPreTraining
    update = model_class.update_teacher

    def update_and_tell(self, momentum: float) -> None:
        teacher = [parameter for parameter, _ in self.teacher_student_pairs()]
        held = sum(part.numel() for parameter in teacher for part in modeling._own_parts(parameter))
        whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in teacher)
        sys.stdout.write(f"holds {held / whole:.3f} of the teacher\n")
        update(self, momentum)

    model_class.update_teacher = update_and_tell
