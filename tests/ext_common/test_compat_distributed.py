"""Several processes on CPU: one group, one training, the same numbers as one process."""

import shutil
from argparse import Namespace

import pytest
import torch
from omegaconf import OmegaConf

from ext_common import compat
from ext_common.cli import UsageError, UserError

compat.apply()

from ext_common.compat import processes  # noqa: E402

LAUNCH = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCH, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def config(cpu=True, **options):
    distributed = {
        "distributed_world_size": 1,
        "distributed_rank": 0,
        "distributed_backend": "nccl",
        "distributed_init_method": None,
        "distributed_port": -1,
        "distributed_no_spawn": False,
        "device_id": 0,
        "pipeline_model_parallel": False,
    }
    cfg = OmegaConf.create(
        {"common": {"cpu": cpu, "tpu": False}, "distributed_training": {**distributed, **options}}
    )
    OmegaConf.set_struct(cfg, True)
    return cfg


def launch(environment, **changed):
    for name, value in {**LAUNCH, **changed}.items():
        environment.setenv(name, value)


def test_alone_without_a_launcher(environment):
    cfg = config()
    assert processes.launched() is None
    assert processes.arrange(cfg) == 0
    assert cfg.distributed_training.distributed_init_method is None
    launch(environment, WORLD_SIZE="1", RANK="0")
    assert processes.launched() is None


@pytest.mark.parametrize("world", [1, 4, 7])
def test_a_launcher_is_joined_whatever_the_flags_say(environment, world):
    launch(environment)
    cfg = config(distributed_world_size=world)
    assert processes.arrange(cfg) == 0
    options = cfg.distributed_training
    assert (options.distributed_world_size, options.distributed_rank) == (4, 3)
    assert options.distributed_init_method == "env://" and options.distributed_no_spawn
    assert (options.distributed_backend, options.device_id) == ("gloo", 0)


@pytest.mark.parametrize("cards, device", [(1, 0), (2, 1), (8, 1)])
def test_a_launcher_is_joined_on_gpus(environment, cards, device):
    """Local rank 1 of 2: on one card beside the other process, where there is no second."""
    launch(environment)
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: cards)
    cfg = config(cpu=False)
    assert processes.arrange(cfg) == 0
    options = cfg.distributed_training
    assert (options.distributed_world_size, options.distributed_rank) == (4, 3)
    assert (options.distributed_backend, options.device_id) == ("nccl", device)
    assert options.distributed_no_spawn


def test_a_group_set_up_by_hand_is_left_alone(environment):
    launch(environment)
    given = {
        "distributed_world_size": 2,
        "distributed_rank": 1,
        "distributed_init_method": "tcp://host:1",
        "distributed_no_spawn": True,
    }
    cfg = config(**given)
    assert processes.arrange(cfg) == 0
    assert {name: cfg.distributed_training[name] for name in given} == given
    assert cfg.distributed_training.distributed_backend == "gloo"


def test_processes_are_started_on_cpu_when_asked(environment):
    environment.setattr(processes, "given", lambda: frozenset({"distributed_world_size"}))
    cfg = config(distributed_world_size=2)
    assert processes.arrange(cfg) == 2
    assert cfg.distributed_training.distributed_init_method.startswith("tcp://127.0.0.1:")
    assert cfg.distributed_training.distributed_backend == "gloo"
    cfg = config(distributed_world_size=2, distributed_init_method="tcp://other:5")
    with pytest.raises(UserError, match="use torchrun"):
        processes.arrange(cfg)


def test_cpu_does_not_start_a_process_for_each_gpu(environment):
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 8)
    environment.setattr(processes, "given", lambda: frozenset({"cpu"}))
    cfg = config(distributed_world_size=8)
    assert processes.arrange(cfg) == 0
    assert cfg.distributed_training.distributed_world_size == 1


def test_processes_on_gpus_are_started_as_those_on_cpus(environment):
    """By this house, which tells their mistakes in one sentence; as many as fairseq would start."""
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 8)
    asked = processes.distributed_utils, "infer_init_method"
    environment.setattr(*asked, lambda o: setattr(o, "distributed_init_method", "tcp://here:1"))
    cfg = config(cpu=False, distributed_world_size=8)
    assert processes.arrange(cfg) == 8
    options = cfg.distributed_training
    assert (options.distributed_backend, options.distributed_init_method) == (
        "nccl",
        "tcp://here:1",
    )
    # the second of two machines: its first process is the fourth of all
    more = {"distributed_init_method": "tcp://host:1", "distributed_rank": 3}
    cfg = config(cpu=False, distributed_world_size=6, **more)
    environment.setattr(torch.cuda, "device_count", lambda: 3)
    assert processes.arrange(cfg) == 3
    begun = []
    environment.setattr(
        torch.multiprocessing, "spawn", lambda fn, args, nprocs, join: begun.append((args, nprocs))
    )
    with pytest.raises(AttributeError):
        processes._spawn(3, print, cfg, {})
    ((_, told, kwargs, *_), count) = begun[0]
    assert (kwargs["start_rank"], count) == (3, 3)
    assert told.distributed_training.distributed_rank is None
    # one process alone is fairseq's
    assert processes.arrange(config(cpu=False)) == 0


@pytest.mark.parametrize("error, code", [(UserError, 1), (UsageError, 2)])
def test_a_mistake_is_told_before_its_process_leaves_the_group(environment, capsys, error, code):
    """NCCL warns of a group that was not left, behind the one sentence."""
    left, threads = [], torch.get_num_threads()

    def fail(*_args):
        raise error("no such data")

    environment.setattr(processes.distributed_utils, "distributed_main", fail)
    environment.setattr(processes, "leave_group", lambda: left.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as ended:
        processes._worker(0, print, None, {}, threads, ())
    assert (ended.value.code, left) == (code, ["error: no such data\n"])


def test_training_apart_is_refused(environment):
    from fairseq.trainer import Trainer

    launch(environment)
    cfg = OmegaConf.create({"common": {"fp16": False, "cpu": True, "tpu": False}})
    with pytest.raises(UserError, match="4 processes were launched, .* without torchrun"):
        Trainer(cfg, None, None, None)


@pytest.mark.slow
def test_a_crowd_of_two(tmp_path):
    """broadcast, gather and buffers between two real processes."""
    torch.multiprocessing.spawn(_member, args=(str(tmp_path / "group"),), nprocs=2)


def _member(rank, path):
    import torch.distributed as dist
    from fairseq.distributed import utils

    from ext_common import compat

    compat.apply()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = utils.get_global_group()

    cfg = OmegaConf.create({"model": {"_name": "m", "x": [1, 2]}}, flags={"allow_objects": True})
    cfg.legacy = Namespace(arch="a")
    sent = {"cfg": cfg, "w": torch.arange(3.0), "n": [{"t": (torch.ones(2), 5)}]}
    got = utils.broadcast_object(sent if rank == 0 else None, src_rank=0, group=group)
    assert got["cfg"].model.x[1] == 2 and got["cfg"].legacy == Namespace(arch="a")
    assert torch.equal(got["w"], torch.arange(3.0)) and got["n"][0]["t"][1] == 5

    # Longer than the 16 kB fairseq allows, with tensors and text.
    gathered = utils.all_gather_list({"rank": rank, "t": torch.ones(9000) * rank}, group=group)
    assert [item["rank"] for item in gathered] == [0, 1]
    assert torch.equal(gathered[1]["t"], torch.ones(9000))

    model = torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(1.0 + 2 * rank)
    model.num_batches_tracked.fill_(5)
    model.register_buffer("unsaved", torch.tensor([float(rank)]), persistent=False)
    trainer = Namespace(
        data_parallel_world_size=2,
        is_fsdp=False,
        data_parallel_process_group=group,
        get_model=lambda: model,
    )
    processes.average_buffers(trainer)
    assert model.running_mean.tolist() == [2.0, 2.0] and model.num_batches_tracked == 5
    assert model.unsaved.tolist() == [float(rank)]
    processes.leave_group()
    assert not hasattr(utils.get_global_group, "_global_group")


def _assert_close(path, expected):
    one, two = (torch.load(p, weights_only=True)["model"] for p in (expected, path))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_torchrun_without_flags_equals_one_process_and_resumes(new_toy, reference, read_losses):
    toy = new_toy()
    flags = ["--batch-size", 3]
    log = toy.train("ck", *flags, "--max-epoch", 2, before=toy.torchrun(2))
    assert log.count("training on 2 devices") == 1, "the second process logs nothing"
    _assert_close(toy.folder / "ck" / "checkpoint2.pt", reference / "checkpoint2.pt")
    log += toy.train("ck", *flags, "--max-epoch", 4, before=toy.torchrun(2))
    _assert_close(toy.folder / "ck" / "checkpoint4.pt", reference / "checkpoint4.pt")
    alone = read_losses((reference.parent / "log").read_text())
    assert len(alone) == 4 and read_losses(log) == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_hydra_under_torchrun_trains_once(new_toy, reference, toy_registered):
    from fairseq import checkpoint_utils

    from fairseq_ext import average

    toy = new_toy()
    (toy.folder / "toy.yaml").write_text(YAML.format(folder=toy.folder, plugin=toy.plugin))
    command = [toy.bin / "fairseq-hydra-train", "--config-dir", toy.folder, "--config-name", "toy"]
    log = toy.run(command, before=toy.torchrun(2))
    assert log.count("Saved checkpoint") == 2
    _assert_close(toy.folder / "ck" / "checkpoint2.pt", reference / "checkpoint2.pt")
    average.main([str(toy.folder / "ck"), "--output", str(toy.folder / "average.pt")])
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(toy.folder / "average.pt")])
    assert isinstance(models[0], torch.nn.Module)
    log = toy.run(command, "task.data=/nowhere", f"checkpoint.save_dir={toy.folder}/none", code=1)
    assert log.rstrip().endswith("error: the data folder /nowhere does not exist")
    assert "Traceback" not in log


YAML = """
common: {{user_dir: {plugin}, cpu: true}}
task: {{_name: toy, data: {folder}/data}}
model: {{_name: toy_model}}
criterion: {{_name: toy_mse}}
optimizer: {{_name: adam, lr: [0.01]}}
lr_scheduler: {{_name: fixed}}
dataset: {{batch_size: 3, required_batch_size_multiple: 1, num_workers: 0, data_buffer_size: 0}}
optimization: {{max_epoch: 2, lr: [0.01]}}
checkpoint: {{save_dir: {folder}/ck}}
hydra: {{run: {{dir: {folder}/run}}}}
"""


@pytest.mark.slow
def test_world_size_two_starts_two_and_keeps_statistics_alike(new_toy, read_losses):
    """legacy_ddp, gathered logging outputs; validation measured what the checkpoint measures."""
    toy = new_toy()
    log = toy.train(
        *("ck", "--batch-size", 4, "--max-epoch", 2, "--distributed-world-size", 2),
        *("--ddp-backend", "legacy_ddp", "--toy-norm", "--toy-summed"),
    )
    assert log.count("training on 2 devices") == 1
    path = toy.folder / "ck" / "checkpoint2.pt"
    again = toy.validate(path, "--batch-size", 4, "--valid-subset", "valid")
    assert read_losses(again) == pytest.approx(read_losses(log)[-1:], rel=1e-4)


@pytest.mark.slow
def test_a_mistake_in_started_processes_is_one_sentence(new_toy):
    toy = new_toy()
    shutil.rmtree(toy.data)
    log = toy.train("ck", "--batch-size", 4, "--distributed-world-size", 2, code=1)
    assert f"error: the data folder {toy.data} does not exist" in log and "Traceback" not in log
