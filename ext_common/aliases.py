"""Old names of modules that have moved: the same module object by both, so that what somebody registers,
replaces or compares by an old name is what everybody uses.

MOVED has them all; importing a wing makes Python know them. Nothing is imported until it is asked for.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

_S, _T, _B, _D = (
    "fairseq_ext.speaker",
    "fairseq_ext.translation",
    "fairseq_ext.backtranslation",
    "diffusion_ext",
)
MOVED = {
    "ext_common.compat.schedules": "ext_common.engine",
    "fairseq_ext.schedules": "fairseq_ext.draw_rates",
    f"{_S}.extract": f"{_S}.prepare.extract",
    f"{_S}.inputs": f"{_S}.inference.inputs",
    f"{_S}.layouts": f"{_S}.prepare.layouts",
    f"{_S}.prepare_report": f"{_S}.prepare.report",
    f"{_S}.prepare_steps": f"{_S}.prepare.steps",
    f"{_S}.splits": f"{_S}.prepare.splits",
    f"{_S}.tables": f"{_S}.prepare.tables",
    f"{_T}.binarise": f"{_T}.prepare.binarise",
    f"{_T}.checkpoint": f"{_T}.decode.checkpoint",
    f"{_T}.ctranslate": f"{_T}.decode.ctranslate",
    f"{_T}.ctranslate_convert": f"{_T}.decode.ctranslate_convert",
    f"{_T}.decoder": f"{_T}.decode.decoder",
    f"{_T}.decoding": f"{_T}.decode.options",
    f"{_T}.draws": f"{_T}.decode.draws",
    f"{_T}.files": f"{_T}.text.files",
    f"{_T}.filters": f"{_T}.prepare.filter_chain",
    f"{_T}.hashes": f"{_T}.prepare.hashes",
    f"{_T}.leaks": f"{_T}.prepare.leaks",
    f"{_T}.metrics": f"{_T}.score.metrics",
    f"{_T}.overlong": f"{_T}.text.overlong",
    f"{_T}.pair_filters": f"{_T}.prepare.filters",
    f"{_T}.parallel": "ext_common.parallel",
    f"{_T}.prepare_build": f"{_T}.prepare.build",
    f"{_T}.prepare_folder": f"{_T}.prepare.folder",
    f"{_T}.prepare_report": f"{_T}.prepare.report",
    f"{_T}.prepare_settings": f"{_T}.prepare.settings",
    f"{_T}.prepare_steps": f"{_T}.prepare.steps",
    f"{_T}.scoring": f"{_T}.score.scoring",
    f"{_T}.scoring_checks": f"{_T}.score.checks",
    f"{_T}.significance": f"{_T}.score.significance",
    f"{_T}.splits": f"{_T}.prepare.splits",
    f"{_T}.spm": f"{_T}.text.spm",
    f"{_T}.translator": f"{_T}.decode.translator",
    f"{_T}.vocabulary": f"{_T}.text.vocabulary",
    f"{_B}.assemble_build": f"{_B}.assemble.build",
    f"{_B}.assemble_clean": f"{_B}.assemble.clean",
    f"{_B}.backends": f"{_B}.models.backends",
    f"{_B}.chunks": f"{_B}.generate.chunks",
    f"{_B}.claims": f"{_B}.generate.claims",
    f"{_B}.generate_guard": f"{_T}.prepare.leaks",
    f"{_B}.generate_merge": f"{_B}.generate.merge",
    f"{_B}.generate_setup": f"{_B}.generate.setup",
    f"{_B}.generate_work": f"{_B}.generate.work",
    f"{_B}.guards": f"{_B}.assemble.checks",
    f"{_B}.huggingface": f"{_B}.models.huggingface",
    f"{_B}.huggingface_ctranslate": f"{_B}.models.huggingface_ctranslate",
    f"{_B}.huggingface_decoder": f"{_B}.models.huggingface_decoder",
    f"{_B}.huggingface_folder": f"{_B}.models.huggingface_folder",
    f"{_B}.monolingual": f"{_B}.generate.mono",
    f"{_B}.ranks": f"{_B}.generate.claims",
    f"{_B}.sanity": f"{_B}.generate.sanity",
    f"{_B}.synthetic": f"{_B}.assemble.synthetic",
    f"{_B}.synthetic_filters": f"{_B}.assemble.filters",
    f"{_D}.classifier": f"{_D}.evaluate.classifier",
    f"{_D}.comparison": f"{_D}.evaluate.comparison",
    f"{_D}.counterpart": f"{_D}.export.counterpart",
    f"{_D}.detectors": f"{_D}.evaluate.detectors",
    f"{_D}.evaluation": f"{_D}.evaluate.evaluation",
    f"{_D}.exported": f"{_D}.export.exported",
    f"{_D}.extractors": f"{_D}.evaluate.extractors",
    f"{_D}.feature_cache": f"{_D}.evaluate.cache",
    f"{_D}.image_build": f"{_D}.prepare.build",
    f"{_D}.image_datasets": f"{_D}.prepare.known",
    f"{_D}.image_options": f"{_D}.prepare.options",
    f"{_D}.image_sets": f"{_D}.prepare.sets",
    f"{_D}.image_store": f"{_D}.store",
    f"{_D}.images": f"{_D}.prepare.images",
    f"{_D}.inception": f"{_D}.evaluate.inception",
    f"{_D}.leakage": f"{_D}.evaluate.leakage",
    f"{_D}.metrics": f"{_D}.evaluate.metrics",
    f"{_D}.neighbours": f"{_D}.evaluate.neighbours",
    f"{_D}.trajectories": f"{_D}.sample",
    f"{_D}.editing": f"{_D}.sample.editing",
    f"{_D}.variational": f"{_D}.weightings",
}


def install() -> None:
    """Make Python know the names of MOVED."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


class _Moved(MetaPathFinder):
    """Asked last: what is there by its own name comes first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = MOVED.get(fullname)
        return ModuleSpec(fullname, _Alias(new)) if new else None


class _Alias(Loader):
    """Gives the module of another name."""

    def __init__(self, new: str) -> None:
        self.new = new
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has just given it that of the old name
        module.__spec__ = self.spec

    def get_code(self, fullname: str) -> CodeType:
        """For `python -m` with an old name."""
        found = importlib.util.find_spec(self.new)
        loader = found and found.loader
        code = loader.get_code(self.new) if isinstance(loader, InspectLoader) else None
        if code is None:
            raise ImportError(f"{self.new} cannot be run", name=fullname)
        return code


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was a module, and whose names now stand in `module`.

    AttributeError for a name that is not there, and for dunder names, which belong to the package itself.
    """
    package = module.rpartition(".")[0]

    def __getattr__(name: str) -> Any:
        # `from package import room` asks here first; on AttributeError Python imports the room
        if name.startswith("__") or importlib.util.find_spec(f"{package}.{name}"):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)

    return __getattr__
