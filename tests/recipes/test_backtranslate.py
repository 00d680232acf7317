"""scripts/backtranslate.py: what it refuses, the order of its steps, the whole way with kills in it."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "backtranslate.py"
LANGUAGES = ["--source-lang", "en", "--target-lang", "zh"]
# English word for word Chinese: a tiny model writes sentences of it after a few dozen updates.
WORDS = dict(
    zip(
        "we you they I see buy like eat red big new cold fish books apples houses".split(),
        "我们 你 他们 我 看见 买 喜欢 吃 红 大 新 冷 鱼 书 苹果 房子".split(),
        strict=True,
    )
)


AFTERWARDS = ("average", "translate", "score")
# Updates between checkpoints; at the end of an epoch (every 10) fairseq writes none with a number.
SAVED = 34


def load_script():
    spec = importlib.util.spec_from_file_location("backtranslate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # it puts the folder of its parts on the path itself
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


recipe = load_script()
steps_module, training = sys.modules["steps"], sys.modules["training"]


def sentence(draw):
    words = list(WORDS)
    chosen = [draw.choice(words[i : i + 4]) for i in (0, 4, 8, 12)]
    chosen += [draw.choice(words[8:]) for _ in range(draw.randrange(5))]
    return " ".join(chosen), "".join(WORDS[word] for word in chosen) + "。"


def sentences(count, seed, without=()):
    """Different pairs, none of `without`."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        source, target = sentence(draw)
        if source not in without:
            found[source] = target
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with DATA, mono.zh and mono.en, and short recipes of a tiny model."""
    folder = tmp_path_factory.mktemp("corpus")
    pairs = sentences(700, 1)
    rows = "".join(f"{source}\t{target}\n" for source, target in pairs.items())
    (folder / "pairs.tsv").write_text(rows, encoding="utf-8")
    more = sentences(160, 2, pairs)
    for lang, lines in (("zh", more.values()), ("en", more)):
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"mono.{lang}").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "fairseq_ext.translation.prepare", folder / "pairs.tsv"]
    command += [folder / "data", *LANGUAGES, "--spm-size", "330", "--on-leak", "remove"]
    done = processes.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    write_recipes(folder)
    return folder


def write_recipes(folder):
    """forward.yaml and reverse.yaml: those of the project, for seconds: a model of 1 + 1 layers."""
    (folder / "model").mkdir()
    configs = recipe_options().CONFIGS
    for kind in ("reverse", "forward"):
        config = yaml.safe_load((configs / f"{kind}.yaml").read_text())
        name = config["defaults"][0]["model"]
        model = yaml.safe_load((configs / "model" / f"{name}.yaml").read_text())
        model["dropout"] = 0.0
        for side in ("encoder", "decoder"):
            model |= {f"{side}_layers": 1, f"{side}_attention_heads": 2}
            model |= {f"{side}_embed_dim": 64, f"{side}_ffn_embed_dim": 128}
        (folder / "model" / f"{name}.yaml").write_text(yaml.safe_dump(model))
        config.pop("model", None)
        config["optimization"]["max_update"] = 7 * SAVED
        config["lr_scheduler"] = {"_name": "noam", "noam_factor": 0.3, "warmup_updates": 40}
        config["checkpoint"] |= {"save_interval_updates": SAVED, "keep_interval_updates": 2}
        config["checkpoint"] |= {"save_interval": 1000, "no_epoch_checkpoints": True}
        config["dataset"] |= {"max_tokens": 1000, "validate_interval": 1000}
        config["task"]["no_valid_text"] = True
        if kind == "forward":  # as those of configs/translation, which are of no direction
            del config["task"]["source_lang"], config["task"]["target_lang"]
        config["common"]["log_interval"] = 5
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config))


def recipe_options():
    return sys.modules["recipe_options"]


def arguments(corpus, out, *more):
    recipes = [f"--{kind}-config={corpus / kind}.yaml" for kind in ("reverse", "forward")]
    return [
        *(str(part) for part in (corpus / "data", corpus / "mono.zh", out)),
        *LANGUAGES,
        *recipes,
        "--average=2",
        *map(str, more),
    ]


def call(capfd, *args):
    """(exit code, what was said on stderr)."""
    with pytest.raises(SystemExit) as error:
        recipe.run(recipe.main, [*map(str, args)])
    return error.value.code, capfd.readouterr().err


# --- mistakes, before anything is written ------------------------------------------------------


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--rounds", 0], 2, "--rounds must be at least 1"),
        (["--rounds", 2], 2, "needs --mono-source"),
        (["--mono-source", "mono.en"], 2, "--rounds 2 or more"),
        (["--prefix", ">>eng<<"], 2, "belongs to --reverse"),
        (["--upsample", 0], 2, "--upsample must be at least 1"),
        (["--mode", "topq"], 1, "topk"),
        (["--mode-options", "k=3"], 1, "known: beam, lenpen"),
        (["--filters", "emty"], 1, "empty"),
        (["--filters", "round_trip"], 1, "needs a forward model"),
        (["--tag", "<XX>"], 1, "--extra-symbols '<XX>'"),
        (["--average", 3], 1, "leaves 2 checkpoints"),
        (["--reverse", "nowhere.pt"], 1, "nowhere.pt"),
        (["--forward-config", "nowhere.yaml"], 1, "nowhere.yaml is no YAML file"),
        (["--source-lang", "de"], 1, "is of en and zh, not of de and zh"),
    ],
)
def test_mistakes_are_one_sentence_before_any_training(corpus, tmp_path, capfd, flags, code, said):
    out = tmp_path / "out"
    got, error = call(capfd, *arguments(corpus, out, *flags))
    assert got == code and said in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_texts_that_are_none_or_of_the_other_language(corpus, tmp_path, capfd):
    args = arguments(corpus, tmp_path / "out")
    for mono, said in (
        (tmp_path / "nowhere.zh", "does not exist"),
        (corpus / "mono.en", "0% of the letters of a typical line are of zh"),
        ("-", "must be a file"),
    ):
        code, error = call(capfd, args[0], mono, *args[2:])
        assert code == 1 and said in error
    swapped = ["--rounds", 2, "--mono-source", corpus / "mono.zh"]
    code, error = call(capfd, *args, *swapped)
    assert code == 1 and "are of en" in error
    code, error = call(capfd, tmp_path, *args[1:])
    assert code == 1 and "is no prepared bitext" in error
    assert not (tmp_path / "out").exists()


def test_recipes_that_cannot_be_used(tmp_path):
    read = recipe_options().read_recipe
    path = tmp_path / "r.yaml"
    for text, said in (
        ("a: [", "is no recipe"),
        ("- a", "is no recipe"),
        ("optimization: {}", "no optimization.max_update"),
        ("defaults: [{model: huge}]\noptimization: {max_update: 5}", "huge.yaml is missing"),
    ):
        path.write_text(text)
        with pytest.raises(recipe.UserError, match=said):
            read(path, 5)
    path.write_text("optimization: {max_update: 5}")
    assert read(path, 5).updates == 5


def test_the_recipes_of_the_project_leave_as_many_checkpoints_as_are_averaged():
    options = recipe.BacktranslateOptions("en", "zh")
    for kind in ("reverse", "forward"):
        found = recipe_options().read_recipe(
            recipe_options().CONFIGS / f"{kind}.yaml", options.average
        )
        assert found.ours and found.updates > 0 and len(found.files) == 2


@pytest.mark.parametrize(
    "value", ["/a b/c", "/a=b,c", "/it's", "/a{b}$", "/ü", "/plain-1.x", "a:b"]
)
def test_hydra_reads_what_was_meant(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    text = sys.modules["recipe_steps"].override("task.data", value)
    parsed = OverridesParser.create().parse_override(text)
    assert parsed.key_or_group == "task.data" and parsed.value() == value


# --- the plan ----------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """Commands write their outputs and nothing else; the list of those that were run."""
    ran = []

    def run_command(command, on_line=None):
        parts = [str(part) for part in command]
        ran.append(parts)
        program = parts[0] if parts[0] != "python" else parts[2].rpartition(".")[2]
        if program == "fairseq-hydra-train":
            save = next(p for p in parts if p.startswith("checkpoint.save_dir=")).split("=")[1]
            write(Path(save) / "checkpoint_last.pt")
        elif program in ("generate", "assemble"):
            folder = Path(parts[4] if program == "generate" else parts[5])
            write(folder / "manifest.json")
            write(folder / "corpus.json")
        elif program == "translate":
            write(Path(parts[4]))
        elif program == "average":
            write(Path(parts[parts.index("--output") + 1]))
        elif program == "score":
            metrics = {name: {"value": 1.0, "interval": [0, 2]} for name in ("bleu", "chrf")}
            scores = {"lines": 3, "tokenizer": "zh", "metrics": metrics}
            if "--baseline" in parts:
                scores["comparisons"] = {"bleu": {"difference": 0.5, "bootstrap_p": 0.25}}
            write(Path(parts[parts.index("--json") + 1]), json.dumps(scores))

    def write(path, text="x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(steps_module, "run_command", run_command)
    monkeypatch.setattr(training, "run_command", run_command)
    return ran


def names(ran):
    """The program of each command, of a training its direction."""
    found = []
    for parts in ran:
        name = parts[0] if parts[0] != "python" else parts[2].rpartition(".")[2]
        if name == "fairseq-hydra-train":
            words = dict(part.lstrip("+").split("=", 1) for part in parts if "=" in part)
            name = f"train {words['task.source_lang']}-{words['task.target_lang']}"
        found.append(name)
    return found


def test_the_steps_of_one_round(corpus, tmp_path, stub, capfd):
    out = tmp_path / "out"
    assert call(capfd, *arguments(corpus, out))[0] == 0
    assert names(stub) == [
        "train zh-en",
        "average",
        "generate",
        "assemble",
        "train en-zh",
        "average",
        "translate",
        "score",
    ]
    train, _, generate, assemble, forward, *_ = stub
    # What was not given is left to the commands.
    assert not {"--mode", "--mode-options", "--nbest"} & set(generate)
    assert not {"--tag", "--upsample", "--filters"} & set(assemble)
    assert generate[generate.index("--round") + 1] == "1"
    model = Path(generate[generate.index("--model") + 1])
    assert model.resolve() == (out / "round1" / "reverse" / "average.pt").resolve()
    assert f"task.data={(corpus / 'data').resolve()}" in train
    assert f"task.data={(out / 'round1' / 'data').resolve()}" in forward

    stub.clear()
    assert call(capfd, *arguments(corpus, out))[0] == 0 and stub == []
    # A later round does not do the first again.
    more = ["--rounds", 2, "--mono-source", corpus / "mono.en"]
    assert call(capfd, *arguments(corpus, out, *more))[0] == 0
    second = ["generate", "assemble", "train zh-en", "average", "generate", "assemble"]
    assert names(stub) == [*second, "train en-zh", "average", "translate", "score"]


def test_the_steps_of_two_rounds_with_a_model_and_a_baseline(
    corpus, tmp_path, stub, capfd, monkeypatch
):
    import fairseq_ext.backtranslation.models.backends as backends

    said = {"sha256": "5" * 64, "source_lang": "zho", "target_lang": None}
    monkeypatch.setattr(backends, "describe_model", lambda path, options: said)
    out = tmp_path / "out"
    flags = ["--rounds", 2, "--mono-source", corpus / "mono.en", "--reverse", "opus/zh-en"]
    flags += ["--baseline", "--mode", "beam", "--tag", "none", "--upsample", 2, "--seed", 7]
    assert call(capfd, *arguments(corpus, out, *flags))[0] == 0
    forward = ["train en-zh", "average", "translate", "score"]
    assert names(stub) == [
        *forward,
        *["generate", "assemble"],
        *forward,
        *["generate", "assemble", "train zh-en", "average"],
        *["generate", "assemble"],
        *forward,
    ]
    generated = [parts for parts in stub if "fairseq_ext.backtranslation.generate" in parts]
    values = [dict(zip(parts[5::2], parts[6::2], strict=True)) for parts in generated]
    assert [Path(parts[3]).name for parts in generated] == ["mono.zh", "mono.en", "mono.zh"]
    models = [value["--model"].replace(str(out), "out") for value in values]
    assert models[0] == "opus/zh-en"
    assert models[1].endswith("round1/forward/average.pt")
    assert models[2].endswith("round2/reverse/average.pt")
    assert [value["--round"] for value in values] == ["1", "2", "2"]
    assert [value.get("--model-target") for value in values] == ["en", None, None]
    assert {value["--mode"] for value in values} == {"beam"}
    assert {value["--seed"] for value in values} == {"7"}
    assembled = [parts for parts in stub if "fairseq_ext.backtranslation.assemble" in parts]
    for parts in assembled:
        assert parts[parts.index("--tag") + 1] == "none"
        assert parts[parts.index("--upsample") + 1] == "2"
    scored = [parts for parts in stub if "fairseq_ext.translation.score" in parts]
    assert ["--baseline" in parts for parts in scored] == [False, True, True]


def test_the_table(corpus, tmp_path, stub, capfd):
    with pytest.raises(SystemExit):
        recipe.run(recipe.main, arguments(corpus, tmp_path / "out", "--baseline"))
    table = capfd.readouterr().out.partition("== result")[2]
    assert "tokenizer zh" in table
    assert re.search(r"baseline +1\.00 +0\.00 to +2\.00 +1\.00\n", table)
    assert re.search(r"round1 .* BLEU \+0\.50, p = 0\.2500", table)
    for name in ("round1/forward/average.pt", "round1/synthetic", "round1/scores.json"):
        assert name in table


def test_other_options_or_files_are_another_run(corpus, tmp_path, stub, capfd):
    out = tmp_path / "out"
    mono = tmp_path / "mono.zh"
    mono.write_bytes((corpus / "mono.zh").read_bytes())
    args = arguments(corpus, out)
    args[1] = str(mono)
    assert call(capfd, *args)[0] == 0
    code, error = call(capfd, *args, "--mode", "beam")
    assert code == 1 and "give another OUT, or start over with --fresh" in error
    mono.write_bytes(mono.read_bytes() + "我看见鱼。\n".encode())
    code, error = call(capfd, *args)
    assert code == 1 and error.startswith("error: MONO is not what")
    (out / "notes").write_text("mine")
    stub.clear()
    assert call(capfd, *args, "--fresh")[0] == 0
    assert len(stub) == 8 and (out / "notes").read_text() == "mine"


def test_a_model_of_the_wrong_direction_is_refused(corpus, tmp_path, capfd, monkeypatch):
    import fairseq_ext.backtranslation.models.backends as backends

    said = {"sha256": "5" * 64, "source_lang": "en", "target_lang": "zh"}
    monkeypatch.setattr(backends, "describe_model", lambda path, options: said)
    code, error = call(capfd, *arguments(corpus, tmp_path / "out", "--reverse", "model"))
    assert code == 1 and "translates from en to zh" in error and "from zh to en" in error


def test_help_of_the_shell_script_names_the_command():
    text = (ROOT / "scripts" / "backtranslate.sh").read_text()
    assert "setup.sh" in text and "scripts/backtranslate.py" in text.replace("$", "")


# --- the whole way -----------------------------------------------------------------------------


def run_recipe(args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *args]
    return processes.run(command, capture_output=True, text=True, env=env, timeout=900)


def commands(out):
    return re.findall(r"^\$ (.*)", out, re.MULTILINE)


def promised(out):
    """The bytes of what is the same in every run: synthetic text, mixture as text and as ids."""
    round1 = out / "round1"
    files = [round1 / "synthetic" / name for name in ("real.zh", "synthetic.en", "rejects.jsonl")]
    files += sorted((round1 / "data").glob("*.bin")) + sorted((round1 / "data" / "text").iterdir())
    assert len(files) > 10
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_killed_in_the_middle_it_continues_to_the_same_files(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_recipe(arguments(corpus, whole))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    scores = json.loads((whole / "round1" / "scores.json").read_text())
    assert f"{scores['metrics']['bleu']['value']:.2f}" in done.stdout.partition("== result")[2]
    synthetic = (whole / "round1" / "synthetic" / "synthetic.en").read_text().split("\n")[:-1]
    assert len(synthetic) == 160 and sum(map(bool, synthetic)) > 120
    state = torch.load(whole / "round1" / "reverse" / "average.pt", weights_only=False)
    assert state["task_state"]["translation"]["source_lang"] == "zh"

    # In the reverse training, while the synthetic text is written, in the forward training.
    saved = f"Saved checkpoint .* @ {SAVED} updates"
    round1 = killed / "round1"
    places = [
        lambda: re.search(saved, read(round1 / "reverse" / "train.log")),
        lambda: (round1 / "synthetic" / ".work").exists(),
        lambda: re.search(saved, read(round1 / "forward" / "train.log")),
    ]
    for place in places:
        kill_at(place, arguments(corpus, killed))
    last = run_recipe(arguments(corpus, killed))
    assert last.returncode == 0, last.stdout[-3000:] + last.stderr
    # What had ended is not done again, and the training went on from its last checkpoint.
    done = [" ".join(re.findall(r"^\S+|_ext\.\S+", line)) for line in commands(last.stdout)]
    assert done == ["fairseq-hydra-train", *(f"python _ext.translation.{w}" for w in AFTERWARDS)]
    for kind in ("reverse", "forward"):
        assert re.search(
            f"Loaded checkpoint .* @ {SAVED} updates", read(round1 / kind / "train.log")
        )
    assert promised(killed) == promised(whole)
    for model in ("reverse", "forward"):
        one, other = (
            torch.load(out / "round1" / model / "average.pt", weights_only=False)["model"]
            for out in (whole, killed)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
    translations = [(out / "round1" / "test.zh").read_bytes() for out in (whole, killed)]
    assert translations[0] == translations[1]

    before = {p: p.stat().st_mtime_ns for p in killed.rglob("*") if p.parent != killed}
    again = run_recipe(arguments(corpus, killed))
    assert again.returncode == 0 and commands(again.stdout) == []
    assert before == {p: p.stat().st_mtime_ns for p in killed.rglob("*") if p.parent != killed}


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def kill_at(place, args):
    """Run the recipe until `place()`, then kill -9 of it and of what it has started."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 600
    while not place():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    for child in children:
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
