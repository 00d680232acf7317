"""Presets: what fairseq gets from a command, in this process; golden data are of the version before them."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from ext_common import presets
from ext_common.checkpoints import untouched_logging
from ext_common.cli import UserError
from ext_common.presets import Machine, command, save_dirs

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = json.loads((GOLDEN / "commands.json").read_text())
# Options that came with the presets.
NEW = {"presets", "minutes", "save_minutes", "chosen", "balance", "loss_weighting"}
NEW |= {
    "init_from",
    "stop_at_copies",
    "watch_copies",
    "time_sampling",
    "ema_snapshots",
    "deterministic",
    "compile",
    "noam_cooldown",
    "max_update",
    "init_head",
    "inter_topk",
    "inter_m",
    "speed_classes",
}
TINY = "DATA --user-dir fairseq_ext --task speaker_id"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Both plugins in this process, as fairseq-train has them."""
    with untouched_logging():
        import fairseq  # noqa: F401

        import diffusion_ext
        import fairseq_ext

        # another test may have imported their parts before fairseq
        diffusion_ext.register()
        fairseq_ext.register()


@pytest.fixture(scope="module")
def parser(registered):
    from fairseq import options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fairseq-train"])
        return options.get_training_parser()


@pytest.fixture
def complete(parser, monkeypatch, tmp_path):
    """(option → last value or None, what was chosen) of a command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def complete(words):
        words, plan = presets.complete(parser, shlex.split(words))
        pairs = zip(words, [*words[1:], "--"], strict=True)
        return {a[2:]: b for a, b in pairs if a.startswith("--")}, plan

    return complete


@pytest.fixture
def parse(monkeypatch, tmp_path, repo_root):
    """Group → options that fairseq has from a command, and what was chosen; in an empty folder."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    monkeypatch.chdir(tmp_path)
    plugins = {name: str(repo_root / name) for name in ("fairseq_ext", "diffusion_ext")}

    def parse(words):
        words = shlex.split(words) if isinstance(words, str) else [str(word) for word in words]
        words = [plugins.get(word, word) for word in words]
        monkeypatch.setattr("sys.argv", ["fairseq-train", *words])
        parsed = options.parse_args_and_arch(options.get_training_parser(), words)
        cfg = convert_namespace_to_omegaconf(parsed)
        groups = {name: _options(group) for name, group in cfg.items()}
        return groups, presets.plan(cfg)

    return parse


def _options(group):
    from omegaconf import OmegaConf

    return save_dirs.options_of(
        OmegaConf.to_container(group) if OmegaConf.is_config(group) else group
    )


@pytest.fixture
def speech(tmp_path):
    """A folder with the corpus.json of so many hours, speakers and utterances."""

    def speech(hours=0.78, speakers=251, utterances=1121, name="DATA"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "features.bin").write_bytes(b"")
        meta = dict(format=1, utterances=utterances, frames=int(hours * 360_000), spec={})
        meta |= dict(speakers=[str(n) for n in range(speakers)], mean=[], std=[])
        (folder / "corpus.json").write_text(json.dumps({**meta, "utterances_sha256": ""}))
        return folder

    return speech


@pytest.fixture
def trained():
    """Write the checkpoint of a training with this configuration."""

    def trained(folder, cfg, updates=7):
        folder.mkdir(parents=True, exist_ok=True)
        history = [{"num_updates": updates}]
        state = {"cfg": cfg, "optimizer_history": history, "model": {"w": torch.zeros(2)}}
        torch.save(state, folder / "checkpoint_last.pt")

    return trained


# --- commands of before -------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_whole_command_trains_what_it_trained_before_there_were_presets(parse, name, repo_root):
    """configs.json was written by the version before, from these commands."""
    words = shlex.split(COMMANDS[name])
    if words[0] == "python":
        from diffusion_ext.train import read_recipe, typed

        rest, recipe = words[4:], []
        if "--config" in rest:
            at = rest.index("--config")
            recipe = read_recipe(str(repo_root / rest[at + 1]))
            rest = rest[:at] + rest[at + 2 :]
        words = ["fairseq-train", words[3], *typed(recipe, rest)]
    got, _ = parse(words[1:])
    before = json.loads((GOLDEN / "configs.json").read_text())[name]
    for group, options in before.items():
        for option, value in options.items():
            # a log is simple where it is no terminal's, also without --log-format
            if option != "log_format":
                # as JSON has it
                assert json.loads(json.dumps(got[group][option], default=str)) == value, option
        assert got[group].keys() - options.keys() <= NEW | {"no_seed_provided", "user_dir"}, group


# --- recipes are snapshots ----------------------------------------------------------------------


def speaker(*facts):
    from fairseq_ext.speaker import presets as task

    return "speaker_id", task.choose(task.Facts(*facts), Machine(), {})


def translation(pairs, gpu, pieces=12.4):
    from fairseq_ext.translation import presets as task

    facts = task.Facts(pairs, ("en", "zh"), True, pieces)
    return "translation_spm", task.choose(facts, Machine(gpu), {})


def diffusion(*facts, gpu=False):
    from diffusion_ext import presets as task

    return "diffusion", task.choose(task.Facts(*facts), Machine(gpu), {})


SNAPSHOTS = {
    "speaker_id/libri251": lambda: speaker(0.78, 251, 1121),
    "speaker_id/fsdd": lambda: speaker(0.36, 6, 3000),
    "speaker_id/hw4": lambda: speaker(118, 600, 64_666),
    "translation/compact_short": lambda: translation(27_835, False),
    "translation/tiny": lambda: translation(27_835, True),
    "translation/base": lambda: translation(400_000, True),
    "diffusion/digits": lambda: diffusion(16, 16, 1, 1797, 10),
    "diffusion/emoji32": lambda: diffusion(32, 32, 3, 3786),
    "diffusion/faces64": lambda: diffusion(64, 64, 3, 71_314, gpu=True),
    "diffusion/cifar10": lambda: diffusion(32, 32, 3, 50_000, gpu=True),
}


def test_long_lines_are_trained_as_often_and_fewer_are_translated():
    def flags(pairs, pieces, gpu=False):
        return {
            k: v for choice in translation(pairs, gpu, pieces)[1] for k, v in choice.flags.items()
        }

    short, long = flags(45_000, 12), flags(45_000, 54)
    updates = [int(one["--max-update"]) for one in (short, long)]
    # five times over all pieces, 600 at a time
    assert updates == [4500, 20_000]
    assert "--valid-sentences" not in short and "--valid-sentences" not in flags(
        45_000, 54, gpu=True
    )
    assert (long["--valid-sentences"], long["--max-tokens-valid"]) == ("370", "2000")
    # as many checkpoints in a long training as in a short one
    every = [int(one["--save-interval-updates"]) for one in (short, long)]
    assert max(updates[1] / every[1], updates[0] / every[0]) < 31


# What a recipe has to say of a call, and no preset.
OF_THE_CALL = {"data", "user_dir", "seed", "save_dir", "log_format"}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_recipes_are_snapshots_of_presets(parse, repo_root, name):
    """Each value of a recipe is the preset's, but those that it lists with the reason."""
    task, choices = SNAPSHOTS[name]()
    flags = [w for c in choices for pair in c.flags.items() for w in pair if w is not None]
    plugin = "diffusion_ext" if task == "diffusion" else "fairseq_ext"
    got, _ = parse(["DATA", "--user-dir", plugin, "--task", task, "--presets", "off", *flags])
    path = repo_root / "configs" / f"{name}.yaml"
    text = path.read_text()
    recipe = yaml.safe_load(text)
    others = set(" ".join(re.findall(r"# Not the preset's.*: (.+)", text)).split())
    for entry in recipe.pop("defaults", []):
        if isinstance(entry, dict):
            model = yaml.safe_load((path.parent / "model" / f"{entry['model']}.yaml").read_text())
            recipe["model"] = {**model, **recipe.get("model", {})}
    differ = set()
    for group, options in recipe.items():
        for option, value in options.items() if group != "hydra" else ():
            preset = got[group].get(option, got[group].get("arch"))
            if option not in OF_THE_CALL and preset != value:
                differ.add(option)
    assert differ == others


@pytest.mark.parametrize(
    "machine, asked, objective",
    [
        (Machine(), {}, "flow"),
        (Machine(gpu=True), {}, "v"),
        (Machine(), {"beta_schedule": "cosine"}, "v"),
        (Machine(), {"beta_schedule": "sigmoid", "objective": "eps"}, "eps"),
    ],
)
def test_flow_is_learnt_where_it_was_measured_and_nothing_says_otherwise(machine, asked, objective):
    from diffusion_ext import presets as task

    chosen = task.choose(task.Facts(32, 32, 3, 3786), machine, asked)
    assert next(c.flags["--objective"] for c in chosen if c.part == "criterion") == objective


# --- the mechanism ------------------------------------------------------------------------------


def test_the_shortest_command_is_whole(parse, speech):
    speech()
    cfg, plan = parse(TINY)
    assert cfg["model"]["_name"] == "conformer_speaker" and cfg["lr_scheduler"]["_name"] == "cosine"
    assert (cfg["dataset"]["batch_size"], cfg["optimization"]["max_update"]) == (64, 1600)
    assert cfg["checkpoint"]["save_dir"] == "checkpoints/DATA-speaker_id"
    assert "251 speakers" in plan.why["data"] and "0.8 hours" in plan.why["data"]


def test_what_is_printed_is_the_same_command(parse, speech):
    speech(name="a 'quoted' name")
    cfg, plan = parse(["a 'quoted' name", *TINY.split()[1:], "--lr", "1e-3"])
    again, none = parse(shlex.join(plan.command))
    assert none is None
    for group in cfg.keys() - {"task"}:
        assert cfg[group] == again[group], group
    assert {k: v for k, v in cfg["task"].items() if k not in NEW} == {
        k: v for k, v in again["task"].items() if k not in NEW
    }


def test_a_given_flag_wins_and_stands_once(parse, speech):
    speech()
    cfg, plan = parse(f"{TINY} --m 0.3 --weight-decay 0 --d-model 32")
    assert (cfg["criterion"]["m"], cfg["criterion"]["s"]) == (0.3, 30.0)
    assert cfg["optimizer"]["weight_decay"] == 0 and cfg["model"]["d_model"] == 32
    assert all(plan.command.count(flag) == 1 for flag in ("--m", "--weight-decay", "--d-model"))


@pytest.mark.parametrize(
    "given, gone, left",
    [
        ("--optimizer sgd", {"--adam-betas", "--weight-decay", "--lr"}, {"--clip-norm"}),
        ("--optimizer adam", set(), {"--adam-betas", "--lr"}),
        ("--lr-scheduler fixed", {"--warmup-updates"}, {"--lr"}),
        ("--lr-scheduler noam", {"--warmup-updates", "--lr"}, {"--adam-betas"}),
        ("--criterion softmax", {"--m", "--s"}, {"--arch", "--lr"}),
        ("--arch transformer_speaker", set(), {"--criterion"}),
        ("--max-tokens 5000", {"--batch-size"}, {"--max-update"}),
        ("--batch-size 8", set(), {"--max-update"}),
        ("--max-epoch 3", {"--max-update"}, {"--lr-period-updates"}),
        ("--keep-last-epochs 2", {"--no-epoch-checkpoints"}, set()),
    ],
)
def test_a_given_part_replaces_what_belongs_to_it(complete, speech, given, gone, left):
    speech()
    _, plan = complete(f"{TINY} --presets on {given}")
    flags = {word for word in plan.command if word.startswith("--")}
    assert not flags & gone and left <= flags and {given.split()[0]} <= flags


def test_when_presets_fill_in(complete, speech):
    speech()
    assert complete(TINY)[1] and complete(f"{TINY} --lr 1e-3 --lr-scheduler fixed")[1]
    whole = "--arch conformer_speaker --criterion softmax --optimizer adam"
    assert complete(f"{TINY} {whole} --batch-size 2")[1] is None
    assert complete(f"{TINY} {whole} --presets on")[1]
    with pytest.raises(UserError, match="--presets yes is none of auto, on, off"):
        complete(f"{TINY} --presets yes")


def test_a_short_training_warms_up_shortly(complete, speech):
    speech()
    assert complete(f"{TINY} --max-update 60")[0]["warmup-updates"] == "10"


@pytest.mark.parametrize("processes, each", [(1, 64), (2, 32), (4, 16), (3, 21), (100, 1)])
def test_all_processes_together_have_the_same_batch(complete, speech, monkeypatch, processes, each):
    speech()
    for name, value in dict(MASTER_ADDR="x", MASTER_PORT="1", RANK="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags, _ = complete(TINY)
    assert flags["batch-size"] == str(each) and flags["lr"] == "0.004"


def test_gpus_of_a_machine_are_processes_without_a_launcher_too(monkeypatch):
    """fairseq starts one on each; --cpu takes none of them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for cpu, machine in ((False, Machine(True, 8, 0.0)), (True, Machine(False, 1, 0.0))):
        args = argparse.Namespace(cpu=cpu, distributed_world_size=8)
        assert command.machine_of(args, {}) == machine


def test_memory_limits_the_batch_of_a_process():
    """16,384 pieces an update, at most 8,192 at a time."""
    split = {n: presets.shared_batch(16384, n, 8192)[:2] for n in (1, 2, 3, 8)}
    assert split == {1: (8192, 2), 2: (8192, 1), 3: (5461, 1), 8: (2048, 1)}


def test_data_that_is_none_is_one_sentence(complete, tmp_path):
    with pytest.raises(
        UserError, match="DATA is not a folder: run fairseq_ext.speaker.prepare first"
    ):
        complete(TINY)


# --- what was given -----------------------------------------------------------------------------


def test_what_was_given_is_known_to_all(parse, speech):
    speech()
    parse(f"{TINY} --m 0.2 --no-epoch-checkpoints")
    assert presets.given() == {"data", "user_dir", "task", "m", "no_epoch_checkpoints"}


def test_a_process_that_was_spawned_knows_it_from_its_arguments(parse, monkeypatch):
    from ext_common.given import remember

    remember(None)
    command = [
        "fairseq-train",
        "DATA",
        "--task",
        "speaker_id",
        "--arch",
        "conformer_speaker",
        "--lr",
        "1",
        "--s=3",
    ]
    monkeypatch.setattr("sys.argv", command)
    assert presets.given() == {"data", "task", "arch", "lr", "s"}


def test_the_arguments_of_another_program_give_nothing(registered, monkeypatch, capsys):
    from ext_common.given import remember

    remember(None)
    monkeypatch.setattr("sys.argv", ["mine.py", "--task", "none", "--lr", "x"])
    assert presets.given() == frozenset() and capsys.readouterr().err == ""


def test_all_of_a_recipe_is_given(parse, monkeypatch, repo_root):
    from ext_common.given import remember

    remember(None)
    folder = repo_root / "configs" / "translation"
    words = ["--config-dir", str(folder), "--config-name", "tiny_short", "task.data=DATA"]
    monkeypatch.setattr("sys.argv", ["/bin/fairseq-hydra-train", *words, "+task.minutes=3"])
    given = presets.given()
    assert {
        "max_tokens",
        "save_interval_updates",
        "noam_factor",
        "data",
        "minutes",
        "arch",
    } <= given
    assert not {"best_checkpoint_metric", "max_epoch"} & given


# --- where a training is kept, and how it goes on -----------------------------------------------


def cfg_of(data, task="speaker_id", **groups):
    return {"task": {"_name": task, "data": str(data)}, **groups}


def test_the_same_data_and_task_go_on(parse, speech, trained, tmp_path):
    speech()
    cfg, plan = parse(f"{TINY} --seed 5 --max-update 90")
    trained(tmp_path / "checkpoints" / "DATA-speaker_id", cfg)
    again, _ = parse(f"{TINY} --max-update 200")
    assert again["optimization"]["max_update"] == 200
    for group in ("model", "criterion", "optimizer", "dataset", "checkpoint"):
        assert again[group] == cfg[group], group
    assert again["common"]["seed"] == 5
    assert again["lr_scheduler"]["warmup_updates"] == cfg["lr_scheduler"]["warmup_updates"] == 15


@pytest.mark.parametrize("before, now, batch", [(1, 2, 32), (2, 1, 64)])
def test_another_number_of_processes_keeps_the_batch_of_all(
    parse, speech, trained, tmp_path, monkeypatch, before, now, batch
):
    speech()
    for name, value in dict(MASTER_ADDR="x", MASTER_PORT="1", RANK="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(before))
    cfg, _ = parse(TINY)
    cfg["distributed_training"]["distributed_world_size"] = before
    trained(tmp_path / "checkpoints" / "DATA-speaker_id", cfg)
    monkeypatch.setenv("WORLD_SIZE", str(now))
    again, _ = parse(TINY)
    assert cfg["dataset"]["batch_size"] * before == again["dataset"]["batch_size"] * now == 64
    assert again["dataset"]["batch_size"] == batch
    assert again["optimization"]["lr"] == cfg["optimization"]["lr"]


def test_a_training_of_before_goes_on_in_its_folder(parse, speech, trained, tmp_path):
    """Made by a whole command without --save-dir, with another model than the presets'."""
    speech()
    whole = "--arch transformer_speaker --layers 1 --criterion softmax --optimizer adam --lr 0.5"
    cfg, _ = parse(f"{TINY} {whole} --batch-size 2 --max-update 50 --save-dir checkpoints")
    for name in NEW:
        cfg["task"].pop(name, None)
    trained(tmp_path / "checkpoints", cfg)
    again, _ = parse(TINY)
    assert again["checkpoint"]["save_dir"] == "checkpoints"
    for group in ("model", "criterion", "optimizer", "optimization"):
        assert again[group] == cfg[group], group


def test_a_model_without_dataclass_goes_on(parse, trained, tmp_path):
    words = "x --user-dir fairseq_ext --task translation_spm"
    whole = "--arch transformer_iwslt_de_en --encoder-layers 2 --criterion cross_entropy --optimizer adam"
    cfg, _ = parse(f"{words} {whole} --lr-scheduler noam --max-tokens 9 --max-update 50")
    namespace = argparse.Namespace(**cfg["model"])
    trained(tmp_path / "checkpoints" / "x-translation_spm", {**cfg, "model": namespace})
    again, _ = parse(words)
    for option in ("arch", "encoder_layers", "encoder_embed_dim", "dropout"):
        assert again["model"][option] == cfg["model"][option]
    assert again["lr_scheduler"] == cfg["lr_scheduler"] and again["dataset"]["max_tokens"] == 9


def test_the_folder_of_other_data_is_refused(complete, speech, trained, tmp_path):
    speech()
    other = tmp_path / "elsewhere" / "DATA"
    trained(tmp_path / "checkpoints" / "DATA-speaker_id", cfg_of(other))
    with pytest.raises(
        UserError, match=f"holds a training of speaker_id on {other}, not on .*/DATA: give"
    ):
        complete(TINY)
    # named, it is the user's
    assert complete(f"{TINY} --save-dir checkpoints/x")[1]


def test_a_checkpoints_folder_of_something_else_is_left_alone(complete, speech, trained, tmp_path):
    speech()
    trained(tmp_path / "checkpoints", cfg_of(tmp_path / "DATA", task="translation_spm"))
    (tmp_path / "checkpoints" / "DATA-speaker_id").mkdir()
    (tmp_path / "checkpoints" / "DATA-speaker_id" / "checkpoint_last.pt").write_bytes(b"cut")
    assert complete(TINY)[0]["save-dir"] == "checkpoints/DATA-speaker_id"


def test_a_finished_training_ends_at_once(parse, speech, trained, tmp_path, caplog):
    speech()
    cfg, _ = parse(TINY)
    trained(tmp_path / "checkpoints" / "DATA-speaker_id", cfg, updates=1600)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as end:
        parse(TINY)
    assert end.value.code == 0 and "has all its 1,600 updates" in caplog.text
    with pytest.raises(SystemExit) as end:
        parse(f"{TINY} --max-updat 3")
    assert end.value.code == 2
