"""The pages hold together, and every command in them is one that its own parser takes."""

import argparse
import contextlib
import importlib
import io
import sys

import pytest
import yaml

from tests.docs.reading import PAGES, RESULTS, ROOT, blocks, inline_commands, links

# What is read by the shell or by programs that are not ours; only where a block is not run.
FOREIGN = {"export", "mkdir", "cut", "find", "done", "cp", "npm", "tar", "mv"}
PARTS = [
    "fairseq_ext.noam",
    *(f"fairseq_ext.speaker.{part}" for part in ("criterion", "model", "task")),
    "fairseq_ext.translation.task",
    *(f"diffusion_ext.{part}" for part in ("criterion", "model", "task")),
]
TRAINED = {
    "speaker_id": {"arch": "conformer_speaker", "criterion": "am_softmax"},
    "translation_spm": {"arch": "transformer_iwslt_de_en"},
    "diffusion": {"arch": "ddpm_unet", "criterion": "ddpm"},
}


class Parsed(Exception):
    """The words a parser left over."""


def in_blocks():
    for page in PAGES:
        for block in blocks(page):
            for number, words in enumerate(block.commands() if block.kind == "sh" else []):
                yield pytest.param(block, words, id=f"{block.page}:{block.line}.{number}")


def in_text():
    for page in [*PAGES, *RESULTS]:
        for command in inline_commands(page):
            yield pytest.param(command.split(), id=f"{page.name} {command[:60]}")


@pytest.mark.parametrize("block, words", list(in_blocks()))
def test_a_command_is_taken_by_its_parser(block, words, monkeypatch):
    if words[0] in FOREIGN:
        assert block.why, f"{words[0]} is none of our commands: say why it is not run"
    else:
        check(words, monkeypatch)


@pytest.mark.parametrize("words", list(in_text()))
def test_a_command_in_the_text_is_taken_by_its_parser(words, monkeypatch):
    check(words, monkeypatch)


def check(words, monkeypatch):
    """AssertionError, or SystemExit of the parser, where the command does not exist or does not take this."""
    if len(words) == 1:
        assert words[0].startswith("fairseq-"), words  # a name in running text
        return
    if words[0] == "torchrun":
        words = words[words.index("fairseq-train") :]
    program = words[0]
    if program == "bash":
        assert (ROOT / words[1]).is_file()
        program = ROOT / words[1].replace(".sh", ".py")
        if program.exists():
            assert not left_over(load(program), words[2:], monkeypatch)
    elif program == "python" and words[1] == "-m":
        assert known(words[2]), f"there is no {words[2]}"
        unknown = left_over(module_of(words[2]), words[3:], monkeypatch)
        assert not unknown or words[2] == "diffusion_ext.train", unknown
    elif program == "python":
        assert not left_over(load(ROOT / words[1]), words[2:], monkeypatch)
    elif program == "fairseq-train":
        assert not left_over_of_fairseq(words[1:])
    elif program == "fairseq-hydra-train":
        check_recipe(words[1:])
    else:
        raise AssertionError(f"{program} is none of our commands")


def known(name):
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(name) is not None
    return False


def module_of(name):
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(f"{name}.__main__"):
            name = f"{name}.__main__"
    if name in ("benchmarks.speaker.__main__", "benchmarks.translation.__main__"):
        name = name.replace("__main__", "speed")
    if name in ("benchmarks.backtranslation.__main__", "benchmarks.diffusion.__main__"):
        name = name.replace("__main__", "speed")
    return importlib.import_module(name)


def load(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


def left_over(module, words, monkeypatch):
    """What the module's own parser does not know of the words; nothing is done with them."""
    original, inside = argparse.ArgumentParser.parse_known_args, []

    def parse_known_args(self, args=None, namespace=None):
        if inside:
            return original(self, args, namespace)
        inside.append(True)
        _, unknown = original(self, args, namespace)
        raise Parsed(*unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            module.main(words) if module.main.__code__.co_argcount else module.main()
    except Parsed as parsed:
        return list(parsed.args)
    except SystemExit:
        raise AssertionError(error.getvalue()) from None
    raise AssertionError("it parses nothing")


def left_over_of_fairseq(words):
    from fairseq import options
    from fairseq.models import ARCH_MODEL_REGISTRY

    from ext_common import compat
    from ext_common.given import whole_parser

    compat.apply()
    # the plugins by their parts: they may have been imported before fairseq was, and registered nothing
    for part in PARTS:
        importlib.import_module(part)

    task = words[words.index("--task") + 1]
    parser = whole_parser(options.get_training_parser(), words, TRAINED[task])
    found, unknown = parser.parse_known_args(words)
    assert found.data and getattr(found, "arch", None) in {None, *ARCH_MODEL_REGISTRY}
    return unknown


def check_recipe(words):
    flags = dict(zip(words[:4:2], words[1:4:2], strict=True))
    path = ROOT / flags["--config-dir"] / f"{flags['--config-name']}.yaml"
    recipe = yaml.safe_load(path.read_text())
    for override in words[4:]:
        key, equals, _ = override.partition("=")
        section, _, field = key.partition(".")
        assert equals and field in recipe[section], override


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for to in links(page):
        assert (page.parent / to.split("#")[0]).exists(), f"{page.name} links to {to}"


def test_the_first_page_is_short_and_its_pictures_small():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    pictures = [line for line in lines if line.startswith("<img ")]
    assert len(pictures) == 3
    for path in (ROOT / "docs" / "pictures").iterdir():
        assert path.stat().st_size < 100_000, f"{path.name} is too large"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks(page):
    """An indented command would be run by no test; and nobody but us has our folder of data."""
    text = page.read_text(encoding="utf-8")
    for line in text.splitlines():
        assert not line.startswith(("    python -m ", "    fairseq-", "    bash "))
    assert "../shared" not in text
